"""Data and an environment of one's own: what Python hands over, what a command line names, and what files may not do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import polars as pl
import pytest
import torch

import offrl
from offrl.cli import main as cli
from offrl.data import DatasetInfo, OfflineDataset, ReadOptions, from_arrays, from_episodes, from_frame
from offrl.data.arrays import write_npz
from offrl.data.dataset import MADE_UP
from offrl.data.given import name_of
from offrl.datasets import load
from offrl.envs import chosen
from offrl.results import read
from offrl.training.hooks import Evaluation
from offrl.training.run_config import resolve_config
from offrl.training.runs import read_config, read_data
from offrl.training.schema import EvalConfig
from offrl.training.scoring import evaluate, keep, policy_of
from offrl.training.trainer import resume
from offrl.utils.errors import OffrlError

STEPS = 5
FIRST = EvalConfig().seed
COUNT = """
import gymnasium, numpy as np

class Count(gymnasium.Env):
    '''The reward of a step is `scale`, whatever the action; an episode never ends by itself.'''
    observation_space = gymnasium.spaces.Box(-2, 2, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, scale=1.0):
        self.scale = scale

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 2), {}

    def step(self, action):
        return self.np_random.uniform(-1, 1, 2), self.scale, False, False, {}
"""


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr("gymnasium.registry", gymnasium.registry)
    for name, nothing in (("_functions", {}), ("_modules", [])):  # what a test gives is no other test's
        monkeypatch.setattr(chosen, name, nothing)


def make_count(scale: float = 1.0) -> gymnasium.Env:
    scope: dict[str, Any] = {"__name__": "count"}
    exec(COUNT, scope)
    env: gymnasium.Env = scope["Count"](scale)
    return env


def episodes(count: int = 6) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {
            "observations": rng.uniform(-1, 1, (STEPS + 1, 2)),
            "actions": rng.uniform(-1, 1, (STEPS, 1)).astype(np.float32),
            "rewards": np.arange(STEPS, dtype=float) + number,
            "terminals": np.arange(STEPS) == (STEPS - 1 if number % 2 else -1),
        }
        for number in range(count)
    ]


QUICK = {"agent": "td3_bc", "updates": 4, "batch_size": 8, "agent.hidden": [4], "progress": False, "eval.workers": 1}


def fit(dataset: Any, **options: Any) -> Any:
    return offrl.fit(dataset=dataset, **QUICK | options)


# ---- arrays ---------------------------------------------------------------------------------------------------


def test_episodes_with_their_last_state_are_transitions_of_stated_successors() -> None:
    store, parts = from_episodes(episodes()), episodes()
    assert store.lengths.tolist() == [STEPS] * 6
    assert not store.has_tail.any()
    for number, part in enumerate(parts):
        rows = slice(number * STEPS, (number + 1) * STEPS)
        np.testing.assert_array_equal(store.observations[rows], part["observations"][:-1].astype(np.float32))
        np.testing.assert_array_equal(store.next_observations[rows], part["observations"][1:].astype(np.float32))
        assert store.terminations[rows].tolist() == [0.0] * (STEPS - 1) + [float(number % 2)]


def test_without_its_last_state_a_cut_episode_loses_its_last_transition() -> None:
    parts = [part | {"observations": part["observations"][:-1]} for part in episodes()]
    assert from_episodes(parts).lengths.tolist() == [STEPS - 1, STEPS] * 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rewards": None}, "episode 1: missing rewards"),
        ({"actions": np.zeros((3, 1))}, r"episode 1: 6 observations, 3 actions and 5 rewards don't fit together"),
        ({"observations": np.zeros((6, 3))}, "observations has rows of different shapes in different episodes"),
        ({"observations": np.zeros((5, 2))}, "some episodes have observations of T \\+ 1 states and some of T"),
        ({"dones": np.zeros(5)}, "episode 1: dones is not read in an episode; it may mix .* give terminals"),
        (
            {"terminals": None, "masks": np.ones(5)},
            "episode 1: masks is not read in an episode; give terminals = 1 - masks",
        ),
        ({"next_observations": np.zeros((5, 2))}, "episode 1: next_observations is not read .* T \\+ 1 states"),
        (
            {"terminals": np.array([0, 0, 1, 0, 0])},
            "episode 1: terminals is 1 in row 2, before the last of 5 steps; split",
        ),
        ({"timeouts": np.array([0, 1, 0, 0, 0])}, "episode 1: timeouts is 1 in row 1, before the last of 5 steps"),
        ({"terminals": np.array([0, 0, 0, 0, np.nan])}, "episode 1: terminals holds nan in row 4; .* only 0 and 1"),
        ({"terminals": 7}, "episode 1: terminals holds 7 in row 0"),
        ({"terminals": np.zeros(4)}, "episode 1: terminals has 4 rows; give one flag, or one for each of its 5 steps"),
        ({"terminated": False}, "episode 1: terminals and terminated mean the same but differ"),
    ],
)
def test_bad_episodes_are_refused(change: dict[str, Any], sentence: str) -> None:
    parts = episodes()
    parts[1] = {key: value for key, value in (parts[1] | change).items() if value is not None}
    with pytest.raises(OffrlError, match=sentence):
        from_episodes(parts)


OBS = np.zeros((STEPS + 1, 2))


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (None, "^episodes is of type NoneType; give a list of dictionaries"),
        (episodes()[0], "^episodes is of type dict; give a list of dictionaries"),
        ([1], "^episode 0 is of type int; give a dictionary with observations"),
        ([(OBS, OBS, OBS)], "^episode 0 is of type tuple; give a dictionary with observations"),
        ({"observations": [*OBS[:-1], (OBS[-1], {})]}, "^episode 0: observations has dtype object; .* the same shape"),
        ({"observations": [*OBS[:-1], None]}, "^episode 0: observations has dtype object; .* the same shape"),
        ({"observations": [[1.0], *OBS[1:]]}, "^episode 0: observations has dtype object; .* the same shape"),
        ({"observations": torch.zeros(STEPS + 1, 2, device="meta")}, "^episode 0: observations has dtype object"),
        (
            {"rewards": 1.0},
            "^episode 0: observations, actions or rewards is a single value; give one row for each step",
        ),
        ({"terminals": [[0], [0, 1]]}, "^episode 0: terminals has dtype object"),
    ],
    ids=str,
)
def test_what_is_no_list_of_episodes_gets_a_sentence(made: Any, sentence: str) -> None:
    with pytest.raises(OffrlError, match=sentence):
        from_episodes([episodes()[0] | made] if isinstance(made, dict) and "actions" not in made else made)


def test_tensors_of_any_kind_are_arrays() -> None:
    """With a gradient, of half the width, and in lists."""
    parts = episodes()
    usual = from_episodes(parts)
    for change in (
        lambda obs: torch.tensor(obs, requires_grad=True),
        lambda obs: [torch.tensor(row, requires_grad=True) for row in obs],
    ):
        assert (
            from_episodes([p | {"observations": change(p["observations"])} for p in parts]).fingerprint
            == usual.fingerprint
        )
    columns = {key: value for key, value in flat().items() if key != "episode"}
    half = torch.tensor(columns["observations"]).bfloat16()
    assert torch.equal(from_arrays(columns | {"observations": half}).observations[:4], half[:4].float())


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: from_arrays([1]), "^arrays is of type list; give a dictionary"),
        (
            lambda: from_episodes(episodes(), "cart"),
            r'^info is of type str; give an offrl.data.DatasetInfo, .*id="cart"',
        ),
        (
            lambda: from_arrays(flat(), options={"family": "x"}),
            "^options is of type dict; give an offrl.data.ReadOptions",
        ),
        (lambda: from_frame(5, "x", "a"), "^frame is of type int; give a frame of pandas or polars"),
        (
            lambda: from_frame(pl.LazyFrame({"x": [1.0]}), "x", "a"),
            r"^the frame is a lazy one, .*give frame.collect\(\)",
        ),
        (lambda: offrl.load_data(None), "^a dataset's name is of type NoneType; give an id"),
        (lambda: offrl.load_data(5), "^a dataset's name is of type int; give an id"),
        (lambda: offrl.load_data("mine.npz", device="x"), "^device=x is unknown"),
        (lambda: offrl.load_data("mine.npz", device="cuda"), "^device=cuda: this PyTorch sees no GPU"),
        (lambda: offrl.load_agent("run", device="tpu"), "^device=tpu is unknown"),
        (lambda: offrl.load_agent("run", device="cuda"), "^device=cuda: this PyTorch sees no GPU"),
    ],
)
def test_other_arguments_of_python_get_a_sentence(call: Any, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OffrlError, match=sentence):
        call()


def test_gymnasiums_flags_end_episodes_too() -> None:
    """One flag, or one for each step; a truncation leaves the value of the next state."""
    parts = episodes(4)
    for number, part in enumerate(parts):
        last = part.pop("terminals")[-1:]
        part["terminated"] = bool(last[0]) if number < 2 else np.append(np.zeros((STEPS - 1, 1)), [last], axis=0)
        part["truncated"] = not last[0]
    store = from_episodes(parts)
    assert store.fingerprint == from_episodes(episodes(4)).fingerprint
    assert store.terminations[STEPS - 1 :: STEPS].tolist() == [0, 1, 0, 1]


def flat() -> dict[str, np.ndarray]:
    """The same episodes as columns, with a number for each."""
    parts = episodes()
    columns = {key: np.concatenate([part[key][:STEPS] for part in parts]) for key in parts[0]}
    return columns | {"episode": np.repeat(np.arange(len(parts)), STEPS)}


def test_a_frame_of_polars_is_the_flat_columns() -> None:
    columns = flat()
    frame = pl.DataFrame(
        {
            "x": columns["observations"][:, 0],
            "y": columns["observations"][:, 1],
            "push": columns["actions"][:, 0],
            "reward": columns["rewards"],
            "terminal": columns["terminals"],
            "episode": columns["episode"],
        }
    )
    store = from_frame(frame, ["x", "y"], "push", episode="episode")
    ends = np.arange(len(columns["rewards"])) % STEPS == STEPS - 1
    arrays = {key: columns[key] for key in ("observations", "actions", "rewards", "terminals")}
    same = from_arrays(arrays | {"timeouts": ends & ~columns["terminals"]})
    assert store.fingerprint == same.fingerprint
    again = pl.concat([frame, frame])  # a counter that begins anew
    assert from_frame(again, ["x", "y"], "push", episode="episode").episodes == 2 * store.episodes
    mixed = frame[np.argsort(np.arange(len(frame)) % STEPS, kind="stable")]
    with pytest.raises(OffrlError, match="rows of an episode don't stand together: episode changes 29 times between 6"):
        from_frame(mixed, ["x", "y"], "push", episode="episode")
    frame.write_csv("log.csv")
    with pytest.raises(OffrlError, match=r"log.csv: a table has no fixed names of columns; .*from_frame"):
        load("log.csv")
    with pytest.raises(OffrlError, match=r"no column z, which observations= names; it has x, y, push"):
        from_frame(frame, ["x", "z"], "push")


def test_an_index_of_pandas_makes_no_difference() -> None:
    """pandas is no dependency: what `from_frame` uses of a frame is its columns' names, [] and `to_numpy`."""

    class Column:
        def __init__(self, values: np.ndarray) -> None:
            self.to_numpy = lambda: values

    class Frame(dict):
        columns = property(lambda self: list(self))

        def __len__(self) -> int:
            return 6 * STEPS

    values = flat()
    frame = Frame({"x": Column(values["observations"][:, 0]), "a": Column(values["actions"][:, 0])})
    frame |= {"reward": Column(values["rewards"]), "terminal": Column(values["terminals"])}
    assert from_frame(frame, "x", "a").obs_dim == 1


