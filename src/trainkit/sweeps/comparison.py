"""The comparison of runs: seeds folded into mean and deviation, the best first. Imports neither torch nor numpy."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.core.errors import CheckpointError, ConfigError, Problem
from trainkit.core.paths import display_path
from trainkit.core.spelling import did_you_mean
from trainkit.display.tables import plain_table
from trainkit.display.text import SHOWN_METRICS, number
from trainkit.sweeps.axes import MISSING, SEED, Axis, identity
from trainkit.sweeps.collect import Collection, RunRecord, collect, read_record

if TYPE_CHECKING:
    from trainkit.runs.directory import Run

COUNT = "n"  # the column with the number of runs
HIDDEN_METRICS = {"train/loss_sum", "train/samples"}  # follow from other columns


@dataclass(frozen=True)
class Statistic:
    """A metric over the runs of a row.

    Attributes:
        mean: NaN if a value is NaN.
        std: the sample standard deviation (n - 1); NaN for a single run.
        count: the number of runs that have the metric.
    """

    mean: float
    std: float
    count: int


@dataclass(frozen=True)
class Row:
    """Runs that differ only in the seed, or that `group_by` puts together.

    Attributes:
        values: the name of each axis with its value; `MISSING` if the config does not have the key.
        runs: the run with the best monitored value first.
    """

    values: dict[str, Any]
    runs: list[RunRecord]

    @property
    def count(self) -> int:
        """The number of runs."""
        return len(self.runs)

    @property
    def seeds(self) -> list[Any]:
        """The seeds of the runs, sorted."""
        return sorted((run.seed for run in self.runs), key=_sort_key)

    @cached_property
    def metrics(self) -> dict[str, Statistic]:
        """The metrics of the best epochs. A run without a finite monitored value has NaN for all of them."""
        names = dict.fromkeys(name for run in self.runs for name in run.metrics)
        names |= dict.fromkeys(run.metric for run in self.runs if run.metric)
        found = {}
        for name in names:
            values = [run.metrics.get(name, math.nan) for run in self.runs if name in run.metrics or not run.best]
            found[name] = statistic(values)
        return found


@dataclass(frozen=True)
class Table:
    """A comparison.

    Attributes:
        axes: the columns that describe a row.
        rows: sorted.
        metric: the monitored metric; None if no run has one.
        mode: `min` or `max`.
        others: the runs that are not completed; they are in no row.
        hidden: how many rows `top` has removed.
        notes: what a reader should know about the rows.
    """

    axes: list[Axis]
    rows: list[Row]
    metric: str | None
    mode: str
    others: list[RunRecord]
    hidden: int
    notes: list[str]

    @property
    def all_metrics(self) -> list[str]:
        """The names of all metrics: the losses and the accuracy first."""
        names = {name for row in self.rows for name in row.metrics}
        return [name for name in dict.fromkeys([*SHOWN_METRICS, *sorted(names)]) if name in names]

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics that get a column."""
        return [name for name in self.all_metrics if name not in HIDDEN_METRICS or name == self.metric]


def statistic(values: Sequence[float]) -> Statistic:
    """Return mean, sample standard deviation and number of values; the sums are exact."""
    count = len(values)
    if not all(map(math.isfinite, values)) or not values:
        return Statistic(sum(values) if values else math.nan, math.nan, count)
    mean = math.fsum(values) / count
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1)) if count > 1 else math.nan
    return Statistic(mean, deviation, count)


def compare(
    collection: Collection,
    *,
    group_by: Sequence[str] | None = None,
    sort: str | None = None,
    reverse: bool = False,
    top: int | None = None,
) -> Table:
    """Return the table of the completed runs, the best row first.

    Args:
        collection: from `collect`.
        group_by: names of axes or config keys. Runs with equal values share a row. None: all axes but the seed.
        sort: the name of a column to sort by, in ascending order; with a dash before it, in descending order.
        reverse: reverse the order of the rows. Rows without a value stay last.
        top: keep so many rows.

    Raises:
        ConfigError: a name is unknown.
    """
    axes = collection.axes if group_by is None else [find_axis(collection, name) for name in group_by]
    metric, mode = collection.metric, collection.mode
    groups: dict[tuple[Hashable, ...], list[RunRecord]] = {}
    for run in collection.completed:
        groups.setdefault(tuple(identity(axis.value(run)) for axis in axes), []).append(run)
    rows = []
    for runs in groups.values():
        runs.sort(key=lambda run: _rank(run.metrics.get(metric or ""), descending=run.mode == "max"))
        rows.append(Row({axis.name: axis.value(runs[0]) for axis in axes}, runs))
    descending = mode == "max"
    key = metric or ""
    if sort is not None:
        descending = sort.startswith("-")
        key = _column(rows, axes, sort.removeprefix("-"))
    rows.sort(key=lambda row: _rank(_cell(row, key), descending=descending != reverse))
    shown = rows if top is None else rows[:top]
    notes = list(_notes(collection, rows))
    return Table(axes, shown, metric, mode, collection.others, len(rows) - len(shown), notes)


