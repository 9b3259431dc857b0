"""What an update's cost grows with: lanes, rows of data, batch, width of the networks, for TD3+BC, IQL and PRDC.

    python benchmarks/speed/growth.py                       # measures what is not in the rows yet, then draws the picture
    python benchmarks/speed/growth.py --turns 3             # until every cell was measured three times; the best counts
    python benchmarks/speed/growth.py --draw                # the picture alone

One setting at a time is changed from one lane, 100,000 rows, batch 256 and width 256 (two hidden layers). Every cell runs on
one thread for about a second of CPU time, and its rate is updates per second of CPU time, which depends less than wall time on
what else the machine does. States lie on a surface of three dimensions, as those of a robot under a policy nearly do: PRDC's
search would visit every row if they filled the space. Ten million rows are mapped from a file (1.7 GB), not held in memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offrl.agents.base import Spec
from offrl.data.dataset import OfflineDataset
from offrl.results import style
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import make_engine
from offrl.training.runs import make_agent
from offrl.utils.process import tune_process

OBS, ACTION, EPISODE = 17, 6, 1000
AGENTS = {"td3_bc": "TD3BC", "iql": "IQL", "prdc": "PRDC"}  # file and class
GRID = {
    "lanes": (1, 2, 5, 10, 20, 50),
    "rows": (100_000, 1_000_000, 10_000_000),
    "batch": (256, 512, 1024, 2048, 4096),
    "width": (64, 128, 256, 512, 1024),
}
MAPPED = 2_000_000  # more rows than these are mapped
ROWS = Path(__file__).parent / "results" / "growth_1core.jsonl"
PICTURE = Path(__file__).parents[2] / "docs" / "img" / "growth.png"


@dataclass(frozen=True)
class Cell:
    agent: str
    lanes: int = 1
    rows: int = 100_000
    batch: int = 256
    width: int = 256


def cells() -> list[Cell]:
    """All cells, each once, those of few rows first."""
    every = [
        replace(Cell(agent), **{name: value}) for agent in AGENTS for name, values in GRID.items() for value in values
    ]
    every = [cell for cell in every if cell.agent != "prdc" or cell.rows <= MAPPED]  # its index is in memory
    return sorted(dict.fromkeys(every), key=lambda cell: cell.rows)


def states(rows: np.ndarray) -> np.ndarray:
    """`[n, 17]`: sines of the episode's two numbers and of the timestep, which row numbers give."""
    generator = np.random.default_rng(0)
    directions, phases = generator.normal(size=(3, OBS)), generator.uniform(0, 2 * np.pi, OBS)
    episode, timestep = np.divmod(rows, EPISODE)
    place = np.stack([episode * 0.618 % 1, episode * 0.414 % 1, timestep / EPISODE * 6], -1)
    return np.sin(place @ directions + phases).astype(np.float32)


def dataset(rows: int, folder: Path) -> OfflineDataset:
    columns: dict[str, Any] = {}
    for name, shape in {"obs": (rows, OBS), "action": (rows, ACTION), "next_obs": (rows, OBS)}.items():
        mapped = rows > MAPPED
        path = folder / f"{name}{rows}"
        columns[name] = np.memmap(path, np.float32, "w+", shape=shape) if mapped else np.empty(shape, np.float32)
    for first in range(0, rows, 100_000):
        part = np.arange(first, min(first + 100_000, rows))
        columns["obs"][part], columns["next_obs"][part] = states(part), states(part + 1)
        noise = np.random.default_rng(first).normal(0, 0.1, (len(part), ACTION))
        columns["action"][part] = np.clip(columns["obs"][part, :ACTION] + noise, -1, 1)
    obs, action, next_obs = (torch.from_numpy(columns[name]) for name in ("obs", "action", "next_obs"))
    return OfflineDataset(obs, action, action.sum(1), next_obs, torch.zeros(rows), torch.arange(0, rows + 1, EPISODE))


def measure(cell: Cell, store: OfflineDataset, seconds: float) -> dict[str, Any]:
    """Updates per second of CPU time, after the first ones."""
    some = store.observations[:: len(store) // 100_000]
    spec = Spec(OBS, ACTION, tuple(range(cell.lanes)), some.mean(0), some.std(0))
    target = f"offrl.agents.{cell.agent}.{AGENTS[cell.agent]}"
    agent = make_agent({"_target_": target, "hidden": [cell.width, cell.width]}, spec)
    agent.setup(store)
    engine = make_engine(
        "eager", agent, BatchLoader([(store, Uniform(store), 1.0)], cell.batch, None, agent.batch_fields)
    )
    engine.run(0, 2)
    done, burst, began, clock = 2, 2, time.process_time(), time.perf_counter()
    while (spent := time.process_time() - began) < seconds:
        engine.run(done, burst)
        done, burst = done + burst, min(2 * burst, 64)
    updates = done - 2
    share = spent / (time.perf_counter() - clock)  # of a core; small: others were using it
    return {
        **asdict(cell),
        "updates": updates,
        "updates_per_cpu_second": updates / spent,
        "share_of_core": round(share, 2),
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    base = asdict(Cell(""))
    with style.sheet(1, 4, (11, 2.9), sharey="row") as (figure, panels):
        for panel, (name, values) in zip(panels[0], GRID.items()):
            for (agent, title), colour in zip(AGENTS.items(), style.COLOURS):
                same = {key: value for key, value in base.items() if key not in (name, "agent")}
                best: dict[int, float] = {}
                for row in rows:
                    if row["agent"] == agent and same.items() <= row.items():
                        rate = row["lanes"] * row["updates_per_cpu_second"]
                        best[row[name]] = max(rate, best.get(row[name], 0.0))
                x = sorted(best)
                panel.plot(x, [best[value] for value in x], "o-", color=colour, markersize=3, linewidth=1, label=title)
            panel.set(xscale="log", yscale="log")
            panel.set_xticks(
                values, [f"{value:g}" if value < 10_000 else f"1e{len(str(value)) - 1}" for value in values]
            )
            panel.minorticks_off()
            style.label(panel, name, "", "seed-updates/s" if name == "lanes" else "")
        panels[0, 0].legend(frameon=False)
        style.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="of CPU time for each cell")
    parser.add_argument("--turns", type=int, default=1, help="rows that every cell has in the end")
    parser.add_argument("--out", type=Path, default=ROWS, help="JSON lines, which are added to")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    there = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    if not arguments.draw:
        tune_process(1)
        about = {"torch": torch.__version__, "machine": platform.platform()}
        done = {cell: sum(asdict(cell).items() <= row.items() for row in there) for cell in cells()}
        missing = [cell for cell, turns in done.items() for _ in range(arguments.turns - turns)]
        stores: dict[int, OfflineDataset] = {}
        with tempfile.TemporaryDirectory() as folder:
            for cell in missing:
                stores = stores if cell.rows in stores else {cell.rows: dataset(cell.rows, Path(folder))}
                row = measure(cell, stores[cell.rows], arguments.seconds) | about
                there.append(row)
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    draw(there, arguments.picture)


if __name__ == "__main__":
    main()
