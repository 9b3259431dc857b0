"""What a run is: every setting down to the last default, the name of its choice, and where each value came from."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from test_train import options, world  # noqa: F401 - a fixture

from offrl.agents import td3_bc
from offrl.agents.td3_bc import TD3BC, TD3BCConfig
from offrl.cli.main import main
from offrl.results.report import report
from offrl.training.compose import compose, compose_words
from offrl.training.run_config import RunConfig, resolve_config
from offrl.training.trainer import resume, train
from offrl.utils.errors import OffrlError
from offrl.utils.paths import write_json
from offrl.utils.settings import check_lane_lists

TWO_AGENTS = """
from dataclasses import dataclass
from offrl.agents.td3_bc import TD3BC, TD3BCConfig

@dataclass
class FirstConfig(TD3BCConfig):
    alpha: float = 1.0

class First(TD3BC):
    Config = FirstConfig

class SecondOne(TD3BC):
    pass
"""


def planned(**values: Any) -> RunConfig:
    return resolve_config({"dataset": "x", "agent": {"_target_": "offrl.agents.td3_bc.TD3BC"}, **values})


def test_an_edited_default_makes_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newcomer's loop: change a default in the agent's file, repeat the command."""
    before = planned()
    assert before.agent["alpha"] == 2.5
    assert before.folder() == planned(agent={"_target_": "offrl.agents.td3_bc.TD3BC", "alpha": 2.5}).folder()

    @dataclass
    class Edited(TD3BCConfig):
        alpha: float = 1.0

    monkeypatch.setattr(TD3BC, "Config", Edited)
    after = planned()
    assert after.agent["alpha"] == 1.0
    assert after.config_hash() != before.config_hash()
    assert after.folder() != before.folder()


@pytest.mark.parametrize("group", ["sampler", "augment"])
def test_defaults_of_samplers_and_augmentations_count(group: str) -> None:
    targets = {
        "sampler": "offrl.sampling.TopPercent",
        "augment": "offrl.augment.world_model.WorldModel",
    }
    made = planned(**{group: {"_target_": targets[group]}})
    settings = getattr(made, group)
    assert len(settings) > 1
    assert made.to_dict()[group] == settings
    assert resolve_config(json.loads(json.dumps(made.to_dict()))).config_hash() == made.config_hash()


