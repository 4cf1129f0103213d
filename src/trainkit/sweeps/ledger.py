"""The ledger of a sweep: `sweep.jsonl`, a line for each event of each job. Imports no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainkit.core.atomic import atomic_write_text, sync_directory
from trainkit.core.paths import storage_error
from trainkit.display.text import as_json, finite_or_null
from trainkit.runs.provenance import now
from trainkit.runs.untrusted import read_bytes

NAME = "sweep.jsonl"
VERSION = 1
MAX_BYTES = 2**28
# The errors that a damaged line of the ledger can cause.
DAMAGED_LINE = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)
STATUSES = ("queued", "running", "completed", "failed", "stopped", "paused", "pruned")


@dataclass(frozen=True)
class JobRecord:
    """What the ledger says about a job.

    Attributes:
        number: of the job in its sweep, from 0.
        config_hash: identifies the config of the job.
        overrides: the overrides of its command line, without secrets.
        directory: of its run.
        status: one of `STATUSES`. A job of a killed sweep stays running. A search stops a job for ever (pruned), or
            until it is promoted (paused).
        exit_code: of the last attempt that has ended; None: no attempt has ended.
        why: the cause of a failure or a stop.
        attempts: how many times the job was started.
        metric: the monitored metric.
        mode: `min` or `max`: whether lower or higher values are better.
        value: the best monitored value; None: no epoch has ended, or the value is not finite.
        seconds: the wall time of all attempts that have ended.
        epochs: how many have ended in all attempts; None: no attempt has ended.
        threads: of torch in the job; None: the job has not started.
        trial: the trial of a search that the job belongs to; None: the job is not part of a search.
        repeat: of the trial, from 0. Each repeat has its own seed.
    """

    number: int
    config_hash: str
    overrides: list[str]
    directory: Path
    status: str = "queued"
    exit_code: int | None = None
    why: str | None = None
    attempts: int = 0
    metric: str | None = None
    mode: str | None = None
    value: float | None = None
    seconds: float | None = None
    epochs: int | None = None
    threads: int | None = None
    trial: int | None = None
    repeat: int = 0

    @property
    def log(self) -> Path:
        """The file with the output of the job."""
        return self.directory / "output.log"

    def as_dict(self, sweep: Path) -> dict[str, Any]:
        """Return the record as plain values, with paths relative to the directory of the sweep."""
        plain = dataclasses.asdict(self)
        plain["config"] = plain.pop("config_hash")
        return plain | {"directory": os.path.relpath(self.directory, sweep), "log": os.path.relpath(self.log, sweep)}


@dataclass
class Command:
    """The jobs of a command.

    Attributes:
        jobs: the numbers of all its jobs, also of those that were completed before.
        started: the numbers of the jobs that it started.
    """

    jobs: set[int] = field(default_factory=set)
    started: set[int] = field(default_factory=set)


class Ledger:
    """The events of a sweep, which are only ever appended.

    Args:
        directory: of the sweep.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.path = self.directory / NAME

    def append(self, *events: Mapping[str, Any]) -> None:
        """Add a line for each event, with the time, and wait until the disk has the lines.

        Raises:
            StorageError: the ledger cannot be written.
        """
        text = "".join(json.dumps(finite_or_null({"at": now(), **event}), default=str) + "\n" for event in events)
        try:
            is_new = not self.path.exists()
            with self.path.open("a+b") as file:
                # The last line of a killed process may be incomplete. A line of its own keeps the next one valid.
                if file.seek(0, os.SEEK_END) and _last_byte(file) != b"\n":
                    text = "\n" + text
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                sync_directory(self.directory)
        except OSError as error:
            raise storage_error(self.path, error) from error

    def read(self) -> list[JobRecord]:
        """Return the jobs in the order of their numbers. Damaged lines are skipped.

        Raises:
            CheckpointError: the ledger is too large, or not a regular file.
        """
        jobs: dict[int, JobRecord] = {}
        for line in self._lines():
            try:
                event = json.loads(line)
                self._apply(event, jobs)
            except DAMAGED_LINE:
                continue  # an incomplete line, or another program wrote it
        return [jobs[number] for number in sorted(jobs)]

    def last_command(self) -> Command:
        """Return what the ledger says about the last command. Damaged lines are skipped."""
        command = Command()
        for line in self._lines():
            with contextlib.suppress(*DAMAGED_LINE):
                event = json.loads(line)
                if event["event"] == "sweep":
                    command = Command()
                elif event["event"] == "started":
                    command.started.add(int(event["job"]))
                elif event["event"] == "all_queued":
                    command.jobs |= set(map(int, event["jobs"]))
        return command

    def trained(self) -> list[tuple[int, int, str]]:
        """Return the job, its epochs so far and its status for each end of an attempt, in order.

        Damaged lines are skipped. An end that another version wrote has no epochs and is left out.
        """
        found = []
        for line in self._lines():
            with contextlib.suppress(*DAMAGED_LINE):
                event = json.loads(line)
                if event["event"] == "ended" and type(event.get("epochs")) is int:
                    found.append((int(event["job"]), event["epochs"], str(event["status"])))
        return found

    def find_unqueued(self) -> list[str] | None:
        """Return the overrides of a command whose jobs are not all in the ledger, or None.

        A command that was stopped early may not have queued all its jobs.
        """
        overrides: list[str] | None = None
        for line in self._lines():
            with contextlib.suppress(*DAMAGED_LINE):
                event = json.loads(line)
                if event["event"] == "expanded":
                    overrides = [str(text) for text in event["overrides"]]
                elif event["event"] == "all_queued":
                    overrides = None
        return overrides

    def search(self) -> dict[str, Any] | None:
        """Return the last `search` event: what a search varies and how. None: this is not a search."""
        found: dict[str, Any] | None = None
        for line in self._lines():
            with contextlib.suppress(*DAMAGED_LINE):
                event = json.loads(line)
                if event["event"] == "search" and isinstance(event["axes"], list):
                    found = event
        return found

    def _lines(self) -> list[str]:
        try:
            return read_bytes(self.path, MAX_BYTES).decode(errors="replace").splitlines()
        except FileNotFoundError:
            return []

    def _apply(self, event: dict[str, Any], jobs: dict[int, JobRecord]) -> None:
        """Apply an event to the records.

        Raises:
            ValueError: the event is not valid; so do TypeError, KeyError and AttributeError.
        """
        kind = event["event"]
        if kind == "queued":
            number = int(event["job"])
            if number not in jobs:
                overrides = [str(text) for text in event["overrides"]]
                trial = event.get("trial")
                jobs[number] = JobRecord(
                    number,
                    str(event["config"]),
                    overrides,
                    self.directory_of(event["directory"]),
                    trial=None if trial is None else int(trial),
                    repeat=int(event.get("repeat") or 0),
                )
        elif kind == "started":
            job = jobs[event["job"]]
            threads = event.get("threads")
            jobs[job.number] = dataclasses.replace(
                job,
                status="running",
                attempts=job.attempts + 1,
                threads=threads if type(threads) is int and threads > 0 else job.threads,
            )
        elif kind == "ended":
            job, status, value = jobs[event["job"]], event["status"], event.get("value")
            if status not in STATUSES:
                raise ValueError(f"{status} is not a status")
            why, metric, mode, exit_code = (event.get(name) for name in ("why", "metric", "mode", "exit_code"))
            epochs = event.get("epochs")
            jobs[job.number] = dataclasses.replace(
                job,
                status=status,
                exit_code=exit_code if type(exit_code) is int else None,
                why=None if why is None else str(why),
                metric=None if metric is None else str(metric),
                mode=mode if mode in ("min", "max") else None,
                value=float(value) if isinstance(value, int | float) else None,
                seconds=(job.seconds or 0.0) + float(event.get("seconds") or 0.0),
                epochs=epochs if type(epochs) is int else job.epochs,
            )

    def directory_of(self, name: str) -> Path:
        """Return the directory of a job.

        Raises:
            ValueError: it is not below the directory of the sweep.
        """
        path = Path(os.path.normpath(self.directory / name))
        if path == self.directory or not path.is_relative_to(self.directory):
            raise ValueError(f"{name} is not inside the directory of the sweep")
        return path

    def name_of(self, job: JobRecord) -> str:
        """Return the directory of a job relative to that of the sweep."""
        return str(job.directory.relative_to(self.directory))

    def write_summary(self, status: str, exit_code: int) -> None:
        """Write `summary.json`: how the sweep ended, and the state of each job.

        Args:
            status: completed, failed or stopped.
            exit_code: of the command.

        Raises:
            StorageError: the file cannot be written.
        """
        jobs = self.read()
        summary = {
            "status": status,
            "exit_code": exit_code,
            "ended": now(),
            "counts": dict(Counter(job.status for job in jobs)),
            "jobs": [job.as_dict(self.directory) for job in jobs],
        }
        path = self.directory / "summary.json"
        try:
            atomic_write_text(path, as_json(summary) + "\n", sync_folder=True)
        except OSError as error:
            raise storage_error(path, error) from error


def is_sweep(directory: Path) -> bool:
    """Return whether a directory holds the ledger of a sweep."""
    return (directory / NAME).is_file()


def read_ledger(directory: Path) -> list[JobRecord]:
    """Return the jobs of the sweep in a directory; [] if there is no ledger. See `Ledger.read`."""
    return Ledger(directory).read()


def shared_overrides(jobs: Sequence[JobRecord]) -> set[str]:
    """Return the overrides that all jobs have; empty for a single job."""
    return set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    last: bytes = file.read(1)
    return last
