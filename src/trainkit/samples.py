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
from torch import Tensor
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
    while isinstance(dataset, Subset):
        index, dataset = dataset.indices[index], dataset.dataset
    dataset = getattr(dataset, "held_from", dataset)  # of one that is held in memory
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
        alike: raise `DrewError` where one draws at random, and so may be another in the next epoch.
    """

    def __init__(self, dataset: Any, seed: int, *, skip: bool, alike: bool = False) -> None:
        self.dataset, self.seed, self.skip, self.alike = dataset, seed, skip, alike
        self.in_batches = getattr(dataset, "__getitems__", None) and not isinstance(dataset, Subset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Any]:
        """The samples of a batch, each asked for by (epoch, index), each with its index."""
        with draws_kept() if get_worker_info() is None else nullcontext():
            if self.in_batches:
                indices = [index for _, index in keys]
                with self._watched(*keys[0]):
                    return list(zip(indices, self.dataset.__getitems__(indices), strict=True))
            return [(index, self._read(epoch, index)) for epoch, index in keys]

    def _read(self, epoch: int, index: int) -> Any:
        try:
            with self._watched(epoch, index):
                return self.dataset[index]
        except DrewError:
            raise
        except Exception as error:
            at_fault = isinstance(error, UNREADABLE) or type(error).__module__.startswith("PIL.")
            if not (self.skip or at_fault):
                raise
            return Unreadable(index, f"{type(error).__name__}: {' '.join(str(error).split())}")

    @contextmanager
    def _watched(self, epoch: int, index: int) -> Iterator[None]:
        seed_sample(self.seed, epoch, index)
        before = _draws() if self.alike else None
        yield
        if self.alike and before != _draws():
            raise DrewError(f"sample {index}")


class DrewError(Exception):
    """A sample has drawn at random."""


def _draws() -> tuple[Any, ...]:
    """What any draw from Python's, NumPy's or torch's generator changes."""
    numpys = np.random.get_state(legacy=False)
    place = numpys["state"]["key"].tobytes(), numpys["state"]["pos"], numpys["has_gauss"]
    return random.getstate()[1:], place, torch.get_rng_state().numpy().tobytes()


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


def collate(indexed: list[tuple[int, Any]]) -> tuple[Any, Any, Tensor, list[tuple[int, str]]]:
    """Samples to a batch, as torch does it; images of PIL become uint8 tensors (C, H, W).

    Returns:
        inputs, targets (both None where there are none), the indices of the samples in them, and those left out
        as unreadable, each with why.

    Raises:
        TypeError: a sample is no pair. (A plain error in one line: it may have to leave a worker process.)
    """
    unreadable = [(sample.index, sample.why) for _, sample in indexed if isinstance(sample, Unreadable)]
    indices = torch.tensor([index for index, sample in indexed if not isinstance(sample, Unreadable)])
    samples = [sample for _, sample in indexed if not isinstance(sample, Unreadable)]
    if not samples:
        return None, None, indices, unreadable
    for sample in samples:
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            kind = type(sample).__name__
            raise TypeError(f"a sample is {kind}: let the data set's __getitem__ return a pair (inputs, target)")
    inputs, targets = default_collate([tuple(_as_tensor(part) for part in sample) for sample in samples])
    return inputs, targets, indices, unreadable


def _as_tensor(part: Any) -> Any:
    if hasattr(part, "getbands"):  # an image of PIL, which need not be imported to ask
        pixels = torch.from_numpy(np.array(part))
        return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    return part
