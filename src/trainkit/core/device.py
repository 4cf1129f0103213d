"""The device of a training: selection, precision and memory."""

from __future__ import annotations

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from trainkit.core.errors import ConfigError
from trainkit.core.memory import free_host_memory

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def select_device(name: str) -> torch.device:
    """Return the device that `name` (auto, cpu, cuda, cuda:N, mps) means on this machine.

    Raises:
        ConfigError: this machine does not have the device.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return found or torch.device("cpu")
    device = torch.device(name)
    if device.type != "cpu" and (found is None or found.type != device.type):
        here = f"cpu and {found.type}" if found else "only cpu"
        raise ConfigError(f"device={name}: this machine has {here}", hint="write device=auto")
    count = torch.accelerator.device_count()
    if device.type != "cpu" and (device.index or 0) >= count:
        raise ConfigError(
            f"device={name}: this machine has {device.type}:0 to {device.type}:{count - 1}",
            hint=f"write device={device.type}:{count - 1}",
        )
    return device


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context for a forward pass and its loss: eligible operations run in bf16 or fp16.

    Also allows tf32 for CUDA matrix products and convolutions if `precision` is tf32, and forbids it
    otherwise. (PyTorch's default allows tf32 for convolutions.)

    Raises:
        ConfigError: the device does not support the precision.
    """
    if precision == "tf32" and device.type != "cuda":
        cause = f"precision=tf32: {device.type} does not support tf32"
        raise ConfigError(cause, hint="write precision=bf16 or precision=fp32")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ConfigError("precision=bf16: this GPU does not support bf16", hint="write precision=fp16")
    return torch.autocast(device.type, DTYPES[precision]) if precision in DTYPES else nullcontext()


def disable_malloc_trim() -> None:
    """Make glibc keep freed memory, so that the process never returns memory to the system.

    By default, glibc returns large blocks at once. Every step then page-faults its activations in again,
    which takes a quarter of the step time of the toy CNN at batch size 256. The alternative in PyTorch's
    tuning guide, jemalloc, must be loaded before Python starts.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: allocate large blocks on the heap, without mmap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a CUDA device, else of this machine or its container."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_memory()


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of tensors on a CUDA device, else of this process; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out. PyTorch raises a plain RuntimeError on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in str(error) or "DefaultCPUAllocator" in str(error))
    )


def empty_cache(device: torch.device) -> None:
    """Release the memory that the CUDA allocator has cached but does not use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
