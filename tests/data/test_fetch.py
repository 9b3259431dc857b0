"""Downloads against a local HTTP server that behaves well, breaks off, lies and refuses."""

from __future__ import annotations

import errno
import http.server
import io
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from offrl.data import fetch as fetch_module
from offrl.data.fetch import candidates, fetch, sha256
from offrl.datasets import load
from offrl.utils import progress as progress_module
from offrl.utils.errors import OffrlError

NAME, PUBLISHED = "hopper-medium-v2", "gym_mujoco_v2/hopper_medium-v2.hdf5"


@dataclass
class Host:
    """What the server does; tests change it while it runs."""

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True  # honours Range
    version: dict[str, str] = field(default_factory=dict)  # the header by which it tells the file's version
    cut: int | None = None  # bytes a response sends before the connection breaks
    cuts: int = 10**9  # responses that break
    status: int = 200
    lengths: list[str] | None = None  # the values of Content-Length instead of the true one
    location: str | None = None  # where a redirect leads
    raw: bytes | None = None  # what is sent instead of any proper answer
    stalls: bool = False  # goes silent, with the connection open, where it would otherwise break or end
    delay: float = 0.0  # seconds before an answer
    closing: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    conditions: list[str | None] = field(default_factory=list)  # If-Range of each
    url: str = ""


class Handler(http.server.BaseHTTPRequestHandler):
    host: Host

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        host, path, wanted = self.host, self.path.lstrip("/"), self.headers.get("Range")
        host.requests.append((path, wanted))
        host.closing.wait(host.delay)
        if host.raw is not None:
            self.wfile.write(host.raw)
            return self.stall()
        if host.location is not None and path == PUBLISHED:
            self.send_response(302)
            if host.location:
                self.send_header("Location", host.location)
            return self.end_headers()
        if host.status != 200 or path not in host.files:
            return self.send_error(host.status if host.status != 200 else 404)
        body, start = host.files[path], 0
        condition = self.headers.get("If-Range")
        host.conditions.append(condition)
        if wanted and host.ranges and condition in {None, *host.version.values()}:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        for header, value in host.version.items():
            self.send_header(header, value)
        for length in [str(len(body) - start)] if host.lengths is None else host.lengths:
            self.send_header("Content-Length", length)
        self.end_headers()
        if host.cut is not None and host.cuts > 0:
            host.cuts -= 1
            body = body[: start + host.cut]
        self.wfile.write(body[start:])
        self.stall()

    def stall(self) -> None:
        if self.host.stalls:
            self.wfile.flush()
            self.host.closing.wait()


def dataset(n: int = 20_000) -> bytes:
    rng = np.random.default_rng(0)
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        columns = {"observations": (n, 11), "actions": (n, 3), "rewards": (n,)}
        for key, shape in columns.items():
            file.create_dataset(key, data=rng.uniform(-1, 1, shape).astype("f4"), compression="gzip")
        for key in ("terminals", "timeouts"):
            file.create_dataset(key, data=rng.random(n) < 0.01, compression="gzip")
    return memory.getvalue()


CONTENT = dataset()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    host = Host(files={PUBLISHED: CONTENT})
    handler = type("BoundHandler", (Handler,), {"host": host})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    host.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path))
    monkeypatch.setenv("OFFRL_D4RL_URL", host.url)
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch_module, "BLOCK", 4096)
    monkeypatch.setattr(fetch_module, "time", SimpleNamespace(sleep=lambda seconds: None))
    yield host
    host.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


def place(tmp_path: Path) -> tuple[Path, Path]:
    """Where the file and its unfinished part lie."""
    path = tmp_path / f"d4rl/{NAME}.hdf5"
    return path, path.with_name(path.name + ".part")


def test_success_puts_the_file_and_its_sum_in_the_cache_and_it_loads(host: Host, tmp_path: Path) -> None:
    path, part = place(tmp_path)
    assert fetch(NAME, progress=False) == path
    assert path.read_bytes() == CONTENT
    assert not part.exists()
    recorded = path.with_name(path.name + ".sha256").read_text()
    assert recorded == f"{sha256(path)}  {path.name}\n"  # the form that sha256sum -c reads
    assert load(NAME).info.env_id == "Hopper-v4"
    assert fetch(NAME, progress=False) == path  # checked, not fetched again
    assert len(host.requests) == 1


