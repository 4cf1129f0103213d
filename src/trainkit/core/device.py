"""The device of a training, its precision and its memory."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from trainkit.core.errors import ConfigError


def select_device(name: str) -> torch.device:
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
        raise ConfigError(f"device={name}: this machine has {here}", hint="write device=auto")
    count = torch.accelerator.device_count()
    if device.type != "cpu" and (device.index or 0) >= count:
        raise ConfigError(
            f"device={name}: {device.type} devices here go from 0 to {count - 1}",
            hint=f"write device={device.type}:{count - 1}",
        )
    return device


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context of a forward pass and its loss: with bf16 and fp16, operations that bear it run in that type.

    Also sets whether matrix products and convolutions on CUDA may round float32 to tf32, which only
    `precision` tf32 allows; torch by itself allows convolutions to.

    Raises:
        ConfigError: the device has no such precision.
    """
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError(f"precision=tf32: {device.type} has no tf32", hint="write precision=bf16 or precision=fp32")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ConfigError("precision=bf16: this GPU is older than that", hint="write precision=fp16")
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, types[precision]) if precision in types else nullcontext()


def disable_malloc_trim() -> None:
    """Let the C library keep what is freed, where it is glibc; processes that call this take all they ever took.

    By itself it gives large blocks back at once, and every step would fault in its activations page by
    page anew: a quarter of a step of the toy CNN at a batch of 256. (Jemalloc, which torch's tuning guide
    recommends for this, would have to be loaded before Python.)
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no block apart from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and the heap does not shrink


def free_memory(device: torch.device) -> int:
    """The bytes that can still be had: of the device, or of this machine or its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4 * 2**30
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        group = Path("/proc/self/cgroup").read_text(encoding="ascii").rpartition("::")[2].strip()
        for folder in (Path("/sys/fs/cgroup") / group.lstrip("/"), Path("/sys/fs/cgroup")):
            most, used = (folder / "memory.max", folder / "memory.current")
            if most.exists() and most.read_text(encoding="ascii").strip() != "max":
                stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
                taken = int(used.read_text(encoding="ascii")) - int(stat.get("inactive_file", 0))  # files are let go of
                free = min(free, max(0, int(most.read_text(encoding="ascii")) - taken))
    except (OSError, ValueError, StopIteration):  # no Linux, or a container that hides it
        pass
    return free


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


def synchronize(device: torch.device) -> None:
    """Return when the device has done all it was given, so that a clock can be read."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch has a class of its own for accelerators only."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in str(error) or "DefaultCPUAllocator" in str(error))
    )


def empty_cache(device: torch.device) -> None:
    """Give back memory that the device's allocator keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