# ---- what Python hands over -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dataset", "arrays", "path"])
def test_fit_takes_data_in_memory_and_the_run_can_be_resumed(kind: str, tmp_path: Path) -> None:
    store = from_episodes(episodes())
    columns = {key: value for key, value in flat().items() if key != "episode"}
    timeouts = (np.arange(6 * STEPS) % STEPS == STEPS - 1) & ~columns["terminals"]
    if kind == "path":
        write_npz(store, tmp_path / "mine.npz")
    given = {"dataset": store, "arrays": columns | {"timeouts": timeouts}, "path": tmp_path / "mine.npz"}[kind]
    result = fit(given, eval={"every": 0, "final_episodes": 0})
    again = fit(given, eval={"every": 0, "final_episodes": 0})
    assert again.folder == result.folder
    assert again.status == "already finished"
    longer = resume(result.folder, {"updates": 6})
    assert (longer.step, longer.status) == (6, "finished")


def test_other_numbers_or_another_info_are_another_run() -> None:
    store = from_episodes(episodes())
    unseen = {"eval": {"every": 0, "final_episodes": 0}}
    folders = {
        fit(data, **unseen).folder
        for data in (store, store.with_rewards(2.0), store.with_info(id="mine"), from_episodes(episodes(5)))
    }
    assert len(folders) == 4


