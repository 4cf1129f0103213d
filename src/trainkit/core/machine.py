"""The cores and the GPUs of this machine, and how many processes train together on it. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from trainkit.core.errors import ConfigError
from trainkit.core.rank_variables import is_rank

GPU_DEVICES = ("auto", "cuda")  # values of the key `device` that let each process have a GPU


def cores() -> int:
    """Return the number of cores that this process may use."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # the limit of a container
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(found, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return found


def threads_of_environment() -> int | None:
    """Return the threads of each process that `OMP_NUM_THREADS` sets; None: it sets none."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) > 0 else None


def visible_gpus() -> list[str]:
    """Return the names of the CUDA devices that this process may use, as in `CUDA_VISIBLE_DEVICES`."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        valid = [name for name in names if name and name != "-1"]
        return valid if valid == names else []
    folder = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number, _ in enumerate(folder.iterdir())] if folder.is_dir() else []


def number_of_processes(devices: int | Literal["all"], device: str) -> int:
    """Return how many processes train a model together on this machine: one for each device.

    Args:
        devices: the config key.
        device: the config key.

    Raises:
        ConfigError: this machine does not have so many GPUs.
    """
    gpus = visible_gpus() if device in GPU_DEVICES else []
    if devices == "all":
        if not gpus:
            hint = "write devices=N to train with N processes on the CPU"
            raise ConfigError("devices=all: this machine has no NVIDIA GPU", hint=hint)
        return len(gpus)
    if devices > 1 and 0 < len(gpus) < devices:
        found = f"{len(gpus)} GPU{'s' * (len(gpus) > 1)}"
        raise ConfigError(f"devices={devices}: this machine has {found}", hint="write devices=all, or device=cpu")
    return devices


def processes_to_start(devices: int | Literal["all"], device: str) -> int:
    """Return how many processes a command starts for a training; 1: it trains itself.

    A process that torchrun started trains itself, as one of the ranks.

    Args:
        devices: the config key.
        device: the config key.

    Raises:
        ConfigError: this machine does not have so many GPUs, or torchrun started another number of processes.
    """
    if not is_rank():
        return number_of_processes(devices, device)
    started = [int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")]
    if devices not in (1, *started) and (devices != "all" or number_of_processes(devices, device) not in started):
        cause = f"devices={devices}: torchrun has started {started[0]} process{'es' * (started[0] > 1)}"
        raise ConfigError(cause, hint="leave out devices: torchrun --nproc-per-node sets the number")
    return 1


def unused_gpus_note(device: str) -> str | None:
    """Return a note if a training in one process leaves GPUs of this machine unused."""
    number = 0 if is_rank() or device not in GPU_DEVICES else len(visible_gpus())
    return f"note: this machine has {number} GPUs, and 1 is used; devices=all uses them all" if number > 1 else None
