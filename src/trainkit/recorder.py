"""The hooks that write: a run's history, and its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from trainkit import display
from trainkit.build import Training
from trainkit.checkpoint import Checkpoints
from trainkit.errors import NonFiniteError
from trainkit.loop import not_finite
from trainkit.run import Run
from trainkit.snapshot import remember, restore, restore_weights
from trainkit.state import State


class Recorder:
    """Writes a run's history, and what happened on the way into its log."""

    def __init__(self, run: Run, training: Training) -> None:
        self.run, self.training = run, training
        self.told = 0  # of the samples left out

    def on_epoch(self, state: State, metrics: dict[str, Any]) -> None:
        """Append the epoch."""
        left_out = self._left_out()
        for line in left_out[self.told :]:
            self.run.note(f"note: left out: {line}")
        self.told = len(left_out)
        if left_out:
            metrics["unreadable"] = len(left_out)
        self.run.append(metrics, best(state))
        self.run.note(display.epoch_line(state.epochs, metrics))

    def on_split(self, state: State) -> None:
        """Write down that memory ran out."""
        self.run.note(display.split_line(state))

    def on_nonfinite(self, state: State, error: NonFiniteError) -> None:
        """Write down which batch was left out."""
        self.run.note(display.nonfinite_line(state, error))

    def _left_out(self) -> list[str]:
        loaders = (self.training.train, self.training.val)
        return [line for loader in loaders if loader is not None for line in loader.unreadable.values()]


class Saver:
    """Writes a run's checkpoints, and goes back to one.

    One is written as the run starts (so that every run can be resumed), after each `every_epochs`
    epochs, `every_steps` steps and `every_minutes` minutes, at each new best, at the end, and where a
    signal stops the run.

    Args:
        checkpoints: of the run.
        options: the config's `checkpoint`.
        fingerprint: what the run's numbers depend on.
        resumed: where the run goes on from.
        note: writes a line into the log.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        options: DictConfig,
        fingerprint: Mapping[str, Any],
        *,
        resumed: Mapping[str, Any] | None = None,
        note: Any = lambda _: None,
    ) -> None:
        self.checkpoints, self.options, self.fingerprint, self.note = checkpoints, options, fingerprint, note
        self.resumed = resumed
        self.due = False
        self.saved_at = time.monotonic()

    def on_start(self, state: State) -> None:
        """Save the beginning; of a resumed run, undo what other hooks did to it at their start."""
        if self.resumed is None:
            self.save(state)
        else:
            restore(state, self.resumed)
            self.resumed = None

    def on_step(self, state: State) -> None:
        """Save if it is time; at the end of an epoch, once that is judged."""
        steps, minutes = self.options.every_steps, self.options.every_minutes
        self.due |= steps is not None and state.step % steps == 0
        self.due |= minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        if self.due and state.batch < state.batches:
            self.save(state)

    def on_epoch(self, state: State, metrics: Mapping[str, Any]) -> None:
        """Save if it is time, if there is a new best, or if this was the last epoch."""
        epochs = self.options.every_epochs
        new_best = state.best is metrics
        if not_finite(state, metrics) is not None:  # which ends the training
            return
        if self.due or new_best or state.done or (epochs is not None and state.epoch % epochs == 0):
            name = self.save(state, prune=False)
            if new_best:
                self.checkpoints.point("best", name)
            self.checkpoints.prune(self.options.keep)

    def on_nonfinite(self, state: State, error: NonFiniteError) -> None:  # noqa: ARG002
        """With `on_nonfinite` rollback, put the weights of the newest checkpoint back; the data goes on."""
        if state.on_nonfinite == "rollback":
            name, saved, passed = self.checkpoints.newest()
            restore_weights(state, saved)
            self.note(f"note: back to the weights of {name}" + "".join(f"; not {why}" for why in passed))

    def save(self, state: State, *, prune: bool = True) -> str:
        """Save now; returns the checkpoint's name."""
        name = self.checkpoints.write(remember(state, self.fingerprint))
        if prune:
            self.checkpoints.prune(self.options.keep)
        self.due, self.saved_at = False, time.monotonic()
        self.note(f"saved {name}")
        return name


def best(state: State) -> dict[str, Any] | None:
    """What `run.json` tells of the best epoch."""
    if state.best is None:
        return None
    shown = {name: value for name, value in state.best.items() if name.startswith(("train/loss", "val/"))}
    return {"metric": state.monitor, "value": state.best[state.monitor], "epoch": state.best["epoch"]} | shown
