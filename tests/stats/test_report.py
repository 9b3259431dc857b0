"""The report is a function of rows: every number can be made again from them."""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import scipy.stats

from offrl import results
from offrl.cli.main import main
from offrl.cli.report import add_parser
from offrl.data.catalogue import d4rl, minari
from offrl.results import figures, tables
from offrl.results import report as reporting
from offrl.results.labels import scale_of
from offrl.results.published import lookup
from offrl.results.rows import folders
from offrl.utils.errors import OffrlError

D4RL = "hopper-medium-v2"
STEPS = (10, 20, 30, 40)


def make_run(
    folder: Path,
    agent="td3_bc",
    dataset=D4RL,
    seeds=(0, 1, 2),
    level=50.0,
    steps=STEPS,
    updates=40,
    episodes=4,
    normalized=True,
    family="gym-mujoco",
    sampler="Uniform",
    spread=2.0,
    config=None,
    **settings,
):
    """A run as the trainer leaves it, with random scores around `level` (one per lane or one for all)."""
    rng = np.random.default_rng(zlib.crc32(f"{folder.name} {agent} {dataset}".encode()))
    folder.mkdir(parents=True)
    composed = {
        "method": agent,
        "agent": {"_target_": f"offrl.agents.{agent}.Agent", **settings},
        "sampler": {"_target_": f"offrl.sampling.{sampler}"},
        **{"dataset": dataset, "seed": seeds[0], "lanes": len(seeds), "seeds": list(seeds), "updates": updates},
        **{"out": str(folder.parent), "label": None, "data": {"cache": True}},
        **(config or {}),
    }
    (folder / "config.json").write_text(json.dumps(composed))
    method = agent if sampler == "Uniform" else f"{agent}+{sampler}"
    (folder / "manifest.json").write_text(json.dumps({"method": method, "dataset_info": {"family": family}}))
    metadata = {"run_id": folder.name, "method": agent, "dataset": dataset, "updates": updates}
    with results.RunWriter(folder, metadata) as writer:
        for step in steps:
            scores = np.broadcast_to(np.asarray(level), len(seeds))[:, None] + rng.normal(
                0, spread, (len(seeds), episodes)
            )
            lengths = np.full(scores.shape, 1000)
            writer.episodes(
                step, seeds, scores * 30, lengths, scores if normalized else None, range(100, 100 + episodes)
            )


def make(tmp_path, **options):
    """All that a report computes, without its files."""
    return reporting.summary([tmp_path / "runs"], tmp_path / "out", **options)[0]


def write(tmp_path, **options):
    """A report with its files, in the folder `out`."""
    return reporting.report([tmp_path / "runs"], tmp_path / "out", show=False, **options)


def markdown(made):
    return tables.markdown(made, {})


def cell(made, method, dataset=D4RL):
    (found,) = [c for c in made.cells if (c.method, c.dataset) == (method, dataset)]
    return found


def methods(made):
    return [c.method for c in made.cells]


def test_rows_that_can_not_be_written_are_a_sentence(tmp_path, monkeypatch):
    def full(*_, **__):
        raise pl.exceptions.ComputeError("parquet: File too large (os error 27)")

    make_run(tmp_path / "runs" / "one")
    monkeypatch.setattr(pl.DataFrame, "write_parquet", full)
    with pytest.raises(OffrlError, match=r"episodes.parquet could not be written \(.*File too large.*free some space"):
        write(tmp_path)
    assert not list((tmp_path / "out").glob("*parquet*"))


# ---- cells ---------------------------------------------------------------------------------------------------


