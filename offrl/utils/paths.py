"""Where things live: the cache of datasets, the configuration, and files written whole or not at all."""

from __future__ import annotations

import glob
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from offrl.utils.errors import OffrlError

PACKAGE = Path(__file__).resolve().parent.parent


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


def config_dir_of(words: Sequence[str]) -> Path | None:
    """The user's own configuration folder that `--config-dir DIR` (or `-cd DIR`, `--config-dir=DIR`) names.

    Raises:
        OffrlError: there is no such folder.
    """
    named = [second for first, second in zip(words, words[1:]) if first in ("--config-dir", "-cd")]
    named += [word.split("=", 1)[1] for word in words if word.startswith("--config-dir=")]
    return use_config_dir(named[0]) if named else None


def without_config_dir(words: Sequence[str]) -> list[str]:
    """The words without the option that `config_dir_of` reads."""
    flags = [i for i, word in enumerate(words) if word in ("--config-dir", "-cd")]
    left_out = {*flags, *(i + 1 for i in flags)}
    return [w for i, w in enumerate(words) if i not in left_out and not w.startswith("--config-dir=")]


def use_config_dir(name: str | Path) -> Path:
    """A user's own configuration folder; modules beside it and in the current folder can be imported from now on.

    They come last on the import path, so that a user's `random.py` replaces nobody's `random`.

    Raises:
        OffrlError: there is no such folder.
    """
    folder = Path(name).expanduser().absolute()
    if not folder.is_dir():
        raise OffrlError(
            f"--config-dir {name}: there is no such folder; name one with agent/, preset/ and the like in it."
        )
    for place in (str(folder.parent), os.getcwd()):
        if place not in sys.path:
            sys.path.append(place)
    return folder


def remove_torn(folder: Path, name: str = "*", deep: bool = False) -> None:
    """Remove what killed writers of `name` left in a folder: `.NAME.PID.part` and the like, files and folders.

    Args:
        deep: in its folders, too.

    Only for whoever holds the lock of what is written: other processes' files look the same.
    """
    for place in (folder, *(folder.glob("*/") if deep else [])):
        for torn in (*place.glob(f".{name}.*.part"), *place.glob(f".{name}.*.old")):
            _remove(torn)


@contextmanager
def replacing(path: Path, own_folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed over `path`.

    On any error (a full disk, a kill, an exception) `path` keeps its old content; what a killed process left of its
    temporary file is removed by the next one that writes `path` on the same machine.

    Args:
        own_folder: put it into a temporary folder, for a library whose writer makes files of its own beside it (safetensors).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    place = beside(path)
    temporary = place / path.name if own_folder else place
    try:
        if own_folder:
            place.mkdir(exist_ok=True)
        yield temporary
        with open(temporary, "r+b") as file:  # Windows syncs only what may be written
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        _remove(place)


def beside(path: Path) -> Path:
    """A temporary name beside `path`, for what replaces it; those of killed processes of this machine are removed."""
    mark = f".{path.name}.{platform.node()}-"
    for torn in path.parent.glob(f"{glob.escape(mark)}*.part"):
        if not _lives(torn.name.removeprefix(mark).removesuffix(".part")):
            _remove(torn)
    return path.with_name(f"{mark}{os.getpid()}.part")


def _remove(torn: Path) -> None:
    if torn.is_dir() and not torn.is_symlink():
        shutil.rmtree(torn, ignore_errors=True)
    else:
        torn.unlink(missing_ok=True)


def _lives(pid: str) -> bool:
    """Whether a process of this machine may still be there."""
    try:
        if os.name == "nt":  # there the call ends the process
            return True
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError, OverflowError):
        return True
    return True


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Wait until no other process holds the lock's file, then hold it; a process that dies lets go.

    Raises:
        OffrlError: the lock's folder can't be written.
    """
    from filelock import FileLock, Timeout  # with asyncio, half of what `offrl --help` would import

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


def write_json(path: Path, value: Any) -> None:
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(value, indent=1, default=str) + "\n")
    except OSError as error:
        raise OffrlError(f"{path} can't be written ({error.strerror}); choose another folder with out=DIR.") from error
