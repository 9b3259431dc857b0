"""Downloads of D4RL files (HTTP, resumed where they stopped) and of Minari datasets (through the minari package)."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Protocol

from offrl.data import catalogue
from offrl.data.d4rl import REQUIRED, open_hdf5, row_blocks
from offrl.data.minari import local_datasets, local_folder
from offrl.utils.errors import OffrlError
from offrl.utils.paths import cache_dir

D4RL_BASE = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
BLOCK = 1 << 18  # bytes
TIMEOUT = 30.0  # seconds without a byte
STALLS = 4  # connections in a row that break without bringing anything new before we give up


class Report(Protocol):
    """Told how many bytes are there and how many there will be (None while unknown)."""

    def __call__(self, done: int, total: int | None) -> None: ...


def candidates(url: str, base: str | None) -> list[str]:
    """Where to ask for a file: its published place, or below the mirror `base` at the same path or without folders."""
    if not base:
        return [url]
    base, path = base.rstrip("/") + "/", url.removeprefix(D4RL_BASE)
    return list(dict.fromkeys([base + path, base + path.rsplit("/", 1)[-1]]))


def fetch(
    name: str,
    dest: Path | None = None,
    base_url: str | None = None,
    progress: bool = True,
    force: bool = False,
) -> Path:
    """Download a dataset and check it; returns where it lies. A dataset that is already there is only checked.

    Args:
        name: a D4RL id or a Minari id.
        dest: file to write (D4RL only); default: `d4rl/<id>.hdf5` in the cache folder.
        base_url: mirror of D4RL's files instead of D4RL's host; default: the environment variable `OFFRL_D4RL_URL`.
            Below it a file may lie at its published path (`gym_mujoco_v2/...`) or directly.
        progress: show a bar with rate and time left.
        force: download again even when the file is there.

    Raises:
        OffrlError: unknown id, no connection, refused or missing file, a download that stays incomplete (what has
            come is kept and the next call continues it), or content that is no D4RL dataset.
    """
    entry = catalogue.d4rl().get(name)
    if entry is None:
        return _fetch_minari(name, force)
    target = dest or cache_dir() / "d4rl" / f"{name}.hdf5"
    if target.is_file() and not force and _is_intact(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    urls = candidates(entry.url, base_url or os.environ.get("OFFRL_D4RL_URL"))
    with _bar(name, progress) as report:
        url = _download(urls, part, report)
    try:
        check_complete(part)
    except OffrlError as error:
        part.unlink()
        reason = str(error).removeprefix(f"{part}: ")
        raise OffrlError(f"{name}: what {url} sent is not the dataset: {reason}") from error
    digest = sha256(part)
    os.replace(part, target)
    _sum_file(target).write_text(f"{digest}  {target.name}\n")
    return target


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_complete(path: Path) -> None:
    """Read every required column of a D4RL file once, so that each compressed block proves its own checksum.

    Raises:
        OffrlError: no HDF5 file, cut off, a missing key, or a block that cannot be read.
    """
    with open(path, "rb") as content:
        head = content.read(16)
    if not head.startswith(b"\x89HDF"):
        raise OffrlError(f"{path}: this is no HDF5 file (it begins with {head!r}); fetch it from another place.")
    with open_hdf5(path) as file:
        missing = [key for key in REQUIRED if key not in file]
        if missing:
            raise OffrlError(f"{path}: missing {' and '.join(missing)}; fetch it from another place.")
        for key in (name for name in (*REQUIRED, "timeouts", "next_observations") if name in file):
            try:
                for start, rows in row_blocks(file[key]):
                    file[key][start : start + rows]
            except OSError as error:
                raise OffrlError(f"{path}: {key} is damaged ({error}); fetch it again.") from error


def _sum_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _is_intact(path: Path) -> bool:
    """Whether a file is the one that was fetched; one without a recorded sum (put there by hand) is checked and kept.

    Raises:
        OffrlError: the file differs from its recorded sum, or is no D4RL dataset.
    """
    recorded = _sum_file(path)
    if not recorded.is_file():
        check_complete(path)
        return True
    if recorded.read_text().split()[:1] != [sha256(path)]:
        raise OffrlError(f"{path}: it changed since it was fetched (SHA-256 differs); fetch it again with --force.")
    return True


# ---- HTTP --------------------------------------------------------------------------------------------------------


class _Interrupted(Exception):
    """The connection broke; what has come is on the disk."""


def _download(urls: list[str], part: Path, report: Report) -> str:
    """Fill `part` from the first of `urls` that exists, taking up broken connections; returns that URL."""
    for index, url in enumerate(urls):
        stalls = 0
        while True:
            before = _size(part)
            try:
                _continue(url, part, report)
                return url
            except urllib.error.HTTPError as error:
                error.close()
                if error.code == 404 and index + 1 < len(urls):
                    break  # the mirror may keep its files without folders
                raise OffrlError(_refusal(url, error)) from error
            except (_Interrupted, HTTPException, OSError) as error:
                done = _size(part)
                stalls = 0 if done > before else stalls + 1
                if stalls == STALLS:
                    reason = getattr(error, "reason", error) or type(error).__name__
                    kept = f"; {done:,} bytes are kept and the same command continues" if done else ""
                    raise OffrlError(f"{url}: the download stopped ({reason}){kept}.") from error
                time.sleep(0.2 * 2**stalls if stalls else 0.0)
    raise AssertionError("no URL to try")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _refusal(url: str, error: urllib.error.HTTPError) -> str:
    what = {404: "there is no such file", 403: "access is refused"}.get(error.code, f"the server says {error.reason}")
    return (
        f"{url}: {what} (HTTP {error.code}); name a mirror with --base-url or OFFRL_D4RL_URL, or put the file into "
        "the folder that D4RL_DATASET_DIR names."
    )


def _continue(url: str, part: Path, report: Report) -> None:
    """One request for what is missing of `part`.

    Raises:
        _Interrupted: fewer bytes came than the server promised.
    """
    done = _size(part)
    request = urllib.request.Request(url, headers={"User-Agent": "offrl", "Accept-Encoding": "identity"})
    if done:
        request.add_header("Range", f"bytes={done}-")
    try:
        response: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not done:
            raise
        error.close()
        # Nothing lies behind our last byte: all is there, or the part belongs to another file.
        if (error.headers.get("Content-Range") or "").endswith(f"/{done}"):
            return
        part.unlink()
        raise _Interrupted("the partial file was longer than the server's") from error
    with response:
        resumed = response.status == 206
        if resumed and not (response.headers.get("Content-Range") or "").startswith(f"bytes {done}-"):
            part.unlink()
            raise _Interrupted("the server sent another part than asked for")
        length = response.headers.get("Content-Length")
        total = None if length is None else int(length) + (done if resumed else 0)
        with open(part, "ab" if resumed else "wb") as file:
            written = _copy(response, file, done if resumed else 0, total, report)
    if total is not None and written != total:
        raise _Interrupted(f"{written:,} of {total:,} bytes came")


def _copy(response: HTTPResponse, file: IO[bytes], done: int, total: int | None, report: Report) -> int:
    if total is not None and shutil.disk_usage(Path(file.name).parent).free < total - done:
        raise OffrlError(f"{file.name}: the disk has no room for {total - done:,} more bytes; free some or use --dest.")
    report(done, total)
    while block := response.read(BLOCK):
        file.write(block)
        done += len(block)
        report(done, total)
    return done


@contextmanager
def _bar(name: str, show: bool) -> Iterator[Report]:
    """A progress bar on standard error with rate and time left."""
    if not show:
        yield lambda done, total: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# ---- Minari ------------------------------------------------------------------------------------------------------


def _fetch_minari(name: str, force: bool) -> Path:
    if name.startswith("forge/"):
        raise OffrlError(f"{name}: forge datasets are built, not fetched; use `offrl data build {name}`.")
    if name not in catalogue.minari() and not ("/" in name and catalogue.MINARI_ID.fullmatch(name)):
        raise catalogue.unknown(name, local_datasets())
    try:
        import minari
    except ImportError as error:
        raise OffrlError(f'{name}: Minari datasets need its package; pip install "offrl[minari]".') from error
    try:
        minari.download_dataset(name, force_download=force)
    except Exception as error:  # whatever its hosts raise
        raise OffrlError(f"{name}: minari cannot download it ({error}); check the id and the connection.") from error
    return local_folder(name)
