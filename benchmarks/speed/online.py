"""Environment steps per second of an online phase, beside the loop of corl-team/CORL.

    python benchmarks/speed/online.py --corl PATH --steps 2000

IQL on Hopper-v5 with one update per step (networks of 256 x 256, batches of 256), one and several lanes, one thread. CORL
has its own networks, optimisers, replay and update, in the order of `train` of `algorithms/finetune/iql.py`; neither evaluates.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import gymnasium
import torch

import offrl
from benchmarks.corl import load
from offrl.data.arrays import write_npz
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.results import read_metrics

ENVIRONMENT = "Hopper-v5"


def random_rows(rows: int) -> OfflineDataset:
    """Random rows of the environment's sizes: speed depends on nothing else."""
    generator = torch.Generator().manual_seed(0)
    obs, following = (torch.randn(rows, 11, generator=generator) for _ in range(2))
    action = torch.rand(rows, 3, generator=generator) * 2 - 1
    info = DatasetInfo(id="random", env_id=ENVIRONMENT)
    offsets = torch.arange(0, rows + 1, 100)
    return OfflineDataset(
        obs, action, torch.randn(rows, generator=generator), following, torch.zeros(rows), offsets, info
    )


def ours(dataset: Path, lanes: int, steps: int, burst: int) -> float:
    """Environment steps per second of all lanes together; the first logged interval, which warms up, is left out."""
    evaluation = {"every": 0, "episodes": 0, "final_episodes": 0}
    online = {"steps": steps, "eval_every": 0, "burst": burst, "offline_share": None}
    every = max(burst, steps // 10)
    result = offrl.fit(
        agent="iql", dataset=str(dataset), updates=every, lanes=lanes, log_every=every, checkpoint_every=10**9, progress=False,
        fresh=True, out=str(dataset.parent / "runs"), eval=evaluation, online=online,
    )  # fmt: skip
    rates = read_metrics([result.folder]).filter(metric="updates_per_second").sort("step")["value"].to_list()
    return lanes * median(rates[2:])


def theirs(checkout: Path, steps: int) -> float:
    """Environment steps per second of one seed."""
    corl = load(checkout, "iql", "finetune")
    env, store = gymnasium.make(ENVIRONMENT), random_rows(20_000)
    buffer = corl.ReplayBuffer(11, 3, 20_000 + steps)
    names = ("observations", "actions", "rewards", "next_observations")
    buffer.load_d4rl_dataset({**{n: getattr(store, n).numpy() for n in names}, "terminals": store.terminations.numpy()})
    actor, q, v = corl.GaussianPolicy(11, 3, 1.0), corl.TwinQ(11, 3), corl.ValueFunction(11)
    adams = [torch.optim.Adam(network.parameters(), lr=3e-4) for network in (actor, q, v)]
    trainer = corl.ImplicitQLearning(1.0, actor, adams[0], q, adams[1], v, adams[2])
    state, _ = env.reset(seed=0)
    began, episode_step = 0.0, 0
    for t in range(steps):
        if t == steps // 5:
            began = time.perf_counter()
        episode_step += 1
        action = actor(torch.tensor(state.reshape(1, -1), dtype=torch.float32)).sample().clamp(-1, 1)
        action = action.data.numpy().flatten()
        following, reward, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
        buffer.add_transition(state, action, float(reward), following, done and episode_step < 1000)
        state = following
        if done:
            (state, _), episode_step = env.reset(), 0
        trainer.train(buffer.sample(256))
    return (steps - steps // 5) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corl", type=Path, help="a checkout of corl-team/CORL")
    parser.add_argument("--steps", type=int, default=2000, help="environment steps of every lane")
    parser.add_argument("--lanes", default="1,5", help="numbers of lanes")
    parser.add_argument("--bursts", default="1", help="environment steps in a row")
    parser.add_argument("--turns", type=int, default=3, help="repetitions, alternating; the median is printed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # rows that follow no other row
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "random.npz"
        write_npz(random_rows(20_000), dataset)
        for lanes in map(int, arguments.lanes.split(",")):
            for burst in map(int, arguments.bursts.split(",")):
                cases[f"offrl, {lanes} lanes, burst {burst}"] = lambda a=lanes, b=burst: ours(
                    dataset, a, arguments.steps, b
                )
        if arguments.corl:
            cases["CORL"] = lambda: theirs(arguments.corl, arguments.steps)
        rates: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(arguments.turns):
            for name, case in cases.items():
                rates[name].append(case())
    print(json.dumps({name: round(median(values), 1) for name, values in rates.items()}, indent=1))


if __name__ == "__main__":
    main()
