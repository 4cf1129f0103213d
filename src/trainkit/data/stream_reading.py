"""Read the batches of a stream, in the main process or in a worker. Each batch has the position at its end."""

from __future__ import annotations

import itertools
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker

from trainkit.core.rng import NUMPY_GENERATOR, PYTHON_GENERATOR, TORCH_GENERATOR, SeparateGenerators
from trainkit.data.batch_order import WHOLE, Share
from trainkit.data.form import SampleForm
from trainkit.data.reading import CollatedBatch, ReadSamples, collate, epoch_seed, is_file_error
from trainkit.data.streams import Stream, begin_pass, plain_copy

NOTHING = CollatedBatch(None, None, [], [])
Isolation = Callable[[], AbstractContextManager[None]]


class ShareProgress(NamedTuple):
    """How far the share of a worker is read. If the set does not shard itself, all workers have one share.

    Attributes:
        batches: the number of batches that were read.
        state: the state of the set after these batches; None: the batches are read again and skipped.
        ended: whether it is known that the share has no further samples.
    """

    batches: int = 0
    state: Any = None
    ended: bool = False


class Position(NamedTuple):
    """A position in a stream: the end of a batch.

    Attributes:
        pass_number: the number of the pass, from 0.
        batches: the number of batches of this pass that were used.
        samples: the number of samples in these batches.
        next_share: the index of the share with the next batch.
        shares: the progress of each share.
    """

    pass_number: int = 0
    batches: int = 0
    samples: int = 0
    next_share: int = 0
    shares: tuple[ShareProgress, ...] = (ShareProgress(),)

    def after(self, read: StreamBatch) -> Position:
        """Return the position at the end of the batch that follows."""
        samples = self.samples + read.samples
        if read.share is None:
            return self._replace(batches=self.batches + 1, samples=samples)
        index = read.worker if len(self.shares) > 1 else 0
        shares = (*self.shares[:index], read.share, *self.shares[index + 1 :])
        next_share = (index + 1) % len(shares)
        return Position(self.pass_number, self.batches + 1, samples, next_share, shares)


@dataclass
class StreamBatch:
    """A batch of a stream.

    Attributes:
        batch: the batch, or the part of it that this process reads, which may be `NOTHING`.
        worker: the number of the worker that read the batch.
        share: the progress of the worker's share after the batch; None: only other processes have samples.
        samples: the number of samples in the batch, of all processes.
    """

    batch: CollatedBatch
    worker: int
    share: ShareProgress | None
    samples: int

    def pin_memory(self) -> StreamBatch:
        """Return the batch in pinned memory; torch's `DataLoader` calls this method."""
        return replace(self, batch=self.batch.pin_memory())


