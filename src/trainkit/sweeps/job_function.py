"""The function that Hydra's launchers call for each job. Its module is light, because this process pickles it."""

from __future__ import annotations

from omegaconf import DictConfig


def job_function(config: DictConfig, config_dir: str | None = None) -> int:
    """Train a job, return its exit code; see `trainkit.sweeps.job.sweep_job`."""
    from trainkit.sweeps.job import sweep_job

    return sweep_job(config, config_dir)
