"""The vectorised evaluator against a plain loop over one environment: same returns, how much faster.

    python benchmarks/speed/evaluation.py                   # 10 episodes x 5 lanes on Hopper and HalfCheetah
    python benchmarks/speed/evaluation.py --workers 1       # in one process, by CPU time: for a machine that is busy

The plain loop is what most code bases have: one environment, one lane, a float32 forward pass per step.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from offrl.agents.base import Agent, Spec
from offrl.agents.td3_bc import TD3BC
from offrl.data.dataset import DatasetInfo
from offrl.envs import make_env
from offrl.evaluation.evaluator import Evaluator
from offrl.training.runs import load_agent
from offrl.utils.process import tune_process


def plain(agents: list[Agent], info: DatasetInfo, episodes: int, seed: int, dtype: torch.dtype) -> np.ndarray:
    """`[lanes, episodes]` returns, one environment at a time."""
    env = make_env(info)
    returns = np.zeros((len(agents), episodes))
    for lane, agent in enumerate(agents):
        policy = agent.to(dtype)
        for episode in range(episodes):
            observation, done = env.reset(seed=seed + episode)[0], False
            while not done:
                obs = torch.as_tensor(observation, dtype=dtype).view(1, 1, -1)
                action = policy.select_action(obs)[0, 0].numpy()
                observation, reward, terminated, truncated, _ = env.step(action)
                returns[lane, episode] += float(reward)
                done = terminated or truncated
    env.close()
    return returns


def lanes_of(folder: Path | None, obs: int, action: int, lanes: int) -> tuple[Agent, list[Agent]]:
    """An agent with all lanes, and each lane as an agent of its own."""
    if folder is None:
        return TD3BC(Spec(obs, action, tuple(range(lanes)))), [TD3BC(Spec(obs, action, (n,))) for n in range(lanes)]
    together = load_agent(folder)
    singles = []
    for lane, seed in enumerate(together.spec.seeds):
        single = type(together)(Spec(obs, action, (seed,)), together.cfg)
        state = {}
        for (key, one), many in zip(single.state_dict().items(), together.state_dict().values()):
            state[key] = many if one.shape == many.shape else many[lane : lane + 1]
        single.load_state_dict(state)
        singles.append(single)
    return together, singles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a Hopper run whose policies to play (default: untrained)")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--lanes", type=int, default=5)
    parser.add_argument("--workers", type=int, help="processes that step environments; default: one per core")
    parser.add_argument("--turns", type=int, default=3, help="the best of them counts")
    arguments = parser.parse_args()
    tune_process(1)
    clock = time.process_time if arguments.workers == 1 else time.perf_counter
    for name, obs, action in (("Hopper-v5", 11, 3), ("HalfCheetah-v5", 17, 6)):
        if arguments.run and name != "Hopper-v5":
            continue
        info = DatasetInfo(id=name, env_id=name, family="gym-mujoco", max_episode_steps=1000)
        together, singles = lanes_of(arguments.run, obs, action, arguments.lanes)
        fast, slow = [], []
        with Evaluator(info, len(singles), arguments.workers) as evaluator:
            evaluator.run(together, arguments.episodes)  # makes the environments
            for _ in range(arguments.turns):
                began = clock()
                ours = evaluator.run(together, arguments.episodes)
                fast.append(clock() - began)
                began = clock()
                plain(singles, info, arguments.episodes, 1_000_000, torch.float32)
                slow.append(clock() - began)
        exact = plain(singles, info, arguments.episodes, 1_000_000, torch.float64)
        steps = int(ours.lengths.sum())
        print(
            f"{name}: {steps} steps in {min(fast):.2f} s ({steps / min(fast):.0f}/s), plain loop {min(slow):.2f} s: "
            f"{min(slow) / min(fast):.1f} x; "
            f"largest difference of a return from the float64 loop {np.abs(ours.returns - exact).max():.1e}"
        )


if __name__ == "__main__":
    main()
