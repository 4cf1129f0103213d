"""The answers of commands as text: tables, and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.core.paths import display_path
from trainkit.display.live import SHOWN_METRICS, count, number

if TYPE_CHECKING:
    from trainkit.runs.directory import Run

PHASES = {
    "loader": "reading samples, putting them into a batch",
    "transfer": "to the device, to floats, normalised, augmented",
    "forward": "model and loss",
    "backward": "gradients; with micro_batch or fp16 the forward pass too",
    "step": "checks, clipping, the optimizer's update",
}


def verified(found: Mapping[str, Any], directory: Path) -> list[str]:
    """Whether a training that was killed and resumed ended with the bits of one that was not."""
    kills = f"killed at {'step' if len(found['steps']) == 1 else 'steps'} {', '.join(map(str, found['steps']))}"
    lines = [f"straight  {found['straight']}", f"resumed   {found['resumed']}  ({kills})"]
    if found["equal"]:
        return [*lines, "equal: model, optimizer, schedulers, averages, random states and history, to the last bit"]
    return [*lines, f"DIFFERENT: see {display_path(directory)}; on a GPU write deterministic=true"]


def comparison(runs: list[Run]) -> list[str]:
    """A sweep's runs in a table, the best first."""
    shared = set.intersection(*(set(run.overrides) for run in runs)) if len(runs) > 1 else set()
    names = {run.directory: " ".join(o for o in run.overrides if o not in shared) for run in runs}
    rows = [(names[run.directory], run.best, display_path(run.directory)) for run in runs if run.best is not None]
    if not rows:
        return []
    metric = rows[0][1]["metric"]
    rows.sort(key=lambda row: row[1]["value"], reverse=metric == "val/accuracy")
    shown = [name for name in SHOWN_METRICS if name in rows[0][1]]
    table = [[f"best by {metric}", *shown, "directory"]]
    table += [[name, *(number(best[key]) for key in shown), directory] for name, best, directory in rows]
    return columns(table)


def columns(rows: list[list[str]]) -> list[str]:
    """Rows of cells, the columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def value(option: Any) -> str:
    """An option's value in few characters."""
    return f"{option:.6g}" if isinstance(option, float) else str(option)


def _shown_options(params: Sequence[Mapping[str, Any]]) -> list[str]:
    """The options worth a column: the rate, the decay, and what a rule decides anywhere."""
    names = dict.fromkeys(name for row in params for name in row["options"])
    decided = {name for row in params for name in row["options"] if row["decided_by"][name] != "default"}
    return [name for name in names if name in ("lr", "weight_decay") or name in decided]


def groups(params: Sequence[Mapping[str, Any]], order: Sequence[str]) -> list[str]:
    """The param groups in short, a line each: how many tensors and parameters, the options in force.

    Args:
        params: the rows of `optim.param_table`.
        order: the names of the groups.
    """
    names = _shown_options(params)
    rows = [["param group", "tensors", "parameters", "optimizer", *names]]
    for group in [*order, None]:
        inside = [row for row in params if row["group"] == group]
        if inside:
            options = [value(inside[0]["options"][name]) if name in inside[0]["options"] else "-" for name in names]
            size = f"{sum(row['count'] for row in inside):,}"
            rows.append([group or "(frozen)", str(len(inside)), size, inside[0]["optimizer"] or "-", *options])
    return columns(rows)


