"""The batches of a stream: a hand-written endless loop over the samples is the oracle."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from tests.helpers import CPU, compose_settings
from trainkit.build.session import build_session
from trainkit.core.errors import ConfigError, DataError
from trainkit.data.prepare import Prepare
from trainkit.data.stream_loader import StreamLoader
from trainkit.data.streams import Stream, is_stream, plain_copy

SIZE = 23  # 6 batches of 4, the last of 3


class Counts:
    """Yields the numbers from 0, plus 100 in each further pass."""

    classes = 3

    def __init__(self, size: int = SIZE, per_pass: int = 100) -> None:
        self.size, self.per_pass, self.number = size, per_pass, 0

    def set_epoch(self, number: int) -> None:
        """Choose the pass."""
        self.number = number

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.size):
            yield torch.tensor([float(index + self.number * self.per_pass)]), index % 3


class Sized(Counts):
    """Has a length, which may be wrong."""

    def __init__(self, size: int = SIZE, length: int = SIZE) -> None:
        super().__init__(size)
        self.length = length

    def __len__(self) -> int:
        return self.length


class Divided(IterableDataset[Any]):
    """Divides its samples among the workers, as torch's documentation shows."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return iter([(torch.tensor([float(n)]), n % 3) for n in range(first, SIZE, step)])


class Sharing(Divided):
    """As `Divided`, and says so."""

    shards_itself = True


def loader_of(dataset: Any, steps: int | None = 4, workers: int = 0, **more: Any) -> StreamLoader:
    """Return a loader of batches of 4."""
    length = len(dataset) if hasattr(dataset, "__len__") else None
    stream = Stream(dataset, "data.train", length)
    return StreamLoader(stream, Prepare(CPU), batch_size=4, steps=steps, num_workers=workers, seed=3, **more)


def numbers(batches: Iterator[tuple[Tensor, Tensor]]) -> list[list[int]]:
    """Return the first input of each sample of each batch."""
    return [inputs[:, 0].int().tolist() for inputs, _ in batches]


def endless(size: int = SIZE, batch: int = 4) -> Iterator[list[int]]:
    """Yield the batches of all passes over `Counts`."""
    for number in itertools.count():
        indices = range(size)
        yield from ([index + 100 * number for index in indices[at : at + batch]] for at in range(0, size, batch))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_epochs_are_parts_of_an_endless_sequence_of_passes(workers: int) -> None:
    loader = loader_of(Counts(), workers=workers)
    found = [batch for epoch in range(5) for batch in numbers(loader.batches(epoch))]
    assert found == list(itertools.islice(endless(), 20))
    loader.close()


def test_a_validation_is_one_pass_and_a_limit_takes_its_beginning() -> None:
    expected = list(itertools.islice(endless(), 6))
    loader = loader_of(Counts(), steps=None)
    assert [numbers(loader.batches(0)) for _ in range(2)] == [expected, expected]
    assert numbers(loader_of(Counts(), steps=None, limit=10).batches(0)) == [*expected[:2], [8, 9]]
    assert numbers(loader_of(Counts(), steps=8, limit=8).batches(0)) == [
        [n + 100 * number for n in part] for number in range(4) for part in ([0, 1, 2, 3], [4, 5, 6, 7])
    ]
    assert numbers(loader_of(Counts(), steps=None, drop_last=True).batches(0)) == expected[:5]


@pytest.mark.parametrize("kind", [Counts, Sharing])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("used", [1, 6, 9])
def test_a_loader_continues_at_the_last_batch_and_at_the_last_but_one(kind: Any, workers: int, used: int) -> None:
    straight = loader_of(kind(), steps=20, workers=workers)
    expected = numbers(straight.batches(0))
    half = loader_of(kind(), steps=20, workers=workers)
    list(itertools.islice(half.batches(0), used))
    for batch in (used, used - 1):  # a stop may arrive after a batch was read, and before it was used
        resumed = loader_of(kind(), steps=20, workers=workers)
        resumed.load_state_dict(half.state_dict(0, batch), 0, batch)
        assert numbers(resumed.batches(0, batch)) == expected[batch:]
        resumed.close()
    straight.close()
    half.close()


