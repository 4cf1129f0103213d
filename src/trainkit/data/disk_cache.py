"""Decoded samples on disk, so that image files are decoded once. A file is used only if it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from trainkit.core.atomic import atomic_write

FORMAT = 1
ABANDONED = 3600.0  # seconds after which a temporary file is left over from a killed writer


def file_of(dataset: Any) -> tuple[Path | None, str]:
    """Return the cache file of a data set, and a key that changes when its files change.

    Only data sets with an attribute `cache_as` have one: a name, and a text that identifies their content.
    """
    named = getattr(dataset, "cache_as", None)
    if not (isinstance(named, tuple) and len(named) == 2 and all(isinstance(part, str) for part in named)):
        return None, ""
    folder = cache_folder()
    if folder is None:
        return None, ""
    name = re.sub(r"[^\w.-]", "_", named[0])
    return folder / "decoded" / f"{name}.bin", hashlib.sha256(f"{FORMAT} {named[1]}".encode()).hexdigest()


def cache_folder() -> Path | None:
    """Return the folder of all caches; None: the user has no home directory."""
    try:
        return Path(os.environ.get("TRAINKIT_CACHE") or "~/.cache/trainkit").expanduser()
    except RuntimeError:
        return None


def save(file: Path, key: str, tensors: Sequence[Tensor]) -> None:
    """Write tensors to a file: a header line, the bytes as they are in memory, their CRC-32.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    for left in file.parent.glob(f"{file.stem}*.tmp"):
        with suppress(FileNotFoundError):  # its writer has just finished
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()

    def write(out: IO[bytes]) -> None:
        out.write(_header(tensors, key))
        checksum = 0
        for chunk in _chunks(tensors):
            checksum = zlib.crc32(chunk, checksum)
            out.write(chunk)
        out.write(checksum.to_bytes(4, "little"))

    # Several processes may write the same file, so each has its own temporary name.
    atomic_write(file, write, temporary=file.with_name(f"{file.stem}-{uuid.uuid4().hex}.tmp"))


def load(file: Path, key: str, tensors: Sequence[Tensor]) -> bool:
    """Fill tensors from a file that `save` wrote; return whether the file was complete and has this key."""
    wanted = _header(tensors, key)
    try:
        with file.open("rb") as source:
            if source.read(len(wanted)) != wanted:
                return False
            checksum = 0
            for chunk in _chunks(tensors):
                if source.readinto(chunk) != len(chunk):
                    return False
                checksum = zlib.crc32(chunk, checksum)
            return source.read() == checksum.to_bytes(4, "little")
    except OSError:
        return False


def _header(tensors: Sequence[Tensor], key: str) -> bytes:
    parts = [[list(tensor.shape), str(tensor.dtype), tensor.is_contiguous()] for tensor in tensors]
    return json.dumps({"state": key, "parts": parts}).encode() + b"\n"


def _chunks(tensors: Sequence[Tensor]) -> Iterator[memoryview]:
    """Yield the memory of tensors, some samples at a time, in the order in which it is stored."""
    for tensor in tensors:
        stored = tensor if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1)
        for chunk in stored.split(4096):
            if chunk.numel():
                yield memoryview(chunk.view(-1).view(torch.uint8).numpy()).cast("B")
