"""Which runs a report counts as one method on one dataset: what tells them apart, and what doesn't."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from test_report import D4RL, STEPS, cell, make, make_run, markdown, methods

from offrl import results
from offrl.results import labels, stats
from offrl.results import report as reporting
from offrl.training.schema import DataConfig, TrainConfig
from offrl.utils.settings import TASK

CUBE = "cube-single-play-singletask-task2-v0"


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- settings ------------------------------------------------------------------------------------------------


def test_seeds_of_data_and_of_models_are_settings_and_the_lanes_seed_is_none():
    flat = labels._flatten(
        {"seed": 4, "data": {"seed": 3, "size": 5}, "augment": {"denoiser": {"seed": 1, "updates": 5}}}
    )
    assert flat == {"data.seed": 3, "data.size": 5, "augment.denoiser.seed": 1, "augment.denoiser.updates": 5}
    assert labels._flatten({"data": {"cache": True, "task": 1, "tasks": [1]}, "agent": {"cache": 2}}) == {
        "agent.cache": 2
    }


def test_runs_on_data_of_another_seed_are_not_pooled_and_none_is_taken_for_a_repeated_one(tmp_path):
    for seed in (0, 3):
        make_run(tmp_path / "runs" / f"{seed}", "bc", config={"data": {"seed": seed}, "seed": seed})
        make_run(
            tmp_path / "runs" / f"other{seed}", "bc", "walker2d-medium-v2", seeds=(seed,), config={"data": {"seed": 1}}
        )
    made = make(tmp_path)
    assert [c.method for c in made.cells if c.dataset == D4RL] == ["bc (data.seed=0)", "bc (data.seed=3)"]
    assert not any("same settings and seed" in note for note in made.notes)
    assert made.tunings == []  # the data are no setting that one would tune


def test_a_seed_that_all_runs_share_is_not_shown(tmp_path):
    for seed in (0, 3):
        make_run(tmp_path / "runs" / f"{seed}", "bc", seeds=(seed,), config={"data": {"seed": 7}})
    assert methods(make(tmp_path)) == ["bc"]


def test_ensembles_of_another_seed_are_two_methods(tmp_path):
    for seed in (0, 1):
        augment = {"_target_": "offrl.augment.PolicyGuidedDiffusion", "denoiser": {"seed": seed, "updates": 5}}
        make_run(tmp_path / "runs" / f"{seed}", config={"augment": augment})
    assert methods(make(tmp_path)) == ["td3_bc (augment.denoiser.seed=0)", "td3_bc (augment.denoiser.seed=1)"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"augment": {"_target_": "offrl.augment.world_model.WorldModel"}},
            ["_target_=WorldModel", "_target_=default"],
        ),
        ({"history": {"encoder": "gru", "length": 8}}, ["encoder=default", "encoder=gru"]),
        ({"data": {"family": "antmaze"}}, ["family=antmaze", "family=default"]),
        ({"data": {"reward_scale": 0.1}}, ["reward_scale=0.1", "reward_scale=default"]),
        ({"precision": "bfloat16"}, ["precision=bfloat16", "precision=default"]),
    ],
)
def test_under_one_label_a_choice_that_only_one_run_has_tells_them_apart(config, expected, tmp_path):
    """What the other lacks it had not; its absence is no default of the first one's choice."""
    for name, more in (("a", {}), ("b", config)):
        make_run(tmp_path / "runs" / name, config={"label": "ours", **more})
        edit_manifest(tmp_path / "runs" / name, non_default=[])
    assert methods(make(tmp_path)) == [f"ours ({difference})" for difference in expected]


