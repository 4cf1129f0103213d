"""The device a training runs on, and the seeds it starts from."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from trainkit.errors import ConfigError


def pick(name: str) -> torch.device:
    """The device that `name` (auto, cpu, cuda, cuda:N, mps) stands for here.

    Raises:
        ConfigError: this machine has no such device.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return found or torch.device("cpu")
    device = torch.device(name)
    if device.type != "cpu" and (found is None or found.type != device.type):
        here = f"cpu and {found.type}" if found else "cpu alone"
        raise ConfigError(f"device={name}: this machine has {here}", mend="write device=auto")
    count = torch.accelerator.device_count()
    if device.type != "cpu" and (device.index or 0) >= count:
        raise ConfigError(
            f"device={name}: {device.type} devices here go from 0 to {count - 1}",
            mend=f"write device={device.type}:{count - 1}",
        )
    return device


def seed_all(seed: int, *, deterministic: bool) -> None:
    """Seed Python's, NumPy's and torch's generators, and choose whether bits must repeat."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # to set it imports torch's compiler
        torch.use_deterministic_algorithms(deterministic)


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators, in plain containers and tensors."""
    version, numbers, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    words = torch.from_numpy(np.asarray(keys).astype(np.int64))
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), words, int(place), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the generators where `random_state` saw them."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, words, place, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), place, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    for index, generator in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(generator, index)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Let what happens inside draw at random without moving the generators."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: the device's, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def wait(device: torch.device) -> None:
    """Return when the device has done all it was given, so that a clock can be read."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch has a class of its own for accelerators only."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in str(error) or "DefaultCPUAllocator" in str(error))
    )


def release(device: torch.device) -> None:
    """Give back memory that the device's allocator keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
