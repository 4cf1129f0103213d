"""Where runs lie: a directory for each, and the newest."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

from trainkit.core.errors import RunDirectoryInUseError, StorageError


def claim_directory(path: Path, *, exact: bool = False) -> Path:
    """Make a directory that nobody else has: `path`, or `path_1`, `path_2`, … where it exists.

    Args:
        path: the directory.
        exact: take `path` itself or nothing; it may exist as long as it holds no run.

    Raises:
        RunDirectoryInUseError: `exact`, and it holds a run.
        StorageError: it cannot be made.
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
        holds = [name for name in ("run.json", "multirun.yaml", "find_lr.json") if (candidate / name).exists()]
        if holds:
            raise RunDirectoryInUseError(
                f"{candidate} holds a run already ({holds[0]})", hint="choose another directory"
            )
        return candidate


def default_run_directory() -> Path:
    """Where a run lands if nothing else is said: outputs/<date>/<time>."""
    return Path("outputs") / f"{datetime.datetime.now():%Y-%m-%d/%H-%M-%S}"


def update_latest_link(directory: Path, outputs: Path) -> None:
    """Let `outputs/latest` point at a directory inside `outputs` (where links can be made)."""
    link, fresh = outputs / "latest", outputs / f".latest-{os.getpid()}"
    try:
        if link.is_symlink() or not link.exists():
            fresh.symlink_to(directory.relative_to(outputs), target_is_directory=True)
            fresh.replace(link)
    except OSError:
        fresh.unlink(missing_ok=True)


def display_path(path: Path) -> str:
    """A path as one would type it from here."""
    here = Path.cwd()
    text = str(path.relative_to(here) if path.is_relative_to(here) else path)
    return "./last" if text == "last" else text  # `last` is the newest run


def storage_error(path: Path, error: OSError) -> StorageError:
    """What is raised where nothing can be written."""
    return StorageError(
        f"{path} cannot be written: {error.strerror or error}",
        hint="free or mend that disk, or choose another directory: hydra.run.dir=DIR (a sweep's: hydra.sweep.dir)",
    )
