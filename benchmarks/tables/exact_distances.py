"""The bisimulation loss on the hidden grid's cue, with the distances that its models learn and with exact ones.

    python benchmarks/tables/exact_distances.py --cell "exact 0.5" --out DIR [--updates 30000] [--lanes 5] [key=value ...]

It answers why the loss of claim I (docs/claims.md) costs there. The metric that the loss is to learn can be computed, since
each row of the dataset has a state that its episode so far tells. "Exact" puts that metric in the place of rewards and models,
"learnt" is the loss as it is, "none" has weight 0; all else is as in histories.py, IQL with a GRU. Distances are given as
shares of the exact ones, over pairs whose rewards are alike: of the encodings, and of what the loss matches them to. "Cue" is
the share of timesteps in the maze whose paying door a linear probe reads from the encoding (half is chance). All lanes'
numbers go to DIR/exact_distances.json. A command that was stopped goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

import offrl
from offrl.agents.base import Batch
from offrl.agents.history import HistoryAgent
from offrl.cli.finetune import value_of
from offrl.data.dataset import OfflineDataset
from offrl.envs.hidden_grid import CELLS, MARK, OUTCOMES, hidden_grid, moved, state_of
from offrl.evaluation.linear_probe import accuracy, encodings, fitted_on, walk
from offrl.nets import per_lane
from offrl.nets.bisimulation import Step, distance_to_match, pairs

sys.path.append(str(Path(__file__).parent))
from histories import GRID, keep, logged, options_of

DATASET = "forge/grid/cue-n2000-v0"
DRAWS = OUTCOMES["cue"]
EPISODES = 400  # of the probe
AVERAGED = 10  # last logged updates whose shares are averaged
CELLS_OF_THE_PAGE = ["none 0", "learnt 0.001", "exact 0.001", "learnt 0.5", "exact 0.5"]
UNKNOWN = -1  # the first row of an episode, before the draw


def states_of(dataset: OfflineDataset) -> Tensor:
    """`[N]` int64: the state of each row, by replaying its episode; -1 for the first of each, before the draw."""
    obs, action = dataset.observations.cpu().numpy(), dataset.actions.cpu().numpy().reshape(-1)
    task, state = hidden_grid("cue"), np.full(len(action), UNKNOWN)
    assert task.coordinates is not None
    for first, end in zip(dataset.offsets.tolist()[:-1], dataset.offsets.tolist()[1:], strict=True):
        draw, cell = int(obs[first + 1, 10]), MARK["0"]
        starts = [MARK["0"], MARK["W"]]
        if end > first + 2:
            cell = next(c for c in starts if np.array_equal(task.coordinates[state_of(DRAWS, draw, c)], obs[first + 2]))
        state[first + 1] = 1 + draw
        for row in range(first + 2, end):
            state[row] = state_of(DRAWS, draw, cell)
            if not np.array_equal(task.coordinates[state[row]], obs[row]):
                raise SystemExit(f"row {row}: its observation is not that of the replayed state.")
            cell = moved(cell, int(action[row]))
    return torch.from_numpy(state)


def exact_distances(dataset: OfflineDataset, state: Tensor, discount: float) -> Tensor:
    """`[S, S]`: d(s, s') = E [|r - r'| + discount d(next, next')] over the same actions of the behaviour, in stds of rewards.

    That is where the loss with `pairs=same_action` has its minimum for encodings of states. A task that has ended is a state
    of reward 0; the state before the draw is left at 0.
    """
    task = hidden_grid("cue")
    end, successor, reward = task.states, task.successor[:, :, 0], task.reward[:, :, 0].astype(float)
    known = (state >= 0).numpy()
    count = np.zeros((end + 1, 4))
    np.add.at(count, (state.numpy()[known], dataset.actions.cpu().numpy().reshape(-1)[known]), 1.0)
    policy = np.where(count.sum(1, keepdims=True) > 0, count / count.sum(1, keepdims=True).clip(1), 0.25)
    after = np.vstack([np.where(task.terminal[:, :, 0], end, successor), np.full((1, 4), end)])
    reward = np.vstack([reward, np.zeros((1, 4))]) * GRID["data.reward_scale"] / float(dataset.rewards.std())
    both = policy[:, None] * policy[None]
    both /= both.sum(-1, keepdims=True).clip(1e-12)
    both[end] = both[:, end] = policy  # whose actions the ended task takes
    distance = np.zeros((end + 1, end + 1))
    while True:
        following = np.stack([distance[after[:, a]][:, after[:, a]] for a in range(4)], -1)
        new = (both * (np.abs(reward[:, None] - reward[None]) + discount * following)).sum(-1)
        if np.abs(new - distance).max() < 1e-6:
            return torch.from_numpy(new).float()
        distance = new


def compare_with(exact: bool, learnt: Any = HistoryAgent.bisimulation, prepare: Any = HistoryAgent.setup) -> None:
    """Let agents log shares of the exact distances and, if `exact`, learn from these."""
    known: dict[str, Tensor] = {}

    def setup(self: HistoryAgent, dataset: Any) -> None:
        prepare(self, dataset)
        known["state"] = states_of(dataset)
        known["distance"] = exact_distances(dataset, known["state"], self.agent.cfg.discount)

    def bisimulation(self: HistoryAgent, z: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = learnt(self, z, batch)
        reward = batch.reward * per_lane(self.reward_scale)
        compared = self.compared(reward)
        # A step's draws depend on their name alone: these are the pairs of the learnt loss.
        partner, valid = pairs(self.random.uniform("history/pairs", z.shape[1:2]), batch.action.gather(1, compared))
        with torch.no_grad():
            mean, std = self.models.next_encoding(z, self.as_input(batch.action))
        step = Step(z, reward, batch.mask, mean, std).at(compared)
        other = step.at(partner)
        state = known["state"][batch.index].gather(1, compared)
        there = state.gather(1, partner)
        counts = valid * (state >= 0) * (there >= 0)
        target = known["distance"][state, there]  # of -1: of the ended task, not counted
        distance = torch.linalg.vector_norm(step.z - other.z, dim=-1)
        alike = counts * ((step.reward - other.reward).abs() < 1) * step.alive * other.alive
        matched = distance_to_match(step, other, self.agent.cfg.discount)
        whole = (target * alike).sum(-1)
        metrics["distance_share"] = (distance.detach() * alike).sum(-1) / whole
        metrics["matched_share"] = (matched * alike).sum(-1) / whole
        if exact:
            loss = ((target - distance).square() * counts).sum(-1) / counts.sum(-1).clamp(min=1)
        return loss, metrics

    HistoryAgent.setup = setup  # type: ignore[method-assign]
    HistoryAgent.bisimulation = bisimulation  # type: ignore[method-assign]


def measured(result: Any) -> dict[str, Any]:
    """A number per lane each: scores at every evaluation, shares of the exact distances, and the probe's of the cue."""
    means = offrl.results.read([result.folder]).group_by("step", "lane").agg(pl.col("normalized").mean())
    scores: dict[str, list[float]] = {}
    for row in means.sort("step", "lane").iter_rows(named=True):
        scores.setdefault(str(row["step"]), []).append(row["normalized"])
    last = {name: logged(result.folder, name)[-AVERAGED:] for name in ("distance_share", "matched_share")}
    agent, walks = offrl.load_agent(result.folder), walk(hidden_grid("cue"), EPISODES)
    assert isinstance(agent, HistoryAgent)
    in_maze = (walks.valid & (walks.state > DRAWS)).flatten()
    cue = (walks.state.flatten()[in_maze] - 1 - DRAWS) // len(CELLS)
    train = fitted_on(walks, in_maze)
    z = encodings(agent, walks).flatten(1, 2)[:, in_maze]
    shares = {name: np.mean(values, 0).tolist() for name, values in last.items()}
    return {"scores": scores, **shares, "cue": [accuracy(one, cue, train) for one in z]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=30_000)
    parser.add_argument("--lanes", type=int, default=5)
    parser.add_argument("--cell", choices=CELLS_OF_THE_PAGE, required=True, help="distances and weight of the loss")
    parser.add_argument("--out", type=Path, default=Path("runs/exact_distances"))
    parser.add_argument("options", nargs="*", metavar="key=value", help="further options of the run")
    arguments = parser.parse_args()
    distances, weight = arguments.cell.split()
    name = " ".join([arguments.cell, *arguments.options])
    compare_with(exact=distances == "exact")
    options = options_of("iql", DATASET, "GRU", arguments.updates) | {
        "history.bisimulation": float(weight),
        "history.warmup": 200,
        "label": f"iql, GRU, {name}",
        "lanes": arguments.lanes,
        "out": str(arguments.out / name.replace(" ", "_")),
    }
    options |= {key: value_of(text) for key, text in (word.split("=", 1) for word in arguments.options)}
    result = offrl.fit(agent="iql", dataset=DATASET, **options)
    if result.status == "interrupted":
        raise SystemExit(f"stopped at update {result.step}; the same command goes on.")
    cell = measured(result)
    keep(arguments.out / "exact_distances.json", name, cell)
    for step, scores in cell["scores"].items():
        print(f"{name}, {step} updates: {np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}")
    for measure in ("distance_share", "matched_share", "cue"):
        values = cell[measure]
        print(f"{name}, {measure}: {np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