def test_every_cell_is_made_again_from_the_rows(tmp_path):
    for i, (agent, dataset) in enumerate([("bc", D4RL), ("td3_bc", D4RL), ("td3_bc", "walker2d-medium-v2")]):
        make_run(tmp_path / "runs" / f"{i}", agent, dataset, level=40 + 10 * i)
    make_run(tmp_path / "runs" / "more", "td3_bc", D4RL, seeds=(7, 8), level=55)
    write(tmp_path, last_k=3)
    rows = pl.read_parquet(tmp_path / "out" / "episodes.parquet")
    assert not any(str(tmp_path) in folder for folder in rows["folder"])
    with open(tmp_path / "out" / "report.csv") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 3
    for line in table:
        mine = rows.filter(pl.col("label") == line["method"], pl.col("dataset") == line["dataset"])
        evaluations = {  # plain restatement: seed -> scores of its evaluations in order
            seed: [
                np.mean([r["normalized"] for r in mine.to_dicts() if (r["seed"], r["step"]) == (seed, step)])
                for step in STEPS
            ]
            for seed in sorted(set(mine["seed"]))
        }
        last = np.array([scores[-1] for scores in evaluations.values()])
        average = np.array([np.mean(scores[-3:]) for scores in evaluations.values()])
        expected = {
            "mean": last.mean(),
            "std_ddof1": np.std(last, ddof=1),
            "mean_last_k": average.mean(),
            "std_last_k": np.std(average, ddof=1),
        }
        half = scipy.stats.t.ppf(0.975, len(last) - 1) * scipy.stats.sem(last)
        expected |= {"t95_low": last.mean() - half, "t95_high": last.mean() + half}
        for name, value in expected.items():
            assert float(line[name]) == pytest.approx(value, rel=1e-12), name
        assert line["seed_list"] == " ".join(map(str, evaluations))
        assert (line["k"], line["episodes_min"], line["updates_min"]) == ("3", "4", "40")
    assert [line["seeds"] for line in table] == ["3", "5", "3"]


def test_last_evaluation_counts_not_the_best(tmp_path):
    make_run(tmp_path / "runs" / "a", "bc", steps=(10,), level=90, updates=10)
    folder = tmp_path / "runs" / "a"
    with results.RunWriter(folder, {"method": "bc", "dataset": D4RL}, resume_step=10) as writer:
        writer.episodes(20, [0, 1, 2], np.full((3, 4), 30.0), np.ones((3, 4)), np.full((3, 4), 1.0), range(4))
    assert cell(make(tmp_path), "bc").mean == 1.0


def test_final_evaluation_with_more_episodes_weighs_as_one_of_the_last_k(tmp_path):
    folder = tmp_path / "runs" / "a"
    make_run(folder, "bc", seeds=(0,), steps=())
    with results.RunWriter(folder, {"method": "bc", "dataset": D4RL}, resume_step=0) as writer:
        writer.episodes(10, [0], [[0.0] * 2], [[1] * 2], [[0.0] * 2], range(2))
        writer.episodes(20, [0], [[0.0] * 8], [[1] * 8], [[10.0] * 8], range(8))
    found = cell(make(tmp_path), "bc")
    assert found.average.tolist() == [5.0]
    assert (found.k, found.episodes) == (2, (8, 8))


def test_scores_are_named_by_whose_references_they_have():
    assert {scale_of(name) for name in d4rl()} == {"D4RL-normalised score"}
    assert {scale_of(name) for name in minari()} == {"Minari-normalised score"}
    assert scale_of("forge/hopper/medium-v0") == "forge-normalised score"
    assert scale_of("mine.npz") == scale_of("cart") == "normalised score"


def test_raw_returns_where_there_are_no_references(tmp_path):
    make_run(tmp_path / "runs" / "a", dataset="mine.npz", normalized=False)
    make_run(tmp_path / "runs" / "b", dataset="forge/hopper/medium-v0")
    made = make(tmp_path)
    assert [(c.dataset, c.scale) for c in sorted(made.cells, key=lambda c: c.dataset)] == [
        ("forge/hopper/medium-v0", "forge-normalised score"),
        ("mine.npz", "return"),
    ]
    assert cell(made, "td3_bc", "mine.npz").mean == pytest.approx(1500, abs=100)
    figure = figures.draw_curves(made.cells)
    assert {panel.get_title(): panel.get_ylabel() for panel in figure.axes} == {
        "forge/hopper/medium-v0": "forge-normalised score",
        "mine.npz": "return",
    }


@pytest.mark.parametrize(("metric", "expected"), [("return", 1500), ("length", 1000)])
def test_other_metrics(tmp_path, metric, expected):
    make_run(tmp_path / "runs" / "a")
    found = cell(make(tmp_path, metric=metric), "td3_bc")
    assert found.mean == pytest.approx(expected, rel=0.1)
    assert found.scale == metric
    assert found.published == []  # those are normalised scores


