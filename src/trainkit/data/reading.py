"""Reads samples: seeds the random numbers of each by (seed, epoch, sample), and reports those that cannot be read."""

from __future__ import annotations

import ctypes
import functools
import signal
import struct
import sys
import zipfile
import zlib
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Subset

from trainkit.core.pytree import structure_of
from trainkit.core.rng import TORCH_GENERATOR, GlobalGenerator, SeparateGenerators
from trainkit.core.signals import SIGNALS
from trainkit.data.collate import list_as_tensors, stack
from trainkit.data.form import PAIRS, SampleForm
from trainkit.data.pairs import Pair, map_pair, target_is_inputs
from trainkit.data.sample_errors import (
    BY_COLLATE,
    MixedTargetsError,
    RandomSampleError,
    UnequalSamplesError,
    base_of,
    unequal_samples_error,
)
from trainkit.data.streams import is_stream

# Errors that a damaged or missing file causes, rather than the code. PIL's own errors are recognised by their module.
FILE_ERRORS = (OSError, EOFError, SyntaxError, struct.error, zlib.error, zipfile.BadZipFile)


@functools.lru_cache
def epoch_seed(seed: int, epoch: int) -> int:
    """Return one 32-bit seed for (seed, epoch); neighbouring pairs give unrelated seeds."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def name_of(dataset: Any, index: int) -> str:
    """Return the name of a sample: its number in the whole data set, and its file if the data set lists files."""
    file = file_of(dataset, index)
    while isinstance(dataset, Subset):
        index, dataset = dataset.indices[index], dataset.dataset
    return f"sample {index}" if file is None else f"sample {index} ({file})"


def file_of(dataset: Any, index: int) -> str | PathLike[str] | None:
    """Return the file of a sample if the data set lists files, else None. A stream may list files of many samples."""
    if is_stream(dataset):
        return None
    while isinstance(dataset, Subset):
        index, dataset = dataset.indices[index], dataset.dataset
    for attribute in ("samples", "imgs", "files", "paths"):
        listed = getattr(dataset, attribute, None)
        if isinstance(listed, list | tuple) and index < len(listed):
            entry = listed[index]
            path = entry[0] if isinstance(entry, list | tuple) and entry else entry
            return path if isinstance(path, str | PathLike) else None
    return None


@dataclass
class ReadSamples:
    """Samples read from a data set, their indices, and (index, reason) of those that cannot be read."""

    dataset: Any
    samples: list[Any]
    indices: list[int]
    unreadable: list[tuple[int, str]]


class SeededReader:
    """A data set whose random samples depend on (seed, epoch, index) alone, whichever process reads them.

    Seeding a generator costs more than reading a small sample. So the generators of Python, NumPy and torch are seeded
    only after a batch has advanced one of them. That batch is read again, and from then on the generator is seeded for
    each sample. Before that, torch's generator is seeded for each batch, because some code reads its seed.

    Args:
        dataset: has items.
        seed: the seed of the run.
        skip: report every sample that raises an error as unreadable, not only file errors.
        constant: require samples that are equal in each epoch: raise `RandomSampleError` if a sample draws random
            numbers, `UnequalSamplesError` if its structure differs from that of the first sample, and
            `MixedTargetsError` if only one of both has its inputs as target.
        form: which parts of a sample are the inputs and the targets.
    """

    def __init__(
        self, dataset: Any, seed: int, *, skip: bool, constant: bool = False, form: SampleForm = PAIRS
    ) -> None:
        self.dataset, self.seed, self.skip, self.constant, self.form = dataset, seed, skip, constant, form
        self.reads_batches = getattr(dataset, "__getitems__", None) and not isinstance(dataset, Subset)
        self.separate = SeparateGenerators()  # reading data must not advance the generators of the model
        self.seeded: set[GlobalGenerator] = set()  # generators that samples draw from
        self.structure: Any = None  # of the first sample
        self.same: bool | None = None  # whether the first sample's target is its inputs
        self.is_first_batch = True

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[tuple[int, int]]) -> ReadSamples:
        """Read the samples of a batch, each given by (epoch, index)."""
        if not self.is_first_batch or self.reads_batches or len(keys) < 2:
            return self._read(keys)
        self.is_first_batch = False  # its first sample shows which generators are used, and is read twice alone
        one, others = self._read(keys[:1]), self._read(keys[1:], seed_key=keys[0])
        unreadable = one.unreadable + others.unreadable
        return ReadSamples(self.dataset, one.samples + others.samples, one.indices + others.indices, unreadable)

    def _read(self, keys: list[tuple[int, int]], seed_key: tuple[int, int] | None = None) -> ReadSamples:
        """Read samples; read them again while they advance generators that were not seeded.

        Args:
            keys: (epoch, index) of each sample.
            seed_key: that of the first sample of the batch, which seeds torch; None: the first of `keys`.
        """
        while True:
            read, failed = None, None
            with self.separate.active():
                TORCH_GENERATOR.seed(self._seed_of(*(seed_key or keys[0])))
                before = self.separate.states()
                try:
                    read = self._read_batch(keys) if self.reads_batches else self._read_each(keys)
                except Exception as error:
                    failed = error
                after = self.separate.states()
            new = {generator for generator in before if after[generator] != before[generator]} - self.seeded
            if new and self.constant:
                raise RandomSampleError(f"sample {keys[0][1]}")
            if not new:
                break
            self.seeded |= new
        if read is None:
            assert failed is not None
            raise failed
        if self.constant:
            self._require_structure(read.samples)
        return read

    def _read_batch(self, keys: list[tuple[int, int]]) -> ReadSamples:
        """Read samples by the data set's own `__getitems__`; read each by itself if that fails."""
        indices = [index for _, index in keys]
        self._seed(*keys[0])
        try:
            samples = self.dataset.__getitems__(indices)
        except Exception as error:
            if not (self.skip or is_file_error(error)):
                raise
            return self._read_each(keys)  # finds the unreadable sample
        if len(samples) != len(indices):
            raise ValueError(f"__getitems__ got {len(indices)} indices and returned {len(samples)} samples")
        return ReadSamples(self.dataset, samples, indices, [])

    def _read_each(self, keys: list[tuple[int, int]]) -> ReadSamples:
        read = ReadSamples(self.dataset, [], [], [])
        for epoch, index in keys:
            if self.seeded:
                self._seed(epoch, index)
            try:
                sample = self.dataset[index]
            except Exception as error:
                if not (self.skip or is_file_error(error)):
                    error.add_note(self._note(index, error))
                    raise
                read.unreadable.append((index, f"{type(error).__name__}: {' '.join(str(error).split())}"))
            else:
                read.samples.append(sample)
                read.indices.append(index)
        return read

    def _note(self, index: int, error: Exception) -> str:
        """Return the line that an error's message adds: which sample raised the error."""
        count = len(base_of(self.dataset))
        note = f"raised while {name_of(self.dataset, index)} of {count} was read"
        return f"{note}; {count} is the length that __len__ returns" if isinstance(error, IndexError) else note

    def _require_structure(self, samples: list[Any]) -> None:
        for structure in map(structure_of, samples):
            self.structure = structure if self.structure is None else self.structure
            if structure != self.structure:
                raise UnequalSamplesError(f"{self.structure} and {structure}")
        for same in (target_is_inputs(self.form.pair(sample, self.dataset)) for sample in samples):
            self.same = same if self.same is None else self.same
            if same != self.same:
                raise MixedTargetsError

    def _seed(self, epoch: int, index: int) -> None:
        number = self._seed_of(epoch, index)
        for generator in self.seeded:
            generator.seed(number)

    def _seed_of(self, epoch: int, index: int) -> int:
        # torch's generator uses 32 bits of the seed; CRC-32 gives each sample of an epoch different bits.
        return zlib.crc32(index.to_bytes(8, "little"), epoch_seed(self.seed, epoch))


