"""The process: threads, signals, locks, the device."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from offrl.utils.errors import OffrlError
from offrl.utils.locks import check_system, lock


def tune_process(threads: int) -> None:
    """Threads, and an allocator that keeps what it freed.

    Networks of these sizes free and claim the same half megabytes thousands of times a second; glibc by default gives
    them back to the kernel each time, and the page faults cost several percent of an update.
    """
    torch.set_num_threads(threads)
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        except (OSError, AttributeError):
            return  # another C library: nothing to tune


@contextmanager
def _no_collector() -> Iterator[None]:
    """Keep the cycle collector from walking millions of objects that stay; it still sees what is made from here on."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _stopping(request: Callable[[], None]) -> Iterator[None]:
    """On SIGINT or SIGTERM ask for a stop after the current burst; a second SIGINT ends at once."""

    def handle(number: int, frame: Any) -> None:
        request()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs it decides when to stop
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process a run."""
    check_system()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A named pipe would wait for its reader.
        file = open(os.open(folder / ".lock", os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o666), "w")  # noqa: SIM115
    except OSError as error:
        raise OffrlError(
            f"{error.filename or folder} can't be written ({error.strerror}); choose another folder with out=DIR."
        ) from error
    with file:
        try:
            try:
                lock(file, wait=False)
            except BlockingIOError:  # `offrl status` may be looking
                time.sleep(0.2)
                lock(file, wait=False)
        except OSError as error:
            raise OffrlError(f"{folder}: another process is training this run; wait for it or choose name=.") from error
        yield


def pick_device(name: str) -> torch.device:
    """The device that `device=` names; `auto` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OffrlError(f"device={name} is unknown; choose auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise OffrlError(f"device={name} is not supported; choose auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OffrlError(f"device={name}: this PyTorch sees no GPU; use device=cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OffrlError(f"device={name}: there are {torch.cuda.device_count()} GPUs, counted from cuda:0.")
    return device
