"""Estimate the time, the memory and the disk space of a whole run from measured epochs."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from trainkit.config.settings import Settings
from trainkit.diagnostics.check.measure import Measured
from trainkit.engine.report import DRAWING_SECONDS, IMPORT_SECONDS, is_cheap


@dataclass
class Estimates:
    """The estimates for a run. Times are in seconds, sizes in bytes; None: unknown.

    Attributes:
        startup: from the start of the process to the first step, without the reading of the data.
        reading: of the data into memory.
        step: a step.
        epoch: an epoch: steps, validation, checkpoint.
        validation: the validation of an epoch.
        run: the whole run; the maximum if early stopping or `max_minutes` may end it earlier.
        epochs: of the whole run.
        memory: the peak of the process, or of the tensors on a GPU.
        checkpoint: the last checkpoint.
        checkpoints: all checkpoints that are kept.
        notes: what the estimates leave out.
    """

    startup: float
    reading: float
    step: float
    epoch: float
    validation: float | None
    run: float | None
    epochs: int | None
    memory: int
    checkpoint: int
    checkpoints: int
    notes: list[str]

    def as_dict(self) -> dict[str, object]:
        """Return the estimates in plain containers."""
        return asdict(self)


def estimate(settings: Settings, measured: Measured, startup: float) -> Estimates:
    """Return the estimates for a run.

    Args:
        settings: the settings of the run.
        measured: from the hook `Pace`.
        startup: seconds from the start of a process to the first step, without reading the data into memory.
    """
    notes = []
    validation = None if measured.val_batches is None else measured.val_batch * measured.val_batches
    if validation is None:
        notes.append("note: the length of the validation stream is unknown, so its time is left out")
    saves = checkpoints_per_epoch(settings, measured.train_batches)
    train = measured.step * measured.train_batches + measured.train_overhead
    epoch = train + (validation or 0.0) + measured.epoch_overhead + saves * measured.save
    epochs: float | None = settings.epochs
    if settings.steps is not None:
        epochs = settings.steps / measured.train_batches
    startup += measured.first_step
    run = None if epochs is None else epochs * epoch
    limit = None if settings.max_minutes is None else 60 * settings.max_minutes
    if limit is not None:
        if run is None or run > limit:
            notes.append(
                f"note: max_minutes={settings.max_minutes:g} ends the run after about {limit / epoch:,.1f} epochs"
            )
        run = limit if run is None else min(run, limit)
    if run is not None:
        run += startup + measured.held.read_seconds
        if settings.report is not None and (settings.report != "auto" or is_cheap(run)):
            run += IMPORT_SECONDS + DRAWING_SECONDS
    if settings.early_stop is not None and settings.early_stop.patience is not None:
        notes.append("note: early_stop may end the run earlier")
    checkpoint = measured.checkpoint_bytes
    if checkpoint and epochs is not None:
        checkpoint += round(measured.history_bytes * max(0.0, epochs - measured.epochs))
    kept = 0 if settings.checkpoint is None else settings.checkpoint.keep + 1
    return Estimates(
        startup=startup,
        reading=measured.held.read_seconds,
        step=measured.step,
        epoch=epoch,
        validation=validation,
        run=run,
        epochs=None if epochs is None else math.ceil(epochs),
        memory=measured.peak_bytes + measured.held.extra_bytes,
        checkpoint=checkpoint,
        checkpoints=kept * checkpoint,
        notes=notes,
    )


def checkpoints_per_epoch(settings: Settings, batches: int) -> float:
    """Return how many checkpoints an epoch writes, as far as the config decides it."""
    options = settings.checkpoint
    if options is None:
        return 0.0
    by_epoch = 0.0 if options.every_epochs is None else 1 / options.every_epochs
    by_step = 0.0 if options.every_steps is None else batches / options.every_steps
    return by_epoch + by_step


def seconds_of_process() -> float:
    """Return the seconds since this process started; 0 if the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
