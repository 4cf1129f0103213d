"""The curves of `compare --plot`: the monitored metric over the epochs, or against a number of the config.

The band around a curve is one standard deviation over the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from trainkit.core.errors import ConfigError
from trainkit.display.plots import Curve, plot_curves
from trainkit.display.text import count
from trainkit.runs.untrusted import is_number
from trainkit.sweeps.axes import Axis, identity
from trainkit.sweeps.collect import Collection
from trainkit.sweeps.comparison import compare, find_axis
from trainkit.sweeps.table import Row, statistic
from trainkit.sweeps.table_text import value_text

MAX_CURVES = 10  # as many as have different colours
LOG_RANGE = 10.0  # values that span more than this ratio get a log axis


def plot(
    collection: Collection,
    path: Path,
    *,
    group_by: Sequence[str] | None = None,
    x: str | None = None,
    top: int | None = None,
) -> list[str]:
    """Plot the monitored metric of the runs in the table; return a note for each run that is not shown.

    Args:
        collection: from `collect`.
        path: the PNG or SVG file to write.
        group_by: as for `compare`: a curve for each row.
        x: the name of a number in the config, for the horizontal axis. None: the epochs.
        top: plot the best rows only.

    Raises:
        ConfigError: there is nothing to plot.
    """
    metric = collection.metric
    if metric is None or not collection.compared:
        raise ConfigError("--plot: no run is completed", hint="see the list of runs without --plot")
    if x is None:
        rows = compare(collection, group_by=group_by, top=top).rows
        curves = [learning_curve(row, metric, _differing(rows)) for row in rows]
        log_x, label = False, "epoch"
    else:
        axis = find_axis(collection, x)
        names = [name for name in group_by or [other.name for other in collection.axes] if name != x]
        others = [found for found in (find_axis(collection, name) for name in names) if found.key != axis.key]
        rows = compare(collection, group_by=[*(other.key for other in others), axis.key]).rows
        curves = axis_curves(rows, metric, axis, others)
        log_x, label = is_logarithmic({value for curve in curves for value in curve.x}), axis.name
    drawn = [curve for curve in curves if curve.x]
    if not drawn:
        raise ConfigError(f"--plot: no run has values of {metric}", hint="see the notes below the table without --plot")
    limit = min(top or MAX_CURVES, MAX_CURVES)
    plot_curves(path, drawn[:limit], xlabel=label, ylabel=metric, log_x=log_x, points=x is not None)
    hidden = len(drawn) - limit
    return [f"the plot shows the first {limit} curves and leaves out {count(hidden, 'curve')}"] if hidden > 0 else []


def learning_curve(row: Row, metric: str, names: Sequence[str] = ()) -> Curve:
    """Return mean and deviation of a metric in each epoch. Epochs that some runs do not have use the other runs.

    Args:
        row: of a table.
        metric: the name of the metric.
        names: the axes that the label of the curve shows.
    """
    values: dict[int, list[float]] = {}
    for run in row.runs:
        for epoch in run.history:
            value: Any = epoch.get(metric)
            if is_number(value):
                values.setdefault(epoch["epoch"], []).append(float(value))
    return _curve(
        _label(row, names), {float(epoch): values[epoch] for epoch in sorted(values) if is_number(epoch)}, row.count
    )


def axis_curves(rows: Sequence[Row], metric: str, axis: Axis, others: Sequence[Axis]) -> list[Curve]:
    """Return a curve of the best metric against an axis for each combination of the other axes.

    Raises:
        ConfigError: a value of the axis is not a number.
    """
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        value = row.values[axis.name]
        if not is_number(value) or not math.isfinite(value):
            hint = "name an axis whose values are numbers"
            raise ConfigError(f"--x {axis.name}: {value_text(value)} is not a number", hint=hint)
        groups.setdefault(tuple(identity(row.values[other.name]) for other in others), []).append(row)
    curves = []
    for members in groups.values():
        members.sort(key=lambda row: row.values[axis.name])
        values = {
            float(row.values[axis.name]): [run.metrics[metric] for run in row.runs if metric in run.metrics]
            for row in members
        }
        label = _label(members[0], [other.name for other in others])
        curves.append(_curve(label, values, max(row.count for row in members)))
    return curves


def is_logarithmic(values: set[float]) -> bool:
    """Return whether values were swept logarithmically: by a constant ratio, or over more than a factor of 10."""
    ordered = sorted(values)
    if len(ordered) < 2 or ordered[0] <= 0:
        return False
    steps = [after - before for before, after in pairwise(ordered)]
    ratios = [after / before for before, after in pairwise(ordered)]
    if len(ordered) > 2 and math.isclose(min(steps), max(steps), rel_tol=1e-3):
        return False
    constant = math.isclose(min(ratios), max(ratios), rel_tol=0.05)
    return ordered[-1] / ordered[0] > LOG_RANGE or (constant and (len(ordered) > 2 or ratios[0] >= LOG_RANGE * 0.999))


def _differing(rows: Sequence[Row]) -> list[str]:
    """Return the axes whose values differ between rows. With `top` or `group_by`, an axis may have one value."""
    names = rows[0].values if rows else ()
    return [name for name in names if len({identity(row.values[name]) for row in rows}) > 1]


def _curve(label: str, values: dict[float, list[float]], runs: int) -> Curve:
    found = {x: statistic(listed) for x, listed in values.items() if listed}
    deviations = [0.0 if math.isnan(each.std) else each.std for each in found.values()]
    name = " ".join([label or "all runs", f"(n={runs})"]) if runs > 1 else label or "run"
    return Curve(name, list(found), [each.mean for each in found.values()], deviations)


def _label(row: Row, names: Sequence[str]) -> str:
    return " ".join(f"{name}={value_text(row.values[name])}" for name in names)