@pytest.mark.parametrize("watched", [True, False])
def test_progress_shows_name_size_rate_and_time_left(
    host: Host, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, watched: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: watched)
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_LINES", -1.0)
    monkeypatch.setenv("COLUMNS", "120")
    fetch(NAME, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert NAME in shown.err
    assert "MB/s" in shown.err
    assert ("0:00:00" if watched else f"{len(CONTENT):,}/{len(CONTENT):,} bytes") in shown.err


def refused(*arguments: Any, **options: Any) -> str:
    """The one sentence with which a fetch is refused."""
    with pytest.raises(OffrlError) as caught:
        fetch(NAME, *arguments, progress=False, **options)
    text = str(caught.value)
    assert text.endswith(".")
    assert text.isprintable()  # so it is one line, and nothing that a server sends reaches the terminal as a command
    return text


def test_destination_and_mirror_may_be_given(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OFFRL_D4RL_URL")
    dest = tmp_path / "elsewhere/mine.hdf5"
    assert fetch(NAME, dest, base_url=host.url + "/", progress=False) == dest
    assert dest.read_bytes() == CONTENT


def test_a_mirror_without_folders(host: Host) -> None:
    host.files = {"hopper_medium-v2.hdf5": CONTENT}
    fetch(NAME, progress=False)
    assert [path for path, _ in host.requests] == [PUBLISHED, "hopper_medium-v2.hdf5"]


def test_urls_without_a_mirror_are_the_published_ones() -> None:
    assert candidates("http://host/a/b.hdf5", None) == ["http://host/a/b.hdf5"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_once_is_taken_up(host: Host, tmp_path: Path, ranges: bool) -> None:
    host.ranges, host.cut, host.cuts = ranges, 100_000, 1
    path = fetch(NAME, progress=False)
    assert path.read_bytes() == CONTENT
    assert [wanted for _, wanted in host.requests] == [None, "bytes=100000-"]


def test_many_breaks_are_fine_as_long_as_something_comes(host: Host) -> None:
    host.cut = len(CONTENT) // 9
    assert fetch(NAME, progress=False).read_bytes() == CONTENT
    assert len(host.requests) == 10


def test_what_has_come_is_kept_and_the_next_call_continues(host: Host, tmp_path: Path) -> None:
    path, part = place(tmp_path)
    host.ranges, host.cut = False, 100_000  # starts over each time and always breaks at the same place
    with pytest.raises(OffrlError, match=r"the download stopped .*100,000 bytes are kept"):
        fetch(NAME, progress=False)
    assert part.stat().st_size == 100_000
    assert not path.exists()
    host.ranges, host.cut, host.requests = True, None, []
    assert fetch(NAME, progress=False).read_bytes() == CONTENT
    assert host.requests == [(PUBLISHED, "bytes=100000-")]


@pytest.mark.parametrize(
    ("header", "old", "new", "condition"),
    [
        ("ETag", '"a1"', '"b2"', '"a1"'),
        (
            "Last-Modified",
            "Mon, 01 Jan 2024 00:00:00 GMT",
            "Tue, 02 Jan 2024 00:00:00 GMT",
            "Mon, 01 Jan 2024 00:00:00 GMT",
        ),
        ("ETag", 'W/"a1"', 'W/"b2"', None),  # weak: equal bytes are not promised, so it is never asked by
    ],
)
def test_a_file_that_the_server_replaced_is_fetched_anew(
    host: Host, tmp_path: Path, header: str, old: str, new: str, condition: str | None
) -> None:
    """Its bytes after those of the old version would make a file that nobody published."""
    path, part = place(tmp_path)
    before = CONTENT[:50_000] + bytes(50_000) + CONTENT[100_000:]
    host.files[PUBLISHED], host.version, host.cut, host.ranges = before, {header: old}, 100_000, False
    refused()
    assert part.read_bytes() == before[:100_000]
    host.files[PUBLISHED], host.version, host.cut, host.ranges = CONTENT, {header: new}, None, True
    host.conditions = []
    if condition is None:  # nothing to ask by: the bytes are taken as those of one version, and reading them decides
        refused()
    else:
        assert fetch(NAME, progress=False).read_bytes() == CONTENT
        assert sorted(one.name for one in path.parent.iterdir() if not one.name.startswith(".")) == [
            path.name,
            path.name + ".sha256",
        ]
    assert host.conditions == [condition]


def test_a_version_that_is_still_the_servers_continues(host: Host, tmp_path: Path) -> None:
    host.version, host.cut, host.cuts = {"ETag": '"a1"'}, 100_000, 1
    assert fetch(NAME, progress=False).read_bytes() == CONTENT
    assert host.requests == [(PUBLISHED, None), (PUBLISHED, "bytes=100000-")]
    assert host.conditions == [None, '"a1"']


def test_a_part_that_is_whole_already(host: Host, tmp_path: Path) -> None:
    _, part = place(tmp_path)
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT)
    assert fetch(NAME, progress=False).read_bytes() == CONTENT


def test_a_part_of_another_longer_file_is_dropped(host: Host, tmp_path: Path) -> None:
    _, part = place(tmp_path)
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT + b"more")
    assert fetch(NAME, progress=False).read_bytes() == CONTENT


def test_a_part_of_another_file_is_found_out(host: Host, tmp_path: Path) -> None:
    _, part = place(tmp_path)
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(1000))
    with pytest.raises(OffrlError, match="no HDF5 file"):
        fetch(NAME, progress=False)
    assert not part.exists()  # so that the next call starts over
    assert fetch(NAME, progress=False).read_bytes() == CONTENT


