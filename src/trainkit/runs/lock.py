"""One process at a time in a directory, for as long as it lives."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from trainkit.core.errors import RunDirectoryInUseError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

_held: set[Path] = set()  # by this process, which its own lock would not keep out


class Lock:
    """A lock on a directory: the file `.lock`, with the pid and host of the process that has it.

    The lock is the operating system's (a POSIX record lock, which a process's death frees, whatever it
    died of, and which its children do not inherit). Where the file system has none, the pid decides.

    Args:
        directory: to be locked.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory.resolve() / ".lock"
        self.file: Any = None

    def acquire(self) -> None:
        """Take the lock; a dead process's is taken over.

        Raises:
            RunDirectoryInUseError: a living process has it.
            OSError: the file cannot be made.
        """
        if self.path in _held:
            raise self._in_use({"pid": os.getpid(), "host": socket.gethostname()})
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = os.fdopen(os.open(self.path, flags, 0o644), "r+", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = self._owner(file)
            file.close()
            raise self._in_use(owner) from None
        except OSError:  # no locks on this file system
            owner = self._owner(file)
            if _alive(owner):
                file.close()
                raise self._in_use(owner) from None
        file.seek(0)
        file.truncate()
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        self.file = file
        _held.add(self.path)

    def release(self) -> None:
        """Let it go. The file stays, empty: to delete it could pull it away under the next one."""
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

    def _in_use(self, owner: dict[str, Any]) -> RunDirectoryInUseError:
        who = f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'unknown')}"
        return RunDirectoryInUseError(
            f"{self.path.parent}: {who} is at work in it",
            hint=f"wait for it or stop it; if it is gone for sure, delete {self.path}",
        )


def _alive(owner: dict[str, Any]) -> bool:
    """Whether the process that wrote the lock may live; one on another host may."""
    if not isinstance(owner.get("pid"), int):
        return False
    if owner.get("host") != socket.gethostname():
        return True
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
