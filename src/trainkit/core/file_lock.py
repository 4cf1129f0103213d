"""A lock on a file, with which one process at a time does work whose result the others then use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Held:
    """How a lock was taken.

    Attributes:
        is_held: False: the file cannot be written, or its file system has no locks.
        waited: another process held the lock before.
    """

    is_held: bool
    waited: bool = False


@contextmanager
def locked(path: Path, on_wait: Callable[[], object] = lambda: None) -> Iterator[Held]:
    """Hold a lock in the block, after waiting for the process that has it.

    It is a POSIX record lock: the operating system frees it when the process ends, and child processes do not inherit
    it. The file stays, because another process may have opened it already.

    Args:
        path: the file of the lock, made if needed.
        on_wait: is called before waiting.
    """
    descriptor = _open(path)
    if descriptor is None:
        yield Held(is_held=False)
        return
    try:
        yield _lock(descriptor, on_wait)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int | None:
    """Return a descriptor of the file; None: it cannot be opened, or there are no locks."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if fcntl is not None:
            return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    return None


def _lock(descriptor: int, on_wait: Callable[[], object]) -> Held:
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            on_wait()
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
            return Held(is_held=True, waited=True)
    except OSError:  # this file system has no locks
        return Held(is_held=False)
    return Held(is_held=True)
