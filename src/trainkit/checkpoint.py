"""Checkpoints on disk: written whole or not at all, verified before anything in them is read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import torch

from trainkit.errors import CheckpointError, StorageError
from trainkit.snapshot import FORMAT, KEYS

STATE, MANIFEST = "state.pt", "manifest.json"
NAME = re.compile(r"step-\d{8,}")
TEMPORARY = re.compile(r"\.(step-\d{8,}|last|best)\.(new|replaced|deleted).*")
MOST_MANIFEST = 1 << 16  # bytes


class DamagedError(Exception):
    """A checkpoint that is not what was written; its text says why."""


class Checkpoints:
    """The checkpoints of a run: directories `step-<8 digits>`, and `last` and `best`, which name one each.

    A checkpoint is `state.pt` and `manifest.json` (sizes and sha256, written last). It is written under
    another name, everything is synced to the disk, and then it is renamed: under its own name it is whole.

    Args:
        directory: `checkpoints` in a run's directory; made when something is written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.valid: set[str] = set()  # names that were written or verified by this process

    def names(self) -> list[str]:
        """What is there under a checkpoint's name, the newest first."""
        if not self.directory.is_dir():
            return []
        found = [entry for entry in os.scandir(self.directory) if NAME.fullmatch(entry.name)]
        there = [entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
        return sorted(there, key=lambda name: int(name.removeprefix("step-")), reverse=True)

    def write(self, saved: Mapping[str, Any]) -> str:
        """Write what `snapshot.remember` gave; returns its name.

        One of the same step is replaced, but not if it is of the same batch: then it is the same.

        Raises:
            StorageError: it cannot be written. Nothing that was there is touched.
        """
        name = f"step-{saved['step']:08d}"
        if self.is_valid(name) and self._batch(name) == (saved["epoch"], saved["batch"]):
            return name
        fresh, place = self.directory / f".{name}.new-{os.getpid()}", self.directory / name
        replaced = self.directory / f".{name}.replaced-{os.getpid()}"
        try:
            self.directory.mkdir(exist_ok=True)
            fresh.mkdir()
            manifest = {
                "format": FORMAT,
                "step": saved["step"],
                "epoch": saved["epoch"],
                "batch": saved["batch"],
                "files": {STATE: _write_state(fresh / STATE, saved)},
            }
            with (fresh / MANIFEST).open("w", encoding="utf-8") as file:
                json.dump({**manifest, "sha256": _sum(manifest)}, file, indent=2)
                _sync(file)
            _sync_directory(fresh)
            if place.exists():
                place.rename(replaced)  # `clean` puts it back if this is as far as it gets
            fresh.rename(place)
            _sync_directory(self.directory)
            shutil.rmtree(replaced, ignore_errors=True)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            raise StorageError(
                f"{place} cannot be written: {error.strerror or error}",
                mend=f"the checkpoints before it are as they were: free that disk, then "
                f"trainkit resume {self.directory.parent}",
            ) from error
        self.valid.add(name)
        self.point("last", name)
        return name

    def point(self, which: str, name: str) -> None:
        """Let `last` or `best` name a checkpoint.

        Raises:
            StorageError: it cannot be written.
        """
        fresh = self.directory / f".{which}.new"
        try:
            with fresh.open("w", encoding="utf-8") as file:
                file.write(f"{name}\n")
                _sync(file)
            fresh.replace(self.directory / which)
            _sync_directory(self.directory)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise StorageError(f"{self.directory / which} cannot be written: {error.strerror or error}") from error

    def pointed(self, which: str) -> str | None:
        """The checkpoint that `last` or `best` names; None where it names none."""
        try:
            with (self.directory / which).open("rb") as file:
                text = file.read(64).decode("ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return text if NAME.fullmatch(text) and text in self.names() else None

    def load(self, name: str) -> dict[str, Any]:
        """What was written, in host memory; its bytes are verified before any of them is interpreted.

        Raises:
            DamagedError: it is not what was written.
            CheckpointError: it is not one of this version of trainkit's.
        """
        with _verified(self.directory / name) as file:
            try:
                saved = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # torch and pickle raise whatever they come upon
                wanted = re.search(r"Unsupported (?:global|class|operand)[^\w]*(?:GLOBAL )?([\w.]+)", str(error))
                named = f" ({wanted[1]})" if wanted else ""
                raise DamagedError(f"{STATE} holds something else than tensors and plain containers{named}") from error
        if not isinstance(saved, dict):
            raise DamagedError(f"{STATE} holds no dict")
        if saved.get("format") != FORMAT:
            raise CheckpointError(
                f"{self.directory / name}: its format is {saved.get('format')!r}, this trainkit reads {FORMAT}",
                mend="resume it with the trainkit that wrote it: see versions in run.json",
            )
        lacking = [key for key in KEYS if key not in saved]
        if lacking:
            raise CheckpointError(f"{self.directory / name}: it lacks {', '.join(lacking)}", mend="use another")
        self.valid.add(name)
        return saved

    def newest(self) -> tuple[str, dict[str, Any], list[str]]:
        """The newest checkpoint that is what was written: its name, its content, and what was passed over and why.

        Raises:
            CheckpointError: there is none.
        """
        passed: list[str] = []
        for name in self.names():
            try:
                return name, self.load(name), passed
            except DamagedError as error:
                passed.append(f"{name}: {error}")
        told = f"none can be used: {'; '.join(passed)}" if passed else "there is none"
        raise CheckpointError(f"{self.directory}: {told}", mend="start a new run")

    def is_valid(self, name: str) -> bool:
        """Whether a checkpoint is there and is what was written."""
        if name not in self.valid and name in self.names():
            with contextlib.suppress(DamagedError), _verified(self.directory / name):
                self.valid.add(name)
        return name in self.valid

    def _batch(self, name: str) -> tuple[Any, Any]:
        """The epoch and batch that a valid checkpoint is of."""
        manifest = json.loads((self.directory / name / MANIFEST).read_text(encoding="utf-8"))
        return manifest.get("epoch"), manifest.get("batch")

    def prune(self, keep: int) -> None:
        """Delete what is older than the newest `keep` valid ones, but for the best.

        Raises:
            StorageError: something cannot be deleted.
        """
        best, kept = self.pointed("best"), 0
        for name in self.names():
            if kept >= keep and name != best:
                try:
                    self._delete(name)
                except OSError as error:
                    cause = f"{self.directory / name} cannot be deleted: {error.strerror or error}"
                    raise StorageError(cause, mend="let it be deleted, or write checkpoint.keep=1000") from error
            elif kept < keep and self.is_valid(name):
                kept += 1

    def clean(self) -> None:
        """Put right what a process that was killed left half written, half replaced or half deleted."""
        for path in list(self.directory.iterdir()) if self.directory.is_dir() else ():
            found = TEMPORARY.fullmatch(path.name)
            if found and found[2] == "replaced" and not (self.directory / found[1]).exists():
                path.rename(self.directory / found[1])
            elif found:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def _delete(self, name: str) -> None:
        old = self.directory / f".{name}.deleted-{os.getpid()}"
        (self.directory / name).rename(old)  # under its own name a checkpoint is whole, to the end
        self.valid.discard(name)
        shutil.rmtree(old)


# ------------------------------------------------------------------------------- bytes, sums and the disk


class _Hashing:
    """A file to write to that counts and hashes on the way, and keeps its own error from torch's writer."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.sum = file, 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:  # torch's writer would end the process on it
                self.error = error
        self.sum.update(data)
        self.size += size
        return size

    def flush(self) -> None:
        """Done once, at the end."""


def _write_state(path: Path, saved: Mapping[str, Any]) -> dict[str, Any]:
    with path.open("wb") as file:
        hashing = _Hashing(file)
        torch.save(dict(saved), hashing)  # type: ignore[arg-type]  # it asks for no more than write and flush
        if hashing.error is not None:
            raise hashing.error
        _sync(file)
    return {"size": hashing.size, "sha256": hashing.sum.hexdigest()}


def _sum(manifest: Mapping[str, Any]) -> str:
    """The sha256 of what a manifest says, whatever its layout."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _verified(path: Path) -> Iterator[BufferedReader]:
    """The open state of a checkpoint, once size and sha256 are those of its manifest.

    Raises:
        DamagedError: they are not, or a file is missing or no file.
    """
    try:
        with _open(path / MANIFEST) as file:
            manifest = json.loads(file.read(MOST_MANIFEST))
        if manifest.pop("sha256") != _sum(manifest):
            raise DamagedError(f"the sha256 of {MANIFEST} is not its own")
        if set(manifest["files"]) != {STATE}:
            raise DamagedError(f"{MANIFEST} names other files than {STATE}")
        size, wanted = manifest["files"][STATE]["size"], manifest["files"][STATE]["sha256"]
        file = _open(path / STATE)
    except OSError as error:
        name = Path(error.filename or path).name
        raise DamagedError(f"{name} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} is not readable: {type(error).__name__}") from error
    with file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise DamagedError(f"{STATE} has {found:,} bytes, {MANIFEST} says {size!r}")
        try:
            if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
                raise DamagedError(f"the sha256 of {STATE} is not that of {MANIFEST}")
        except OSError as error:
            raise DamagedError(f"{STATE} cannot be read: {error.strerror or error}") from error
        file.seek(0)
        yield file


def _open(path: Path) -> BufferedReader:
    """Open a file for reading; a link is an error: what it names may lie anywhere."""
    return os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb")
