"""Give a new job its directory, and record it in the ledger."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from trainkit.config.jobs import ComposedJob
from trainkit.core.errors import ConfigError
from trainkit.core.paths import storage_error
from trainkit.core.redaction import redact_command_line
from trainkit.runs.directory import Run
from trainkit.runs.identity import config_hash
from trainkit.sweeps.ledger import JobRecord, Ledger


def queue_job(ledger: Ledger, number: int, job: ComposedJob, others: Iterable[JobRecord], **entries: Any) -> JobRecord:
    """Create the directory of a new job with its config, and record the job.

    Args:
        ledger: of the sweep.
        number: of the job.
        job: its config.
        others: the jobs that are in the ledger.
        entries: further entries of the event: the `trial` and the `repeat` of a search.

    Raises:
        ConfigError: another job has the same directory.
        StorageError: the directory cannot be written.
    """
    hint = "write hydra.sweep.subdir='${hydra.job.num}'"
    try:
        directory = ledger.directory_of(job.set_number(number))
    except ValueError as error:
        raise ConfigError(f"hydra.sweep.subdir: {error}", hint=hint) from error
    if any(record.directory == directory for record in others):
        raise ConfigError(f"hydra.sweep.subdir: two jobs of the sweep have the directory {directory.name}", hint=hint)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(directory, error) from error
    run = Run(directory)
    run.write_config(job.config, job.overrides, job.hydra)
    digest, shown = config_hash(job.config), [str(text) for text in redact_command_line(job.overrides, run.secrets)]
    record = JobRecord(number, digest, shown, directory, **entries)
    queued = {"event": "queued", "job": number, "config": digest, "overrides": shown}
    ledger.append({**queued, "directory": ledger.name_of(record), **entries})
    return record
