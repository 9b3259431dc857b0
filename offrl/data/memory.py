"""Memory that a dataset needs against memory that is free, checked before anything is allocated."""

from __future__ import annotations

from pathlib import Path

from offrl.utils.errors import OffrlError


def available_memory() -> int | None:
    """Bytes that this process may still use: the machine's free memory, at most its container's limit; None: unknown."""
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # another system, or no limit ("max")
        pass
    return min(limits, default=None)


def size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def check_memory(needed: int, where: str) -> None:
    """Refuse a dataset that does not fit.

    Args:
        needed: bytes of its tensors.
    """
    free = available_memory()
    if free is not None and needed > free:
        raise too_large(needed, where, free)


def too_large(needed: int, where: str, free: int | None = None) -> OffrlError:
    """The error for a dataset that does not fit."""
    there = "" if free is None else f", of which {size(free)} is free"
    return OffrlError(
        f"{where}: as float32 it takes {size(needed)} of memory{there}; take fewer rows or smaller observations."
    )
