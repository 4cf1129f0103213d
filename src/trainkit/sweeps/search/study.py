"""The study of a search: its trials in Optuna's storage, which several processes and machines may share."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PatientPruner,
    PercentilePruner,
    WilcoxonPruner,
)
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from trainkit.config.schema import SearchSettings
from trainkit.config.search_space import Axis, Space, Value
from trainkit.core.errors import ConfigError
from trainkit.display.text import count
from trainkit.sweeps.search.samplers import SeededSampler
from trainkit.sweeps.search.storage import JOURNAL, FileLock, damaged_study, open_storage

PAUSED = "paused"  # the value of a trial's attribute `status`


class _Study(optuna.Study):
    """A study in which samplers and pruners see a paused trial as a pruned one: its values so far count."""

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        trials = [_as_pruned(trial) for trial in super()._get_trials(deepcopy, None, use_cache)]
        return trials if states is None else [trial for trial in trials if trial.state in states]


def _as_pruned(trial: FrozenTrial) -> FrozenTrial:
    if trial.state is not TrialState.RUNNING or trial.user_attrs.get("status") != PAUSED:
        return trial
    last = trial.intermediate_values.get(trial.last_step) if trial.last_step is not None else None
    return FrozenTrial(
        number=trial.number,
        trial_id=trial._trial_id,
        state=TrialState.PRUNED,
        value=last,
        datetime_start=trial.datetime_start,
        datetime_complete=trial.datetime_start,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=trial.user_attrs,
        system_attrs=trial.system_attrs,
        intermediate_values=trial.intermediate_values,
    )


@dataclass
class Trial:
    """A trial as the search sees it.

    Attributes:
        number: of the trial, from 0.
        state: `new` (no values yet), `running`, `paused`, `completed`, `pruned` or `failed`.
        overrides: the values of its setting.
        worker: the number of the process that runs it.
        target: the epoch up to which it may train; None: no limit.
        rungs: rung (an epoch) -> the mean over the seeds of the best value so far.
        at_rung: the same for each seed at the next rung, as long as not all seeds have reached it.
        epochs: seed -> the epochs that it has trained.
        values: seed -> its best value, if its training is complete.
    """

    number: int
    state: str
    overrides: list[str]
    worker: int | None
    target: int | None
    rungs: dict[int, float]
    at_rung: dict[int, float]
    epochs: dict[int, int]
    values: dict[int, float]

    @property
    def is_open(self) -> bool:
        """Whether it has not ended for ever."""
        return self.state in ("new", "running", PAUSED)


class SearchStudy:
    """The trials of a search in Optuna's storage.

    Args:
        directory: of the sweep.
        name: of the study.
        search: the settings under `search`.
        space: of the search.
        mode: `min` or `max`: whether lower or higher values are better.
        max_epochs: of a full training; None: unknown.

    Raises:
        ConfigError: the storage cannot be opened.
    """

    def __init__(
        self, directory: Path, name: str, search: SearchSettings, space: Space, mode: str, max_epochs: int | None
    ) -> None:
        self.space, self.mode, self.path = space, mode, directory / JOURNAL
        self.lock = FileLock(directory / "search.lock")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.storage = open_storage(directory, search.storage)
        self.sampler = SeededSampler(search.sampler, search.seed, space, uses_pruned=search.pruner is not None)
        direction = StudyDirection.MINIMIZE if mode == "min" else StudyDirection.MAXIMIZE
        with self.lock.held():
            created = optuna.create_study(
                storage=self.storage, study_name=name, direction=direction, load_if_exists=True
            )
        if created.direction is not direction:
            raise ConfigError(f"the study {name} has another monitor.mode", hint="choose another hydra.sweep.dir")
        pruner = make_pruner(search, max_epochs)
        self.study = _Study(name, self.storage, sampler=self.sampler, pruner=pruner)
        self.id = self.storage.get_study_id_from_name(name)

    def check_complete(self, number: int) -> None:
        """Raise `CheckpointError` if the study lacks a trial that the search has begun.

        Args:
            number: of the last trial that has a job; -1: there is none.
        """
        found = len(self.trials())
        if found <= number:
            cause = f"it has {count(found, 'trial')}, but trial {number} has a job"
            raise damaged_study(self.path, cause)

    def trials(self) -> list[Trial]:
        """Return all trials, in the order of their numbers."""
        return [_read(trial) for trial in self.storage.get_all_trials(self.id, deepcopy=False)]

    def trial(self, number: int) -> Trial:
        """Return a trial."""
        return _read(self._frozen(number))

    def ask(self, worker: int, number: int | None = None) -> Trial:
        """Return a new trial with a setting.

        Args:
            worker: the number of the process that runs the trial.
            number: of a trial that a killed process has created without completing its setting.
        """
        asked = self.study.ask() if number is None else optuna.trial.Trial(self.study, self._id(number))
        chosen = [self._suggest(asked, axis) for axis in self.space.groups]
        overrides = [axis.override(value) for axis, value in zip(self.space.groups, chosen, strict=True)]
        for axis in self.space.axes_for([str(choice) for choice in chosen]):
            overrides.append(axis.override(self._suggest(asked, axis)))
        self.set(asked.number, worker=worker, overrides=overrides)
        return self.trial(asked.number)

    def _suggest(self, asked: optuna.trial.Trial, axis: Axis) -> Value:
        if axis.kind == "float":
            return asked.suggest_float(axis.name, axis.low, axis.high, log=axis.log)
        if axis.kind == "int":
            return asked.suggest_int(axis.name, int(axis.low), int(axis.high), step=int(axis.step or 1), log=axis.log)
        return str(asked.suggest_categorical(axis.name, axis.choices))

    def set(self, number: int, **attributes: Any) -> None:
        """Set attributes of a trial; see `Trial`."""
        for name, value in attributes.items():
            self.storage.set_trial_user_attr(self._id(number), name, value)

    def report(self, number: int, epoch: int, value: float) -> None:
        """Record the monitored value of an epoch, unless it is recorded already."""
        if epoch not in self._frozen(number).intermediate_values:
            self.storage.set_trial_intermediate_value(self._id(number), epoch, value)

    def should_prune(self, number: int) -> bool:
        """Return whether the pruner stops a trial after its last reported epoch."""
        return self.study.pruner.prune(self.study, self._frozen(number))

    def end(self, number: int, state: str, value: float | None = None) -> None:
        """End a trial for ever.

        Args:
            number: of the trial.
            state: `completed`, `pruned` or `failed`.
            value: of a completed trial.
        """
        states = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        self.study.tell(number, value if state == "completed" else None, states[state], skip_if_finished=True)

    def _id(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.id, number)

    def _frozen(self, number: int) -> FrozenTrial:
        return self.storage.get_trial(self._id(number))


def _read(trial: FrozenTrial) -> Trial:
    """Return a trial from the storage."""
    names = {TrialState.COMPLETE: "completed", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    attributes = trial.user_attrs
    state = names.get(trial.state) or attributes.get("status") or ("running" if "overrides" in attributes else "new")
    return Trial(
        trial.number,
        state,
        list(attributes.get("overrides", [])),
        attributes.get("worker"),
        attributes.get("target"),
        *(_by_number(attributes.get(name, {})) for name in ("rungs", "at_rung", "epochs", "values")),
    )


def _by_number(mapping: Mapping[str, Any]) -> dict[int, Any]:
    return {int(key): value for key, value in mapping.items()}  # JSON has no other keys than strings


def make_pruner(search: SearchSettings, max_epochs: int | None) -> BasePruner:
    """Return Optuna's pruner for a name. `asha` is trainkit's own, which can continue a stopped trial."""
    median = MedianPruner(n_warmup_steps=search.min_epochs)
    if search.pruner == "median":
        return median
    if search.pruner == "percentile":
        return PercentilePruner(search.percentile, n_warmup_steps=search.min_epochs)
    if search.pruner == "patient":
        return PatientPruner(median, patience=search.patience)
    if search.pruner == "wilcoxon":
        return WilcoxonPruner(n_startup_steps=max(2, search.min_epochs))
    if search.pruner == "hyperband" and max_epochs is not None:
        return HyperbandPruner(search.min_epochs, max_epochs, search.reduction)
    return NopPruner()
