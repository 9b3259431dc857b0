"""Mutated runs: checkpoints and the files of a run's folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from data_inputs import safetensors
from judge import Case
from material import TUNE, Material
from mutate import Rng, as_file, bytes_of, copied, json_file, json_lines
from safetensors.torch import load_file, save_file

from offrl.utils import checkpoint as checkpoints

JSON = ("config.json", "result.json", "manifest.json")
LINES = ("episodes.jsonl", "metrics.jsonl")
TABLES = ("episodes.parquet", "metrics.parquet")


def _command(run: Path, rng: Rng, heavy: bool = False) -> list[str]:
    name = str(run)
    resumed = ["train", f"resume={name}", "progress=false"]
    cheap = [["status", name], ["status", name, "--json"], ["report", name, "--out", "report"]]
    costly = [["evaluate", name, "--episodes", "1", "--workers", "1", "--json"], resumed, resumed]
    tuned = ["finetune", name, *TUNE]
    more = [
        tuned,
        tuned,
        ["select", name, "--updates", "3", "--hidden", "8", "--batch-size", "8", "--out", "select"],
        ["probe", name],
    ]
    return rng.choice(costly * 3 + more if heavy else cheap * 2 + costly + more)


def _run(material: Material, folder: Path, rng: Rng) -> Path:
    return copied(rng.choice([material.finished, material.stopped]), folder, rng.choice(["run", "a=1,b=[2]", "run v1"]))


def checkpoint(material: Material, folder: Path, rng: Rng) -> Case:
    """A checkpoint's header, facts, tensors, types and bytes, with a valid checksum or none."""
    run = _run(material, folder, rng)
    path = run / checkpoints.NAME
    kind = rng.choice(["bytes", "header", "header", "header", "tensors", "tensors", "file"])
    if kind == "bytes":
        data, what = bytes_of(path.read_bytes(), rng)
        path.write_bytes(data)
    elif kind == "header":
        data, what = safetensors(path.read_bytes(), rng)
        path.write_bytes(data)
    elif kind == "tensors":
        what = _tensors(path, rng)
    else:
        what = as_file(path, rng, material.outside)
    if rng.random() < 0.3:
        (run / "result.json").unlink(missing_ok=True)
    return Case(_command(run, rng, heavy=True), f"{kind}: {what}", run)


def _tensors(path: Path, rng: Rng) -> str:
    """Other numbers, types, shapes and names under a checksum that fits, or under none."""
    tensors, facts = checkpoints.load(path)
    name = rng.choice(sorted(tensors))
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "nan": lambda t: t.double().mul(float("nan")).to(t.dtype) if t.is_floating_point() else t,
        "infinite": lambda t: t + float("inf") if t.is_floating_point() else t,
        "integers": lambda t: t.to(torch.int32),
        "bfloat16": lambda t: t.to(torch.bfloat16),
        "float8": lambda t: t.to(torch.float32).to(torch.float8_e4m3fn),
        "complex": lambda t: t.to(torch.complex64),
        "shape": lambda t: t.reshape(-1),
        "larger": lambda t: torch.cat([t.reshape(-1), t.reshape(-1)]),
        "nothing": lambda t: t.reshape(-1)[:0],
        "huge numbers": lambda t: torch.full_like(t, 3e38) if t.is_floating_point() else t,
    }
    kind = rng.choice([*changes, "remove", "rename", "more"])
    if kind in changes:
        tensors[name] = changes[kind](tensors[name]).contiguous()
    elif kind == "remove":
        del tensors[name]
    elif kind == "rename":
        tensors[rng.choice(["", "x", f"sampler/{name}", name + "."])] = tensors.pop(name)
    else:
        tensors["sampler/more"] = torch.zeros(3)
    if rng.random() < 0.7:
        checkpoints.write(path, tensors, facts)
    else:
        header = {"offrl": json.dumps(facts)}
        save_file(tensors, path, metadata=header)
        load_file(path)
    return f"{name}: {kind}"


def run(material: Material, folder: Path, rng: Rng) -> Case:
    """JSON, rows, Parquet copies and other items of a run's folder."""
    target = _run(material, folder, rng)
    (target / "failed.json").write_text('{"message": "out of memory"}')
    if rng.random() < 0.7:  # it goes before the rows in `status`
        (target / "failed.json").unlink()
    done = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        kind = rng.choice(["json", "json", "json", "lines", "lines", "table", "file", "folder"])
        if kind == "json":
            present = [path for name in (*JSON, "failed.json") if _plain(path := target / name)]
            done.append(json_file(rng.choice(present), rng) if present else "")
        elif kind == "lines":
            path = target / rng.choice(LINES)
            if _plain(path):
                done.append(json_lines(path, rng))
                if rng.random() < 0.7:
                    path.with_suffix(".parquet").unlink(missing_ok=True)
        elif kind == "table":
            done.append(_table(target / rng.choice(TABLES), rng))
        elif kind == "file":
            files = [f for f in target.iterdir() if f.is_file() and f.suffix != ".safetensors" and f.name != ".lock"]
            done.append(as_file(rng.choice(sorted(files)), rng, material.outside))
        else:
            done.append(_litter(target, rng))
    return Case(_command(target, rng), "; ".join(done), target)


def _plain(path: Path) -> bool:
    """Whether another mutation has left a file that can be read."""
    return path.is_file() and not path.is_symlink() and 0 < path.stat().st_size < 1 << 20


def _table(path: Path, rng: Rng) -> str:
    if not _plain(path):
        return ""
    kind = rng.choice(["bytes", "bytes", "other columns", "alone"])
    other = path.with_name("metrics.parquet" if path.stem == "episodes" else "episodes.parquet")
    if kind == "other columns" and _plain(other):
        shutil.copy(other, path)
    else:
        data, _ = bytes_of(path.read_bytes(), rng)
        path.write_bytes(data)
    if kind == "alone" or rng.random() < 0.3:
        path.with_suffix(".jsonl").unlink(missing_ok=True)
    return f"{path.name}: {kind}"


def _litter(target: Path, rng: Rng) -> str:
    """What kills and people leave in a run's folder."""
    kind = rng.choice(["part", "checkpoints", "nested run", "lock folder", "odd name"])
    if kind == "part":
        (target / ".checkpoint.safetensors.host-1.part").write_bytes(b"x")
    elif kind == "checkpoints":
        (target / "checkpoints").mkdir(exist_ok=True)
        (target / "checkpoints/zzz.safetensors").write_bytes(b"x" * 100)
    elif kind == "nested run":
        (target / "a").mkdir()
        (target / "a/manifest.json").write_text("[]")
    elif kind == "lock folder":
        (target / ".lock").unlink(missing_ok=True)
        (target / ".lock").mkdir()
    else:
        (target / "x\n[red]y").write_text("x")
    return kind
