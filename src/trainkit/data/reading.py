"""Reading samples: each draws at random from (seed, epoch, sample) alone; what cannot be read is told by name."""

from __future__ import annotations

import ctypes
import functools
import signal
import struct
import sys
import zipfile
import zlib
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, default_collate

from trainkit.core.pytree import structure_of
from trainkit.core.rng import GlobalGenerator, RngSnapshot

# What reading a sample raises where its file is at fault, not the code; PIL's own errors are known by their module.
UNREADABLE = (OSError, EOFError, SyntaxError, struct.error, zlib.error, zipfile.BadZipFile)


@functools.lru_cache
def epoch_seed(seed: int, epoch: int) -> int:
    """One seed out of two numbers, so that neighbours of either have nothing in common."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def name_of(dataset: Any, index: int) -> str:
    """A sample by its number in the whole data set, and by its file where the set tells of files."""
    while isinstance(dataset, Subset):
        index, dataset = dataset.indices[index], dataset.dataset
    dataset = getattr(dataset, "cached_from", dataset)  # of one that is held in memory
    for attribute in ("samples", "imgs", "files", "paths"):
        listed = getattr(dataset, attribute, None)
        if isinstance(listed, list | tuple) and index < len(listed):
            entry = listed[index]
            path = entry[0] if isinstance(entry, list | tuple) and entry else entry
            return f"sample {index} ({path})" if isinstance(path, str | PathLike) else f"sample {index}"
    return f"sample {index}"


@dataclass
class Read:
    """Samples that were read from a data set, the index of each, and those that could not be, each with why."""

    dataset: Any
    samples: list[Any]
    indices: list[int]
    unreadable: list[tuple[int, str]]


class SeededReader:
    """A data set whose samples draw at random from (seed, epoch, index), whichever process reads them.

    To seed Python's and NumPy's generators costs more than to read a small sample. So both are left alone until a
    batch has moved one: that batch is read again, and this generator seeded for each sample from then on.

    Args:
        dataset: with items.
        seed: the run's.
        skip: give every sample that raises an error as unreadable, not only those whose file is at fault.
        alike: raise `DrewError` where one draws at random, and so may be another in the next epoch, and
            `UnequalError` where one is of another form than the first.
    """

    def __init__(self, dataset: Any, seed: int, *, skip: bool, alike: bool = False) -> None:
        self.dataset, self.seed, self.skip, self.alike = dataset, seed, skip, alike
        self.in_batches = getattr(dataset, "__getitems__", None) and not isinstance(dataset, Subset)
        self.drawn_from: set[GlobalGenerator] = set()
        self.form: Any = None
        self.first = True

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Read:
        """The samples of a batch, each asked for by (epoch, index)."""
        if not self.first or self.in_batches or len(keys) < 2:
            return self._settled(keys)
        self.first = False  # what this one draws from, others will, and only it is read again
        one, others = self._settled(keys[:1]), self._settled(keys[1:])
        unreadable = one.unreadable + others.unreadable
        return Read(self.dataset, one.samples + others.samples, one.indices + others.indices, unreadable)

    def _settled(self, keys: list[tuple[int, int]]) -> Read:
        while True:
            failed = None
            rng = RngSnapshot()  # the reading of data must not advance the generators of the model
            try:
                try:
                    read = self._batch(keys) if self.in_batches else self._each(keys)
                except Exception as error:
                    failed = error
                finally:
                    new = rng.restore() - self.drawn_from
            except BaseException:  # a signal may have interrupted the restore
                rng.restore()
                raise
            if new and self.alike:
                raise RandomSampleError(f"sample {keys[0][1]}")
            if not new:
                break
            self.drawn_from |= new
        if failed is not None:
            raise failed
        return read

    def _batch(self, keys: list[tuple[int, int]]) -> Read:
        indices = [index for _, index in keys]
        self._seed(*keys[0])
        before = torch.get_rng_state()
        try:
            samples = self.dataset.__getitems__(indices)
        except Exception as error:
            if not (self.skip or at_fault(error)):
                raise
            return self._each(keys)  # which tells the sample
        if len(samples) != len(indices):
            raise ValueError(f"__getitems__ was asked for {len(indices)} samples and gave {len(samples)}")
        if self.alike:
            unmoved(before, indices[0])
            self._of_one_form(samples)
        return Read(self.dataset, samples, indices, [])

    def _each(self, keys: list[tuple[int, int]]) -> Read:
        read = Read(self.dataset, [], [], [])
        for epoch, index in keys:
            self._seed(epoch, index)
            before = torch.get_rng_state() if self.alike else None
            try:
                sample = self.dataset[index]
            except Exception as error:
                if not (self.skip or at_fault(error)):
                    raise
                read.unreadable.append((index, f"{type(error).__name__}: {' '.join(str(error).split())}"))
            else:
                read.samples.append(sample)
                read.indices.append(index)
            if before is not None:
                unmoved(before, index)
        if self.alike:
            self._of_one_form(read.samples)
        return read

    def _of_one_form(self, samples: list[Any]) -> None:
        for form in map(structure_of, samples):
            self.form = form if self.form is None else self.form
            if form != self.form:
                raise UnequalSamplesError(f"{self.form} and {form}")

    def _seed(self, epoch: int, index: int) -> None:
        # Within an epoch no two samples get the same 32 bits, which are all that torch's generator takes.
        number = zlib.crc32(index.to_bytes(8, "little"), epoch_seed(self.seed, epoch))
        torch.default_generator.manual_seed(number)
        for generator in self.drawn_from:
            generator.seed(number)


def at_fault(error: Exception) -> bool:
    """Whether reading failed for what a file holds."""
    return isinstance(error, UNREADABLE) or type(error).__module__.startswith("PIL.")


def unmoved(before: Tensor, index: int) -> None:
    """See to it that a sample has not drawn from torch's generator."""
    if not before.equal(torch.get_rng_state()):
        raise RandomSampleError(f"sample {index}")


