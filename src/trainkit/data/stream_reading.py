"""Reads the batches of a stream, in the main process or in a worker, and where each batch ends."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker

from trainkit.core.rng import NUMPY_GENERATOR, PYTHON_GENERATOR, SeparateGenerators
from trainkit.data.form import SampleForm
from trainkit.data.reading import CollatedBatch, ReadSamples, collate, epoch_seed, is_file_error
from trainkit.data.streams import Stream, begin_pass, plain_copy

NOTHING = CollatedBatch(None, None, [], [])
Isolation = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Share:
    """How far one reader of a pass is. If the set does not share itself, there is one share for all workers.

    Attributes:
        batches: the batches read.
        state: the state of the set after these batches; None: the batches are read again and skipped.
        ended: whether the samples are known to be over.
    """

    batches: int = 0
    state: Any = None
    ended: bool = False


@dataclass(frozen=True)
class Position:
    """A place in a stream: the end of a batch.

    Attributes:
        number: of the pass, from 0.
        batch: the batches of this pass that were used.
        samples: their samples.
        turn: the worker that reads the next batch, if the set shares itself.
        shares: of each worker, or one share for all.
    """

    number: int = 0
    batch: int = 0
    samples: int = 0
    turn: int = 0
    shares: tuple[Share, ...] = (Share(),)

    def after(self, read: StreamBatch) -> Position:
        """Return the place after a batch."""
        place = read.worker if len(self.shares) > 1 else 0
        shares = (*self.shares[:place], read.share, *self.shares[place + 1 :])
        turn = (place + 1) % len(shares)
        return Position(self.number, self.batch + 1, self.samples + len(read.batch.indices), turn, shares)


@dataclass
class StreamBatch:
    """A batch of a stream, and the share of its worker after it."""

    batch: CollatedBatch
    worker: int
    share: Share

    def pin_memory(self) -> StreamBatch:
        """Return the batch in pinned memory; torch's `DataLoader` calls this method."""
        return replace(self, batch=self.batch.pin_memory())


class StreamReader(IterableDataset[StreamBatch | None]):
    """The batches of the pass at `position`, for torch's `DataLoader`.

    If the set shares itself, each worker reads the batches of its share, and `DataLoader` takes one of each worker in
    turn. Otherwise each worker reads all samples and yields every N-th batch, so the number of workers changes nothing.

    Args:
        stream: the samples.
        batch_size: samples per batch; the last batch of a share may be shorter.
        seed: of the random numbers that the set draws. They depend on (seed, pass, batch).
        form: which parts of a sample are the inputs and the targets.
        limit: the maximum number of samples in a pass.
        drop_last: leave out a batch that is smaller.
    """

    def __init__(
        self, stream: Stream, batch_size: int, seed: int, form: SampleForm, limit: int | None, *, drop_last: bool
    ) -> None:
        self.stream, self.batch_size, self.seed, self.form = stream, batch_size, seed, form
        self.limit, self.drop_last = limit, drop_last
        self.shares_itself, self.has_state = stream.shares_itself, stream.why_stateless is None
        self.position = Position()

    def __iter__(self) -> Iterator[StreamBatch | None]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        dataset = self.stream.dataset
        if info is None:
            dataset = self.stream.copy()
        elif not self.shares_itself:
            torch_worker._worker_info = None  # a set that divides its samples by it would lose most of them
        isolated: Isolation = SeparateGenerators().active if info is None else nullcontext
        if not self.shares_itself:
            return self._batches(
                dataset, isolated, self.position.shares[0], worker, keep=(worker, workers), step=(0, 1)
            )
        share = self.position.shares[worker]
        batches = self._batches(dataset, isolated, share, worker, keep=(0, 1), step=(worker, workers))
        # `DataLoader` begins with worker 0, so the workers before `turn` yield nothing first.
        return itertools.chain([None], batches) if worker < self.position.turn else batches

    def _batches(
        self,
        dataset: Any,
        isolated: Isolation,
        share: Share,
        worker: int,
        *,
        keep: tuple[int, int],
        step: tuple[int, int],
    ) -> Iterator[StreamBatch]:
        """Yield the batches of a share after those that were used.

        Args:
            dataset: is changed.
            isolated: a context for code of the set.
            share: what was used.
            worker: the number of the worker.
            keep: of the batches, keep the first number modulo the second.
            step: batch n of the share is batch first + n * second of the pass.
        """
        if share.ended:
            return
        samples = _samples(dataset, self.position.number, share.state)
        for place in itertools.count(0 if share.state is None else share.batches):
            number = step[0] + place * step[1]
            size = self.batch_size
            if self.limit is not None and step[1] == 1:
                size = min(size, self.limit - number * self.batch_size)
            kept = place >= share.batches and (place - share.batches) % keep[1] == keep[0]
            state, batch = None, NOTHING
            with isolated():
                self._seed(number)
                read = self._read(samples, number, size)
                count = len(read.samples)
                if not read.unreadable and (count == 0 or (self.drop_last and count < self.batch_size)):
                    return
                if kept or read.unreadable:
                    batch = collate(read, self.form)
                    state = plain_copy(dataset.state_dict()) if self.has_state else None
            del read  # so that the next samples use its memory again, which is in the CPU's cache
            if batch is not NOTHING:
                yield StreamBatch(batch, worker, Share(place + 1, state, count < size))
            if count < size:
                return

    def _read(self, samples: Iterator[Any], number: int, size: int) -> ReadSamples:
        """Read the samples of a batch. A file error ends it as an unreadable sample."""
        first = number * self.batch_size
        read = ReadSamples(self.stream.dataset, [], [], [])
        try:
            read.samples.extend(itertools.islice(samples, max(size, 0)))  # keeps those before an error
        except Exception as error:
            index = first + len(read.samples)
            if not is_file_error(error):
                error.add_note(f"raised while sample {index} of pass {self.position.number + 1} was read")
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return replace(read, samples=[], unreadable=[(index, reason)])
        return replace(read, indices=list(range(first, first + len(read.samples))))

    def _seed(self, number: int) -> None:
        seed = zlib.crc32(number.to_bytes(8, "little"), epoch_seed(self.seed, self.position.number))
        torch.default_generator.manual_seed(seed)
        PYTHON_GENERATOR.seed(seed)
        NUMPY_GENERATOR.seed(seed)


def _samples(dataset: Any, number: int, state: Any) -> Iterator[Any]:
    """Yield the samples of a pass after a state. All code of the set runs while a sample is read."""
    begin_pass(dataset, number)
    if state is not None:
        dataset.load_state_dict(plain_copy(state))
    yield from dataset