def test_kept_data_gets_a_later_note_under_its_old_name() -> None:
    """So that the runs on it keep their folders; an earlier version noted no made-up successors."""
    arrays = {key: value for key, value in flat().items() if key != "episode"}
    store = from_arrays(arrays)
    assert store.known_successors is not None
    without = {key: value for key, value in store.info.provenance.items() if key != MADE_UP}
    old = name_of(store.with_info(provenance=without), ReadOptions())
    assert load(old).known_successors is None
    assert name_of(store, ReadOptions()) == old
    assert load(old).known_successors is not None


def test_the_kept_data_is_the_data(tmp_path: Path) -> None:
    store = from_episodes(episodes(), DatasetInfo(id="mine/first set", action_low=-1, action_high=1))
    result = fit(store, eval={"every": 0, "final_episodes": 0})
    name = json.loads((result.folder / "config.json").read_text())["dataset"]
    assert load(name).fingerprint == store.fingerprint
    assert load(name).info.id == "mine/first set"
    with pytest.raises(OffrlError, match=r"no longer kept; hand it to offrl\.fit again"):
        load(f"given/{'0' * 12}/mine")


def test_reading_options_hold_for_arrays_and_are_refused_for_a_dataset() -> None:
    arrays = {key: value for key, value in flat().items() if key != "episode"} | {"actions": 3 * flat()["actions"]}
    unseen = {"eval.every": 0, "eval.final_episodes": 0}
    with pytest.raises(OffrlError, match=r'give the true bound \(data=\{"action_bound": B\}'):
        fit(arrays, **unseen)
    result = fit(arrays, data={"action_bound": 4.0}, **unseen)
    assert offrl.load_agent(result.folder).spec.action_high == 4.0
    assert resume(result.folder, {"updates": 6}).step == 6
    name = json.loads((result.folder / "config.json").read_text())["dataset"]
    assert load(name).fingerprint == load(name, action_bound=4.0).fingerprint
    for options in ({"action_bound": 3.0}, {"action_bound": 4.0, "semantics": "d4rl"}):
        with pytest.raises(OffrlError, match=rf"{name}: this dataset has been read already; leave out .*action_bound"):
            load(name, **options)
    with pytest.raises(OffrlError, match="has been read already"):
        fit(from_arrays(arrays, options=ReadOptions(action_bound=4.0)), data={"action_bound": 4.0}, **unseen)
    with pytest.raises(OffrlError, match=r"dataset is of type int; give an id, a path"):
        fit(3)
    for first in (arrays, "mine.npz"):
        with pytest.raises(
            OffrlError, match=r"config_dir, its first argument, .*; give all else by name: fit\(dataset="
        ):
            offrl.fit(first)  # type: ignore[arg-type]


