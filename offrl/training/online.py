"""The online phase: environment steps of all lanes, a replay that grows, and the agent's settings that change at the switch.

`Trainer` owns the order of things; this file owns what an offline run doesn't have. No agent is known here by name: it needs
`Agent.explore`, and its published changes come from the options `online.agent` (settings that change at the switch) and
`online.anneal` (weights that change with the environment steps).

Everything is a function of the seeds, the data and the number of environment steps. The environments' state is not saved: a
resumed run resets them with the episodes' seeds and repeats the actions that the replay holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offrl.agents.base import Agent, Metrics
from offrl.data.dataset import OfflineDataset
from offrl.data.replay import Replay, ReplayFiles
from offrl.envs.chosen import warn_of_other_maze
from offrl.envs.lanes import EndedEpisode, LaneEnvs, Step
from offrl.nets import Adam, Critics
from offrl.sampling import BatchLoader, Sampler
from offrl.sampling.replay import ReplayUniform, Union, UnionDraw
from offrl.training.online_config import annealed
from offrl.training.records import OnlineRecord
from offrl.training.runs import make_agent, spread_statistics
from offrl.training.schema import TrainConfig
from offrl.utils.errors import OffrlError, one_line
from offrl.utils.random import LaneRandom

FOLDER = "replay"  # below a run's folder


class EnvironmentFailure(Exception):
    """An environment raised; the phase stands where it was before the burst."""


class OnlinePhase:
    """Environments, replay and changed settings of a run's second half.

    Args:
        train: the run's options. settings: the agent's, with its `_target_`.
        agent: the agent of the offline half.
        source: the dataset to train on (rewards transformed) and its sampler.
        rewards: scale and shift that make a reward of the environment one of the dataset.
        folder: the run's folder.

    Attributes:
        step: environment steps of every lane so far.
        ended: episodes that ended in the last burst, with the environment step at which they did.

    Raises:
        OffrlError: the agent has no critic or learns from windows, can't have the settings of `online.agent`, or there is no
            fitting environment.
    """

    def __init__(
        self,
        train: TrainConfig,
        settings: Mapping[str, Any],
        agent: Agent,
        source: tuple[OfflineDataset, Sampler],
        rewards: tuple[float, float],
        folder: Path,
    ) -> None:
        _check_agent(agent)
        self.train, self.cfg, self.settings, self.rewards = train, train.online, settings, rewards
        self.store, self.spec = source[0], agent.spec
        spec = self.spec
        self.device = torch.device(spec.device)
        warn_of_other_maze(self.store.info)
        self.envs = LaneEnvs(self.store.info, spec.seeds, spec.obs_dim, spec.action_dim)
        self.replay = Replay(spec.lanes, self.cfg.steps, spec.obs_dim, spec.action_dim, spec.discrete, self.device)
        self.files = ReplayFiles(folder / FOLDER)
        self.random = LaneRandom(spec.seeds, self.device)  # its step is the environment step
        self.loader = BatchLoader(self._sources(*source), train.batch_size, None, agent.batch_fields)
        if self.cfg.agent:
            self._remade(agent)  # what can't be made at the switch is refused before the offline half
        self.weights: dict[str, tuple[Tensor, Tensor]] = {}  # annealed weights in use, and at the start, `[lanes]`
        self.step, self.ended, self.begun = 0, list[tuple[int, EndedEpisode]](), False

    def _sources(self, store: OfflineDataset, sampler: Sampler) -> list[tuple[Any, Sampler, float]]:
        share = self.cfg.offline_share
        if share is None:
            return [(Union(store, self.replay), UnionDraw(store, sampler, self.replay), 1.0)]
        return [(store, sampler, 1.0), (self.replay, ReplayUniform(self.replay), 1 - share)]

    # ---- the switch, and its repetition when a run is resumed --------------------------------------------------

    def load(self, kept: OnlineRecord) -> None:
        """Read the rows of a phase that is to go on and repeat the episodes under way; nothing in the run's folder changes.

        Raises:
            OffrlError: they are missing or damaged, the record does not fit this run, or an environment does not repeat itself.
        """
        lanes = len(kept.episodes) == len(kept.lengths) == self.spec.lanes
        if not lanes or max(kept.lengths) > kept.step or kept.step > self.cfg.steps:
            raise OffrlError(
                f"{self.files.folder.parent}: its checkpoint stands at step {kept.step} of an online phase with episodes "
                f"{kept.episodes} of {kept.lengths} steps, which is none of this run's; remove it."
            )
        self.files.load(self.replay, kept.step)
        self._repeat(kept)

    def begin(self, agent: Agent, kept: OnlineRecord | None) -> Agent:
        """Start the phase, or go on with it; returns the agent with the settings of this phase.

        Args:
            agent: as the checkpoint has it.
            kept: where the phase stood, after `load`; None at the switch.
        """
        self.agent = self._changed(agent)
        for key in self.cfg.anneal:
            self._make_lane_weight(key)
        if self.cfg.recompute_every:
            spread_statistics(self.agent)
        if kept is None:
            if self.cfg.reset_optimizers:
                _reset_optimizers(self.agent)
            self.files.clear()  # a process that was killed before its first checkpoint here may have left some
            self.envs.reset()
        else:
            self.files.drop_beyond(kept.step)
        self.begun = True
        self._mark()
        return self.agent

    def _changed(self, agent: Agent) -> Agent:
        """An agent with the settings of this phase and all tensors of the given one, its optimisers' moments included."""
        if self.cfg.noise is not None:
            agent.explore_noise = self.cfg.noise
        if not self.cfg.agent:
            return agent
        changed = self._remade(agent)
        if self.cfg.noise is not None:
            changed.explore_noise = self.cfg.noise
        changed.load_state_dict(agent.state_dict())
        changed.dataset_index = agent.dataset_index
        return changed

    def _remade(self, agent: Agent) -> Agent:
        """A new agent with the settings of this phase, which has room for the tensors of the given one.

        Raises:
            OffrlError: there is no agent with these settings, or its networks are others.
        """
        try:
            changed = make_agent({**self.settings, **self.cfg.agent}, self.spec)
        except OffrlError as error:
            raise OffrlError(
                ("online." if str(error).startswith("agent.") else "online.agent: ") + str(error)
            ) from error
        if agent.obs_mean.ndim > 1:
            spread_statistics(changed)
        mine, theirs = changed.state_dict(), agent.state_dict()
        if mine.keys() != theirs.keys() or any(mine[name].shape != tensor.shape for name, tensor in theirs.items()):
            raise OffrlError(
                f"online.agent={dict(self.cfg.agent)} changes the agent's networks, which can't be done at the switch."
            )
        return changed

    def _make_lane_weight(self, key: str) -> None:
        """Turn a coefficient into a tensor that changes in place, which a captured graph reads."""
        value = getattr(self.agent.cfg, key)
        start = value.clone() if isinstance(value, Tensor) else torch.full((self.spec.lanes,), float(value))
        start = start.to(self.device)
        self.weights[key] = (start.clone(), start)
        self.agent.cfg = replace(self.agent.cfg, **{key: self.weights[key][0]})

    def _repeat(self, kept: OnlineRecord) -> None:
        """Take the environments to where the checkpoint left them, by the recorded actions."""
        self.step = kept.step
        actions = self.replay.episode_actions(kept.lengths)
        try:
            self.envs.restore(kept.episodes, actions)
        except Exception as error:
            raise OffrlError(
                f"{self.store.info.env_id} failed as its episode was repeated ({one_line(error)})."
            ) from error
        if not self.step:
            return
        underway = [lane for lane, length in enumerate(kept.lengths) if length]
        replayed = torch.from_numpy(self.envs.obs).to(torch.float32)[underway]
        recorded = self.replay.rows["next_observations"][underway, self.step - 1].cpu()
        if not torch.equal(replayed, recorded):
            raise OffrlError(
                f"{self.store.info.env_id} does not repeat itself from the same seed and actions, so the run can't go on "
                "exactly; start over with fresh=true, or fix the environment's random numbers."
            )

    # ---- environment steps -------------------------------------------------------------------------------------

    def collect(self) -> int:
        """A burst of environment steps; the number of updates that are due now.

        Raises:
            EnvironmentFailure: an environment raised.
        """
        before = self.step
        self._anneal()
        self.ended = []
        try:
            while self.step < min(before + self.cfg.burst, self.cfg.steps):
                self._environment_step()
        except Exception as error:
            self.step = before
            self.replay.cut(before)
            self.ended = []
            raise EnvironmentFailure(f"{type(error).__name__}: {one_line(error)}") from error
        self._mark()
        if self.crossed(before, self.cfg.recompute_every):
            self._recompute_statistics()
        return self.train.updates_after(self.step) - self.train.updates_after(before)

    def crossed(self, before: int, every: int) -> bool:
        """Whether a multiple of `every` lies behind environment step `before` and not behind the present one; 0: never."""
        return bool(every) and self.step // every > before // every

    def _environment_step(self) -> None:
        self.random.go_to(self.step)
        obs = torch.from_numpy(self.envs.obs).to(self.device, torch.float32)
        at_random = self.step < self.cfg.random_steps
        action = self._random_action() if at_random else self.agent.explore(obs.unsqueeze(1), self.random)
        action = action.squeeze(1)
        step = self.envs.step(action.cpu().numpy())
        self._add(obs, action, step)
        self.step += 1
        self.ended += [(self.step, episode) for episode in step.ended]

    def _random_action(self) -> Tensor:
        """`[lanes, 1, A]`: uniform in the box, or `[lanes, 1]` of the discrete ones."""
        if self.spec.discrete:
            return self.random.integers("random_action", self.spec.action_dim, (1,))
        u = self.random.uniform("random_action", (1, self.spec.action_dim)).to(torch.float32)
        return self.agent.box.from_unit(2 * u - 1)

    def _add(self, obs: Tensor, action: Tensor, step: Step) -> None:
        scale, shift = self.rewards

        def tensor(array: Any, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.from_numpy(array).to(self.device, dtype)

        self.replay.add(
            observations=obs,
            actions=action,
            rewards=tensor(step.reward) * scale + shift,  # in float32, as the dataset's
            next_observations=tensor(step.next_obs),
            terminations=tensor(step.terminated),
            timesteps=tensor(step.timestep, torch.int64),
        )

    def _anneal(self) -> None:
        for key, (weight, start) in self.weights.items():
            weight.copy_(start * annealed(self.cfg.anneal[key], self.step / self.cfg.steps))

    def _recompute_statistics(self) -> None:
        """Mean and std of the observations of dataset and replay together, of each lane."""
        if not getattr(self.agent.cfg, "normalize_obs", True):
            return
        n, k = len(self.store), self.replay.size
        mean, std = (part.double() for part in self.store.observation_statistics())
        online = self.replay.rows["observations"][:, :k].double()
        online_mean, online_square = online.mean(1), online.var(1, correction=0)
        total_mean = (n * mean + k * online_mean) / (n + k)
        square = (n * std.square() + k * online_square) / (n + k) + n * k / (n + k) ** 2 * (mean - online_mean).square()
        self.agent.obs_mean.copy_(total_mean.unsqueeze(1))
        self.agent.obs_scale.copy_((1 / (square.sqrt() + self.agent.obs_eps)).unsqueeze(1))

    # ---- saving ------------------------------------------------------------------------------------------------

    def _mark(self) -> None:
        """Note where the environments are, for `record`: a failure within a burst does not count."""
        self.place = {"step": self.step, "episodes": list(self.envs.episode), "lengths": list(self.envs.length)}

    def record(self, metrics: Metrics) -> dict[str, Any]:
        """What a checkpoint says of the phase; `metrics` are the latest of each name."""
        return {**self.place, "metrics": {name: value.tolist() for name, value in metrics.items()}}

    def close(self) -> None:
        self.envs.close()


def _check_agent(agent: Agent) -> None:
    name = type(agent).__name__
    if not any(isinstance(module, Critics) for module in agent.modules()):
        raise OffrlError(
            f"{name} learns no critic, so it can't improve by environment steps; choose an agent that does."
        )
    if agent.window is not None or "return_to_go" in agent.batch_fields:
        raise OffrlError(
            f"{name} learns from whole trajectories, which an online phase can't give; choose another agent."
        )


@torch.no_grad()
def _reset_optimizers(agent: Agent) -> None:
    for module in agent.modules():
        if isinstance(module, Adam):
            for buffer in module.buffers():
                buffer.zero_()
