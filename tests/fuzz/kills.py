"""Trainings killed at random moments and continued: `python tests/fuzz/kills.py 20 [--seed S] [--agent A]`.

Each training is made once without interruption and once with one to three SIGKILLs, by the same command. The second has to
end with the same tensors bit for bit (those of kept checkpoints, too), with the same rows, each once, with the same result,
and without litter. The exit status is 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from material import INFO, columns
from safetensors.torch import load_file

TRAIN = [
    "updates=600",
    "batch_size=16",
    "checkpoint_every=60",
    "log_every=30",
    "eval.every=120",
    "eval.episodes=1",
    "eval.final_episodes=2",
    "eval.workers=1",
    "keep_checkpoints=true",
    "lanes=2",
    "engine=eager",
    "progress=false",
]
AUGMENT = [
    "augment=world_model",
    "augment.model.members=2",
    "augment.model.elites=1",
    "augment.model.hidden=[8]",
    "augment.model.updates=50",
    "augment.transitions=64",
    "augment.refresh_every=150",
]
AGENTS: dict[str, list[str]] = {
    "bc": ["agent=bc", "agent.hidden=[16]"],
    "td3_bc": ["agent=td3_bc", "agent.hidden=[16]"],
    "iql": ["agent=iql", "agent.hidden=[16]"],
    "dt": ["agent=dt", "updates=180"],
    "augmented": ["agent=td3_bc", "agent.hidden=[16]", *AUGMENT],
}
CLOCKS = ("wall_clock",)  # columns of rows that no two trainings share


@dataclass(frozen=True)
class Finished:
    """What a training leaves: tensors by file and name, rows (counted, clocks and rates left out), result, file names."""

    tensors: dict[str, torch.Tensor]
    rows: Counter[str]
    result: dict[str, Any]
    files: list[str]


def command(agent: str, dataset: Path, out: Path) -> list[str]:
    words = [*TRAIN, *AGENTS[agent], f"dataset={dataset}", f"out={out}", "name=run"]
    last = {word.split("=", 1)[0]: word for word in words}  # an agent's word goes before the common one
    return [sys.executable, "-m", "offrl.cli.main", "train", *last.values()]


def uninterrupted(words: list[str], out: Path) -> tuple[float, Finished]:
    """Seconds from the first row to the end, and what is left."""
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True) as process:
        began = _begun(process, out)
        error = process.communicate()[1].decode()
    if process.returncode:
        raise AssertionError(f"{' '.join(words[3:])}: {error[-2000:]}")
    return time.monotonic() - began, finished(out)


def killed(words: list[str], out: Path, seconds: float, rng: random.Random) -> str:
    """Start the training and kill it after a part of `seconds`; what happened, in words."""
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env=environment
    ) as process:
        if rng.random() < 0.8:
            _begun(process, out)
        share = rng.random()
        try:
            process.wait(timeout=share * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"killed at {share:.2f}"
    return f"ended before {share:.2f} with status {process.returncode}"


def _begun(process: subprocess.Popen[bytes], out: Path) -> float:
    """Wait until the run's folder has been written to since now, or the process is done."""
    since = time.time()
    while process.poll() is None:
        rows = next(out.rglob("config.json"), None)
        if rows is not None and rows.stat().st_mtime >= since:
            break
        time.sleep(0.02)
    return time.monotonic()


def finished(out: Path) -> Finished:
    folder = next(out.rglob("config.json")).parent
    files = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    tensors = {
        f"{name}:{key}": tensor
        for name in files
        if name.endswith(".safetensors")
        for key, tensor in load_file(folder / name).items()
    }
    rows: Counter[str] = Counter()
    for kind in ("episodes", "metrics"):
        for line in (folder / f"{kind}.jsonl").read_text().splitlines():
            row = {key: value for key, value in json.loads(line).items() if key not in CLOCKS}
            if row.get("metric") == "updates_per_second":
                row["value"] = None
            rows[json.dumps(row, sort_keys=True)] += 1
    return Finished(tensors, rows, json.loads((folder / "result.json").read_text()), files)


def difference(one: Finished, other: Finished) -> str:
    """The first thing in which two trainings differ; empty where nothing does."""
    if one.files != other.files:
        return f"files {sorted(set(one.files) ^ set(other.files))}"
    for name, tensor in one.tensors.items():
        if not torch.equal(tensor, other.tensors[name]):
            return f"tensor {name}"
    if one.rows != other.rows:
        return f"rows {list((one.rows - other.rows) + (other.rows - one.rows))[:2]}"
    if repeated := [row for row, count in other.rows.items() if count > 1]:
        return f"row repeated {repeated[0]}"
    return "" if one.result == other.result else f"result {one.result} {other.result}"


def main() -> int:
    """Print a line for each training; 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=10, help="trainings that are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--agent", choices=AGENTS, action="append")
    arguments = parser.parse_args()
    names = arguments.agent or list(AGENTS)
    bad = 0
    with tempfile.TemporaryDirectory(prefix="offrl-kills-") as place:
        os.environ["OFFRL_HOME"] = f"{place}/home"
        dataset = Path(place) / "base.npz"
        np.savez(dataset, **columns(), offrl_info=json.dumps(INFO))
        whole: dict[str, tuple[float, Finished]] = {}
        for number in range(arguments.count):
            name, out = names[number % len(names)], Path(place) / f"{number}"
            if name not in whole:
                reference = Path(place) / name
                whole[name] = uninterrupted(command(name, dataset, reference), reference)
            seconds, expected = whole[name]
            rng, words = random.Random(f"{arguments.seed}:{name}:{number}"), command(name, dataset, out)
            told = [killed(words, out, seconds, rng) for _ in range(rng.choice([1, 1, 2, 3]))]
            last = subprocess.run(words, capture_output=True, text=True)
            wrong = f"status {last.returncode}: {last.stderr[-500:]}" if last.returncode else ""
            wrong = wrong or difference(expected, finished(out))
            bad += bool(wrong)
            print(f"{name} {number}: {', '.join(told)}: {wrong or 'equal'}", flush=True)
    print(f"{arguments.count} trainings, {bad} differ (seed {arguments.seed})")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
