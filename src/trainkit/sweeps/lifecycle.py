"""What every sweep begins and ends with: the lock and the ledger, then the summary, the table and the exit code."""

from __future__ import annotations

import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from trainkit.core.errors import Stopped
from trainkit.core.paths import display_path, storage_error
from trainkit.core.redaction import redact_command_line
from trainkit.core.terminal import printable_lines
from trainkit.display.jobs import short_cause
from trainkit.display.text import count
from trainkit.engine.report import is_cheap, write_or_note
from trainkit.runs.lock import Lock
from trainkit.runs.secrets import secrets_of
from trainkit.sweeps.comparison import comparison_lines
from trainkit.sweeps.ledger import JobRecord, Ledger, shared_overrides
from trainkit.sweeps.report import write_sweep_report

ENDED_WELL = ("completed", "paused", "pruned")  # a search has stopped the last two
SOME_FAILED = 10  # the exit code if a run of several runs failed


@contextmanager
def open_sweep(
    directory: Path, overrides: Sequence[str], configs: Sequence[DictConfig], *, shared: bool = False
) -> Iterator[Ledger]:
    """Lock the directory of a sweep and open its ledger; write the summary at the end.

    Args:
        directory: of the sweep.
        overrides: of the command line.
        configs: of some jobs; their secrets are removed from what is recorded.
        shared: other processes may run the sweep at the same time, as in a search.

    Raises:
        RunDirectoryInUseError: another process runs this sweep.
        Stopped: the block raised it; the message names the command that continues.
    """
    lock, ledger = Lock(directory), Ledger(directory)
    try:
        if not shared:
            lock.acquire()
    except OSError as error:
        raise storage_error(directory, error) from error
    try:
        secrets = secrets_of(configs[0]) if configs else set()
        command, given = (redact_command_line(list(words), secrets) for words in (sys.argv, overrides))
        ledger.append({"event": "sweep", "version": 1, "command": command, "overrides": given})
        yield ledger
    except Stopped as stopped:
        ledger.write_summary("stopped", stopped.exit_code)
        sizes = Counter(job.status.replace("queued", "not started") for job in ledger.read())
        shown = ", ".join(f"{size} {status}" for status, size in sizes.items())
        stopped.summary = f"jobs: {shown}; {resume_command(ledger)}"
        raise
    except BaseException as error:
        ledger.write_summary("failed", getattr(error, "exit_code", 1))
        raise
    finally:
        lock.release()


def finish_sweep(ledger: Ledger, numbers: set[int], report: Any, started: float) -> int:
    """Write the summary and the report of a sweep, print the comparison and the failures; return the exit code.

    Args:
        ledger: of the sweep.
        numbers: of the jobs that the command asked for. They decide the exit code.
        report: the config key.
        started: when the jobs began, from `time.monotonic`.
    """
    jobs = ledger.read()
    requested = [job for job in jobs if job.number in numbers]
    code = SOME_FAILED if any(job.status not in ENDED_WELL for job in requested) else 0
    ledger.write_summary("failed" if code else "completed", code)
    started_now = ledger.last_command().started
    skipped = sum(job.status == "completed" and job.number not in started_now for job in requested)
    if skipped and not code:
        print(f"{count(skipped, 'job')} had been completed before", file=sys.stderr)
    print(printable_lines(comparison_lines(ledger.directory)))
    page = ledger.directory / "report.html"
    if report is not None and (report != "auto" or page.exists() or is_cheap(time.monotonic() - started)):
        written = write_or_note(lambda: write_sweep_report(ledger.directory))
        print(printable_lines([f"report: {display_path(written)}"] if written is not None else []))
    lines = failure_lines(requested)
    others = sum(job.status not in ENDED_WELL for job in jobs if job.number not in numbers)
    if others:
        lines.append(f"note: {count(others, 'other job')} of this sweep did not complete; {resume_command(ledger)}")
    for line in lines:
        print(printable_lines([line]), file=sys.stderr)
    return code


def resume_command(ledger: Ledger) -> str:
    """Return how to continue a sweep."""
    return f"to continue: trainkit resume {shlex.quote(display_path(ledger.directory))}"


def failure_lines(jobs: Sequence[JobRecord]) -> list[str]:
    """Return the list of the jobs that failed or were stopped, with cause and log."""
    shared = shared_overrides(jobs)
    lines = []
    for status, text in (("failed", "failed:"), ("stopped", "stopped:")):
        found = [job for job in jobs if job.status == status]
        lines += [f"{count(len(found), 'job')} {text}"] if found else []
        for job in found:
            code = "" if job.exit_code is None else f" (exit code {job.exit_code})"
            name = " ".join(text for text in job.overrides if text not in shared)
            lines.append(f"  job {job.number} {name}: {short_cause(job.why)}{code}; log: {display_path(job.log)}")
    return lines