def test_options_that_a_run_of_an_earlier_version_lacks_had_their_defaults(tmp_path):
    now = asdict(TrainConfig())
    for name, seeds, config in (
        ("old", (0,), {"data": {}}),
        ("new", (1,), {"data": now["data"], "precision": "float32"}),
    ):
        make_run(tmp_path / "runs" / name, seeds=seeds, config=config)
        edit_manifest(tmp_path / "runs" / name, non_default=[])
    assert methods(make(tmp_path)) == ["td3_bc"]
    assert all(labels.is_usual(f"data.{key}", value) for key, value in asdict(DataConfig()).items())
    assert all(labels.is_usual(key, now[key]) for key in labels._USUAL if "." not in key)


def test_lanes_differ_by_the_lists_that_the_manifest_names(tmp_path):
    """An own agent's sizes of layers may have any name, and its weights that of a size."""
    make_run(tmp_path / "runs" / "a", "ours", seeds=(0, 1), widths=[32, 16], sizes_weight=[0.5, 1.0])
    assert methods(make(tmp_path)) == ["ours (widths=16)", "ours (widths=32)"]  # of an earlier version: by the names
    edit_manifest(tmp_path / "runs" / "a", lane_lists=["agent.sizes_weight"])
    assert methods(make(tmp_path)) == ["ours (sizes_weight=0.5)", "ours (sizes_weight=1.0)"]
    edit_manifest(tmp_path / "runs" / "a", lane_lists=[])
    assert methods(make(tmp_path)) == ["ours"]


def test_a_whole_number_is_the_same_setting_with_a_point(tmp_path):
    for name, seeds, alpha in (("a", (0,), 1), ("b", (1,), 1.0), ("c", (2,), 2.5)):
        make_run(tmp_path / "runs" / name, seeds=seeds, alpha=alpha)
    assert methods(make(tmp_path)) == ["td3_bc (alpha=1.0)", "td3_bc (alpha=2.5)"]


def test_two_names_of_the_same_numbers_are_one_dataset(tmp_path):
    """A file and the same arrays from Python; the path tells datasets apart only where the numbers differ."""
    for name, seeds, path, fingerprint in (("a", (0,), "cart.npz", "f"), ("b", (1,), "given/0123456789ab/cart", "f")):
        make_run(tmp_path / "runs" / name, "bc", "cart", seeds=seeds, config={"dataset": path})
        edit_manifest(tmp_path / "runs" / name, fingerprint=fingerprint)
    assert methods(make(tmp_path)) == ["bc"]
    edit_manifest(tmp_path / "runs" / "b", fingerprint="g")
    assert methods(make(tmp_path)) == ["bc (dataset=cart.npz)", "bc (dataset=given/0123456789ab/cart)"]


def test_how_often_an_online_phase_is_evaluated_is_no_setting(tmp_path):
    online = {"steps": 4, "updates_per_step": 1, "random_steps": 0}
    for seed, every in ((0, 5), (1, 10)):
        make_run(tmp_path / "runs" / f"{seed}", seeds=(seed,), config={"online": {**online, "eval_every": every}})
    assert len(methods(make(tmp_path))) == 1


def test_classes_of_one_name_in_two_modules_are_two_methods(tmp_path):
    for module in ("first", "second"):
        make_run(tmp_path / "runs" / module, config={"label": "ours", "agent": {"_target_": f"{module}.Mine"}})
    assert methods(make(tmp_path)) == ["ours (_target_=first.Mine)", "ours (_target_=second.Mine)"]


def test_a_task_of_its_own_and_one_of_a_run_with_a_task_for_each_lane_are_one_dataset(tmp_path):
    for name, seeds, dataset in (
        ("a", (0,), CUBE),
        ("b", (1,), "cube-single-play-v0"),
        ("c", (2,), CUBE.replace("-task2", "")),
    ):
        make_run(tmp_path / "runs" / name, "fql", CUBE, seeds=seeds, config={"dataset": dataset}, family="ogbench")
        edit_manifest(tmp_path / "runs" / name, fingerprint=name)
    assert methods(make(tmp_path)) == ["fql"]