# ---- which runs are one method -------------------------------------------------------------------------------


def test_methods_are_labelled_by_the_settings_that_differ(tmp_path):
    runs = tmp_path / "runs"
    make_run(runs / "a", seeds=(0, 1), alpha=2.5, tau=0.005, config={"device": "cpu", "seed": 0})
    make_run(runs / "b", seeds=(2, 3), alpha=2.5, tau=0.005, config={"device": "cuda", "log_every": 7})
    make_run(runs / "c", alpha=4.0, tau=0.005)
    make_run(runs / "d", tau=0.005)
    make_run(runs / "e", agent="bc", lr=0.1)
    made = make(tmp_path)
    assert methods(made) == ["bc", "td3_bc (alpha=2.5)", "td3_bc (alpha=4.0)", "td3_bc (alpha=default)"]
    assert cell(made, "td3_bc (alpha=2.5)").seeds == [0, 1, 2, 3]


def test_settings_per_dataset_are_one_method(tmp_path):
    make_run(tmp_path / "runs" / "a", "prdc", "hopper-medium-v2", alpha=2.5)
    make_run(tmp_path / "runs" / "b", "prdc", "halfcheetah-medium-v2", alpha=40.0)
    assert methods(make(tmp_path)) == ["prdc", "prdc"]


def test_lanes_of_one_run_may_be_variants(tmp_path):
    make_run(
        tmp_path / "runs" / "a",
        seeds=(0, 0, 1, 1),
        level=[10, 90, 10, 90],
        alpha=[1, 2.5, 1, 2.5],
        hidden=[8, 16, 8, 8],
    )
    made = make(tmp_path)
    assert methods(made) == ["td3_bc (alpha=1)", "td3_bc (alpha=2.5)"]
    assert cell(made, "td3_bc (alpha=1)").mean == pytest.approx(10, abs=3)
    assert cell(made, "td3_bc (alpha=2.5)").seeds == [0, 1]


def test_sampler_and_label_name_the_method(tmp_path):
    make_run(tmp_path / "runs" / "a", sampler="AdvantageWeighted")
    make_run(tmp_path / "runs" / "b", config={"label": "ours"})
    made = make(tmp_path)
    assert methods(made) == ["ours", "td3_bc+AdvantageWeighted"]
    assert cell(made, "td3_bc+AdvantageWeighted").published == []
    assert cell(made, "ours").published[0].method == "TD3+BC"


def test_a_run_that_went_on_under_another_label_counts_its_episodes_once(tmp_path):
    """Its later rows have another method's name."""
    make_run(tmp_path / "runs" / "a", "bc", steps=STEPS[:2])
    path = tmp_path / "runs" / "a" / "episodes.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    renamed = [row | {"method": "ours" if row["step"] == STEPS[1] else "bc"} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in renamed))
    made, scored = reporting.summary([tmp_path / "runs"], tmp_path / "out")
    assert len(scored) == len(rows)
    assert len(made.cells) == 1


def test_means_stand_beside_means_over_the_same_datasets(tmp_path):
    for method, sets in (("a", ("hopper", "walker2d")), ("b", ("walker2d", "halfcheetah"))):
        for robot in sets:
            make_run(tmp_path / "runs" / f"{method}-{robot}", method, f"{robot}-medium-v2")
    text = markdown(make(tmp_path))
    (row,) = [line for line in text.splitlines() if "mean of 2, gym-mujoco" in line]
    assert [bool(value.strip()) for value in row.strip("|").split("|")[1:]] == [True, False]


def test_repeated_seed_is_no_second_sample(tmp_path):
    make_run(tmp_path / "runs" / "a", "bc", seeds=(0, 1), level=10)
    make_run(tmp_path / "runs" / "b", "bc", seeds=(1, 2), level=90, steps=STEPS[:3])
    made = make(tmp_path)
    assert cell(made, "bc").seeds == [0, 1, 2]
    assert cell(made, "bc").last[1] == pytest.approx(10, abs=5)  # the one that got further
    assert any(re.search(r"same settings and seed.* b \(seeds 1\)", note) for note in made.notes)


