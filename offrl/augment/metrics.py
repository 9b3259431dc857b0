"""Quality of synthetic trajectories: dynamics error, likelihood under the policy, coverage of the dataset.

The measures of Jackson et al. 2024 as this project defines them (their code for them is not published):

- dynamics error: the simulator is set to a synthetic state and takes the synthetic action. The error is the squared difference
  of its next state and the synthetic one, each dimension in units of the dataset's variance, averaged over dimensions. The
  error of real transitions is the floor, due to rounding and to differences between simulators.
- likelihood: mean log-density of the synthetic actions under the policy, with a fixed std where it is deterministic.
- coverage: with balls around real states up to their fifth-nearest real neighbour, the share of balls that contain a
  synthetic state, and the share of synthetic states in no ball (novelty).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offrl.agents.base import Agent
from offrl.augment.policy_guided import policy_gaussian
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.data.partial import Partial, partial_of
from offrl.envs import NOISY_IDS, make_env
from offrl.envs.noisy import ROBOTS, NoiseModel
from offrl.utils.errors import OffrlError


class Simulator:
    """A MuJoCo robot, or a maze's point mass, that can be set to the state of an observation.

    Observations hold all positions (except the first ones, on which nothing depends) and velocities. Hopper's and Walker2d's
    velocities are clipped at 10, so states beyond are not determined. A maze's goal is that of one reset (Gymnasium's moves by
    up to a quarter of a cell with every reset, so its rewards have a floor above rounding). A robot with noise
    (`offrl/NoisyHopper-v0` and its kin) is stepped without it, as no state tells the draw: the error of real transitions is
    then that of the noise.

    Raises:
        OffrlError: the dataset's environment is no such robot, or its observations are partial.
    """

    def __init__(self, info: DatasetInfo) -> None:
        info = _without_noise(info)
        if partial_of(info) != Partial():
            raise OffrlError(
                f"{info.id}: the simulator can't be set to a state of which data.mask or data.flicker hides a part; leave them "
                "out to measure dynamics errors."
            )
        self.env = make_env(info)
        task: Any = self.env.unwrapped
        self.robot: Any = getattr(task, "point_env", task)  # Gymnasium-Robotics' mazes hold their point mass
        self.observation, _ = self.env.reset(seed=0)
        model: Any = getattr(self.robot, "model", None)
        self.hidden = model.nq + model.nv - len(self.observation) if model is not None else -1
        if not 0 <= self.hidden <= 2 or not hasattr(self.robot, "set_state"):
            raise OffrlError(
                f"{info.id}: the state of {info.env_id} can't be read from its observation; dynamics errors exist for Hopper, "
                "HalfCheetah, Walker2d and their like, and for point mazes."
            )
        self.positions = model.nq - self.hidden
        self.limit = 10.0 if (info.env_id or "").startswith(("Hopper", "Walker2d")) else np.inf

    def determines(self, obs: np.ndarray) -> np.ndarray:
        """`[n]` bool: whether observations `[n, O]` determine the whole state."""
        return (np.abs(obs[:, self.positions :]) < self.limit).all(-1)

    def step(self, obs: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """Next observation, reward and termination of one step from the state of `obs`."""
        qpos = np.concatenate([np.zeros(self.hidden), obs[: self.positions]])
        self.robot.set_state(qpos, obs[self.positions :])
        self.robot.data.qacc_warmstart[:] = 0.0  # the solver's initial guess from earlier steps
        following, reward, terminated, _, _ = self.env.step(action)
        return following, float(reward), bool(terminated)

    def close(self) -> None:
        self.env.close()


def _without_noise(info: DatasetInfo) -> DatasetInfo:
    """The info with the robot itself in place of a robot with noise."""
    robots = {noisy: ROBOTS[name] for name, noisy in NOISY_IDS.items()}
    if info.env_id not in robots:
        return info
    kwargs = {key: value for key, value in info.env_kwargs.items() if key not in NoiseModel.__dataclass_fields__}
    return replace(info, env_id=robots[info.env_id], env_kwargs=kwargs)


@dataclass
class DynamicsError:
    """Squared errors of the rows that could be simulated.

    Attributes:
        rows: `[n]` numbers of these rows.
        states: `[n]` mean over dimensions, in units of the dataset's variance.
        rewards: `[n]` in units of the variance of the dataset's rewards.
        flags: `[n]` whether the termination agrees.
        left_out: number of rows whose observation does not determine the state, or whose next one was not recorded.
    """

    rows: Tensor
    states: Tensor
    rewards: Tensor
    flags: Tensor
    left_out: int


def dynamics_error(simulator: Simulator, synthetic: OfflineDataset, real: OfflineDataset) -> DynamicsError:
    """Simulate every transition of `synthetic`; units are the variances of `real`."""
    obs, action, wanted, reward, flag = (
        part.cpu().double().numpy()
        for part in (
            synthetic.observations,
            synthetic.actions,
            synthetic.next_observations,
            synthetic.rewards,
            synthetic.terminations,
        )
    )
    _, std = real.observation_statistics()
    unit = np.where(std.cpu().numpy() > 1e-6, std.cpu().numpy(), 1.0)
    reward_unit = max(float(real.rewards.double().std(correction=0)), 1e-6)
    usable = simulator.determines(obs)
    if (known := synthetic.known_successors) is not None:
        usable &= np.isin(np.arange(len(obs)), known.cpu().numpy())
    rows = np.flatnonzero(usable)
    states, rewards, flags = np.zeros(len(rows)), np.zeros(len(rows)), np.zeros(len(rows), dtype=bool)
    for i, row in enumerate(rows):
        following, got, done = simulator.step(obs[row], action[row])
        states[i] = np.square((following - wanted[row]) / unit).mean()
        rewards[i] = ((got - reward[row]) / reward_unit) ** 2
        flags[i] = done == (flag[row] > 0)
    numbers = torch.from_numpy(rows)
    return DynamicsError(
        numbers, torch.from_numpy(states), torch.from_numpy(rewards), torch.from_numpy(flags), len(obs) - len(rows)
    )


@torch.no_grad()
def log_likelihood(policy: Agent, synthetic: OfflineDataset, std: float) -> Tensor:
    """`[N]`: log-density of each action under a policy of one lane, summed over dimensions.

    Args:
        std: std for a policy that is no Gaussian, in units of the actions.
    """
    found = []
    for obs, action in zip(synthetic.observations.split(8192), synthetic.actions.split(8192)):
        mean, deviation = policy_gaussian(policy, obs.unsqueeze(0), std)
        found.append(torch.distributions.Normal(mean[0], deviation[0]).log_prob(action).sum(-1))
    return torch.cat(found).double()


def coverage(
    synthetic: OfflineDataset, real: OfflineDataset, k: int = 5, most: int = 10_000, seed: int = 0
) -> dict[str, float]:
    """Coverage and novelty of states, and the ratio of stds synthetic / real (smallest and largest over dimensions)."""
    mean, std = real.observation_statistics()
    scale = torch.where(std > 1e-6, std, torch.ones_like(std))
    generator = torch.Generator().manual_seed(seed)

    def some(store: OfflineDataset) -> Tensor:
        rows = torch.randperm(len(store), generator=generator)[:most].to(store.device)
        return (store.observations[rows] - mean) / scale

    ours, theirs = some(synthetic), some(real)
    k = min(k, len(theirs) - 1)
    radius = torch.cat([torch.cdist(part, theirs).kthvalue(k + 1).values for part in theirs.split(1024)])  # 1st: itself
    covered, inside = torch.zeros(len(theirs), dtype=torch.bool, device=ours.device), []
    for part in ours.split(1024):
        near = torch.cdist(part, theirs) <= radius
        covered |= near.any(0)
        inside.append(near.any(1))
    ratio = (synthetic.observation_statistics()[1] / scale)[std > 1e-6]
    return {
        "coverage": float(covered.double().mean()),
        "novelty": float((~torch.cat(inside)).double().mean()),
        "std_ratio_min": float(ratio.min()),
        "std_ratio_max": float(ratio.max()),
    }


def displacement(store: OfflineDataset) -> Tensor:
    """`[N]`: distance of each state from its trajectory's first, in units of the dataset's own stds."""
    _, std = store.observation_statistics()
    scale = torch.where(std > 1e-6, std, torch.ones_like(std))
    first = store.observations[store.offsets[:-1]][store.episode_of_row]
    return torch.linalg.vector_norm((store.observations - first) / scale, dim=-1).double()


def along_horizon(store: OfflineDataset, rows: Tensor, values: Tensor) -> list[float | None]:
    """Mean of the rows' `values` at each timestep of the trajectories; None where there is no row."""
    at = store.timesteps.cpu()[rows.cpu()]
    count = torch.zeros(int(store.lengths.max()), dtype=torch.float64).index_add_(0, at, torch.ones(len(at)).double())
    total = torch.zeros_like(count).index_add_(0, at, values.cpu().double())
    return [float(t / n) if n else None for t, n in zip(total, count)]


