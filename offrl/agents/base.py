"""What every method shares: the Spec it is built from and the Agent it is.

An agent knows nothing of environments, files, loggers or how many steps are left. Every tensor has a leading lane axis:
`[lanes, batch, ...]`; one seed is lanes = 1. A loss is one number per lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from offrl.data.batch import Batch
from offrl.nets import choose, normal_log_prob
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom

if TYPE_CHECKING:
    from offrl.data.dataset import OfflineDataset

__all__ = ["Agent", "Batch", "RememberingAgent", "Spec"]

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Spec:
    """What an agent is built from.

    Attributes:
        obs_dim, action_dim: sizes; `action_dim` counts the actions when they are discrete.
        seeds: one per lane; they fix initial weights and every random number of a lane.
        obs_mean, obs_std: `[O]` statistics of the dataset's observations (population deviation).
        action_low, action_high: bounds of continuous actions.
        discrete: whether actions are integers.
        device: where the parameters live.
    """

    obs_dim: int
    action_dim: int
    seeds: tuple[int, ...] = (0,)
    obs_mean: Tensor | None = None
    obs_std: Tensor | None = None
    action_low: float = -1.0
    action_high: float = 1.0
    discrete: bool = False
    device: torch.device | str = "cpu"

    @property
    def lanes(self) -> int:
        return len(self.seeds)


class Agent(nn.Module):
    """Base of every method.

    A subclass has a dataclass `Config`, makes its networks in `build` and implements `update` and `act`.
    A float in the configuration may be a list with one value per lane: a sweep is then lanes of one process, and the
    field is a tensor `[lanes]`.

    Attributes:
        period: updates until the pattern of an update repeats; engines capture whole periods.
        window: length of the windows the agent learns from; None for transitions.
        extra: further fields of the batch it needs (see `OfflineDataset.transitions`).
        takes_discrete: whether it can act by integers; one that can't refuses a dataset of discrete actions.
        starts_after: updates that prepare what the policy learns from, before it learns anything.
        obs_eps: what is added to the observations' deviation; 1e-3 in TD3+BC and its descendants.
    """

    Config: ClassVar[type]
    period: ClassVar[int] = 1
    batch_fields: ClassVar[tuple[str, ...]] = ()
    takes_discrete: ClassVar[bool] = False
    obs_eps: ClassVar[float] = 1e-3
    window: int | None = None
    pretrain_updates: int = 0
    dataset_index: Any = None
    obs_mean: Tensor
    obs_scale: Tensor

    def __init__(self, spec: Spec, config: Any = None) -> None:
        super().__init__()
        if spec.discrete and not self.takes_discrete:
            raise OffrlError(f"{type(self).__name__} needs continuous actions; choose another agent for discrete ones.")
        self.spec = spec
        self.cfg = lane_coefficients(config or self.Config(), spec)
        self.random = LaneRandom(spec.seeds, spec.device)
        mean, scale = torch.zeros(spec.obs_dim), torch.ones(spec.obs_dim)
        if getattr(self.cfg, "normalize_obs", True) and spec.obs_mean is not None and spec.obs_std is not None:
            mean, scale = spec.obs_mean.clone(), 1 / (spec.obs_std + self.obs_eps)
        self.register_buffer("obs_mean", mean)
        self.register_buffer("obs_scale", scale)
        self.build()
        self.to(spec.device)

    # ---- what a method implements -----------------------------------------------------------------------------

    def build(self) -> None:
        """Make networks, targets and optimisers."""
        raise NotImplementedError

    def update(self, batch: Batch, phase: int) -> Metrics:
        """One update on a batch with normalised observations; metrics are `[lanes]`.

        Args:
            phase: what kind of update this is, as `phase` says; by default its number within the period.
        No copy to the host, no branch on a tensor's value, no shape that depends on data: engines capture this.
        """
        raise NotImplementedError

    def act(self, obs: Tensor) -> Tensor:
        """The policy's action for normalised observations `[lanes, n, O]`, differentiable."""
        raise NotImplementedError

    def policy_gaussian(self, obs: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation of the policy's normal distribution for normalised observations `[lanes, n, O]`.

        Returns:
            `[lanes, n, A]` each, differentiable; of a squashed normal those of its actions, which is the nearest normal
            distribution and not the policy itself; None where the policy is deterministic.
        """
        return None

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """Log-density (log-probability where discrete) `[lanes, n]` of actions for normalised observations.

        Raises:
            NotImplementedError: the policy has no density.
        """
        gaussian = self.policy_gaussian(obs)
        if gaussian is None:
            raise NotImplementedError(f"{type(self).__name__}: the policy has no density")
        return normal_log_prob(*gaussian, action)

    def setup(self, store: OfflineDataset) -> None:
        """Take the whole dataset, before the first update; a method that looks things up in it keeps what it needs.

        Rows of the dataset are the `index` of the batches that follow (-1: a synthetic row, which it doesn't hold). What is to
        stay is put under `self.attached`: it is in no checkpoint and in no copy, since a copy only acts.
        """

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "dataset_index": None}

    def phase(self, step: int) -> int:
        """What kind of update comes after `step` updates; `update` is told.

        Its number within the period, unless a method trains in stages: then it also says which stage this is.
        """
        return step % self.period

    # ---- what others use --------------------------------------------------------------------------------------

    def normalize(self, obs: Tensor) -> Tensor:
        """(s - mean) / (std + obs_eps) with the statistics that were saved with the agent."""
        return (obs - self.obs_mean) * self.obs_scale

    def prepare(self, batch: Batch) -> Batch:
        """The batch as `update` wants it: observations normalised."""
        return replace(batch, obs=self.normalize(batch.obs), next_obs=self.normalize(batch.next_obs))

    def memory(self, envs: int) -> Any:
        """State that acting carries through an episode of `envs` environments; None for a memoryless policy."""
        return None

    def observe(self, memory: Any, action: Tensor, reward: Tensor) -> Any:
        """The memory after `action` brought `reward`, both `[lanes, envs, ...]`."""
        return memory

    def label(self, batch: Batch) -> Tensor | None:
        """What training tells the policy of each sample's future, `[lanes, batch, n]`; None: nothing.

        Of windows, what it is told at their first step. `offrl probe` asks how much luck is in it.
        """
        return None

    def promise(self, obs: Tensor, memory: Any) -> Tensor | None:
        """The return `[lanes, envs]` that the policy expects, or was asked for, of the episodes that begin now.

        Asked before the first `select_action`, for raw observations; None for a policy that promises nothing.
        """
        return None

    @torch.no_grad()
    def select_action(self, obs: Tensor, memory: Any = None) -> Tensor:
        """The action to take for raw observations `[lanes, n, O]`: deterministic and within bounds."""
        return self.within_bounds(self.act(self.normalize(obs)))

    def within_bounds(self, action: Tensor) -> Tensor:
        """Continuous actions clipped to their box; discrete ones as they are."""
        return action if self.spec.discrete else action.clamp(self.spec.action_low, self.spec.action_high)


class RememberingAgent(Agent):
    """Base of methods whose acting carries a memory through an episode, and of those that may draw discrete actions.

    A subclass implements `start` and `decide`, and has `sample_actions` in its `Config` if it takes discrete actions. Its
    memory has `time`, the steps behind us, and `name`, that of the draws of this wave of episodes: empty for an agent that is
    asked without a memory, which draws nothing.

    Attributes:
        stream: what names of draws begin with.
        waves: memories that were made so far.
    """

    stream: ClassVar[str]
    waves: int = 0

    def start(self, envs: int, name: str = "") -> Any:
        """The memory of `envs` episodes that begin."""
        raise NotImplementedError

    def decide(self, obs: Tensor, memory: Any) -> Tensor:
        """The action for normalised observations `[lanes, envs, O]`."""
        raise NotImplementedError

    def memory(self, envs: int) -> Any:
        self.waves += 1
        return self.start(envs, f"{self.stream}/act/{self.waves}")

    def choose_action(self, logits: Tensor, memory: Any) -> Tensor:
        """A discrete action of logits `[lanes, envs, actions]`: the likeliest, or a draw where the configuration wants it."""
        draw = self.cfg.sample_actions and memory.name
        uniform = self.random.uniform(f"{memory.name}/{memory.time}", logits.shape[1:2]) if draw else None
        return choose(logits, uniform)

    def act(self, obs: Tensor) -> Tensor:
        """The action at the beginning of an episode."""
        return self.decide(obs, self.start(obs.shape[1]))

    @torch.no_grad()
    def select_action(self, obs: Tensor, memory: Any = None) -> Tensor:
        """The action for raw observations; without a memory, that at the beginning of an episode."""
        return self.within_bounds(self.decide(self.normalize(obs), memory or self.start(obs.shape[1])))


def lane_coefficients(config: Any, spec: Spec) -> Any:
    """The configuration with each list of numbers turned into a tensor `[lanes]`.

    A field declared as a tuple (such as the hidden sizes) is left alone.

    Raises:
        ValueError: a list's length is not the number of lanes.
    """
    changes = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, Sequence) and not isinstance(value, str) and "tuple" not in str(f.type):
            if len(value) != spec.lanes:
                raise ValueError(f"{f.name} has {len(value)} values for {spec.lanes} lanes; give one per lane.")
            changes[f.name] = torch.tensor([float(v) for v in value], device=spec.device)
    return replace(config, **changes) if changes else config