def test_unfinished_runs_are_marked_and_empty_ones_noted(tmp_path):
    make_run(tmp_path / "runs" / "a", "bc", seeds=(0, 1), steps=STEPS[:2])
    make_run(tmp_path / "runs" / "nothing-yet", "td3_bc", steps=())
    made = make(tmp_path)
    assert cell(made, "bc").short == 2
    assert made.notes == ["Left out, no evaluation yet: nothing-yet."]
    text = markdown(made)
    assert "†" in text
    assert "20 of 40" in text
    make_run(tmp_path / "runs" / "b", "bc", seeds=(2,))
    assert cell(make(tmp_path), "bc").short == 2


# ---- what is said of them ------------------------------------------------------------------------------------


def test_one_name_for_different_numbers_is_said(tmp_path):
    """Files of one name may differ, or a set may have been built on two machines; a setting that says so is no surprise."""
    for name, agent, fingerprint, data in (
        ("a", "bc", "aaaaaaaa1", {"size": None}),
        ("b", "iql", "bbbbbbbb2", {"size": None}),
        ("c", "td3_bc", "cccccccc3", {"size": 1000}),
    ):
        folder = tmp_path / "runs" / name
        make_run(folder, agent, config={"data": data})
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": fingerprint}))
    (note,) = [note for note in make(tmp_path).notes if "same numbers" in note]
    assert note.startswith(D4RL)
    assert "bc (fingerprint aaaaaaaa); iql (fingerprint bbbbbbbb)" in note
    assert "td3_bc" not in note


def test_bold_are_those_whose_interval_reaches_the_best(tmp_path):
    """Intervals of five seeds: the level +- t(4) * std / sqrt(5), std = sqrt(5), so 2.776; the best one begins at 87.2."""
    around = np.array([-2, -2, 0, 2, 2]) * math.sqrt(5) / 2  # sample standard deviation sqrt(5)
    for name, level in (("a", 90), ("b", 85), ("c", 84)):
        make_run(tmp_path / "runs" / name, name, level=around + level, seeds=range(5), spread=1e-6)
    made = make(tmp_path)
    assert {c.method: c.bold for c in made.cells} == {"a": True, "b": True, "c": False}
    assert len(re.findall(r"\| \*\*\d", markdown(made))) == 2


def test_nothing_is_bold_below_five_seeds(tmp_path):
    """Neither a method of few seeds, whose interval reaches everywhere, nor anything beside a best mean of few seeds."""
    for dataset, best in (("hopper-medium-v2", 5), ("walker2d-medium-v2", 4)):
        for method, level, seeds in (("a", 90, best), ("b", 89, 4), ("c", 89, 5)):
            levels = level + np.linspace(-3, 3, seeds)  # intervals of at least +- 2.9 overlap
            make_run(
                tmp_path / "runs" / dataset / method, method, dataset, level=levels, seeds=range(seeds), spread=1e-6
            )
    bold = {(c.dataset, c.method) for c in make(tmp_path).cells if c.bold}
    assert bold == {("hopper-medium-v2", "a"), ("hopper-medium-v2", "c")}


def test_a_method_alone_is_not_bold(tmp_path):
    make_run(tmp_path / "runs" / "a", "bc")
    make_run(tmp_path / "runs" / "b", "td3_bc", "walker2d-medium-v2")
    assert not any(c.bold for c in make(tmp_path).cells)


def test_aggregate_is_the_trimmed_mean_of_all_seeds_per_family(tmp_path):
    sets = {"hopper-medium-v2": "gym-mujoco", "walker2d-medium-v2": "gym-mujoco", "antmaze-umaze-v2": "antmaze"}
    for i, (dataset, family) in enumerate(sets.items()):
        make_run(tmp_path / "runs" / dataset, "bc", dataset, seeds=range(5), level=30 * i, family=family)
    made = make(tmp_path)
    found = {a.family: a for a in made.aggregates}
    assert set(found) == {"gym-mujoco", "all D4RL"}  # antmaze alone is a cell, not an aggregate
    pooled = np.concatenate([cell(made, "bc", d).last for d in ("hopper-medium-v2", "walker2d-medium-v2")])
    assert found["gym-mujoco"].iqm == pytest.approx(scipy.stats.trim_mean(pooled, 0.25), rel=1e-12)
    assert found["gym-mujoco"].mean == pytest.approx(pooled.mean(), rel=1e-12)
    low, high = found["gym-mujoco"].interval
    assert low < found["gym-mujoco"].iqm < high