class StreamReader(IterableDataset[StreamBatch | None]):
    """The batches of a pass from `position` on, for torch's `DataLoader`.

    If the set shards itself, each worker reads the batches of its share, and `DataLoader` takes one batch of each
    worker in turn. Otherwise each worker reads all samples and yields every N-th batch. Then the number of workers
    changes nothing.

    With several processes, each of them reads all samples and keeps its share of each batch. With `divided`, the set
    divides its samples among the workers of all processes, and each process reads a part of each batch.

    Args:
        stream: the samples.
        batch_size: the number of samples in a batch; the last batch of a share may be smaller.
        seed: the seed of the random numbers that the set draws. These depend on (seed, pass, batch).
        form: which parts of a sample are the inputs and the targets, and how samples become a batch.
        limit: the maximum number of samples in a pass; None: no limit.
        drop_last: skip the last batch if it is smaller.
        share: which samples of each batch this process reads.
        divided: whether the set divides its samples among the processes.
    """

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        seed: int,
        form: SampleForm,
        limit: int | None,
        *,
        drop_last: bool,
        share: Share = WHOLE,
        divided: bool = False,
    ) -> None:
        self.share, self.divided = share, divided
        self.part = share.size(batch_size) if divided else batch_size  # samples that a batch takes from this process
        self.stream, self.batch_size, self.seed, self.form = stream, batch_size, seed, form
        self.limit, self.drop_last = limit, drop_last
        self.shards_itself, self.has_state = stream.shards_itself, stream.reason_to_reread is None
        self.position = Position()

    def __iter__(self) -> Iterator[StreamBatch | None]:
        info = get_worker_info()
        if info is None:
            return self._batches(self.stream.copy(), self._isolation(), worker=0, workers=1)
        if self.share.ranks > 1:
            act_as_worker(self._identity(info.id, info.num_workers), self.stream.dataset)
        logging.getLogger("datasets.iterable_dataset").addFilter(_is_no_worker_warning)
        if not self.shards_itself:
            torch_worker._worker_info = None  # a set that divides its samples by it would lose most of them
        batches = self._batches(self.stream.dataset, nullcontext, worker=info.id, workers=info.num_workers)
        # `DataLoader` begins with worker 0. So the workers before the next share yield None first.
        is_early = self.shards_itself and info.id < self.position.next_share
        return itertools.chain([None], batches) if is_early else batches

    def _identity(self, worker: int, workers: int) -> tuple[int, int]:
        """Return the number of a worker, and the number of workers, among which the set divides its samples."""
        if self.divided:
            return self.share.rank * workers + worker, self.share.ranks * workers
        return worker, workers

    def _isolation(self) -> Isolation:
        """Return the context in which the main process runs the code of the set."""
        separate = SeparateGenerators().active
        if self.share.ranks == 1:
            return separate
        number = self._identity(0, 1) if self.divided else None

        @contextmanager
        def isolated() -> Iterator[None]:
            with separate(), acting_as_worker(number, self.stream.dataset):
                yield

        return isolated

    def _batches(self, dataset: Any, isolated: Isolation, *, worker: int, workers: int) -> Iterator[StreamBatch]:
        """Yield the batches of a worker that follow the position.

        Args:
            dataset: the set, which changes while it is read.
            isolated: a context for the code of the set.
            worker: the number of the worker.
            workers: the number of workers.
        """
        share = self.position.shares[worker if self.shards_itself else 0]
        if share.ended:
            return
        samples = _samples(dataset, self.position.pass_number, share.state)
        first, step = self._identity(worker, workers) if self.shards_itself else (0, 1)
        for index in itertools.count(0 if share.state is None else share.batches):  # of a batch in the share
            number = first + index * step  # of the batch in the pass
            size = self._size(number, workers)
            is_used = index < share.batches  # before the position, and read only to be skipped
            is_own = self.shards_itself or (index - share.batches) % workers == worker
            state, batch = None, NOTHING
            with isolated():
                self._seed(number)
                read = self._read(samples, number, size)
                count = len(read.samples)
                if not read.unreadable and (count == 0 or (self.drop_last and count < self.part)):
                    return
                if (is_own and not is_used) or read.unreadable:
                    batch = collate(self._own(read), self.form)
                    state = plain_copy(dataset.state_dict()) if self.has_state else None
            del read  # so that the next samples use its memory again, which is in the CPU's cache
            if batch is not NOTHING:
                yield StreamBatch(batch, worker, ShareProgress(index + 1, state, ended=count < size), count)
            if count < size:
                return

    def _size(self, number: int, workers: int) -> int:
        """Return the number of samples in a batch. The loader limits a pass that several shares divide."""
        if self.limit is None or self.divided or (self.shards_itself and workers > 1):
            return self.part
        return max(0, min(self.batch_size, self.limit - number * self.batch_size))

    def _own(self, read: ReadSamples) -> ReadSamples:
        """Return the samples of a batch that this process keeps."""
        if self.share.ranks == 1 or self.divided or read.unreadable:
            return read
        places = self.share.positions(len(read.samples))
        samples, indices = ([values[place] for place in places] for values in (read.samples, read.indices))
        return replace(read, samples=samples, indices=indices)

    def _read(self, samples: Iterator[Any], number: int, size: int) -> ReadSamples:
        """Read the samples of a batch. If a file error ends the reading, return it as an unreadable sample."""
        first = number * self.batch_size
        read: list[Any] = []
        try:
            read.extend(itertools.islice(samples, size))  # keeps the samples before an error
        except Exception as error:
            index = first + len(read)
            if not is_file_error(error):
                error.add_note(f"raised while sample {index} of pass {self.position.pass_number + 1} was read")
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return ReadSamples(self.stream.dataset, [], [], [(index, reason)])
        return ReadSamples(self.stream.dataset, read, [*range(first, first + len(read))], [])

    def _seed(self, number: int) -> None:
        """Seed all global generators for a batch of the pass."""
        seed = zlib.crc32(number.to_bytes(8, "little"), epoch_seed(self.seed, self.position.pass_number))
        for generator in (PYTHON_GENERATOR, NUMPY_GENERATOR, TORCH_GENERATOR):
            generator.seed(seed)


def _samples(dataset: Any, pass_number: int, state: Any) -> Iterator[Any]:
    """Yield the samples of a pass that follow a state.

    This is a generator, so all code of the set runs while a sample is read.
    """
    begin_pass(dataset, pass_number)
    if state is not None:
        dataset.load_state_dict(plain_copy(state))
    yield from dataset


def act_as_worker(number: tuple[int, int] | None, dataset: Any) -> None:
    """Let the code of a set see the worker as if there were no ranks, among which it may divide its samples.

    Args:
        number: the number of the worker, and the number of workers; None: no worker.
        dataset: the set.
    """
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    info = None
    if number is not None:
        info = torch_worker.WorkerInfo(id=number[0], num_workers=number[1], seed=0, dataset=dataset)
    torch_worker._worker_info = info


@contextmanager
def acting_as_worker(number: tuple[int, int] | None, dataset: Any) -> Iterator[None]:
    """Act as a worker in the block, see `act_as_worker`."""
    environment = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    before = torch_worker._worker_info
    act_as_worker(number, dataset)
    try:
        yield
    finally:
        for name in ("RANK", "WORLD_SIZE"):
            del os.environ[name]
        os.environ |= environment
        torch_worker._worker_info = before


def _is_no_worker_warning(record: logging.LogRecord) -> bool:
    """Return False for the warning about workers without a share, which the run reports itself."""
    return not record.getMessage().startswith("Too many dataloader workers")
