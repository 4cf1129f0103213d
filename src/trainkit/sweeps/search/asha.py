"""Asynchronous successive halving (ASHA) with promotion: https://arxiv.org/abs/1810.05934."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainkit.sweeps.search.study import PAUSED, Trial


@dataclass(frozen=True)
class Asha:
    """Decides which trials continue beyond a rung.

    A rung is an epoch at which a trial is compared with the other trials that have reached it. The best one in
    `reduction` of them may continue to the next rung. The others are paused, and may continue later, when more
    trials have reached the rung.

    Attributes:
        min_epochs: the first rung.
        max_epochs: the last one, a full training.
        reduction: the factor between two rungs.
        mode: `min` or `max`: whether lower or higher values are better.
    """

    min_epochs: int
    max_epochs: int
    reduction: int
    mode: str

    @property
    def rungs(self) -> list[int]:
        """The epochs at which trials are compared, in order; the last one is a full training."""
        rungs = [self.min_epochs]
        while rungs[-1] * self.reduction < self.max_epochs:
            rungs.append(rungs[-1] * self.reduction)
        return [*rungs, self.max_epochs]

    def next_rung(self, rung: int) -> int:
        """Return the rung after a rung."""
        return next(later for later in self.rungs if later > rung)

    def may_continue(self, trial: Trial, rung: int, trials: Sequence[Trial]) -> bool:
        """Return whether a trial at a rung is among the best of the trials that have reached it.

        Args:
            trial: has a value at the rung.
            rung: not the last one.
            trials: of the whole search.
        """
        reached = [other for other in trials if rung in other.rungs and other.state != "failed"]
        ranked = sorted(reached, key=lambda other: (self._badness(other.rungs[rung]), other.number))
        best = ranked[: len(reached) // self.reduction]
        return any(other.number == trial.number for other in best)

    def find_promotable(self, trials: Sequence[Trial]) -> tuple[Trial, int] | None:
        """Return a paused trial that may continue, and its next rung; from the highest rung that has one."""
        for rung in reversed(self.rungs[:-1]):
            paused = [trial for trial in trials if trial.state == PAUSED and max(trial.rungs, default=0) == rung]
            for trial in sorted(paused, key=lambda found: (self._badness(found.rungs[rung]), found.number)):
                if self.may_continue(trial, rung, trials):
                    return trial, self.next_rung(rung)
        return None

    def _badness(self, value: float) -> float:
        worse = value if self.mode == "min" else -value
        return worse if math.isfinite(worse) else math.inf
