"""The comparison of several runs. Imports no torch."""

from __future__ import annotations

import sys
from pathlib import Path

from trainkit.core.errors import CheckpointError
from trainkit.core.paths import display_path
from trainkit.display.text import SHOWN_METRICS, columns, number
from trainkit.runs.directory import Run


def load_run(directory: Path) -> Run:
    """Return a run of a sweep. A damaged `run.json` is reported, and the run counts as failed."""
    try:
        return Run.load(directory)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return Run(directory)


def comparison_table(runs: list[Run]) -> list[str]:
    """Return a table of runs, the best first: the overrides that differ, and the metrics of the best epoch."""
    shared = set.intersection(*(set(run.overrides) for run in runs)) if len(runs) > 1 else set()
    rows = []
    for run in runs:
        if run.best is not None:
            name = " ".join(override for override in run.overrides if override not in shared)
            rows.append((name, run.best, display_path(run.directory)))
    if not rows:
        return []
    metric = rows[0][1]["metric"]
    mode = rows[0][1].get("mode", "max" if metric == "val/accuracy" else "min")  # version 0.2 did not write the mode
    rows.sort(key=lambda row: row[1]["value"], reverse=mode == "max")
    shown = [name for name in dict.fromkeys([*SHOWN_METRICS, metric]) if name in rows[0][1]]
    table = [[f"best by {metric}", *shown, "directory"]]
    table += [
        [name, *(number(best[key]) if key in best else "" for key in shown), directory]
        for name, best, directory in rows
    ]
    return columns(table)