def test_workers_that_are_killed_while_they_hold_a_lock_do_not_block_the_end_of_the_reading() -> None:
    loader = loader_of(Counts(), workers=2)
    next(loader.batches(0))
    lock = loader._fetched._workers_done_event._cond
    lock.acquire()  # as a worker that is killed while it reads the event
    ending = threading.Thread(target=loader.end_reading, daemon=True)
    ending.start()
    ending.join(timeout=60)
    assert not ending.is_alive()


def test_each_sample_is_read_once_by_several_workers() -> None:
    plain = loader_of(Divided(), steps=None, workers=2)
    assert numbers(plain.batches(0)) == list(itertools.islice(endless(), 6))  # its own division is switched off
    shared = loader_of(Sharing(), steps=None, workers=2)
    found = numbers(shared.batches(0))
    assert sorted(itertools.chain(*found)) == list(range(SIZE))
    assert found[:2] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    plain.close()
    shared.close()


def test_reading_a_stream_does_not_advance_the_generators_of_the_model() -> None:
    class Draws(Counts):
        def __iter__(self) -> Iterator[Any]:
            for index in range(self.size):
                yield torch.rand(1), index % 3

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    loader = loader_of(Draws())
    one, other = ([inputs for inputs, _ in loader.batches(epoch)] for epoch in (0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert not torch.equal(one[0], other[0])
    again = [inputs for inputs, _ in loader_of(Draws()).batches(0)]
    assert all(map(torch.equal, one, again))


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (Counts(0), "data.train has no samples"),
        (Sized(20, 23), "pass 1 ended after 20 samples"),
        (Sized(27, 24), "pass 1 has more samples"),
    ],
)
def test_a_pass_of_another_length_is_a_data_error(dataset: Any, words: str) -> None:
    loader = loader_of(dataset, steps=6, exact=True)
    with pytest.raises(DataError, match=words):
        for epoch in range(2):
            list(loader.batches(epoch))


def test_a_later_pass_without_samples_is_a_data_error() -> None:
    class Once(Counts):
        def __iter__(self) -> Iterator[Any]:
            return super().__iter__() if self.number == 0 else iter(())

    with pytest.raises(DataError, match="pass 2 has no samples"):
        list(loader_of(Once(), steps=9).batches(0))


def test_a_stream_has_iter_and_no_items() -> None:
    assert all(map(is_stream, (Counts(), Sized(), Divided(), iter([]))))
    assert not any(map(is_stream, ([1], {1: 2}, torch.utils.data.TensorDataset(torch.ones(2)), object())))


def test_a_state_is_copied_and_holds_plain_values_only() -> None:
    state: dict[str, Any] = {"a": [1, (2.5, None)], "b": torch.ones(2)}
    copied = plain_copy(state)
    state["a"].append(3)
    assert copied["a"] == [1, (2.5, None)]
    with pytest.raises(ValueError, match=r"state_dict\['x'\] is a set"):
        plain_copy({"x": {1}})


BASE = ["data.train._target_=tests.data.test_streams.Counts", "data.split=off", "steps_per_epoch=3"]
BASE += ["model={_target_: torch.nn.Linear, in_features: 1, out_features: 3}"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["steps_per_epoch=off"], ["without a length", "steps_per_epoch=N"]),
        (["data.split=0.2"], ["data.split=0.2", "cannot be divided", "data.val._target_"]),
        (["data.folds=5", "data.fold=0"], ["data.folds=5", "cannot be divided"]),
        (["data.sampler=balanced"], ["data.sampler", "no samples by index"]),
        (["data.standardize=on"], ["data.standardize", "is not read before the training"]),
        (["data.cache=memory"], ["data.cache=memory", "data.cache=auto"]),
        (["data.on_unreadable=skip"], ["data.on_unreadable=skip", "ends at an error"]),
    ],
    ids=str,
)
def test_keys_that_a_stream_cannot_follow_are_a_config_error(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build_session(compose_settings([*BASE, *overrides]))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_stream_with_a_length_needs_no_steps_per_epoch() -> None:
    more = ["data.train._target_=tests.data.test_streams.Sized", "steps_per_epoch=off", "batch_size=4"]
    session = build_session(compose_settings([*BASE, *more]))
    assert (len(session.train), session.train.samples) == (6, SIZE)
    session = build_session(compose_settings([*BASE, *more, "data.drop_last=on"]))
    assert len(session.train) == 5
    session = build_session(compose_settings([*BASE, *more, "limit_batches=2"]))
    assert len(session.train) == 2
