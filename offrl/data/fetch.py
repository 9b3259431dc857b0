"""Downloads of D4RL's and OGBench's files (HTTP, resumed where they stopped) and of Minari datasets (through its package).

The HTTP client is urllib's: pooch starts a broken download of gigabytes from the beginning, and knows no locks.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse, responses
from pathlib import Path
from urllib import request
from urllib.error import HTTPError
from urllib.parse import urlsplit

from offrl.data import catalogue, ogbench_names
from offrl.data.d4rl import check_complete
from offrl.data.minari import local_datasets, local_folder
from offrl.data.ogbench import check_trajectories
from offrl.utils.errors import OffrlError, one_line
from offrl.utils.paths import cache_dir, one_at_a_time, replacing
from offrl.utils.progress import Bar

D4RL_BASE = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
BLOCK = 1 << 18  # bytes
TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 4  # connections in a row that bring nothing new before we give up


@dataclass(frozen=True)
class Publisher:
    """Who publishes files, and what we know of them.

    Attributes:
        base: address below which the files lie. mirror, folder: environment variables that name a mirror's address and a
            folder with files. check: reads a file once; raises OffrlError where it is none of the publisher's.
    """

    base: str
    mirror: str
    folder: str
    check: Callable[[Path], None]

    @property
    def way_out(self) -> str:
        return (
            f"name a mirror with --base-url or {self.mirror}, or put the file into the folder that {self.folder} names"
        )


D4RL = Publisher(D4RL_BASE, "OFFRL_D4RL_URL", "D4RL_DATASET_DIR", check_complete)
OGBENCH = Publisher(ogbench_names.BASE, "OFFRL_OGBENCH_URL", "OGBENCH_DATASET_DIR", check_trajectories)


def candidates(url: str, base: str | None, publisher: Publisher = D4RL) -> list[str]:
    """Where to ask for a file: its published place, or below the mirror `base` at the same path or without folders."""
    if not base:
        return [url]
    try:
        parts = urlsplit(base)
        usable = re.fullmatch(r"(?i)https?://[!-~]+", base) and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise OffrlError(
            f"--base-url or {publisher.mirror}: {base!r} is no web address; use one like https://host/path."
        )
    base, path = base.rstrip("/") + "/", url.removeprefix(publisher.base)
    return list(dict.fromkeys([base + path, base + path.rsplit("/", 1)[-1]]))


def fetch(
    name: str,
    dest: Path | None = None,
    base_url: str | None = None,
    progress: bool = True,
    force: bool = False,
) -> Path:
    """Download a dataset and check it; returns where it lies. A dataset that is already there is only checked.

    Another process that fetches the same file is waited for.

    Args:
        name: a D4RL id, an OGBench id (one file serves all tasks) or a Minari id.
        dest: file to write (not of Minari); default: `d4rl/<id>.hdf5` or `ogbench/<file>.npz` in the cache folder.
        base_url: mirror of the publisher's files instead of its host; default: the environment variable `OFFRL_D4RL_URL` or
            `OFFRL_OGBENCH_URL`.
            Below it a file may lie at its published path (`gym_mujoco_v2/...`) or directly.
        progress: show a bar with rate and time left.
        force: download again even when the file is there.

    Raises:
        OffrlError: unknown id, no connection, refused or missing file, no room, content that is no D4RL dataset, or a
            download that stays incomplete (what has come is kept and the next call continues it).
    """
    if name.startswith("forge/"):
        raise OffrlError(f"{name}: forge datasets are built, not fetched; use `offrl data build {name}`.")
    if entry := catalogue.d4rl().get(name):
        publisher, url, place = D4RL, entry.url, f"d4rl/{name}.hdf5"
    elif ogbench := ogbench_names.parse(name):
        publisher, url, place = OGBENCH, f"{OGBENCH.base}{ogbench.file}.npz", f"ogbench/{ogbench.file}.npz"
    else:
        return _fetch_minari(name, force)
    target = dest or cache_dir() / place
    urls = candidates(url, base_url or os.environ.get(publisher.mirror), publisher)
    try:
        if target.exists() and not target.is_file():
            raise OffrlError(f"--dest {target}: this is a folder or a device; give the name of a file.")
        if force or not _is_intact(target, publisher):
            target.parent.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(target.with_name(f".{target.name}.lock")):
                if force or not _is_intact(target, publisher):  # another process may have fetched it meanwhile
                    _fetch_file(name, publisher, urls, target, progress)
    except OSError as error:
        reason = error.strerror or error
        raise OffrlError(f"{target}: cannot be written ({reason}); free some space or give another --dest.") from error
    return target


def _fetch_file(name: str, publisher: Publisher, urls: list[str], target: Path, progress: bool) -> None:
    """Put the file from the first of `urls` that has it, and its sum, at `target`; on an error what was there stays."""
    part = target.with_name(target.name + ".part")
    if part.is_dir() or part.is_fifo():
        raise OffrlError(f"{part}: this is a folder or a pipe; remove it.")
    with Bar(progress, name, _size(part), None, unit="bytes") as bar:
        url = _download(urls, part, bar, publisher.way_out)
    try:
        publisher.check(part)
    except OffrlError as error:
        part.unlink()
        _version_file(part).unlink(missing_ok=True)
        reason = str(error).removeprefix(f"{part}: ")
        raise OffrlError(f"{name}: what {url} sent is not the dataset: {reason}") from error
    digest, sums = sha256(part), target.with_name(target.name + ".sha256")
    sums.unlink(missing_ok=True)  # a kill before the new one is written leaves a file that is checked by reading
    os.replace(part, target)
    _version_file(part).unlink(missing_ok=True)
    with replacing(sums) as temporary:
        temporary.write_text(f"{digest}  {target.name}\n")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_intact(path: Path, publisher: Publisher) -> bool:
    """Whether a file is there; one that differs from its recorded sum, or has none and can't be read, is refused."""
    if not path.is_file():
        return False
    sums = path.with_name(path.name + ".sha256")
    if not sums.is_file():
        publisher.check(path)
    elif sums.read_bytes().split()[:1] != [sha256(path).encode()]:
        why = f"it changed since it was fetched (its SHA-256 is not that of {sums.name})"
        raise OffrlError(f"{path}: {why}; fetch it again with --force.")
    return True


