"""The memory of this machine, and sizes in words. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path


def format_bytes(size: float) -> str:
    """Return a size as people write it: in KiB, MiB or GiB."""
    unit, power = ("GiB", 30) if size >= 2**30 else ("MiB", 20) if size >= 2**20 else ("KiB", 10)
    return f"{size / 2**power:,.1f} {unit}"


def free_host_memory() -> int:
    """Return the free bytes of this machine or its container."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4 * 2**30
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        group = Path("/proc/self/cgroup").read_text(encoding="ascii").rpartition("::")[2].strip()
        for folder in (Path("/sys/fs/cgroup") / group.lstrip("/"), Path("/sys/fs/cgroup")):
            limit = folder / "memory.max"
            if limit.exists() and limit.read_text(encoding="ascii").strip() != "max":
                stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
                used = int((folder / "memory.current").read_text(encoding="ascii"))
                used -= int(stat.get("inactive_file", 0))  # the kernel can drop this part of the page cache
                free = min(free, max(0, int(limit.read_text(encoding="ascii")) - used))
    except (OSError, ValueError, StopIteration):  # not Linux, or a container without these files
        pass
    return free
