"""Epochs of a fixed number of batches: a hand-written endless loop over the passes is the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from tests.helpers import CPU, ItemDataset, compose_settings
from trainkit.build.session import build_session
from trainkit.data.flow import FlowingLoader
from trainkit.data.loaders import Loader, make_loader
from trainkit.data.prepare import Prepare
from trainkit.data.store import Store

COUNT = 23  # 6 batches of 4, the last of 3


def loader_of(kind: str) -> Loader:
    """Return a loader that slices tensors, or reads samples with some workers."""
    numbers = torch.arange(COUNT)
    if kind == "sliced":
        store = Store.of(TensorDataset(numbers, numbers))
    else:
        store = Store(ItemDataset(lambda i: (torch.tensor(i) + torch.rand(()), i), COUNT))
    return make_loader(store, Prepare(CPU), batch_size=4, seed=7, num_workers=2 if kind == "2 workers" else 0)


def endless(loader: Loader) -> Iterator[Any]:
    """Yield the batches of all passes."""
    for number in itertools.count():
        yield from loader.batches(number)


def equal(one: list[Any], other: list[Any]) -> bool:
    """Return whether two lists of batches are equal."""
    pairs: list[tuple[Tensor, Tensor]] = [
        pair for a, b in zip(one, other, strict=True) for pair in zip(a, b, strict=True)
    ]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", ["sliced", "read", pytest.param("2 workers", marks=pytest.mark.slow)])
@pytest.mark.parametrize("steps", [1, 4, 6, 15])
def test_the_epochs_are_parts_of_an_endless_sequence_of_passes(kind: str, steps: int) -> None:
    flow, plain = FlowingLoader(loader_of(kind), steps), loader_of(kind)
    expected = list(itertools.islice(endless(plain), 5 * steps))
    found = [batch for epoch in range(5) for batch in flow.batches(epoch)]
    assert equal(found, expected)
    assert len(flow) == steps
    for epoch, start in ((3, 0), (0, 0), (2, steps // 2), (4, steps)):  # from anywhere
        assert equal(list(flow.batches(epoch, start)), expected[epoch * steps + start : (epoch + 1) * steps])
    flow.close()
    plain.close()


def test_a_batch_is_described_by_its_place_in_its_pass() -> None:
    flow, plain = FlowingLoader(loader_of("read"), 4), loader_of("read")
    inputs = next(flow.batches(2, 1))[0]
    assert flow.describe(2, 1, inputs) == plain.describe(1, 3, inputs)  # batch 9 is batch 3 of pass 1


def test_the_run_reports_the_samples_of_the_whole_set() -> None:
    session = build_session(compose_settings(["steps_per_epoch=3", "data.split=off"]))
    assert (session.train.samples, len(session.train)) == (1797, 3)