def find_axis(collection: Collection, name: str) -> Axis:
    """Return the axis of a name: an axis of the collection, a group, or a config key by its full or short name.

    Raises:
        ConfigError: no key has this name, or several have.
    """
    for axis in collection.axes:
        if name in (axis.name, axis.key):
            return axis
    keys = {key for run in collection.runs for key in run.config}
    groups = {group for run in collection.runs for group in run.choices}
    if name in keys or name in groups:
        return Axis(name, name, is_group=name not in keys)
    found = sorted(key for key in keys if key.endswith(f".{name}"))
    if len(found) == 1:
        return Axis(found[0], name)
    if found:
        raise ConfigError(f"{name}: several config keys end with this name", hint=f"choose from: {', '.join(found)}")
    names = [axis.name for axis in collection.axes] + [SEED]
    hint = did_you_mean(name, [*names, *keys, *groups])
    hint = f"choose from: {', '.join(names)}, or any config key" if hint.startswith("choose") else hint
    raise ConfigError(f"{name}: no run has this config key", hint=hint)


def comparison_lines(directory: Path) -> list[str]:
    """Return the table of the completed runs of a sweep as lines; [] if there is none."""
    try:
        table = compare(collect([directory]))
    except ConfigError:  # no run has started
        return []
    return plain_table(*cells(table)) if table.rows else []


def cells(table: Table, *, directories: bool = True) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a table as texts for people.

    Args:
        table: from `compare`.
        directories: add a column with the directory of the best run.
    """
    folded = any(row.count > 1 for row in table.rows)
    header = [*(axis.name for axis in table.axes), *[COUNT] * folded, *table.metrics]
    header += ["best run" if folded else "directory"] * directories
    rows = []
    for row in table.rows:
        texts = [value_text(row.values[axis.name]) for axis in table.axes]
        texts += [str(row.count)] * folded
        texts += [statistic_text(row.metrics[name]) if name in row.metrics else "" for name in table.metrics]
        rows.append(texts + [display_path(row.runs[0].directory)] * directories)
    return header, rows


def exact_cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a table as texts for programs: exact numbers, a column for each of them."""
    header = [*(axis.name for axis in table.axes), COUNT]
    header += [column for name in table.all_metrics for column in (name, f"{name} std")]
    rows = []
    for row in table.rows:
        texts = [value_text(row.values[axis.name], missing="") for axis in table.axes]
        texts.append(str(row.count))
        for name in table.all_metrics:
            found = row.metrics.get(name)
            texts += ["", ""] if found is None else [repr(found.mean), repr(found.std) if found.count > 1 else ""]
        rows.append([*texts, str(row.runs[0].directory)])
    return [*header, "directory"], rows


def as_dict(table: Table) -> dict[str, Any]:
    """Return a table as plain values for JSON, with the runs that are in no row."""
    rows = [
        {
            "axes": {name: plain_value(value) for name, value in row.values.items()},
            "count": row.count,
            "seeds": row.seeds,
            "metrics": {name: dataclasses.asdict(found) for name, found in row.metrics.items()},
            "directories": [str(run.directory) for run in row.runs],
        }
        for row in table.rows
    ]
    others = [
        {
            "status": run.status,
            "why": run.why,
            "axes": {axis.name: plain_value(axis.value(run)) for axis in table.axes if run.config},
            "seed": run.seed,
            "overrides": list(run.overrides),
            "best": run.best,
            "directory": str(run.directory),
        }
        for run in table.others
    ]
    axes = [{"name": axis.name, "key": axis.key} for axis in table.axes]
    about = {"metric": table.metric, "mode": table.mode, "axes": axes}
    return {**about, "rows": rows, "hidden_rows": table.hidden, "others": others, "notes": table.notes}


