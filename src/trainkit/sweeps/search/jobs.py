"""The jobs of a search: each trial is trained once for each of its seeds."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig

from trainkit.config.jobs import compose_job, typed_hydra
from trainkit.core.errors import CheckpointError
from trainkit.runs.history import History, monitored_value
from trainkit.sweeps.ledger import JobRecord, Ledger
from trainkit.sweeps.outcome import find_outcome
from trainkit.sweeps.pool import Task
from trainkit.sweeps.queueing import queue_job
from trainkit.sweeps.saved_jobs import saved_config


class SearchJobs:
    """Makes the jobs of a search, and reads their histories.

    Args:
        loader: Hydra's config loader.
        config: of the sweep, with Hydra's node.
        ledger: of the sweep.
        shared: the overrides of all jobs.
        seed_overrides: returns the overrides of a seed.
        metric: the monitored metric.
    """

    def __init__(
        self,
        loader: Any,
        config: DictConfig,
        ledger: Ledger,
        shared: list[str],
        seed_overrides: Callable[[int], list[str]],
        metric: str,
    ) -> None:
        self.loader, self.config, self.ledger = loader, config, ledger
        self.shared, self.seed_overrides = shared, seed_overrides
        self.metric = metric
        self.records: dict[int, JobRecord] = {}
        self.typed = typed_hydra()

    def task(self, number: int, trial: int, seed: int, overrides: list[str]) -> Task:
        """Return a job to run: a new one, or one that continues with its saved config.

        Args:
            number: of the job.
            trial: of the search.
            seed: which of the trial's seeds, from 0.
            overrides: the setting of the trial.
        """
        record = self.record(number)
        own = [*overrides, *self.seed_overrides(seed)]
        if record is None:
            job = compose_job(self.loader, self.config, [*self.shared, *own])
            record = queue_job(self.ledger, number, job, self.records.values(), trial=trial, repeat=seed)
            self.records[number] = record
            config = job.with_directory(self.ledger.directory, self.ledger.name_of(record))
        else:
            if record.status == "running":  # its process was killed
                outcome = find_outcome(record.directory, None) | {"status": "stopped", "why": "the search was killed"}
                self.ledger.append({"event": "ended", "job": number, **outcome, "seconds": 0.0})
            config = saved_config(self.ledger.directory, record, (), self.typed)
        return Task(number, " ".join(own), record.directory, config, record.threads)

    def record_damage(self, number: int, error: CheckpointError) -> None:
        """Report that a job cannot continue, because a file of its run is missing or damaged."""
        print(f"job {number} cannot be resumed:\n{error}", file=sys.stderr)
        outcome = {"status": "failed", "exit_code": error.exit_code, "why": error.problems[0].cause}
        self.ledger.append({"event": "ended", "job": number, **outcome, "seconds": 0.0})

    def record(self, number: int) -> JobRecord | None:
        """Return what the ledger says about a job; None: it is not there."""
        if number not in self.records or self.records[number].threads is None:
            self.records = {record.number: record for record in self.ledger.read()}
        return self.records.get(number)

    def ended(self, number: int) -> JobRecord:
        """Return what the ledger says about a job that has ended."""
        self.records = {record.number: record for record in self.ledger.read()}
        return self.records[number]

    def values(self, number: int, epoch: int) -> list[tuple[int, float]]:
        """Return the monitored value of each epoch of a job up to an epoch, from its history.

        A value that is not finite is NaN.
        """
        found = []
        for row in self._rows(number):
            value = monitored_value(row, self.metric)
            if row["epoch"] <= epoch:
                found.append((int(row["epoch"]), float(value) if isinstance(value, int | float) else math.nan))
        return found

    def epochs(self, number: int) -> int:
        """Return the number of epochs that a job has trained."""
        return max((int(row["epoch"]) for row in self._rows(number)), default=0)

    def _rows(self, number: int) -> list[dict[str, Any]]:
        record = self.record(number)
        return [] if record is None else History(record.directory / "history.jsonl").rows
