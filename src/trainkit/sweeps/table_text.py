"""A comparison as texts for people and for programs. Imports neither torch nor numpy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from trainkit.core.paths import display_path
from trainkit.display.tables import plain_table
from trainkit.display.text import count, number
from trainkit.sweeps.axes import MISSING
from trainkit.sweeps.collect import SEARCH_ENDS, RunRecord
from trainkit.sweeps.search.text import search_dict, trial_dict
from trainkit.sweeps.table import COUNT, EPOCHS, STATUS, TRIAL, Row, Statistic, Table


def table_lines(table: Table) -> list[str]:
    """Return a table as aligned lines, with what it is sorted by below."""
    if not table.rows:
        return ["no run is completed"]
    lines = plain_table(*cells(table))
    if table.hidden:
        lines.append(f"… {count(table.hidden, 'more row')}")
    if table.metric is not None and len(table.rows) > 1 and not table.sorted_by:
        better = "higher" if table.mode == "max" else "lower"
        lines.append(f"the best by {table.metric} is first ({better} is better)")
    if any(row.trial is not None and row.trial.status in SEARCH_ENDS for row in table.rows):
        lines.append("completed, paused and pruned trials are compared by their best epoch, however long they trained")
    return lines


def cells(table: Table, *, directories: bool = True) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a table as texts for people.

    Args:
        table: from `compare`.
        directories: add a column with the directory of the best run.
    """
    folded = any(row.count > 1 for row in table.rows)
    header = [*_names(table), *[COUNT] * folded, *table.metrics]
    header += ["best run" if folded else "directory"] * directories
    rows = []
    for row in table.rows:
        shown = short_text if row.trial is not None else value_text
        texts = _with_trial(table, row, [shown(row.values[axis.name]) for axis in table.axes])
        texts += [str(row.count)] * folded
        texts += [statistic_text(row.metrics[name]) if name in row.metrics else "" for name in table.metrics]
        rows.append(texts + [display_path(row.runs[0].directory)] * directories)
    return header, rows


def exact_cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a table as texts for programs: exact numbers, a column for each of them."""
    header = [*_names(table), COUNT]
    header += [column for name in table.all_metrics for column in (name, f"{name} std")]
    rows = []
    for row in table.rows:
        texts = _with_trial(table, row, [value_text(row.values[axis.name], missing="") for axis in table.axes])
        texts.append(str(row.count))
        for name in table.all_metrics:
            found = row.metrics.get(name)
            texts += ["", ""] if found is None else [repr(found.mean), repr(found.std) if found.count > 1 else ""]
        rows.append([*texts, str(row.runs[0].directory)])
    return [*header, "directory"], rows


def _names(table: Table) -> list[str]:
    """Return the columns that describe a row. A search has the trial before the axes, status and epochs after them."""
    names = [axis.name for axis in table.axes]
    return (
        [TRIAL, *names, STATUS, EPOCHS if EPOCHS not in names else f"{EPOCHS} trained"] if table.has_trials else names
    )


def _with_trial(table: Table, row: Row, texts: Sequence[str]) -> list[str]:
    """Return the cells of `_names` for a row."""
    if not table.has_trials:
        return list(texts)
    trial = row.trial
    return [str(trial.number), *texts, trial.status, str(trial.epochs)] if trial else ["", *texts, "", ""]


def as_dict(table: Table) -> dict[str, Any]:
    """Return a table as plain values for JSON, with the runs that are in no row."""
    rows = [
        {
            "axes": {name: plain_value(value) for name, value in row.values.items()},
            "count": row.count,
            "seeds": row.seeds,
            "metrics": {name: dataclasses.asdict(found) for name, found in row.metrics.items()},
            "directories": [str(run.directory) for run in row.runs],
            **({} if row.trial is None else trial_dict(row.trial)),
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
            **({} if run.job is None or run.job.trial is None else {TRIAL: run.job.trial}),
        }
        for run in table.others
    ]
    axes = [{"name": axis.name, "key": axis.key} for axis in table.axes]
    about = {"metric": table.metric, "mode": table.mode, "axes": axes}
    about |= {"searches": list(map(search_dict, table.searches))} if table.searches else {}
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


def short_text(value: Any) -> str:
    """Return the value of an axis for a table of a search, which samples floats with many digits."""
    return f"{value:.4g}" if isinstance(value, float) else value_text(value)


def plain_value(value: Any) -> Any:
    """Return the value of an axis for JSON."""
    return None if value is MISSING else value


def statistic_text(found: Statistic) -> str:
    """Return a mean with its deviation, such as `0.1285 ± 0.0031`."""
    return number(found.mean) + (f" ± {number(found.std)}" if found.count > 1 else "")
