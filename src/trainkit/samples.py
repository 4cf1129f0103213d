"""Reading samples: each draws at random from (seed, epoch, sample) alone; what cannot be read is told by name."""

from __future__ import annotations

import ctypes
import functools
import random
import signal
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset, default_collate, get_worker_info

# What reading a sample raises where its file is at fault, not the code; PIL's own errors are known by their module.
UNREADABLE = (OSError, EOFError, SyntaxError, struct.error, zlib.error, zipfile.BadZipFile)

_outside: Any = None  # the generators as the model has them, while a sample is read


@functools.lru_cache
def epoch_seed(seed: int, epoch: int) -> int:
    """One seed out of two numbers, so that neighbours of either have nothing in common."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def seed_sample(seed: int, epoch: int, index: int) -> None:
    """Let what a sample draws from Python's, NumPy's and torch's generators depend on these three alone."""
    # Within an epoch no two samples get the same 32 bits, which are all that torch's generator takes.
    number = zlib.crc32(index.to_bytes(8, "little"), epoch_seed(seed, epoch))
    random.seed(number)
    np.random.seed(zlib.crc32(b"numpy", number))  # whose generator is torch's: of the same seed they would agree
    torch.default_generator.manual_seed(number)


@contextmanager
def draws_kept() -> Iterator[None]:
    """Put the generators of this process back afterwards: reading data does not move the model's draws."""
    global _outside
    _outside = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        put_back_draws()


def put_back_draws() -> None:
    """End `draws_kept`, which an interrupt may leave at any place, once more."""
    global _outside
    if _outside is not None:
        random.setstate(_outside[0])
        np.random.set_state(_outside[1])
        torch.set_rng_state(_outside[2])
    _outside = None


def name_of(dataset: Any, index: int) -> str:
    """A sample by its number in the whole data set, and by its file where the set tells of files."""
    while hasattr(dataset, "indices"):
        index, dataset = dataset.indices[index], getattr(dataset, "dataset", None)
    for attribute in ("samples", "imgs", "files", "paths"):
        listed = getattr(dataset, attribute, None)
        if isinstance(listed, list | tuple) and index < len(listed):
            entry = listed[index]
            path = entry[0] if isinstance(entry, list | tuple) and entry else entry
            return f"sample {index} ({path})" if isinstance(path, str | PathLike) else f"sample {index}"
    return f"sample {index}"


class Seeded:
    """A data set whose samples draw at random from (seed, epoch, index), whichever process reads them.

    Args:
        dataset: with items.
        seed: the run's.
        skip: give every sample that raises an error as `Unreadable`, not only those whose file is at fault.
    """

    def __init__(self, dataset: Any, seed: int, *, skip: bool) -> None:
        self.dataset, self.seed, self.skip = dataset, seed, skip
        self.in_batches = getattr(dataset, "__getitems__", None) and not isinstance(dataset, Subset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Any]:
        """The samples of a batch, each asked for by (epoch, index)."""
        with draws_kept() if get_worker_info() is None else nullcontext():
            if self.in_batches:
                seed_sample(self.seed, *keys[0])
                return list(self.dataset.__getitems__([index for _, index in keys]))
            return [self._read(*key) for key in keys]

    def _read(self, epoch: int, index: int) -> Any:
        seed_sample(self.seed, epoch, index)
        try:
            return self.dataset[index]
        except Exception as error:
            at_fault = isinstance(error, UNREADABLE) or type(error).__module__.startswith("PIL.")
            if not (self.skip or at_fault):
                raise
            return Unreadable(index, f"{type(error).__name__}: {' '.join(str(error).split())}")


@dataclass(frozen=True)
class Unreadable:
    """What stands for a sample that could not be read, and why."""

    index: int
    why: str


def leave_signals_to_parent(_: int) -> None:
    """In a worker: a signal to the whole process group must not take the data from a step under way."""
    if sys.platform == "linux":  # what it ignores must not keep it alive once its parent is gone
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def collate(samples: list[Any]) -> tuple[Any, Any, list[tuple[int, str]]]:
    """Samples to a batch, as torch does it; images of PIL become uint8 tensors (C, H, W).

    Returns:
        inputs, targets (both None where there are none), and the indices left out as unreadable, each with why.

    Raises:
        TypeError: a sample is no pair. (A plain error in one line: it may have to leave a worker process.)
    """
    unreadable = [(sample.index, sample.why) for sample in samples if isinstance(sample, Unreadable)]
    samples = [sample for sample in samples if not isinstance(sample, Unreadable)]
    if not samples:
        return None, None, unreadable
    for sample in samples:
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            kind = type(sample).__name__
            raise TypeError(f"a sample is {kind}: let the data set's __getitem__ return a pair (inputs, target)")
    inputs, targets = default_collate([tuple(_as_tensor(part) for part in sample) for sample in samples])
    return inputs, targets, unreadable


def _as_tensor(part: Any) -> Any:
    if hasattr(part, "getbands"):  # an image of PIL, which need not be imported to ask
        pixels = torch.from_numpy(np.array(part))
        return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    return part