def test_wrong_size(host: Host, tmp_path: Path) -> None:
    path, _ = place(tmp_path)
    host.lengths = [str(len(CONTENT) + 500)]
    host.ranges = False
    with pytest.raises(OffrlError, match="the download stopped"):
        fetch(NAME, progress=False)
    assert not path.exists()


def test_a_file_cut_on_the_server_is_found_out_without_a_length(host: Host, tmp_path: Path) -> None:
    path, part = place(tmp_path)
    host.files[PUBLISHED], host.lengths = CONTENT[:-5000], []
    with pytest.raises(OffrlError, match="cut off"):
        fetch(NAME, progress=False)
    assert not path.exists()
    assert not part.exists()


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "no such file"), (403, "access is refused"), (503, "Service Unavailable")],
)
def test_refusals_name_the_way_out(host: Host, tmp_path: Path, status: int, message: str) -> None:
    host.status = status
    with pytest.raises(OffrlError, match=message) as caught:
        fetch(NAME, progress=False)
    assert host.url in str(caught.value)
    assert "OFFRL_D4RL_URL" in str(caught.value)
    assert not place(tmp_path)[0].exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>Moved to another place</html>", "no HDF5 file"),
        (CONTENT[:8] + bytes(5000), "is not the dataset"),
    ],
)
def test_garbage(host: Host, tmp_path: Path, content: bytes, message: str) -> None:
    host.files[PUBLISHED] = content
    with pytest.raises(OffrlError, match=message):
        fetch(NAME, progress=False)
    path, part = place(tmp_path)
    assert not path.exists()
    assert not part.exists()


def test_hdf5_of_something_else_or_with_a_damaged_block(host: Host, tmp_path: Path) -> None:
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        file["x"] = np.zeros(3)
    host.files[PUBLISHED] = memory.getvalue()
    with pytest.raises(OffrlError, match="missing observations and actions"):
        fetch(NAME, progress=False)
    with h5py.File(io.BytesIO(CONTENT)) as file:
        block = file["rewards"].id.get_chunk_info(0)
    damaged = bytearray(CONTENT)
    damaged[block.byte_offset + 50 : block.byte_offset + 60] = bytes(10)
    host.files[PUBLISHED] = bytes(damaged)
    with pytest.raises(OffrlError, match="rewards cannot be read, the file is damaged"):
        fetch(NAME, progress=False)


