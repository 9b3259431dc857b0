"""How long `offrl` takes to start: its help, the state of a hundred runs, and a training up to its first update.

    python benchmarks/speed/startup.py                  # best of five of each; a million rows from the flat cache
    python benchmarks/speed/startup.py --imports        # and the modules whose imports cost most

Wall time is what a user waits; CPU time hardly depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from offrl.data.arrays import write_npz
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.training.compose import compose
from offrl.training.trainer import train

# `offrl train`, which ends with the first update. PyTorch is imported where the command imports it.
TO_THE_FIRST_UPDATE = """
import os, sys
from offrl.cli import main
run = main._run
def ends_early(words):
    from offrl.agents.td3_bc import TD3BC
    update = TD3BC.update
    TD3BC.update = lambda *arguments: (update(*arguments), os._exit(0))
    return run(words)
main._run = ends_early
main.main(sys.argv[1:])
"""


def write_dataset(path: Path, rows: int) -> None:
    """Random rows of HalfCheetah's sizes, in episodes of 1000 steps."""
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(rows + 1, 17, generator=generator)
    action, reward = torch.rand(rows, 6, generator=generator) * 2 - 1, torch.randn(rows, generator=generator)
    bounds = torch.arange(0, rows + 1, 1000)  # of episodes
    info = DatasetInfo(id="random", env_id="HalfCheetah-v5", max_episode_steps=1000)
    write_npz(OfflineDataset(obs[:-1], action, reward, obs[1:], torch.zeros(rows), bounds, info), path)


def seconds(command: list[str], turns: int) -> tuple[float, float]:
    """Wall and CPU time of a command, the least of some turns."""
    wall, cpu = [], []
    for _ in range(turns):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wall.append(time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(wall), min(cpu)


def dear_imports(command: list[str], count: int = 12) -> list[str]:
    """Modules that take longest to import, themselves and what they import, in milliseconds."""
    done = subprocess.run([command[0], "-X", "importtime", *command[1:]], capture_output=True, text=True)
    rows = re.findall(r"import time:\s+\d+ \|\s+(\d+) \| +(\S+)", done.stderr)
    return [f"{int(time_) / 1000:7.0f}  {name}" for time_, name in sorted(rows, key=lambda row: -int(row[0]))[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--imports", action="store_true", help="print what the imports cost")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["OFFRL_HOME"] = str(folder / "home")
        data, runs = folder / "random.npz", folder / "runs"
        write_dataset(data, arguments.rows)
        options = {"agent": "td3_bc", "dataset": str(data), "progress": False}
        small = {"updates": 10, "agent.hidden": [8, 8], "eval.every": 0, "eval.final_episodes": 0}
        made = train(compose({**options, **small, "out": str(folder / "one")}))  # fills the cache, too
        for number in range(100):
            shutil.copytree(made.folder, runs / f"td3_bc/random.npz/{number}")
        words = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in options.items()]
        train_words = ["train", *words, f"out={folder / 'first'}"]
        commands = {
            "offrl --help": [sys.executable, "-m", "offrl", "--help"],
            "offrl status, 100 runs": [sys.executable, "-m", "offrl", "status", str(runs)],
            f"offrl train, {arguments.rows} rows, first update": [
                sys.executable,
                "-c",
                TO_THE_FIRST_UPDATE,
                *train_words,
            ],
        }
        for title, command in commands.items():
            wall, cpu = seconds(command, arguments.turns)
            print(f"{title:48} {wall:6.2f} s, CPU {cpu:6.2f} s", flush=True)
            if arguments.imports:
                print(*dear_imports(command), sep="\n")


if __name__ == "__main__":
    main()
