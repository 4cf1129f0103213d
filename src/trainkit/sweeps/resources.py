"""How many jobs this machine carries at a time, by its cores, GPUs and memory. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainkit.core.errors import ConfigError
from trainkit.core.memory import free_host_memory

FIRST_ESTIMATE = 2**30  # bytes of a job, until a job has shown that it needs more


@dataclass(frozen=True)
class Capacity:
    """The jobs at a time, and what each job gets.

    Attributes:
        slots: a GPU for each job at a time; None: the job uses no GPU of its own.
        threads: of torch in each job.
    """

    slots: list[str | None]
    threads: int


def measure_capacity(n_jobs: Any, jobs_per_gpu: Any, jobs: int, device: str) -> Capacity:
    """Return how many of some jobs run at a time.

    Args:
        n_jobs: the maximum, or `auto`.
        jobs_per_gpu: the jobs that share a GPU.
        jobs: the number of jobs.
        device: the config key `device` of the jobs.

    Raises:
        ConfigError: `n_jobs` or `jobs_per_gpu` is not a positive whole number.
    """
    limit = None if n_jobs == "auto" else _positive("n_jobs", n_jobs)
    shared = _positive("jobs_per_gpu", jobs_per_gpu)
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdecimal() and int(given) > 0 else None
    gpus = visible_gpus() if device == "auto" or device == "cuda" else []
    slots: list[str | None] = [gpu for _ in range(shared) for gpu in gpus]
    if not gpus:
        slots = [None] * max(1, limit or cores() // (threads or 1))
    slots = slots[: max(1, min(limit or len(slots), jobs))]
    return Capacity(slots, threads or max(1, cores() // len(slots)))


def cores() -> int:
    """Return the number of cores that this process may use."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # the limit of a container
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(found, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return found


def visible_gpus() -> list[str]:
    """Return the names of the CUDA devices that this process may use, as in `CUDA_VISIBLE_DEVICES`."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        valid = [name for name in names if name and name != "-1"]
        return valid if valid == names else []
    folder = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number, _ in enumerate(folder.iterdir())] if folder.is_dir() else []


class MemoryGuard:
    """Decides whether another job fits into the free memory, by the memory of the jobs so far."""

    def __init__(self) -> None:
        self.need = FIRST_ESTIMATE

    def allows(self, pids: Iterable[int]) -> bool:
        """Return whether a further job fits beside running jobs, which may still grow.

        Args:
            pids: the processes of the running jobs.
        """
        used = [resident_memory(pid) for pid in pids]
        self.need = max(self.need, *used, 0)
        growth = sum(self.need - size for size in used)
        return free_host_memory() - growth >= self.need


def resident_memory(pid: int) -> int:
    """Return the bytes of a process in memory; 0 if the system does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):  # the process has ended, or this is not Linux
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _positive(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        also = " or auto" if name == "n_jobs" else ""
        raise ConfigError(
            f"hydra.launcher.{name}={value}: expected a whole number above 0{also}",
            hint=f"write hydra.launcher.{name}=N",
        )
    return value