def test_everything_is_written_down_and_shown(
    toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    values = options(toy_file, 5, lanes=1)
    values["agent"]["settings"] = {"*toy*": {"tau": 0.1}, "*other*": {"tau": 0.2}}
    folder = train(values).folder
    config = json.loads((folder / "config.json").read_text())
    assert config["agent"].keys() == {"_target_", *TD3BCConfig.__dataclass_fields__}
    assert config["agent"]["tau"] == 0.1
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["table_rows"] == {"*toy*": {"tau": 0.1}}
    assert set(manifest["non_default"]) == {"agent.hidden", "agent.tau"}
    assert manifest["lane_lists"] == []
    capsys.readouterr()
    assert main(["train", "agent=rebrac", "dataset=antmaze-umaze-v2", "--cfg", "job"]) == 0
    shown = capsys.readouterr().out
    assert '# agent.settings, row antmaze-umaze-v2: {"actor_bc": 0.003, "critic_bc": 0.002}' in shown
    assert "actor_bc: 0.003" in shown
    assert "tau: 0.005" in shown  # a default
    assert "batch_size: 256" in shown
    assert "reward_scale: 100.0" in shown


def test_runs_of_earlier_versions_are_resumed_and_say_what_they_lack(
    toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wrote down only what differs from the defaults; a setting that does differ is still refused."""
    monkeypatch.chdir(tmp_path)
    folder = train(options(toy_file, 4, lanes=1)).folder
    from offrl.utils import checkpoint

    path = folder / checkpoint.NAME
    tensors, metadata = checkpoint.load(path)
    config = metadata["config"]
    config.pop("agent_name")
    config["agent"] = {"_target_": config["agent"]["_target_"], "hidden": config["agent"]["hidden"]}
    config["sampler"] = {"_target_": "offrl.sampling.Uniform"}
    checkpoint.write(path, tensors, metadata)
    write_json(folder / "config.json", config)
    with pytest.warns(
        UserWarning, match=r"did not write down \d+ of its settings; it goes on with .*agent\.alpha=2\.5"
    ):
        assert resume(folder, {"updates": 6}).step == 6
    assert json.loads((folder / "config.json").read_text())["agent"]["alpha"] == 2.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resume(folder, {"updates": 8}).step == 8
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "agent": {**config["agent"], "alpha": 9.0}})
    with pytest.raises(OffrlError, match=r"made with other settings \(agent\.alpha 2\.5, now 9\.0\)"):
        resume(folder, {"updates": 10})
    write_json(folder / "config.json", config)
    tensors, metadata = checkpoint.load(path)
    metadata["config"]["sampler"]["_target_"] = {"a": 1}  # a name can be anything
    checkpoint.write(path, tensors, metadata)
    with pytest.raises(OffrlError, match=r"made with other settings \(sampler\._target_ .*a.*now"):
        resume(folder, {"updates": 10})


def test_two_agents_of_one_file_are_two_methods(
    world: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Trained by name from a user's own folder, by class from Python; the report tells them apart."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("two_agents.py").write_text(TWO_AGENTS)
    Path("conf/agent").mkdir(parents=True)
    for name, cls in (("own_first", "First"), ("own_second", "SecondOne")):
        Path(f"conf/agent/{name}.yaml").write_text(f"_target_: two_agents.{cls}\n")
    plain = {k: v for k, v in options("toy.npz", 4, lanes=1).items() if k != "agent"}
    plain["eval"] = {"every": 0, "final_episodes": 2, "workers": 1}
    made = [
        train(compose({**plain, "agent": name, "agent.hidden": [8]}, config_dir="conf")).folder
        for name in ("own_first", "own_second")
    ]
    assert [folder.parent.parent.name for folder in made] == ["own_first", "own_second"]
    cells = report(["runs"], "report", show=False).cells
    assert sorted(cell.method for cell in cells) == ["own_first", "own_second"]
    by_class = planned(agent={"_target_": "two_agents.SecondOne"})
    assert by_class.method == "second_one"
    assert main(["agents", "own_first", "--config-dir", "conf"]) == 0
    assert "agent.alpha=1.0" in capsys.readouterr().out
    assert main(["train", "--config-dir", "conf", "--help"]) == 0
    assert "own_first" in capsys.readouterr().out


def test_common_settings_win_over_a_table_and_typing_errors_are_found() -> None:
    tables = {"*": {"alpha": 1.0, "tau": 0.1}}
    agent = {"_target_": "offrl.agents.td3_bc.TD3BC", "settings": tables}
    made = planned(agent=dict(agent), common={"alpha": 7.0, "embed": 64})  # the second is another agent's
    assert (made.agent["alpha"], made.agent["tau"]) == (7.0, 0.1)
    assert planned(agent={**agent, "alpha": 3.0}, common={"alpha": 7.0}).agent["alpha"] == 3.0
    with pytest.raises(
        OffrlError, match=r"common\.hiden: no agent and no augmentation .*; did you mean common\.hidden\?"
    ):
        planned(common={"hiden": [8, 8]})
    with pytest.warns(DeprecationWarning, match="`sizes` is now called `common`"):
        assert planned(sizes={"alpha": 4.0}).agent["alpha"] == 4.0


def test_lists_per_lane_are_found_whether_or_not_annotations_are_postponed() -> None:
    """A user's module may lack `from __future__ import annotations`: its types are then types, and not text."""
    spaces: dict[str, Any] = {"dataclass": dataclass, "field": field, "__name__": "spaces"}
    sys.modules["spaces"] = type(sys)("spaces")
    exec("@dataclass\nclass Plain:\n    rate: float = 1.0\n    sizes: tuple[float, ...] = (1.0, 2.0)\n", spaces)
    for made in (spaces["Plain"](rate=[1.0, 2.0, 3.0]), TD3BCConfig(alpha=[1.0, 2.0, 3.0])):  # type: ignore[arg-type]
        with pytest.raises(OffrlError, match="has 3 values for 2 lanes; give one per lane"):
            check_lane_lists(made, "agent", 2)
        check_lane_lists(made, "agent", 3)


WIDE = """
from dataclasses import dataclass
from offrl.agents.td3_bc import TD3BC, TD3BCConfig

@dataclass
class WideConfig(TD3BCConfig):
    widths: tuple[int, ...] = (32, 16)
    floor: float | None = None

class Wide(TD3BC):
    Config = WideConfig
"""


def test_a_run_writes_down_which_settings_are_lists_with_one_number_per_lane(
    toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the dataclass says: `widths` of an own agent has as many entries as lanes, and is none of them."""
    (tmp_path / "wide_agent.py").write_text(WIDE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    agent = {"_target_": "wide_agent.Wide", "alpha": [1.0, 2.0], "floor": [0.0, 1.0]}
    folder = train(options(toy_file, 5, agent=agent, sampler={"_target_": "offrl.sampling.Uniform"})).folder
    lists = json.loads((folder / "manifest.json").read_text())["lane_lists"]
    assert lists == ["agent.alpha", "agent.floor"]


@pytest.mark.parametrize(
    "settings",
    [
        {"agent": {"alpha": [1.0, 2.0]}},
        {"agent": {"alpha": [1, 2]}},
        {"sampler": {"_target_": "offrl.sampling.TopPercent", "percent": [10.0, 50.0]}},
        {
            "sampler": {
                "_target_": "offrl.sampling.Mixture",
                "datasets": ["y"],
                "shares": [0.5],
                "samplers": ["uniform", {"_target_": "offrl.sampling.TopPercent", "percent": [10.0, 50.0]}],
            }
        },
        {"history": {"encoder": "gru", "tau": [0.1, 0.2]}},
        {"augment": {"_target_": "offrl.augment.policy_guided.PolicyGuidedDiffusion", "coefficient": [0.5, 1.0]}},
        {"online": {"steps": 5, "agent": {"alpha": [1.0, 2.0]}}},
        {"dataset": "cube-single-play-v0", "data": {"tasks": [1, 2]}},
    ],
)
def test_lanes_of_one_seed_differ_by_a_list_with_one_number_per_lane(settings: dict[str, Any]) -> None:
    agent = {"_target_": "offrl.agents.td3_bc.TD3BC", "hidden": [16, 8], **settings.pop("agent", {})}
    planned(**settings, agent=agent, lanes=2, seeds=[0, 0])
    with pytest.raises(OffrlError, match="lanes 0 and 2 have seed 0 and the same settings"):  # each list, repeated
        planned(**repeated(settings), agent=repeated(agent) | {"hidden": [16, 8, 4]}, lanes=3, seeds=[0, 0, 0])


def repeated(settings: Any) -> Any:
    """The same settings with a third lane that has the first one's numbers."""
    if isinstance(settings, dict):
        return {key: repeated(value) for key, value in settings.items()}
    if not isinstance(settings, list) or len(settings) < 2:
        return settings
    inner = [repeated(value) for value in settings]
    return [*inner, inner[0]] if all(isinstance(value, int | float) for value in inner) else inner


def test_sizes_of_layers_tell_no_lanes_apart() -> None:
    """Although there are as many as lanes."""
    for changes in ({"hidden": [16, 8]}, {"hidden": [16, 8], "alpha": [1.0, 1.0]}):
        with pytest.raises(OffrlError, match="lanes 0 and 1 have seed 0 and the same settings"):
            planned(agent={"_target_": "offrl.agents.td3_bc.TD3BC", **changes}, lanes=2, seeds=[0, 0])


def test_nothing_that_a_run_folder_names_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is offrl's, what was imported before, or what the user vouches for."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil_agent.py").write_text(
        "from pathlib import Path\nfrom offrl.agents.td3_bc import TD3BC as Evil\nPath('was_here').touch()\n"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for group in ("agent", "sampler", "augment"):
        config = {"dataset": "x", "agent": {"_target_": "offrl.agents.bc.BC"}, group: {"_target_": "evil_agent.Evil"}}
        write_json(tmp_path / "run" / "config.json", config)
        with pytest.raises(OffrlError, match=rf"{group}\._target_=evil_agent\.Evil comes from a file"):
            resume(tmp_path / "run")
    assert not Path("was_here").exists()
    assert td3_bc.TD3BC is not None


# ---- an augmentation that belongs to a method -------------------------------------------------------------------------


def words(*given: str) -> RunConfig:
    return resolve_config(compose_words(list(given)))


def test_a_method_brings_its_augmentation_with_its_settings() -> None:
    """Those of its yaml, then the dataset's row, then the command line; its label is left out of the method's name."""
    made = words("agent=mopo", "dataset=walker2d-medium-replay-v2", "augment.keep=2")
    assert made.method == "mopo"
    keys = ("share", "refresh_every", "keep", "length", "transitions", "penalty")
    assert [made.augment[key] for key in keys] == [0.95, 1000, 2, 1, 50000, 2.5]
    assert words("agent=mobile", "dataset=hopper-medium-v2").augment["penalty"] == 0  # its own is the agent's


def test_its_absence_is_named_and_another_takes_none_of_its_settings() -> None:
    assert words("agent=mopo", "augment=none").method == "mopo+noWM"
    other = words("agent=combo", "augment=diffusion", "dataset=walker2d-medium-v2")
    assert (other.method, other.augment["length"], other.augment["share"]) == ("combo+diffusion", 31, 0.5)
    assert words("agent=td3_bc", "augment=world_model").augment["share"] == 0.5


def test_a_row_with_an_unknown_key_of_the_augmentation_is_refused() -> None:
    agent = {"_target_": "offrl.agents.mopo.MOPO", "settings": {"*": {"augment.penalti": 1.0}}}
    model = {"_target_": "offrl.augment.world_model.WorldModel"}
    with pytest.raises(OffrlError, match=r"row \*: augment.penalti is no option; did you mean augment.penalty"):
        resolve_config({"agent": agent, "augment": model, "dataset": "x"})


@pytest.mark.parametrize(
    ("option", "value"), [("reward_scale", 0.1), ("reward_shift", -1.0), ("reward_normalize", True)]
)
@pytest.mark.parametrize("agent", ["dt", "esper", "rvs", "doc", "vae_bc"])
def test_methods_of_returns_refuse_transformed_rewards(agent: str, option: str, value: float) -> None:
    """Acting and `offrl probe` would compare their returns with the environment's own rewards; other agents don't mind."""
    choice = {"dataset": "hopper-medium-v2", f"data.{option}": value}
    with pytest.raises(
        OffrlError, match=rf"data\.{option}={value}: {agent} is conditioned on returns.*leave the option"
    ):
        resolve_config(compose({**choice, "agent": agent}))
    assert resolve_config(compose({**choice, "agent": "td3_bc"})).train.data


def test_no_methods_own_table_transforms_rewards_that_it_refuses() -> None:
    for agent in ("dt", "esper", "rvs", "doc", "vae_bc"):
        for dataset in ("hopper-medium-v2", "antmaze-umaze-v2", "pen-human-v1", "cube-single-play-v0", "forge/lake/x"):
            resolve_config(compose({"agent": agent, "dataset": dataset}))