def test_scores_of_different_collections_are_never_pooled(tmp_path):
    make_run(tmp_path / "runs" / "a", "bc", D4RL)
    make_run(tmp_path / "runs" / "b", "bc", "forge/hopper/medium-v0", family="forge")
    assert make(tmp_path).aggregates == []


def test_comparison_claims_a_difference_only_with_seeds_enough(tmp_path):
    for count, verdict in ((10, "higher"), (5, "higher, but fewer than 10 seeds")):
        top = tmp_path / str(count)
        for agent, level in (("bc", 20), ("td3_bc", 60)):
            for dataset in ("hopper-medium-v2", "walker2d-medium-v2"):
                make_run(top / "runs" / agent / dataset, agent, dataset, seeds=range(count), level=level)
        make_run(top / "runs" / "only", "td3_bc", "halfcheetah-medium-v2", seeds=range(count), level=-1000)
        (found,) = make(top).comparisons
        assert (found.better, found.other, found.datasets, found.probability) == ("td3_bc", "bc", 2, 1.0)
        assert found.difference == pytest.approx(40, abs=3)
        assert found.verdict == verdict


@pytest.mark.parametrize("seeds", [10, 5])
def test_comparison_tells_of_unfinished_runs(tmp_path, seeds):
    for agent, level, updates in (("bc", 20, 80), ("td3_bc", 60, 40), ("iql", 40, 40)):
        for dataset in ("hopper-medium-v2", "walker2d-medium-v2"):
            folder = tmp_path / "runs" / agent / dataset
            make_run(folder, agent, dataset, seeds=range(seeds), level=level, updates=updates)
    few = "fewer than 10 seeds"
    expected = {10: ("higher, but unfinished runs (†)", "higher")}
    expected[5] = (f"higher, but unfinished runs (†) and {few}", f"higher, but {few}")
    assert {c.other: c.verdict for c in make(tmp_path).comparisons} == dict(zip(("bc", "iql"), expected[seeds]))


def test_no_difference_between_the_same_scores(tmp_path):
    for agent in ("aa", "bb"):
        for dataset in ("hopper-medium-v2", "walker2d-medium-v2"):
            make_run(tmp_path / "runs" / agent / dataset, agent, dataset, seeds=range(10))
    assert make(tmp_path).comparisons[0].verdict == "no difference detected"


def test_last_evaluations_at_other_intervals_are_told(tmp_path):
    make_run(tmp_path / "runs" / "a", seeds=(0, 1))
    make_run(tmp_path / "runs" / "b", seeds=(2,), steps=(5, 10, 15, 20, 25, 30, 35, 40))
    make_run(tmp_path / "runs" / "c", "bc", seeds=(0, 1))
    made = make(tmp_path, last_k=4)
    assert (cell(made, "td3_bc").spans, cell(made, "bc").spans) == ((15, 30), (30, 30))
    (note,) = [note for note in made.notes if "stretches" in note]
    assert f": td3_bc on {D4RL} (15 to 30 updates). " in note
    assert not [note for note in make(tmp_path, last_k=1).notes if "stretches" in note]  # of one evaluation each


def test_jump_at_the_end_is_flagged(tmp_path):
    folder = tmp_path / "runs" / "a"
    make_run(folder, "bc", steps=range(10, 200, 10), updates=200)
    with results.RunWriter(folder, {"method": "bc", "dataset": D4RL}, resume_step=190) as writer:
        writer.episodes(200, [0, 1, 2], np.full((3, 4), 1.0), np.ones((3, 4)), np.full((3, 4), 1.0), range(4))
    assert cell(make(tmp_path, last_k=5), "bc").unstable
    assert not cell(make(tmp_path, last_k=20), "bc").unstable  # that average reaches back to the start
    assert "‡" in markdown(make(tmp_path, last_k=5))


