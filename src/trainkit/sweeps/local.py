"""Run the jobs of a sweep in processes of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from omegaconf import DictConfig

from trainkit.display.jobs import make_job_display
from trainkit.sweeps.ledger import Ledger
from trainkit.sweeps.pool import Pool, Task
from trainkit.sweeps.recording import Recording
from trainkit.sweeps.resources import measure_capacity


@dataclass(frozen=True)
class LocalOptions:
    """How the jobs run on this machine.

    Attributes:
        launcher: the config of the launcher: `n_jobs` and `jobs_per_gpu`.
        device: the config key of the jobs.
        devices: of the job that uses most.
        progress: the config key.
        retries: how many times to run a failed job again.
        fail_fast: stop at the first failed job.
    """

    launcher: DictConfig
    device: str
    devices: int
    progress: str
    retries: int
    fail_fast: bool


def run_on_this_machine(tasks: Iterator[Task], number: int, options: LocalOptions, ledger: Ledger) -> None:
    """Run tasks in processes of this machine.

    Args:
        tasks: the jobs.
        number: of jobs, at most.
        options: how they run.
        ledger: of the sweep.

    Raises:
        ConfigError: an option is wrong.
        Stopped: a signal stopped the jobs.
    """
    launcher = options.launcher
    capacity = measure_capacity(launcher.n_jobs, launcher.jobs_per_gpu, number, options.device, options.devices)
    with make_job_display(options.progress) as display:
        recording = Recording(ledger, display, retries=options.retries, fail_fast=options.fail_fast)
        Pool(capacity, make_target, recording).run(tasks)


def make_target(task: Task, threads: int, gpus: str | None, channel: Any) -> Any:
    """Return what the process of a job calls."""
    return partial(_run_job, task.config, threads, gpus, task.directory / "output.log", channel)


def _run_job(*arguments: Any) -> None:
    from trainkit.sweeps.job import run_job_process  # imports torch, which the process of the command does not need

    run_job_process(*arguments)
