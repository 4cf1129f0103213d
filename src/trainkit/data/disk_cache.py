"""Samples on disk as they lie in memory, so that files need decoding once; what is there is whole, or not used."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1
ABANDONED = 3600.0  # seconds after which nobody writes to a file any more


def file_of(dataset: Any) -> tuple[Path | None, str]:
    """Where a data set's samples are kept once decoded, and a text that tells what they are made from.

    That is for those with an attribute `cache_as`: a name, and a text that changes when any file does.
    """
    named = getattr(dataset, "cache_as", None)
    if not (isinstance(named, tuple) and len(named) == 2 and all(isinstance(part, str) for part in named)):
        return None, ""
    try:
        folder = Path(os.environ.get("TRAINKIT_CACHE") or "~/.cache/trainkit").expanduser()
    except RuntimeError:  # there is no home
        return None, ""
    name = re.sub(r"[^\w.-]", "_", named[0])
    return folder / "decoded" / f"{name}.bin", hashlib.sha256(f"{FORMAT} {named[1]}".encode()).hexdigest()


def as_stored(room: Sequence[Tensor]) -> list[Tensor]:
    """Tensors in the order in which they lie in memory."""
    return [part if part.is_contiguous() else part.permute(0, 2, 3, 1) for part in room]


def facts(room: Sequence[Tensor], state: str) -> bytes:
    """The first line of a file that holds such samples."""
    parts = [[list(part.shape), str(part.dtype), part.is_contiguous()] for part in room]
    return json.dumps({"state": state, "parts": parts}).encode() + b"\n"


def pieces(room: Sequence[Tensor]) -> Iterator[memoryview]:
    """The memory of tensors, some samples at a time."""
    for part in as_stored(room):
        for piece in part.split(4096):
            if piece.numel():
                yield memoryview(piece.view(-1).view(torch.uint8).numpy()).cast("B")


def save(file: Path, state: str, room: Sequence[Tensor]) -> None:
    """Write samples as they lie in memory: a line that tells of them, the bytes, their checksum."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for left in file.parent.glob(f"{file.stem}*.tmp"):  # by a writer that was killed
        with suppress(FileNotFoundError):  # or by one that has just finished
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(facts(room, state))
            checksum = 0
            for piece in pieces(room):
                checksum = zlib.crc32(piece, checksum)
                out.write(piece)
            out.write(checksum.to_bytes(4, "little"))
            out.flush()
            os.fsync(out.fileno())
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(file: Path, state: str, room: Sequence[Tensor]) -> bool:
    """Fill the room with what `save` wrote; whether that was whole, and made from the same files."""
    wanted = facts(room, state)
    try:
        with file.open("rb") as source:
            if source.read(len(wanted)) != wanted:
                return False
            checksum = 0
            for piece in pieces(room):
                if source.readinto(piece) != len(piece):
                    return False
                checksum = zlib.crc32(piece, checksum)
            return source.read() == checksum.to_bytes(4, "little")
    except OSError:
        return False
