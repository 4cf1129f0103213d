"""Launch the jobs of a sweep: identify each by its config, record it, and run those that are not completed."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from omegaconf import DictConfig

from trainkit.config.jobs import ComposedJob, compose_job, task_overrides
from trainkit.core.errors import Problem
from trainkit.core.redaction import redact_command_line
from trainkit.display.text import count
from trainkit.runs.identity import config_hash
from trainkit.runs.secrets import secrets_of
from trainkit.sweeps.ledger import JobRecord, Ledger
from trainkit.sweeps.local import LocalOptions, run_on_this_machine
from trainkit.sweeps.outcome import find_outcome
from trainkit.sweeps.pool import Task
from trainkit.sweeps.queueing import queue_job
from trainkit.sweeps.recording import record_missing_ends, set_aside_failed_run
from trainkit.sweeps.resources import most_devices
from trainkit.sweeps.secret_files import redact_yaml


def launch(plugin: Any, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """Run the jobs that are not completed; return the value of each job.

    Args:
        plugin: the `TrainkitLauncher`, with what Hydra passed to it.
        job_overrides: the overrides of each job.
        first: the number of the first job, for another launcher.
    """
    setup_globals()
    config: DictConfig = plugin.config
    ledger = Ledger(Path(config.hydra.sweep.dir))
    redact_yaml(ledger.directory / "multirun.yaml", secrets_of(config))
    if config.fail_fast and _has_failure(ledger):  # in an earlier batch of the sweeper
        return []
    known = {record.config_hash: record for record in record_missing_ends(ledger)}
    jobs = Jobs(plugin.hydra_context.config_loader, config, ledger, known, list(map(list, job_overrides)))
    if plugin.runner is None:
        options = LocalOptions(
            config.hydra.launcher,
            str(config.device),
            most_devices(config, itertools.chain.from_iterable(job_overrides)),
            str(config.progress),
            config.retries,
            config.fail_fast is True,
        )
        run_on_this_machine(jobs.tasks(), len(job_overrides), options, ledger)
    else:
        _run_with(plugin, jobs, first)
    records = {record.config_hash: record for record in ledger.read()}
    return [
        _job_return(records[digest], overrides) for digest, overrides in zip(jobs.hashes, jobs.overrides, strict=False)
    ]


def _has_failure(ledger: Ledger) -> bool:
    """Return whether a job of this command has failed."""
    started = ledger.last_command().started
    return any(job.status == "failed" and job.number in started for job in ledger.read())


@dataclass
class Jobs:
    """The jobs that a sweeper asks for.

    Attributes:
        loader: Hydra's config loader.
        config: of the sweep, with Hydra's node.
        ledger: of the sweep.
        known: the jobs in the ledger, by the hash of their config.
        overrides: of each job.
        hashes: of the configs of the jobs that `tasks` has prepared.
    """

    loader: Any
    config: DictConfig
    ledger: Ledger
    known: dict[str, JobRecord]
    overrides: list[list[str]]
    hashes: list[str] = field(default_factory=list)

    def tasks(self) -> Iterator[Task]:
        """Prepare the jobs in order; yield those that must run. Jobs with equal configs run once.

        Raises:
            ConfigError: two jobs have the same directory.
            StorageError: the directory of a job cannot be written.
        """
        shared = set.intersection(*map(set, self.overrides)) if len(self.overrides) > 1 else set()
        seen: set[str] = set()
        self.ledger.append({"event": "expanded", "overrides": self._command(), "jobs": len(self.overrides)})
        for overrides in self.overrides:
            job = compose_job(self.loader, self.config, overrides)
            digest = config_hash(job.config)
            self.hashes.append(digest)
            record = self.known.get(digest)
            if digest in seen or (record is not None and record.status == "completed"):
                continue
            seen.add(digest)
            if record is None:
                record = self._queue(digest, job)
            else:
                job.set_number(record.number)
            name = " ".join(text for text in record.overrides if text not in shared)
            config = job.with_directory(self.ledger.directory, self.ledger.name_of(record))
            yield Task(record.number, name, record.directory, config, record.threads)
        repeated = len(self.hashes) - len(set(self.hashes))
        if repeated:
            text = "run once with a job of the same config; progress, report and logger do not make another job"
            print(f"note: {count(repeated, 'job')} {text}", file=sys.stderr)
        numbers = sorted({self.known[digest].number for digest in self.hashes})
        self.ledger.append({"event": "all_queued", "jobs": numbers})

    def _command(self) -> list[str]:
        """Return the overrides of the sweep without its secrets."""
        return [str(text) for text in redact_command_line(task_overrides(self.config), secrets_of(self.config))]

    def _queue(self, digest: str, job: ComposedJob) -> JobRecord:
        """Record a new job."""
        number = 1 + max((record.number for record in self.known.values()), default=-1)
        record = queue_job(self.ledger, number, job, self.known.values())
        self.known[digest] = record
        return record


def _run_with(plugin: Any, jobs: Jobs, first: int) -> None:
    """Run jobs through another launcher, each in the directory that the ledger gives it."""
    config = plugin.config
    config.hydra.launcher = plugin.runner
    inner = Plugins.instance()._instantiate(plugin.runner)
    inner.setup(  # type: ignore[attr-defined]
        hydra_context=plugin.hydra_context, task_function=plugin.task_function, config=config
    )
    tasks = list(jobs.tasks())
    overrides_of = dict(zip(jobs.hashes, jobs.overrides, strict=True))
    hashes = {record.number: digest for digest, record in jobs.known.items()}
    for task in tasks:
        set_aside_failed_run(jobs.ledger.directory, task.directory)
    jobs.ledger.append(*({"event": "started", "job": task.number, "attempt": 1} for task in tasks))
    job_overrides = [
        [
            *overrides_of[hashes[task.number]],
            f"hydra.sweep.subdir='{task.directory.relative_to(jobs.ledger.directory)}'",
        ]
        for task in tasks
    ]
    try:
        returns: list[JobReturn] = inner.launch(job_overrides, first) if job_overrides else []  # type: ignore[attr-defined]
    except BaseException as error:  # there are no exit codes, so the files of the runs say how the jobs ended
        record_missing_ends(jobs.ledger, "the launcher stopped before the job ended")
        has_begun = any((task.directory / "run.json").exists() for task in tasks)
        if not has_begun or not isinstance(error, Exception):
            raise
        hint = "to continue, repeat the command"
        print(Problem(f"hydra/launcher: {str(error).partition(chr(10))[0]}", hint), file=sys.stderr)
        return
    for task, returned in zip(tasks, returns, strict=True):
        code = returned.return_value if returned.status is JobStatus.COMPLETED else 1
        jobs.ledger.append({"event": "ended", "job": task.number, **find_outcome(task.directory, code)})


def _job_return(record: JobRecord, overrides: list[str]) -> JobReturn:
    """Return the value of a job for Hydra's sweeper: the best monitored value, NaN, or None for a failed job."""
    value = None if record.status != "completed" else math.nan if record.value is None else record.value
    result = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
    result.return_value = value
    return result
