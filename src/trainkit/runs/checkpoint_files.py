"""The files of one checkpoint: written with their checksums, verified before their content is read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from trainkit.core.atomic import open_regular_file, sync, sync_directory

STATE, MANIFEST = "state.pt", "manifest.json"
SHARDS = re.compile(r"__\d+_\d+\.distcp|\.metadata")  # the files of a sharded checkpoint, besides the state
MAX_MANIFEST_BYTES = 1 << 20
MAX_ITEMS, MAX_DEPTH = 5_000_000, 100  # of the containers in a state
MAX_SHARED = 16  # how often the tensors of a state may share their storages, on average
MIN_MEMORY = 1 << 28  # bytes; tensors may take this much in any case


class DamagedError(Exception):
    """A checkpoint differs from what was written; the message gives the reason."""


def write_checkpoint_files(
    folder: Path, saved: Mapping[str, Any], facts: Mapping[str, Any], more: Mapping[str, Any] | None = None
) -> None:
    """Write `state.pt` and then `manifest.json` into a folder, and sync both to the disk.

    The manifest comes last, so a folder with a manifest is complete.

    Args:
        folder: the folder.
        saved: the state that `snapshot.capture_state` returned.
        facts: further entries of the manifest, such as step and epoch.
        more: the files in the folder so far, with what `digest_file` returns for each.

    Raises:
        OSError: a file cannot be written.
    """
    manifest = {**facts, "files": {**(more or {}), STATE: _write_state(folder / STATE, saved)}}
    with (folder / MANIFEST).open("wb") as file:
        file.write(json.dumps({**manifest, "sha256": checksum(manifest)}, indent=2).encode())
        sync(file)
    sync_directory(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint that was verified."""
    with open_regular_file(folder / MANIFEST) as file:
        manifest: dict[str, Any] = json.loads(file.read(MAX_MANIFEST_BYTES))
    return manifest


@contextlib.contextmanager
def verified_state(folder: Path) -> Iterator[BufferedReader]:
    """Open the state of a checkpoint after comparing the size and sha256 of each file with the manifest.

    Raises:
        DamagedError: they differ, or a file is missing or not a regular file.
    """
    try:
        manifest = read_manifest(folder)
        if manifest.pop("sha256") != checksum(manifest):
            raise DamagedError(f"the sha256 in {MANIFEST} is not that of its content")
        shards = {name: wanted for name, wanted in manifest["files"].items() if name != STATE}
        if STATE not in manifest["files"] or not all(map(SHARDS.fullmatch, shards)):
            raise DamagedError(f"{MANIFEST} lists other files than {STATE}")
        for name, wanted in shards.items():
            if digest_file(folder / name) != wanted:
                raise DamagedError(f"{name} does not have the size and the sha256 in {MANIFEST}")
        size, wanted = manifest["files"][STATE]["size"], manifest["files"][STATE]["sha256"]
        file = open_regular_file(folder / STATE)
    except OSError as error:
        name = Path(error.filename or folder).name
        raise DamagedError(f"{name} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} is not readable: {type(error).__name__}") from error
    with file:
        found = file.seek(0, 2)
        file.seek(0)
        if found != size:
            raise DamagedError(f"{STATE} has {found:,} bytes, {MANIFEST} says {size!r}")
        try:
            if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
                raise DamagedError(f"the sha256 of {STATE} is not that in {MANIFEST}")
        except OSError as error:
            raise DamagedError(f"{STATE} cannot be read: {error.strerror or error}") from error
        file.seek(0)
        check_archive(file, found)
        file.seek(0)
        yield file


def check_containers(content: Any, size: int) -> None:
    """Raise `DamagedError` if loaded content is much larger than its file.

    A list that contains a list twice, which contains another list twice and so on, takes any time to read. Tensors
    that share a storage, or repeat its values, take any memory to copy.

    Args:
        content: what `torch.load` returned.
        size: the size of the file, in bytes.
    """
    sizes: dict[int, tuple[int, int]] = {}  # of each container, which is measured once however often it is repeated

    def measure(value: Any, depth: int) -> tuple[int, int]:
        """Return the number of items in a value, and the bytes of its tensors."""
        if isinstance(value, Tensor):
            return 1, value.numel() * value.element_size()
        if not isinstance(value, Mapping | list | tuple):
            return 1, 0
        if id(value) not in sizes:
            inside = value.values() if isinstance(value, Mapping) else value
            if depth == MAX_DEPTH:
                raise too_large
            found = [measure(item, depth + 1) for item in inside]
            sizes[id(value)] = 1 + sum(items for items, _ in found), sum(memory for _, memory in found)
        items, memory = sizes[id(value)]
        if items > MAX_ITEMS or memory > MAX_SHARED * size + MIN_MEMORY:
            raise too_large
        return items, memory

    too_large = DamagedError(f"the content of {STATE} is much larger than the file")
    measure(content, 0)


def digest_file(path: Path) -> dict[str, Any]:
    """Return the size and the sha256 of a regular file, as a manifest lists them."""
    with open_regular_file(path) as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": file.tell()}


def check_archive(file: IO[bytes], size: int) -> None:
    """Raise `DamagedError` if an archive would be unpacked to more bytes than it has.

    `torch.save` does not compress.
    """
    if file.read(4) != b"PK\3\4":  # the format of torch.save before 1.6, which it can load too
        raise DamagedError(f"{STATE} contains more than tensors and plain containers: it is not an archive")
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except Exception as error:  # a damaged directory of the archive
        raise DamagedError(f"{STATE} is not a readable archive") from error
    if unpacked > size:
        raise DamagedError(f"{STATE} has {size:,} bytes and would be unpacked to {unpacked:,}")


def checksum(content: Mapping[str, Any]) -> str:
    """Return the sha256 of a JSON object, independent of its formatting."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class _HashingFile:
    """A file for `torch.save` that counts and hashes what is written.

    It keeps an OSError for later: torch's writer would end the process.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.hash = file, 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        self.hash.update(data)
        self.size += size
        return size

    def flush(self) -> None:
        """Do nothing: the file is flushed once, at the end."""


def _write_state(path: Path, saved: Mapping[str, Any]) -> dict[str, Any]:
    with path.open("wb") as file:
        hashing = _HashingFile(file)
        torch.save(dict(saved), hashing)  # type: ignore[arg-type]  # torch.save needs only write and flush
        if hashing.error is not None:
            raise hashing.error
        sync(file)
    return {"size": hashing.size, "sha256": hashing.hash.hexdigest()}
