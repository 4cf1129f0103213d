"""What a search has found: its settings, its trials, and the best one. Imports neither torch, numpy nor Optuna."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainkit.core.errors import CheckpointError
from trainkit.sweeps.collect import COMPARED, SEARCH_ENDS, Collection, RunRecord
from trainkit.sweeps.ledger import DAMAGED_LINE, Ledger

# A trial of several repeats has the first of these statuses that a repeat has.
PRECEDENCE = ("running", "queued", "stopped", "failed", "unreadable", "paused", "pruned")
MAX_EPOCHS = 2**53


@dataclass(frozen=True)
class SearchAxis:
    """A key that the search samples.

    Attributes:
        key: of the config.
        kind: float, int or choice.
        low: the lower end of its interval; None: it is a choice.
        high: the upper end of its interval; None: it is a choice.
        log: whether the interval is sampled logarithmically.
        step: between the values of an interval; None: every value is possible.
        choices: the values of a choice.
    """

    key: str
    kind: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: Sequence[Any] = ()


@dataclass(frozen=True)
class SearchPlan:
    """The settings of a search, from the ledger. What is missing or damaged there has its default.

    Attributes:
        metric: the monitored metric.
        mode: `min` or `max`.
        sampler: the name of the sampler.
        pruner: the name of the pruner.
        seeds: the repeats of each trial.
        max_epochs: of a full training; None: not limited by the search.
        axes: what is sampled.
        config_dir: the folder with configs that the command line named.
    """

    metric: str | None = None
    mode: str | None = None
    sampler: str = ""
    pruner: str = ""
    seeds: int = 1
    max_epochs: int | None = None
    axes: Sequence[SearchAxis] = ()
    config_dir: str | None = None


@dataclass(frozen=True)
class Trial:
    """A setting that the search has tried.

    Attributes:
        number: of the trial.
        runs: its repeats, in order. Each has another seed.
        seeds: the number of repeats that it should have.
    """

    number: int
    runs: Sequence[RunRecord]
    seeds: int = 1

    @cached_property
    def status(self) -> str:
        """The status of the trial: completed if all its repeats are."""
        found = {run.status for run in self.runs}
        status = next((status for status in PRECEDENCE if status in found), "completed")
        return "queued" if status == "completed" and len(self.runs) < self.seeds else status

    @property
    def is_comparable(self) -> bool:
        """Whether each repeat has a result. A pruned or paused trial has one."""
        return self.status in COMPARED

    @cached_property
    def epochs(self) -> int:
        """The epochs that its repeats have trained."""
        return sum(run.epochs for run in self.runs)

    def value(self, metric: str | None) -> float | None:
        """Return the mean of a metric over the repeats, each at its best epoch; None: a value is missing or not finite.

        Args:
            metric: the monitored metric.
        """
        values = [run.metrics.get(metric or "", math.nan) for run in self.runs]
        if not values or not all(map(math.isfinite, values)):
            return None
        return math.fsum(value / len(values) for value in values)


@dataclass(frozen=True)
class Search:
    """A search and its trials.

    Attributes:
        directory: of the sweep.
        plan: its settings.
        trials: in the order of their numbers.
        metric: the monitored metric; None: no run has one.
        mode: `min` or `max`.
    """

    directory: Path
    plan: SearchPlan
    trials: Sequence[Trial]
    metric: str | None
    mode: str

    @cached_property
    def counts(self) -> Counter[str]:
        """The number of trials by status."""
        return Counter(trial.status for trial in self.trials)

    @cached_property
    def ranked(self) -> list[Trial]:
        """The trials with a finite value, the best first. Trials that lack a result of a repeat are not ranked."""
        sign = -1 if self.mode == "max" else 1
        values = {trial.number: self.value(trial) for trial in self.trials if trial.is_comparable}
        found = {number: sign * value for number, value in values.items() if value is not None}
        return sorted((trial for trial in self.trials if trial.number in found), key=lambda trial: found[trial.number])

    @property
    def best(self) -> Trial | None:
        """The trial with the best value."""
        return self.ranked[0] if self.ranked else None

    def value(self, trial: Trial) -> float | None:
        """Return the value of a trial by which trials are compared."""
        return trial.value(self.metric)

    @cached_property
    def full_epochs(self) -> int:
        """The epochs that full trainings of all comparable trials take; 0: the search does not limit the epochs."""
        return sum(self.plan.seeds * (self.plan.max_epochs or 0) for trial in self.trials if trial.is_comparable)

    @cached_property
    def saved_epochs(self) -> int:
        """The epochs that pruned and paused trials have not trained."""
        full = self.plan.seeds * (self.plan.max_epochs or 0)
        return sum(max(0, full - trial.epochs) for trial in self.trials if trial.status in SEARCH_ENDS)


def find_searches(collection: Collection) -> list[Search]:
    """Return the searches that the runs of a collection belong to."""
    groups: dict[Path, dict[int, list[RunRecord]]] = {}
    for run in collection.runs:
        if run.sweep is not None and run.job is not None and run.job.trial is not None:
            groups.setdefault(run.sweep, {}).setdefault(run.job.trial, []).append(run)
    searches = []
    for directory, numbers in groups.items():
        plan = read_plan(directory)
        trials = [Trial(number, _in_order(runs), plan.seeds) for number, runs in sorted(numbers.items())]
        runs = [run for trial in trials for run in trial.runs]
        found = [run.metric for run in runs if run.best and run.metric]  # train/loss if there is no validation
        metric = plan.metric if plan.metric in found or not found else found[0]
        metric = metric or next((run.metric for run in runs if run.metric), None)
        mode = plan.mode or next((run.mode for run in runs if run.metric == metric), "min")
        searches.append(Search(directory, plan, trials, metric, mode))
    return searches


def _in_order(runs: Sequence[RunRecord]) -> list[RunRecord]:
    return sorted(runs, key=lambda run: run.job.repeat if run.job else 0)


def read_plan(directory: Path) -> SearchPlan:
    """Return the settings of the search in a directory. What is missing or damaged has its default."""
    event: Mapping[str, Any] = {}
    with contextlib.suppress(CheckpointError):
        event = Ledger(directory).search() or {}
    axes = event.get("axes")
    found = []
    for axis in axes if isinstance(axes, list) else ():
        with contextlib.suppress(*DAMAGED_LINE):
            found.append(_axis(axis))
    metric, mode, seeds, epochs = (event.get(name) for name in ("metric", "mode", "seeds", "max_epochs"))
    folder = event.get("config_dir")
    return SearchPlan(
        metric=metric if isinstance(metric, str) else None,
        mode=mode if mode in ("min", "max") else None,
        sampler=str(event.get("sampler") or ""),
        pruner=str(event.get("pruner") or ""),
        seeds=seeds if type(seeds) is int and 1 <= seeds <= MAX_EPOCHS else 1,
        max_epochs=epochs if type(epochs) is int and 1 <= epochs <= MAX_EPOCHS else None,
        axes=found,
        config_dir=folder if isinstance(folder, str) else None,
    )


def _axis(axis: Mapping[str, Any]) -> SearchAxis:
    """Return an axis of the ledger.

    Raises:
        ValueError: it is damaged; so do TypeError, KeyError and AttributeError.
    """
    key, kind = str(axis["key"]), axis["kind"]
    if kind == "choice":
        return SearchAxis(key, kind, choices=list(axis["choices"]))
    low, high, step = float(axis["low"]), float(axis["high"]), axis.get("step")
    log = bool(axis.get("log")) and low > 0
    if kind not in ("float", "int") or not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"{key} is not an axis")
    return SearchAxis(key, kind, low, high, log=log, step=None if step is None else float(step))
