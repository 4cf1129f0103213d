"""The history of a run: `history.jsonl`, one line of metrics per epoch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainkit.core.atomic import atomic_write_text
from trainkit.runs.untrusted import MAX_HISTORY_BYTES, read_bytes


class History:
    """The metrics of each epoch.

    Args:
        path: of `history.jsonl`; the first `append` creates it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The metrics of each epoch, in order."""
        return [row for _, row in self._valid_lines()]

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Add the metrics of an epoch, and wait until they are on the disk.

        Raises:
            OSError: the file cannot be written.
        """
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def truncate(self, epoch: int) -> None:
        """Drop the epochs after `epoch`: a resumed run trains them again.

        Raises:
            OSError: the file cannot be written.
        """
        kept = [line for line, row in self._valid_lines() if row["epoch"] <= epoch]
        atomic_write_text(self.path, "".join(f"{line}\n" for line in kept))

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
            is_flat = isinstance(row, dict) and not any(isinstance(value, dict | list) for value in row.values())
            if is_flat and type(epoch) is int and epoch > last:  # skip an epoch that a resume trained again
                found.append((line, row))
        return found
