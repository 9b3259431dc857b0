"""Every space that the Minari reader takes evaluates, number for number; what doesn't is refused when it is read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest
from gymnasium import spaces

from offrl.data import DatasetInfo
from offrl.data.minari import read_minari
from offrl.envs import make_env
from offrl.utils.errors import OffrlError

serialization = pytest.importorskip("minari.serialization")

KEYS = (
    "position",
    "a.b",
    "a",
    "light switch",
    "_index_0",
    "größe",
    "Z",
    "observation",
    "achieved_goal",
    "desired_goal",
)
UNREADABLE = (spaces.Sequence, spaces.Graph, spaces.OneOf)


class Replayed(gymnasium.Env):
    """Shows samples of its space, whatever is done."""

    def __init__(self, observation: spaces.Space, action: spaces.Space) -> None:
        self.observation_space, self.action_space = observation, action
        self.taken: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.taken.append(action)
        return self.observation_space.sample(), 0.0, False, False, {}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    gymnasium.register("offrl-test/Replayed-v0", entry_point=lambda: Replayed(*CURRENT))
    yield
    del gymnasium.registry["offrl-test/Replayed-v0"]


CURRENT: list[spaces.Space] = []  # spaces of the environment that is made next


def generated(rng: np.random.Generator, depth: int = 2) -> spaces.Space:
    """A random space, nested up to `depth` levels."""
    kinds = ["box", "pixels", "discrete", "multidiscrete", "multibinary", "text", "other"]
    kinds += 3 * ["dict", "tuple"] if depth else []
    kind = rng.choice(kinds)
    shape = tuple(int(n) for n in rng.integers(1, 4, rng.integers(0, 4)))
    if kind == "box":
        return spaces.Box(-5, 5, shape, rng.choice([np.float32, np.float64]))
    if kind == "pixels":
        return spaces.Box(0, 255, shape, np.uint8)
    if kind == "discrete":
        return spaces.Discrete(int(rng.integers(1, 6)), start=int(rng.integers(-3, 4)))
    if kind == "multidiscrete":
        counts = rng.integers(1, 5, shape or (2,))
        return spaces.MultiDiscrete(counts, start=rng.integers(-2, 3, counts.shape))
    if kind == "multibinary":
        return spaces.MultiBinary(shape or 3)
    if kind == "text":
        return spaces.Text(5)
    if kind == "other":
        choices = (spaces.Sequence(spaces.Discrete(2)), spaces.OneOf([spaces.Discrete(2)]))
        return choices[rng.integers(2)] if rng.random() < 0.3 else spaces.Box(-1, 1, (2,))
    if kind == "tuple":
        return spaces.Tuple([generated(rng, depth - 1) for _ in range(rng.integers(1, 4))])
    names = rng.choice(KEYS, rng.integers(1, 4), replace=False)
    return spaces.Dict({str(name): generated(rng, depth - 1) for name in names})


def action_space(rng: np.random.Generator) -> spaces.Space:
    kind = rng.integers(4)
    if kind == 0:
        return spaces.Discrete(int(rng.integers(1, 6)), start=int(rng.integers(-3, 4)))
    if kind == 1:
        return spaces.Box(np.array([0, -0.78]), np.array([5, 0.78]), dtype=np.float64)
    if kind == 2:
        return spaces.Box(-1, 1, (2, 3))
    return spaces.MultiDiscrete([2, 3]) if rng.random() < 0.3 else spaces.Box(-2, 2, (1,))


def described(space: spaces.Space) -> dict[str, Any]:
    """Minari's JSON; a stand-in for what Minari cannot write either."""
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "subspaces": {key: described(subspace) for key, subspace in space.spaces.items()}}
    if isinstance(space, spaces.Tuple):
        return {"type": "Tuple", "subspaces": [described(subspace) for subspace in space.spaces]}
    if isinstance(space, UNREADABLE):
        return {"type": type(space).__name__}
    return json.loads(serialization.serialize_space(space))


def store(group: h5py.Group, name: str, space: spaces.Space, rows: list[Any]) -> None:
    """Observations as Minari stores them."""
    if isinstance(space, spaces.Dict):
        for key, subspace in space.spaces.items():
            store(group.require_group(name), key, subspace, [row[key] for row in rows])
    elif isinstance(space, spaces.Tuple):
        for index, subspace in enumerate(space.spaces):
            store(group.require_group(name), f"_index_{index}", subspace, [row[index] for row in rows])
    elif isinstance(space, spaces.Text):
        group.create_dataset(name, data=rows, dtype=h5py.string_dtype())
    elif not isinstance(space, UNREADABLE):
        group[name] = np.stack([np.asarray(row) for row in rows])


def holds(space: spaces.Space, kinds: tuple[type, ...]) -> bool:
    if isinstance(space, spaces.Dict):
        return any(holds(subspace, kinds) for subspace in space.spaces.values())
    if isinstance(space, spaces.Tuple):
        return any(holds(subspace, kinds) for subspace in space.spaces)
    return isinstance(space, kinds)


