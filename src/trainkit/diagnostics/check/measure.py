"""Measure the epochs of a training on a part of its data: the seconds of steps, validation and checkpoints."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from trainkit.build.session import Session
from trainkit.core.device import peak_memory, synchronize
from trainkit.data.loaders import Loader
from trainkit.data.prepare import Batch
from trainkit.data.wrapped_loader import WrappedLoader
from trainkit.diagnostics.check.costs import measure_costs
from trainkit.diagnostics.check.held import Held, hold_part
from trainkit.diagnostics.check.scaling import Costs
from trainkit.runs.saver import Saver
from trainkit.training.state import State

ROUNDS = 3  # measured epochs, after one batch for the path and an epoch to warm up
WARM_UP = 3  # steps
MIN_STEPS = 4  # of a measured epoch
Clock = Callable[[], float]


class LimitedLoader(WrappedLoader):
    """A loader that ends each epoch after `steps` batches. It notes when a pass began and ended.

    Args:
        loader: the loader of the training.
        steps: the number of batches; it may change between two epochs.
        now: returns the time after the device has finished its work.
        clock: a monotonic clock in seconds, which does not wait for the device.
    """

    def __init__(self, loader: Loader, steps: int, now: Clock, clock: Clock) -> None:
        super().__init__(loader)
        self.steps, self.now, self.clock = steps, now, clock
        self.began = self.ended = 0.0  # of the last pass
        self.waits: list[float] = []  # the seconds until each batch of the last pass

    def __len__(self) -> int:
        return self.steps

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the first `steps` batches of an epoch; after its end, those of the next epoch."""
        self.waits, self.began = [], self.now()
        asked = self.clock()
        for batch in itertools.islice(self.endless_batches(epoch, start), self.steps):
            self.waits.append(self.clock() - asked)
            yield batch
            asked = self.clock()
        self.ended = self.now()

    def endless_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Return the batches of an epoch and of all epochs after it."""
        passes = (self.loader.batches(number, start) for number in itertools.count(epoch))
        return itertools.chain.from_iterable(passes)


@dataclass
class Measured:
    """What was measured. Seconds are means.

    Attributes:
        step: seconds of a step.
        train_overhead: seconds of an epoch besides its steps, before the validation.
        val_batch: seconds of a batch of the validation.
        epoch_overhead: seconds of an epoch besides steps, batches of the validation and checkpoints.
        save: seconds of a checkpoint.
        first_step: how much longer the first step takes, for example to compile.
        prepared: when the check was ready to begin the run, from the clock.
        started: when the training began, after its first checkpoint.
        peak_bytes: of the process, or of the GPU.
        train_batches: of a whole epoch.
        val_batches: of a whole validation; None: unknown.
        checkpoint_bytes: of the newest checkpoint.
        history_bytes: of an epoch in the history, which each checkpoint contains.
        epochs: that were trained.
        held: the data sets that the run holds in memory.
        costs: of a step, for the estimates of several devices.
    """

    step: float = 0.0
    train_overhead: float = 0.0
    val_batch: float = 0.0
    epoch_overhead: float = 0.0
    save: float = 0.0
    first_step: float = 0.0
    prepared: float = 0.0
    started: float = 0.0
    peak_bytes: int = 0
    train_batches: int = 0
    val_batches: int | None = 0
    checkpoint_bytes: int = 0
    history_bytes: float = 0.0
    epochs: int = 0
    held: Held = field(default_factory=Held)
    costs: Costs = field(default_factory=Costs)


class Pace:
    """A hook that sets the length of each epoch, and measures the epochs.

    The first epoch has one batch, and the second is a warm-up. `ROUNDS` further epochs together take about `seconds`.
    They are whole epochs if these are shorter.

    Args:
        seconds: of all measured epochs. 0: nothing is measured after the first batch.
        clock: a monotonic clock in seconds.
    """

    def __init__(self, seconds: float, clock: Clock = time.perf_counter) -> None:
        self.seconds, self.clock = seconds, clock
        self.measured = Measured()
        self.rounds: list[_Round] = []
        self.step_times: list[float] = []
        self.saves: list[float] = []
        self.epoch_began = 0.0

    def begin(self, session: Session, saver: Saver | None) -> None:
        """Limit the loaders of a session, and let its checkpoints be timed."""
        state, measured = session.state, Measured()
        self.measured, self.rounds = measured, []
        self.step_times, self.saves = [], []
        self.device, self.num_workers = state.objects.device, session.settings.data.num_workers
        measured.train_batches = len(session.train)
        measured.val_batches = _batches_of_validation(session)
        if self.seconds:
            session.train = self._hold(session, session.train, "train")
            session.val = None if session.val is None else self._hold(session, session.val, "val")
        session.train = self.train = LimitedLoader(session.train, 1, self.now, self.clock)
        self.val = None if session.val is None else LimitedLoader(session.val, 1, self.now, self.clock)
        session.val = self.val
        self.planned_steps, self.planned_epochs = state.settings.steps, state.settings.epochs
        epochs = 2 + ROUNDS if self.seconds else 1
        state.settings = replace(state.settings, epochs=epochs, steps=None, max_minutes=None, patience=None)
        if saver is not None:
            saver.save = self._timed(saver.save)  # type: ignore[method-assign]
        self.measured.prepared = self.now()

    def now(self) -> float:
        """Return the time after the device has finished its work."""
        synchronize(self.device)
        return self.clock()

    def on_start(self, state: State) -> None:  # noqa: ARG002
        """Note when the training began."""
        self.measured.started = self.now()
        self.epoch_began = self.now()
        self.saves.clear()  # the first save has no state of the optimizer

    def on_step(self, state: State) -> None:  # noqa: ARG002
        """Note the time of the step."""
        self.step_times.append(self.now())

    def on_epoch_end(self, state: State, metrics: Any) -> None:  # noqa: ARG002
        """End an epoch, and set the length of the next epoch."""
        self.rounds.append(self._round())
        if len(self.rounds) == 1:
            self._set_lengths(state, WARM_UP, WARM_UP)
        elif len(self.rounds) == 2:
            self._choose_lengths(state)
        self.step_times.clear()
        self.saves.clear()
        self.epoch_began = self.now()

    def on_end(self, state: State) -> None:
        """Compute the means."""
        measured, rounds = self.measured, self.rounds[2:]
        measured.epochs = len(self.rounds)
        measured.peak_bytes = peak_memory(self.device)
        if state.directory is not None:
            measured.checkpoint_bytes = _size_of_newest(state.directory / "checkpoints")
            measured.history_bytes = (state.directory / "history.jsonl").stat().st_size / len(self.rounds)
        if not rounds:
            return
        measured.step = _mean(r.step for r in rounds)
        measured.train_overhead = _mean(r.train_overhead for r in rounds)
        measured.val_batch = _mean(r.val_batch for r in rounds)
        measured.epoch_overhead = _mean(r.overhead for r in rounds)
        saves = [seconds for r in self.rounds[1:] for seconds in r.saves]
        measured.save = _mean(saves)
        measured.first_step = max(0.0, self.rounds[0].train - measured.step - measured.train_overhead)
        compute = max(0.0, measured.step - _mean(r.wait for r in rounds))
        batches = self.train.endless_batches(state.progress.epoch)
        measured.costs = measure_costs(state.objects, self.train, batches, compute, self.num_workers, self.now)

    def _round(self) -> _Round:
        """Return the seconds of the parts of the epoch that has ended."""
        ended, times = self.now(), self.step_times
        train = times[-1] - self.epoch_began if times else 0.0
        step = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else train
        if len(times) == self.measured.train_batches:  # a whole epoch
            step, train_overhead = train / len(times), 0.0
        else:
            train_overhead = max(0.0, train - step * len(times))
        val = 0.0 if self.val is None else self.val.ended - self.val.began
        batches = 0 if self.val is None else len(self.val.waits)
        saves = list(self.saves)
        overhead = ended - self.epoch_began - train - val - sum(saves)
        wait = _mean(self.train.waits[1:] or self.train.waits)  # processes start before the first batch
        return _Round(train, step, wait, train_overhead, val / max(1, batches), overhead, saves)

    def _choose_lengths(self, state: State) -> None:
        """Choose the number of steps that takes the planned time."""
        last, seconds = self.rounds[-1], self.seconds / ROUNDS
        steps = max(MIN_STEPS, math.floor(0.8 * seconds / max(last.step, 1e-6)))
        val_batches = max(1, math.floor(0.2 * seconds / max(last.val_batch, 1e-6)))
        if self._full_epoch() <= seconds:
            steps, val_batches = self.measured.train_batches, self.measured.val_batches or val_batches
        self._set_lengths(state, steps, val_batches)

    def _full_epoch(self) -> float:
        """Return an estimate of the seconds of an epoch."""
        last, measured = self.rounds[-1], self.measured
        return last.step * measured.train_batches + last.val_batch * (measured.val_batches or 0)

    def _set_lengths(self, state: State, steps: int, val_batches: int) -> None:
        steps = max(1, min(steps, self.measured.train_batches))
        state.progress.batches = self.train.steps = steps
        if self.val is not None:
            self.val.steps = max(1, min(val_batches, self.measured.val_batches or val_batches))
        planned = self.planned_steps or (self.planned_epochs or math.inf) * self.measured.train_batches
        if state.progress.step + ROUNDS * steps > planned or (self.planned_epochs or math.inf) < 2 + ROUNDS:
            state.objects.step_schedulers.clear()  # some schedulers end with the training
            state.objects.epoch_schedulers.clear()

    def _timed(self, save: Callable[..., str]) -> Callable[..., str]:
        def timed(*args: Any, **options: Any) -> str:
            began = self.now()
            name = save(*args, **options)
            self.saves.append(self.now() - began)
            return name

        return timed

    def _hold(self, session: Session, loader: Loader, part: str) -> Loader:
        """Return a loader that holds a part of the samples in memory, if the run would hold all samples there."""
        held = hold_part(session, loader, part)
        if held is None:
            return loader
        made, costs = held
        self.measured.held.read_seconds += costs.read_seconds
        self.measured.held.extra_bytes += costs.extra_bytes
        return made


@dataclass
class _Round:
    """The seconds of the parts of an epoch; see `Measured`.

    Attributes:
        train: all steps, from the start of the epoch.
        wait: of a step for its batch.
        saves: each checkpoint.
    """

    train: float
    step: float
    wait: float
    train_overhead: float
    val_batch: float
    overhead: float
    saves: list[float]


def _batches_of_validation(session: Session) -> int | None:
    """Return the number of batches of a validation; None: a stream without a length."""
    if session.val is None:
        return 0
    if len(session.val):
        return len(session.val)
    samples = session.val.samples
    return None if samples is None else math.ceil(samples / session.settings.val_batch_size)


def _size_of_newest(folder: Any) -> int:
    """Return the bytes of the newest checkpoint; 0 if there is none."""
    newest = max(folder.glob("step-*"), default=None)
    return sum(file.stat().st_size for file in newest.iterdir()) if newest is not None else 0


def _mean(values: Any) -> float:
    listed = list(values)
    return statistics.fmean(listed) if listed else 0.0