def test_a_minari_dataset_and_a_filtered_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    from minari.data_collector import EpisodeBuffer

    buffers = [
        EpisodeBuffer(
            id=number,
            observations=part["observations"].astype(np.float32),
            actions=part["actions"],
            rewards=part["rewards"],
            terminations=part["terminals"],
            truncations=(np.arange(STEPS) == STEPS - 1) & ~part["terminals"],
            infos={},
        )
        for number, part in enumerate(episodes(3))
    ]
    spaces = {name: getattr(make_count(), name) for name in ("observation_space", "action_space")}
    dataset = minari.create_dataset_from_buffers("mine/count-v0", buffers, author="me", **spaces)
    unseen = {"every": 0, "final_episodes": 0}
    whole = fit(dataset, eval=unseen)
    assert json.loads((whole.folder / "config.json").read_text())["dataset"] == "mine/count-v0"
    some = fit(dataset.filter_episodes(lambda episode: episode.id != 1), eval=unseen)
    name = json.loads((some.folder / "config.json").read_text())["dataset"]
    whole_store, some_store = load("mine/count-v0"), load(name)
    assert some_store.fingerprint == whole_store.select_episodes(torch.tensor([0, 2])).fingerprint


# ---- the environment ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["on_evaluation", "on_checkpoint"])
def test_what_can_not_be_called_is_refused_before_any_update(hook: str) -> None:
    with pytest.raises(OffrlError, match=f"{hook} is of type int; give a function"):
        fit(from_episodes(episodes()), **{hook: 3})


