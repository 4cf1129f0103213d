"""The status of a run: what `run.json` says, unless the process that wrote it was killed. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainkit.display.text import number
from trainkit.runs.lock import may_be_locked

NO_EPOCH = "no epoch with a finite monitored value has ended"


def status_of(directory: Path, info: Mapping[str, Any], cause: str = "") -> tuple[str, str]:
    """Return the status of a run, and its cause.

    The status is completed, running, failed, stopped or unreadable. A run whose process was killed says `running`
    in `run.json`, but nobody holds its lock: it is failed.

    Args:
        directory: of the run.
        info: the content of `run.json`; empty: the file is missing.
        cause: why the run ended, if `run.json` does not say it.
    """
    status, why = info.get("status"), info.get("why") or cause
    if status == "completed":
        return status, info.get("why") or ""
    if may_be_locked(directory):
        best = info.get("best")
        text = f"best epoch so far: {best['epoch']}, {best['metric']} {number(best['value'])}" if best else NO_EPOCH
        return "running", text
    if status in ("failed", "stopped"):
        return status, why or "run.json gives no cause"
    if status == "running":
        return "failed", why or "its process ended without writing a cause"
    if status is None:
        return "failed", why or "no training started: run.json is missing"
    return "unreadable", f"run.json: the status {status[:80]!r} is not known"