def test_the_report_says_what_was_run(tmp_path):
    make_run(tmp_path / "runs" / "a", "bc", steps=(10, 20_000), updates=20_000)
    make_run(tmp_path / "runs" / "b", "td3_bc", steps=(10, 20_000), updates=20_000)
    made = make(tmp_path)
    said = tables.introduction(made)
    assert said.startswith(f"bc and td3_bc on {D4RL}: 3 seeds each, scored after 20k updates by episodes")
    assert "random policy" in said
    assert said in markdown(made)


@pytest.mark.parametrize(("count", "words"), [(3, "lowest to highest seed"), (5, "95 % interval of the mean")])
def test_nothing_of_a_curve_is_cut_off_and_its_band_is_explained(tmp_path, count, words):
    """Three seeds far apart, whose interval would be six times their range; the limits hold all that is drawn."""
    for method, level in (("a", np.linspace(0, 90, count)), ("b", np.linspace(20, 30, count))):
        make_run(tmp_path / "runs" / method, method, seeds=range(count), level=level)
    figure = figures.draw_curves(make(tmp_path).cells)
    (panel,) = figure.axes
    low, high = panel.get_ylim()
    shaded = np.concatenate([path.vertices[:, 1] for band in panel.collections for path in band.get_paths()])
    assert low < shaded.min()
    assert shaded.max() < high
    assert shaded.max() == pytest.approx(90, abs=5) or count == 5
    assert words in figure.get_supxlabel()


# ---- how provisional an order is ---------------------------------------------------------------------------------


def comparison(folder, critic, steps=(10, 60_000), count=5, methods=("a", "b"), manifest=True):
    """Notes of a report on methods of `count` seeds after the last of `steps` updates."""
    for method in methods:
        run = folder / "runs" / method
        make_run(run, method, seeds=range(count), steps=steps, updates=steps[-1])
        stated = json.loads((run / "manifest.json").read_text()) | ({"critic": critic} if manifest else {})
        (run / "manifest.json").write_text(json.dumps(stated))
        if critic and not manifest:
            with results.RunWriter(run, {"method": method, "dataset": D4RL}, resume_step=steps[-1]) as writer:
                writer.metrics(steps[-1], range(count), {"critic_loss": [1.0] * count})
    return make(folder).notes


@pytest.mark.parametrize("manifest", [True, False])
def test_orders_after_few_updates_of_a_critic_are_called_provisional(tmp_path, manifest):
    """Fewer than 50,000 updates: whether an agent has a critic its manifest says, or its metrics where that is older."""
    (note,) = comparison(tmp_path / "early", True, (10, 49_999), manifest=manifest)
    assert note.startswith(
        "Orders of methods are provisional: of 2 compared cells 2 have fewer than 50,000 updates of a critic ("
    )
    assert "43 % at 10,000, 20 % at 50,000, 9 % at 200,000 updates" in note
    assert comparison(tmp_path / "late", True, (10, 50_000), manifest=manifest) == []
    assert comparison(tmp_path / "cloning", False, (10, 20), manifest=manifest) == []


def test_orders_of_few_seeds_are_called_provisional(tmp_path):
    (note,) = comparison(tmp_path / "few", False, count=4)
    assert note.startswith("Orders of methods are provisional: of 2 compared cells 2 have fewer than 5 seeds.")
    assert comparison(tmp_path / "enough", False, count=5) == []
    assert comparison(tmp_path / "alone", True, (10,), count=1, methods=("a",)) == []  # there is no order


# ---- published numbers ---------------------------------------------------------------------------------------


def test_published_number_stands_beside_ours_with_its_source(tmp_path):
    make_run(tmp_path / "runs" / "a", "td3_bc", "halfcheetah-medium-v2", level=10)
    made = make(tmp_path)
    found = cell(made, "td3_bc", "halfcheetah-medium-v2")
    assert (found.published[0].mean, found.published[0].std, found.published[0].seeds) == (48.1, 0.18, 4)
    assert found.mean == pytest.approx(10, abs=3)  # untouched by it
    text = markdown(made)
    assert "48.1 ± 0.2 [1]" in text
    assert re.search(r"1\. corl-team/CORL:README\.md \(Offline/Last Scores\) .*final checkpoint", text)