def test_a_function_makes_the_environment_and_callbacks_see_what_happens() -> None:
    """Three steps of reward 2 are a return of 6, which is 60 between references of 0 and 10."""
    seen: list[Evaluation] = []
    saved: list[tuple[int, Path]] = []
    result = fit(
        from_episodes(episodes()),
        eval={
            "every": 2,
            "episodes": 1,
            "final_episodes": 3,
            "env": make_count,
            "env_kwargs": {"scale": 2.0},
            "max_episode_steps": 3,
            "ref_min": 0,
            "ref_max": 10,
        },
        lanes=2,
        log_every=2,
        on_evaluation=seen.append,
        on_checkpoint=lambda step, path: saved.append((step, path)),
    )
    assert result.returns == [6.0, 6.0]
    assert result.scores == pytest.approx([60.0, 60.0])
    assert [(one.step, one.returns.shape) for one in seen] == [(2, (2, 1)), (4, (2, 3))]
    assert saved == [(4, result.folder / "checkpoint.safetensors")]
    assert set(read([result.folder])["length"]) == {3}


def words(*more: str) -> list[str]:
    quick = ["agent=td3_bc", "agent.hidden=[4]", "updates=4", "batch_size=8", "progress=false", "eval.workers=1"]
    return ["train", "dataset=mine.npz", *quick, "eval.every=0", "eval.final_episodes=2", *more]


@pytest.fixture
def mine(tmp_path: Path) -> OfflineDataset:
    """A file of data, and a module whose import registers an environment of a name that no other test has."""
    store = from_episodes(episodes())
    write_npz(store, tmp_path / "mine.npz")
    name = f"count_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        COUNT + f"\ngymnasium.register('{name}-v0', entry_point=Count, max_episode_steps=3)\n"
    )
    return store


def module_of(folder: Path) -> str:
    return next(folder.glob("count_*.py")).stem


