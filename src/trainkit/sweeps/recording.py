"""Records the jobs of a sweep in its ledger while they run, and decides what runs again."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from trainkit.core.errors import CheckpointError
from trainkit.core.paths import display_path
from trainkit.display.jobs import JobView, SilentJobs, end_line, start_line
from trainkit.runs.directory import Run
from trainkit.runs.history import History, monitored_value
from trainkit.runs.secrets import secrets_of
from trainkit.sweeps.ledger import JobRecord, Ledger
from trainkit.sweeps.outcome import find_outcome
from trainkit.sweeps.pool import RunningJob
from trainkit.sweeps.secret_files import redact_log

REFRESH = 0.5  # seconds between two reads of the histories


class Recording:
    """The observer of a pool.

    Args:
        ledger: of the sweep.
        display: shows the jobs.
        retries: how many times to run a failed job again.
        fail_fast: stop all jobs as soon as a job has failed.
    """

    def __init__(self, ledger: Ledger, display: SilentJobs, *, retries: int = 0, fail_fast: bool = False) -> None:
        self.ledger, self.display, self.retries, self.fail_fast = ledger, display, retries, fail_fast
        self.failed = False
        self.ended: Counter[str] = Counter()
        self.shown_at = -math.inf

    @property
    def stop_early(self) -> bool:
        """Whether a job has failed, and `fail_fast` is on."""
        return self.fail_fast and self.failed

    def on_start(self, job: RunningJob, threads: int) -> None:
        """Record that a job starts."""
        task = job.task
        redact_log(task.directory / "output.log", secrets_of(task.config))  # of an attempt that was killed
        set_aside_failed_run(self.ledger.directory, task.directory)
        self.ledger.append({"event": "started", "job": task.number, "attempt": task.attempts, "threads": threads})
        self.display.print_line(start_line(task.number, task.name, task.attempts))

    @property
    def is_incomplete(self) -> bool:
        """Whether a job was stopped."""
        return self.ended["stopped"] > 0

    def on_end(self, job: RunningJob, exit_code: int | None) -> bool:
        """Record how a job ended; return whether to run it again."""
        task = job.task
        redact_log(task.directory / "output.log", secrets_of(task.config))
        outcome = self.outcome_of(job, exit_code)
        seconds = round(time.monotonic() - job.started, 3)
        self.ledger.append({"event": "ended", "job": task.number, **outcome, "seconds": seconds})
        log = display_path(task.directory / "output.log")
        self.display.print_line(end_line(task.number, task.name, outcome, seconds, log))
        has_failed = outcome["status"] == "failed"
        again = has_failed and task.attempts <= self.retries
        self.failed |= has_failed and not again
        self.ended[outcome["status"]] += not again
        return again

    def outcome_of(self, job: RunningJob, exit_code: int | None) -> dict[str, Any]:
        """Return how a job ended, as for the ledger."""
        return find_outcome(job.task.directory, exit_code)

    def on_question(self, job: RunningJob, question: Any) -> Any:  # noqa: ARG002
        """The jobs of a grid do not ask."""
        return None

    def on_poll(self, running: list[RunningJob], waiting: int) -> None:
        """Show the running jobs."""
        now = time.monotonic()
        if self.display.wants_views and now - self.shown_at >= REFRESH:
            self.shown_at = now
            counts = {"running": len(running), "waiting": waiting, **self.ended}
            self.display.update([_view(job, now) for job in running], counts)


def _view(job: RunningJob, now: float) -> JobView:
    config = job.task.config
    epochs, steps = (value if type(value) is int else None for value in (config.get("epochs"), config.get("steps")))
    rows = History(job.task.directory / "history.jsonl").rows
    times = [float(metrics["seconds"]) for metrics in rows if isinstance(metrics.get("seconds"), int | float)]
    found = [monitored_value(metrics, str(config.monitor.metric)) for metrics in rows]
    return JobView(
        job.task.number,
        job.task.name,
        planned=epochs if steps is None else steps,
        done=int(rows[-1]["epoch" if steps is None else "step"]) if rows else 0,
        values=[float(value) for value in found if isinstance(value, int | float)],
        elapsed=now - job.started,
        trained=sum(times),
        metric=str(config.monitor.metric),
    )


def set_aside_failed_run(sweep: Path, directory: Path) -> None:
    """Move the run of a failed attempt to `attempts/`, so that the job starts again. Its config stays.

    A run that was stopped or killed is not moved: it continues from its checkpoint.
    """
    if not has_failed(directory):
        return
    name = str(directory.relative_to(sweep)).replace(os.sep, "_")
    number = 1
    while (target := sweep / "attempts" / f"{name}-{number}").exists():
        number += 1
    target.parent.mkdir(exist_ok=True)
    directory.rename(target)
    (directory / ".hydra").mkdir(parents=True)
    for file in (target / ".hydra").iterdir():
        (directory / ".hydra" / file.name).write_bytes(file.read_bytes())


def has_failed(directory: Path) -> bool:
    """Return whether `run.json` says that the training failed."""
    try:
        return Run.load(directory).info.get("status") == "failed"
    except CheckpointError:
        return False


def record_missing_ends(ledger: Ledger, why: str = "the sweep was killed") -> list[JobRecord]:
    """Record how jobs ended whose end the ledger lacks, because something else ended first; return all jobs."""
    for job in ledger.read():
        if job.status == "running":
            outcome = find_outcome(job.directory, None)
            if outcome["status"] == "failed" and not has_failed(job.directory):
                outcome |= {"status": "stopped", "why": why}
            ledger.append({"event": "ended", "job": job.number, **outcome, "seconds": 0.0})
    return ledger.read()
