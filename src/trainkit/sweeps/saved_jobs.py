"""The saved config of a job, with which it continues."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from trainkit.config.jobs import restore_job
from trainkit.core.errors import CheckpointError
from trainkit.runs.recovery import recover_run
from trainkit.runs.reload import reload_config
from trainkit.runs.untrusted import read_yaml
from trainkit.sweeps.ledger import JobRecord


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
