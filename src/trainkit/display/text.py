"""Text formatting: numbers, tables, JSON, and the lines that every training prints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainkit.core.errors import NonFiniteError
    from trainkit.training.state import State

BARS = "▁▂▃▄▅▆▇█"
SHOWN_METRICS = ("train/loss", "val/loss", "val/accuracy")
HIDDEN_METRICS = ("train/loss_sum", "train/samples", "train/skipped", "train/scale")  # not on the line of an epoch
WATCHED_PREFIXES = ("param/", "grad/")

# -------------------------------------------------------------------------------- numbers and words


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural if the number is not 1."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def number(value: float) -> str:
    """Return a metric with four decimals, or in scientific notation if it is tiny or huge."""
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 1e6 or value != value else f"{value:.2e}"


def duration(seconds: float) -> str:
    """Return seconds as `12.3 s`, `1 min 15 s` or `1 h 02 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def sparkline(values: list[float], width: int = 40) -> str:
    """Return the last `width` values as a row of bars, from the lowest to the highest. Skip non-finite values."""
    values = [value for value in values[-width:] if math.isfinite(value)]
    if not values:
        return ""
    low, span = min(values), (max(values) - min(values)) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in values)


def as_json(content: Any) -> str:
    """Return strict JSON: non-finite numbers become null."""
    return json.dumps(finite_or_null(content), indent=2, default=str)


def finite_or_null(value: Any) -> Any:
    """Return plain containers in which non-finite numbers are None, because JSON has no such numbers."""
    if isinstance(value, Mapping):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------ lines of a training


def epoch_line(state: State, metrics: Mapping[str, Any]) -> str:
    """Return the metrics of an epoch as a line: losses, accuracy, other metrics, and the watched values."""
    epochs, steps = state.epochs, state.settings.steps
    parts = [f"epoch {metrics['epoch']:>{len(str(epochs))}}/{epochs}" if epochs else f"epoch {metrics['epoch']}"]
    parts += [f"step {metrics['step']:>{len(str(steps))}}/{steps}"] if steps is not None else []
    parts += shown_values(metrics, state.settings.monitor)
    watched = {name: value for name, value in metrics.items() if name.startswith(WATCHED_PREFIXES)}
    parts += [f"{name} {number(value)}" for name, value in watched.items() if value is not None]
    units = [unit for unit in ("samples", "tokens") if f"{unit}_per_second" in metrics]
    parts += [f"{metrics[f'{unit}_per_second']:,.0f} {unit}/s" for unit in units]
    parts += [duration(metrics["seconds"])]
    return "  ".join(parts)


def shown_values(metrics: Mapping[str, Any], monitor: str) -> list[str]:
    """Return the names and values of the monitored metric and of all numbers of the training and the validation.

    The entries of a metric that is a mapping (`val/f1/KEY`) are left out, because they may be many.
    """
    return [
        f"{name} {number(value)}"
        for name, value in metrics.items()
        if isinstance(value, int | float) and (name == monitor or _is_shown(name))
    ]


def _is_shown(name: str) -> bool:
    return name.startswith(("train/", "val/")) and name.count("/") == 1 and name not in HIDDEN_METRICS


def oom_line(state: State) -> str:
    """Return the note that memory ran out and the step is repeated with smaller micro batches."""
    layers = "; layers with batch statistics see micro batches from now on" if state.objects.tracks_statistics else ""
    micro_batch = state.progress.micro_batch
    return f"note: out of memory at step {state.step + 1}: the step is repeated with micro_batch={micro_batch}{layers}"


def nonfinite_line(state: State, error: NonFiniteError) -> str:
    """Return the note that a batch with a non-finite loss or gradient was skipped."""
    rollback = state.settings.on_nonfinite == "rollback"
    effect = "the weights of the last checkpoint are restored" if rollback else "the weights are not updated"
    return f"note: {error.problems[0].cause}: batch skipped, {effect} ({state.progress.skipped} in this epoch)"


# ------------------------------------------------------------------------------------------- tables


def columns(rows: list[list[str]]) -> list[str]:
    """Return rows of cells as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def option_value(option: Any) -> str:
    """Return the value of an optimizer option as a short text."""
    return f"{option:.6g}" if isinstance(option, float) else str(option)


def shown_options(params: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the options that get a column: lr, weight_decay, and every option that a rule has set."""
    names = dict.fromkeys(name for row in params for name in row["options"])
    decided = {name for row in params for name in row["options"] if row["decided_by"][name] != "default"}
    return [name for name in names if name in ("lr", "weight_decay") or name in decided]


def param_group_table(params: Sequence[Mapping[str, Any]], order: Sequence[str]) -> list[str]:
    """Return a table with a line for each param group: tensors, parameters, optimizer and options.

    Args:
        params: the rows of the parameter table, from `Session.params`.
        order: the names of the groups.
    """
    names = shown_options(params)
    rows = [["param group", "tensors", "parameters", "optimizer", *names]]
    for group in [*order, None]:
        members = [row for row in params if row["group"] == group]
        if members:
            options = members[0]["options"]
            cells = [option_value(options[name]) if name in options else "-" for name in names]
            size = f"{sum(row['count'] for row in members):,}"
            rows.append([group or "(frozen)", str(len(members)), size, members[0]["optimizer"] or "-", *cells])
    return columns(rows)