def other_lines(table: Table, runs: Sequence[RunRecord]) -> list[str]:
    """Return a line for each run that is in no row: its status, what it is, the cause, and its directory.

    Args:
        table: from `compare`.
        runs: all runs of the collection.
    """
    shared = set.intersection(*(set(run.overrides) for run in runs)) if len(runs) > 1 else set()
    lines = []
    for run in table.others:
        name = " ".join(override for override in run.overrides if override not in shared)
        why = " ".join(run.why.split())
        lines.append(": ".join(part for part in (run.status, name, why, display_path(run.directory)) if part))
    return lines


def value_text(value: Any, missing: str = "-") -> str:
    """Return the value of an axis as a user writes it."""
    if value is MISSING:
        return missing
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str, ensure_ascii=False)


def plain_value(value: Any) -> Any:
    """Return the value of an axis for JSON."""
    return None if value is MISSING else value


def statistic_text(found: Statistic) -> str:
    """Return a mean with its deviation, such as `0.1285 ± 0.0031`."""
    return number(found.mean) + (f" ± {number(found.std)}" if found.count > 1 else "")


def _notes(collection: Collection, rows: Sequence[Row]) -> Iterable[str]:
    """Yield what a reader should know about the rows."""
    monitors = collection.monitors
    if len(monitors) > 1:
        listed = ", ".join(f"{metric} ({count} run{'s' * (count != 1)})" for metric, count in monitors.items())
        yield f"the runs monitor different metrics: {listed}; each has its own best epoch"
    for row in rows:
        lost = [run for run in row.runs if run.best is None]
        for run in lost:
            yield f"no epoch has a finite {run.metric or 'monitored metric'}: {run.directory}"
    equal = sum(row.count - len({identity(run.seed) for run in row.runs}) for row in rows)
    if equal:
        yield f"runs with the same seed as another run in their row: {equal}"


def _column(rows: Sequence[Row], axes: Sequence[Axis], name: str) -> str:
    """Return the column that `--sort` names.

    Raises:
        ConfigError: there is no such column.
    """
    metrics = dict.fromkeys(metric for row in rows for metric in row.metrics)
    columns = [*(axis.name for axis in axes), *metrics, COUNT]
    matches = [column for column in columns if column == name]
    matches = matches or [axis.name for axis in axes if axis.key == name]
    matches = matches or [metric for metric in metrics if metric.endswith(f"/{name}")]
    if len(matches) == 1 or not rows:
        return matches[0] if matches else name
    hint = f"choose from: {', '.join(matches)}" if matches else did_you_mean(name, columns)
    raise ConfigError(Problem(f"--sort {name}: the table has no such column", hint))


def _cell(row: Row, column: str) -> Any:
    if column in row.values:
        return row.values[column]
    if column == COUNT:
        return row.count
    found = row.metrics.get(column)
    return None if found is None else found.mean


def _rank(value: Any, *, descending: bool) -> tuple[bool, Any]:
    """Return a key to sort by. Missing values and NaN are last in both directions."""
    if value is None or value is MISSING or value != value:
        return (True, ())
    kind, number, text = _sort_key(value)
    if descending:
        return (False, (-kind, -number, _Descending(text)))
    return (False, (kind, number, text))


def _sort_key(value: Any) -> tuple[int, float, str]:
    """Return a key that sorts numbers before texts."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, value, "") if is_number else (1, 0, str(value))


@dataclass(frozen=True)
class _Descending:
    """A text that sorts in the opposite order."""

    text: str

    def __lt__(self, other: _Descending) -> bool:
        return self.text > other.text


def comparison_table(runs: Sequence[Run]) -> list[str]:
    """Return the table of some runs as lines. The table of a sweep is `comparison_lines`."""
    table = compare(Collection([read_record(run.directory) for run in runs]))
    return plain_table(*cells(table)) if table.rows else []


def load_run(directory: Path) -> Run:
    """Return a run of a sweep. A damaged `run.json` is reported, and the run counts as failed."""
    from trainkit.runs.directory import Run

    try:
        return Run.load(directory)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return Run(directory)
