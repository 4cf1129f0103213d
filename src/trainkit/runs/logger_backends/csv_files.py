"""CSV files: `metrics.csv` has a row per epoch, `run.csv` the status and the config."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainkit.core.atomic import atomic_write_text
from trainkit.runs.loggers import LoggedRun, plain


class CSV:
    """Writes CSV files. A resumed run writes them anew from its history, so no epoch appears twice.

    Args:
        directory: the directory of the files, in the run directory unless the path is absolute.
    """

    def __init__(self, directory: str = "csv") -> None:
        self.directory = directory
        self.columns: list[str] = []
        self.rows: list[dict[str, Any]] = []

    def start(self, run: LoggedRun) -> int:
        """Write the config, and an empty `metrics.csv`. All epochs of the history follow."""
        self.run, self.folder = run, run.path(self.directory)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics: Path = self.folder / "metrics.csv"
        self._write_run("running", None)
        self.metrics.unlink(missing_ok=True)
        return 0

    def log_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Add a row. Write the file anew if the epoch has a new metric."""
        row = {"epoch": epoch, **values}
        self.rows.append(row)
        new = [name for name in row if name not in self.columns]
        self.columns += new
        if new:
            atomic_write_text(self.metrics, _lines([self.columns, *map(self._cells, self.rows)]))
            return
        with self.metrics.open("a", encoding="utf-8", newline="") as file:
            file.write(_lines([self._cells(row)]))

    def finish(self, status: str, why: str | None) -> None:
        """Write the final status."""
        self._write_run(status, why)

    def _cells(self, row: Mapping[str, Any]) -> list[Any]:
        return [row.get(name, "") for name in self.columns]

    def _write_run(self, status: str, why: str | None) -> None:
        about = {"name": self.run.name, "group": self.run.group or "", "status": status, "why": why or ""}
        rows = [*about.items(), *((f"config/{key}", plain(value)) for key, value in self.run.config.items())]
        atomic_write_text(self.folder / "run.csv", _lines([("key", "value"), *rows]))


def _lines(rows: Iterable[Iterable[Any]]) -> str:
    """Return rows as CSV. A number has all its digits."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
