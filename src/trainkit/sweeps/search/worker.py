"""A search: asks Optuna for settings, trains them, and stops bad ones early. Several processes may share a search."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trainkit.core.errors import CheckpointError, RunDirectoryInUseError
from trainkit.runs.lock import Lock
from trainkit.sweeps.pool import Task
from trainkit.sweeps.search.asha import Asha
from trainkit.sweeps.search.jobs import SearchJobs
from trainkit.sweeps.search.study import PAUSED, SearchStudy, Trial

PRUNED = "pruned"
MAX_FAILURES = 10  # trials in a row that fail before their first epoch, if search.trials does not end the search
ANSWERS = {PAUSED: "the search paused it", PRUNED: "the search stopped it"}


@dataclass(frozen=True)
class Budget:
    """When a search ends. Nothing new starts after that; running jobs are paused at the end of their epoch.

    Attributes:
        trials: the number of settings; None: no limit.
        epochs: of all trials together.
        ends_at: the time, as of `time.monotonic`.
    """

    trials: int | None
    epochs: int | None
    ends_at: float = math.inf


@dataclass
class Search:
    """The part of a search that one process does.

    Attributes:
        study: the trials, shared with other processes.
        jobs: makes the jobs of a trial.
        seeds: the trainings of each trial.
        mode: `min` or `max`.
        asha: decides at rungs; None: another pruner decides after each epoch, or none.
        prunes: whether there is another pruner.
        budget: when the search ends.
        worker: the number of this process among those that share the search.
        failures: the trials that have failed in a row before their first epoch.
        active: the jobs that this process runs, and why the search has stopped each: paused, pruned, or None.
        waiting: the jobs that start next: the number of a trial, and which of its seeds.
    """

    study: SearchStudy
    jobs: SearchJobs
    seeds: int
    mode: str
    asha: Asha | None
    prunes: bool
    budget: Budget
    worker: int
    failures: int = 0
    active: dict[int, str | None] = field(default_factory=dict)
    waiting: deque[tuple[int, int]] = field(default_factory=deque)

    # ------------------------------------------------------------------------------ what starts next

    def tasks(self) -> Iterator[Task | None]:
        """Yield the next job whenever one can start; None if nothing can start before a job ends."""
        with self.study.lock.held():
            for trial in self.study.trials():
                self._adopt(trial)
        while True:
            with self.study.lock.held():
                found = self._next()
            if found is not None:
                number = self.number_of(*found)
                try:
                    task = self.jobs.task(number, *found, self.study.trial(found[0]).overrides)
                except CheckpointError as error:  # of this job only: the other trials continue
                    self.jobs.record_damage(number, error)
                    self.on_job_end(number, "failed", None)
                    continue
                self.active[number] = None
                yield task
            elif self.active or self.waiting:
                yield None
            else:
                if self._fails_always:
                    why = f"{self.failures} trials in a row failed before their first epoch"
                    print(f"note: the search ends, because {why}", file=sys.stderr)
                return

    def _next(self) -> tuple[int, int] | None:
        """Return the next trial and seed to train; None: nothing can start now."""
        if not self._affords_epoch() or self._fails_always:
            self.waiting.clear()
            return None
        if not self.waiting:
            trials = self.study.trials()
            promotable = self.asha.find_promotable(trials) if self.asha is not None else None
            if promotable is not None:
                self._promote(*promotable)
            elif self.budget.trials is None or len(trials) < self.budget.trials:
                self._begin(self.study.ask(self.worker))
        return self.waiting.popleft() if self.waiting else None

    @property
    def _fails_always(self) -> bool:
        """Whether something is wrong with all trials. Trials without an epoch would never use up a budget of epochs."""
        return self.budget.trials is None and self.failures >= MAX_FAILURES

    def _begin(self, trial: Trial) -> None:
        """Queue the first jobs of a new trial: with a pruner that watches one seed, only this seed."""
        if self.asha is not None:
            self.study.set(trial.number, target=self.asha.rungs[0])
        self.waiting += [(trial.number, seed) for seed in range(1 if self.prunes else self.seeds)]

    def _promote(self, trial: Trial, rung: int) -> None:
        """Queue the jobs of a paused trial, to train up to a rung."""
        self.study.set(trial.number, target=rung, at_rung={}, worker=self.worker, status="running")
        self.waiting += [(trial.number, seed) for seed in range(self.seeds) if seed not in trial.values]

    def _adopt(self, trial: Trial) -> None:
        """Continue a trial whose process was stopped or killed."""
        if not trial.is_open or trial.state == PAUSED or self._runs_elsewhere(trial):
            return
        if trial.state == "new":  # killed before its setting was complete
            self._begin(self.study.ask(self.worker, trial.number))
            return
        self.study.set(trial.number, worker=self.worker)
        if self.asha is not None and trial.target is None:
            self.study.set(trial.number, target=self.asha.rungs[0])
        begun = [0] if self.prunes and 0 not in trial.values else range(self.seeds)
        unfinished = [seed for seed in begun if seed not in trial.values]
        at_rung = [seed for seed in unfinished if seed in trial.at_rung] if self.seeds > 1 else []
        if unfinished and at_rung == unfinished:  # all seeds have reached the rung
            self._settle(trial.number, unfinished[0])
            return
        # A job that has ended already starts again, and ends at once with the same answer.
        self.waiting += [(trial.number, seed) for seed in unfinished or [0] if seed not in at_rung]

    def _runs_elsewhere(self, trial: Trial) -> bool:
        """Return whether another process that is alive runs a trial."""
        if trial.worker is None or trial.worker == self.worker:
            return False
        lock = Lock(worker_directory(self.jobs.ledger.directory, trial.worker))
        try:
            lock.acquire()
        except RunDirectoryInUseError:
            return True
        lock.release()
        return False

    def _affords_epoch(self) -> bool:
        """Return whether the budget allows one more epoch, besides those that this process trains at the moment."""
        if time.monotonic() >= self.budget.ends_at:
            return False
        if self.budget.epochs is None:
            return True
        spent = sum(sum(trial.epochs.values()) for trial in self.study.trials())
        return spent + sum(why is None for why in self.active.values()) < self.budget.epochs

    # ---------------------------------------------------------------------------- after each epoch

    def decide(self, number: int, epoch: int) -> str | None:
        """Return why a job stops after an epoch: paused or pruned; None: it continues.

        The answer for the same epoch is the same again, because a job that was killed asks again.

        Args:
            number: of the job.
            epoch: the epochs that it has trained; 0: it is about to start.
        """
        if number not in self.active:
            return None
        with self.study.lock.held():
            self.active[number] = PAUSED  # for `_affords_epoch`, until it is decided: this job trains no epoch now
            why = self._decide(*self.trial_of(number), epoch)
            self.active[number] = why
            return why

    def _decide(self, trial_number: int, seed: int, epoch: int) -> str | None:
        trial = self.study.trial(trial_number)
        if trial.state == "failed":  # another seed has failed
            return PRUNED
        if epoch:
            values = self.jobs.values(self.number_of(trial_number, seed), epoch)
            self.study.set(trial_number, epochs={**trial.epochs, seed: epoch})
            if seed == 0:
                for place, value in values:
                    self.study.report(trial_number, place, value)
            if self.asha is not None and trial.target is not None and epoch >= trial.target:
                if epoch < self.asha.max_epochs and self._pauses_at_rung(trial, seed, trial.target, values):
                    return PAUSED
            elif self.prunes and seed == 0 and self.study.should_prune(trial_number):
                return PRUNED
        return None if self._affords_epoch() else PAUSED

    def _pauses_at_rung(self, trial: Trial, seed: int, rung: int, values: list[tuple[int, float]]) -> bool:
        """Record a seed's value at a rung; return whether its job is paused there."""
        assert self.asha is not None
        at_rung = {**trial.at_rung, seed: self._best([value for place, value in values if place <= rung])}
        self.study.set(trial.number, at_rung=at_rung)
        if self.seeds > 1:  # the mean of all seeds decides, when all have reached the rung
            return True
        self._reach(trial.number, rung, at_rung)
        reached = self.study.trial(trial.number)
        if not self.asha.may_continue(reached, rung, self.study.trials()):
            return True
        self.study.set(trial.number, target=self.asha.next_rung(rung), at_rung={})
        return False

    def _reach(self, number: int, rung: int, at_rung: dict[int, float]) -> None:
        """Record the mean of all seeds at a rung."""
        mean = sum(at_rung.values()) / len(at_rung)
        self.study.set(number, rungs={**self.study.trial(number).rungs, rung: mean})

    def _best(self, values: list[float]) -> float:
        finite = [value for value in values if math.isfinite(value)]
        worst = math.inf if self.mode == "min" else -math.inf
        return (min(finite) if self.mode == "min" else max(finite)) if finite else worst

    # ------------------------------------------------------------------------------ when a job ends

    def why_stopped(self, number: int) -> str | None:
        """Return why the search has stopped a job: paused or pruned; None: it has not."""
        return self.active.get(number)

    def on_job_end(self, number: int, status: str, value: float | None) -> None:
        """Record how a job ended. The ledger has the end already.

        Args:
            number: of the job.
            status: as in the ledger.
            value: its best monitored value.
        """
        self.active.pop(number, None)
        trial_number, seed = self.trial_of(number)
        self.failures = self.failures + 1 if status == "failed" and not self.jobs.epochs(number) else 0
        with self.study.lock.held():
            trial = self.study.trial(trial_number)
            if not trial.is_open:
                return
            if status == "failed" or (status == "completed" and (value is None or not math.isfinite(value))):
                self.study.end(trial_number, "failed")
                self.waiting = deque(entry for entry in self.waiting if entry[0] != trial_number)
            elif status == PRUNED:
                self.study.end(trial_number, PRUNED)
            elif status == "completed":
                epochs = {**trial.epochs, seed: self.jobs.epochs(number)}
                self.study.set(trial_number, values={**trial.values, seed: value}, epochs=epochs)
                self._settle(trial_number, seed)
            elif status == PAUSED:
                self._settle(trial_number, seed)

    def _settle(self, number: int, seed: int) -> None:
        """Decide what happens to a trial after the job of a seed has completed or paused."""
        trial = self.study.trial(number)
        missing = [other for other in range(self.seeds) if other not in trial.values]
        if not missing:
            mean = sum(trial.values.values()) / self.seeds
            if self.asha is not None:  # an early end counts at every rung
                rungs = {rung: mean for rung in self.asha.rungs if rung not in trial.rungs}
                self.study.set(number, rungs={**trial.rungs, **rungs})
            self.study.end(number, "completed", mean)
        elif self.prunes and seed == 0 and seed in trial.values:  # the first seed has survived: the others follow
            self.waiting += [(number, other) for other in missing]
        elif self.asha is not None and trial.target is not None and all(other in trial.at_rung for other in missing):
            if trial.target not in trial.rungs:
                self._reach(number, trial.target, {**trial.at_rung, **trial.values})
            self.study.set(number, status=PAUSED)

    # ------------------------------------------------------------------------------------ numbers

    def number_of(self, trial: int, seed: int) -> int:
        """Return the number of a job."""
        return trial * self.seeds + seed

    def trial_of(self, job: int) -> tuple[int, int]:
        """Return the trial of a job, and which of its seeds the job trains with."""
        return divmod(job, self.seeds)


def worker_directory(directory: Path, worker: int) -> Path:
    """Return the folder whose lock a process of a search holds while it runs."""
    return directory / "workers" / str(worker)


def claim_worker(directory: Path) -> tuple[int, Lock]:
    """Return the lowest free number among the processes of a search, and its lock.

    Raises:
        OSError: the folder cannot be written.
    """
    number = 0
    while True:
        folder = worker_directory(directory, number)
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder)
        try:
            lock.acquire()
        except RunDirectoryInUseError:
            number += 1
            continue
        return number, lock
