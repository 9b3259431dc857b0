"""Environments whose observations, rewards and ends are those of the dataset that a policy was trained on.

D4RL's simulators are gone; the ones of today differ from them in ways that would silently falsify scores. Each
wrapper below undoes one difference and names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from offrl.data.catalogue import flat_keys
from offrl.data.dataset import FIRST_ACTION, DatasetInfo
from offrl.data.partial import Partial, partial_of
from offrl.envs.chosen import adapted_task, is_chosen
from offrl.envs.generators import OwnGenerators
from offrl.envs.mazes import LAYOUTS, free_cells, goal_cell, maze_map
from offrl.envs.partial import PartialObservation
from offrl.envs.registered import make_gymnasium, make_vector
from offrl.envs.robots import ROBOT_IDS, TIME_LIMIT
from offrl.utils.advice import option
from offrl.utils.errors import OffrlError, one_line

Array = NDArray[np.float64]
# Arguments of gymnasium.make itself, which are not a dataset's to choose.
NO_ARGUMENTS = ("id", "disable_env_checker", "vectorization_mode", "entry_point", "additional_wrappers")
# A folder, or the name of a file that environments read.
PATH = re.compile(r"[/\\]|^~|\.(xml|mjcf|mjb|urdf|json|ya?ml|py|so|npy|npz|pkl|pickle|pt|pth|zip|hdf5|h5)$", re.I)
KITCHEN_TASKS = {
    "complete": ("microwave", "kettle", "light switch", "slide cabinet"),
    "partial": ("microwave", "kettle", "light switch", "slide cabinet"),
    "mixed": ("microwave", "kettle", "bottom burner", "light switch"),
}


def make_env(info: DatasetInfo, render: bool = False) -> gymnasium.Env:
    """One environment that evaluates policies trained on a dataset.

    Its observation is the flat vector `[O]` of the dataset, it clips actions into its box, and it truncates
    at `info.max_episode_steps`.

    Args:
        render: `env.render()` gives pictures, for environments that have the render mode `rgb_array`.

    Raises:
        OffrlError: the dataset names no environment, or one that is not installed, or one that is another robot.
    """
    partial, env = partial_of(info), _fully_observed(info, render)
    return env if partial == Partial() else PartialObservation(env, partial)


def _fully_observed(info: DatasetInfo, render: bool) -> gymnasium.Env:
    name = adapted_task(info)
    if not is_chosen(info) and info.family == "antmaze" and (name or info.env_id is None):
        raise OffrlError(
            f"{info.id}: D4RL's AntMaze robot is in no maintained package (Gymnasium's ant has other motors), so its "
            "policies can't be scored; train on Minari's D4RL/antmaze/*-v2 instead."
        )
    if name and info.family in ("maze2d", "kitchen") and info.env_kwargs:
        raise OffrlError(
            f"{name}: D4RL's environment takes no arguments, so env_kwargs={one_line(info.env_kwargs)} should be left out; or "
            f"name another environment with {option('eval.env', 'ID')}."
        )
    if name and info.family == "maze2d":
        env: gymnasium.Env = Maze2D(name)
        return gymnasium.wrappers.TimeLimit(ClipAction(env), info.max_episode_steps or 300)
    if info.env_id is None:
        raise OffrlError(
            f"{info.id}: this dataset names no environment to evaluate in; name one with {option('eval.env', 'ID')} "
            "(or MODULE:ID, whose module registers it), or train without evaluation: eval.every=0 eval.final_episodes=0."
        )
    if name and info.family == "kitchen":
        return ClipAction(D4RLKitchen(name, info.max_episode_steps))

    kwargs = _kwargs(info)
    if render:
        kwargs["render_mode"] = "rgb_array"
    env = make_gymnasium(info.env_id, info.provenance.get("entry_point"), **kwargs)
    if info.scored_by_success:
        env = OwnGenerators(env)
    if re.search(r"AdroitHand(Door|Hammer|Relocate)-v1$", info.env_id) and kwargs.get("reward_type") != "sparse":
        env = AdroitReward(env)
    if name and name.startswith("pen-"):
        env = PenDrop(env)
    if name and name.startswith("ant-"):
        env = WithoutContacts(env)
    if not _is_vector(env.observation_space):
        env = FlatObservation(env, info.env_id, info.provenance.get("observation_keys"))
    return _with_actions(env, info)


def make_vector_env(info: DatasetInfo, count: int) -> gymnasium.vector.VectorEnv | None:
    """`count` environments of a dataset that step in one call; None where there is no such version of them."""
    if info.env_id is None or not info.env_id.startswith("offrl/") or partial_of(info) != Partial():
        return None
    spec = gymnasium.registry.get(info.env_id)
    if spec is None or spec.vector_entry_point is None:
        return None
    return make_vector(info.env_id, count, **_kwargs(info))


def plain_robot(info: DatasetInfo) -> tuple[str, int] | None:
    """Id and steps of an episode where `make_env(info)` is one of Gymnasium's robots that `Robots` copies; None elsewhere."""
    spec = gymnasium.registry.get(info.env_id or "")
    if info.env_id not in ROBOT_IDS or spec is None or partial_of(info) != Partial():
        return None
    changed = spec.kwargs or info.env_kwargs or spec.additional_wrappers or info.scored_by_success
    if changed or not str(spec.entry_point).startswith("gymnasium.envs.mujoco."):
        return None
    return info.env_id, info.max_episode_steps or TIME_LIMIT


