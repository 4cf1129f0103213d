"""Gather runs from any mix of run directories, sweeps and folders. Imports neither torch nor OmegaConf."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from trainkit.core.errors import CheckpointError, ConfigError, Problem
from trainkit.core.paths import display_path
from trainkit.core.spelling import nearest
from trainkit.runs.history import History
from trainkit.runs.lock import may_be_locked
from trainkit.runs.saved_config import read_choices, read_saved_config
from trainkit.runs.status import NO_EPOCH, status_of
from trainkit.runs.untrusted import is_number, read_info, read_overrides
from trainkit.sweeps.axes import Axis, find_axes
from trainkit.sweeps.ledger import JobRecord, is_sweep, read_ledger

NOT_METRICS = {"metric", "mode", "value", "epoch", "step"}  # entries of the best epoch that are not metrics
ATTEMPTS = "attempts"  # the folder of a sweep with the failed attempts of its jobs
WORKERS = "workers"  # the folder of a search with the locks of its processes
MAX_DEPTH = 32  # folders below a path
SEARCH_ENDS = ("pruned", "paused")  # how a search ends a job before its last epoch
COMPARED = ("completed", *SEARCH_ENDS)


@dataclass(frozen=True)
class RunRecord:
    """What the files of a run say. A job of a sweep that has no directory yet has one too.

    Attributes:
        directory: of the run, absolute.
        status: completed, running, failed, stopped, queued, or unreadable; in a search also pruned or paused.
        why: the cause, for every status but completed; of a completed run, why it stopped early.
        config: the dotted keys of its config with their values.
        choices: the choice of each config group, such as `optim: adam`.
        overrides: of its command line.
        info: the content of `run.json`.
        job: the job in the ledger of its sweep.
        sweep: the directory of the sweep; None: the run is not a job.
    """

    directory: Path
    status: str
    why: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)
    overrides: Sequence[str] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    job: JobRecord | None = None
    sweep: Path | None = None

    @property
    def seed(self) -> Any:
        """The seed of its config."""
        return self.config.get("seed")

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The entry of the best epoch in `run.json`; None if no epoch has a finite monitored value."""
        return self.info.get("best")

    @property
    def metric(self) -> str | None:
        """The monitored metric."""
        metric = (self.best or self.config_of_monitor)["metric"]
        return metric if isinstance(metric, str) else None

    @property
    def mode(self) -> str:
        """`max` or `min`: whether higher or lower values of the monitored metric are better."""
        mode = (self.best or self.config_of_monitor).get("mode")
        # Version 0.2 did not write the mode.
        return mode if mode in ("min", "max") else "max" if self.metric == "val/accuracy" else "min"

    @property
    def config_of_monitor(self) -> dict[str, Any]:
        """The settings of the monitor, with `metric` and `mode`."""
        return {name: self.config.get(f"monitor.{name}") for name in ("metric", "mode")}

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The metrics of the best epoch; {} if there is none. A metric that is not finite may be NaN."""
        best = self.best
        if best is None:
            return {}
        found = {name: value for name, value in best.items() if name not in NOT_METRICS}
        found.setdefault(str(best["metric"]), best["value"])
        return {
            name: float("nan") if value is None else value
            for name, value in found.items()
            if value is None or is_number(value)
        }

    @property
    def history(self) -> list[dict[str, Any]]:
        """The metrics of each epoch, read from the disk. A history that cannot be read is empty."""
        try:
            return History(self.directory / "history.jsonl").rows
        except CheckpointError:
            return []

    @cached_property
    def epochs(self) -> int:
        """How many epochs have ended."""
        rows = self.history
        return int(rows[-1]["epoch"]) if rows else (self.job and self.job.epochs) or 0


@dataclass(frozen=True)
class Collection:
    """Runs, and what differs between them.

    Attributes:
        runs: in the order of their paths.
    """

    runs: Sequence[RunRecord]

    @cached_property
    def axes(self) -> list[Axis]:
        """The config keys and the choices that differ between the runs, without the seed."""
        return find_axes([run for run in self.runs if run.config])

    @cached_property
    def compared(self) -> list[RunRecord]:
        """The runs with a result: those that are completed, and those that a search pruned or paused."""
        return [run for run in self.runs if run.status in COMPARED]

    @cached_property
    def others(self) -> list[RunRecord]:
        """The runs without a result: running, failed, stopped, queued and unreadable."""
        return [run for run in self.runs if run.status not in COMPARED]

    @cached_property
    def monitors(self) -> dict[str, int]:
        """The monitored metrics with their number of runs, that of the first compared run first."""
        metrics = [run.metric for run in (self.compared or self.runs) if run.metric]
        return {metric: metrics.count(metric) for metric in dict.fromkeys(metrics)}

    @property
    def metric(self) -> str | None:
        """The monitored metric of the first run."""
        return next(iter(self.monitors), None)

    @property
    def mode(self) -> str:
        """The mode of `metric`."""
        return next((run.mode for run in (self.compared or self.runs) if run.metric == self.metric), "min")


def collect(paths: Sequence[Path]) -> Collection:
    """Return the runs in any mix of run directories, sweeps and folders, each run once.

    Folders are searched recursively. Links inside them are not followed, and hidden folders are skipped.

    Raises:
        ConfigError: paths that do not exist, or that hold no run.
    """
    runs: dict[Path, RunRecord] = {}
    problems: list[Problem] = []
    for path in paths:
        if not path.is_dir():
            problems.append(_missing(path))
            continue
        found = list(_find_runs(path.resolve()))
        if not found:
            hint = f"{_example()}name the directory of a run, a sweep, or a folder that holds them"
            problems.append(Problem(f"{display_path(path)} does not hold a run: no training started there", hint))
        for directory, sweep, job, sweep_runs in found:
            if directory not in runs or runs[directory].job is None:
                runs[directory] = replace(read_record(directory, job, sweep_runs=sweep_runs), sweep=sweep)
    if problems:
        raise ConfigError(*problems)
    return Collection([runs[directory] for directory in sorted(runs, key=_natural)])


def is_run(directory: Path) -> bool:
    """Return whether a directory is that of a run: a training started there, or was about to."""
    return any((directory / name).exists() for name in ("run.json", ".hydra/overrides.yaml", "checkpoints/last"))


def read_record(directory: Path, job: JobRecord | None = None, *, sweep_runs: bool = False) -> RunRecord:
    """Return the record of a run. Damaged files make it unreadable, with the cause.

    Args:
        directory: of the run.
        job: its job in the ledger of its sweep.
        sweep_runs: whether a process may still run the sweep.
    """
    try:
        overrides = read_overrides(directory / ".hydra" / "overrides.yaml")
    except CheckpointError:
        overrides = []
    overrides = overrides or (job.overrides if job else [])
    try:
        info = read_info(directory / "run.json")
        # A job without run.json has its config as it was asked for: `off` where other runs have null.
        config = {} if job is not None and not info else read_saved_config(directory)
    except (CheckpointError, OSError) as error:
        cause = error.problems[0].cause if isinstance(error, CheckpointError) else str(error)
        return RunRecord(directory, "unreadable", cause, overrides=overrides, job=job)
    status, why = _status(directory, info, job, sweep_runs=sweep_runs)
    return RunRecord(directory, status, why, config, read_choices(directory), overrides, info, job)


def _status(directory: Path, info: Mapping[str, Any], job: JobRecord | None, *, sweep_runs: bool) -> tuple[str, str]:
    """Return the status of a run and its cause, from `run.json`, the lock and the ledger."""
    status, why = status_of(directory, info, (job.why if job else None) or "")
    if job is None or status in ("completed", "running"):
        return status, why
    if job.status in SEARCH_ENDS and status == "stopped":
        return job.status, why
    if job.status == "queued":
        return "queued", "it has not started" if sweep_runs else "the sweep ended before it started"
    if job.status == "running" and sweep_runs:
        return "running", NO_EPOCH
    if job.status == "stopped" and info.get("status") is None:
        return "stopped", job.why or "the sweep was stopped"
    return status, why


def _find_runs(directory: Path) -> Iterator[_Found]:
    """Yield the run directories in a folder, each with its sweep."""
    jobs: dict[Path, _Found] = {}
    for folder in _run_directories(directory, jobs, MAX_DEPTH):
        yield jobs.pop(folder, _Found(folder))
    yield from jobs.values()  # without a directory: queued, or the files are lost


class _Found(NamedTuple):
    """A run directory, with its sweep, its job there, and whether a process may still run the sweep."""

    directory: Path
    sweep: Path | None = None
    job: JobRecord | None = None
    sweep_runs: bool = False


def _run_directories(directory: Path, jobs: dict[Path, _Found], depth: int) -> Iterator[Path]:
    """Yield the run directories in a folder; add the jobs of the sweeps in it to `jobs`."""
    if is_run(directory):
        yield directory
        return
    sweep = is_sweep(directory)
    if sweep:
        with contextlib.suppress(CheckpointError):  # the run directories say enough
            alive = may_run(directory)
            for job in read_ledger(directory):
                jobs[job.directory] = _Found(job.directory, directory, job, alive)
    try:
        with os.scandir(directory) as found:
            names = [entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for name in names:
        if depth and not name.startswith(".") and not (sweep and name == ATTEMPTS):
            yield from _run_directories(directory / name, jobs, depth - 1)


def may_run(sweep: Path) -> bool:
    """Return whether a process may still run a sweep. Each process of a search has a lock of its own."""
    return any(map(may_be_locked, (sweep, *sweep.glob(f"{WORKERS}/*"))))


def _missing(path: Path) -> Problem:
    """Return the problem of a path that is not a directory, with the nearest name."""
    if path.exists():
        return Problem(f"{path} is a file, expected a directory", f"name its directory: {display_path(path.parent)}")
    folder = path
    while not folder.is_dir() and folder != folder.parent:
        missing, folder = folder.name, folder.parent
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        names = []
    close = nearest(missing, names)
    hint = f"did you mean {display_path(folder / close)}?" if close else f"{_example()}name a run, a sweep or a folder"
    return Problem(f"{path}: this directory does not exist", hint)


def _example() -> str:
    """Return the beginning of a hint that names the newest run or sweep here."""
    sweeps = [file for name in ("sweep.jsonl", "multirun.yaml") for file in Path("outputs").glob(f"sweeps/*/*/{name}")]
    found = sorted(str(file.parent) for file in (sweeps or Path("outputs").glob("*/*/run.json")))
    return f"the newest here is {found[-1]}; " if found else ""


def _natural(path: Path) -> list[list[tuple[int, int, str]]]:
    """Return a key that sorts `2` before `10`."""
    return [
        [(0, int(text), "") if text.isdecimal() and len(text) < 19 else (1, 0, text) for text in re.split(r"(\d+)", p)]
        for p in path.parts
    ]