def test_the_command_line_names_a_module_and_a_file_does_not(
    mine: OfflineDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = module_of(tmp_path)
    assert cli.main(words()) == 2
    assert "names no environment to evaluate in; name one with eval.env=ID" in capsys.readouterr().err
    write_npz(mine.with_info(env_id=f"{name}:{name}-v0"), tmp_path / "mine.npz")
    assert cli.main(words()) == 2
    assert f"name it yourself: eval.env={name}:{name}-v0" in capsys.readouterr().err
    assert name not in sys.modules
    assert cli.main(words(f"eval.env={name}:{name}-v0", "name=one")) == 0
    assert "return 3.0 after 4 updates" in capsys.readouterr().out
    for key in [key for key in sys.modules if key == name]:
        del sys.modules[key]
    gymnasium.registry.pop(f"{name}-v0")
    assert cli.main(["evaluate", "runs/one", "--episodes", "1", "--workers", "1"]) == 2
    assert f"name it yourself: --env {name}:{name}-v0" in capsys.readouterr().err
    assert name not in sys.modules
    assert cli.main(["train", "resume=runs/one", "updates=5"]) == 2
    assert name not in sys.modules
    assert cli.main(["train", "resume=runs/one", "updates=5", f"eval.env={name}:{name}-v0"]) == 0


def test_a_class_of_a_module_and_its_arguments(mine: OfflineDataset, tmp_path: Path, capsys: Any) -> None:
    name = module_of(tmp_path)
    more = (f"eval.env={name}:Count", "eval.env_kwargs.scale=3", "eval.max_episode_steps=2", "name=two")
    assert cli.main(words(*more)) == 0
    assert "return 6.0" in capsys.readouterr().out
    gymnasium.registry.pop("Count")
    probe = ["probe", "runs/two", "--episodes", "2", "--updates", "0"]
    assert cli.main(probe) == 2
    assert f"name it yourself: --env {name}:Count" in capsys.readouterr().err
    assert cli.main([*probe, "--env", f"{name}:Count"]) == 0
    assert "6.000" in capsys.readouterr().out  # its arguments and its limit are the run's
    gymnasium.registry.pop("Count")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("eval.env=nothing_like_it:Env-v0", "module nothing_like_it can't be imported"),
        ("eval.env=json:Env-v0", "the module json has no environment Env-v0; call gymnasium.register in it"),
        ("eval.env=Nothing-v0", "name the module that registers it: eval.env=MODULE:Nothing-v0"),
        ("eval.env_kwargs.scale=2", "names no environment; give eval.env=ID as well"),
        ("eval.ref_min=2", "eval.ref_min=2.0 and eval.ref_max=None are the returns that score 0 and 100"),
        ("eval.ref_min=0 eval.ref_max=-5", "give two numbers, the larger one for 100"),
        (
            "eval.ref_min=0 eval.ref_max=inf",
            "eval.ref_max=inf are the returns that score 0 and 100; give two numbers",
        ),
    ],
)
def test_a_wrong_environment_gets_a_sentence(
    given: str, sentence: str, mine: OfflineDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(*given.split())) == 2
    assert sentence in capsys.readouterr().err


def test_an_environment_of_other_bounds_is_warned_of() -> None:
    def wide() -> gymnasium.Env:
        env = make_count()
        env.action_space = gymnasium.spaces.Box(-3, 3, (1,))
        return env

    env = {"env": wide, "max_episode_steps": 2, "every": 0, "final_episodes": 1}
    with pytest.warns(
        UserWarning, match=r"takes actions from -3 to 3, and the policy acts from -1 to 1.*RescaleAction"
    ):
        fit(from_episodes(episodes()), eval=env)


def test_an_environment_without_end_is_warned_of(mine: OfflineDataset, tmp_path: Path) -> None:
    from offrl.envs.chosen import with_environment
    from offrl.evaluation.evaluator import Evaluator

    name = module_of(tmp_path)
    gymnasium.register("Endless-v0", entry_point=make_count)
    info = with_environment(mine.info, "Endless-v0")
    with pytest.warns(UserWarning, match=r"Endless-v0 has no time limit; .*eval\.max_episode_steps=N"):
        Evaluator(info, 1, 1).close()
    gymnasium.registry.pop("Endless-v0")
    assert name not in sys.modules


# ---- scores that come later -----------------------------------------------------------------------------------