def is_file_error(error: Exception) -> bool:
    """Return whether a damaged or missing file caused an error, rather than the code."""
    return isinstance(error, FILE_ERRORS) or type(error).__module__.startswith("PIL.")


def ignore_signals(_: int) -> None:
    """Ignore signals in a worker process: its parent handles them, and its current step needs the data."""
    if sys.platform == "linux":  # a worker that ignores signals must still end with its parent
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see `delay_signals`


@dataclass
class CollatedBatch:
    """A batch that the reading process made of `ReadSamples`.

    Attributes:
        inputs: the inputs of the samples, None if no sample could be read.
        targets: the targets of the samples; the same object as `inputs` if each target is its inputs.
        indices: the indices of the samples.
        unreadable: (index, reason) of the samples that cannot be read.
    """

    inputs: Any
    targets: Any
    indices: list[int]
    unreadable: list[tuple[int, str]]

    @property
    def pair(self) -> Pair:
        """Inputs and targets."""
        return self.inputs, self.targets

    def pin_memory(self) -> CollatedBatch:
        """Return the batch in pinned memory; torch's `DataLoader` calls this method."""
        inputs, targets = map_pair(self.pair, Tensor.pin_memory)
        return replace(self, inputs=inputs, targets=targets)


def collate(read: ReadSamples, form: SampleForm = PAIRS) -> CollatedBatch:
    """Collate samples into a batch, as torch or `form.collate` does; PIL images become uint8 tensors (C, H, W).

    Raises:
        NotAPairError: a sample is not a pair.
        SampleFormError: a sample lacks a key.
        UnequalSamplesError: the samples do not fit into one batch.
    """
    if not read.samples:
        return CollatedBatch(None, None, read.indices, read.unreadable)
    if form.collate is not None:
        try:
            batch = form.collate(read.samples)
        except Exception as error:
            error.add_note(f"{BY_COLLATE} for a batch of {len(read.samples)} samples")
            raise
        return CollatedBatch(*form.pair_of_batch(batch, read.dataset, len(read.samples)), read.indices, read.unreadable)
    pairs = form.pairs(read.samples, read.dataset)
    inputs = list_as_tensors([pair[0] for pair in pairs])
    same = target_is_inputs(pairs[0]) and all(map(target_is_inputs, pairs))
    targets = inputs if same else list_as_tensors([pair[1] for pair in pairs])
    try:
        collated = stack(inputs)
        return CollatedBatch(collated, collated if same else stack(targets), read.indices, read.unreadable)
    except (RuntimeError, KeyError):  # torch's message depends on the process, and does not name the samples
        parts = list(zip(inputs, targets, strict=True))
        structures = list(map(structure_of, parts))
        other = next((place for place, structure in enumerate(structures) if structure != structures[0]), None)
        if other is None:
            raise
        names = [name_of(read.dataset, read.indices[place]) for place in (0, other)]
        raise unequal_samples_error(read.dataset, names, [parts[0], parts[other]]) from None
