"""The hooks that write: a run's history, and its checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from trainkit.config.schema import CheckpointSettings
from trainkit.core.errors import CheckpointError, ConfigError, NonFiniteError
from trainkit.display import text
from trainkit.runs.checkpoint import Checkpoints, DamagedError, name_of
from trainkit.runs.directory import Run
from trainkit.runs.snapshot import capture_state, restore_state, restore_weights
from trainkit.training.finite import nonfinite_metric
from trainkit.training.state import State


class Recorder:
    """Writes a run's history, and what happened on the way into its log."""

    def __init__(self, run: Run, params: list[dict[str, Any]]) -> None:
        self.run, self.params = run, params
        self.told: set[str] = set()  # samples left out

    def on_start(self, state: State) -> None:
        """Write down the parameters; what an earlier process has told of is not told again."""
        self.run.write("params.json", self.params)
        self.told = {line for known in state.progress.unreadable.values() for line in known.values()}

    def on_step(self, state: State) -> None:
        """Write down samples that could not be read."""
        self.record_unreadable(state)

    def record_unreadable(self, state: State) -> None:
        """Write down samples that could not be read, once each."""
        if sum(map(len, state.progress.unreadable.values())) > len(self.told):
            lines = {line: None for known in state.progress.unreadable.values() for line in known.values()}
            for line in lines:
                if line not in self.told:
                    self.run.note(f"note: left out: {line}")
            self.told |= set(lines)

    def on_epoch(self, state: State, metrics: dict[str, Any]) -> None:
        """Append the epoch."""
        self.record_unreadable(state)
        left_out = sum(map(len, state.progress.unreadable.values()))
        if left_out:
            metrics["unreadable"] = left_out
        for name, value in metrics.items():
            metrics[name] = number_of_metric(name, value)
        self.run.append(metrics, best(state))
        self.run.note(text.epoch_line(state.settings.epochs, metrics))

    def on_split(self, state: State) -> None:
        """Write down that memory ran out."""
        self.run.note(text.oom_line(state))

    def on_nonfinite(self, state: State, error: NonFiniteError) -> None:
        """Write down which batch was left out."""
        self.run.note(text.nonfinite_line(state, error))


class Restorer:
    """Undoes what other hooks have done to a resumed training at their start.

    Args:
        resumed: where the run goes on from, as `snapshot.remember` gives it.
    """

    def __init__(self, resumed: Mapping[str, Any]) -> None:
        self.resumed: Mapping[str, Any] | None = resumed

    def on_start(self, state: State) -> None:
        """Restore once more, and let go of what was saved."""
        if self.resumed is not None:
            restore_state(state, self.resumed)
        self.resumed = None


class Saver:
    """Writes a run's checkpoints, and goes back to one.

    One is written as the run starts (so that every run can be resumed), after each `every_epochs`
    epochs, `every_steps` steps and `every_minutes` minutes, at each new best, at the end, and where a
    signal stops the run.

    Args:
        checkpoints: of the run.
        options: the config's `checkpoint`.
        fingerprint: what the run's numbers depend on.
        first: whether to save as the training starts: a new run, or one with another config from here on.
        note: writes a line into the log.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        options: CheckpointSettings,
        fingerprint: Mapping[str, Any],
        *,
        first: bool = True,
        note: Any = lambda _: None,
    ) -> None:
        self.checkpoints, self.fingerprint, self.note = checkpoints, fingerprint, note
        self.every_epochs, self.every_steps = options.every_epochs, options.every_steps
        self.every_minutes, self.keep = options.every_minutes, options.keep
        self.first = first
        self.saved_at = time.monotonic()

    def on_start(self, state: State) -> None:
        """Save the beginning; put pointers right that a kill has left behind."""
        if self.first:
            name = self.save(state)
            try:  # what cannot be read again is told of now
                self.checkpoints.load(name)
            except DamagedError as error:
                hint = "let every state_dict hold numbers, strings, tensors, lists and dicts, or write checkpoint=off"
                raise CheckpointError(f"what was saved cannot be read again: {error}", hint=hint) from error
        elif name_of(state.progress.step) in self.checkpoints.names():
            self.checkpoints.point("last", name_of(state.progress.step))
        self.point_best(state)

    def on_step(self, state: State) -> None:
        """Save if it is time; at the end of an epoch, once that is judged."""
        if state.progress.batch < state.progress.batches and (
            self.planned_by_steps(state) or self.minutes_have_passed()
        ):
            self.save(state, planned=self.planned_by_steps(state))

    def on_epoch(self, state: State, metrics: Mapping[str, Any]) -> None:
        """Save if it is time, if there is a new best, or if this was the last epoch."""
        epochs = self.every_epochs
        if nonfinite_metric(state, metrics) is not None:  # which ends the training
            return
        planned = (
            state.progress.best is metrics or state.done or (epochs is not None and state.progress.epoch % epochs == 0)
        )
        planned |= self.planned_by_steps(state)
        if planned or self.minutes_have_passed():
            self.save(state, planned=planned)

    def planned_by_steps(self, state: State) -> bool:
        """Whether `every_steps` asks for a checkpoint of this step."""
        return self.every_steps is not None and state.progress.step % self.every_steps == 0

    def minutes_have_passed(self) -> bool:
        """Whether `every_minutes` asks for a checkpoint by now."""
        return self.every_minutes is not None and time.monotonic() - self.saved_at >= 60 * self.every_minutes

    def point_best(self, state: State) -> None:
        """Let `best` name the checkpoint of the best epoch, if that is there."""
        if state.progress.best is not None:
            name = name_of(state.progress.best["step"])
            if name in self.checkpoints.names():
                self.checkpoints.point("best", name)

    def on_nonfinite(self, state: State, error: NonFiniteError) -> None:  # noqa: ARG002
        """With `on_nonfinite` rollback, put the weights of the newest checkpoint back; the data goes on."""
        if state.settings.on_nonfinite == "rollback":
            name, saved, passed = self.checkpoints.newest(planned=True)
            restore_weights(state, saved)
            self.checkpoints.drop_after(name)  # or they would be taken for newer
            self.note(f"note: back to the weights of {name}" + "".join(f"; not {why}" for why in passed))

    def save(self, state: State, *, planned: bool = True) -> str:
        """Save now; returns the checkpoint's name."""
        name = self.checkpoints.write(capture_state(state, self.fingerprint), planned=planned)
        self.point_best(state)
        self.checkpoints.prune(self.keep)
        self.saved_at = time.monotonic()
        self.note(f"saved {name}")
        return name


def number_of_metric(name: str, value: Any) -> Any:
    """A metric as the history holds it: tensors and NumPy's numbers of one element become Python's.

    Raises:
        ConfigError: a hook has added something else.
    """
    if hasattr(value, "item") and getattr(value, "size", None) is not None and getattr(value, "ndim", 1) == 0:
        return value.item()
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        cause = f"hooks: the metric {name} is a {type(value).__name__}"
        raise ConfigError(cause, hint="let metrics be numbers") from error
    return value


def best(state: State) -> dict[str, Any] | None:
    """What `run.json` tells of the best epoch."""
    if state.progress.best is None:
        return None
    shown = {name: value for name, value in state.progress.best.items() if name.startswith(("train/loss", "val/"))}
    return {
        "metric": state.settings.monitor,
        "value": state.progress.best[state.settings.monitor],
        "epoch": state.progress.best["epoch"],
    } | shown
