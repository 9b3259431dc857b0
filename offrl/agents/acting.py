"""Acting on plain arrays, as `Agent.predict` does, and the agent of one lane that `Agent.lane` gives."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from offrl.utils.errors import OffrlError, one_line

if TYPE_CHECKING:
    from offrl.agents.base import Agent
    from offrl.nets.spec import Spec


@dataclass(frozen=True)
class PredictState:
    """What `predict` carries from one timestep to the next.

    Attributes:
        lane: the lane that acts.
        count: number of episodes side by side.
        states: the agent's state of each group of episodes: of every single one, or of all together where a state holds no
            history.
        actions: the last action of each group, `[lanes, n, A]`.
    """

    lane: int
    count: int
    states: tuple[Any, ...]
    actions: tuple[Tensor, ...]


def predict(
    agent: Agent[Any],
    obs: ArrayLike,
    state: PredictState | None,
    episode_start: ArrayLike | None,
    deterministic: bool,
    lane: int | None,
    reward: ArrayLike | None,
) -> tuple[NDArray[Any], PredictState | None]:
    """`Agent.predict`, which explains the arguments."""
    rows, single = _rows(agent, obs)
    chosen = _lane(agent, lane, state)
    everyone = rows.expand(agent.spec.lanes, *rows.shape)
    count = len(rows)
    if state is not None and count != state.count:
        raise OffrlError(f"predict got {count} observations and a state of {state.count}; begin anew with state=None.")
    history = getattr(agent, "uses_history", False)
    groups = [slice(row, row + 1) for row in range(count)] if history else [slice(0, count)]
    starts = _per_row(False if episode_start is None else episode_start, count, "episode_start").astype(bool)
    rewards = _rewards(agent, reward, state, starts)
    states, actions = [], []
    for number, group in enumerate(groups):
        if state is None or starts[group].any():
            own = _initial(agent, len(rows[group]), deterministic)
        else:
            got = torch.from_numpy(rewards[group]).to(rows).expand(agent.spec.lanes, -1)
            own = agent.update_state(state.states[number], state.actions[number], got)
        actions.append(agent.select_action(everyone[:, group], own))
        states.append(own)
    action = torch.cat([part[chosen] for part in actions]).cpu().numpy()
    carries = any(own is not None for own in states)
    after = PredictState(chosen, count, tuple(states), tuple(actions)) if carries else None
    return (action[0] if single else action), after


def _rows(agent: Agent[Any], obs: ArrayLike) -> tuple[Tensor, bool]:
    """Observations `[n, O]` in the agent's precision, and whether they were a single one `[O]`."""
    width = agent.spec.obs_dim
    if isinstance(obs, tuple) and len(obs) == 2 and isinstance(obs[1], dict):
        raise OffrlError(
            "predict got (obs, info), as env.reset() gives them; take the first alone: obs, info = env.reset()."
        )
    try:
        array = np.asarray(obs.detach().cpu() if isinstance(obs, Tensor) else obs, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise OffrlError(
            f"predict takes observations [{width}] or [n, {width}] of numbers ({one_line(error)}); flatten them first."
        ) from error
    if array.ndim not in (1, 2) or array.shape[-1] != width or not array.size:
        raise OffrlError(
            f"predict takes one observation [{width}] or a batch [n, {width}], not {list(array.shape)}; flatten them first."
        )
    if not np.isfinite(array).all():
        raise OffrlError(f"predict got an observation that holds {array[~np.isfinite(array)][0]}; repair it.")
    return torch.from_numpy(np.atleast_2d(array)).to(agent.obs_mean), array.ndim == 1


def _per_row(values: ArrayLike, count: int, name: str) -> NDArray[Any]:
    array = np.asarray(values)
    if array.ndim > 1 or array.size not in (1, count):
        raise OffrlError(f"{name} has shape {list(array.shape)} for {count} observations; give one number each.")
    return np.broadcast_to(array.reshape(-1), (count,))


def _rewards(agent: Agent[Any], reward: ArrayLike | None, state: Any, starts: NDArray[Any]) -> NDArray[Any]:
    """`[n]` rewards of the actions before; zeros where no policy asks for them."""
    needed = getattr(agent, "uses_history", False) and getattr(agent, "uses_reward", False)
    if reward is None and needed and state is not None and not starts.all():
        raise OffrlError(
            f"{type(agent).__name__} conditions on the rewards so far: give predict the reward of the action before, reward=..."
        )
    return _per_row(0.0 if reward is None else reward, len(starts), "reward").astype(np.float64)


def _initial(agent: Agent[Any], count: int, deterministic: bool) -> Any:
    """The state at the start of `count` episodes; a deterministic one has no random numbers."""
    state = agent.initial_state(count)
    return state.without_samples() if deterministic and hasattr(state, "without_samples") else state


def _lane(agent: Agent[Any], lane: int | None, state: PredictState | None) -> int:
    """The lane that acts: the named one, else the state's, else the best."""
    if state is not None and lane not in (None, state.lane):
        raise OffrlError(f"The state is of lane {state.lane}, not of lane {lane}; begin an episode with state=None.")
    if state is not None:
        return state.lane
    return best_lane(agent) if lane is None else checked_lane(agent, lane)


def checked_lane(agent: Agent[Any], lane: int) -> int:
    """`lane`, if the agent has it; raises OffrlError otherwise."""
    if not isinstance(lane, Integral) or not 0 <= lane < agent.spec.lanes:
        raise OffrlError(f"lane {one_line(lane)}: the agent has lanes 0 to {agent.spec.lanes - 1}.")
    return lane


def best_lane(agent: Agent[Any]) -> int:
    """The lane with the highest score of the run's last evaluation.

    Raises:
        OffrlError: there are several lanes and nobody scored them.
    """
    if agent.spec.lanes == 1:
        return 0
    scores = [-math.inf if math.isnan(score) else score for score in agent.lane_scores or ()]
    if not scores or max(scores) == -math.inf:
        raise OffrlError(
            f"The run has {agent.spec.lanes} lanes and no score of them; name one: lane=0 to lane={agent.spec.lanes - 1}."
        )
    return scores.index(max(scores))


def lane_named(agent: Agent[Any], word: str) -> int:
    """The lane that a number or `best` names on the command line."""
    if word == "best":
        return best_lane(agent)
    if not word.isdecimal():
        raise OffrlError(f"--lane {one_line(word)}: give the number of a lane, or best.")
    return checked_lane(agent, int(word))


def lane_settings(agent: Agent[Any], lane: int) -> tuple[Spec, Any]:
    """The Spec with one lane's seed alone, and the settings with its coefficients."""
    spec, cfg = replace(agent.spec, seeds=agent.spec.seeds[lane : lane + 1]), agent.cfg
    if is_dataclass(cfg) and not isinstance(cfg, type):
        values = {field.name: getattr(cfg, field.name) for field in fields(cfg)}
        cfg = replace(cfg, **{k: float(v[lane]) for k, v in values.items() if isinstance(v, Tensor)})
    return spec, cfg


@torch.no_grad()
def one_lane(agent: Agent[Any], lane: int) -> Agent[Any]:
    """`Agent.lane`, which explains it."""
    lane = checked_lane(agent, lane)
    one = agent.untrained_lane(lane).to(agent.obs_mean.dtype)
    if agent.obs_mean.ndim > 1:  # statistics of each lane, [lanes, 1, O]
        one.obs_mean, one.obs_scale = one.obs_mean.view(1, 1, -1), one.obs_scale.view(1, 1, -1)
    whole = agent.state_dict()
    own = {k: whole[k] if whole[k].shape == v.shape else whole[k][lane : lane + 1] for k, v in one.state_dict().items()}
    one.load_state_dict(own)
    one.random.step.copy_(agent.random.step)
    for many, single in zip(agent.modules(), one.modules()):  # an agent may hold another one
        for name in ("explore_noise", "episode_batches"):
            if name in vars(many):
                setattr(single, name, getattr(many, name))
    one.lane_scores = None if agent.lane_scores is None else agent.lane_scores[lane : lane + 1]
    return one.train(agent.training)
