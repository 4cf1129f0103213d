"""The lines about a run that a user sees first and last. Imports no torch."""

from __future__ import annotations

import shlex

from trainkit.core.paths import display_path
from trainkit.display.text import count, shown_values
from trainkit.runs.directory import Run


def opening_lines(run: Run) -> list[str]:
    """Return the device, the sizes of the model and the data, and the run directory."""
    info = run.info
    frozen = info["parameters"] - info["trainable_parameters"]
    sizes = [count(info["parameters"], "parameter") + (f" ({frozen:,} frozen)" if frozen else "")]
    sizes.append(samples_text(info["train_samples"], "training"))
    sizes.append("no validation" if info["val_samples"] == 0 else samples_text(info["val_samples"], "validation"))
    ranks = f" in {info['ranks']} processes" if info.get("ranks", 1) > 1 else ""
    return [f"training on {info['device']}{ranks}: {', '.join(sizes)}", f"run directory: {display_path(run.directory)}"]


def samples_text(samples: int | None, part: str) -> str:
    """Return the number of samples of a data set; None is a stream without a length."""
    return f"a stream of {part} samples" if samples is None else count(samples, f"{part} sample")


def result_lines(run: Run) -> list[str]:
    """Return the reason of an early stop, the metrics of the best epoch, the report, and the run directory."""
    best = "no epoch has a finite value of the monitored metric"
    if run.best is not None:
        metrics = ", ".join(shown_values(run.best, run.best["metric"]))
        epochs = count(len(run.history), "epoch")
        best = f"best of {epochs} by {run.best['metric']}: epoch {run.best['epoch']}: {metrics}"
    early = [run.info["why"]] if run.info.get("why") else []
    report = [f"report: {display_path(run.report)}"] if run.report else []
    return [*early, best, *report, f"history and config: {display_path(run.directory)}"]


def finished_lines(run: Run) -> list[str]:
    """Return the note that the run is complete, the command that trains longer, and the result."""
    name = shlex.quote(display_path(run.directory))
    why, steps = str(run.info.get("why") or ""), run.config.get("steps")
    if why:
        key = "max_minutes=N" if why.startswith("stopped after") else "early_stop.patience=off"
        note = f"finished; to train longer: trainkit resume {name} {key}"
    else:
        done = count(len(run.history), "epoch") if steps is None else count(steps, "step")
        key = "epochs" if steps is None else "steps"
        note = f"finished: all {done} are done; to train longer: trainkit resume {name} {key}=N"
    return [note, *result_lines(run)]
