"""Build and install the wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")


def install_wheel(folder: Path) -> Path:
    """Build the wheel of the repository in a folder, and install it without its dependencies; return where."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*PIP, "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"