# ---- HTTP --------------------------------------------------------------------------------------------------------


class _Broken(Exception):
    """The connection broke; what has come is on the disk."""


@contextmanager
def _network() -> Iterator[None]:
    """Tell what a connection raises apart from what the disk does."""
    try:
        yield
    except HTTPError:
        raise
    except (OSError, HTTPException, ValueError) as error:  # ValueError: a redirect to a malformed place
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise _Broken(one_line(reason)) from error


def _download(urls: list[str], part: Path, bar: Bar, way_out: str) -> str:
    """Fill `part` from the first of `urls` (two at most) that exists, taking up broken connections; returns that URL."""
    url, most, failures, reason = urls[0], _size(part), 0, ""
    while failures < ATTEMPTS:
        try:
            _receive(url, part, bar)
            return url
        except HTTPError as error:
            error.close()
            if error.code != 404 or url == urls[-1]:
                raise OffrlError(_refusal(url, error, way_out)) from error
            url = urls[-1]  # the mirror may keep its files without folders
        except _Broken as error:
            reason, size = str(error), _size(part)
            failures = 0 if size > most else failures + 1
            most = max(most, size)
            if 0 < failures < ATTEMPTS:
                time.sleep(0.2 * 2**failures)
    kept = f"{_size(part):,} bytes are kept and the same command continues, or " if _size(part) else ""
    raise OffrlError(f"{url}: the download stopped ({reason}); {kept}{way_out}.")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _refusal(url: str, error: HTTPError, way_out: str) -> str:
    what = {404: "there is no such file", 403: "access is refused"}.get(error.code)
    if error.code // 100 == 3:
        what = f"it redirects to {str(error.headers.get('Location'))[:200]!r}, which is not followed"
    return f"{url}: {what or f'the server says {responses.get(error.code)}'} (HTTP {error.code}); {way_out}."