def params(params: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every parameter in a line: its group, the options in force, each with the rule that decided it."""
    names = _shown_options(params)
    rows = [["parameter", "shape", "parameters", "layer", "group", "optimizer", *names]]
    for row in params:
        cells = []
        for name in names:
            rule = row["decided_by"].get(name, "default")
            cell = value(row["options"][name]) if name in row["options"] else "-"
            cells.append(cell if rule == "default" else f"{cell} ({rule})")
        shape = "x".join(map(str, row["shape"])) or "()"
        label = " = ".join([row["name"], *row["aliases"]])
        frozen = row["decided_by"].get("freeze", "default")
        group = row["group"] or ("frozen" if frozen == "default" else f"frozen ({frozen})")
        rows.append([label, shape, f"{row['count']:,}", str(row["layer"]), group, row["optimizer"] or "-", *cells])
    trained = [row for row in params if row["trainable"]]
    sizes = [sum(row["count"] for row in some) for some in (params, trained)]
    total = f"{count(len(params), 'tensor')}, {count(sizes[0], 'parameter')}, {sizes[1]:,} of them trained"
    return [*columns(rows), total, "(RULE) decided a value; all else is the optimizer's own"]


def inspection(step: Mapping[str, Any]) -> list[str]:
    """One step taken apart, a line for each parameter."""
    keys = {
        "weight": "weight",
        "grad_before": "grad before",
        "grad": "after backward",
        "grad_twice": "after a second",
        "grad_after_zero": "after zero_grad",
        "update": "update",
        "relative_update": "update/weight",
        "weight_after": "weight after",
    }
    rows = step["parameters"]
    if any(row["finite_difference"] is not None for row in rows):
        keys["finite_difference"] = "finite difference"
    cells = [["parameter", *keys.values()]]
    cells += [[row["name"], *(none_or(row[key]) for key in keys)] for row in rows]
    unused = [row["name"] for row in rows if row["group"] is not None and row["grad"] is None]
    notes = [f"loss {number(step['loss'])} of a batch of {count(step['samples'], 'sample')}"]
    notes.append("one element is shown by its value, several by their norm; gradients add up until they are zeroed")
    if unused:
        notes.append(f"note: the loss does not depend on {', '.join(unused)}")
    return [*columns(cells), *notes]


def benched(found: Mapping[str, Any], notes: Sequence[str]) -> list[str]:
    """Where a step's time goes, and what to compare it with."""
    phases, step, size = found["phases"], found["step"], found["batch_size"]
    total = sum(phases.values())
    rows = [["a step", "ms", "share", ""]]
    rows += [[name, f"{s * 1e3:.2f}", f"{s / total:.0%}", PHASES[name]] for name, s in phases.items()]
    rows.append(["together", f"{total * 1e3:.2f}", "", "each waited for, which the training does not"])
    pace = [["loop", "ms a step", "samples/s", ""]]
    names = {"by_hand": "by hand", "bare": "bare", "step": "trainkit"}
    words = {
        "by_hand": "a DataLoader without workers, float32, nothing fused, the loss read each step",
        "bare": "these parts in five lines: what trainkit itself costs is the difference",
        "step": f"{found['by_hand'] / step:.2f} times the loop by hand",
    }
    pace += [
        [names[key], f"{found[key] * 1e3:.2f}", f"{size / found[key]:,.0f}", words[key]] for key in names if found[key]
    ]
    lines = [*notes, "", *columns(rows), "", *columns(pace), ""]
    if found["peak_share"] is not None:
        speed, limit = found["flops"] / step / 1e9, found["limit"] / 1e9
        share = f"{found['peak_share']:.0%} of the {limit:,.0f} of a large matrix product in this precision"
        lines.append(f"matrix products and convolutions: {speed:,.0f} GFLOP/s, {share}")
    return lines + [f"to change: {text}" for text in found["advice"] or ["nothing stands out"]]


def as_json(content: Any) -> str:
    """JSON that every reader takes: what is not finite becomes null."""

    def strict(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: strict(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [strict(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(strict(content), indent=2, default=str)


def none_or(metric: float | None) -> str:
    """A metric, or none."""
    return "none" if metric is None else number(metric)


def lr_found(found: Mapping[str, Any]) -> list[str]:
    """What a learning-rate range test found."""
    tried = "no rate gave a finite loss"
    if found["rates"]:
        tried = f"tried {count(len(found['rates']), 'rate')} from {found['rates'][0]:.2g} to {found['rates'][-1]:.2g}"
        tried += ", where the loss ran away" if found["diverged"] else ""
    lines = [tried, f"curve: {found['picture']}"]
    if found["suggestion"] is None:
        return [*lines, "no suggestion: no clear fall of the loss; try another --start and --end, or more --steps"]
    if len(found["groups"]) > 1:
        lines += columns([[f"lr/{name}", f"{rate:.2g}"] for name, rate in found["groups"].items()])
    return [*lines, f"the loss fell fastest at lr={found['suggestion']:.2g}"]
