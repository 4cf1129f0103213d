"""Where the study of a search is stored: a journal file in the folder of the sweep, or a database."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalRedisBackend

from trainkit.core.errors import CheckpointError, ConfigError, TrainkitError
from trainkit.core.paths import display_path, storage_error

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

JOURNAL = "study.journal"


class FileLock:
    """A lock file. The operating system frees the lock if its process is killed, so a restart need not wait.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: Any = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        self.file = self.path.open("a")
        if fcntl is not None:
            fcntl.lockf(self.file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        """Free the lock."""
        self.file.close()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock for the block."""
        self.acquire()
        try:
            yield
        finally:
            self.release()


def open_storage(directory: Path, url: str | None) -> BaseStorage:
    """Return the storage at a URL, or the file in the directory of the sweep.

    Raises:
        ConfigError: the storage cannot be opened.
        CheckpointError: the file is damaged.
        StorageError: the file cannot be written.
    """
    try:
        if url is None:
            return _open_journal(directory / JOURNAL)
        if url.startswith(("redis://", "rediss://")):
            with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
                return JournalStorage(JournalRedisBackend(url))
        return get_storage(url)
    except TrainkitError:
        raise
    except Exception as error:
        cause = f"search.storage: the database cannot be opened: {type(error).__name__}: {str(error).splitlines()[0]}"
        hint = "check the URL, such as postgresql://USER:PASSWORD@HOST/NAME; its driver must be installed"
        raise ConfigError(cause, hint=hint) from error


def _open_journal(path: Path) -> BaseStorage:
    """Return the storage in a file.

    Raises:
        CheckpointError: the file is damaged.
        StorageError: the file cannot be written.
    """
    lock = FileLock(path.with_name(JOURNAL + ".lock"))
    journal_lock: Any = lock if os.name == "posix" else None
    try:
        with lock.held():
            repair_journal(path)
        return JournalStorage(JournalFileBackend(str(path), journal_lock))
    except OSError as error:
        raise storage_error(path, error) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged_study(path, "it has a damaged line") from error


def repair_journal(path: Path) -> None:
    """Remove the incomplete last line of a process that was killed while it wrote. Optuna could not read on."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        start = content.rfind(b"\n") + 1
        if start == len(content):
            return
        try:
            json.loads(content[start:])
            file.write(b"\n")  # only the end of the line is missing
        except ValueError:
            file.truncate(start)
        file.flush()
        os.fsync(file.fileno())


def damaged_study(path: Path, cause: str) -> CheckpointError:
    """Return the error that a study cannot be used."""
    hint = "restore the file from a copy, or choose another hydra.sweep.dir"
    return CheckpointError(f"the study of the search, {display_path(path)}, cannot be used: {cause}", hint=hint)
