"""Hold a part of a data set in memory, and estimate what holding the whole set costs a run."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.utils.data import Subset

from trainkit.build.session import Session
from trainkit.core.device import free_memory
from trainkit.core.errors import TrainkitError
from trainkit.data import disk_cache
from trainkit.data.batch_order import BatchOrder
from trainkit.data.cache import read_into_memory
from trainkit.data.cacheable import NotCacheableError
from trainkit.data.flow import FlowingLoader
from trainkit.data.loaders import Loader, SlicingLoader, StreamingLoader
from trainkit.data.sample_errors import base_of
from trainkit.data.store import Store

FEW, MANY = 256, 1024  # samples that are read; the difference gives the seconds of a sample
MAX_SECONDS = 2.0  # of the first read; if it takes longer, no more samples are read
CACHE_RATE = 1e9  # bytes per second of decoded samples from the disk, checksum included


@dataclass
class Held:
    """What holding a data set in memory costs.

    Attributes:
        read_seconds: to read the whole set.
        extra_bytes: of the whole set, less the part that the check holds.
    """

    read_seconds: float = 0.0
    extra_bytes: int = 0


def hold_part(session: Session, loader: Loader, part: str) -> tuple[Loader, Held] | None:
    """Return a loader of some samples in memory, and what all samples cost; None if the run streams the samples.

    Args:
        session: that does not hold the samples, because it was built for a few steps.
        loader: the loader of the data set.
        part: `train` or `val`.
    """
    if isinstance(loader, FlowingLoader):
        held = hold_part(session, loader.loader, part)
        return None if held is None else (FlowingLoader(held[0], loader.steps), held[1])
    data = session.settings.data
    limited = session.settings.limit_batches if part == "train" else session.settings.limit_val_batches
    if not isinstance(loader, StreamingLoader) or data.cache in (None, "none"):
        return None
    if loader.form.collate is not None or (limited is not None and data.cache == "auto"):
        return None
    samples = len(loader.dataset)
    try:
        store, seconds = _read(session, loader, part, min(FEW, samples))
        rate, count = seconds / len(store), len(store)
        if count < samples and seconds < MAX_SECONDS:
            first, few = seconds, count
            store, seconds = _read(session, loader, part, min(MANY, samples))
            count = len(store)
            rate = max(0.0, seconds - first) / (count - few)
    except (NotCacheableError, TrainkitError):  # an error is reported where the training reads the samples
        return None
    whole = round(store.nbytes * samples / count)
    read_seconds = seconds + rate * (samples - count)
    file, _ = disk_cache.file_of(base_of(loader.dataset))
    if file is not None and file.exists():
        read_seconds = min(read_seconds, whole / CACHE_RATE)
    device = session.state.objects.device
    if device.type != "cpu" and data.cache != "memory":
        store = store.to(device)
    order = BatchOrder(count, loader.order.batch_size, None, 0 if part == "train" else None)
    return SlicingLoader(store, order, loader.prepare), Held(read_seconds, whole - store.nbytes)


def _read(session: Session, loader: StreamingLoader, part: str, count: int) -> tuple[Store, float]:
    """Read `count` samples, evenly spaced, into memory; return them and the seconds that it took.

    Raises:
        NotCacheableError: the run streams this data set.
    """
    data, samples = session.settings.data, len(loader.dataset)
    chosen = [round(i * (samples - 1) / max(1, count - 1)) for i in range(count)]
    store = Store(Subset(loader.dataset, chosen), key=f"data.{part}", form=loader.form)
    limit = free_memory(torch.device("cpu")) / 2 if data.cache_limit == "auto" else data.cache_limit * 2**30
    began = time.perf_counter()
    store = read_into_memory(
        store,
        limit=int(limit * count / samples) if data.cache == "auto" else None,
        workers=data.num_workers,
        skip=data.on_unreadable == "skip",
        on_progress=lambda *_: None,
    )
    return store, time.perf_counter() - began
