"""What the report shows of a search. Imports no torch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainkit.core.errors import CheckpointError
from trainkit.core.paths import display_path
from trainkit.display.search_charts import SampledKey, TrialFacts, best_so_far
from trainkit.display.search_report import SearchFacts
from trainkit.engine.report import finite_history
from trainkit.runs.untrusted import is_number
from trainkit.sweeps.collect import RunRecord
from trainkit.sweeps.ledger import Ledger
from trainkit.sweeps.search.importance import importance, value_of
from trainkit.sweeps.search.results import Search, SearchAxis, Trial
from trainkit.sweeps.search.text import repeat_command, saved_percentage, search_lines, stops_early
from trainkit.sweeps.table_text import value_text

COMMAND_LINE = "to repeat it: "


def search_facts(search: Search, *, with_name: bool = False) -> SearchFacts:
    """Return what the files of a search say.

    Args:
        search: from `find_searches`.
        with_name: name the search, because the page has several.
    """
    metric = search.metric or ""
    ranked = {trial.number for trial in search.ranked}
    order = [*search.ranked, *(trial for trial in search.trials if trial.number not in ranked)]
    histories = {run.directory: curve_of(run, metric) for trial in order for run in trial.runs}
    trials = [
        TrialFacts(
            trial.number,
            trial.status,
            search.value(trial) if trial.number in ranked else None,
            _values(search, trial),
            [sorted(histories[run.directory].items()) for run in trial.runs],
        )
        for trial in order
    ]
    shares, note = importance(search)
    return SearchFacts(
        name=display_path(search.directory) if with_name else "",
        metric=metric,
        mode=search.mode,
        lines=[line for line in search_lines(search) if not line.startswith(COMMAND_LINE)],
        command="" if search.best is None else repeat_command(search, search.best),
        trials=trials,
        keys=[_sampled(axis) for axis in search.plan.axes],
        steps=best_by_total_epochs(search, histories),
        importance=shares,
        importance_note=note,
        saved=(f"{saved_percentage(search):.0f} %", f"{search.saved_epochs:,} of {search.full_epochs:,}")
        if stops_early(search)
        else None,
    )


def curve_of(run: RunRecord, metric: str) -> dict[int, float]:
    """Return the epochs of a run with the value of a metric; NaN if it is not a number."""
    rows = finite_history(run.history)
    return {row["epoch"]: float(row[metric]) if is_number(row.get(metric)) else math.nan for row in rows}


def best_by_total_epochs(search: Search, histories: Mapping[Path, Mapping[int, float]]) -> list[tuple[float, float]]:
    """Return the epochs that all trials have trained, with the best value so far, whenever it changes.

    The ledger has the order of the attempts. The epochs of attempts that ran at the same time count one attempt after
    another. A trial with several repeats has a value as soon as each of its repeats has one.

    Args:
        search: the search.
        histories: the metric in each epoch of each run.
    """
    total, done = 0, dict.fromkeys(histories, 0)
    best: dict[Path, float] = {}  # of each run
    points: list[tuple[float, float]] = []
    choose = max if search.mode == "max" else min
    for trial, run, until, has_failed in _attempts(search):
        curve = histories[run.directory]
        for epoch in range(done[run.directory] + 1, until + 1):
            total += 1
            value = curve.get(epoch, math.nan)
            if math.isfinite(value):
                best[run.directory] = choose(best.get(run.directory, value), value)
            found = [best[other.directory] for other in trial.runs if other.directory in best]
            if trial.is_comparable and found and len(found) == len(trial.runs):
                points.append((total, math.fsum(value / len(found) for value in found)))
        done[run.directory] = 0 if has_failed else max(until, done[run.directory])
    steps = best_so_far(points, search.mode)
    return [*steps, (total, steps[-1][1])] if steps and steps[-1][0] < total else steps


def _attempts(search: Search) -> list[tuple[Trial, RunRecord, int, bool]]:
    """Return the attempts in the order in which they ended: trial, run, its epochs so far, whether it failed."""
    runs = {run.job.number: (trial, run) for trial in search.trials for run in trial.runs if run.job is not None}
    found = []
    with contextlib.suppress(CheckpointError):
        found = [
            (*runs[job], min(epochs, max(runs[job][1].epochs, 0)), status == "failed")
            for job, epochs, status in Ledger(search.directory).trained()
            if job in runs
        ]
    return found + [(trial, run, run.epochs, False) for trial, run in runs.values()]  # what the ledger lacks


def _values(search: Search, trial: Trial) -> dict[str, float | str]:
    """Return the sampled keys of a trial with their values."""
    found: dict[str, float | str] = {}
    for axis in search.plan.axes:
        value: Any = value_of(axis, trial)
        if value is not None:
            found[axis.key] = value_text(value) if axis.kind == "choice" else float(value)
    return found


def _sampled(axis: SearchAxis) -> SampledKey:
    return SampledKey(axis.key, axis.low, axis.high, axis.log, [value_text(choice) for choice in axis.choices])
