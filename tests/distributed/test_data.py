"""The data of several ranks: the shares of a batch are the batch of one process, in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset, get_worker_info

from trainkit.data.augment import Augment
from trainkit.data.batch_order import BatchOrder, Share
from trainkit.data.loaders import Loader, SlicingLoader, StreamingLoader, make_loader
from trainkit.data.prepare import NO_SAMPLES, Batch, Prepare
from trainkit.data.store import Store
from trainkit.data.stream_loader import StreamLoader
from trainkit.data.streams import Stream

CPU = torch.device("cpu")
SAMPLES, SIZE = 23, 6


def joined(shares: list[list[Batch]]) -> list[Batch]:
    """Return the batches of several ranks as whole batches."""
    batches = []
    for parts in zip(*shares, strict=True):
        present = [part for part in parts if part is not NO_SAMPLES]
        batches.append((torch.cat([part[0] for part in present]), torch.cat([part[1] for part in present])))
    return batches


def assert_equal(one: list[Batch], other: list[Batch]) -> None:
    """Compare batches bit by bit."""
    assert len(one) == len(other)
    for (inputs, targets), (expected, expected_targets) in zip(one, other, strict=True):
        assert inputs.equal(expected)
        assert targets.equal(expected_targets)


# ------------------------------------------------------------------------------------- data by index


class ReadsOne(torch.utils.data.Dataset[Any]):
    """Images that are read one by one; it records which were read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.read.append(index)
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (3, 8, 8), generator=generator, dtype=torch.uint8), index % 5


def in_memory() -> Store:
    """Return the same images in memory."""
    samples = [ReadsOne()[index] for index in range(SAMPLES)]
    return Store.of(TensorDataset(torch.stack([s[0] for s in samples]), torch.tensor([s[1] for s in samples])))


AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "moved": {"flip": "random", "crop_padding": 2, "cutout": 3},
    "mixup": {"mixup": 0.4, "flip": "alternating"},
    "cutmix": {"cutmix": 1.0, "crop_padding": 1, "crop_fill": "reflect"},
    "both": {"mixup": 0.2, "cutmix": 1.0, "cutout": 2},
}


def loader_of(kind: str, share: Share, options: dict[str, Any], **more: Any) -> Loader:
    """Return the loader of a process."""
    mixes = bool(options.get("mixup") or options.get("cutmix"))
    share = Share(share.rank, share.ranks, with_previous=mixes and share.ranks > 1)
    augment = Augment(seed=1, classes=5, **options) if options else None
    prepare = Prepare(CPU, torch.tensor(0.4), torch.tensor(0.3), augment, drop_first=share.with_previous)
    store = in_memory() if kind == "memory" else Store(ReadsOne())
    return make_loader(store, prepare, batch_size=SIZE, seed=7, share=share, **more)


@pytest.mark.parametrize("ranks", [2, 3, 7])
@pytest.mark.parametrize("kind", ["memory", "files"])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_shares_have_the_inputs_and_targets_of_one_process_bit_by_bit(name: str, kind: str, ranks: int) -> None:
    options = AUGMENTATIONS[name]
    for epoch in range(2):
        whole = list(loader_of(kind, Share(), options).batches(epoch))
        shares = [list(loader_of(kind, Share(rank, ranks), options).batches(epoch)) for rank in range(ranks)]
        assert_equal(joined(shares), whole)


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_a_share_starts_at_any_batch(kind: str) -> None:
    options = AUGMENTATIONS["both"]
    rest = list(loader_of(kind, Share(1, 2), options).batches(1, start=2))
    assert_equal(rest, list(loader_of(kind, Share(1, 2), options).batches(1))[2:])


@pytest.mark.parametrize(
    "more",
    [
        {"drop_last": True},
        {"limit_batches": 2},
        {"limit_batches": 2, "limit_batch_size": 4},
        {"order": lambda epoch: torch.arange(5).repeat(3) + epoch},
    ],
)
def test_the_shares_of_any_order_are_the_batches_of_one_process(more: dict[str, Any]) -> None:
    whole = list(loader_of("memory", Share(), {}, **more).batches(1))
    shares = [list(loader_of("memory", Share(rank, 4), {}, **more).batches(1)) for rank in range(4)]
    assert_equal(joined(shares), whole)


