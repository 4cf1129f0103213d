"""Compare training loops: each loop has its own process, and the loops take turns, an epoch each.

So all loops see the same load of the machine. A loop is a function `loop(job, report)`. It sets up, calls
`report()` when it is ready, and calls `report(loss)` after each epoch. The time between two reports is the time of
the epoch.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

Loop = Callable[["Job", "Reporter"], None]


@dataclass(frozen=True)
class Job:
    """What all loops of a comparison train: by default the toy CNN on images in an .npz file, with SGD."""

    data: str  # .npz file with X (N, 3, H, W) uint8 and y (N,); for the GPT, the number of windows of text
    batch_size: int
    epochs: int
    precision: str = "fp32"
    lr: float = 0.01
    seed: int = 0
    model: str = "toy_cnn"  # toy_cnn, resnet18 or char_gpt


class Reporter:
    """Reports the loss of an epoch to the main process and waits until the loop may continue."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def __call__(self, loss: float | None = None) -> None:
        """Report a loss, or None if the loop is ready for its first epoch; then wait."""
        self.connection.send(loss)
        self.connection.recv()


@dataclass
class Entry:
    """One loop of a comparison, with its results."""

    name: str
    loop: Loop
    job: Job
    seconds: list[float] = field(default_factory=list)  # of each timed epoch
    losses: list[float] = field(default_factory=list)  # of each epoch
    connection: Any = None
    process: Any = None

    @property
    def median(self) -> float:
        """Median seconds of an epoch."""
        return statistics.median(self.seconds)

    def ratio(self, reference: Entry) -> str:
        """Return the speed relative to another loop: the median over the turns, and the quartiles."""
        ratios = [other / own for own, other in zip(self.seconds, reference.seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"

    def loss_difference(self, reference: Entry) -> float:
        """Return the largest relative difference between the losses of two loops."""
        return max(abs(a - b) / b for a, b in zip(self.losses, reference.losses, strict=True))


def run_interleaved(entries: Iterable[Entry], *, warm_up: int = 1) -> dict[str, Entry]:
    """Run all epochs of all loops in turns; return the entries by name. The first `warm_up` epochs are not timed."""
    entries = list(entries)
    spawn = multiprocessing.get_context("spawn")
    for entry in entries:
        entry.connection, remote = spawn.Pipe()
        entry.process = spawn.Process(target=_run_loop, args=(entry.loop, entry.job, remote), daemon=True)
        entry.process.start()
        remote.close()
        _receive(entry)
    try:
        for epoch in range(entries[0].job.epochs):
            for entry in entries:
                began = perf_counter()
                entry.connection.send("continue")
                loss = _receive(entry)
                if epoch >= warm_up:
                    entry.seconds.append(perf_counter() - began)
                entry.losses.append(loss)
    finally:
        for entry in entries:
            entry.process.kill()
    return {entry.name: entry for entry in entries}


def _receive(entry: Entry) -> Any:
    """Return the loss that a loop reports; exit with its traceback if it has failed."""
    try:
        message = entry.connection.recv()
    except EOFError:
        raise SystemExit(f"{entry.name}: its process has ended") from None
    if isinstance(message, str):
        raise SystemExit(f"{entry.name}: {message}")
    return message


def _run_loop(loop: Loop, job: Job, connection: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            loop(job, Reporter(connection))
        except (EOFError, BrokenPipeError):  # the main process has ended
            pass
        except BaseException:
            connection.send(traceback.format_exc())


# --------------------------------------------------------------------------------- inputs and output


def make_images_file(count: int, data: str | None, folder: Path, enlarge: int = 1) -> str:
    """Write an .npz file of `count` images and return its path.

    Args:
        count: the number of images; the source is repeated if it has fewer.
        data: an .npz file with X and y as the source; None for the digits.
        folder: for the new file.
        enlarge: each pixel becomes a square with sides of this number of pixels.
    """
    import numpy as np

    if data is None:
        from trainkit.data.datasets import digits

        x, y = (tensor.numpy() for tensor in digits().tensors)
    else:
        with np.load(data) as arrays:
            x, y = arrays["X"], arrays["y"]
    rows = np.arange(count) % len(x)
    file = folder / f"images{count}.npz"
    np.savez(file, X=x[rows].repeat(enlarge, axis=2).repeat(enlarge, axis=3), y=y[rows].astype(np.int64))
    return str(file)


def describe_machine() -> str:
    """Return the processor, the torch version and the Python version as a line."""
    import torch

    cpu = platform.processor() or platform.machine()
    flags = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text()
        cpu = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), cpu)
        flags = ", ".join(flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in text.split())
    return f"{os.cpu_count()} cores of {cpu} ({flags}), torch {torch.__version__}, Python {platform.python_version()}"


def markdown_table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
