"""The comparison of runs: seeds folded into mean and deviation, the best first. Imports neither torch nor numpy."""

from __future__ import annotations

import shlex
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainkit.core.errors import ConfigError
from trainkit.core.paths import display_path
from trainkit.core.spelling import did_you_mean
from trainkit.display.text import count
from trainkit.sweeps.axes import MISSING, SEED, Axis, identity
from trainkit.sweeps.collect import SEARCH_ENDS, Collection, RunRecord, collect
from trainkit.sweeps.search.results import find_searches
from trainkit.sweeps.search.text import search_lines
from trainkit.sweeps.table import COUNT, EPOCHS, STATUS, TRIAL, Row, Statistic, Table, sort_key
from trainkit.sweeps.table_text import table_lines

__all__ = ["Row", "Statistic", "Table", "compare", "comparison_lines", "find_axis"]

MAX_TRIALS = 20  # in the table at the end of a search


def compare(
    collection: Collection,
    *,
    group_by: Sequence[str] | None = None,
    sort: str | None = None,
    reverse: bool = False,
    top: int | None = None,
) -> Table:
    """Return the table of the compared runs, the best row first.

    Args:
        collection: from `collect`.
        group_by: names of axes or config keys. Runs with equal values share a row. None: all axes but the seed, and
            each trial of a search has its own row.
        sort: the name of a column to sort by, in ascending order; with a dash before it, in descending order.
        reverse: reverse the order of the rows. Rows without a value stay last.
        top: keep so many rows.

    Raises:
        ConfigError: a name is unknown.
    """
    axes = collection.axes
    if group_by is not None:
        axes = list({axis.key: axis for axis in (find_axis(collection, name) for name in group_by)}.values())
    metric, mode = collection.metric, collection.mode
    searches = find_searches(collection)
    trials = {run.directory: trial for search in searches for trial in search.trials for run in trial.runs}
    trials = trials if group_by is None else {}
    groups: dict[tuple[Hashable, ...], list[RunRecord]] = {}
    for run in collection.compared:
        key: list[Hashable] = [identity(axis.value(run)) for axis in axes]
        key += [(run.sweep, trials[run.directory].number)] if run.directory in trials else []
        groups.setdefault(tuple(key), []).append(run)
    rows = []
    for runs in groups.values():
        runs.sort(key=lambda run: _rank(run.metrics.get(metric or ""), descending=run.mode == "max"))
        rows.append(Row({axis.name: axis.value(runs[0]) for axis in axes}, runs, trials.get(runs[0].directory)))
    _sort(rows, metric or "", descending=(mode == "max") != (reverse and sort is None))
    rows.sort(key=lambda row: row.trial is not None and not row.trial.is_comparable)
    if sort is not None:  # equal values stay in the order of the monitored metric
        column = _column(rows, axes, sort.removeprefix("-"))
        _sort(rows, column, descending=sort.startswith("-") != reverse)
    shown = rows if top is None else rows[:top]
    notes = list(_notes(collection, rows, same_config=group_by is None))
    hidden, order = len(rows) - len(shown), sort or "reverse" * reverse
    return Table(axes, shown, metric, mode, collection.others, hidden, notes, order, searches)


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
    """Return the table of the compared runs of a sweep as lines; [] if there is none. A search shows its best rows."""
    try:
        table = compare(collect([directory]))
    except ConfigError:  # no run has started
        return []
    if table.has_trials and len(table.rows) > MAX_TRIALS:
        shown = table.rows[:MAX_TRIALS]
        table = replace(table, rows=shown, hidden=len(table.rows) - len(shown))
    lines = table_lines(table) if table.rows else []
    if table.hidden:
        lines.append(f"to see all rows: trainkit compare {shlex.quote(display_path(directory))}")
    return lines + [line for search in table.searches for line in search_lines(search)]


def _notes(collection: Collection, rows: Sequence[Row], *, same_config: bool) -> Iterable[str]:
    """Yield what a reader should know about the rows."""
    monitors = collection.monitors
    if len(monitors) > 1:
        listed = ", ".join(f"{metric} ({count(runs, 'run')})" for metric, runs in monitors.items())
        yield f"the runs monitor different metrics: {listed}; the best rows by {collection.metric} are first"
    targets = {str(run.config.get("loss._target_", "")) for row in rows for run in row.runs} - {""}
    losses = {target.rpartition(".")[2] for target in targets}
    if len(losses) > 1 and (collection.metric or "").endswith("loss"):
        yield f"the runs have different losses, whose values do not compare: {', '.join(sorted(losses))}"
    diverged = [row.trial.number for row in rows if row.trial and any(run.best is None for run in row.runs)]
    if diverged:  # a search may have many
        yield f"trials without a finite {collection.metric or 'monitored metric'}: {', '.join(map(str, diverged))}"
    for row in rows:
        for run in row.runs:
            if run.best is None and row.trial is None:
                yield f"no epoch has a finite {run.metric or 'monitored metric'}: {display_path(run.directory)}"
    early = sum(run.status in SEARCH_ENDS for row in rows for run in row.runs if row.trial is None)
    if early:
        yield f"runs in the rows that a search has pruned or paused: {early}"
    equal = sum(row.count - len({identity(run.seed) for run in row.runs}) for row in rows)
    if equal and same_config:
        yield f"runs with the same seed as another run in their row: {equal}"


def _column(rows: Sequence[Row], axes: Sequence[Axis], name: str) -> str:
    """Return the column that `--sort` names.

    Raises:
        ConfigError: there is no such column.
    """
    metrics = dict.fromkeys(metric for row in rows for metric in row.metrics)
    columns = [*(axis.name for axis in axes), *metrics, COUNT]
    columns += [TRIAL, STATUS, EPOCHS] if any(row.trial for row in rows) else []
    matches = [column for column in columns if column == name]
    matches = matches or [axis.name for axis in axes if axis.key == name]
    matches = matches or [metric for metric in metrics if metric.endswith(f"/{name}")]
    if len(matches) == 1 or not rows:
        return matches[0] if matches else name
    cause = "several columns have this name" if matches else "the table has no such column"
    hint = f"choose from: {', '.join(matches)}" if matches else did_you_mean(name, columns)
    raise ConfigError(f"--sort {name}: {cause}", hint=hint)


def _sort(rows: list[Row], column: str, *, descending: bool) -> None:
    rows.sort(key=lambda row: _rank(_cell(row, column), descending=descending))


def _cell(row: Row, column: str) -> Any:
    if column in row.values:
        return row.values[column]
    if column == COUNT:
        return row.count
    if column in (TRIAL, STATUS, EPOCHS) and row.trial is not None:
        return {TRIAL: row.trial.number, STATUS: row.trial.status, EPOCHS: row.trial.epochs}[column]
    found = row.metrics.get(column)
    return None if found is None else found.mean


def _rank(value: Any, *, descending: bool) -> tuple[bool, Any]:
    """Return a key to sort by. Missing values and NaN are last in both directions."""
    if value is None or value is MISSING or value != value:
        return (True, ())
    kind, number, text = sort_key(value)
    if descending:
        return (False, (-kind, -number, _Descending(text)))
    return (False, (kind, number, text))


@dataclass(frozen=True)
class _Descending:
    """A text that sorts in the opposite order."""

    text: str

    def __lt__(self, other: _Descending) -> bool:
        return self.text > other.text
