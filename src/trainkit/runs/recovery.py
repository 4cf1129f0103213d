"""What is left of a run after a kill or damage: `run.json`, the saved config and the history, before a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainkit.core.errors import CheckpointError
from trainkit.runs.directory import Run
from trainkit.runs.history import digest_of
from trainkit.runs.lock import Lock
from trainkit.runs.untrusted import sha256_of

# Entries of run.json that a resume reads. Without them it is rebuilt.
REQUIRED_INFO = {"status", "device", "parameters", "trainable_parameters", "train_samples", "val_samples"}
MAX_EPOCH = 2**53


def recover_run(directory: Path, lock: Lock | None = None) -> Run:
    """Return the run in a directory. If `run.json` is missing or damaged, `info` is empty until `Run.resume`."""
    try:
        run = Run.load(directory, lock)
    except CheckpointError as error:
        run = Run(directory, lock)
        run.damage = error.problems[0].cause
    if not run.damage and not run.info.keys() >= REQUIRED_INFO:
        missing = ", ".join(sorted(REQUIRED_INFO - run.info.keys()))
        run.damage = f"{directory / 'run.json'} is missing" if not run.info else f"run.json lacks {missing}"
    return run


def is_finished(run: Run) -> bool:
    """Return whether a run is completed, and the files that a result is read from are intact."""
    recorded = run.info.get("history_sha256")
    intact = recorded is None or recorded == digest_of(run.history_file.text_until(MAX_EPOCH))
    return run.info.get("status") == "completed" and not run.damage and intact


def check_config(run: Run) -> None:
    """Raise `CheckpointError` if the saved config is not the one that the run wrote.

    `run.json` of an older version does not contain the SHA-256.
    """
    recorded = run.info.get("config_sha256")
    path = run.directory / ".hydra" / "config.yaml"
    if recorded is not None and sha256_of(path) not in recorded:
        cause = f"{path} is damaged or was edited: run.json has another SHA-256"
        hint = "restore the file, or use it as it is from here on: resume.allow=[config]"
        raise CheckpointError(cause, hint=hint)


def recover_history(run: Run, epoch: int, saved: Any) -> tuple[str, str]:
    """Return the lines of the history up to an epoch, and a note if the file differs from the checkpoint's copy.

    Args:
        run: a saved run.
        epoch: the last epoch of the checkpoint.
        saved: the copy of the history in the checkpoint; None: the checkpoint of an older version has no copy.
    """
    found = run.history_file.text_until(epoch)
    if not isinstance(saved, str) or saved == found:
        return found, ""
    wanted, lines = saved.splitlines(), set(found.splitlines())
    wrong = sum(line not in lines for line in wanted)
    text = f"{wrong} of {len(wanted)} lines are missing or changed" if wrong else "it has other lines"
    return saved, f"note: history.jsonl is damaged ({text}); it is restored from the checkpoint"
