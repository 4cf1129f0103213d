"""How a job ended, from its exit code and the files of its run. Imports no torch."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

from trainkit.core.errors import CheckpointError
from trainkit.runs.directory import Run
from trainkit.runs.history import History

STOPPED_CODES = (75, 129, 130, 143)
TAIL = 2**16  # bytes at the end of a log


def find_outcome(directory: Path, exit_code: int | None) -> dict[str, Any]:
    """Return the entries of a job's `ended` event: status, exit code, cause, best monitored value, and epochs.

    Args:
        directory: of the job's run.
        exit_code: of its process, 128 + N if signal N killed the process; None: not known.
    """
    try:
        info = Run.load(directory).info
    except CheckpointError as error:
        info = {"status": "damaged", "why": error.problems[0].cause}
    status, why = info.get("status"), info.get("why")
    if status == "completed":  # also if its process failed later, for example because it had closed stdout
        found = {"status": "completed", "exit_code": 0, "why": why}
    elif exit_code in STOPPED_CODES or (exit_code is None and status == "stopped"):
        found = {"status": "stopped", "exit_code": exit_code or info.get("exit_code"), "why": why}
    elif status == "failed":
        found = {"status": "failed", "exit_code": exit_code or info.get("exit_code"), "why": why}
    else:
        found = {"status": "failed", "exit_code": exit_code, "why": _cause(directory, exit_code)}
    best = info.get("best") or {}
    return found | {name: best.get(name) for name in ("metric", "mode", "value")} | {"epochs": _epochs(directory)}


def _epochs(directory: Path) -> int:
    """Return how many epochs of a run have ended."""
    try:
        rows = History(directory / "history.jsonl").rows
    except CheckpointError:
        return 0
    return int(rows[-1]["epoch"]) if rows else 0


def _cause(directory: Path, exit_code: int | None) -> str:
    """Return why a process ended before it wrote how its run ended."""
    if exit_code is None:
        return "the process was killed"
    if exit_code > 128 and exit_code - 128 in signal.valid_signals():
        name = signal.Signals(exit_code - 128).name
        return f"killed by {name}" + (": perhaps the memory was full" if name == "SIGKILL" else "")
    errors = re.findall(r"^error: (.+)$", "\n".join(last_lines(directory / "output.log", 100)), re.MULTILINE)
    if errors and exit_code:
        return str(errors[-1])
    return f"the process ended with exit code {exit_code} before the training was complete"


def last_lines(path: Path, number: int) -> list[str]:
    """Return the last lines of a text file; [] if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            return file.read(TAIL).decode(errors="replace").splitlines()[-number:]
    except OSError:
        return []