@pytest.mark.parametrize("seed", range(150))
def test_what_reads_evaluates(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    observation, action = CURRENT[:] = generated(rng), action_space(rng)
    observation.seed(7)
    action.seed(seed)
    rows, actions = [observation.sample() for _ in range(4)], [action.sample() for _ in range(3)]
    data = tmp_path / "a-v0/data"
    data.mkdir(parents=True)
    with h5py.File(data / "main_data.hdf5", "w") as file:
        episode = file.create_group("episode_0")
        store(episode, "observations", observation, rows)
        episode["actions"], episode["rewards"] = np.stack([np.asarray(a) for a in actions]), np.zeros(3)
        episode["terminations"], episode["truncations"] = np.zeros(3, bool), np.array([0, 0, 1], bool)
    metadata = {
        "total_steps": 3,
        "data_format": "hdf5",
        "jpeg_encoding": False,
        "observation_space": json.dumps(described(observation)),
        "action_space": json.dumps(described(action)),
        "env_spec": json.dumps({"id": "offrl-test/Replayed-v0", "max_episode_steps": 3}),
    }
    (data / "metadata.json").write_text(json.dumps(metadata))
    try:
        read = read_minari(tmp_path / "a-v0")
    except OffrlError as error:
        refusal = str(error)
        unreadable = holds(observation, UNREADABLE) or isinstance(action, spaces.MultiDiscrete)
        assert unreadable or "holds no numbers" in refusal or "two parts" in refusal, refusal
        return
    env = make_env(read.info)
    obs, _ = env.reset(seed=7)
    for step in range(3):
        assert obs.shape == env.observation_space.shape == (read.obs_dim,)
        np.testing.assert_array_equal(read.observations[step], obs.astype(np.float32))
        chosen = read.actions[step].numpy()
        obs, *_ = env.step(int(chosen) if read.info.discrete else chosen)
        np.testing.assert_array_equal(read.next_observations[step], obs.astype(np.float32))
    for taken, original in zip(env.unwrapped.taken, actions):
        # float64 actions went through float32
        np.testing.assert_allclose(taken, original, rtol=1e-6, atol=0)
        assert np.shape(taken) == np.shape(original)


def test_values_outside_their_space_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "a-v0/data"
    data.mkdir(parents=True)
    with h5py.File(data / "main_data.hdf5", "w") as file:
        episode = file.create_group("episode_0")
        episode["observations"], episode["actions"], episode["rewards"] = [1, 2, 0], [0, 1], [0.0, 0.0]
        episode["terminations"], episode["truncations"] = [False, True], [False, False]
    discrete = json.dumps({"type": "Discrete", "n": 3, "start": 1})
    metadata = {"total_steps": 2, "observation_space": discrete, "action_space": discrete}
    (data / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(OffrlError, match=r"observations holds 0\.0, which is no value of its space"):
        read_minari(tmp_path / "a-v0")


# ---- what is never run ---------------------------------------------------------------------------------------------


def test_modules_that_a_dataset_names_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "named_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OffrlError, match="never imported; name it yourself: env=named_module:Evil-v0"):
        make_env(DatasetInfo(env_id="named_module:Evil-v0"))
    assert "named_module" not in sys.modules
    CURRENT[:] = spaces.Discrete(2), spaces.Discrete(2)
    registered = make_env(DatasetInfo(env_id="named_module:offrl-test/Replayed-v0", discrete=2))
    assert isinstance(registered.unwrapped, Replayed)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"xml_file": "/etc/passwd"}, "names a file"),
        ({"xml_file": "ant.xml"}, "names a file"),
        ({"options": {"deep": ["..\\\\x"]}}, "names a file"),
        ({"entry_point": "os:system"}, "no argument of an environment"),
        ({"disable_env_checker": False}, "no argument of an environment"),
        ({"a b": 1}, "no argument of an environment"),
    ],
)
def test_arguments_that_a_dataset_may_not_choose(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(OffrlError, match=message):
        make_env(DatasetInfo(env_id="Hopper-v4", env_kwargs=kwargs))


def test_arguments_that_do_not_fit_are_one_sentence() -> None:
    pytest.importorskip("mujoco")
    with pytest.raises(OffrlError, match=r"Hopper-v4 cannot be made .*env_kwargs") as caught:
        make_env(DatasetInfo(env_id="Hopper-v4", env_kwargs={"colour": 3}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (DatasetInfo(env_id="CartPole-v1"), "takes actions Discrete.2., but the dataset has continuous actions"),
        (DatasetInfo(env_id="CartPole-v1", discrete=3), "but the dataset has 3 discrete actions"),
        (DatasetInfo(env_id="Pendulum-v1", discrete=3), "but the dataset has 3 discrete actions"),
        (DatasetInfo(env_id="Pendulum-v1", action_low=(-2.0, 0.0), action_high=2.0), "it is another task"),
    ],
)
def test_an_environment_of_other_actions_is_refused(info: DatasetInfo, message: str) -> None:
    with pytest.raises(OffrlError, match=message):
        make_env(info)
