"""Downloads from a server that breaks off, lies about lengths and ranges, redirects, and sends something else."""

from __future__ import annotations

import contextlib
import json
import socket
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
from judge import Case
from material import Material
from mutate import Rng, as_file, bytes_of

NAME = "hopper-medium-v2"
ODD_LENGTHS = ["", "x", "-1", "1e3", "0", "99999999999999999999", "1, 2", "٣", "0x10", "5"]
PLACES = [
    "file:///etc/passwd",
    "ftp://127.0.0.1/x",
    "//",
    "http://[",
    "http://127.0.0.1:99999/",
    "x" * 5000,
    "",
    "data:,x",
    "/",
    "é",
]


def _serve(listener: socket.socket, answers: Path) -> None:
    """Answer each request by the next of the answers that lie in a folder, the last one again and again."""
    while True:
        connection, _ = listener.accept()
        with contextlib.suppress(OSError), connection:
            asked = b""
            while b"\r\n\r\n" not in asked and (more := connection.recv(1 << 16)):
                asked += more
            rest = sorted(answers.iterdir())
            answer = json.loads(rest[0].read_bytes())
            if len(rest) > 1:
                rest[0].unlink()
            body = bytes.fromhex(answer["body"])
            begin = int(asked.split(b"bytes=")[1].split(b"-")[0]) if b"bytes=" in asked and answer["ranges"] else 0
            range_of = (
                f"Content-Range: bytes {begin + answer['shift']}-{len(body) - 1}/{len(body)}\r\n" if begin else ""
            )
            head = (
                answer["head"]
                .replace("@LENGTH", str(len(body) - begin))
                .replace("@STATUS", "206 x" if begin else "200 OK")
            )
            connection.sendall(
                head.replace("@RANGE", range_of).encode("utf-8", "surrogatepass") + body[begin:][: answer["cut"]]
            )


