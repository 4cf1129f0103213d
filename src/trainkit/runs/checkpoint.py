"""Checkpoints on disk: written whole or not at all, verified before anything in them is read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import stat
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import torch

from trainkit.core.errors import CheckpointError, StorageError
from trainkit.core.paths import display_path
from trainkit.runs.snapshot import FORMAT, KEYS

STATE, MANIFEST = "state.pt", "manifest.json"
NAME = re.compile(r"step-\d{8,}")
TEMPORARY = re.compile(r"\.(step-\d{8,}|last|best)\.(new|replaced|deleted).*")
MAX_MANIFEST_BYTES = 1 << 16  # bytes


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
        if self.directory.is_symlink():
            cause = f"{self.directory} is a link, and what it names may be anybody's"
            raise CheckpointError(cause, hint="move the checkpoints there, or the whole run where there is room")
        if not self.directory.is_dir():
            return []
        found = [entry for entry in os.scandir(self.directory) if NAME.fullmatch(entry.name)]
        there = [entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
        return sorted(there, key=_step, reverse=True)

    def write(self, saved: Mapping[str, Any], *, planned: bool = True) -> str:
        """Write what `snapshot.remember` gave; returns its name.

        One of the same step is replaced, but not if it is of the same batch and fingerprint: then it is the same.

        Args:
            saved: from `snapshot.remember`.
            planned: at a moment that the run's config decides, and nothing that happens to it.

        Raises:
            StorageError: it cannot be written. Nothing that was there is touched.
        """
        name = name_of(saved["step"])
        which = {"step": saved["step"], "epoch": saved["epoch"], "batch": saved["batch"]}
        which["fingerprint"] = _sum(saved["fingerprint"])
        if self.is_valid(name):
            there = self._manifest(name)
            if which.items() <= there.items():
                self.point("last", name)
                return name
            planned |= bool(there.get("planned"))  # its weights are the same
        fresh, place = self.directory / f".{name}.new-{os.getpid()}", self.directory / name
        replaced = self.directory / f".{name}.replaced-{os.getpid()}"
        try:
            self.directory.mkdir(exist_ok=True)
            fresh.mkdir()
            files = {STATE: _write_state(fresh / STATE, saved)}
            manifest = {"format": FORMAT, **which, "planned": planned, "files": files}
            with (fresh / MANIFEST).open("w", encoding="utf-8") as file:
                json.dump({**manifest, "sha256": _sum(manifest)}, file, indent=2)
                _sync(file)
            _sync_directory(fresh)
            if os.path.lexists(place):
                place.rename(replaced)  # `clean` puts it back if this is as far as it gets
            fresh.rename(place)
            _sync_directory(self.directory)
            _remove(replaced)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            raise StorageError(
                f"{place} cannot be written: {error.strerror or error}",
                hint=f"the checkpoints before it are as they were: free that disk, then "
                f"trainkit resume {shlex.quote(display_path(self.directory.parent))}",
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
        if self.pointed(which) == name:
            return
        try:
            _remove(fresh)
            with fresh.open("x", encoding="utf-8") as file:  # never through a link that lies there
                file.write(f"{name}\n")
                _sync(file)
            fresh.replace(self.directory / which)
            _sync_directory(self.directory)
        except OSError as error:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise StorageError(f"{self.directory / which} cannot be written: {error.strerror or error}") from error

    def pointed(self, which: str) -> str | None:
        """The checkpoint that `last` or `best` names; None where it names none."""
        try:
            with _open(self.directory / which) as file:
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
        if type(saved.get("format")) is not int or saved["format"] != FORMAT:
            raise CheckpointError(
                f"{self.directory / name}: its format is {saved.get('format')!r}, this trainkit reads {FORMAT}",
                hint="resume it with the trainkit that wrote it: see versions in run.json",
            )
        lacking = [key for key in KEYS if key not in saved]
        if lacking:
            raise CheckpointError(f"{self.directory / name}: it lacks {', '.join(lacking)}", hint="use another")
        if saved["step"] != _step(name):
            raise DamagedError(f"it is of step {saved['step']!r}")
        self.valid.add(name)
        return saved

    def newest(self, *, planned: bool = False) -> tuple[str, dict[str, Any], list[str]]:
        """The newest checkpoint that is what was written: its name, its content, and what was passed over and why.

        Args:
            planned: only of those that were written when the config said so.

        Raises:
            CheckpointError: there is none.
        """
        passed: list[str] = []
        for name in self.names():
            try:
                if planned and self.is_valid(name) and not self._manifest(name).get("planned"):
                    continue
                return name, self.load(name), passed
            except DamagedError as error:
                passed.append(f"{name}: {error}")
        told = f"none can be used: {'; '.join(passed)}" if passed else "there is none"
        raise CheckpointError(f"{self.directory}: {told}", hint="start a new run")

    def is_valid(self, name: str) -> bool:
        """Whether a checkpoint is there and is what was written."""
        if name not in self.valid and name in self.names():
            with contextlib.suppress(DamagedError), _verified(self.directory / name):
                self.valid.add(name)
        return name in self.valid

    def _manifest(self, name: str) -> dict[str, Any]:
        """What the manifest of a valid checkpoint says."""
        with _open(self.directory / name / MANIFEST) as file:
            manifest: dict[str, Any] = json.loads(file.read(MAX_MANIFEST_BYTES))
        return manifest

    def prune(self, keep: int) -> None:
        """Delete what is older than the newest `keep` valid ones, but for the best and the newest planned one.

        Raises:
            StorageError: something cannot be deleted.
        """
        best, kept, planned = self.pointed("best"), 0, False
        for name in self.names():
            valid = (kept < keep or not planned) and self.is_valid(name)
            first_planned = valid and not planned and bool(self._manifest(name).get("planned"))
            planned |= first_planned
            if kept >= keep and name != best and not first_planned:
                try:
                    self._delete(name)
                except OSError as error:
                    cause = f"{self.directory / name} cannot be deleted: {error.strerror or error}"
                    raise StorageError(cause, hint="let it be deleted, or write checkpoint.keep=1000") from error
            elif valid and kept < keep:
                kept += 1

    def drop_after(self, name: str) -> None:
        """Delete what is of later steps than `name`: a course that was given up."""
        for later in self.names():
            if _step(later) > _step(name):
                self._delete(later)

    def sum_of(self, name: str) -> str:
        """What tells a checkpoint from another of the same step."""
        return str(self._manifest(name).get("sha256")) if self.is_valid(name) else ""

    def clean(self) -> None:
        """Put right what a process that was killed left half written, half replaced or half deleted."""
        for path in list(self.directory.iterdir()) if self.directory.is_dir() else ():
            found = TEMPORARY.fullmatch(path.name)
            if found and found[2] == "replaced" and not (self.directory / found[1]).exists():
                path.rename(self.directory / found[1])
            elif found:
                _remove(path)

    def _delete(self, name: str) -> None:
        old = self.directory / f".{name}.deleted-{os.getpid()}"
        (self.directory / name).rename(old)  # under its own name a checkpoint is whole, to the end
        self.valid.discard(name)
        _remove(old)


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
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, default=str).encode()).hexdigest()


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
            manifest = json.loads(file.read(MAX_MANIFEST_BYTES))
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


def name_of(step: Any) -> str:
    """The name of a checkpoint after so many steps."""
    return f"step-{step:08d}"


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _remove(path: Path) -> None:
    """Delete a file, a link itself, or a directory with all in it, as far as that is allowed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _open(path: Path) -> BufferedReader:
    """Open a file for reading; a link is an error (what it names may lie anywhere), and so is what is no file."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe would wait
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return os.fdopen(descriptor, "rb")
