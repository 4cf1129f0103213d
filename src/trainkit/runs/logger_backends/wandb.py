"""Weights & Biases: a run of a project, online or in files that `wandb sync` uploads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from trainkit.runs.loggers import EPOCH_LIMIT, LoggedRun


class WandB:
    """Logs to a run of Weights & Biases.

    The server keeps the first values of an epoch that a resumed run trains again. Offline, a resumed run writes a new
    file with all of its epochs, because a killed process may not have written its last ones.

    Args:
        project: the project.
        entity: the user or the team; None: the default of the account.
        mode: online, offline or disabled; None: the variable WANDB_MODE, or offline if there is no API key.
        directory: the directory that holds the folder `wandb`; in the run directory, unless the path is absolute.
    """

    def __init__(
        self, project: str = "trainkit", entity: str | None = None, mode: str | None = None, directory: str = "."
    ) -> None:
        self.project, self.entity, self.mode, self.directory = project, entity, mode, directory

    def start(self, run: LoggedRun) -> int:
        """Start or continue the run; return the last epoch that the server has.

        W&B gets no command line, no code, no console output and no git facts.
        """
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            save_code=False,
            init_timeout=EPOCH_LIMIT,
            finish_timeout=EPOCH_LIMIT,
            x_disable_meta=True,
            x_save_requirements=False,
        )
        mode: Any = self.mode or os.environ.get("WANDB_MODE")
        if mode is None and not wandb.login(prompt=False):
            mode = "offline"
        folder = run.path(self.directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=self.project,
            entity=self.entity,
            dir=str(folder),
            id=run.id,
            resume="allow" if mode not in ("offline", "disabled") else None,
            name=run.name,
            group=run.group,
            config=run.config,
            mode=mode,
            allow_val_change=True,
            reinit="create_new",
            settings=settings,
        )
        self.run.define_metric("*", step_metric="epoch")
        return max(0, int(self.run.starting_step) - 1)

    def log_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Log the numbers at the step `epoch`."""
        self.run.log({"epoch": epoch, **values}, step=epoch)

    def finish(self, status: str, why: str | None) -> None:
        """Write the status into the summary, and finish the run."""
        self.run.summary.update({"status": status, "why": why})
        self.run.finish(exit_code=0 if status == "completed" else 1)
