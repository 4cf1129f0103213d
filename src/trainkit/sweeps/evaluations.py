"""The table of several evaluations: the best first, with what differs between the runs. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainkit.core.errors import ConfigError
from trainkit.core.paths import display_path
from trainkit.display.text import count
from trainkit.runs.find import find_run
from trainkit.runs.untrusted import is_number
from trainkit.sweeps.collect import Collection, RunRecord, collect, is_run, read_record
from trainkit.sweeps.comparison import compare
from trainkit.sweeps.table import Table

LOSS = "val/loss"


def find_runs(names: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return the run directories that a command line names, and notes about jobs that are left out.

    Args:
        names: run directories, sweeps and folders, which stand for their completed runs, or `last`.

    Raises:
        ConfigError: a directory does not exist, or holds no run that is completed.
    """
    found: list[Path] = []
    notes = []
    for name in names:
        directory = Path("outputs/latest").resolve() if name == "last" else Path(name)
        if not name or not directory.is_dir() or is_run(directory):
            found.append(find_run(name))
            continue
        collection = collect([directory])
        completed = [run.directory for run in collection.runs if run.status == "completed"]
        if not completed:
            raise ConfigError(f"{display_path(directory)}: no run in it is completed", hint="name one of its runs")
        left_out = len(collection.runs) - len(completed)
        if left_out:
            notes.append(f"note: {display_path(directory)}: {count(left_out, 'run')} left out: not completed")
        found += completed
    return list({run.resolve(): run for run in found}.values()), notes


def is_one_run(names: Sequence[str]) -> bool:
    """Return whether a command line names a single run, and not a sweep or a folder."""
    return len(names) == 1 and is_run(Path("outputs/latest") if names[0] == "last" else Path(names[0]))


def evaluation_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of the results of `engine.evaluate`. Runs that differ only in the seed share a row."""
    return compare(Collection([_record(result) for result in results]))


def _record(result: Mapping[str, Any]) -> RunRecord:
    """Return the record of a run with the metrics of its evaluation instead of those of its best epoch."""
    record = read_record(Path(result["run"]))
    metrics = {name: value for name, value in result["metrics"].items() if is_number(value)}
    metric, mode = record.metric, record.mode
    if metric not in metrics:
        metric, mode = LOSS, "min"
    best = {"metric": metric, "mode": mode, "value": metrics.get(metric), "epoch": result["epoch"], **metrics}
    return replace(record, status="completed", why="", info={**record.info, "best": best})
