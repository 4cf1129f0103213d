"""Paths: run directories, how a path is shown, and errors about files."""

from __future__ import annotations

import datetime
import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from trainkit.core.errors import DataError, RunDirectoryInUseError, StorageError

RUN_FILES = (
    "run.json",
    "checkpoints",
    "history.jsonl",
    "multirun.yaml",
    "sweep.jsonl",
    "find_lr.json",
)  # of runs and sweeps


def claim_directory(path: Path, *, exact: bool = False) -> Path:
    """Reserve a directory for a new run: `path`, or `path_1`, `path_2`, … if `path` exists.

    Args:
        path: the directory.
        exact: use `path` itself. The directory may exist, but it must not hold a run.

    Raises:
        RunDirectoryInUseError: the directory holds a run, finished or not.
        StorageError: the directory cannot be created.
    """
    suffix = 0
    while True:
        candidate = path if suffix == 0 else path.with_name(f"{path.name}_{suffix}")
        try:
            candidate.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(candidate.parent, error) from error
        try:
            candidate.mkdir()
        except FileExistsError as error:
            if not exact:
                suffix += 1
                continue
            if not candidate.is_dir():
                raise storage_error(candidate, error) from error
        except OSError as error:
            raise storage_error(candidate, error) from error
        found = [name for name in RUN_FILES if (candidate / name).exists()]
        if found:
            cause = f"{candidate} holds a run already: it contains {found[0]}"
            raise RunDirectoryInUseError(cause, hint=other_directory(candidate))
        return candidate


def other_directory(directory: Path) -> str:
    """Return what to do if the directory of a new run holds a run or a sweep already."""
    if not any((directory / name).exists() for name in ("run.json", "checkpoints", "sweep.jsonl")):
        return "choose another directory"
    return f"to continue it: trainkit resume {shlex.quote(display_path(directory))}; or choose another directory"


def default_run_directory() -> Path:
    """Return the directory of a run that does not name one: outputs/<date>/<time>."""
    return Path("outputs") / f"{datetime.datetime.now():%Y-%m-%d/%H-%M-%S}"


def update_latest_link(directory: Path, outputs: Path) -> None:
    """Point the link `outputs/latest` at a directory in `outputs`. Does nothing if links cannot be created."""
    link, fresh = outputs / "latest", outputs / f".latest-{os.getpid()}"
    try:
        if link.is_symlink() or not link.exists():
            fresh.symlink_to(directory.relative_to(outputs), target_is_directory=True)
            fresh.replace(link)
    except OSError:
        fresh.unlink(missing_ok=True)


def display_path(path: Path) -> str:
    """Return a path relative to the working directory if possible, as a user would type it."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # it was deleted
        return str(path)
    text = str(path.relative_to(here) if path.is_relative_to(here) else path)
    # `last` alone means the newest run, and a dash begins a flag.
    return f"./{text}" if text == "last" or text.startswith("-") else text


def check_exist(names: Iterable[str]) -> None:
    """Raise `DataError` if a file or folder does not exist."""
    missing = [name for name in names if not Path(name).exists()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{missing[0]}{more}: there is no such file or folder", hint="correct the path")


def storage_error(path: Path, error: OSError) -> StorageError:
    """Return the error to raise if `path` cannot be written."""
    hint = "free space on the disk, or choose another directory: hydra.run.dir=DIR (for sweeps hydra.sweep.dir=DIR)"
    return StorageError(f"{path} cannot be written: {error.strerror or error}", hint=hint)
