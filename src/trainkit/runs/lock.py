"""A lock that lets one process at a time use a directory."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
from pathlib import Path
from typing import Any

from trainkit.core.atomic import open_regular_file
from trainkit.core.errors import RunDirectoryInUseError
from trainkit.core.signals import is_running

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_held: set[Path] = set()  # locks of this process: the operating system would grant it the same lock twice


class Lock:
    """A lock on a directory: the file `.lock`, with the pid and host of the process that holds the lock.

    It is a POSIX record lock. The operating system frees it when the process ends for any reason, and child
    processes do not inherit it. On file systems without such locks, the recorded pid decides.

    Args:
        directory: to be locked.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory.resolve() / ".lock"
        self.file: Any = None

    def acquire(self) -> None:
        """Take the lock, also over from a process that has ended.

        Raises:
            RunDirectoryInUseError: a running process holds the lock.
            OSError: the file cannot be created.
        """
        if self.path in _held:
            raise self._in_use({"pid": os.getpid(), "host": socket.gethostname()})
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(self.path, flags, 0o644)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # reading a pipe would block
            os.close(descriptor)
            raise OSError(errno.EINVAL, f"{self.path.name} is not a regular file")
        file = os.fdopen(descriptor, "r+", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = self._owner(file)
            file.close()
            raise self._in_use(owner) from None
        except OSError:  # this file system has no locks
            owner = self._owner(file)
            if _may_run(owner):
                file.close()
                raise self._in_use(owner, f"; if it has ended, delete {self.path}") from None
        file.seek(0)
        file.truncate()
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        self.file = file
        _held.add(self.path)

    @property
    def is_intact(self) -> bool:
        """Whether the lock file is the one that this process has locked, or this process has none."""
        if self.file is None:
            return True
        try:
            found, held = self.path.stat(), os.fstat(self.file.fileno())
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)

    def check(self) -> None:
        """Check that this process still has the directory for itself, before it writes.

        Raises:
            RunDirectoryInUseError: the lock file was deleted or replaced, so another process may use the directory.
        """
        if not self.is_intact:
            raise RunDirectoryInUseError(
                f"{self.path} was deleted or replaced while this process used the directory",
                hint="another process may have resumed the run, so this one stops without writing",
            )

    def release(self) -> None:
        """Release the lock. The file stays: another process may have opened it already."""
        if self.file is not None:
            _held.discard(self.path)
            self.file.truncate(0)
            self.file.close()
            self.file = None

    def _owner(self, file: Any) -> dict[str, Any]:
        try:
            owner = json.loads(file.read(1000) or "{}")
            return owner if isinstance(owner, dict) else {}
        except ValueError:
            return {}

    def _in_use(self, owner: dict[str, Any], advice: str = "") -> RunDirectoryInUseError:
        process = f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'unknown')}"
        return RunDirectoryInUseError(
            f"{self.path.parent}: {process} uses this directory",
            hint=f"wait until it ends, or stop it{advice}",
        )


def may_be_locked(directory: Path) -> bool:
    """Return whether a running process may hold the lock of a directory. The lock itself is not touched.

    On another host, the recorded process counts as running.
    """
    try:
        with open_regular_file(directory / ".lock") as file:
            owner = json.loads(file.read(1000) or b"{}")
    except (OSError, ValueError):
        return False
    return isinstance(owner, dict) and _may_run(owner)


def _may_run(owner: dict[str, Any]) -> bool:
    """Return whether the process that wrote the lock may be running. On another host it may."""
    if not isinstance(owner.get("pid"), int):
        return False
    if owner.get("host") != socket.gethostname():
        return True
    return is_running(owner["pid"])
