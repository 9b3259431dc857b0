"""Trainings killed at random moments and continued: `python tests/fuzz/kills.py 20 [--seed S] [--only NAME]`.

Each training is made once without interruption and once with one to three SIGKILLs, by the same command. The second has to
end with the same tensors bit for bit (those of kept checkpoints, too), with the same rows, each once, with the same result,
and without litter. The exit status is 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, fields
from multiprocessing import get_context
from multiprocessing.context import ForkProcess as Process
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parent))
from material import INFO, MODEL, columns, trajectories
from safetensors.torch import load_file

import offrl.cli.finetune
import offrl.cli.train  # noqa: F401 - what the forked processes need
from offrl.agents.base import Agent
from offrl.cli.main import main
from offrl.training.compose import choice_file, choices
from offrl.utils.settings import target_class

TRAIN = [
    "batch_size=16",
    "checkpoint_every=20",
    "log_every=10",
    "eval.every=40",
    "eval.episodes=1",
    "eval.final_episodes=2",
    "eval.workers=1",
    "lanes=2",
    "progress=false",
    "name=run",
]
UPDATES, STEPS = 200, 120  # gradient steps of a training, and environment steps of an online phase
SEGMENTS = ["augment.transitions=24", "augment.length=3", "augment.refresh_every=50", "augment.sampling.steps=4"]
DENOISER = {"features": 16, "blocks": 2, "window": 4, "updates": 60, "batch_size": 16}
DIFFUSION = [*SEGMENTS, *(f"augment.denoiser.{key}={value}" for key, value in DENOISER.items())]
AUGMENTATIONS: dict[str, list[str]] = {
    "world_model": [*MODEL, "augment.refresh_every=50"],
    "diffusion": ["augment=diffusion", *DIFFUSION],
    "policy_guided_diffusion": ["augment=policy_guided_diffusion", *DIFFUSION, "augment.coefficient=1"],
}
INTEGERS = ("discrete_cql",)
ONLINE = [f"online.steps={STEPS}", "online.eval_every=40"]
CLOCKS = ("wall_clock",)  # columns of rows that no two trainings share


@dataclass(frozen=True)
class Finished:
    """What a training leaves: tensors by file and name, rows (counted, clocks and rates left out), result, file names."""

    tensors: dict[str, torch.Tensor]
    rows: Counter[str]
    result: dict[str, Any]
    files: list[str]


def trainings() -> dict[str, list[str]]:
    """Words of `offrl` by name: every agent, augmentation and encoder of histories, and an online phase."""
    made: dict[str, list[str]] = {}
    for name in sorted(choices("agent")):
        cls = target_class(OmegaConf.load(choice_file("agent", name)), Agent, "agent")
        hidden = {f.name: [16, 16] for f in fields(cls.Config) if f.name.endswith("hidden")}
        settings = hidden | getattr(cls.Config, "tiny", {})
        words = [
            f"agent.{key}={list(v) if isinstance(v, tuple) else v}".replace(" ", "") for key, v in settings.items()
        ]
        if cls.augmentation:  # a world model, of 250,000 transitions by default
            words += [*MODEL, "augment.refresh_every=50"]
        online = name == "rlpd"  # whose random steps come first, 5,000 by default
        made[name] = [
            f"agent={name}",
            *words,
            *(["updates=0", "online.random_steps=20", *ONLINE] if online else [f"updates={UPDATES}"]),
        ]
    for name, words in AUGMENTATIONS.items():
        made[name] = [*made["td3_bc"], *words]
    made["online"] = [*made["iql"], *ONLINE]
    for name in ("gru", "window"):
        made[name] = [*made["td3_bc"], f"history={name}", "history.context=4"]
    return {name: ["train", *TRAIN, "keep_checkpoints=true", *words] for name, words in made.items()}


def command(name: str, dataset: Path, out: Path, engine: str = "auto") -> list[str]:
    """A training's words; `finetune` continues a copy of the offline run that stands in `dataset`'s folder."""
    end = [f"engine={engine}", f"out={out}"]
    if name == "finetune":
        return ["finetune", str(dataset.parent / "offline/run"), *ONLINE, "keep_checkpoints=true", *end]
    data = dataset.with_name("integers.npz") if name in INTEGERS else dataset
    return [*trainings()[name], f"dataset={data}", *end]


def write_datasets(path: Path) -> None:
    """The dataset of every training, and beside it `integers.npz` for agents of integer actions."""
    np.savez(path, **columns(), offrl_info=json.dumps(INFO))
    integers = trajectories([30, 20, 50, 40], [True, False, True, False], width=4)
    integers["actions"] = np.random.default_rng(0).integers(0, 2, 140)
    info = {"id": "fuzz/cart", "env_id": "CartPole-v1", "family": "fuzz", "max_episode_steps": 20, "discrete": 2}
    np.savez(path.with_name("integers.npz"), **integers, offrl_info=json.dumps(info))


def started(words: list[str], log: Path) -> Process:
    """The command in a process group of its own, without the seconds in which a new Python imports its libraries."""
    process = get_context("fork").Process(target=_act, args=(words, log))
    process.start()
    return process


def _act(words: list[str], log: Path) -> None:
    os.setsid()
    with open(log, "w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    warnings.simplefilter("ignore")
    os._exit(main(words))


def uninterrupted(words: list[str], out: Path) -> tuple[float, Finished]:
    """Seconds from the first row to the end, and what is left."""
    log = out.with_suffix(".log")
    process = started(words, log)
    began = _begun(process, out)
    process.join()
    if process.exitcode:
        raise AssertionError(f"{' '.join(words)}: {log.read_text()[-2000:]}")
    return time.monotonic() - began, finished(out)


def killed(words: list[str], out: Path, seconds: float, rng: random.Random) -> str:
    """Start the training and kill it after a part of `seconds`, seldom so late that it has ended; what happened, in words."""
    process = started(words, out.with_suffix(".log"))
    if rng.random() < 0.8:
        _begun(process, out)
    share = 0.9 * rng.random()
    process.join(share * seconds)
    if process.exitcode is not None:
        return f"ended before {share:.2f} with status {process.exitcode}"
    with suppress(ProcessLookupError):  # it ended this very moment
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return f"killed at {share:.2f}"


def _begun(process: Process, out: Path) -> float:
    """Wait until the run's folder has been written to since now, or the process is done."""
    since = time.time()
    while process.exitcode is None:
        rows = next(out.rglob("config.json"), None)
        if rows is not None and rows.stat().st_mtime >= since:
            break
        time.sleep(0.01)
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