LAYOUT = h5py.VirtualLayout((9, 2), "f8")
LAYOUT[:] = h5py.VirtualSource("other.hdf5", "x", (9, 2))


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(lambda file: file.create_group("rewards"), id="group"),
        pytest.param(lambda file: file.update({"rewards": 3.0}), id="number"),
        pytest.param(lambda file: file.update({"rewards": h5py.Empty("f4")}), id="nothing"),
        pytest.param(lambda file: file.update({"rewards": h5py.SoftLink("/nowhere")}), id="dangling link"),
        pytest.param(lambda file: file.update({"rewards": h5py.ExternalLink("/etc/passwd", "/x")}), id="external link"),
        pytest.param(lambda file: file.create_virtual_dataset("rewards", LAYOUT), id="virtual"),
        pytest.param(
            lambda file: file.create_dataset("rewards", (9,), "u1", external=[("/etc/passwd", 0, 9)]), id="raw"
        ),
        pytest.param(
            lambda file: file.create_dataset("rewards", (10**12,), "f4", chunks=(1000,), compression="gzip"),
            id="claim",
        ),
    ],
)
def test_hdf5_with_something_else_where_an_array_belongs(host: Host, tmp_path: Path, place: Any) -> None:
    memory = io.BytesIO(CONTENT)
    with h5py.File(memory, "a") as file:
        del file["rewards"]
        place(file)
    host.files[PUBLISHED] = memory.getvalue()
    message = refused()
    assert f"what {host.url}/{PUBLISHED} sent is not the dataset: rewards" in message
    assert list(tmp_path.glob("d4rl/*")) == [tmp_path / f"d4rl/.{NAME}.hdf5.lock"]  # nothing of it is left


def test_a_file_that_changed_later_is_noticed(host: Host) -> None:
    path = fetch(NAME, progress=False)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(OffrlError, match="changed since it was fetched"):
        fetch(NAME, progress=False)
    assert fetch(NAME, progress=False, force=True).read_bytes() == CONTENT


def test_no_server(host: Host, tmp_path: Path) -> None:
    with pytest.raises(OffrlError, match="the download stopped"):
        fetch(NAME, base_url="http://127.0.0.1:9", progress=False)


def test_fetches_of_one_id_at_once_share_one_download(host: Host, tmp_path: Path) -> None:
    host.delay = 0.5  # long enough for the others to ask, too, if nothing kept them from it
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(fetch(NAME, progress=False))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    path, part = place(tmp_path)
    assert results == [path] * 3
    assert len(host.requests) == 1
    assert path.read_bytes() == CONTENT
    assert path.with_name(path.name + ".sha256").read_text().split()[0] == sha256(path)
    assert not part.exists()


@pytest.mark.parametrize("lengths", [["many"], [""], ["-5"], ["1e3"], ["357,918"], ["9" * 5000]])
def test_a_length_that_is_no_number_counts_as_none(host: Host, lengths: list[str]) -> None:
    host.lengths = lengths
    assert fetch(NAME, progress=False).read_bytes() == CONTENT


@pytest.mark.parametrize("lengths", [["1000"], ["1000", str(len(CONTENT))], [str(10**15)]])
def test_a_wrong_length(host: Host, tmp_path: Path, lengths: list[str]) -> None:
    host.lengths = lengths
    assert ("cut off" if lengths[0] == "1000" else "the disk has no room") in refused()
    path, part = place(tmp_path)
    assert not path.exists()
    assert not part.exists()


def test_a_length_given_twice(host: Host) -> None:
    host.lengths = [str(len(CONTENT))] * 2
    assert fetch(NAME, progress=False).read_bytes() == CONTENT


def test_redirects_are_followed(host: Host) -> None:
    host.files["moved/it"], host.location = CONTENT, "/moved/it"
    assert fetch(NAME, progress=False).read_bytes() == CONTENT
    host.location = host.url + "/moved/it"
    assert fetch(NAME, progress=False, force=True).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "location",
    [
        *(
            "file:///etc/passwd",
            "ftp://127.0.0.1:9/x",
            "data:,x",
            "gopher://x",
            "http://[bad",
            "http://127.0.0.1:port/x",
        ),
        *("http:///x", f"http://{'a' * 300}/x", "http://127.0.0.1:99999999/x", "", f"/{PUBLISHED}", "/\x1b[31mred"),
    ],
)
def test_redirects_elsewhere_are_refused(host: Host, tmp_path: Path, location: str) -> None:
    host.location = location
    assert host.url in refused()
    path, part = place(tmp_path)
    assert not path.exists()
    assert not part.exists()


