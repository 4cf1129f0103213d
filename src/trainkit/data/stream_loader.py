"""From a stream to batches on the device: one pass after the other, from any saved position."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from trainkit.core.errors import DataError, UserCodeError
from trainkit.core.rng import preserve_rng
from trainkit.core.signals import delay_signals
from trainkit.data.batch_order import non_finite_rows
from trainkit.data.form import PAIRS, SampleForm
from trainkit.data.loaders import end_workers
from trainkit.data.pairs import map_pair
from trainkit.data.prepare import Batch, Prepare
from trainkit.data.reading import CollatedBatch, ReadSamples, collate, ignore_signals
from trainkit.data.sample_errors import explain_sample_error, key_of_sample_error
from trainkit.data.stream_reading import Position, Share, StreamBatch, StreamReader
from trainkit.data.streams import Stream, begin_pass


class StreamLoader:
    """The batches of a stream.

    With `steps`, epoch e has the batches e * steps to (e + 1) * steps - 1 of an endless sequence of passes, as in
    `FlowingLoader`. The length of a pass is not known. So the loader keeps the positions of its last two batches, and
    a checkpoint contains the position of its own.

    Args:
        stream: the samples.
        prepare: moves a batch to the device.
        batch_size: samples per batch; the last batch of a pass may be shorter.
        steps: batches of an epoch; None: each epoch is the first pass, as in a validation.
        seed: of the random numbers that the set draws.
        num_workers: processes that read samples.
        limit: the maximum number of samples in a pass.
        drop_last: leave out a batch that is smaller.
        form: which parts of a sample are the inputs and the targets, and how samples become a batch.
        exact: whether an epoch is a pass of `stream.length` samples, and another number is an error.
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
    ) -> None:
        self.stream, self.prepare, self.steps, self.form, self.exact = stream, prepare, steps, form, exact
        self.key, self.dataset, self.num_workers = stream.key, stream.dataset, num_workers
        self.limit, self.max_batches = limit, None if limit is None else -(-limit // batch_size)
        self.samples = stream.length if limit is None or stream.length is None else min(stream.length, limit)
        self.unreadable: dict[int, str] = {}
        self.reader = StreamReader(stream, batch_size, seed or 0, form, limit, drop_last=drop_last)
        shares = max(1, num_workers) if self.reader.shares_itself else 1
        self.start = Position(shares=(Share(),) * shares)
        self._positions: dict[int, Position] = {}  # number of batches -> the position after them, of the last two
        self._open: tuple[int, Iterator[tuple[Batch, Position]]] | None = None  # the rest, and the batch it begins with
        self._fetched: Any = None
        self._indices: list[int] = []  # the samples of the last batch
        self._example: CollatedBatch | None = None

    def __len__(self) -> int:
        return self.steps or 0

    # ------------------------------------------------------------------------------------- the batches

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Loader.batches`. What an epoch leaves open is continued, so that workers read ahead."""
        if self.steps is None:
            for pair, _ in self._pass(self.start):
                yield pair
            return
        place, end = epoch * self.steps + start, (epoch + 1) * self.steps
        while place < end:
            following, self._open = self._following(place, epoch), None  # one that raises an error is not continued
            pair, position = next(following)
            place += 1
            self._positions = {place - 1: self._position_at(place - 1, epoch), place: position}
            self._open = place, following
            yield pair

    def _following(self, place: int, epoch: int) -> Iterator[tuple[Batch, Position]]:
        if self._open is not None and self._open[0] == place:
            return self._open[1]
        return self._passes(self._position_at(place, epoch))

    def _position_at(self, place: int, epoch: int) -> Position:
        """Return the position after so many batches. A place that was never reached, as in `bench`, begins a pass."""
        return self._positions.get(place) or self._pass_number(epoch if place else 0)

    def _pass_number(self, number: int) -> Position:
        return Position(number, shares=self.start.shares)

    def _passes(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        """Yield the batches from a position on, without end, each with the position after it."""
        while True:
            yield from self._pass(position)
            position = self._pass_number(position.number + 1)

    def _pass(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        """Yield the batches from a position to the end of its pass.

        Raises:
            DataError: the pass is empty, has another length than the stream, or a sample cannot be read.
        """
        if self.max_batches is None or position.batch < self.max_batches:
            for read in self._fetch(position):
                if read is None:
                    continue
                if read.batch.unreadable:
                    raise self._unreadable_error(*read.batch.unreadable[0])
                position = position.after(read)
                self._check_length(position, ended=False)
                self._indices = read.batch.indices
                yield self.prepare(*read.batch.pair, position.number, torch.tensor(read.batch.indices)), position
                if position.batch == self.max_batches:
                    break
            self.end_reading()
        if position.batch == 0:
            raise self._empty_error(position.number)
        self._check_length(position, ended=True)

    def _fetch(self, position: Position) -> Iterator[StreamBatch | None]:
        """Start the reading at a position."""
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
        with delay_signals():
            self._fetched = iter(loader)  # starts the workers
        fetched: Iterator[StreamBatch | None] = self._fetched
        return fetched

    # -------------------------------------------------------------------------------------- positions

    def state_dict(self, epoch: int, batch: int) -> dict[str, Any]:
        """Return the position at a batch of an epoch, the last or the last but one that was read."""
        position = self._position_at(epoch * (self.steps or 0) + batch, epoch)
        shares = [[share.batches, share.state, share.ended] for share in position.shares]
        counts = {"pass": position.number, "batch": position.batch, "samples": position.samples, "turn": position.turn}
        return {**counts, "shares": shares}

    def load_state_dict(self, saved: Mapping[str, Any], epoch: int, batch: int, *, restart: bool = False) -> None:
        """Continue at a saved position.

        Args:
            saved: from `state_dict`.
            epoch: the epoch of the position, from 0.
            batch: the batches of this epoch that were used.
            restart: begin the saved pass again, because its batches have changed.

        Raises:
            ValueError: the position has other types, or belongs to another number of workers.
        """
        counts = [saved[key] for key in ("pass", "batch", "samples", "turn")]
        shares = [] if restart else saved["shares"]
        counts += [share[0] for share in shares]
        if any(type(count) is not int or count < 0 for count in counts):
            raise ValueError(f"{self.key}: the position in the stream is {counts}, expected counts")
        position = self._pass_number(saved["pass"])
        if not restart:
            if len(shares) != len(position.shares):
                raise ValueError(f"{self.key} was read by {len(shares)} workers, and now by {len(position.shares)}")
            restored = tuple(Share(count, state, bool(ended)) for count, state, ended in shares)
            position = Position(saved["pass"], saved["batch"], saved["samples"], saved["turn"], restored)
        self.close()
        self._positions = {epoch * (self.steps or 0) + batch: position}

    def resume_note(self, epoch: int, batch: int) -> str | None:
        """Return the note that batches are read again, or None if the state of the set continues exactly."""
        position, why = self._position_at(epoch * (self.steps or 0) + batch, epoch), self.stream.why_stateless
        if why is None or not position.batch or all(share.ended for share in position.shares):
            return None
        batches = "batch is" if position.batch == 1 else f"{position.batch:,} batches are"
        return f"note: {self.key}: {why}, so the first {batches} read again and skipped"

    def facts(self, name: str) -> dict[str, Any]:
        """Return what a resume compares."""
        facts: dict[str, Any] = {} if self.stream.length is None else {f"{name} samples": self.stream.length}
        if self.reader.shares_itself and self.steps is not None:
            facts[f"{name} workers (data.num_workers)"] = max(1, self.num_workers)
        return facts

    # --------------------------------------------------------------------------------------- the rest

    def describe(self, epoch: int, batch: int, inputs: Any) -> str:
        """See `Loader.describe`."""
        number = self._position_at(epoch * (self.steps or 0) + batch + 1, epoch).number
        text = f"samples {self._indices[0]:,} to {self._indices[-1]:,} of pass {number + 1}" if self._indices else ""
        bad = [f"{self._indices[row]:,}" for row in non_finite_rows(inputs) if row < len(self._indices)]
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        return f"{text}; the inputs of sample {', '.join(bad[:3])}{more} are not finite" if bad else text

    def example(self) -> Batch:
        """Return a batch that holds the first sample twice: batch norm needs two samples."""
        if self._example is None:
            self._example = self._read_example()
        return self.prepare(*map_pair(self._example.pair, Tensor.clone))

    def _read_example(self) -> CollatedBatch:
        try:
            with preserve_rng():
                dataset = self.stream.copy()
                begin_pass(dataset, 0)
                samples = list(itertools.islice(dataset, 1))
            if not samples:
                raise self._empty_error(0)
            return collate(ReadSamples(self.dataset, samples * 2, [0, 0], []), self.form)
        except (DataError, UserCodeError):
            raise
        except Exception as error:
            raise explain_sample_error(self.key, error) or UserCodeError(
                key_of_sample_error(self.key, error), error
            ) from error

    def _check_length(self, position: Position, *, ended: bool) -> None:
        """Raise `DataError` if an epoch is a pass, and the pass has another length than `__len__` says."""
        if not self.exact or self.stream.length is None:
            return
        too_long = position.samples > self.stream.length
        too_short = ended and self.limit is None and position.samples < self.stream.length
        if self.reader.drop_last:
            too_short = ended and self.stream.length - position.samples >= self.reader.batch_size
        if too_long or too_short:
            found = "has more samples" if too_long else f"ended after {position.samples:,} samples"
            cause = f"{self.key}: pass {position.number + 1} {found}, and __len__ of {self.stream.name} returns"
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
        self._open = None
        self.end_reading()


def _same(batch: Any) -> Any:
    return batch