def test_a_run_that_says_no_family_is_of_its_datasets(tmp_path):
    for method in ("a", "b"):
        for dataset in (D4RL, "walker2d-medium-v2"):
            make_run(tmp_path / "runs" / dataset / method, method, dataset)
        edit_manifest(tmp_path / "runs" / D4RL / "a", dataset_info={})
    assert {c.family for c in make(tmp_path).cells} == {"gym-mujoco"}


def test_settings_without_a_score_are_none_that_one_would_tune_for_a_family(tmp_path):
    for alpha, level in ((1.0, 10.0), (2.0, 20.0), (3.0, math.nan)):
        for dataset in (D4RL, "walker2d-medium-v2"):
            make_run(tmp_path / "runs" / dataset / f"{alpha}", dataset=dataset, level=level, alpha=alpha)
    (family,) = [t for t in make(tmp_path).tunings if t.where == "gym-mujoco"]
    assert family.configurations == 2
    assert family.best[2][0] == pytest.approx(17.5, abs=2)  # three of four draws of two find 20


# ---- tasks and references ------------------------------------------------------------------------------------

SCORED = [
    ({"max_episode_steps": 50}, {"max_episode_steps": 100}),
    ({"ref_min": 0.0, "ref_max": 1.0}, {"ref_min": 0.0, "ref_max": 2.0}),
    ({"env": "Hopper-v4"}, {"env": "mine:Hopper-v1"}),
    ({"env_kwargs": {"push": 1}}, {"env_kwargs": {"push": 2}}),
]


@pytest.mark.parametrize(("first", "second"), SCORED)
def test_runs_that_were_scored_differently_are_not_pooled(first, second, tmp_path):
    for name, options in (("a", None), ("b", first), ("c", second)):
        make_run(tmp_path / "runs" / name, "bc", config={"eval": {**dict.fromkeys(TASK), **(options or {}), "seed": 1}})
    made = make(tmp_path)
    assert len(set(methods(made))) == 3
    assert [c.seeds for c in made.cells] == [[0, 1, 2]] * 3
    assert not any("same settings and seed" in note for note in made.notes)
    assert made.tunings == []  # a task is nothing that one would tune
    assert next(iter(first)) + "=" in markdown(made)


def test_tasks_are_shown_of_every_method_of_a_dataset_and_of_no_other(tmp_path):
    for name, method, dataset, limit in (
        *(("a", "bc", D4RL, 50), ("b", "td3_bc", D4RL, 1000)),
        *(("c", "bc", "walker2d-medium-v2", 300), ("d", "td3_bc", "walker2d-medium-v2", 300)),
    ):
        make_run(tmp_path / "runs" / name, method, dataset, config={"eval": {"max_episode_steps": limit}})
    made = {(c.dataset, c.method) for c in make(tmp_path).cells}
    long = {(D4RL, "bc (max_episode_steps=50)"), (D4RL, "td3_bc (max_episode_steps=1000)")}
    assert made == long | {("walker2d-medium-v2", "bc"), ("walker2d-medium-v2", "td3_bc")}


def test_an_option_that_says_what_the_dataset_says_makes_no_other_task(tmp_path):
    """And references that two machines round differently are the same ones."""
    for name, seeds, limit, low in (("a", (0,), None, -20.272305), ("b", (1,), 1000, -20.272305 - 1e-12)):
        config = {"eval": {**dict.fromkeys(TASK), "max_episode_steps": limit}}
        make_run(tmp_path / "runs" / name, "bc", seeds=seeds, config=config)
        edit_manifest(tmp_path / "runs" / name, dataset_info={"max_episode_steps": 1000, "ref_min": low})
    assert methods(make(tmp_path)) == ["bc"]


def test_scores_by_given_references_are_not_called_the_collections(tmp_path):
    make_run(tmp_path / "runs" / "a", "td3_bc")
    make_run(tmp_path / "runs" / "b", "td3_bc", config={"eval": {"ref_min": 0.0, "ref_max": 1.0}})
    found = {c.scale: bool(c.published) for c in make(tmp_path).cells}
    assert found == {"D4RL-normalised score": True, "normalised score": False}