def _kwargs(info: DatasetInfo) -> dict[str, Any]:
    """Arguments of `gymnasium.make` that a dataset tells, none of which names a file.

    Raises:
        OffrlError: one does, or is no argument of an environment.
    """
    limit = {} if info.max_episode_steps is None else {"max_episode_steps": info.max_episode_steps}
    for key, value in info.env_kwargs.items():
        if key in NO_ARGUMENTS or not str(key).isidentifier():
            raise OffrlError(f"{info.id}: env_kwargs holds {one_line(key)}, which is no argument of an environment.")
        if path := next((text for text in _texts(value) if PATH.search(text)), None):
            raise OffrlError(
                f"{info.id}: env_kwargs names a file ({key}={one_line(path)}), and files that a dataset names are never "
                "opened; register an environment with that file in your own code, and use its id."
            )
    return {**{key: value for key, value in info.env_kwargs.items() if key != "render_mode"}, **limit}


def _texts(value: Any) -> Iterator[str]:
    """All texts in nested lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from (*_texts(key), *_texts(item))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


# ---- any environment -----------------------------------------------------------------------------------------------


class ClipAction(gymnasium.ActionWrapper):
    """Clips actions into the box, which stays the action space."""

    def action(self, action: Any) -> Any:
        space = self.action_space
        assert isinstance(space, spaces.Box)
        return np.clip(action, space.low, space.high)


class ReshapeAction(gymnasium.ActionWrapper):
    """Actions as the flat vector of the dataset, where the environment has another shape."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        space = env.action_space
        assert isinstance(space, spaces.Box)
        self.action_space = spaces.Box(space.low.reshape(-1), space.high.reshape(-1), dtype=space.dtype.type)

    def action(self, action: Any) -> Any:
        return np.asarray(action).reshape(self.env.action_space.shape)


class ShiftAction(gymnasium.ActionWrapper):
    """Discrete actions from 0 on, as a reader renumbered them, where the environment counts from another number."""

    def __init__(self, env: gymnasium.Env, space: spaces.Discrete) -> None:
        super().__init__(env)
        self.first = int(space.start)
        self.action_space = spaces.Discrete(int(space.n))

    def action(self, action: Any) -> Any:
        return action + self.first


def _with_actions(env: gymnasium.Env, info: DatasetInfo) -> gymnasium.Env:
    """The environment with actions as the dataset has them.

    Raises:
        OffrlError: it takes other actions than those of the dataset, or may number them otherwise.
    """
    space = env.action_space
    if isinstance(space, spaces.Discrete) and info.discrete is not None:
        _check_first(space, info)
        if info.discrete == int(space.n):
            return ShiftAction(env, space) if space.start else env
    box = isinstance(space, spaces.Box) and info.discrete is None
    width = len(info.action_low) if isinstance(info.action_low, tuple) else spaces.flatdim(space) if box else 0
    if not box or width != spaces.flatdim(space):
        there = f"{info.discrete} discrete actions" if info.discrete else "continuous actions"
        raise OffrlError(
            f"{info.id}: {info.env_id} takes actions {space}, but the dataset has {there}; {_advice(space, info)}."
        )
    return ClipAction(env if len(space.shape or ()) == 1 else ReshapeAction(env))


def _check_first(space: spaces.Discrete, info: DatasetInfo) -> None:
    """Refuse an environment whose first action is not known to be action 0 of the dataset."""
    start, noted = int(space.start), info.provenance.get(FIRST_ACTION)
    if noted == start or (noted is None and (start == 0 or _has_space(info))):
        return
    if noted is not None:
        raise OffrlError(
            f"{info.id}: {info.env_id} numbers its actions from {start}, but those of the dataset were numbered from "
            f"{one_line(noted)}; choose an environment that does so, too ({option('eval.env', 'ID')})."
        )
    raise OffrlError(
        f"{info.id}: {info.env_id} numbers its actions from {start} to {start + int(space.n) - 1}, and nothing says that "
        f"the dataset does so, too; if it does, declare action_start={start} (a number beside the arrays, or an argument of "
        "from_episodes and from_frame), else renumber its actions that way first."
    )


