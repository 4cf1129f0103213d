"""Files that are written completely or not at all, and opened without following links."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import IO


def atomic_write(
    path: Path,
    write: Callable[[IO[bytes]], object],
    *,
    temporary: Path | None = None,
    sync_folder: bool = False,
) -> None:
    """Write a file under a temporary name, sync it to the disk, and rename it.

    After a crash, `path` holds either the old or the new content. On an error nothing is left behind.

    Args:
        path: the file.
        write: writes the content to an open file.
        temporary: the temporary name, in the same folder; default: `.NAME.new`. Concurrent writers need unique names.
        sync_folder: sync the folder too, so that the rename survives a power failure.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = temporary or path.with_name(f".{path.name}.new")
    try:
        remove(temporary)
        with temporary.open("xb") as file:  # "x" does not follow a link of that name
            write(file)
            sync(file)
        temporary.replace(path)
        if sync_folder:
            sync_directory(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def atomic_write_text(path: Path, text: str, *, sync_folder: bool = False) -> None:
    """Write UTF-8 text with `atomic_write`."""
    atomic_write(path, lambda file: file.write(text.encode()), sync_folder=sync_folder)


def sync(file: IO[bytes]) -> None:
    """Flush a file and wait until the disk has its content."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the disk has the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder with its content; ignore what is missing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def open_regular_file(path: Path, *, follow_links: bool = False) -> BufferedReader:
    """Open a file for reading.

    Args:
        path: the file.
        follow_links: accept a link, whose target may be anywhere.

    Raises:
        OSError: the path is missing, a link, or not a regular file.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # opening a pipe would block
    flags |= 0 if follow_links else getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")
