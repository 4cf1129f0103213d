"""The plugin by which Hydra finds trainkit's launcher. Hydra imports it at every start, so it imports little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.plugins.launcher import Launcher


class TrainkitLauncher(Launcher):
    """Runs each job of a sweep in a separate process, and records the jobs in a ledger; see `trainkit.sweeps`.

    Args:
        n_jobs: the maximum number of jobs at a time, or `auto`: as many as the machine carries.
        jobs_per_gpu: the jobs that share a GPU.
        runner: the config of another launcher that runs the jobs, such as joblib's; None: trainkit runs them.
    """

    def __init__(self, n_jobs: Any = "auto", jobs_per_gpu: Any = 1, runner: Any = None) -> None:
        self.n_jobs, self.jobs_per_gpu, self.runner = n_jobs, jobs_per_gpu, runner

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Keep what Hydra passes to a launcher."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        """Run jobs; return a `JobReturn` for each. Jobs that are completed already are not run."""
        from trainkit.sweeps.launcher import launch

        return launch(self, job_overrides, initial_job_idx)