def test_a_run_without_a_simulator_is_scored_later(
    mine: OfflineDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = module_of(tmp_path)
    unseen = [word for word in words("name=later") if not word.startswith("eval.final")] + ["eval.final_episodes=0"]
    assert cli.main(unseen) == 0
    assert "not evaluated" in capsys.readouterr().out
    score = ["evaluate", "runs/later", "--episodes", "2", "--workers", "1"]
    assert cli.main(score) == 2
    assert "name one with --env ID" in capsys.readouterr().err
    env = ["--env", f"{name}:Count", "--env-kwargs", "scale=5", "--max-episode-steps", "2"]
    env += ["--ref-min", "0", "--ref-max", "20"]
    assert cli.main([*score, *env]) == 0
    assert "2 new episodes a lane kept in runs/later" in capsys.readouterr().out
    rows = read([tmp_path / "runs/later"])
    assert rows["return_raw"].to_list() == [10.0, 10.0]
    assert rows["normalized"].to_list() == [50.0, 50.0]
    assert set(rows["checkpoint"]) == {"last"}
    assert json.loads(Path("runs/later/result.json").read_text())["scores"] == [50.0]
    assert cli.main([*score, "--episodes", "3", *env]) == 0  # two of the three are there
    assert "1 new episodes a lane kept" in capsys.readouterr().out
    assert read([tmp_path / "runs/later"]).height == 3
    gymnasium.register("Other-v0", entry_point=make_count, max_episode_steps=2)
    assert cli.main([*score, "--env", "Other-v0"]) == 0
    assert f"not kept: the run's rows are of {name}:Count" in capsys.readouterr().out
    gymnasium.registry.pop("Other-v0")
    gymnasium.registry.pop("Count")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--env-kwargs", "scale=7"), "env_kwargs={'scale': 5}, these episodes with {'scale': 7}"),
        (("--max-episode-steps", "3"), "max_episode_steps=2, these episodes with 3"),
        (("--ref-min", "5"), "ref_min=0.0, these episodes with 5.0"),
        (("--ref-max", "40"), "ref_max=20.0, these episodes with 40.0"),
    ],
)
@pytest.mark.parametrize("seed", ["1000000", "5"], ids=["same seeds", "other seeds"])
@pytest.mark.parametrize("trained", [True, False], ids=["scored in training", "scored later"])
def test_episodes_of_another_task_or_scale_are_never_added(
    trained: bool, seed: str, more: tuple[str, ...], said: str, mine: OfflineDataset, tmp_path: Path, capsys: Any
) -> None:
    env = f"{module_of(tmp_path)}:Count"
    task = [
        f"eval.env={env}",
        "eval.env_kwargs.scale=5",
        "eval.max_episode_steps=2",
        "eval.ref_min=0",
        "eval.ref_max=20",
    ]
    score = ["evaluate", "runs/one", "--episodes", "2", "--workers", "1", "--env", env]
    if trained:
        assert cli.main(words("name=one", *task)) == 0
    else:
        assert cli.main([*(w for w in words("name=one") if "final" not in w), "eval.final_episodes=0"]) == 0
        options = ["--env-kwargs", "scale=5", "--max-episode-steps", "2", "--ref-min", "0", "--ref-max", "20"]
        assert cli.main([*score, *options]) == 0
    files = [Path("runs/one") / name for name in ("result.json", "episodes.jsonl", "config.json")]
    before = [file.read_bytes() for file in files]
    capsys.readouterr()
    assert cli.main([*score, "--seed", seed, *more]) == 0
    assert f"not kept: the run's rows were scored with {said}" in capsys.readouterr().out
    assert [file.read_bytes() for file in files] == before
    assert cli.main([*score, "--seed", "77"]) == 0  # what the run was scored with need not be repeated
    assert "2 new episodes a lane kept" in capsys.readouterr().out
    assert set(read([tmp_path / "runs/one"])["normalized"]) == {50.0}
    gymnasium.registry.pop("Count")


