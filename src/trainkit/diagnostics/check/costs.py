"""Measure what a step costs the computing, the loader, the files and the network, for `scaling`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from trainkit.core.rng import preserve_rng
from trainkit.data.loaders import Loader, SlicingLoader, StreamingLoader
from trainkit.data.wrapped_loader import WrappedLoader
from trainkit.diagnostics.check.scaling import Costs
from trainkit.optim.layers import model_blocks
from trainkit.training.objects import Objects

SAMPLES = 16  # that are read to count the bytes of their files
READ_AHEAD = 2  # batches that each process of a `DataLoader` reads ahead
MAX_SECONDS = 1.0  # of the measurement of a loader


def measure_costs(
    objects: Objects,
    loader: Loader,
    batches: Iterator[Any],
    compute: float,
    num_workers: int,
    clock: Callable[[], float],
) -> Costs:
    """Return what a step costs.

    Args:
        objects: of the training.
        loader: of the training data.
        batches: of the loader, without end.
        compute: seconds of a step, without its wait for the loader.
        num_workers: processes that read samples.
        clock: returns the time after the device has finished its work.
    """
    ahead = num_workers > 0 and not isinstance(source_of(loader), SlicingLoader)
    return Costs(
        compute=compute,
        loader=seconds_of_loading(batches, 1 + READ_AHEAD * num_workers * ahead, clock),
        reads_ahead=ahead,
        read_bytes=bytes_of_files(loader),
        gradients=sum(param.nbytes for param in objects.trained.parameters() if param.requires_grad),
        gathered=gathered_bytes(objects.model),
        on_gpu=objects.device.type != "cpu",
    )


def source_of(loader: Loader) -> Loader:
    """Return the loader that reads the data, without the loaders around it."""
    return source_of(loader.loader) if isinstance(loader, WrappedLoader) else loader


def seconds_of_loading(
    batches: Iterator[Any], skipped: int, clock: Callable[[], float], limit: float = MAX_SECONDS
) -> float:
    """Return the seconds that a loader takes for a batch if nothing else runs.

    Args:
        batches: more batches than are needed.
        skipped: the number of first batches that do not count: processes have to start, or have read them ahead.
        clock: a monotonic clock in seconds.
        limit: the seconds after which the measurement ends.
    """
    began, seconds, count = clock(), 0.0, 0
    for number, _ in enumerate(batches, 1):
        seconds, count = clock() - began, number if number <= skipped else number - skipped
        if seconds >= limit:
            break
        if number == skipped:
            began = clock()
    return seconds / max(1, count)


def bytes_of_files(loader: Loader) -> float | None:
    """Return the bytes that a sample reads from files; 0 if the samples are in memory, None if unknown."""
    source = source_of(loader)
    if isinstance(source, SlicingLoader):
        return 0.0
    if not isinstance(source, StreamingLoader):  # a stream, whose position must not change
        return None
    samples = len(source.dataset)
    chosen = range(0, samples, max(1, samples // SAMPLES))[:SAMPLES]
    first, before = bytes_read(), bytes_read()  # the difference: to read the count is counted too
    try:
        with preserve_rng():
            for index in chosen:
                source.dataset[index]
    except Exception:  # the training reports a sample that cannot be read
        return None
    after = bytes_read()
    if first is None or before is None or after is None:
        return None
    return (after - before - (before - first)) / len(chosen)


def bytes_read() -> int | None:
    """Return the bytes that this process has read by system calls, from the disk or its cache; None if unknown."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))
    except (OSError, ValueError, StopIteration):  # not Linux
        return None


def gathered_bytes(model: nn.Module) -> int:
    """Return the bytes of weights that a forward and a backward pass gather if the weights are divided.

    The weights of blocks are gathered for each of both passes, and the others stay until the backward pass.
    """
    all_weights = sum(param.nbytes for param in model.parameters())
    of_blocks = {param for block in model_blocks(model) for param in block.parameters()}
    return all_weights + sum(param.nbytes for param in of_blocks)
