"""Find the files of a prediction: those that a command line names, and those in folders."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from trainkit.core.errors import DataError
from trainkit.data.raw_files import STDIN, Reader


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts `2.png` before `10.png`."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(text), text) if text.isdecimal() and len(text) < 19 else (1, 0, text) for text in parts]


def find_files(names: Sequence[str], reader: Reader) -> list[str]:
    """Return the files that a command line names. A folder stands for its files in natural order, also in subfolders.

    Hidden files and linked folders in a folder are left out, and so are files of other types, which a note counts.

    Raises:
        DataError: a folder has no file of this type, or standard input is not supported.
    """
    files: list[str] = []
    for name in names:
        if name == STDIN:
            if not reader.takes_stdin:
                hint = "name the files: find FOLDER -name '*.png' -print0 | xargs -0 trainkit predict RUN"
                raise DataError(f"-: {reader.noun} cannot be read from the standard input", hint=hint)
            files.append(name)
        elif Path(name).is_dir():
            files += _files_of_folder(name, reader)
        else:
            files.append(name)
    return files


def _files_of_folder(folder: str, reader: Reader) -> list[str]:
    found, others = [], 0
    for place, folders, names in os.walk(folder):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural_key)
        for name in sorted(names, key=natural_key):
            if name.startswith("."):
                continue
            if reader.suffixes is None or name.lower().endswith(reader.suffixes):
                found.append(str(Path(place, name)))
            else:
                others += 1
    if not found:
        shown = "all files" if reader.suffixes is None else ", ".join(reader.suffixes)
        raise DataError(f"{folder}: this folder has no {reader.noun}", hint=f"it is searched for {shown}")
    if others:
        reader.notes.append(f"note: {folder}: left out {others:,} other file{'s' * (others != 1)}")
    return found
