"""The loader of a stream: batches on the device, one pass after the other, from any saved position."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from trainkit.core.errors import DataError, UserCodeError
from trainkit.core.ranks import ALONE, Ranks
from trainkit.core.rng import preserve_rng
from trainkit.data.batch_order import WHOLE, Share, non_finite_rows
from trainkit.data.form import PAIRS, SampleForm
from trainkit.data.loaders import end_workers, start_reading
from trainkit.data.pairs import Pair, map_pair
from trainkit.data.prepare import NO_SAMPLES, Batch, Prepare
from trainkit.data.reading import CollatedBatch, ReadSamples, collate, ignore_signals
from trainkit.data.sample_errors import sample_error
from trainkit.data.stream_reading import NOTHING, Position, ShareProgress, StreamBatch, StreamReader, acting_as_worker
from trainkit.data.streams import Stream, begin_pass


class StreamLoader:
    """The batches of a stream.

    With `steps`, epoch e has the batches e * steps to (e + 1) * steps - 1 of an endless sequence of passes, as in
    `FlowingLoader`. The length of a pass is unknown, so a checkpoint contains the position in the stream. The loader
    keeps the positions before and after its last batch.

    Args:
        stream: the samples.
        prepare: moves a batch to the device.
        batch_size: the number of samples in a batch; the last batch of a pass may be smaller.
        steps: the number of batches in an epoch; None: each epoch is the first pass, as in a validation.
        seed: the seed of the random numbers that the set draws.
        num_workers: the number of processes that read samples; 0: the main process reads.
        limit: the maximum number of samples in a pass; None: no limit.
        drop_last: skip the last batch of a pass if it is smaller.
        form: which parts of a sample are the inputs and the targets, and how samples become a batch.
        exact: whether an epoch is one pass of `stream.length` samples. Any other number of samples is an error then.
        share: which samples of each batch this process reads.
        ranks: the processes among which the set divides its samples. `ALONE`: each process reads all samples.
    """

    def __init__(
        self,
        stream: Stream,
        prepare: Prepare,
        *,
        batch_size: int,
        steps: int | None,
        seed: int | None = None,
        num_workers: int = 0,
        limit: int | None = None,
        drop_last: bool = False,
        form: SampleForm = PAIRS,
        exact: bool = False,
        share: Share = WHOLE,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks, self.divided = ranks, ranks.are_several
        self.stream, self.prepare, self.steps, self.form, self.exact = stream, prepare, steps, form, exact
        self.key, self.dataset, self.num_workers = stream.key, stream.dataset, num_workers
        self.limit, self.max_batches = limit, None if limit is None else -(-limit // batch_size)
        self.samples = stream.length if limit is None or stream.length is None else min(stream.length, limit)
        self.unreadable: dict[int, str] = {}
        self.reader = StreamReader(
            stream, batch_size, seed or 0, form, limit, drop_last=drop_last, share=share, divided=self.divided
        )
        shares = max(1, num_workers) if self.reader.shards_itself else 1
        self.start = Position(shares=(ShareProgress(),) * shares)
        self._positions: dict[int, Position] = {}  # number of batches -> position, before and after the last batch
        # The batches that follow the last batch, and the number of batches before them.
        self._following: tuple[int, Iterator[tuple[Batch, Position]]] | None = None
        self._fetched: Any = None  # the iterator of the `DataLoader`, which has the workers
        self._indices: list[int] = []  # the samples of the last batch
        self._example: CollatedBatch | None = None

    def __len__(self) -> int:
        return self.steps or 0

    # ------------------------------------------------------------------------------------- the batches

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Loader.batches`. The next epoch continues the same iterator, so that workers read ahead."""
        if self.steps is None:
            for pair, _ in self._pass(self.start):
                yield pair
            return
        done, end = epoch * self.steps + start, (epoch + 1) * self.steps
        while done < end:
            following = self._batches_after(done, epoch)
            self._following = None  # an iterator that raises an error is not continued
            pair, position = next(following)
            self._positions = {done: self._position_after(done, epoch), done + 1: position}
            done += 1
            self._following = done, following
            yield pair

    def _batches_after(self, done: int, epoch: int) -> Iterator[tuple[Batch, Position]]:
        """Return the iterator over the batches that follow the first `done` batches."""
        if self._following is not None and self._following[0] == done:
            return self._following[1]
        return self._passes(self._position_after(done, epoch))

    def _position_after(self, done: int, epoch: int) -> Position:
        """Return the position after the first `done` batches.

        A position that the loader has not kept, as in `bench`, is the start of a pass.
        """
        return self._positions.get(done) or self._start_of_pass(epoch if done else 0)

    def _position_in(self, epoch: int, batches: int) -> Position:
        """Return the position after the first batches of an epoch."""
        return self._position_after(epoch * (self.steps or 0) + batches, epoch)

    def _start_of_pass(self, pass_number: int) -> Position:
        return Position(pass_number, shares=self.start.shares)

    def _passes(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        """Yield the batches of all passes from a position on, without end. Each batch has the position after it."""
        while True:
            yield from self._pass(position)
            position = self._start_of_pass(position.pass_number + 1)

    def _pass(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        """Yield the batches from a position to the end of the pass.

        Raises:
            DataError: the pass is empty, has another length than the stream, or a sample cannot be read.
        """
        if self.max_batches is None or position.batches < self.max_batches:
            reads = filter(None, self._fetch(position))
            while (read := self._next(reads)) is not None:
                position = position.after(read)
                self._check_length(position, ended=False)
                self._indices = read.batch.indices[self.prepare.drop_first :]
                yield self._prepare(read.batch, position.pass_number), position
                if position.batches == self.max_batches:
                    break
            self.end_reading()
        if position.batches == 0:
            raise self._empty_error(position.pass_number)
        self._check_length(position, ended=True)

    def _next(self, reads: Iterator[StreamBatch]) -> StreamBatch | None:
        """Return the next batch, or the part of it that this process reads; None: the pass has ended.

        If the set divides its samples, all processes end a pass together: when the last one has no more samples, or
        with `drop_last`, when the first one has too few.

        Raises:
            DataError: a sample cannot be read.
        """
        if not self.divided:
            return self._readable(next(reads, None))
        with self.ranks.together() as agreement:
            read = self._readable(next(reads, None))
            agreement.offer(0 if read is None else read.samples)
        samples = agreement.columns[0]
        if not any(samples) or (self.reader.drop_last and not all(samples)):
            return None
        if read is None:
            return StreamBatch(NOTHING, 0, None, sum(samples))
        return replace(read, samples=sum(samples))

    def _readable(self, read: StreamBatch | None) -> StreamBatch | None:
        """Return what was read, or raise the error about a sample that cannot be read."""
        if read is not None and read.batch.unreadable:
            raise self._unreadable_error(*read.batch.unreadable[0])
        return read

    def _prepare(self, batch: CollatedBatch, pass_number: int) -> Batch:
        """Return a batch on the device."""
        if not batch.indices:
            return NO_SAMPLES
        return self.prepare(*batch.pair, pass_number, batch.indices)

    def _fetch(self, position: Position) -> Iterator[StreamBatch | None]:
        """Start to read at a position, and return the batches. A worker yields None if it has no batch at its turn."""
        self.end_reading()
        self.reader.position = position
        if not self.num_workers:
            return iter(self.reader)
        loader = DataLoader(
            self.reader,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_same,
            worker_init_fn=ignore_signals,
            pin_memory=self.prepare.device.type == "cuda",
            generator=torch.Generator(),  # a separate generator: reading data must not advance the model's RNG
        )
        self._fetched = start_reading(loader)
        fetched: Iterator[StreamBatch | None] = self._fetched
        return fetched

    # -------------------------------------------------------------------------------------- positions

    def state_dict(self, epoch: int, batch: int) -> dict[str, Any]:
        """Return the position before or after the last batch, as the number of batches in the epoch says.

        If the set divides its samples among several processes, the position contains the shares of all of them.
        """
        position = self._position_in(epoch, batch)
        shares = [[share.batches, share.state, share.ended] for share in position.shares]
        counts = {"pass": position.pass_number, "batch": position.batches, "samples": position.samples}
        if not self.divided:
            return {**counts, "turn": position.next_share, "shares": shares}
        turns, gathered = zip(*self.ranks.gather((position.next_share, shares)), strict=True)
        return {
            **counts,
            "turn": turns[0],
            "turns": list(turns),
            "shares": [share for own in gathered for share in own],
        }

    def load_state_dict(self, saved: Mapping[str, Any], epoch: int, batch: int, *, restart: bool = False) -> None:
        """Continue at a saved position.

        Args:
            saved: from `state_dict`.
            epoch: the epoch of the position, from 0.
            batch: the number of batches of this epoch that were used.
            restart: begin the saved pass again, because its batches have changed.

        Raises:
            ValueError: a value has the wrong type, or another number of workers read the stream.
        """
        counts = [saved[key] for key in ("pass", "batch", "samples", "turn")]
        turns, shares = saved.get("turns", [saved["turn"]]), [] if restart else saved["shares"]
        counts += turns
        counts += [share[0] for share in shares]
        if any(type(count) is not int or count < 0 for count in counts):
            raise ValueError(f"{self.key}: the position in the stream is {counts}, expected counts")
        position = self._start_of_pass(saved["pass"])
        if not restart:
            now = self.ranks.size * len(position.shares)
            if len(shares) != now or len(turns) != self.ranks.size:
                raise ValueError(f"{self.key} was read by {len(shares)} workers, and now by {now}")
            shares = shares[self.ranks.rank * len(position.shares) :][: len(position.shares)]
            restored = tuple(ShareProgress(count, state, bool(ended)) for count, state, ended in shares)
            position = Position(saved["pass"], saved["batch"], saved["samples"], turns[self.ranks.rank], restored)
        self.close()
        self._positions = {epoch * (self.steps or 0) + batch: position}

    def resume_note(self, epoch: int, batch: int) -> str | None:
        """Return a note if the used batches are read again; None if the set continues from its state."""
        position = self._position_in(epoch, batch)
        reason = self.stream.reason_to_reread
        if reason is None or not position.batches or all(share.ended for share in position.shares):
            return None
        batches = "batch is" if position.batches == 1 else f"{position.batches:,} batches are"
        return f"note: {self.key}: {reason}, so the first {batches} read again and skipped"

    def facts(self, name: str) -> dict[str, Any]:
        """Return the facts about the stream that a resume compares with the checkpoint."""
        facts: dict[str, Any] = {} if self.stream.length is None else {f"{name} samples": self.stream.length}
        if self.reader.shards_itself and self.steps is not None:
            workers = max(1, self.num_workers)
            facts[f"{name} workers (data.num_workers)"] = (
                f"{workers} on each of {self.ranks.size} ranks" if self.divided else workers
            )
        return facts

    # --------------------------------------------------------------------------------------- the rest

    def describe(self, epoch: int, batch: int, inputs: Any) -> str:
        """See `Loader.describe`."""
        number = self._position_in(epoch, batch + 1).pass_number
        text = f"samples {self._indices[0]:,} to {self._indices[-1]:,} of pass {number + 1}" if self._indices else ""
        bad = [f"{self._indices[row]:,}" for row in non_finite_rows(inputs) if row < len(self._indices)]
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        return f"{text}; the inputs of sample {', '.join(bad[:3])}{more} are not finite" if bad else text

    def example(self) -> Batch:
        """Return a batch that holds the first sample twice: batch norm needs two samples."""
        return self.prepare(*map_pair(self.raw_example(), Tensor.clone))

    def raw_example(self) -> Pair:
        """See `Loader.raw_example`."""
        if self._example is None:
            self._example = self._read_example()
        return self._example.pair

    def _read_example(self) -> CollatedBatch:
        try:
            alone = acting_as_worker(None, self.dataset) if self.reader.share.ranks > 1 else nullcontext()
            with preserve_rng(), alone:
                dataset = self.stream.copy()
                begin_pass(dataset, 0)
                samples = list(itertools.islice(dataset, 1))
            if not samples:
                raise self._empty_error(0)
            return collate(ReadSamples(self.dataset, samples * 2, [0, 0], []), self.form)
        except (DataError, UserCodeError):
            raise
        except Exception as error:
            raise sample_error(self.key, error) from error

    def _check_length(self, position: Position, *, ended: bool) -> None:
        """Raise `DataError` if an epoch is one pass, and the length of the pass is not the value of `__len__`."""
        if not self.exact or self.stream.length is None:
            return
        too_long = position.samples > self.stream.length
        too_short = ended and self.limit is None and position.samples < self.stream.length
        if self.reader.drop_last:
            too_short = ended and self.stream.length - position.samples >= self.reader.batch_size
        if too_long or too_short:
            found = "has more samples" if too_long else f"ended after {position.samples:,} samples"
            cause = f"{self.key}: pass {position.pass_number + 1} {found}, and __len__ of {self.stream.name} returns"
            hint = "correct __len__, or write steps_per_epoch=N, which needs no length"
            raise DataError(f"{cause} {self.stream.length:,}", hint=hint)

    def _empty_error(self, number: int) -> DataError:
        if number == 0:
            hint = "yield samples from __iter__, or check the files that it reads"
            hint = "lower batch_size, or write data.drop_last=off" if self.reader.drop_last else hint
            return DataError(f"{self.key} has no samples: __iter__ of {self.stream.name} yields none", hint=hint)
        hint = "let each call of __iter__ begin again, whatever set_epoch got"
        return DataError(f"{self.key}: pass {number + 1} has no samples, and pass {number} had some", hint=hint)

    def _unreadable_error(self, index: int, reason: str) -> DataError:
        hint = "repair or delete it, or catch the error in __iter__: a stream ends at an error"
        return DataError(f"{self.key}: sample {index:,} cannot be read: {reason} in {self.stream.name}", hint=hint)

    def end_reading(self) -> None:
        """End the worker processes of the open pass."""
        fetched, self._fetched = self._fetched, None
        end_workers(fetched)

    def close(self) -> None:
        """See `Loader.close`."""
        self._following = None
        self.end_reading()


def _same(batch: Any) -> Any:
    return batch