@pytest.mark.parametrize(
    "base",
    [
        "nonsense",
        "file:///etc",
        "ftp://host/x",
        "http://",
        "http:///x",
        "http://[",
        "http://[::1",
        "http://host:abc",
        "http://host:99999999",
        "http://host:0",
        "host/folder",
        "//host/folder",
        "http://host/données",
        "http://a b/",
        "http://host/\n",
        "http://host/\x1b[31m",
        " ",
    ],
)
def test_a_mirror_that_is_no_web_address(host: Host, base: str) -> None:
    assert "is no web address" in refused(base_url=base)
    assert host.requests == []


@pytest.mark.parametrize("kind", ["folder", "below a file", "device"])
def test_a_destination_that_cannot_be_written(host: Host, tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("here")
    dest = {"folder": tmp_path, "below a file": tmp_path / "file/x.hdf5", "device": Path("/dev/null")}[kind]
    message = refused(dest)
    assert str(dest) in message
    assert "--dest" in message
    assert host.requests == []
    assert (tmp_path / "file").read_text() == "here"


def test_a_part_that_is_no_file_does_not_hang(host: Host, tmp_path: Path) -> None:
    for kind in ("pipe", "folder"):
        part = tmp_path / f"{kind}.hdf5.part"
        os.mkfifo(part) if kind == "pipe" else part.mkdir()
        assert f"{part}: this is a folder or a pipe; remove it" in refused(tmp_path / f"{kind}.hdf5")


@pytest.mark.parametrize("garbage", [b"", b"\xff\xfe\x00", b"hello", b"0" * 64 + b"  x", b"\n" * 99])
def test_a_checksum_file_of_garbage(host: Host, garbage: bytes) -> None:
    path = fetch(NAME, progress=False)
    path.with_name(path.name + ".sha256").write_bytes(garbage)
    assert ".sha256" in (message := refused())
    assert "--force" in message
    assert fetch(NAME, progress=False, force=True) == path
    assert fetch(NAME, progress=False) == path


@pytest.mark.parametrize("cut", [None, 100_000])
def test_a_server_that_goes_silent_is_left(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int | None
) -> None:
    monkeypatch.setattr(fetch_module, "TIMEOUT", 0.2)
    host.stalls, host.cut = True, cut
    if cut is None:
        host.raw = b""
    else:
        host.ranges = False
    assert "timed out" in refused()
    _, part = place(tmp_path)
    assert (part.stat().st_size if part.exists() else 0) == (cut or 0)  # what came before the silence is kept
    assert len(host.requests) == fetch_module.ATTEMPTS + bool(cut)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"hello\r\n\r\n",
        b"HTTP/1.1 \x1b[31m OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nmany\r\nhello\r\n",
        b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 7-9/10\r\n\r\nabc",
        b"HTTP/1.1 999 \x1b[31mred\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
    ],
)
def test_answers_that_are_no_file(host: Host, tmp_path: Path, raw: bytes) -> None:
    host.raw = raw
    assert host.url in refused()
    assert not place(tmp_path)[0].exists()


def test_a_body_in_chunks(host: Host) -> None:
    blocks = [CONTENT[start : start + 50_000] for start in range(0, len(CONTENT), 50_000)] + [b""]
    body = b"".join(b"%x\r\n%b\r\n" % (len(block), block) for block in blocks)
    host.raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body
    assert fetch(NAME, progress=False).read_bytes() == CONTENT