def _has_space(info: DatasetInfo) -> bool:
    """Whether a Minari folder declared the space of the actions, which the reader counts from its first one.

    Earlier versions noted no first action, nor did their recordings. Rows that were ever read as columns,
    which hold whatever numbers their author used, have `rows_in_file`.
    """
    return "minari_version" in info.provenance and "rows_in_file" not in info.provenance


def _advice(space: spaces.Space, info: DatasetInfo) -> str:
    """What to do about data whose actions are not those of an environment."""
    if not isinstance(space, spaces.Discrete) or not 0 < (info.discrete or 0) < space.n or _has_space(info):
        return "it is another task"
    return (
        f"if the others merely never occur in it, declare their number, action_count={space.n} beside its arrays or "
        f"DatasetInfo(discrete={space.n}), else it is another task"
    )


def _is_vector(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and len(space.shape) == 1


class FlatObservation(gymnasium.ObservationWrapper):
    """One vector of a Dict (or other) observation, in the order in which the Minari reader concatenates it.

    Args:
        keys: dotted paths of the parts, as the reader noted them; default: `flat_keys` of the environment.
    """

    def __init__(self, env: gymnasium.Env, env_id: str, keys: Sequence[str] | None = None) -> None:
        super().__init__(env)
        leaves = {".".join(names): (path, space) for names, path, space in _leaves(env.observation_space, env_id, keys)}
        if missing := [key for key in keys or () if key not in leaves]:
            raise OffrlError(f"{env_id}: its observation lacks {missing[0]}, which the dataset's observations have.")
        self.leaves = list(leaves.values()) if keys is None else [leaves[key] for key in keys]
        try:
            size = sum(spaces.flatdim(space) for _, space in self.leaves)
        except (ValueError, NotImplementedError) as error:
            raise OffrlError(f"{env_id}: its observation is no vector of numbers ({one_line(error)}).") from error
        self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float64)

    def observation(self, observation: Any) -> Array:
        parts: list[Any] = []
        for path, space in self.leaves:
            value = observation
            for key in path:
                value = value[key]
            parts.append(spaces.flatten(space, value))
        return np.concatenate(parts).astype(np.float64)


def _leaves(
    space: spaces.Space, env_id: str, keys: Sequence[str] | None = None, path: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[str, ...], tuple[Any, ...], Any]]:
    """Parts of a nested observation: names as a Minari file has them, keys as Python has them, space; no text."""
    if isinstance(space, spaces.Dict):
        chosen = sorted(space.spaces) if path or keys else flat_keys(env_id, space.spaces)
        for key in chosen:
            yield from _leaves(space.spaces[key], env_id, keys, (*path, key))
    elif isinstance(space, spaces.Tuple):
        for index, subspace in enumerate(space.spaces):
            yield from _leaves(subspace, env_id, keys, (*path, index))
    elif not isinstance(space, spaces.Text):
        yield tuple(f"_index_{key}" if isinstance(key, int) else key for key in path), path, space


# ---- D4RL's locomotion and hands -----------------------------------------------------------------------------------


class WithoutContacts(gymnasium.ObservationWrapper):
    """D4RL's Ant: 84 contact forces that its simulator left at zero, in the observation and in the reward's cost.

    Ant-v4 without contact forces has the same reward; the zeros are put back behind its 27 numbers.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.observation_space = spaces.Box(-np.inf, np.inf, (111,), np.float64)

    def observation(self, observation: Array) -> Array:
        return np.concatenate((observation[:27], np.zeros(84)))


class AdroitReward(gymnasium.Wrapper):
    """Gymnasium-Robotics' AdroitHand*-v1 adds 0.1 |palm - object| to the reward; D4RL subtracts it, and so does this."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        task = re.search(r"AdroitHand(Door|Hammer|Relocate)", env.unwrapped.spec.id if env.unwrapped.spec else "")
        assert task
        self.task = task.group(1)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        reach = {
            "Door": obs[35:38],
            "Hammer": obs[33:36] - obs[36:39],
            "Relocate": obs[30:33],
        }[self.task]
        return obs, float(reward) - 0.2 * float(np.linalg.norm(reach)), terminated, truncated, info


