"""Read data sets into memory once, images as uint8."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainkit.core.device import free_memory
from trainkit.core.errors import DataError
from trainkit.core.file_lock import locked
from trainkit.core.paths import display_path
from trainkit.core.pytree import map_tensors, structure_of
from trainkit.data import disk_cache
from trainkit.data.batch_order import BatchOrder
from trainkit.data.cacheable import (
    NotCacheableError,
    check_cacheable,
    reasons_to_stream,
    require_same_kind,
    sample_of,
    verify_by_rereading,
)
from trainkit.data.form import PAIRS, SampleForm
from trainkit.data.loaders import StreamingLoader, start_reading
from trainkit.data.pairs import Pair, tensors_in_pair
from trainkit.data.prepare import Prepare
from trainkit.data.reading import ReadSamples, collate
from trainkit.data.store import Store
from trainkit.data.unreadable import unreadable_sample_error

READ_BATCH = 256  # samples read at a time

OnProgress = Callable[[str, int, int], None]  # (what is done, samples done, samples in all)


def make_store(
    dataset: Any,
    cache: str,
    device: torch.device,
    *,
    limit: int,
    workers: int,
    skip: bool,
    partial: bool,
    on_progress: OnProgress | None,
    key: str = "data.train",
    form: SampleForm = PAIRS,
) -> Store:
    """Decide where the samples of a data set are stored, and read them there.

    Args:
        dataset: has a length and items.
        cache: `auto` holds a data set that fits, on the device if it fits there. `memory` and `device` hold it
            there in any case. `none` streams it.
        device: the device of the training.
        limit: the maximum number of bytes that `auto` holds in memory.
        workers: processes that read samples.
        skip: skip samples that cannot be read.
        partial: an epoch reads only a part of the data set.
        on_progress: is called while samples are read. None: read nothing, hold only what is in memory already.
        key: the config key of the data set, for messages.
        form: which parts of a sample are the inputs and the targets, and how samples become a batch.

    Raises:
        DataError: the data set cannot be held but must be; or a sample cannot be read.
    """
    empty = Store(dataset, key=key, form=form)
    store = _hold_or_stream(
        empty, cache, limit=limit, workers=workers, skip=skip, partial=partial, on_progress=on_progress
    )
    if store.tensors is None or device.type == "cpu" or cache == "memory":
        return store
    fits = store.nbytes <= free_memory(device) / 2
    return store.to(device) if fits or cache == "device" else store


def _hold_or_stream(
    empty: Store,
    cache: str,
    *,
    limit: int,
    workers: int,
    skip: bool,
    partial: bool,
    on_progress: OnProgress | None,
) -> Store:
    """Return a store in memory, or a streamed one with the reason; see `make_store`."""
    dataset, form = empty.dataset, empty.form
    streamed_by = f"streamed by {workers} worker{'s' * (workers > 1)}" if workers else "streamed by the main process"
    if cache == "none":
        return replace(empty, note=f"{streamed_by}: data.cache=none")
    if form.collate is not None:
        if cache != "auto":
            cause = f"data.cache={cache}: data.collate makes each batch anew, so its samples are streamed"
            raise DataError(cause, hint="write data.cache=auto")
        return replace(empty, note=f"{streamed_by}: data.collate makes each batch anew")
    store = Store.of(dataset, form)
    if store.tensors is not None:
        return replace(store, key=empty.key)
    tensors = torchvision_arrays(dataset) if form == PAIRS else None
    if tensors is not None:
        return replace(empty, tensors=tensors)
    if on_progress is None or (partial and cache == "auto"):
        reason = "limit_batches leaves a part unread" if partial else "this command reads few samples"
        return replace(empty, note=f"{streamed_by}: {reason}")
    try:
        maximum = limit if cache == "auto" else None
        return read_into_memory(empty, limit=maximum, workers=workers, skip=skip, on_progress=on_progress)
    except NotCacheableError as reason:
        if cache == "auto":
            return replace(empty, note=f"{streamed_by}: {reason}")
        raise DataError(f"data.cache={cache}: {reason}", hint="write data.cache=none") from None


def read_into_memory(
    empty: Store,
    *,
    limit: int | None,
    workers: int,
    skip: bool,
    on_progress: OnProgress,
) -> Store:
    """Read a data set into memory.

    Decoded images are kept on disk. If several processes of a machine start at the same time, such as ranks or the jobs
    of a sweep, one of them decodes. The others wait for it and load its file.

    Args:
        empty: the store of the data set, without tensors.
        limit: the maximum number of bytes; None: no limit.
        workers: processes that read samples.
        skip: skip samples that cannot be read.
        on_progress: is called while samples are read.

    Raises:
        NotCacheableError: samples are random, differ in structure, contain more than tensors, or need too much memory.
        DataError: a sample cannot be read.
    """
    dataset = empty.dataset
    tensors = allocate_samples(check_cacheable(empty, limit, skip=skip), len(dataset))
    file, content = disk_cache.file_of(dataset)
    content += f" {structure_of(sample_of(tensors, 0))}" + (f" {empty.form}" if empty.form != PAIRS else "")
    read = functools.partial(_read_and_verify, empty, tensors, workers=workers, skip=skip, on_progress=on_progress)
    if file is None:
        return read()
    loaded = replace(empty, tensors=tensors, note=", decoded by an earlier run")
    if disk_cache.load(file, content, tensors_in_pair(tensors)):
        return loaded

    def on_wait() -> None:
        on_progress("waiting for another process that reads samples", 0, len(dataset))

    with locked(file.with_suffix(".lock"), on_wait) as lock:
        if disk_cache.load(file, content, tensors_in_pair(tensors)):
            return replace(loaded, note=", decoded by another process") if lock.waited else loaded
        if not lock.waited:
            store = read()
            return store if store.unreadable else _keep(store, file, content)
    return read()  # the other process kept no file, so it does not help to wait for further processes


def _keep(store: Store, file: Path, content: str) -> Store:
    """Write decoded samples to the disk; return the store with a note if this is not possible."""
    try:
        disk_cache.save(file, content, tensors_in_pair(store.tensors))
    except OSError as error:  # the disk is full or read-only
        reason = error.strerror or type(error).__name__
        return replace(store, note=f", decoded by each process: {display_path(file.parent)}: {reason}")
    return store


def _read_and_verify(empty: Store, tensors: Pair, *, workers: int, skip: bool, on_progress: OnProgress) -> Store:
    """Read every sample of a data set into its row of `tensors`."""
    if workers and hasattr(os, "sched_getaffinity"):  # nothing else runs yet, so each core may have a worker
        workers = max(workers, len(os.sched_getaffinity(0)))
    unreadable = fill(tensors, empty, workers=workers, skip=skip, on_progress=on_progress)
    verify_by_rereading(empty, tensors, unreadable, skip=skip)
    return replace(empty, tensors=tensors, unreadable=unreadable)


def torchvision_arrays(dataset: Any) -> tuple[Tensor, Tensor] | None:
    """Return the images and classes of a torchvision data set that holds them in arrays, else None.

    Three samples are compared with the arrays, as a data set may change its samples when it reads them.

    Shape: images (N, C, H, W) uint8, classes (N,) int64.
    """
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
    classes = torch.as_tensor(targets, dtype=torch.int64)
    for index in {0, len(dataset) // 2, len(dataset) - 1}:
        batch = collate(ReadSamples(dataset, [dataset[index]], [index], []))
        if not (batch.inputs[0].equal(images[index]) and int(batch.targets[0]) == int(classes[index])):
            return None
    return images, classes


def allocate_samples(sample: Pair, count: int) -> Pair:
    """Return uninitialised tensors with room for `count` samples of the structure of `sample`.

    A tensor of three dimensions in the inputs counts as an image (C, H, W). Images are stored with channels last, the
    fastest order for convolutions.
    """

    def allocate(tensor: Tensor) -> Tensor:
        return torch.empty((count, *tensor.shape), dtype=tensor.dtype)

    def allocate_images(tensor: Tensor) -> Tensor:
        if tensor.dim() != 3:
            return allocate(tensor)
        channels, height, width = tensor.shape
        return torch.empty((count, height, width, channels), dtype=tensor.dtype).permute(0, 3, 1, 2)

    inputs, target = sample
    allocated = map_tensors(inputs, allocate_images)
    return allocated, allocated if target is inputs else map_tensors(target, allocate)


def fill(tensors: Pair, empty: Store, *, workers: int, skip: bool, on_progress: OnProgress) -> dict[int, str]:
    """Read every sample into its row of `tensors`; return index -> reason for samples that cannot be read."""
    dataset, key = empty.dataset, empty.key
    order = BatchOrder(len(dataset), READ_BATCH, None, None)
    prepare = Prepare(torch.device("cpu"))
    streaming = StreamingLoader(dataset, order, prepare, workers, skip=skip, constant=True, form=empty.form)
    unreadable: dict[int, str] = {}
    done = 0
    try:
        with reasons_to_stream():
            for batch in start_reading(streaming.loader):
                if batch.unreadable and not skip:
                    raise unreadable_sample_error(key, dataset, *batch.unreadable[0])
                unreadable.update(batch.unreadable)
                for tensor in tensors_in_pair(tensors):
                    tensor[[index for index, _ in batch.unreadable]] = 0
                if batch.inputs is not None:
                    require_same_kind(sample_of(batch.pair, 0), sample_of(tensors, 0))
                    for tensor, part in zip(tensors_in_pair(tensors), tensors_in_pair(batch.pair), strict=True):
                        tensor[batch.indices] = part
                done += len(batch.indices) + len(batch.unreadable)
                on_progress("reading samples", done, len(dataset))
    finally:
        streaming.close()
    return unreadable