def real_pieces(store: OfflineDataset, count: int, length: int, seed: int = 0) -> OfflineDataset:
    """Pieces of a dataset's episodes, comparable with synthetic ones: from random rows, at most `length` transitions."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(len(store), (count,), generator=generator).to(store.device)
    lengths = (store.offsets[1:][store.episode_of_row[start]] - start).clamp(max=length)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    inside = torch.arange(int(offsets[-1]), device=store.device) - torch.repeat_interleave(offsets[:-1], lengths)
    rows = torch.repeat_interleave(start, lengths) + inside
    return OfflineDataset(
        **{name: getattr(store, name)[rows] for name in OfflineDataset.ROW_FIELDS}, offsets=offsets, info=store.info
    )


def evaluate(
    synthetic: OfflineDataset,
    real: OfflineDataset,
    simulator: Simulator | None,
    policies: Mapping[str, tuple[Agent, float]],
) -> dict[str, Any]:
    """All measures of a dataset of trajectories, as plain numbers; curves are over timesteps.

    Args:
        simulator: None leaves the dynamics error out.
        policies: policies of one lane by name, with the std for deterministic ones.
    """
    everything = torch.arange(len(synthetic))
    found: dict[str, Any] = {
        "trajectories": synthetic.episodes,
        "transitions": len(synthetic),
        "terminated": float(synthetic.terminations.sum()) / synthetic.episodes,
        "return_per_transition": float(synthetic.rewards.double().mean()),
        **coverage(synthetic, real),
        "curves": {"displacement": along_horizon(synthetic, everything, displacement(synthetic))},
    }
    if simulator is not None:
        error = dynamics_error(simulator, synthetic, real)
        found |= {
            "dynamics_error": float(error.states.mean()),
            "dynamics_error_median": float(error.states.median()),
            "reward_error": float(error.rewards.mean()),
            "termination_agrees": float(error.flags.double().mean()),
            "left_out": error.left_out,
        }
        found["curves"]["dynamics_error"] = along_horizon(synthetic, error.rows, error.states)
    for name, (policy, std) in policies.items():
        values = log_likelihood(policy, synthetic, std)
        found[f"log_likelihood_{name}"] = float(values.mean())
        found["curves"][f"log_likelihood_{name}"] = along_horizon(synthetic, everything, values)
    return found
