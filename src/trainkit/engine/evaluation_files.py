"""What an evaluation prints, and the files that it writes into the run directory. Imports no torch."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainkit.core.atomic import atomic_write, atomic_write_text
from trainkit.core.errors import CheckpointError, StorageError
from trainkit.core.paths import display_path
from trainkit.display.class_table import class_lines, draw_confusion_matrix
from trainkit.display.text import as_json, count, number
from trainkit.runs.untrusted import MAX_INFO_BYTES, read_bytes

FOLDER, NUMBERS, PICTURE = "eval", "eval.json", "confusion_matrix.png"
IDENTITY = ("checkpoint_sha256", "data_sha256", "overrides")  # equal in evaluations of the same weights and data
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def evaluation_lines(result: Mapping[str, Any]) -> list[str]:
    """Return what was evaluated, the metrics, and for classes their table.

    Args:
        result: what `engine.evaluate` returns.
    """
    weights = "the averaged weights of " if result["ema"] else ""
    what = f"{weights}{result['checkpoint']}, epoch {result['epoch']}"
    lines = [f"{display_path(Path(result['run']))}: {what}"]
    lines.append(f"{count(result['samples'], 'sample')} of {result['data']} on {result['device']}")
    lines += [f"{name}  {_value(value)}" for name, value in result["metrics"].items() if not isinstance(value, list)]
    history = result["history"]
    if history is not None and history["equal"]:
        lines.append(f"equal to the numbers of epoch {history['epoch']} in the history")
    elif history is not None:
        found = ", ".join(f"{key} {_value(old)}" for key, (old, _) in history["differences"].items())
        lines.append(f"not equal to epoch {history['epoch']} in the history ({found}): other data, code or machine")
    return lines + (["", *class_lines(result)] if result["classes"] is not None else [])


def metrics_line(result: Mapping[str, Any]) -> str:
    """Return the metrics that are numbers as one line, for an evaluation of several runs."""
    values = [f"{name} {_value(v)}" for name, v in result["metrics"].items() if not isinstance(v, list)]
    return f"{display_path(Path(result['run']))}: {result['checkpoint']}: {', '.join(values)}"


def write_evaluation(result: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Write `eval.json` and the confusion matrix into `eval/` in the run directory.

    The same evaluation replaces its own files. Another one gets a folder of its own.

    Returns:
        The files by name, and a note if the run directory is read-only.

    Raises:
        StorageError: the files cannot be written, such as on a full disk.
    """
    folder = Path(result["run"]) / FOLDER
    try:
        folder = _own_folder(folder, result)
        files = {"numbers": folder / NUMBERS}
        matrix = result.get("confusion_matrix")
        if matrix:
            files["confusion matrix"] = folder / PICTURE
            picture = draw_confusion_matrix(matrix, [row["class"] for row in result["classes"]])
            atomic_write(folder / PICTURE, lambda file: file.write(picture))
        atomic_write_text(folder / NUMBERS, as_json(result) + "\n")
    except OSError as error:
        cause = f"{display_path(folder)} cannot be written: {error.strerror or error}"
        if error.errno in READ_ONLY:
            return {}, [f"note: {cause}; the numbers are complete"]
        raise StorageError(cause, hint="the numbers are printed; free space on the disk to get the files") from error
    return {name: display_path(file) for name, file in files.items()}, []


def _own_folder(folder: Path, result: Mapping[str, Any]) -> Path:
    """Return the folder of an evaluation: that of an equal earlier one, or a new one.

    Raises:
        OSError: the folder cannot be created, or it is a link.
    """
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "it is a link, and anybody may own its target")
    folder.mkdir(exist_ok=True)
    suffix = 0
    while True:
        own = folder / f"{result['checkpoint']}{f'_{suffix}' if suffix else ''}"
        try:
            own.mkdir()
            return own
        except FileExistsError:
            if not own.is_symlink() and own.is_dir() and _is_equal(own / NUMBERS, result):
                return own
        suffix += 1


def _is_equal(file: Path, result: Mapping[str, Any]) -> bool:
    """Return whether a file holds the numbers of the same evaluation."""
    try:
        found = json.loads(read_bytes(file, MAX_INFO_BYTES))
    except (OSError, ValueError, RecursionError, CheckpointError):
        return False
    return isinstance(found, dict) and all(found.get(key) == result[key] for key in IDENTITY)


def _value(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else str(value)
