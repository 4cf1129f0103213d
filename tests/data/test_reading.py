"""The random numbers of a sample depend on (seed, epoch, sample) alone, in any process and after any other read."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Subset

from trainkit.core.errors import DataError
from trainkit.data.loaders import make_loader
from trainkit.data.prepare import Prepare
from trainkit.data.reading import SeededReader, epoch_seed
from trainkit.data.sample_errors import UnequalSamplesError
from trainkit.data.store import Store

CPU, COUNT, SEED = torch.device("cpu"), 37, 5
Draw = Callable[[int], float]


class Drawing:
    """Random samples from a function; counts the reads."""

    def __init__(self, draw: Draw) -> None:
        self.draw, self.reads = draw, 0

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads += 1
        return torch.tensor([float(index), self.draw(index)], dtype=torch.float64), index


class Batches(Drawing):
    """Samples that are read by batch."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


def failing(_: int) -> float:
    number = random.random()
    if number < 0.1:
        raise OSError("truncated")
    return number


DRAWS: dict[str, Draw] = {
    "nothing": lambda index: index / 7,
    "Python": lambda _: random.random(),
    "NumPy": lambda _: float(np.random.rand()),
    "torch": lambda _: float(torch.rand(())),
    "all": lambda _: random.gauss() + float(np.random.randn()) + float(torch.randn(())),
    "each in its time": lambda index: [
        lambda: 0.5,
        random.random,
        np.random.randn,
        lambda: float(torch.rand(())),
    ][index * 4 // COUNT](),
    "by chance": lambda _: random.random() if np.random.rand() < 0.1 else 0.5,
    "with errors": failing,
}


def by_hand(draw: Draw, epoch: int, index: int) -> float | None:
    """Return a sample drawn with every generator seeded for it; None if it cannot be read."""
    number = zlib.crc32(index.to_bytes(8, "little"), epoch_seed(SEED, epoch))
    random.seed(number)
    np.random.seed(zlib.crc32(b"numpy", number))
    torch.manual_seed(number)
    try:
        return draw(index)
    except OSError:
        return None


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("draws", list(DRAWS))
def test_a_sample_equals_the_sample_drawn_with_every_generator_seeded_for_it(draws: str, workers: int) -> None:
    loader = make_loader(
        Store.of(Drawing(DRAWS[draws])), Prepare(CPU), batch_size=4, seed=SEED, num_workers=workers, skip=True
    )
    try:
        for epoch in (0, 1, 3):
            seen = torch.cat([inputs for inputs, _ in loader.batches(epoch)])
            wanted = {index: by_hand(DRAWS[draws], epoch, index) for index in range(COUNT)}
            assert {int(index): value for index, value in seen.tolist()} == {
                index: value for index, value in wanted.items() if value is not None
            }
    finally:
        loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_torchs_seed_is_that_of_the_first_sample_of_the_batch(workers: int) -> None:
    dataset = Drawing(lambda _: float(torch.initial_seed()))  # reads the seed, and draws nothing
    loader = make_loader(Store.of(dataset), Prepare(CPU), batch_size=4, seed=SEED, num_workers=workers)
    try:
        for epoch in (0, 1):
            for inputs, targets in loader.batches(epoch):
                first = int(targets[0]).to_bytes(8, "little")
                assert set(inputs[:, 1].tolist()) == {float(zlib.crc32(first, epoch_seed(SEED, epoch)))}
    finally:
        loader.close()


def test_a_set_that_reads_batches_is_seeded_by_the_first_sample_of_the_batch() -> None:
    reader = SeededReader(Batches(DRAWS["Python"]), SEED, skip=False)
    for start in (0, 7):
        read = reader.__getitems__([(2, index) for index in range(start, start + 4)])
        assert read.samples[0][0][1] == by_hand(DRAWS["Python"], 2, start)


@pytest.mark.parametrize("draws", list(DRAWS))
def test_reading_does_not_advance_any_generator_of_the_model(draws: str) -> None:
    def following() -> tuple[float, ...]:
        return random.gauss(), random.random(), *np.random.randn(3), *torch.randn(3).tolist()

    for odd in (False, True):  # with and without the second number of a normal pair left over
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        np.random.randn(2 - odd), random.gauss()
        wanted = following()
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        np.random.randn(2 - odd), random.gauss()
        for _ in make_loader(Store.of(Drawing(DRAWS[draws])), Prepare(CPU), batch_size=4, seed=SEED, skip=True).batches(
            0
        ):
            pass
        assert following() == wanted


def test_the_example_is_one_sample_twice_of_any_structure() -> None:
    class Words(Drawing):
        def __getitem__(self, index: int) -> Any:
            return {"name": f"sample {index}", "depth": torch.zeros(2, dtype=torch.uint16)}, index

    inputs, targets = make_loader(Store.of(Words(DRAWS["nothing"])), Prepare(CPU), batch_size=4, seed=SEED).example()
    assert inputs["name"] == ["sample 0", "sample 0"]
    assert inputs["depth"].shape == (2, 2)
    assert targets.tolist() == [0, 0]


@pytest.mark.parametrize("skip", [False, True])
def test_an_unreadable_sample_is_named_for_a_set_that_reads_batches(skip: bool) -> None:
    class Broken(Batches):
        def __getitem__(self, index: int) -> Any:
            if index == 3:
                raise OSError("truncated")
            return super().__getitem__(index)

    loader = make_loader(Store.of(Broken(DRAWS["nothing"])), Prepare(CPU), batch_size=4, seed=None, skip=skip)
    if skip:
        assert [len(targets) for _, targets in loader.batches(0)][:2] == [3, 4]
    else:
        with pytest.raises(DataError, match=r"sample 3: OSError: truncated"):
            list(loader.batches(0))


def test_a_set_that_returns_too_few_samples_is_an_error() -> None:
    class LimitedLoader(Batches):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            return super().__getitems__([index for index in indices if index != 3])

    with pytest.raises(ValueError, match="got 4 indices and returned 3 samples"):
        list(make_loader(Store.of(LimitedLoader(DRAWS["nothing"])), Prepare(CPU), batch_size=4, seed=None).batches(0))


def test_only_the_first_samples_that_advance_a_generator_are_read_twice() -> None:
    for draws, reads in {"nothing": 0, "torch": 1, "Python": 1, "NumPy": 1, "all": 1}.items():
        dataset = Drawing(DRAWS[draws])
        loader = make_loader(Store.of(dataset), Prepare(CPU), batch_size=4, seed=SEED)
        list(loader.batches(0))
        assert dataset.reads == COUNT + reads
        list(loader.batches(1))
        assert dataset.reads == 2 * COUNT + reads
    late = Drawing(DRAWS["each in its time"])  # two generators are advanced in the middle of batches
    list(make_loader(Store.of(late), Prepare(CPU), batch_size=4, seed=SEED).batches(0))
    assert COUNT < late.reads <= COUNT + 2 * 4


@pytest.mark.parametrize("make", [lambda *shape: torch.zeros(shape), lambda *shape: np.zeros(shape)])
@pytest.mark.parametrize("workers", [0, 2])
def test_samples_of_different_shapes_are_named_by_their_numbers(workers: int, make: Any) -> None:
    class Shapes(Drawing):
        def __getitem__(self, index: int) -> Any:
            return {"image": make(3, 8 + (index == 3)), "id": index}, index

    part: Subset[Any] = Subset(cast(Any, Shapes(DRAWS["nothing"])), [2, 3, 4, 5])  # numbers are those of the whole set
    loader = make_loader(Store.of(part), Prepare(CPU), batch_size=4, seed=None, num_workers=workers)
    try:
        with pytest.raises(UnequalSamplesError, match=r"sample 2 is inputs .*\(3, 8\).* sample 3 is inputs .*\(3, 9\)"):
            list(loader.batches(0))
    finally:
        loader.close()
