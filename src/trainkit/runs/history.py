"""The history of a run: `history.jsonl`, one line of metrics per epoch."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainkit.core.atomic import atomic_write_text, sync_directory
from trainkit.display.text import finite_or_null
from trainkit.runs.untrusted import MAX_HISTORY_BYTES, read_bytes

NOT_FINITE = "not_finite"  # the entry of a row that names its NaN and infinite metrics, which JSON does not have


class History:
    """The metrics of each epoch.

    Args:
        path: the path of `history.jsonl`; the first `append` creates it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The metrics of each epoch, in order."""
        return [row for _, row in self._valid_lines()]

    def append(self, line: str) -> None:
        """Add the line of an epoch, and wait until it is on the disk.

        Raises:
            OSError: the file cannot be written.
        """
        is_new = not self.path.exists()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync_directory(self.path.parent)

    def text_until(self, epoch: int) -> str:
        """Return the lines of the epochs up to `epoch`."""
        return "".join(f"{line}\n" for line, row in self._valid_lines() if row["epoch"] <= epoch)

    def write(self, text: str) -> None:
        """Replace all lines.

        Raises:
            OSError: the file cannot be written.
        """
        atomic_write_text(self.path, text)

    def _valid_lines(self) -> list[tuple[str, dict[str, Any]]]:
        """Return each valid line with its metrics. The last line is incomplete if the process was killed."""
        found: list[tuple[str, dict[str, Any]]] = []
        try:
            text = read_bytes(self.path, MAX_HISTORY_BYTES).decode(errors="replace")
        except FileNotFoundError:
            return []
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # an incomplete line, or deeply nested JSON
                continue
            epoch = row.get("epoch") if isinstance(row, dict) else None
            last = found[-1][1]["epoch"] if found else 0
            if type(epoch) is int and epoch > last:  # skip an epoch that a resume trained again
                found.append((line, _restore_non_finite(row)))
        return found


def monitored_value(row: Mapping[str, Any], metric: str) -> Any:
    """Return the monitored value of an epoch; None: the epoch has none.

    A run without validation monitors the training loss instead of `val/loss`.
    """
    return row.get("train/loss" if metric == "val/loss" and metric not in row else metric)


def history_line(metrics: Mapping[str, Any]) -> str:
    """Return the line of an epoch. NaN and infinite metrics are null, and named in the entry `not_finite`."""
    floats = {name: value for name, value in metrics.items() if isinstance(value, float)}
    special = {name: str(value) for name, value in floats.items() if not math.isfinite(value)}
    return json.dumps(finite_or_null({**metrics, NOT_FINITE: special} if special else metrics)) + "\n"


def digest_of(text: str) -> str:
    """Return the SHA-256 of the lines of a history, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def _restore_non_finite(row: dict[str, Any]) -> dict[str, Any]:
    special = row.pop(NOT_FINITE, None)
    for name, value in special.items() if isinstance(special, dict) else ():
        if name in row and value in ("nan", "inf", "-inf"):
            row[name] = float(value)
    return row