@cache
def _server(place: Path) -> str:
    """The address of a server in a process that ends with this one."""
    listener = socket.create_server(("127.0.0.1", 0))
    get_context("fork").Process(target=_serve, args=(listener, place), daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


@cache
def _content(place: Path) -> bytes:
    rng = np.random.default_rng(0)
    with h5py.File(place / "hopper.hdf5", "w") as file:
        for key, shape in {"observations": (900, 11), "actions": (900, 3), "rewards": (900,)}.items():
            file.create_dataset(key, data=rng.uniform(-1, 1, shape).astype("f4"), compression="gzip")
        for key in ("terminals", "timeouts"):
            file.create_dataset(key, data=rng.random(900) < 0.01, compression="gzip")
    return (place / "hopper.hdf5").read_bytes()


def server(material: Material, folder: Path, rng: Rng) -> Case:
    """`offrl data fetch` with one to four odd answers before, or instead of, an honest one."""
    answers = material.place / "answers"
    answers.mkdir(exist_ok=True)
    for old in answers.iterdir():
        old.unlink()
    honest = _content(material.place)
    told, lies = [], False
    odd = rng.choice([1, 1, 2, 4])
    for number in range(odd):
        answer, what, lie = _answer(honest, rng)
        told.append(what)
        lies |= lie
        (answers / f"{number}.json").write_text(json.dumps(answer))
    if rng.random() < 0.7:
        (answers / f"{odd}.json").write_text(json.dumps(_plain(honest)))
    target = folder / "home/d4rl" / f"{NAME}.hdf5"
    target.parent.mkdir(parents=True)
    if rng.random() < 0.5:
        told.append(_before(target, honest, rng, material.outside))
        lies |= not told[-1].startswith("honest")
    words = ["data", "fetch", NAME, "--base-url", _server(answers)] + rng.choice([[], [], ["--force"]])

    def wrong() -> str:
        same = lies or target.read_bytes() == honest
        return "" if same else "the file is another than the server's"

    return Case(words, "; ".join(told), env={"OFFRL_HOME": str(folder / "home")}, wrong=wrong)


def _plain(body: bytes) -> dict[str, object]:
    head = "HTTP/1.1 @STATUS\r\nContent-Length: @LENGTH\r\n@RANGE\r\n"
    return {"head": head, "body": body.hex(), "cut": 1 << 40, "ranges": True, "shift": 0}


def _answer(honest: bytes, rng: Rng) -> tuple[dict[str, object], str, bool]:
    """An odd answer, in words, and whether its content may be taken for another file's."""
    answer, kind = (
        _plain(honest),
        rng.choice(["cut", "cut", "length", "lengths", "status", "redirect", "range", "body", "noise", "other"]),
    )
    if kind == "cut":
        answer["cut"] = rng.choice([0, 1, 100, len(honest) // 2, len(honest) - 1])
        answer["ranges"] = rng.random() < 0.5
        if rng.random() < 0.3:  # nothing says how much should have come
            answer["head"] = "HTTP/1.1 @STATUS\r\n@RANGE\r\n"
        return answer, f"cut after {answer['cut']}", False
    if kind in ("length", "lengths"):
        lengths = [rng.choice(ODD_LENGTHS) for _ in range(1 if kind == "length" else 2)]
        answer["head"] = "HTTP/1.1 @STATUS\r\n" + "".join(f"Content-Length: {n}\r\n" for n in lengths) + "@RANGE\r\n"
        return answer, f"lengths {lengths}", False
    if kind == "status":
        status = rng.choice(
            [
                "404 x",
                "500 x",
                "416 x",
                "206 x",
                "204 x",
                "999 x",
                "x",
                "200",
                "100 Continue",
                "302 x",
                "401 x",
                "000 x",
            ]
        )
        answer["head"] = f"HTTP/1.1 {status}\r\nContent-Length: @LENGTH\r\n@RANGE\r\n"
        return answer, f"status {status}", False
    if kind == "redirect":
        place = rng.choice(PLACES)
        answer["head"] = f"HTTP/1.1 302 x\r\nLocation: {place}\r\nContent-Length: @LENGTH\r\n\r\n"
        return answer, f"redirect to {place[:30]!r}", False
    if kind == "range":
        answer["shift"] = rng.choice([1, -1, 10**6])
        return answer, f"range shifted by {answer['shift']}", False
    if kind == "body":
        damaged, what = bytes_of(honest, rng)
        answer["body"] = damaged.hex()
        return answer, what, True
    if kind == "other":
        answer["body"] = rng.choice([b"", b"<html>", b"\x1f\x8b", b"PK\x03\x04", honest[: len(honest) // 2]]).hex()
        return answer, "another body", True
    answer["head"] = rng.choice(
        [
            "",
            "x\r\n\r\n",
            "HTTP/1.1 @STATUS\r\n" + "A: b\r\n" * 200 + "\r\n",
            "HTTP/9 200\r\n\r\n",
            "\0" * 100,
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n",
        ]
    )
    return answer, f"head {answer['head'][:40]!r}", False


def _before(target: Path, honest: bytes, rng: Rng, outside: tuple[Path, ...]) -> str:
    """What lies where the download goes: a part of it, a sum, a whole file, in order or not."""
    kind = rng.choice(
        [
            "honest part",
            "foreign part",
            "longer part",
            "sum alone",
            "garbage sum",
            "damaged file",
            "odd part",
            "odd version",
            "odd sum",
            "odd file",
        ]
    )
    part, sums = target.with_name(f"{target.name}.part"), target.with_name(f"{target.name}.sha256")
    if kind == "honest part":
        part.write_bytes(honest[: rng.randrange(len(honest) + 1)])
    elif kind == "foreign part":
        part.write_bytes(rng.randbytes(1000))
    elif kind == "longer part":
        part.write_bytes(honest + b"x" * 10)
    elif kind.endswith("sum"):
        sums.write_bytes(rng.choice([b"", b"\xff" * 10, b"0" * 64 + b"  x\n", b"x\n"]))
        if kind == "garbage sum":
            target.write_bytes(honest)
    elif kind == "damaged file":
        target.write_bytes(bytes_of(honest, rng)[0])
    else:
        version = part.with_name(f"{part.name}.version")
        path = {"odd part": part, "odd version": version, "odd file": target}.get(kind, sums)
        path.write_bytes(b"x")
        kind += f" {as_file(path, rng, outside)}"
    return kind
