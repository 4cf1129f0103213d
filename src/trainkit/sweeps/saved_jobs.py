"""The saved config of a job, with which it continues."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from trainkit.config.jobs import restore_job
from trainkit.core.errors import CheckpointError
from trainkit.runs.fingerprint import FREE_KEYS, is_allowed
from trainkit.runs.recovery import recover_run
from trainkit.runs.reload import reload_config
from trainkit.runs.untrusted import read_yaml
from trainkit.sweeps.ledger import JobRecord

# Keys that decide how long a job trains, or what it computes, although a single run may change them.
KEPT_KEYS = {"epochs", "steps", "max_minutes", "limit_val_batches", "early_stop", "hooks", "on_nonfinite"}


def may_change(key: str) -> bool:
    """Return whether a key of the jobs may change when a sweep is resumed."""
    return is_allowed(key, FREE_KEYS) and not is_allowed(key, KEPT_KEYS)


def saved_config(sweep: Path, job: JobRecord, overrides: Sequence[str], typed: DictConfig) -> DictConfig:
    """Return the saved config of a job with overrides, and with Hydra's node.

    Args:
        sweep: the directory of the sweep.
        job: the job.
        overrides: as on the command line.
        typed: from `typed_hydra`.

    Raises:
        CheckpointError: a saved file is missing or damaged.
        ConfigError: an override is wrong.
    """
    config = reload_config(recover_run(job.directory), overrides).settings.source
    path = job.directory / ".hydra" / "hydra.yaml"
    try:
        restored = restore_job(config, typed, read_yaml(path))
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or damaged", hint="repeat the command of the sweep") from error
    return restored.with_directory(sweep, str(job.directory.relative_to(sweep)))
