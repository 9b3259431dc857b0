"""Mutations of bytes, JSON values and files that no format is special to; each returns what it did, in words."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from judge import CANARY

Rng = random.Random
DEEP = 200_000  # levels; a parser that recurses gives up at some thousand
# Words that stand for JSON which Python cannot dump, or which would be slow to.
RAW = {
    "@deep": "[" * DEEP + "]" * DEEP,
    "@infinite": "1e400",
    "@nan": "NaN",
    "@digits": "9" * 5000,
    "@surrogate": '"\\ud800"',
}
ODD_VALUES: list[Any] = [
    *RAW, None, True, False, 0, -1, 1, 3, 10**9, 2**63, -(2**63), 10**30, 0.5, -1e308, "", " ", "text", "0", "nan",
    [], {},
    [None], [1, 2], ["a"], [[]], {"a": 1}, {"_target_": f"{CANARY}.Thing"}, f"{CANARY}:Thing", f"{CANARY}.Thing",
    f"{CANARY}:Thing-v0", f"module:{CANARY}", "os.system", "[red]x[/red]", "two\nlines", "\x1b[31mred", "é" * 3,
    "x" * 5000, "../../../etc/passwd", "/dev/zero", "/", "${oc.env:HOME}", "${nope}", "Pendulum-v1", "Nope-v0",
    "hopper-medium-v2",
]  # fmt: skip


def bytes_of(data: bytes, rng: Rng) -> tuple[bytes, str]:
    """Damage that a disk, a copy or a transfer does."""
    kind = rng.choice(
        ["flip", "flips", "cut", "zeros", "noise", "insert", "repeat", "empty", "swap"] if data else ["insert"]
    )
    at = rng.randrange(max(1, len(data)))
    out = bytearray(data)
    if kind in ("flip", "flips"):
        for _ in range(1 if kind == "flip" else rng.randrange(2, 40)):
            where = rng.randrange(min(len(data), rng.choice([64, 1024, len(data)])))
            out[where] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        out = out[:at]
    elif kind == "zeros":
        out[at : at + rng.choice([8, 512])] = bytes(len(out[at : at + 8]))
    elif kind == "noise":
        out[at : at + 16] = rng.randbytes(len(out[at : at + 16]))
    elif kind == "insert":
        out[at:at] = rng.randbytes(rng.randrange(1, 20))
    elif kind == "repeat":
        out += out[at:]
    elif kind == "empty":
        out = bytearray()
    else:
        out = out[at:] + out[:at]
    return bytes(out), f"bytes: {kind} at {at}"


def json_text(value: Any) -> str:
    """JSON with the `RAW` words replaced by what they stand for."""
    text = json.dumps(value)
    for word, raw in RAW.items():
        text = text.replace(f'"{word}"', raw)
    return text


def value_of(value: Any, rng: Rng, odd: list[Any] | None = None) -> tuple[Any, str]:
    """A JSON value with one to three of its parts removed, replaced, renamed or moved."""
    out, done = copy.deepcopy(value), []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        path = rng.choice(_paths(out))
        new = copy.deepcopy(rng.choice(odd or ODD_VALUES))
        if not path:
            out = new
            done.append(f"all = {_short(new)}")
            continue
        holder, name = out, path[-1]
        for key in path[:-1]:
            holder = holder[key]
        kind = rng.choice(["replace"] * 4 + ["delete", "rename", "more"])
        if kind == "delete":
            del holder[name]
        elif kind == "rename" and isinstance(holder, dict):
            holder[rng.choice(["", "x", "__class__", "@", str(name) + " "])] = holder.pop(name)
        elif kind == "more" and isinstance(holder, dict):
            holder[rng.choice(["", "more", "_target_", "id"])] = new
        else:
            holder[name] = new
        done.append(f"{kind} {'.'.join(map(str, path))} {_short(new) if kind in ('replace', 'more') else ''}".strip())
    return out, "; ".join(done)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, child in items for p in _paths(child, (*path, key)))][:2000]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def json_file(path: Path, rng: Rng) -> str:
    """Change a JSON file's value, or its bytes (of what is no JSON already)."""
    try:
        honest = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        honest = None
    if honest is None or rng.random() < 0.2:
        data, what = bytes_of(path.read_bytes(), rng)
        path.write_bytes(data)
        return f"{path.name} {what}"
    value, what = value_of(honest, rng)
    text = json_text(value)
    style = rng.choice(["plain"] * 8 + ["bom", "utf-16", "comment"])
    path.write_bytes(
        {"bom": b"\xef\xbb\xbf" + text.encode(), "utf-16": text.encode("utf-16"), "comment": text.encode() + b"//"}.get(
            style, text.encode()
        )
    )
    return f"{path.name} ({style}): {what}"


def json_lines(path: Path, rng: Rng) -> str:
    """Change a line of a JSON-lines file, or put garbage between its lines."""
    lines = path.read_bytes().splitlines(keepends=True)
    at = rng.randrange(len(lines))
    kind = rng.choice(
        ["garbage"]
        if not lines[at].startswith(b'{"run_id"')
        else ["value", "value", "value", "garbage", "bom", "torn", "double", "shuffle", "bytes", "empty"]
    )
    what = ""
    if kind == "value":
        value, what = value_of(json.loads(lines[at]), rng)
        lines[at] = json_text(value).encode() + b"\n"
    elif kind == "garbage":
        lines.insert(
            at, rng.choice([b"garbage\n", b"\n", b"{}\n", b"[]\n", b"null\n", b"\xff\xfe\n", b"\0" * 100 + b"\n"])
        )
    elif kind == "bom":
        lines.insert(0, b"\xef\xbb\xbf")
    elif kind == "torn":
        lines[at] = lines[at][: rng.randrange(len(lines[at]))]
    elif kind == "double":
        lines.insert(at, lines[at])
    elif kind == "shuffle":
        rng.shuffle(lines)
    data = b"".join(lines)
    if kind == "bytes":
        data, what = bytes_of(data, rng)
    path.write_bytes(b"" if kind == "empty" else data)
    return f"{path.name} line {at + 1}: {kind} {what}"


def as_file(path: Path, rng: Rng, outside: tuple[Path, ...]) -> str:
    """Put something else in a file's place."""
    kind = rng.choice(["missing", "folder", "pipe", "loop", "dangling", "outside", "huge", "unreadable"])
    path.unlink()
    makers: dict[str, Callable[[], object]] = {
        "missing": lambda: None,
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "loop": lambda: path.symlink_to(path.name),
        "dangling": lambda: path.symlink_to("nothing/here"),
        "outside": lambda: path.symlink_to("/dev/zero"),
        "huge": lambda: _sparse(path),
        "unreadable": lambda: (path.write_bytes(b"{}"), path.chmod(0)),
    }
    makers[kind]()
    return f"{path.name} is {kind}"


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(40 << 30)


def copied(source: Path, folder: Path, name: str | None = None) -> Path:
    """A copy of a file or folder to be changed."""
    target = folder / (name or source.name)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
    return target
