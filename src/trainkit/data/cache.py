"""Data sets held in memory as they are read once, images as uint8: which of them, and how they get there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainkit.core.errors import DataError
from trainkit.core.pytree import leaves, map_tensors, structure_of, tensors_in
from trainkit.data import disk_cache as decoded
from trainkit.data.loaders import CachedDataset, Order, StreamingLoader, in_tensors, unreadable_sample
from trainkit.data.prepare import Prepare
from trainkit.data.reading import RandomSampleError, Read, SeededReader, UnequalSamplesError, collate, name_of

PROBES = 8  # samples that are read twice at first, to see whether they come out the same
CHECKED = 64  # samples that are read once more at last
UNSLICED = (torch.uint16, torch.uint32, torch.uint64)
BATCH = 256  # samples read at a time
UNEQUAL = "its samples have several shapes, types or keys"

OnProgress = Callable[[str, int, int], None]  # what is done, how many of how many samples


class NotCacheableError(Exception):
    """A data set cannot be held in memory; the reason completes "streamed: …"."""


def choose(
    dataset: Any, how: str, *, limit: int, workers: int, skip: bool, partly: bool, on_progress: OnProgress | None
) -> tuple[Any, str]:
    """The data set as it is read from now on, held in memory or not; what was done and why.

    Args:
        dataset: with a length and items.
        how: auto holds what fits; memory and device hold; none does not.
        limit: the most bytes that auto holds.
        workers: processes that read samples.
        skip: leave out samples that cannot be read.
        partly: an epoch does not read all of it.
        on_progress: is called as the reading goes on; without, only what is in memory already is held.

    Raises:
        DataError: it is to be held and cannot be; or a sample cannot be read.
    """
    by = f"streamed by {workers} worker{'s' * (workers > 1)}" if workers else "streamed by the training's own process"
    if how == "none":
        return dataset, f"{by}: data.cache=none"
    plain = in_tensors(dataset)
    if plain is not None:
        return dataset, f"in memory ({gib(nbytes(plain[0].tensors))})"
    try:
        held = in_arrays(dataset)
        if held is None and (on_progress is None or (partly and how == "auto")):
            return dataset, f"{by}: {'limit_batches leaves some of it unread' if partly else 'few of them are read'}"
        most = limit if how == "auto" else None
        held = held or hold(
            dataset, limit=most, workers=workers, skip=skip, on_progress=on_progress or (lambda *_: None)
        )
    except NotCacheableError as reason:
        if how == "auto":
            return dataset, f"{by}: {reason}"
        raise DataError(f"data.cache={how}: {reason}", hint="write data.cache=none") from None
    size = gib(nbytes(held.tensors))
    return held, f"in memory ({size}{', decoded by an earlier run' * held.decoded})"


def hold(dataset: Any, *, limit: int | None, workers: int, skip: bool, on_progress: OnProgress) -> CachedDataset:
    """Read a data set into memory.

    Args:
        dataset: with a length and items.
        limit: the most bytes that it may take; None: whatever it takes.
        workers: processes that read.
        skip: leave out samples that cannot be read.
        on_progress: is called as the reading goes on.

    Raises:
        NotHeldError: its samples are random, of several shapes, hold more than tensors, or take too much.
        DataError: a sample cannot be read.
    """
    inputs, targets = probe(dataset, limit, skip=skip)
    room = store(inputs, len(dataset), images=True), store(targets, len(dataset), images=False)
    file, state = decoded.file_of(dataset)
    state += f" {structure_of(sample_at(room, 0))}"
    if file is not None and decoded.load(file, state, tensors_in(room)):
        return CachedDataset(dataset, *room, {}, decoded=True)
    if workers and hasattr(os, "sched_getaffinity"):  # they are at it alone, so each core may have one
        workers = max(workers, len(os.sched_getaffinity(0)))
    missing = fill(dataset, room, workers=workers, skip=skip, on_progress=on_progress)
    read_again(dataset, room, missing, skip=skip)
    if file is not None and not missing:
        with suppress(OSError):  # a full or read-only disk: it is decoded again next time
            decoded.save(file, state, tensors_in(room))
    return CachedDataset(dataset, *room, missing)


def in_arrays(dataset: Any) -> CachedDataset | None:
    """A data set of torchvision's that has all of its images in an array, without reading them one by one."""
    kind = type(dataset)
    if not kind.__module__.startswith("torchvision.datasets.") or getattr(dataset, "transforms", None) is not None:
        return None
    data, targets = getattr(dataset, "data", None), getattr(dataset, "targets", None)
    if not isinstance(data, np.ndarray | Tensor) or len(data) != len(dataset) or targets is None:
        return None
    if torch.as_tensor(targets).dim() != 1:
        return None
    images = torch.as_tensor(data)
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
    held = CachedDataset(dataset, images, torch.as_tensor(targets, dtype=torch.int64), {})
    for index in {0, len(dataset) // 2, len(dataset) - 1}:  # it might do more to them
        inputs, target, *_ = collate(Read(dataset, [dataset[index]], [index], []))
        if not (inputs[0].equal(images[index]) and int(target[0]) == int(held.tensors[1][index])):
            return None
    return held


def probe(dataset: Any, limit: int | None, *, skip: bool) -> tuple[Any, Any]:
    """The first readable sample, after a look at whether the set can be held: a few are read twice."""
    reader = SeededReader(dataset, 0, skip=skip, alike=True)
    places = sorted({round(i * (len(dataset) - 1) / (PROBES - 1)) for i in range(PROBES)})
    found: list[tuple[Any, Any]] = []
    for epoch, place in ((epoch, place) for place in places for epoch in (0, 1)):
        try:
            inputs, targets, _, unreadable = collate(reader.__getitems__([(epoch, place)]))
        except RandomSampleError:
            raise NotCacheableError("its samples are drawn at random") from None
        except UnequalSamplesError:
            raise NotCacheableError(UNEQUAL) from None
        if unreadable and not skip:
            raise unreadable_sample(dataset, *unreadable[0])
        if inputs is None:
            continue
        for name, part in (("inputs", inputs), ("targets", targets)):
            other = next((type(leaf).__name__ for leaf in leaves(part) if not isinstance(leaf, Tensor)), "no tensor")
            if other != "no tensor" or not tensors_in(part):
                raise NotCacheableError(f"its {name} hold {other}, and only tensors are held")
        unsliced = next((tensor.dtype for tensor in tensors_in((inputs, targets)) if tensor.dtype in UNSLICED), None)
        if unsliced is not None:
            raise NotCacheableError(f"torch cannot slice {unsliced}")
        if any(tensor.requires_grad for tensor in tensors_in((inputs, targets))):
            raise NotCacheableError("its tensors require gradients")
        sample = sample_at((inputs, targets), 0)
        if epoch == 1 and found and not samples_equal(sample, found[-1]):
            raise NotCacheableError(f"{name_of(dataset, place)} is another each time it is read")
        if found and structure_of(sample) != structure_of(found[0]):
            raise NotCacheableError(UNEQUAL)
        found.append(sample)
        size = len(dataset) * nbytes(sample)
        if limit is not None and size > limit:
            raise NotCacheableError(f"it takes {gib(size)}, and {gib(limit)} may be held (data.cache_limit)")
    if not found:
        raise NotCacheableError("the samples that were tried cannot be read")
    return found[0]


def sample_at(batch: Any, place: int) -> Any:
    """A sample of a batch."""
    return map_tensors(batch, lambda tensor: tensor[place])


def samples_equal(one: Any, other: Any) -> bool:
    """Whether two samples hold the same, NaN being NaN."""
    return bool(structure_of(one) == structure_of(other)) and all(
        torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(tensors_in(one), tensors_in(other), strict=True)
    )


def nbytes(batch: Any) -> int:
    """What its tensors take, in bytes."""
    return sum(tensor.nbytes for tensor in tensors_in(batch))


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def store(sample: Any, count: int, *, images: bool) -> Any:
    """Room for `count` samples like one; images with channels last, the order in which convolutions are fastest."""

    def of_one(tensor: Tensor) -> Tensor:
        if tensor.dim() == 3 and images:
            channels, height, width = tensor.shape
            return torch.empty((count, height, width, channels), dtype=tensor.dtype).permute(0, 3, 1, 2)
        return torch.empty((count, *tensor.shape), dtype=tensor.dtype)

    return map_tensors(sample, of_one)


def fill(dataset: Any, room: tuple[Any, Any], *, workers: int, skip: bool, on_progress: OnProgress) -> dict[int, str]:
    """Read every sample into its place; returns those that could not be read, with why."""
    order = Order(len(dataset), BATCH, None, None)
    streaming = StreamingLoader(dataset, order, Prepare(torch.device("cpu")), workers, skip=skip, alike=True)
    missing: dict[int, str] = {}
    done = 0
    try:
        for inputs, targets, indices, unreadable in iter(streaming.loader):
            if unreadable and not skip:
                raise unreadable_sample(dataset, *unreadable[0])
            missing.update(unreadable)
            for whole in tensors_in(room):
                whole[[place for place, _ in unreadable]] = 0
            if inputs is not None:
                if structure_of(sample_at((inputs, targets), 0)) != structure_of(sample_at(room, 0)):
                    raise NotCacheableError(UNEQUAL)
                for whole, part in zip(tensors_in(room), tensors_in((inputs, targets)), strict=True):
                    whole[indices] = part
            done += len(indices) + len(unreadable)
            on_progress("reading samples", done, len(dataset))
    except RandomSampleError:
        raise NotCacheableError("its samples are drawn at random") from None
    except UnequalSamplesError:
        raise NotCacheableError(UNEQUAL) from None
    finally:
        streaming.close()
    return missing


def read_again(dataset: Any, room: tuple[Any, Any], missing: Mapping[int, str], *, skip: bool) -> None:
    """Read some samples once more: what draws from a generator of its own comes out another.

    Raises:
        NotHeldError: one does.
    """
    reader = SeededReader(dataset, 0, skip=skip)
    for place in sorted({round(i * (len(dataset) - 1) / (CHECKED - 1)) for i in range(CHECKED)} - {*missing}):
        inputs, targets, *_ = collate(reader.__getitems__([(1, place)]))
        if inputs is None or not samples_equal(sample_at((inputs, targets), 0), sample_at(room, place)):
            raise NotCacheableError(f"{name_of(dataset, place)} is another each time it is read")