def _open(url: str, start: int, version: str) -> HTTPResponse:
    """Ask for the bytes of `url` from `start` on, or for all of them where the server has another `version` by now.

    Redirects lead to http(s) alone: the opener knows nothing else.
    """
    asked = request.Request(url, headers={"User-Agent": "offrl", "Accept-Encoding": "identity"})
    if start:
        asked.add_header("Range", f"bytes={start}-")
        if version:
            asked.add_header("If-Range", version)
    opener = request.OpenerDirector()
    for handler in (
        *(request.ProxyHandler, request.HTTPHandler, request.HTTPSHandler, request.UnknownHandler),
        *(request.HTTPRedirectHandler, request.HTTPErrorProcessor, request.HTTPDefaultErrorHandler),
    ):
        opener.add_handler(handler())
    with _network():
        return opener.open(asked, timeout=TIMEOUT)


def _version_file(part: Path) -> Path:
    """Where it stands of which version of the server's file `part` holds the beginning."""
    return part.with_name(part.name + ".version")


def _recorded_version(part: Path) -> str:
    path = _version_file(part)
    if not path.is_file():  # nothing, or something to read from which would wait for ever
        return ""
    with open(path, "rb") as file:
        recorded = file.read(300).decode("latin-1")
    return recorded if re.fullmatch("[ -~]{1,200}", recorded) else ""


def _version(response: HTTPResponse) -> str:
    """A strong ETag or a date, by which `If-Range` may ask (RFC 9110, 13.1.5); empty where the server tells neither."""
    tag = response.headers.get("ETag") or ""
    return tag if re.fullmatch('"[!-~]*"', tag) else response.headers.get("Last-Modified") or ""


def _receive(url: str, part: Path, bar: Bar) -> None:
    """Ask once for what is missing of `part` and append it.

    Raises:
        _Broken: the connection broke, or fewer bytes came than the server promised.
    """
    done = _size(part)
    try:
        response = _open(url, done, _recorded_version(part))
    except HTTPError as error:
        if error.code != 416 or not done:
            raise
        # Nothing lies behind our last byte: all is there, or the part belongs to another file.
        if (error.headers.get("Content-Range") or "").endswith(f"/{done}"):
            return
        part.unlink(missing_ok=True)
        raise _Broken("the partial file was longer than the server's") from error
    with response:
        resumed = response.status == 206
        if resumed and not (response.headers.get("Content-Range") or "").startswith(f"bytes {done}-"):
            part.unlink(missing_ok=True)
            raise _Broken("the server sent another part than asked for")
        done = done if resumed else 0
        # None where the header is missing or malformed: the file itself then tells whether it is whole.
        total = None if response.length is None else done + response.length
        if total is not None and shutil.disk_usage(part.parent).free < total - done:
            raise OffrlError(f"{part}: the disk has no room for {total - done:,} more bytes; free some or use --dest.")
        with open(part, "ab" if resumed else "wb") as file:
            if not resumed:  # after the old bytes are gone, so that a version never stands beside another's bytes
                with replacing(_version_file(part)) as temporary:
                    temporary.write_text(_version(response), encoding="latin-1")
            while total is None or done < total:
                bar.update(done, total)
                with _network():
                    block = response.read1(BLOCK if total is None else min(BLOCK, total - done))
                if not block:
                    break
                done += file.write(block)
            bar.update(done, total)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and done < total:
        raise _Broken(f"{done:,} of {total:,} bytes came")


# ---- Minari ------------------------------------------------------------------------------------------------------


def _fetch_minari(name: str, force: bool) -> Path:
    if name not in catalogue.minari() and not ("/" in name and catalogue.MINARI_ID.fullmatch(name)):
        raise catalogue.unknown(name, local_datasets())
    try:
        import minari
    except ImportError as error:
        raise OffrlError(
            f'{name}: Minari datasets need its package; pip install ".[minari]" in the checkout of offrl.'
        ) from error
    folder = local_folder(name)
    with one_at_a_time(folder.with_name(f".{folder.name}.lock")):
        try:
            minari.download_dataset(name, force_download=force)
        except Exception as error:  # whatever its hosts raise
            why = f"minari cannot download it ({one_line(error)})"
            raise OffrlError(f"{name}: {why}; check the id and the connection.") from error
    return folder