def test_a_rank_reads_the_samples_of_its_share_alone() -> None:
    read = []
    for rank in range(3):
        loader = loader_of("files", Share(rank, 3), {})
        list(loader.batches(0))
        expected = [
            i for part in BatchOrder(SAMPLES, SIZE, None, 7, share=Share(rank, 3)).batches() for i in part.tolist()
        ]
        assert loader.dataset.read == [expected[0], *expected] or loader.dataset.read == expected
        read += expected
    assert sorted(read) == list(range(SAMPLES))


def test_mixing_reads_one_more_sample_of_each_batch() -> None:
    share = Share(1, 3, with_previous=True)
    assert share.positions(6) == [1, 2, 3]
    assert Share(0, 3, with_previous=True).positions(6) == [5, 0, 1]
    assert Share(0, 3, with_previous=True).positions(2) == []
    assert Share(2, 3, with_previous=True).positions(1) == [0, 0]


def test_a_description_names_the_samples_of_the_share_alone() -> None:
    loader = loader_of("memory", Share(1, 2), AUGMENTATIONS["mixup"])
    order = BatchOrder(SAMPLES, SIZE, None, 7, share=Share(1, 2))
    order.epoch = 2
    names = ", ".join(map(str, next(order.batches()).tolist()))
    assert loader.describe(2, 0, torch.zeros(3, 3, 8, 8)) == f"samples {names}"


class Damaged(ReadsOne):
    """Some of the samples cannot be read."""

    def __init__(self, damaged: set[int]) -> None:
        super().__init__()
        self.damaged = damaged

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index in self.damaged:
            raise OSError("damaged")
        return super().__getitem__(index)


@pytest.mark.parametrize("held", [False, True])
def test_a_share_that_cannot_be_read_is_empty_and_the_batch_keeps_the_other_samples(held: bool) -> None:
    damaged = {0, 1, 2, 9}

    def batches(share: Share) -> tuple[list[Batch], dict[int, str]]:
        dataset, prepare = Damaged(damaged), Prepare(CPU)
        order = BatchOrder(SAMPLES, SIZE, None, None, share=share)
        if held:
            store = Store(dataset, in_memory().tensors, unreadable=dict.fromkeys(damaged, "damaged"))
            loader: Any = SlicingLoader(store, order, prepare)
        else:
            loader = StreamingLoader(dataset, order, prepare, skip=True)
        return list(loader.batches(0)), loader.unreadable

    whole, known = batches(Share())
    parts = [batches(Share(rank, 2)) for rank in range(2)]
    assert parts[0][0][0] is NO_SAMPLES
    assert_equal(joined([part for part, _ in parts]), whole)
    assert parts[0][1] | parts[1][1] == known


# ------------------------------------------------------------------------------------------- streams


class Numbers(IterableDataset[Any]):
    """A stream of numbers, which may divide itself among workers."""

    def __init__(self, count: int = SAMPLES, *, shards_itself: bool = False) -> None:
        self.count, self.shards_itself = count, shards_itself

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info is not None else (0, 1)
        for index in range(first, self.count, step):
            yield torch.tensor([float(index)]), index


def stream_loader(share: Share, dataset: Any = None, *, steps: int | None = 9, **more: Any) -> StreamLoader:
    """Return the loader of a process that reads a whole stream."""
    stream = Stream(Numbers() if dataset is None else dataset, "data.train", None)
    return StreamLoader(stream, Prepare(CPU), batch_size=SIZE, steps=steps, seed=3, share=share, **more)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("more", [{}, {"drop_last": True}, {"limit": 16}])
def test_the_shares_of_a_stream_are_the_batches_of_one_process(workers: int, more: dict[str, Any]) -> None:
    whole = [pair for epoch in range(2) for pair in stream_loader(Share(), num_workers=workers, **more).batches(epoch)]
    shares = []
    for rank in range(7):
        loader = stream_loader(Share(rank, 7), num_workers=workers, **more)
        shares.append([pair for epoch in range(2) for pair in loader.batches(epoch)])
        loader.close()
    assert_equal(joined(shares), whole)
