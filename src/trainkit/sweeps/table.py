"""The table of a comparison: rows of runs, and statistics over them. Imports neither torch nor numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trainkit.display.text import SHOWN_METRICS
from trainkit.sweeps.axes import Axis
from trainkit.sweeps.collect import RunRecord
from trainkit.sweeps.search.results import Search, Trial

COUNT = "n"  # the column with the number of runs
TRIAL, STATUS, EPOCHS = "trial", "status", "epochs"  # the columns of a search
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
        trial: whose repeats the runs are; None: the row is not a trial of a search.
    """

    values: dict[str, Any]
    runs: list[RunRecord]
    trial: Trial | None = None

    @property
    def count(self) -> int:
        """The number of runs."""
        return len(self.runs)

    @property
    def seeds(self) -> list[Any]:
        """The seeds of the runs, sorted."""
        return sorted((run.seed for run in self.runs), key=sort_key)

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
        sorted_by: the column that the caller chose; '' if the best row is first.
        searches: that the runs belong to.
    """

    axes: list[Axis]
    rows: list[Row]
    metric: str | None
    mode: str
    others: list[RunRecord]
    hidden: int
    notes: list[str]
    sorted_by: str = ""
    searches: Sequence[Search] = ()

    @property
    def has_trials(self) -> bool:
        """Whether a row is a trial of a search."""
        return any(row.trial is not None for row in self.rows)

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
        return Statistic(sum(map(float, values)) / count if values else math.nan, math.nan, count)
    try:
        mean = math.fsum(values) / count
        squares = math.fsum((value - mean) ** 2 for value in values)
    except OverflowError:  # numbers near the largest float
        return Statistic(sum(value / count for value in values), math.inf, count)
    return Statistic(mean, math.sqrt(squares / (count - 1)) if count > 1 else math.nan, count)


def sort_key(value: Any) -> tuple[int, float, str]:
    """Return a key that sorts numbers before texts."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, value, "") if is_number else (1, 0, str(value))