@pytest.mark.parametrize("task", [{"env": "Swimmer-v5"}, {"max_episode_steps": 50}], ids=str)
def test_published_numbers_stand_beside_none_of_another_task(task, tmp_path):
    make_run(tmp_path / "runs" / "a", "td3_bc")
    assert cell(make(tmp_path), "td3_bc").published
    make_run(tmp_path / "other" / "runs" / "a", "td3_bc", config={"eval": task})
    assert not make(tmp_path / "other").cells[0].published


def test_a_sweeps_notes_are_no_run(tmp_path):
    make_run(tmp_path / "runs" / "a", "td3_bc")
    (tmp_path / "runs" / ".sweep").mkdir()
    (tmp_path / "runs" / ".sweep" / "failed.json").write_text("{}")
    assert [run.name for run in folders([tmp_path / "runs"])] == ["a"]


def test_published_numbers_are_those_of_a_last_checkpoint():
    assert lookup("bc", D4RL)[0].mean == 53.51  # CORL's last; its best is 69.04
    numbers = [n for method in ("bc", "td3_bc", "iql", "cql") for n in lookup(method, D4RL)]
    assert numbers
    assert not any(re.search("best|maximum|EOP|online", number.protocol) for number in numbers)
    assert lookup("td3_bc", "forge/hopper/medium-v0") == []
    assert lookup("dql", "hopper-medium-v2") == []  # the paper has the best of each run
    assert [n.mean for n in lookup("fql", "antmaze-large-play-v2")] == [84]
    assert lookup("PRDC", D4RL) == lookup("prdc", D4RL) != []
    assert all(math.isfinite(number.mean) and number.source for number in numbers)


# ---- files and figures ---------------------------------------------------------------------------------------


def test_long_names_and_equal_scores_fit_a_panel(tmp_path):
    """Titles of neighbours don't meet, and a constant is drawn on a scale of points."""
    name = "forge/ogbench/pointmaze-medium-navigate-singletask-task1-v0"
    make_run(tmp_path / "runs" / "a", "bc", dataset=name, level=0.0, spread=0.0, family="ogbench")
    (panel,) = figures.draw_curves(make(tmp_path).cells).axes
    assert max(map(len, panel.get_title().split("\n"))) <= 36
    assert panel.get_title().replace("\n", "") == name
    assert panel.get_ylim() == (-1, 1)


def test_curve_is_the_mean_with_its_t_interval(tmp_path):
    make_run(tmp_path / "runs" / "a", "bc", "forge/x/y-v0", seeds=range(5))
    made = make(tmp_path)
    rows = results.read([tmp_path / "runs"]).to_dicts()
    scores = np.array(
        [
            [np.mean([r["normalized"] for r in rows if (r["seed"], r["step"]) == (seed, step)]) for step in STEPS]
            for seed in range(5)
        ]
    )
    (panel,) = figures.draw_curves(made.cells).axes
    (line,) = panel.lines
    np.testing.assert_allclose(line.get_xydata(), np.stack([STEPS, scores.mean(0)], 1), rtol=1e-12)
    half = scipy.stats.t.ppf(0.975, 4) * scipy.stats.sem(scores)
    vertices = panel.collections[0].get_paths()[0].vertices
    for step, mean, width in zip(STEPS, scores.mean(0), half):
        band = vertices[vertices[:, 0] == step][:, 1]
        np.testing.assert_allclose([band.min(), band.max()], [mean - width, mean + width], rtol=1e-9)


def test_curve_stops_where_most_seeds_stop(tmp_path):
    make_run(tmp_path / "runs" / "a", "bc", seeds=(0, 1, 2), steps=STEPS[:2])
    make_run(tmp_path / "runs" / "b", "bc", seeds=(3,), level=500)
    assert cell(make(tmp_path), "bc").curve.steps.tolist() == [10, 20]