class PenDrop(gymnasium.Wrapper):
    """D4RL's pen ends when the pen falls below 0.075; Gymnasium-Robotics' goes on."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, float(reward), bool(terminated or obs[26] < 0.075), truncated, info


# ---- D4RL's Maze2D -------------------------------------------------------------------------------------------------


class Maze2D(gymnasium.Env):
    """D4RL's Maze2D on the point mass of Gymnasium-Robotics.

    The same ball and walls, but D4RL's first axis runs down the rows, its origin is cell (0, 0) shifted by 0.2, and
    there are its fixed goal (radius 0.5), its resets (any cell, +-0.1, velocity noise 0.1), and no end.

    Observation: `[row, column, their velocities]` in D4RL's coordinates. Reward: 1 within the radius, or
    exp(-distance) for the dense ids.
    """

    SHIFT = 0.2  # D4RL puts the ball's origin at 1.2 but the centre of wall (0, 0) at 1.0

    def __init__(self, name: str) -> None:
        match = re.fullmatch(r"maze2d-([a-z-]*?)(-dense)?-v\d", name)
        if match is None or match[1] not in LAYOUTS:
            raise OffrlError(f"{name}: no such Maze2D layout; known are {', '.join(sorted(LAYOUTS))}.")
        layout, self.dense = match[1], match[2] is not None
        maze: Any = make_gymnasium("PointMaze_UMaze-v3", maze_map=maze_map(layout)).unwrapped
        self.point = maze.point_env
        self.model, self.data = self.point.model, self.point.data
        self.goal = np.array(goal_cell(layout), dtype=np.float64)
        self.starts = np.array([*(c for c in free_cells(layout) if c != goal_cell(layout)), goal_cell(layout)])
        # Gymnasium's (x, y) of D4RL's origin.
        rows, columns = len(LAYOUTS[layout]), len(LAYOUTS[layout][0])
        self.origin = np.array([self.SHIFT + 0.5 - columns / 2, rows / 2 - 0.5 - self.SHIFT])
        self.observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float64)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        cell = self.starts[self.np_random.integers(len(self.starts))]
        position = cell + self.np_random.uniform(-0.1, 0.1, 2)
        self.point.reset()
        self.set_state(position, 0.1 * self.np_random.standard_normal(2))
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        self.point.step(_to_gymnasium(np.asarray(action)))
        obs = self._observation()
        distance = float(np.linalg.norm(obs[:2] - self.goal))
        return obs, float(np.exp(-distance)) if self.dense else float(distance <= 0.5), False, False, {}

    def set_state(self, position: Array, velocity: Array) -> None:
        """Put the ball somewhere, in D4RL's coordinates."""
        self.point.set_state(self.origin + _to_gymnasium(position), _to_gymnasium(velocity))

    def _observation(self) -> Array:
        return np.concatenate((_to_d4rl(self.data.qpos - self.origin), _to_d4rl(self.data.qvel)))

    def close(self) -> None:
        self.point.close()


def _to_gymnasium(vector: Array) -> Array:
    """(down, right) -> (x, y)."""
    return np.array([vector[1], -vector[0]])


def _to_d4rl(vector: Array) -> Array:
    """(x, y) -> (down, right)."""
    return np.array([-vector[1], vector[0]])


# ---- D4RL's kitchen ------------------------------------------------------------------------------------------------


class D4RLKitchen(gymnasium.ObservationWrapper):
    """D4RL's kitchen: observation = robot joints 9, objects 21, goal 30 with D4RL's sensor noise.

    Gymnasium-Robotics also tells velocities, keeps the goal apart and has less noise (0.01 of the sensors' amplitude
    for the robot and 0.0005 for objects, where D4RL has 0.1 for both).
    """

    NOISE = 0.1
    # Amplitudes of the 21 object joints (Franka configuration file): knobs, switches, doors, kettle.
    AMPLITUDE = np.array([0.005] * 2 + [0.0005] * 6 + [0.005] * 3 + [0.1] * 3 + [0.005] * 3 + [0.1] * 3 + [0.005])

    def __init__(self, name: str, max_episode_steps: int | None = None) -> None:
        level = name.split("-")[1]
        if level not in KITCHEN_TASKS:
            raise OffrlError(f"{name}: no such kitchen dataset; known are {', '.join(KITCHEN_TASKS)}.")
        env: Any = make_gymnasium(
            "FrankaKitchen-v1",
            tasks_to_complete=list(KITCHEN_TASKS[level]),
            object_noise_ratio=0.0,
            robot_noise_ratio=self.NOISE,
            max_episode_steps=max_episode_steps or 280,
        )
        super().__init__(env)
        from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_INDICES

        self.kitchen = env.unwrapped
        self.goal = np.zeros(30)
        for task, value in self.kitchen.goal.items():
            self.goal[OBS_ELEMENT_INDICES[task]] = value
        self.observation_space = spaces.Box(-np.inf, np.inf, (60,), np.float64)

    def observation(self, observation: dict[str, Any]) -> Array:
        numbers = observation["observation"]
        noise = self.kitchen.robot_env.np_random.uniform(-1.0, 1.0, 21)
        return np.concatenate((numbers[:9], numbers[18:39] + self.NOISE * self.AMPLITUDE * noise, self.goal))
