"""Locks of files and folders, which their process lets go of when it ends; and what else one system has and another lacks."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import IO

from offrl.utils.errors import OffrlError

fcntl: ModuleType | None
try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

# A named pipe doesn't wait for its writer; Windows has neither these pipes nor the flag, but files of text otherwise.
READ_ONLY = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def check_system() -> None:
    """Raise OffrlError where processes can't be locked out and stopped as training needs it."""
    if fcntl is None:
        raise OffrlError(
            f"training needs Linux or macOS, and this is {sys.platform}; on Windows use WSL (wsl --install, then install offrl "
            "inside it). Reading data, load_agent and reports work here."
        )


def lock(file: IO | int, wait: bool = True) -> None:
    """Lock an open file or folder for this process alone.

    Raises:
        BlockingIOError: another process has it, and `wait` is False.
        OSError: the file system knows no locks.
    """
    check_system()
    assert fcntl is not None
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def is_locked(file: IO | int) -> bool:
    """Whether another process has locked an open file or folder; a shared lock is tried, and released when it is closed."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False