class RandomSampleError(Exception):
    """A sample has drawn at random."""


def leave_signals_to_parent(_: int) -> None:
    """In a worker: a signal to the whole process group must not take the data from a step under way."""
    if sys.platform == "linux":  # what it ignores must not keep it alive once its parent is gone
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class UnequalSamplesError(ValueError):
    """Samples have several shapes, types or keys."""


def collate(read: Read) -> tuple[Any, Any, list[int], list[tuple[int, str]]]:
    """Samples to a batch, as torch does it; images of PIL become uint8 tensors (C, H, W).

    Returns:
        inputs, targets (both None where there are none), the indices of the samples in them, and those left out
        as unreadable, each with why.

    Raises:
        TypeError: a sample is no pair. (A plain error in one line: it may have to leave a worker process.)
        UnequalError: they do not fit into one batch.
    """
    if not read.samples:
        return None, None, read.indices, read.unreadable
    for sample in read.samples:
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            kind = type(sample).__name__
            raise TypeError(f"a sample is {kind}: let the data set's __getitem__ return a pair (inputs, target)")
    pairs = [(_as_tensor(inputs), _as_tensor(target)) for inputs, target in read.samples]
    try:
        inputs, targets = default_collate(pairs)
    except (RuntimeError, KeyError):  # torch's words differ between processes, and name neither sample
        forms = list(map(structure_of, pairs))
        other = next((place for place, form in enumerate(forms) if form != forms[0]), None)
        if other is None:
            raise
        names = [name_of(read.dataset, read.indices[place]) for place in (0, other)]
        shown = [text if len(text := str(forms[place])) < 80 else f"{text[:77]}..." for place in (0, other)]
        raise UnequalSamplesError(f"{names[0]} is {shown[0]}, {names[1]} is {shown[1]}") from None
    return inputs, targets, read.indices, read.unreadable


def _as_tensor(part: Any) -> Any:
    if hasattr(part, "getbands"):  # an image of PIL, which need not be imported to ask
        pixels = torch.from_numpy(np.array(part))
        return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    return part
