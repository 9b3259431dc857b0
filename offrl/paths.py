"""Where things live: the cache of datasets, the configuration, and files written whole or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from offrl.errors import OffrlError

PACKAGE = Path(__file__).resolve().parent


def cache_dir() -> Path:
    """Root of downloaded, built and cached datasets.

    `OFFRL_HOME`, else `$XDG_CACHE_HOME/offrl`, else `~/.cache/offrl`. Not created here.

    Raises:
        OffrlError: none of them is known.
    """
    try:
        if home := os.environ.get("OFFRL_HOME"):
            return Path(home).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "offrl"
    except RuntimeError as error:
        raise OffrlError(
            "This user has no home folder; set OFFRL_HOME to the folder for datasets and caches."
        ) from error


def conf_dir() -> Path:
    """Folder of the Hydra configuration: inside an installed wheel, else at the top of the checkout."""
    inside = PACKAGE / "conf"
    return inside if (inside / "train.yaml").is_file() else PACKAGE.parent / "conf"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed over `path`.

    On any error (a full disk, a kill, an exception) `path` keeps its old content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Wait until no other process holds the lock's file, then hold it; a process that dies lets go.

    Raises:
        OffrlError: the lock's folder can't be written.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock)
        try:
            acquired = held.acquire(timeout=2)
        except Timeout:
            print(f"waiting for another process that holds {lock}", file=sys.stderr, flush=True)
            acquired = held.acquire()
    except OSError as error:
        reason = error.strerror or error
        way_out = "free space or set OFFRL_HOME elsewhere (for Minari's folder MINARI_DATASETS_PATH)"
        raise OffrlError(f"{lock.parent} cannot be written ({reason}); {way_out}.") from error
    with acquired:
        yield
