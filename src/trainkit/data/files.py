"""Files that data sets read: those of the user, and those in the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from trainkit.core.atomic import open_regular_file

PACKAGE = "package:"  # begins the name of a file in the package


def read_data_file(file: str) -> bytes:
    """Return the content of a file.

    Args:
        file: a path, or `package:NAME` for a file of trainkit.

    Raises:
        OSError: the file cannot be read.
    """
    if file.startswith(PACKAGE):
        return resources.files("trainkit.data").joinpath(Path(file.removeprefix(PACKAGE)).name).read_bytes()
    with open_regular_file(Path(file).expanduser(), follow_links=True) as opened:
        return opened.read()
