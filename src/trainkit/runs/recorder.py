"""The hook that writes the history of a run, its parameters, and its log."""

from __future__ import annotations

from typing import Any

from trainkit.core.errors import NonFiniteError
from trainkit.core.redaction import redact_by_key
from trainkit.display import text
from trainkit.runs.directory import Run
from trainkit.training.state import State

COUNTS = ("train/samples", "train/skipped", "train/scale")  # of an epoch, which do not compare runs


class Recorder:
    """Writes the metrics of each epoch, and logs what happens in between.

    Args:
        run: that is trained.
        params: the rows of `optim.group_table.param_table`.
    """

    def __init__(self, run: Run, params: list[dict[str, Any]]) -> None:
        self.run, self.params = run, params
        self.logged: set[str] = set()  # unreadable samples

    def on_start(self, state: State) -> None:
        """Write the parameters. Do not log unreadable samples that were logged before the resume."""
        self.run.write_json("params.json", redact_by_key(self.params))
        self.logged = {line for known in state.progress.unreadable.values() for line in known.values()}

    def on_step(self, state: State) -> None:
        """Log unreadable samples."""
        self.log_unreadable(state)

    def log_unreadable(self, state: State) -> None:
        """Log each unreadable sample once."""
        if count_unreadable(state) > len(self.logged):  # a quick check, as this runs at each step
            for known in state.progress.unreadable.values():  # in place: the checkpoints contain these lines too
                known.update({index: self.run.hide_secrets(line) for index, line in known.items()})
            lines = [line for known in state.progress.unreadable.values() for line in known.values()]
            for line in dict.fromkeys(lines):
                if line not in self.logged:
                    self.run.log(f"note: skipped an unreadable sample: {line}")
            self.logged |= set(lines)

    def on_epoch_end(self, state: State, metrics: dict[str, Any]) -> None:
        """Add the epoch to the history."""
        self.log_unreadable(state)
        self.run.append_epoch(metrics, best_epoch(state))
        self.run.log(text.epoch_line(state, metrics))

    def on_split(self, state: State) -> None:
        """Log that memory ran out."""
        self.run.log(text.oom_line(state))

    def on_note(self, state: State, line: str) -> None:  # noqa: ARG002
        """Log a note."""
        self.run.log(line)

    def on_nonfinite(self, state: State, error: NonFiniteError) -> None:
        """Log which batch was skipped."""
        self.run.log(text.nonfinite_line(state, error))


def count_unreadable(state: State) -> int:
    """Return the number of unreadable samples so far."""
    return sum(map(len, state.progress.unreadable.values()))


def best_epoch(state: State) -> dict[str, Any] | None:
    """Return the entry of the best epoch in `run.json`."""
    best, monitor = state.progress.best, state.settings.monitor
    if best is None:
        return None
    parts = ("train/", "val/")
    shown = {name: v for name, v in best.items() if name == monitor or (name.startswith(parts) and name not in COUNTS)}
    chosen = {"metric": monitor, "mode": state.settings.mode, "value": best[monitor], "epoch": best["epoch"]}
    return chosen | shown
