"""Loops raced against each other: one process each, an epoch each in turn, so that all meet the same weather.

A loop is a function `loop(job, lap)`. It sets up, calls `lap()` when it is ready, and `lap(loss)` after
each epoch: what passes between two laps is the epoch's time, all that the loop does in it included.
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

Loop = Callable[["Job", "Lap"], None]


@dataclass(frozen=True)
class Job:
    """What all loops of a race train: the toy CNN on images in an .npz file, by SGD."""

    data: str  # X (N, 3, H, W) uint8 and y (N,)
    batch_size: int
    epochs: int
    precision: str = "fp32"
    lr: float = 0.01
    seed: int = 0


class Lap:
    """The starter's side of a lane: reports an epoch's loss, and waits for the next start."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def __call__(self, loss: float | None = None) -> None:
        """Report, and wait."""
        self.connection.send(loss)
        self.connection.recv()


@dataclass
class Lane:
    """One loop in a race."""

    name: str
    loop: Loop
    job: Job
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    connection: Any = None
    process: Any = None

    @property
    def median(self) -> float:
        """Seconds of an epoch."""
        return statistics.median(self.seconds)


def race(lanes: Iterable[Lane], *, warm_up: int = 1) -> dict[str, Lane]:
    """Run all epochs of all loops, taking turns; the first `warm_up` epochs are not timed."""
    lanes = list(lanes)
    spawn = multiprocessing.get_context("spawn")
    for lane in lanes:
        lane.connection, theirs = spawn.Pipe()
        lane.process = spawn.Process(target=_run, args=(lane.loop, lane.job, theirs), daemon=True)
        lane.process.start()
        theirs.close()
        _receive(lane)
    try:
        for epoch in range(lanes[0].job.epochs):
            for lane in lanes:
                began = perf_counter()
                lane.connection.send("go")
                loss = _receive(lane)
                if epoch >= warm_up:
                    lane.seconds.append(perf_counter() - began)
                lane.losses.append(loss)
    finally:
        for lane in lanes:
            lane.process.kill()
    return {lane.name: lane for lane in lanes}


def _receive(lane: Lane) -> Any:
    try:
        answer = lane.connection.recv()
    except EOFError:
        raise SystemExit(f"{lane.name}: its process has ended") from None
    if isinstance(answer, str):
        raise SystemExit(f"{lane.name}: {answer}")
    return answer


def _run(loop: Loop, job: Job, connection: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        try:
            loop(job, Lap(connection))
        except (EOFError, BrokenPipeError):  # the race is off
            pass
        except BaseException:
            connection.send(traceback.format_exc())


# ------------------------------------------------------------------------------------------- the job


def images(count: int, data: str | None, folder: Path) -> str:
    """An .npz file of `count` images: the first of a file with X and y, else the digits over and over."""
    import numpy as np

    if data is None:
        from trainkit.data.datasets import digits

        x, y = (tensor.numpy() for tensor in digits().tensors)
    else:
        with np.load(data) as arrays:
            x, y = arrays["X"], arrays["y"]
    pick = np.arange(count) % len(x)
    file = folder / f"images{count}.npz"
    np.savez(file, X=x[pick], y=y[pick].astype(np.int64))
    return str(file)


def machine() -> str:
    """This machine and its software, in a line."""
    import torch

    cpu = platform.processor() or platform.machine()
    flags = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text()
        cpu = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), cpu)
        flags = ", ".join(flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in text.split())
    return f"{os.cpu_count()} cores of {cpu} ({flags}), torch {torch.__version__}, Python {platform.python_version()}"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