def test_episodes_before_a_run_went_on_in_another_environment_are_left_out(tmp_path):
    folder = tmp_path / "runs" / "a"
    for env, steps, level in (("Hopper-v4", STEPS[:2], 90.0), ("Hopper-v5", STEPS[2:], 10.0)):
        run = {"method": "bc", "dataset": D4RL, "env_id": env}
        if level == 90.0:
            make_run(folder, "bc", steps=())
        with results.RunWriter(folder, run, resume_step=steps[0] - 1) as writer:
            for step in steps:
                scores = np.full((3, 2), level)
                writer.episodes(step, [0, 1, 2], scores, np.ones((3, 2)), scores, range(2))
    made = make(tmp_path)
    assert cell(made, "bc").average.tolist() == [10.0] * 3
    assert made.notes[0] == "Left out, evaluations in another environment than a run's last: a (Hopper-v4)."


# ---- scales --------------------------------------------------------------------------------------------------


def test_only_the_catalogues_ids_are_called_d4rls_and_minaris():
    assert labels.scale_of("mine-v0") == labels.scale_of("hopper-mine-v2") == labels.OWN
    assert labels.scale_of("mine/robot/expert-v0") == labels.scale_of("my-singletask-task1-v0") == labels.OWN
    assert labels.scale_of("hopper-random-expert-0.05-v2") == "D4RL-normalised score"
    assert labels.scale_of("robot-random-expert-0.05-v2") == labels.OWN
    assert labels.scale_of(CUBE) == labels.scale_of(f"forge/ogbench/{CUBE}") == labels.SUCCESS


def test_scores_by_references_of_ones_own_are_pooled_with_nothing(tmp_path):
    for dataset, family in ((D4RL, "gym-mujoco"), ("mine-v0", "robots"), ("yours-v0", "mazes")):
        for method in ("a", "b"):
            make_run(tmp_path / "runs" / dataset / method, method, dataset, family=family)
    made = make(tmp_path)
    assert made.aggregates == made.comparisons == []
    assert "mean of 2" not in markdown(made)


# ---- scores that are not finite ------------------------------------------------------------------------------


def test_an_iqm_is_unknown_where_a_score_is(tmp_path):
    """Sorted last, a NaN would be trimmed away as the best of eight."""
    tasks = [np.array([1.0, 2.0, 3.0, math.nan]), np.arange(4.0)]
    assert math.isnan(stats.iqm(tasks))
    assert np.isnan(stats.iqm([np.stack([x, np.ones(4)]) for x in tasks])).tolist() == [True, False]


@pytest.mark.filterwarnings("error")
def test_a_method_whose_scores_are_not_finite_is_no_best_one(tmp_path):
    for method, level in (("broken", math.nan), ("good", 60.0), ("bad", 20.0)):
        for dataset in (D4RL, "walker2d-medium-v2"):
            make_run(tmp_path / "runs" / dataset / method, method, dataset, seeds=range(10), level=level)
    made = reporting.report([tmp_path / "runs"], tmp_path / "out", show=False)
    assert [(c.better, c.other) for c in made.comparisons] == [("good", "bad")]
    assert not cell(made, "broken").bold
    (note,) = [note for note in made.notes if note.startswith("Not finite")]
    assert f"broken on {D4RL} (seeds 0, 1, 2," in note


def test_a_success_rate_that_is_not_finite_has_no_interval(tmp_path):
    make_run(tmp_path / "runs" / "a", "fql", CUBE, seeds=(0, 1), level=[math.nan, 50.0], family="ogbench")
    made = make(tmp_path)
    assert cell(made, "fql", CUBE).successes is None
    assert "## Success rates" not in markdown(made)
    assert "(seeds 0)" in made.notes[0]
