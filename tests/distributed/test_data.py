"""The data of several ranks: the shares of a batch are the batch of one process, in order."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset, get_worker_info

from tests.processes import Forks
from trainkit.core.ranks import Ranks
from trainkit.data.augment import Augment
from trainkit.data.batch_order import BatchOrder, Share
from trainkit.data.loaders import Loader, SlicingLoader, StreamingLoader, make_loader
from trainkit.data.prepare import NO_SAMPLES, Batch, Prepare
from trainkit.data.store import Store
from trainkit.data.stream_loader import StreamLoader
from trainkit.data.stream_reading import acting_as_worker
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


# --------------------------------------------------------------------------- one decoding per machine


def hold_at_once(forks: Forks, folder: Path, cache: Path) -> tuple[int, list[str]]:
    """Let three processes hold images at once; return how many of them decoded, and their notes."""
    start: Any = functools.partial(forks.start, cwd=folder, call="tests.distributed.worker:hold_images")
    processes = [start(TRAINKIT_CACHE=str(cache)) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0], [process.stderr for process in processes]
    return len((folder / "decoded").read_text().splitlines()), [process.stdout.strip() for process in processes]


def test_three_processes_that_start_at_once_decode_images_once(forks: Forks, tmp_path: Path) -> None:
    decoded, notes = hold_at_once(forks, tmp_path, tmp_path / "cache")
    assert decoded == 1
    assert sorted(notes)[:1] == [""]
    assert all("decoded by" in note for note in sorted(notes)[1:])


def test_each_process_decodes_images_if_the_cache_cannot_be_written(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    decoded, notes = hold_at_once(forks, tmp_path, tmp_path / "file")
    assert decoded == 3
    assert all(note.startswith(", decoded by each process: ") for note in notes)


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


def batches_of(loader: StreamLoader, epochs: int = 2) -> list[Batch]:
    """Return the batches of the first epochs."""
    try:
        return [pair for epoch in range(epochs) for pair in loader.batches(epoch)]
    finally:
        loader.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("more", [{}, {"drop_last": True}, {"limit": 16}])
def test_the_shares_of_a_stream_are_the_batches_of_one_process(workers: int, more: dict[str, Any]) -> None:
    whole = batches_of(stream_loader(Share(), num_workers=workers, **more))
    ranks = 7 if workers == 0 else 2
    shares = [batches_of(stream_loader(Share(rank, ranks), num_workers=workers, **more)) for rank in range(ranks)]
    assert_equal(joined(shares), whole)


def test_the_position_in_a_stream_fits_any_number_of_ranks() -> None:
    whole = batches_of(stream_loader(Share()))
    loader = stream_loader(Share(1, 2))
    reading = loader.batches(0)
    for _ in range(6):
        next(reading)
    saved = loader.state_dict(0, 6)
    shares = []
    for rank in range(3):
        other = stream_loader(Share(rank, 3))
        other.load_state_dict(saved, 0, 6)
        shares.append([*other.batches(0, 6), *other.batches(1)])
    assert_equal(joined(shares), whole[6:])


# ------------------------------------------------------------------- streams that divide their samples


class Threads:
    """Several ranks as threads, of which one runs at a time, until it waits for the others."""

    def __init__(self, size: int) -> None:
        self.size, self.rows = size, [None] * size
        self.lock, self.barrier = threading.Lock(), threading.Barrier(size, timeout=60)

    def run(self, function: Callable[[Ranks], Any]) -> list[Any]:
        """Return what the function returns for each rank."""

        def of_rank(rank: int) -> Any:
            with self.lock:
                return function(ThreadRanks(rank, self))

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(of_rank, range(self.size)))


class ThreadRanks(Ranks):
    """One of these ranks."""

    def __init__(self, rank: int, threads: Threads) -> None:
        super().__init__(rank, threads.size)
        self.threads = threads

    def agree(self, *numbers: int) -> list[list[int]]:
        return self.gather(list(numbers))

    def gather(self, value: Any) -> list[Any]:
        threads = self.threads
        threads.rows[self.rank] = value
        threads.lock.release()
        try:
            threads.barrier.wait()
            rows = list(threads.rows)
            threads.barrier.wait()
        finally:
            threads.lock.acquire()
        return rows


def divided(ranks: Ranks, count: int = SAMPLES, **more: Any) -> StreamLoader:
    """Return the loader of a rank that reads its own samples."""
    dataset = Numbers(count, shards_itself=True)
    return stream_loader(Share(ranks.rank, ranks.size), dataset, ranks=ranks, **more)


def samples_of(batches: list[Batch]) -> list[list[int]]:
    """Return the samples of each batch."""
    return [[] if batch is NO_SAMPLES else batch[1].tolist() for batch in batches]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_divide_a_stream_end_a_pass_together_and_lose_no_sample(ranks: int) -> None:
    steps = {2: 4, 3: 4}[ranks]
    found = Threads(ranks).run(lambda own: samples_of(batches_of(divided(own, steps=steps), epochs=3)))
    for epoch in range(3):
        read = [
            sample for of_rank in found for batch in of_rank[epoch * steps : (epoch + 1) * steps] for sample in batch
        ]
        assert sorted(read) == list(range(SAMPLES))
    for rank, batches in enumerate(found):
        assert {sample % ranks for batch in batches for sample in batch} == {rank}


def test_a_rank_without_samples_waits_for_the_end_of_the_pass() -> None:
    found = Threads(3).run(lambda own: samples_of(batches_of(divided(own, count=2, steps=1), epochs=3)))
    assert found == [[[0]] * 3, [[1]] * 3, [[]] * 3]


def test_drop_last_ends_a_pass_with_the_first_rank_that_has_too_few_samples() -> None:
    found = Threads(2).run(lambda own: samples_of(batches_of(divided(own, steps=3, drop_last=True), epochs=2)))
    assert all(len(batch) == SIZE // 2 for of_rank in found for batch in of_rank)
    assert found[0][:3] == found[0][3:]


def test_a_validation_reads_each_sample_once() -> None:
    found = Threads(2).run(lambda own: samples_of(list(divided(own, steps=None).batches(0))))
    assert sorted(sample for of_rank in found for batch in of_rank for sample in batch) == list(range(SAMPLES))


def test_the_position_of_a_divided_stream_holds_the_shares_of_all_ranks() -> None:
    def interrupted(own: Ranks) -> Any:
        loader = divided(own)
        reading = loader.batches(0)
        for _ in range(6):
            next(reading)
        saved, rest = loader.state_dict(0, 6), samples_of([*reading, *loader.batches(1)])
        other = divided(own)
        other.load_state_dict(saved, 0, 6)
        return saved, rest, samples_of([*other.batches(0, 6), *other.batches(1)])

    results = Threads(2).run(interrupted)
    assert results[0][0] == results[1][0]
    for _, rest, resumed in results:
        assert resumed == rest
    with pytest.raises(ValueError, match="was read by 2 workers, and now by 1"):
        stream_loader(Share(), Numbers(shards_itself=True)).load_state_dict(results[0][0], 0, 6)


def test_the_environment_of_the_ranks_is_hidden_from_a_stream_and_then_restored(monkeypatch: Any) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with acting_as_worker((1, 4), None):
        info = get_worker_info()
        assert info is not None
        assert (info.id, info.num_workers) == (1, 4)
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
    assert get_worker_info() is None
    assert os.environ["RANK"] == "3"
    assert "WORLD_SIZE" not in os.environ