def kill() -> int:
    """Print a line for each training; 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=10, help="trainings that are killed")
    parser.add_argument("--seed", type=int, default=0)
    names = [*trainings(), "finetune"]
    parser.add_argument("--engine", default="auto", help="how updates are run (engine=)")
    parser.add_argument("--only", choices=names, action="append", help="trainings to take, in turn")
    arguments = parser.parse_args()
    names = arguments.only or names
    bad = kills = 0
    with tempfile.TemporaryDirectory(prefix="offrl-kills-", ignore_cleanup_errors=True) as place:
        os.environ["OFFRL_HOME"] = f"{place}/home"
        dataset = Path(place) / "base.npz"
        write_datasets(dataset)
        offline = Path(place) / "offline"
        if "finetune" in names:
            uninterrupted([*trainings()["iql"], f"dataset={dataset}", f"out={offline}"], offline)
        whole: dict[str, tuple[float, Finished]] = {}
        for number in range(arguments.count):
            name, out = names[number % len(names)], Path(place) / f"{number}"
            if name not in whole:
                reference = Path(place) / name
                whole[name] = uninterrupted(command(name, dataset, reference, arguments.engine), reference)
            seconds, expected = whole[name]
            rng = random.Random(f"{arguments.seed}:{name}:{number}")
            words = command(name, dataset, out, arguments.engine)
            told = [killed(words, out, seconds, rng) for _ in range(rng.choice([1, 1, 2, 3]))]
            last, log = started(words, out.with_suffix(".log")), out.with_suffix(".log")
            last.join()
            wrong = f"status {last.exitcode}: {log.read_text()[-500:]}" if last.exitcode else ""
            wrong = wrong or difference(expected, finished(out))
            bad, kills = bad + bool(wrong), kills + sum(text.startswith("killed") for text in told)
            print(f"{name} {number}: {', '.join(told)}: {wrong or 'equal'}", flush=True)
            shutil.rmtree(out)
    print(f"{arguments.count} trainings, {kills} kills, {bad} differ (seed {arguments.seed})")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(kill())