class FullDisk(io.BufferedWriter):
    """A file on a disk with room for 100,000 bytes."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_disk_that_fills_up(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, part = place(tmp_path)
    fetch(NAME, progress=False)
    host.requests = []

    def full(place: Path, mode: str) -> Any:
        return open(place, mode) if "r" in mode else FullDisk(io.FileIO(place, mode))

    monkeypatch.setattr(fetch_module, "open", full, raising=False)
    message = refused(force=True)
    assert "No space left on device" in message
    assert str(path) in message
    assert len(host.requests) == 1  # no use in asking again
    assert path.read_bytes() == CONTENT  # the old file is as it was
    assert fetch(NAME, progress=False) == path
    kept = part.stat().st_size
    assert 90_000 < kept <= 100_000
    monkeypatch.setattr(fetch_module, "open", open)
    fetch(NAME, progress=False, force=True)
    assert host.requests[-1] == (PUBLISHED, f"bytes={kept}-")
    assert path.read_bytes() == CONTENT


def test_a_disk_that_is_full_from_the_start(host: Host, tmp_path: Path) -> None:
    path, part = place(tmp_path)
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    assert "No space left on device" in refused()
    assert not path.exists()


def test_ids_that_cannot_be_fetched(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OffrlError, match="did you mean hopper-medium-v2"):
        fetch("hoper-medium-v2", progress=False)
    with pytest.raises(OffrlError, match="offrl data build forge/hopper/medium-v0"):
        fetch("forge/hopper/medium-v0", progress=False)


@pytest.mark.parametrize("name", ["../x-v0", "a/../../x-v0", "hf://../x-v0", "/tmp/x-v0", "./x-v0", "a/.hidden-v0"])
def test_a_minari_id_leads_nowhere_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari")
    monkeypatch.setattr(minari, "download_dataset", lambda *_, **__: pytest.fail("it was asked for"))
    with pytest.raises(OffrlError):
        fetch(name, progress=False)


def test_minari_ids_go_through_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    asked = []
    monkeypatch.setattr(minari, "download_dataset", lambda name, force_download: asked.append((name, force_download)))
    assert fetch("D4RL/pen/human-v2") == tmp_path / "D4RL/pen/human-v2"
    assert fetch("hf://somebody/maze/set-v1", force=True) == tmp_path / "maze/set-v1"
    assert asked == [("D4RL/pen/human-v2", False), ("hf://somebody/maze/set-v1", True)]

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(minari, "download_dataset", fail)
    with pytest.raises(OffrlError, match="no route"):
        fetch("D4RL/pen/human-v2")


# ---- OGBench ------------------------------------------------------------------------------------------------------


def trajectories() -> bytes:
    """A file of pointmaze-medium: three trajectories of 20 transitions."""
    rng, memory = np.random.default_rng(0), io.BytesIO()
    places = rng.uniform(0, 20, (63, 2)).astype("f4")
    ends = np.arange(63) % 21 == 20
    np.savez(memory, observations=places, actions=places / 20, terminals=ends, qpos=places, qvel=0 * places)
    return memory.getvalue()


@pytest.mark.parametrize("below", ["", "mirror/of/"])
def test_an_ogbench_file_is_fetched_once_for_all_its_tasks(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    name = "pointmaze-medium-navigate"
    host.files, host.cut, host.cuts = {f"{below}{name}-v0.npz": trajectories()}, 700, 1  # the first connection breaks
    monkeypatch.setenv("OFFRL_OGBENCH_URL", f"{host.url}/{below}")
    path = fetch(f"{name}-singletask-task2-v0", progress=False)
    assert path == tmp_path / f"ogbench/{name}-v0.npz"
    assert path.read_bytes() == trajectories()
    assert [wanted for _, wanted in host.requests] == [None, "bytes=700-"]
    assert fetch(f"{name}-singletask-v0", progress=False) == path
    assert len(host.requests) == 2
    assert len(load(f"{name}-singletask-task5-v0")) == 60


def test_where_ogbench_s_files_are_published_and_what_is_no_such_file(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert candidates(f"{fetch_module.OGBENCH.base}cube-single-play-v0.npz", None, fetch_module.OGBENCH) == [
        "https://rail.eecs.berkeley.edu/datasets/ogbench/cube-single-play-v0.npz"
    ]
    monkeypatch.setenv("OFFRL_OGBENCH_URL", host.url)
    with pytest.raises(OffrlError, match=r"no such file .* OFFRL_OGBENCH_URL, .* OGBENCH_DATASET_DIR names"):
        fetch("scene-play-singletask-v0", progress=False)
    for content, reason in ((b"<html>no</html>", "no NPZ file"), (trajectories()[:-200], "cut off or damaged")):
        host.files = {"scene-play-v0.npz": content}
        with pytest.raises(OffrlError, match=rf"is not the dataset: .*{reason}"):
            fetch("scene-play-singletask-v0", progress=False)
        assert not list(tmp_path.glob("ogbench/scene*.npz*"))
    with pytest.raises(OffrlError, match="forge datasets are built"):
        fetch("forge/ogbench/cube-single-play-v0", progress=False)
