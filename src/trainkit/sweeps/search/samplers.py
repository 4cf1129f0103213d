"""The samplers of a search: Optuna's, seeded anew for each trial so that a resumed search samples the same values."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from trainkit.config.search_space import Space, Value


class SeededSampler(BaseSampler):
    """A sampler whose random numbers depend on the seed and the number of the trial.

    Optuna's samplers draw from a generator that lives in the process, so their values differ after a restart.

    Args:
        name: of the sampler, as in `search.sampler`.
        seed: of the search.
        space: of the search.
        uses_pruned: whether trials that were stopped early are a source for the next setting.
    """

    def __init__(self, name: str, seed: int, space: Space, *, uses_pruned: bool) -> None:
        self.name, self.seed, self.uses_pruned = name, seed, uses_pruned
        self.grid = space.combinations() if name == "grid" else []
        self.inner = self._make(0)

    def _make(self, number: int) -> BaseSampler:
        """Return the sampler for a trial."""
        seed = zlib.crc32(f"{self.seed} {number}".encode())
        if self.name == "grid":
            return _Listed(self.grid)
        if self.name == "random":
            return RandomSampler(seed=seed)
        if self.name == "cmaes":
            return CmaEsSampler(seed=seed, warn_independent_sampling=False, consider_pruned_trials=self.uses_pruned)
        if self.name == "qmc":  # its sequence has one seed; the place in the sequence is in the study
            independent = RandomSampler(seed=seed)
            return QMCSampler(
                scramble=True, seed=self.seed, independent_sampler=independent, warn_independent_sampling=False
            )
        if self.name == "gp":
            return GPSampler(seed=seed, warn_independent_sampling=False)
        return TPESampler(seed=seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Seed the sampler for a trial."""
        self.inner = self._make(trial.number)
        self.inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """See `BaseSampler`."""
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See `BaseSampler`."""
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """See `BaseSampler`."""
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """See `BaseSampler`."""
        self.inner.after_trial(study, trial, state, values)


class _Listed(RandomSampler):
    """Gives trial n the n-th setting of a list."""

    def __init__(self, settings: list[dict[str, Value]]) -> None:
        super().__init__(seed=0)
        self.settings = settings

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return the value of the setting."""
        del study, param_distribution
        return self.settings[trial.number][param_name]
