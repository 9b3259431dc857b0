"""Downloads against a local HTTP server that behaves well, breaks off, lies and refuses."""

from __future__ import annotations

import http.server
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from offrl.data import fetch as fetch_module
from offrl.data.fetch import candidates, fetch, sha256
from offrl.datasets import load
from offrl.utils.errors import OffrlError

NAME, PUBLISHED = "hopper-medium-v2", "gym_mujoco_v2/hopper_medium-v2.hdf5"


@dataclass
class Host:
    """What the server does; tests change it while it runs."""

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True  # honours Range
    cut: int | None = None  # bytes a response sends before the connection breaks
    cuts: int = 10**9  # responses that break
    status: int = 200
    promise: int = 0  # bytes that Content-Length adds to the truth
    length: bool = True  # sends Content-Length
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""


class Handler(http.server.BaseHTTPRequestHandler):
    host: Host

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        host, path, wanted = self.host, self.path.lstrip("/"), self.headers.get("Range")
        host.requests.append((path, wanted))
        if host.status != 200 or path not in host.files:
            self.send_error(host.status if host.status != 200 else 404)
            return
        body, start = host.files[path], 0
        if wanted and host.ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if host.length:
            self.send_header("Content-Length", str(len(body) - start + host.promise))
        self.end_headers()
        if host.cut is not None and host.cuts > 0:
            host.cuts -= 1
            self.wfile.write(body[start : start + host.cut])
        else:
            self.wfile.write(body[start:])


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
    monkeypatch.setattr(fetch_module.time, "sleep", lambda seconds: None)
    yield host
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


def test_progress_shows_name_size_rate_and_time_left(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    fetch(NAME, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert NAME in shown.err
    assert "kB" in shown.err or "MB" in shown.err


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
    host.promise = 500
    host.ranges = False
    with pytest.raises(OffrlError, match="the download stopped"):
        fetch(NAME, progress=False)
    assert not path.exists()


def test_a_file_cut_on_the_server_is_found_out_without_a_length(host: Host, tmp_path: Path) -> None:
    path, part = place(tmp_path)
    host.files[PUBLISHED], host.length = CONTENT[:-5000], False
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
    with pytest.raises(OffrlError, match="rewards is damaged"):
        fetch(NAME, progress=False)


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


def test_ids_that_cannot_be_fetched(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OffrlError, match="did you mean hopper-medium-v2"):
        fetch("hoper-medium-v2", progress=False)
    with pytest.raises(OffrlError, match="offrl data build forge/hopper/medium-v0"):
        fetch("forge/hopper/medium-v0", progress=False)


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
