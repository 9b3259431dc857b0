"""What all methods share: the Spec they are built from, and the base class Agent.

An agent knows nothing of environments, files, loggers or the number of updates left. Every tensor has a leading lane axis,
`[lanes, batch, ...]`; one seed is one lane. A loss is one number per lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar, cast

import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from offrl.agents.acting import PredictState, lane_settings, one_lane, predict
from offrl.data.batch import Batch, WindowBatch
from offrl.nets.actors import normal_log_prob
from offrl.nets.box import ActionBox
from offrl.nets.spec import Spec
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom

if TYPE_CHECKING:
    from offrl.data.dataset import OfflineDataset

__all__ = ["Agent", "Batch", "Dynamics", "Metrics", "Spec", "WindowBatch"]

Metrics = dict[str, Tensor]
ConfigT = TypeVar("ConfigT")


class Dynamics(Protocol):
    """An ensemble of one-step models p(s' | s, a), fitted and frozen, that an augmentation offers to the agent's updates."""

    def next_gaussians(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std `[E, ..., O]` of the next state under each of the E models in use, for raw `[..., O]` and `[..., A]`."""
        ...

    def clip(self, obs: Tensor) -> Tensor:
        """Sampled states `[..., O]`, restricted as those of the augmentation's own rollouts are."""
        ...


class Agent(nn.Module, Generic[ConfigT]):
    """Base of every method.

    A subclass names its dataclass of settings (`class BC(Agent[BCConfig])` with `Config = BCConfig`), makes its networks in
    `build`, and implements `update` and `act`. A float in the settings may be a list with one value per lane, which trains
    the values side by side; the field is then a tensor `[lanes]`.

    Attributes:
        Config: dataclass of the settings. Besides its fields, `tiny` holds settings that make the agent small enough for the
            contract tests, and `toy` those with which it learns their toy task; both may be absent.
        cfg: the settings.
        box: the bounds of continuous actions.
        random: random numbers, by name; see `offrl.utils.random`.
        period: number of updates after which the pattern of an update repeats; engines capture whole periods.
        window: length of the windows that the agent learns from; None: it learns from transitions.
        window_before: how many timesteps of a window lie before the drawn row, at least and at most (`BatchLoader`).
        batch_fields: further fields of the batch: `next_action`, `return_to_go`, `timestep`.
        critic_optimizers: names of the optimisers of critics and values alone, whose gradient an encoder of the
            observations gets; an agent lacks some of them.
        takes_discrete: whether the agent supports discrete actions; others refuse a dataset of discrete actions.
        takes_continuous: whether it supports continuous ones.
        pretrain_updates: number of updates before the policy's first one.
        dataset_index: what `setup` keeps of the dataset; neither saved nor copied.
        explore_noise: std of the noise with which a deterministic policy explores an environment, in units of half the box,
            which is clipped at `explore_clip`; with discrete actions, the probability of a uniform one.
        obs_eps: term added to the observations' standard deviation; 1e-3 in TD3+BC and its descendants.
        lane_scores: each lane's score at the run's last evaluation (the return where there is no score); None: unknown.
        augmentation: label (`Augmentation.name`) of the augmentation that is part of the method; empty: none is.
        needs_dynamics: whether updates with synthetic rows need `dynamics`.
        dynamics: the model that the run's augmentation offers, if it has one; neither saved nor copied.
    """

    Config: ClassVar[type]
    period: int = 1
    batch_fields: tuple[str, ...] = ()
    critic_optimizers: ClassVar[tuple[str, ...]] = ("critic_optimizer", "value_optimizer")
    takes_discrete: ClassVar[bool] = False
    takes_continuous: ClassVar[bool] = True
    obs_eps: ClassVar[float] = 1e-3
    augmentation: ClassVar[str] = ""
    needs_dynamics: ClassVar[bool] = False
    explore_noise: float = 0.1
    explore_clip: ClassVar[float] = 0.5
    window: int | None = None
    window_before: tuple[int, int] = (0, 0)
    pretrain_updates: int = 0
    dataset_index: Any = None
    lane_scores: Sequence[float] | None = None
    dynamics: Dynamics | None = None
    cfg: ConfigT
    obs_mean: Tensor
    obs_scale: Tensor

    def __init__(self, spec: Spec, config: ConfigT | None = None) -> None:
        super().__init__()
        if spec.discrete and not self.takes_discrete:
            raise OffrlError(
                f"{type(self).__name__} needs continuous actions; agents with takes_discrete take integers."
            )
        if not spec.discrete and not self.takes_continuous:
            raise OffrlError(f"{type(self).__name__} needs integer actions; choose an agent with takes_continuous.")
        self.spec = spec
        self.cfg = lane_coefficients(config or self.Config(), spec)
        self.box = ActionBox(spec.action_low, spec.action_high)
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

    def update(self, batch: Any, phase: int) -> Metrics:
        """Make one update.

        The update has no copy to the host, no branch on a tensor's value and no shape that depends on data, because
        engines capture it.

        Args:
            batch: a `Batch`, or a `WindowBatch` if `window` is set, with normalised observations.
            phase: the kind of update, as the method `phase` gives it: by default, its number within the period.

        Returns:
            Metrics `[lanes]` to log. The engine detaches them.
        """
        raise NotImplementedError

    def act(self, obs: Tensor) -> Tensor:
        """The policy's deterministic action for normalised observations `[lanes, n, O]`, differentiable."""
        raise NotImplementedError

    def policy_gaussian(self, obs: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of a Gaussian policy for normalised observations `[lanes, n, O]`.

        Returns:
            `[lanes, n, A]` each, differentiable; for a squashed Gaussian the moments of its actions; None for a
            deterministic policy.
        """
        return None

    @property
    def sample_width(self) -> int:
        """Number of standard normals that `sample_action` makes an action of."""
        return self.spec.action_dim

    def sample_action(self, obs: Tensor, noise: Tensor) -> Tensor:
        """An action of the policy for normalised observations; it may leave the box.

        A deterministic policy gives its action. A policy with another density than a Gaussian's overrides it, and
        `sample_width` if it needs other than A numbers.

        Args:
            noise: `[lanes, n, sample_width]` standard normals.
        """
        gaussian = self.policy_gaussian(obs)
        return self.act(obs) if gaussian is None else gaussian[0] + gaussian[1] * noise

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """Log-density (log-probability if discrete) `[lanes, n]` of actions for normalised observations.

        Raises:
            NotImplementedError: the policy has no density.
        """
        gaussian = self.policy_gaussian(obs)
        if gaussian is None:
            raise NotImplementedError(f"{type(self).__name__}: the policy has no density")
        return normal_log_prob(*gaussian, action)

    def setup(self, dataset: OfflineDataset) -> None:
        """Read the whole dataset before the first update.

        Keep dataset-derived state in `self.dataset_index`; it is neither checkpointed nor copied, since copies only act.
        The `index` of the batches that follow is a row of this dataset, or -1 for a synthetic row.
        """

    def phase(self, step: int) -> int:
        """The kind of the update that follows `step` updates; a method that trains in stages overrides it."""
        return step % self.period

    def label(self, batch: Any) -> Tensor | None:
        """The label of the future that the policy is conditioned on in training, `[lanes, batch, n]`; None: no label.

        For windows, it is the label of their first timestep. `offrl probe` measures how much information it leaks.
        """
        return None

    def predicted_return(self, obs: Tensor, state: Any) -> Tensor | None:
        """The return `[lanes, envs]` that the policy predicts, or is conditioned on, at the start of episodes.

        Called before the first action, with raw observations; None for a policy without a prediction. The unit is that of
        the environment's rewards, so `data.reward_*` is refused for an agent that overrides this.
        """
        return None

    @classmethod
    def explores_by_noise(cls, config: Any) -> bool:
        """Whether `explore` reads `explore_noise` under these settings; an agent whose `explore` does overrides this too."""
        return cls.explore is Agent.explore and cls.policy_gaussian is Agent.policy_gaussian

    @classmethod
    def check_online(cls, before: Any, after: Any, online: Any) -> None:
        """Refuse options of an online phase that this method can't follow; those of no method are refused before.

        Args:
            before, after: the settings of the offline half and of the online phase; a float may be a list, one per lane.
            online: the options `online.*`.

        Raises:
            OffrlError: such an option is set.
        """

    # ---- what others use --------------------------------------------------------------------------------------

    def normalize(self, obs: Tensor) -> Tensor:
        """(s - mean) / (std + obs_eps), with the statistics that are saved with the agent."""
        return (obs - self.obs_mean) * self.obs_scale

    def prepare(self, batch: Batch) -> Batch:
        """The batch with normalised observations, as `update` expects it."""
        return batch.replace(obs=self.normalize(batch.obs), next_obs=self.normalize(batch.next_obs))

    def initial_state(self, envs: int) -> Any:
        """The state in which the policy starts `envs` episodes; None if its action depends on the observation alone."""
        return None

    def update_state(self, state: Any, action: Tensor, reward: Tensor) -> Any:
        """The state after an action and its reward, `[lanes, envs, ...]` both."""
        return state

    @torch.no_grad()
    def select_action(self, obs: Tensor, state: Any = None) -> Tensor:
        """The action for raw observations `[lanes, n, O]`: deterministic and within bounds.

        Raises:
            OffrlError: the observations have another shape.
        """
        return self.within_bounds(self.act(self.normalize(self._checked(obs))))

    def _checked(self, obs: Tensor) -> Tensor:
        wanted = (self.spec.lanes, self.spec.obs_dim)
        if not isinstance(obs, Tensor) or obs.ndim != 3 or (obs.shape[0], obs.shape[2]) != wanted:
            got = f"shape {list(obs.shape)}" if isinstance(obs, Tensor) else type(obs).__name__
            raise OffrlError(
                f"select_action takes a tensor [lanes, n, obs] = [{wanted[0]}, n, {wanted[1]}], not {got}; "
                "agent.predict(obs) takes an array of one observation or of a batch."
            )
        return obs

    def predict(
        self,
        obs: ArrayLike,
        state: PredictState | None = None,
        episode_start: ArrayLike | None = None,
        deterministic: bool = False,
        *,
        lane: int | None = None,
        reward: ArrayLike | None = None,
    ) -> tuple[NDArray[Any], PredictState | None]:
        """Act on arrays, with arguments and results as Stable-Baselines3's `predict` has them.

        Args:
            obs: one raw observation `[O]`, or a batch `[n, O]` of episodes side by side.
            state: what the call before returned; None: the episodes start. Methods that neither remember nor sample
                anything need none.
            episode_start: `[n]`, whether an episode starts with this observation.
            deterministic: take the most likely action where the method samples its actions in evaluations.
            lane: number of the lane that acts; None: the one with the highest `lane_scores`.
            reward: `[n]` rewards of the actions before, which policies conditioned on a return need; Stable-Baselines3 has no
                such argument.

        Returns:
            The action `[A]` or actions `[n, A]` within their bounds (an integer, or `[n]`, if discrete), and the state.

        Raises:
            OffrlError: a shape is wrong, the reward is missing, or no lane is named where none has a score.
        """
        return predict(self, obs, state, episode_start, deterministic, lane, reward)

    def lane(self, lane: int) -> Self:
        """A copy of one lane, as an agent of one lane that acts and learns as that lane would.

        Raises:
            OffrlError: there is no such lane.
        """
        return cast(Self, one_lane(self, lane))

    def untrained_lane(self, lane: int) -> Self:
        """A new agent with the seed and the settings of one lane, before `lane` gives it that lane's numbers.

        An agent that is made of more than a Spec and settings overrides it.
        """
        return type(self)(*lane_settings(self, lane))

    @torch.no_grad()
    def explore(self, obs: Tensor, random: LaneRandom) -> Tensor:
        """The action with which the agent gathers data, for raw observations `[lanes, n, O]`; within bounds.

        A Gaussian policy is sampled, a deterministic one gets clipped noise, and a discrete one takes a uniform action now
        and then. A policy with another distribution overrides it, and draws its numbers from `random`: so a resumed run
        repeats them.

        Args:
            random: its `step` is the number of the environment step.
        """
        state = self.normalize(obs)
        gaussian = self.policy_gaussian(state)
        if gaussian is not None:
            mean, std = gaussian
            return self.within_bounds(mean + std * random.normal("explore", mean))
        action = self.act(state)
        if self.spec.discrete:
            chance = random.uniform("explore/chance", action.shape[1:])
            uniform = random.integers("explore", self.spec.action_dim, action.shape[1:])
            return torch.where(chance < self.explore_noise, uniform, action)
        noise = (random.normal("explore", action) * self.explore_noise).clamp(-self.explore_clip, self.explore_clip)
        return self.within_bounds(action + noise * self.box.half_width)

    def within_bounds(self, action: Tensor) -> Tensor:
        """Continuous actions clipped to their bounds; discrete ones as they are."""
        return action if self.spec.discrete else self.box.clip(action)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "dataset_index": None, "dynamics": None}


def lane_coefficients(config: Any, spec: Spec) -> Any:
    """The settings, with each list of one number per lane turned into a tensor `[lanes]`.

    A field that is declared as a tuple (such as the hidden sizes) stays as it is.

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
