"""Trackio: a run of a project in a database file."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainkit.runs.loggers import LoggedRun


class Trackio:
    """Logs to a run of Trackio. Values of an epoch are never logged twice.

    Args:
        project: the project.
        directory: the directory of the database; in the run directory, unless the path is absolute. None: the variable
            TRACKIO_DIR, or the folder `trackio`.
    """

    def __init__(self, project: str = "trainkit", directory: str | None = None) -> None:
        self.project, self.directory = project, directory

    def start(self, run: LoggedRun) -> int:
        """Start or continue the run; return the last epoch that the database holds."""
        given = os.environ.get("TRACKIO_DIR") if self.directory is None else None
        folder = Path(given).absolute() if given else run.path(self.directory or "trackio")
        folder.mkdir(parents=True, exist_ok=True)
        trackio = _import_with_directory(folder)
        with contextlib.redirect_stdout(_Muted(sys.stdout)):
            self.run = trackio.init(
                project=self.project,
                name=run.name,
                group=run.group,
                config=dict(run.config),
                resume="allow" if run.resumed else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        storage = trackio.sqlite_storage.SQLiteStorage
        self.epoch: int = storage.get_last_step(self.project, self.run.name, run_id=self.run.id) or 0
        return self.epoch

    def log_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Log the numbers at the step `epoch`."""
        self.epoch = epoch
        numbers = {"train/step" if name == "step" else name: value for name, value in values.items()}
        self.run.log({"epoch": epoch, **numbers}, step=epoch)  # `step` is reserved

    def finish(self, status: str, why: str | None) -> None:
        """Log the status as a value of the last epoch, and wait until the database has everything."""
        self.run.log({"status": f"{status}: {why}" if why else status}, step=self.epoch)
        with contextlib.redirect_stdout(_Muted(sys.stdout)):
            self.run.finish()


def _import_with_directory(folder: Path) -> Any:
    """Import Trackio and set the directory of its databases, which it reads from the environment at its import."""
    before = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = str(folder)
    try:
        trackio = importlib.import_module("trackio")
    finally:
        if before is None:
            del os.environ["TRACKIO_DIR"]
        else:
            os.environ["TRACKIO_DIR"] = before
    for name, module in list(sys.modules.items()):  # an earlier run of this process imported it
        if name.partition(".")[0] == "trackio" and hasattr(module, "TRACKIO_DIR"):
            vars(module)["TRACKIO_DIR"] = folder
    return trackio


class _Muted(io.TextIOBase):
    """A stdout that drops what its own thread prints: the stdout of trainkit is for results."""

    def __init__(self, stdout: Any) -> None:
        self.stdout, self.thread = stdout, threading.get_ident()

    def write(self, text: str) -> int:
        """Write the text of another thread."""
        if threading.get_ident() != self.thread and self.stdout is not None:
            self.stdout.write(text)
        return len(text)
