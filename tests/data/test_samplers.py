"""Samplers, `drop_last`, `shuffle: off` and `val_batch_size`: the order depends on (seed, epoch) alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import RandomSampler, Sampler, Subset, TensorDataset

from tests.helpers import compose_settings, train_session
from trainkit.build.session import build_session
from trainkit.core.errors import ConfigError
from trainkit.data.samplers import balanced, classes_of_samples, contiguous, length_bucketed, order_of_sampler

SMALL = ["data=synthetic", "data.train.size=50", "model=mlp", "progress=off", "epochs=1", "data.split=off"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class HalfSampler(Sampler[int]):
    """Every other index, shuffled by Python's generator; `set_epoch` must have been called."""

    def __init__(self, data_source: Any, batch_size: int, first: int = 0) -> None:
        self.indices = list(range(first, len(data_source), 2))
        self.batch_size, self.epoch = batch_size, -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        assert self.epoch >= 0
        return iter(random.sample(self.indices, len(self.indices)))

    def __len__(self) -> int:
        return len(self.indices)


class Yields:
    """A sampler that yields what it was given."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class Private:
    """A sampler with its own generator, whose state a resumed run does not have."""

    def __init__(self, dataset: Any) -> None:
        self.samples, self.own = len(dataset), random.Random(0)

    def __iter__(self) -> Iterator[int]:
        return iter(self.own.sample(range(self.samples), self.samples))


def test_a_balanced_epoch_has_each_class_equally_often_and_each_sample_before_any_twice() -> None:
    targets = torch.tensor([0] * 40 + [1] * 7 + [5] * 3)
    order = balanced(targets, generator())
    assert len(order) == 50
    counts = targets[order].unique(return_counts=True)[1]
    assert counts.max() - counts.min() <= 1
    for label in (1, 5):
        uses = order[targets[order] == label].bincount(minlength=50)[targets == label]
        assert uses.max() - uses.min() <= 1


def test_the_classes_of_a_subset_are_those_of_its_samples() -> None:
    inner = TensorDataset(torch.zeros(6), torch.tensor([0, 1, 2, 3, 4, 5]))
    assert classes_of_samples(Subset(Subset(inner, [5, 3, 1, 0]), [1, 2])).tolist() == [3, 1]


def test_bucketed_batches_have_similar_lengths_and_use_every_sample_once() -> None:
    lengths = torch.randint(1, 100, (1003,), generator=generator())
    order = length_bucketed(lengths, 10, generator(1))
    assert sorted(order.tolist()) == list(range(1003))
    batches = order[:1000].reshape(-1, 10)
    spread = (lengths[batches].amax(1) - lengths[batches].amin(1)).float().mean()
    assert spread < 12  # 80 in random batches
    assert not order.equal(length_bucketed(lengths, 10, generator(2)))


def test_contiguous_rows_continue_in_the_next_batch() -> None:
    batches = contiguous(23, 4).reshape(-1, 4)
    assert batches[0].tolist() == [0, 5, 10, 15]
    assert torch.equal(batches[1:], batches[:-1] + 1)


def test_the_order_of_a_sampler_depends_on_seed_and_epoch_alone() -> None:
    state = torch.get_rng_state(), random.getstate()
    order = order_of_sampler(RandomSampler(range(20)), 20, seed=3)
    first, second = order(0), order(1)
    assert not first.equal(second)
    assert order(0).equal(first)
    assert not order_of_sampler(RandomSampler(range(20)), 20, seed=4)(0).equal(first)
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([], "yields no indices"),
        ([[0, 1]], "yields lists of indices"),
        ([0, 9], "yields the index 9, and the training set has 4 samples"),
        ([0.5], "yields 0.5, not an index"),
        ([True, False], "yields True and False, not indices"),
        (itertools.cycle([0]), "yields more than 4,000 indices"),
    ],
)
def test_a_sampler_that_does_not_yield_indices_is_a_config_error(items: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        order_of_sampler(Yields(items), 4, seed=0)


def test_a_sampler_with_its_own_generator_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="which a resumed run cannot repeat"):
        order_of_sampler(Private(range(30)), 30, seed=0)


def test_a_dotted_path_gets_the_data_set_and_the_batch_size() -> None:
    path = f"{HalfSampler.__module__}.{HalfSampler.__qualname__}"
    session = build_session(compose_settings([*SMALL, f"data.sampler={path}"]))
    assert (session.train.samples, len(session.train)) == (25, 1)
    session = build_session(compose_settings([*SMALL, f"+data.sampler={{_target_: {path}, first: 1}}", "batch_size=5"]))
    targets = torch.cat([targets for _, targets in session.train.batches(0)])
    assert set(targets.tolist()) == {1, 3, 5, 7, 9}  # the class of sample i is i % 10


def test_without_shuffle_an_epoch_keeps_the_order_and_drop_last_leaves_out_the_rest() -> None:
    session = build_session(compose_settings([*SMALL, "data.shuffle=off", "data.drop_last=on", "batch_size=8"]))
    targets = torch.cat([targets for _, targets in session.train.batches(1)])
    assert targets.tolist() == [index % 10 for index in range(48)]
    assert session.train.samples == 48


def test_drop_last_that_leaves_no_batch_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="do not fill a batch of 64"):
        build_session(compose_settings([*SMALL, "data.drop_last=on", "batch_size=64"]))


@pytest.mark.parametrize("limit", ["off", "2"])
def test_the_size_of_validation_batches_does_not_change_the_validation(limit: str) -> None:
    def losses(size: int) -> Tensor:
        overrides = [*SMALL, "data.split=0.6", "batch_size=4", f"val_batch_size={size}", f"limit_batches={limit}"]
        best = train_session(overrides).state.progress.best
        assert best is not None
        return torch.tensor([best["val/loss"], best["val/accuracy"]])

    torch.testing.assert_close(losses(7), losses(4), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.sampler=balance", "did you mean data.sampler=balanced"),
        ("data.sampler=torch.utils.data.RandomSample", "RandomSampler"),
        ("+data.sampler={a: 1}", "has no _target_"),
    ],
)
def test_a_misspelt_sampler_is_a_config_error(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compose_settings([override])


def test_a_sampler_without_classes_names_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="does not list the classes"):
        classes_of_samples(TensorDataset(torch.zeros(3), torch.zeros(3)))