def test_references_that_are_given_later_hold_for_later_episodes_too(mine: OfflineDataset, tmp_path: Path) -> None:
    name = module_of(tmp_path)
    write_npz(mine.with_info(env_id=f"{name}-v0"), tmp_path / "mine.npz")
    chosen.import_environment(f"{name}:{name}-v0")
    assert cli.main([*(w for w in words("name=one") if "final" not in w), "eval.final_episodes=0"]) == 0
    score = ["evaluate", "runs/one", "--episodes", "1", "--workers", "1"]
    assert cli.main([*score, "--ref-min", "0", "--ref-max", "6"]) == 0
    assert cli.main([*score, "--seed", "5"]) == 0
    assert read([tmp_path / "runs/one"])["normalized"].to_list() == [50.0, 50.0]


def test_episodes_that_are_kept_later_are_of_the_same_task() -> None:
    """Flickering observations are part of a dataset's name in rows, by training and by evaluation alike."""
    env = {"env": make_count, "max_episode_steps": 3, "every": 0}
    run = fit(from_episodes(episodes()), data={"flicker": 0.5}, eval={**env, "final_episodes": 2})
    policy, info = policy_of(run.folder, EvalConfig())
    options = EvalConfig(episodes=2, seed=7, workers=1)
    keep(run.folder, options, [0], info, evaluate(policy, info, options))
    rows = read([run.folder])
    assert rows.height == 4
    (name,) = rows["dataset"].unique()
    assert name.endswith("+flicker=0.5")


def test_a_finished_run_plays_the_episodes_that_it_still_owes() -> None:
    data = from_episodes(episodes())
    env = {"env": make_count, "max_episode_steps": 3, "every": 0}
    first = fit(data, eval={"every": 0, "final_episodes": 0})
    assert first.scores is None
    assert not first.returns
    second = fit(data, eval={**env, "final_episodes": 2})
    assert (second.folder, second.status, second.returns) == (first.folder, "finished", [3.0])
    assert fit(data, eval={**env, "final_episodes": 2}).status == "already finished"
    third = fit(data, eval={**env, "final_episodes": 4})
    assert third.status == "finished"
    assert read([third.folder]).height == 4
    assert fit(data, eval={**env, "final_episodes": 1}).status == "already finished"
    policy, info = policy_of(third.folder, EvalConfig())
    others = EvalConfig(episodes=2, seed=7, workers=1)
    kept = keep(third.folder, others, [0], info, evaluate(policy, info, others))
    assert kept.startswith("2 new episodes a lane kept")
    fifth = fit(data, eval={**env, "final_episodes": 5})  # those of other seeds stay, and none is there twice
    assert sorted(read([fifth.folder])["eval_seed"]) == sorted([*range(7, 9), *range(FIRST, FIRST + 5)])
    with pytest.raises(OffrlError, match=r"was scored with eval\.max_episode_steps=3, not 2"):
        fit(data, eval={**env, "max_episode_steps": 2, "final_episodes": 2})
    with pytest.warns(UserWarning, match="can't be evaluated every 2 updates any more"):
        fit(data, eval={**env, "every": 2, "final_episodes": 2})


def test_a_run_finds_its_data_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npz(from_episodes(episodes()), tmp_path / "mine.npz")
    result = fit("mine.npz", eval={"every": 0, "final_episodes": 0})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert resume(tmp_path / result.folder, {"updates": 6}).step == 6
    job = resolve_config(read_config(tmp_path / result.folder), trusted=False)
    assert len(read_data(job.train, "cpu", tmp_path / result.folder)) == 6 * STEPS


def test_scores_show_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    env = {"env": make_count, "max_episode_steps": 3, "every": 2, "episodes": 1, "final_episodes": 1}
    fit(from_episodes(episodes()), eval=env, progress=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if "return" in line]
    assert [line.partition(": ")[2] for line in lines] == ["2 of 4 updates: return 3.0", "4 of 4 updates: return 3.0"]
