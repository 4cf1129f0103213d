"""What `run.json` records about the process: versions, host, and git commit."""

from __future__ import annotations

import datetime
import os
import platform
import socket
import subprocess
from importlib import metadata
from typing import Any


def process_facts() -> dict[str, Any]:
    """Return the versions, host, process id and git commit of this process."""
    return {"versions": versions(), "host": socket.gethostname(), "pid": os.getpid(), "git_commit": git_commit()}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on."""
    packages = ("trainkit", "torch", "numpy", "hydra-core")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def git_commit() -> str | None:
    """Return the commit of the working directory, with `+` if files differ from it; None outside a repository."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], capture_output=True, text=True, timeout=5, check=True)
    return done.stdout.strip()


def now() -> str:
    """Return the present time, UTC, in ISO format with seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
