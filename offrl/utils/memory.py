"""How much memory there is, so that what can't fit is refused before it is allocated."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules import module as torch_module

from offrl.utils.errors import OffrlError

_CGROUP = Path("/sys/fs/cgroup")
MOST_PARAMETERS = 2_000  # tensors of parameters in a model; a transformer of 150 layers has fewer


def require_bytes(needed: int, purpose: str, device: torch.device | str = "cpu") -> None:
    """Raise OffrlError unless so much memory is free; `purpose` begins the sentence."""
    there = free_bytes(torch.device(device))
    if needed > there:
        raise OffrlError(
            f"{purpose} needs at least {needed:,} bytes of memory, and {there:,} are free; make it smaller."
        )


def free_bytes(device: torch.device) -> int:
    """Bytes that a process may still take, on a GPU or here (the machine's and the container's limit)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, StopIteration):  # no such limit: the file is missing or says "max"
        limit = int((_CGROUP / "memory.max").read_text())
        statistics = (_CGROUP / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in statistics if line.startswith("inactive_file "))
        free = min(free, limit - int((_CGROUP / "memory.current").read_text()) + cached)
    return max(0, free)


@contextlib.contextmanager
def counting_parameters(purpose: str) -> Iterator[None]:
    """Within it, building more than `MOST_PARAMETERS` tensors of parameters is refused; `purpose` begins the sentence.

    A loop over layers, blocks or members takes hours for a count that was meant for something else (`layers=1e9`), and no
    memory check comes before the end of the loop.
    """
    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > MOST_PARAMETERS:
            raise OffrlError(
                f"{purpose} would have more than {MOST_PARAMETERS:,} tensors of parameters; make it smaller."
            )

    hook = torch_module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
