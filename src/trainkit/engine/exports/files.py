"""Where an export is written, and how: completely or not at all, never over a file of somebody else."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainkit.core.atomic import remove, sync, sync_directory
from trainkit.core.errors import ConfigError, StorageError
from trainkit.core.paths import display_path
from trainkit.core.signals import is_running
from trainkit.runs.directory import Run

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
OTHER_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
CARD = "README.md"
RECORD = re.compile(r"<!-- trainkit export (\{.*\}) -->\s*$")  # the end of a model card
MAX_CARD = 1 << 24  # bytes


@dataclass(frozen=True)
class Destination:
    """The files of an export.

    Attributes:
        file: the model; see `data_file`.
        card: the model card.
    """

    file: Path
    card: Path

    @property
    def files(self) -> list[Path]:
        """All files that the export may write."""
        return [self.file, data_file(self.file), self.card]


def data_file(file: Path) -> Path:
    """Return the second file, in which ONNX keeps weights of more than 2 GB."""
    return file.with_name(f"{file.name}.data")


def find_destination(run: Run, form: str, output: str) -> Destination:
    """Return where an export is written.

    Args:
        run: the run of the model.
        form: the format.
        output: a directory, or a file with the suffix of the format; "" for `export/FORMAT` in the run.

    Raises:
        ConfigError: `output` is a file of another kind.
    """
    suffix = SUFFIXES[form]
    path = Path(output).expanduser() if output else run.directory / "export" / form
    is_folder = path.is_dir() or output.endswith(("/", os.sep))
    if not is_folder and path.suffix == suffix:
        return Destination(path, path.with_suffix(".md"))
    if not is_folder and path.suffix in (*SUFFIXES.values(), *OTHER_SUFFIXES):
        hint = f"write a name that ends with {suffix}, or a directory"
        raise ConfigError(f"--output {output}: {path.suffix} is not the suffix of the format {form}", hint=hint)
    if path.exists() and not path.is_dir():
        hint = f"write a directory, or a name that ends with {suffix}"
        raise ConfigError(f"--output {output}: it is a file, expected a directory", hint=hint)
    return Destination(path / f"model{suffix}", path / CARD)


def check_free(destination: Destination, run: Run) -> None:
    """Raise `ConfigError` if a file exists that is not an unchanged export of the run."""
    card = _read_card(destination.card)
    for file in destination.files:
        if not os.path.lexists(file):
            continue
        digest = card.get("sha256", {}).get(file.name)
        is_own = card.get("run") == identity(run) and digest is not None and not file.is_symlink()
        if not is_own or digest != (_card_digest(file) if file == destination.card else _digest(file)):
            cause = f"{display_path(file)} exists, and it is not an unchanged export of this run"
            raise ConfigError(cause, hint="write --overwrite to replace it, or choose another place: --output PATH")


@contextmanager
def staged(destination: Destination) -> Iterator[Destination]:
    """Yield where the block writes the files; rename them at its end. After an error, nothing is left behind.

    Raises:
        StorageError: a file cannot be written.
    """
    folder = destination.file.parent
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    staging = folder / f".{destination.file.name}.new-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder, destination.file.name)
        staging.mkdir()
        fresh = Destination(staging / destination.file.name, staging / destination.card.name)
        yield fresh
        written = [(new, old) for new, old in zip(fresh.files, destination.files, strict=True) if new.exists()]
        for new, _ in written:
            with new.open("rb+") as opened:
                sync(opened)
        for new, old in written:
            new.replace(old)
        if data_file(fresh.file) not in [new for new, _ in written]:
            data_file(destination.file).unlink(missing_ok=True)  # weights of an earlier, larger export
        sync_directory(folder)
    except OSError as error:
        cause = f"{display_path(folder)} cannot be written: {error.strerror or error}"
        hint = "free space on the disk, or choose another place: --output PATH"
        raise StorageError(cause, hint=hint) from error
    finally:
        for path in (staging, *new_folders):
            with suppress(OSError):  # the folder has files now, or a part of the path is a file
                remove(path) if path == staging else path.rmdir()


def with_record(card: str, run: Run, file: Path) -> str:
    """Return a model card with a comment that identifies the export: the run, and the SHA-256 of each file."""
    digests = {path.name: _digest(path) for path in (file, data_file(file)) if path.exists()}
    own = hashlib.sha256(card.encode()).hexdigest()
    record = {"run": identity(run), "sha256": digests, "card": own}
    return f"{card}<!-- trainkit export {json.dumps(record)} -->\n"


def identity(run: Run) -> str:
    """Return what identifies a run, also after its directory was moved."""
    return f"{run.directory.resolve().name} {run.info.get('started')}"


def _read_card(card: Path) -> Mapping[str, Any]:
    """Return the record in a model card, with the SHA-256 of the card itself; {} if there is no valid record."""
    with suppress(OSError, ValueError, RecursionError):
        if card.stat().st_size > MAX_CARD:
            return {}
        found = RECORD.search(card.read_text(encoding="utf-8"))
        record = json.loads(found[1]) if found else None
        if isinstance(record, dict) and isinstance(record.get("sha256"), dict):
            return {**record, "sha256": {**record["sha256"], card.name: record.get("card")}}
    return {}


def _card_digest(card: Path) -> str:
    """Return the SHA-256 of a model card without its record."""
    return hashlib.sha256(RECORD.sub("", card.read_text(encoding="utf-8")).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_leftovers(folder: Path, name: str) -> None:
    """Remove what killed exports have left. The process of an export that still runs is in the name."""
    for path in folder.glob(f".{glob.escape(name)}.new-*"):
        number = path.name.rpartition("-")[2]
        if number.isdecimal() and not is_running(int(number)):
            remove(path)
