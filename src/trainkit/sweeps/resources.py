"""How many jobs this machine carries at a time, by its cores, GPUs and memory. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from trainkit.core.errors import ConfigError
from trainkit.core.machine import GPU_DEVICES, cores, number_of_processes, threads_of_environment, visible_gpus
from trainkit.core.memory import free_host_memory

FIRST_ESTIMATE = 2**30  # bytes of a job, until a job has shown that it needs more


@dataclass(frozen=True)
class Capacity:
    """The jobs at a time, and what each job gets.

    Attributes:
        slots: a GPU for each process at a time; None: the process uses no GPU of its own. A job has a process, and
            so a slot, for each of its devices.
        threads: of torch in each process.
        jobs: the maximum number of jobs at a time.
    """

    slots: list[str | None]
    threads: int
    jobs: int = sys.maxsize

    def take(self, free: list[str | None], devices: int) -> list[str | None]:
        """Remove the slots of a job from the free slots, and return them; [] if the job has to wait.

        The processes of a job never share a GPU. A job that needs more than there is gets everything.

        Args:
            free: the free slots, which are changed.
            devices: of the job.
        """
        has_gpus = None not in self.slots
        offered = list(dict.fromkeys(free)) if has_gpus else list(free)
        number = min(devices, len(set(self.slots)) if has_gpus else len(self.slots))
        if len(offered) < number:
            return []
        for slot in offered[:number]:
            free.remove(slot)
        return offered[:number]


def measure_capacity(n_jobs: Any, jobs_per_gpu: Any, jobs: int, device: str, devices: int = 1) -> Capacity:
    """Return how many of some jobs run at a time.

    Args:
        n_jobs: the maximum, or `auto`.
        jobs_per_gpu: the jobs that share a GPU.
        jobs: the number of jobs.
        device: the config key `device` of the jobs.
        devices: the devices of the job that uses most.

    Raises:
        ConfigError: `n_jobs` or `jobs_per_gpu` is not a positive whole number.
    """
    limit = None if n_jobs == "auto" else _positive("n_jobs", n_jobs)
    shared = _positive("jobs_per_gpu", jobs_per_gpu)
    threads = threads_of_environment()
    gpus = visible_gpus() if device in GPU_DEVICES else []
    slots: list[str | None] = [gpu for _ in range(shared) for gpu in gpus]
    if not gpus:
        slots = [None] * max(1, limit * devices if limit else cores() // (threads or 1))
    most = max(1, min(limit or len(slots), len(slots) // devices, jobs))
    if not gpus:
        slots = slots[: most * devices]
    return Capacity(slots, threads or max(1, cores() // min(len(slots), most * devices)), most)


def most_devices(config: DictConfig, overrides: Iterable[str]) -> int:
    """Return the devices of the job that uses most, by the config of a sweep and the overrides of its jobs.

    Raises:
        ConfigError: this machine does not have so many GPUs.
    """
    given = {text.partition("=")[2] for text in overrides if text.startswith("devices=")}
    values = [config.get("devices", 1), *(int(value) if value.isdecimal() else value for value in given)]
    return max(devices_of(DictConfig({"devices": value, "device": config.get("device")})) for value in values)


def devices_of(config: DictConfig) -> int:
    """Return how many devices a job uses, by its config; 1 if the value is wrong, which the job reports itself.

    Raises:
        ConfigError: this machine does not have so many GPUs.
    """
    devices = config.get("devices", 1)  # a config that an older version saved lacks the key
    is_valid = devices == "all" or (type(devices) is int and devices > 0)
    return number_of_processes(devices, str(config.get("device"))) if is_valid else 1


class MemoryGuard:
    """Decides whether another job fits into the free memory, by the memory of the jobs so far."""

    def __init__(self) -> None:
        self.need = FIRST_ESTIMATE

    def allows(self, jobs: Iterable[Sequence[int]]) -> bool:
        """Return whether a further job fits beside running jobs, which may still grow.

        Args:
            jobs: the processes of each running job.
        """
        used = [sum(map(resident_memory, pids)) for pids in jobs]
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


def children_of(pid: int) -> list[int]:
    """Return the processes that the main thread of a process has started; [] if the system does not say."""
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()))
    except (OSError, ValueError):
        return []


def _positive(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        also = " or auto" if name == "n_jobs" else ""
        raise ConfigError(
            f"hydra.launcher.{name}={value}: expected a whole number above 0{also}",
            hint=f"write hydra.launcher.{name}=N",
        )
    return value
