"""Find out whether a data set can be held in memory: its samples are constant, alike, and made of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from trainkit.core.memory import format_bytes
from trainkit.core.pytree import leaves, structure_of, tensors_in
from trainkit.data.pairs import Pair, map_pair, tensors_in_pair
from trainkit.data.reading import SeededReader, collate, name_of
from trainkit.data.sample_errors import MixedTargetsError, RandomSampleError, UnequalSamplesError
from trainkit.data.store import Store
from trainkit.data.unreadable import unreadable_sample_error

PROBES = 8  # the number of samples that are read twice before the data set is read
VERIFIED = 64  # the number of samples that are read again after the data set was read
UNSLICEABLE = (torch.uint16, torch.uint32, torch.uint64)  # dtypes that torch cannot slice
UNEQUAL = "its samples differ in shape, type or keys"
MIXED = "only a part of its samples have their inputs as target"


class NotCacheableError(Exception):
    """A data set cannot be held in memory; the message completes the sentence "streamed: ..."."""


def check_cacheable(empty: Store, limit: int | None, *, skip: bool) -> Pair:
    """Return the first readable sample if the data set can be held. A few samples are read twice to find out.

    Raises:
        NotCacheableError: see `read_into_memory`.
        DataError: a sample cannot be read and may not be skipped.
    """
    dataset = empty.dataset
    reader = SeededReader(dataset, 0, skip=skip, constant=True, form=empty.form)
    indices = sorted({round(i * (len(dataset) - 1) / (PROBES - 1)) for i in range(PROBES)})
    samples: list[Pair] = []
    for index in indices:
        for epoch in (0, 1):
            sample = _probe(reader, epoch, index, empty.key)
            if sample is None:
                continue
            if epoch == 1 and samples and not samples_equal(sample, samples[-1]):
                raise NotCacheableError(f"{name_of(dataset, index)} differs between reads")
            if samples:
                require_same_kind(sample, samples[0])
            samples.append(sample)
            size = len(dataset) * sum(tensor.nbytes for tensor in tensors_in_pair(sample))
            if limit is not None and size > limit:
                needed, allowed = format_bytes(size), format_bytes(limit)
                raise NotCacheableError(f"it needs {needed}, and data.cache_limit allows {allowed}")
    if not samples:
        raise NotCacheableError("the probed samples cannot be read")
    return samples[0]


def require_same_kind(sample: Pair, first: Pair) -> None:
    """Check that a sample has the structure of the first sample, and its inputs as target if the first sample has.

    Raises:
        NotCacheableError: the samples differ.
    """
    if structure_of(sample) != structure_of(first):
        raise NotCacheableError(UNEQUAL)
    if (sample[1] is sample[0]) != (first[1] is first[0]):
        raise NotCacheableError(MIXED)


def _probe(reader: SeededReader, epoch: int, index: int, key: str) -> Pair | None:
    """Return a sample, its inputs and target, or None if it cannot be read and may be skipped."""
    with reasons_to_stream():
        batch = collate(reader.__getitems__([(epoch, index)]), reader.form)
    if batch.unreadable and not reader.skip:
        raise unreadable_sample_error(key, reader.dataset, *batch.unreadable[0])
    if batch.inputs is None:
        return None
    for name, part in (("inputs", batch.inputs), ("targets", batch.targets)):
        other = next((type(leaf).__name__ for leaf in leaves(part) if not isinstance(leaf, Tensor)), None)
        if other is not None or not tensors_in(part):
            raise NotCacheableError(f"its {name} contain {other or 'no tensor'}, and only tensors can be held")
    tensors = tensors_in_pair(batch.pair)
    unsliceable = next((tensor.dtype for tensor in tensors if tensor.dtype in UNSLICEABLE), None)
    if unsliceable is not None:
        raise NotCacheableError(f"torch cannot slice {unsliceable}")
    if any(tensor.requires_grad for tensor in tensors):
        raise NotCacheableError("its tensors require gradients")
    return sample_of(batch.pair, 0)


@contextmanager
def reasons_to_stream() -> Iterator[None]:
    """Turn the errors of a reader of constant samples into `NotCacheableError`."""
    try:
        yield
    except RandomSampleError:
        raise NotCacheableError("its samples are random") from None
    except UnequalSamplesError:
        raise NotCacheableError(UNEQUAL) from None
    except MixedTargetsError:
        raise NotCacheableError(MIXED) from None


def verify_by_rereading(empty: Store, tensors: Pair, unreadable: Mapping[int, str], *, skip: bool) -> None:
    """Read some samples again: a data set with a private generator yields different values.

    Raises:
        NotCacheableError: a sample differs.
    """
    dataset = empty.dataset
    reader = SeededReader(dataset, 0, skip=skip, form=empty.form)
    for index in sorted({round(i * (len(dataset) - 1) / (VERIFIED - 1)) for i in range(VERIFIED)} - {*unreadable}):
        batch = collate(reader.__getitems__([(1, index)]), empty.form)
        if batch.inputs is None or not samples_equal(sample_of(batch.pair, 0), sample_of(tensors, index)):
            raise NotCacheableError(f"{name_of(dataset, index)} differs between reads")


def sample_of(pair: Pair, index: int) -> Pair:
    """Return a sample of a batch."""
    return map_pair(pair, lambda tensor: tensor[index])


def samples_equal(one: Pair, other: Pair) -> bool:
    """Return whether two samples are equal; NaN equals NaN."""
    return bool(structure_of(one) == structure_of(other)) and all(
        torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(tensors_in(one), tensors_in(other), strict=True)
    )