def test_all_files_are_written_and_pictures_are_pictures(tmp_path):
    for i in range(9):  # more methods than colours
        for dataset in range(5 if i < 2 else 1):  # more datasets than columns
            make_run(
                tmp_path / "runs" / f"{i}.{dataset}", f"m{i}", f"set{dataset}-v0", seeds=(0,) if i == 3 else (0, 1, 2)
            )
    made = write(tmp_path)
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(reporting.FILES) - {"online.png"}
    drawn = {
        name: title for name, title in reporting.FIGURES.items() if name != "online"
    }  # nothing was fine-tuned here
    for name in drawn:
        data = (tmp_path / "out" / f"{name}.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(data[16:20]) > 800
    assert (tmp_path / "out" / "report.md").read_text() == tables.markdown(made, drawn)
    assert (tmp_path / "out" / "report.tex").read_text() == tables.latex(made)


def test_one_dataset_has_no_performance_profile(tmp_path):
    """It would be the distribution of a few seeds; the figure of an earlier report in the folder goes."""
    for method in ("a", "b"):
        make_run(tmp_path / "runs" / method, method)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "profiles.png").write_text("old")
    write(tmp_path)
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(reporting.FILES) - {"profiles.png", "online.png"}
    assert "rofile" not in (tmp_path / "out" / "report.md").read_text()
    assert "rofile" not in (tmp_path / "out" / "report.html").read_text()


def test_report_inside_the_sweep_does_not_count_itself(tmp_path):
    make_run(tmp_path / "runs" / "a", "bc")
    first = reporting.report([tmp_path / "runs"], tmp_path / "runs" / "report", show=False)
    again = reporting.report([tmp_path / "runs"], tmp_path / "runs" / "report", show=False)
    assert again.cells[0].last.tolist() == first.cells[0].last.tolist()
    assert again.cells[0].seeds == [0, 1, 2]


# ---- command and errors --------------------------------------------------------------------------------------


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["report", *words])
    return arguments.run(arguments)


def test_command_prints_a_table_and_writes_beside_the_runs(tmp_path, capsys):
    make_run(tmp_path / "runs" / "a", "bc", "forge/hopper/medium-replay-v0")
    assert command(str(tmp_path / "runs"), "--last-k", "2") == 0
    printed = capsys.readouterr().out
    assert "forge/hopper/medium-replay-v0" in printed
    assert re.search(r"bc +5\d\.\d ± \d\.\d +\d", printed)
    assert "last 2" in printed
    assert (tmp_path / "runs" / "report" / "report.md").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config", "{"),
        ("config", "[]"),
        ("config", '{"updates": -1}'),
        ("manifest", '{"dataset_info": 3}'),
        ("manifest", "{"),
    ]
    + [("manifest", '{"non_default": "lr"}'), ("episodes", "nonsense\n")],
)
def test_a_damaged_run_is_left_out_and_said(name, text, tmp_path, capsys):
    """The report is that of the other runs alone."""
    make_run(tmp_path / "runs" / "a", "bc")
    alone, _ = reporting.summary([tmp_path / "runs"], tmp_path / "out")
    make_run(tmp_path / "runs" / "b", "bc", seeds=(7, 8))
    path = next((tmp_path / "runs" / "b").glob(f"{name}.json*"))
    path.write_text(text)
    made, _ = reporting.summary([tmp_path / "runs"], tmp_path / "out")
    assert [(c.seeds, c.mean, c.std) for c in made.cells] == [(c.seeds, c.mean, c.std) for c in alone.cells]
    assert len(made.damage) == 1
    assert path.name in made.damage[0]
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("offrl: error: left out of the report: ")
    assert shown.err.count("\n") == 1
    assert "bc" in shown.out


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(OffrlError, match="no run with an evaluation in"):
        reporting.report([tmp_path], tmp_path / "out")
    with pytest.raises(OffrlError, match="is no folder"):
        reporting.report([tmp_path / "absent"], tmp_path / "out")
    with pytest.raises(OffrlError, match="metric=score2"):
        reporting.report([tmp_path], tmp_path / "out", metric="score2")
    with pytest.raises(OffrlError, match="last_k=0"):
        reporting.report([tmp_path], tmp_path / "out", last_k=0)
    make_run(tmp_path / "runs" / "a", "bc")
    (tmp_path / "file").write_text("")
    with pytest.raises(OffrlError, match=r"file.* could not be written"):
        reporting.report([tmp_path / "runs"], tmp_path / "file" / "out", show=False)
