"""Build and install the wheel."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")


def shared_wheel(factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an installed wheel, which the workers of a test run share."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return install_wheel(factory.mktemp("wheel"))
    folder = factory.getbasetemp().parent / f"wheel-{run}"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return folder / "site" if (folder / "site").exists() else install_wheel(folder)


def install_wheel(folder: Path) -> Path:
    """Build the wheel of the repository in a folder, and install it without its dependencies; return where."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*PIP, "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"
