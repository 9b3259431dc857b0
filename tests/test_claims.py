"""The rules by which docs/claims.md is judged, and what the collector copies."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")
sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "tables"))
import collect
import comparisons
import doc_curves
import histories
import verdicts

from offrl.evaluation.probes import Probe
from offrl.results import RunWriter


def test_welch_interval_by_hand() -> None:
    """Two seeds a side with equal spread: two degrees of freedom, whose t quantile has a closed form."""
    found = comparisons.difference(np.array([10.0, 12.0]), np.array([4.0, 6.0]))
    p = 0.975
    t = (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    error = math.sqrt(2 / 2 + 2 / 2)  # variance 2 over 2 seeds, on each side
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((6.0, 6 - t * error, 6 + t * error))
    assert comparisons.difference(np.array([1.0]), np.array([1.0, 2.0])) is None


def test_paired_interval_by_hand() -> None:
    """Two pairs: one degree of freedom, whose t quantile is the tangent of a Cauchy distribution."""
    found = comparisons.paired(np.array([10.0, 20.0]), np.array([4.0, 10.0]))
    error = math.sqrt(8 / 2)  # differences 6 and 10: variance 8 over 2 pairs
    half = math.tan(math.pi * (0.975 - 0.5)) * error
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((8.0, 8 - half, 8 + half))
    assert comparisons.paired(np.array([1.0]), np.array([1.0])) is None


@pytest.mark.parametrize(
    ("mean", "low", "high", "verdict"),
    [
        (5.0, 1.0, 9.0, "shown"),
        (5.0, -1.0, 11.0, "undecided"),  # large, but the interval holds 0
        (2.0, 1.0, 4.0, "undecided"),  # above 0, but maybe below the margin
        (2.0, 1.5, 2.5, "not shown at this budget"),
        (-9.0, -12.0, -6.0, "not shown at this budget"),
    ],
)
def test_verdicts(mean: float, low: float, high: float, verdict: str) -> None:
    assert comparisons.Difference(mean, low, high).verdict(margin=3) == verdict


def test_equal_scores_need_a_narrow_interval() -> None:
    def judge(mean: float, half: float) -> str:
        wide, narrow = (comparisons.Difference(mean, mean - h, mean + h) for h in (half, 0.8 * half))
        return comparisons.equality(wide, narrow, 3)

    assert [judge(0, 1), judge(0, 5), judge(5, 2), judge(1, 0.5)] == ["equal", "undecided", "unequal", "equal"]


def test_learnt_asks_for_evaluations_in_a_row() -> None:
    means = dict(zip(range(10, 70, 10), (5.0, 30.0, 19.0, 21.0, 22.0, 23.0)))
    assert verdicts.learnt(means) == 40
    assert verdicts.learnt({k: v for k, v in means.items() if k < 60}) is None


def test_error_is_interpolated_on_the_log_scale() -> None:
    def kind(likelihood: float, error: float) -> dict[str, float]:
        return {"log_likelihood_policy": likelihood, "dynamics_error": error}

    kinds = {"real": kind(0, 0), "unguided": kind(-3, 0.01), "guided, 3": kind(-1, 1.0), "world model": kind(-2, 0.2)}
    assert verdicts.error_at(kinds) == pytest.approx((0.1, 0.2))
    assert verdicts.error_at(kinds | {"world model": kind(0, 0.2)}) is None
    assert verdicts.error_at(kinds | {"world model": kind(-0.96, 0.2)}) == pytest.approx((1.0, 0.2))


def test_counts_wait_for_what_can_still_change_them() -> None:
    assert comparisons.counted("", "", [True, True, None], 2).verdict == "shown"
    assert comparisons.counted("", "", [True, False, None], 2).verdict == comparisons.NOT_YET
    assert comparisons.counted("", "", [False, False, None], 2).verdict == "not shown at this budget"


def test_an_episode_without_a_score_leaves_its_seed_without_one(tmp_path: Path) -> None:
    """The mean of the others would flatter; and two lanes of a seed are no sample, whatever tells them apart."""
    normalized = {"a": ([0, 1], [[80.0, np.nan], [60.0, 60.0]]), "b": ([7, 7], [[10.0, 10.0], [90.0, 90.0]])}
    for name, (seeds, scores) in normalized.items():
        make_run(tmp_path / name / "run", step=10)
        for rows in (tmp_path / name / "run").glob("episodes.*"):
            rows.unlink()
        with RunWriter(tmp_path / name / "run", {"method": "bc", "dataset": "d", "updates": 10}, None) as writer:
            writer.episodes(10, seeds, scores, [[3, 3]] * 2, scores, [1, 2])
    first, second = comparisons.Rows(tmp_path / "a").scores("bc", "d")
    assert np.isnan(first)
    assert second == 60.0
    with pytest.raises(SystemExit, match="seeds 7 stand in"):
        comparisons.Rows(tmp_path / "b").scores("bc", "d")


def test_undecided_cells_leave_a_count_undecided() -> None:
    """As long as they could make it: three of four are needed, and what is undecided may be shown with more seeds."""
    doubt = comparisons.UNDECIDED
    line = comparisons.counted("", "", [True, True, doubt, doubt], 3)
    assert (line.found, line.verdict) == ("2 of 4, 2 undecided", doubt)
    assert comparisons.counted("", "", [True, doubt, doubt, None], 3).verdict == doubt
    assert comparisons.counted("", "", [True, doubt, None, None], 3).verdict == comparisons.NOT_YET
    assert comparisons.counted("", "", [True, doubt, False, False], 3).verdict == "not shown at this budget"
    assert comparisons.counted("", "", [True, True, True, doubt], 3).verdict == "shown"
    low, high = np.array([0.0, 1.0, 2.0]), np.array([9.0, 10.0, 11.0])
    assert comparisons.is_shown(high, low, 5, 3) is True
    assert comparisons.is_shown(low, high, 5, 3) is False
    assert comparisons.is_shown(high, low, 10, 3) == doubt  # 9 points with an interval of two and more on both sides
    assert comparisons.is_shown(high, low, 5, 4) is None


def make_run(folder: Path, seed: int = 0, **result: Any) -> None:
    step = result.get("step", 10)
    with RunWriter(folder, {"method": "bc", "dataset": "d", "updates": step}, None) as writer:
        writer.episodes(step, [seed], [[5.0]], [[3]], [[50.0]], [1])
    (folder / "config.json").write_text(json.dumps({"updates": 10, "out": "/somewhere/runs", "label": None}))
    (folder / "manifest.json").write_text(json.dumps({"method": "bc", "dataset_info": {"source": "/home/me/set-v0"}}))
    if result:
        (folder / "result.json").write_text(json.dumps(result))


def test_collector_takes_finished_runs_without_paths(tmp_path: Path) -> None:
    for name, result in (("done", {"step": 10}), ("extended", {"step": 5}), ("begun", {})):
        make_run(tmp_path / "runs" / "a" / name, **result)
    copied, unfinished = collect.collect(tmp_path / "runs", tmp_path / "kept")
    assert [str(path) for path in copied] == ["a/done"]
    assert {str(path) for path in unfinished} == {"a/begun", "a/extended"}
    kept = tmp_path / "kept" / "a" / "done"
    assert sorted(path.name for path in kept.iterdir()) == [
        "config.json",
        "episodes.jsonl",
        "manifest.json",
        "result.json",
    ]
    assert "/" not in (kept / "config.json").read_text() + (kept / "manifest.json").read_text()
    assert comparisons.Rows(tmp_path / "kept" / "a").scores("bc", "d").tolist() == [50.0]


def test_collector_adds_probes_to_those_of_another_folder_and_takes_the_largest(tmp_path: Path) -> None:
    for source, seed, episodes in (("one", 0, (20,)), ("two", 5, (20, 1000))):
        folder = tmp_path / source / "d" / f"run{seed}"
        make_run(folder, step=10)
        for count in episodes:
            (folder / f"probe-{count}-10.json").write_text(json.dumps({"episodes": count}))
        collect.collect(tmp_path / source, tmp_path / "kept")
    kept = json.loads((tmp_path / "kept" / "d" / "probes.json").read_text())
    assert kept == {"run0": {"episodes": 20}, "run5": {"episodes": 1000}}


def test_a_seed_that_stands_twice_and_runs_of_other_budgets_are_no_sample(tmp_path: Path) -> None:
    make_run(tmp_path / "first", 7, step=30)
    make_run(tmp_path / "second", 8, step=30)
    assert comparisons.Rows(tmp_path).scores("bc", "d", seeds=[7, 8]).tolist() == [50.0, 50.0]
    make_run(tmp_path / "again", 7, step=30)
    with pytest.raises(SystemExit, match=r"bc on d: seeds 7 stand in .*again and .*first; keep one"):
        comparisons.Rows(tmp_path).scores("bc", "d", seeds=[7, 8])
    make_run(tmp_path / "longer", 9, step=60)
    with pytest.raises(SystemExit, match=r"bc on d: last evaluations after different numbers of updates, 30 .*, 60 "):
        comparisons.Rows(tmp_path).scores("bc", "d", seeds=[8, 9])


def test_copies_that_are_to_go_on_are_not_finished_and_a_list_copies_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "td3_bc" / "set" / "seed0-4-0123abcd"
    make_run(folder, step=10)
    (folder / "config.json").write_text('{\n "method": "td3_bc",\n "updates": 10\n}')
    script = Path(collect.__file__).with_name("run_claims.sh")
    copy = tmp_path / "long" / folder.relative_to(tmp_path / "a")
    for listed in (True, False):
        environment = os.environ | ({"LIST": "1"} if listed else {"OFFRL": "true"})
        done = subprocess.run(
            ["bash", str(script), str(tmp_path), "long"], env=environment, check=True, capture_output=True, text=True
        )
        assert listed == ("updates=500000" in done.stdout and "lanes=5" in done.stdout)
        assert copy.exists() != listed
    assert {path.name for path in copy.iterdir()} == {path.name for path in folder.iterdir()} - {"result.json"}


@pytest.mark.parametrize(("at_50_000", "gate"), [(41.0, "no"), (41.5, "yes")])
def test_no_verdict_of_claim_a_without_a_sound_pipeline(
    at_50_000: float, gate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TD3+BC ends at 46, of which 90 % is 41.4; PRDC ends 10 above it."""
    scores = {"td3_bc": np.array([45.0, 46.0, 47.0, 46.0, 46.0]), "prdc": np.array([55.0, 56.0, 57.0, 56.0, 56.0])}
    monkeypatch.setattr(verdicts.Rows, "scores", lambda self, method, dataset: scores.get(method, np.array([])))
    monkeypatch.setattr(
        verdicts.Rows, "means", lambda self, method, dataset: {50_000: at_50_000, 150_000: 46.0, 200_000: 46.0}
    )
    lines = {line.name: line.verdict for line in verdicts.claim_a(tmp_path) if line.found}
    assert lines["A0"] == gate
    assert lines["A1"] == ("shown" if gate == "yes" else "none, since A0 fails (by itself: shown)")


def test_cells_are_told_apart_by_their_settings(tmp_path: Path) -> None:
    """Three runs of one method on one dataset, of which claim G takes each for another control."""
    for i, (alpha, refresh, penalty) in enumerate([(2.5, 5000, 0.0), (1.25, 5000, 0.0), (2.5, 5000, 0.5)]):
        for seed in (0, 1):
            folder = tmp_path / "g" / f"run{i}-{seed}"
            with RunWriter(
                folder, {"method": "td3_bc+WM", "dataset": verdicts.HALFCHEETAH, "updates": 10}, None
            ) as writer:
                writer.episodes(10, [seed], [[5.0]], [[3]], [[10.0 * i + seed]], [1])
            augment = {"refresh_every": refresh, "penalty": penalty}
            config = {"updates": 10, "agent": {"alpha": alpha}, "augment": augment, "label": None}
            (folder / "config.json").write_text(json.dumps(config))
            (folder / "manifest.json").write_text(json.dumps({"method": "td3_bc+WM"}))
            (folder / "result.json").write_text(json.dumps({"step": 10}))
    rows = comparisons.Rows(tmp_path / "g")
    scores = partial(rows.scores, "td3_bc+WM", verdicts.HALFCHEETAH)
    assert scores(settings=verdicts.AS_IT_IS).tolist() == [0.0, 1.0]
    assert scores(settings=verdicts.AS_IT_IS | {"agent.alpha": 1.25}).tolist() == [10.0, 11.0]
    lines = {line.what: line for line in verdicts.claim_g(tmp_path)}
    assert lines["model, penalty 0.5 - model"].found.startswith("20.0 [")
    assert lines["model - nothing"].verdict == comparisons.NOT_YET


def test_claim_j_refuses_two_settings_of_a_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    numbers = np.arange(3.0)

    def tuned(method: str) -> Any:
        cell = SimpleNamespace(base="iql+online", method=method)
        return SimpleNamespace(
            cell=cell, method=method, dataset=verdicts.ROBOTS[0], before=numbers, after=numbers, regret=numbers
        )

    found = [tuned("iql+online")]
    monkeypatch.setattr(verdicts, "summary", lambda *_: (SimpleNamespace(fine_tunings=found), None))
    monkeypatch.setattr(verdicts, "Rows", lambda _: SimpleNamespace(runs=[SimpleNamespace(folder=tmp_path)]))
    assert next(line.what for line in verdicts.claim_j(tmp_path)) == f"iql, {verdicts.ROBOTS[0]}"
    found.append(tuned("iql+online (beta 10)"))
    with pytest.raises(SystemExit, match=r"iql\+online and iql\+online \(beta 10\) on forge/hopper"):
        verdicts.claim_j(tmp_path)


@pytest.mark.parametrize(("finished", "what"), [(("mopo",), ""), (("mopo", "mobile"), ", MOBILE,")])
def test_the_better_of_two_is_not_told_before_both_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, finished: tuple[str, ...], what: str
) -> None:
    found = {"mopo": np.arange(5) + 30.0, "mobile": np.arange(5) + 50.0, "td3_bc+WM": np.arange(5) + 20.0}

    def scores(self: Any, method: str, dataset: str, settings: Any = None) -> Any:
        return found[method] if method in (*finished, "td3_bc+WM") else np.array([])

    monkeypatch.setattr(verdicts.Rows, "scores", scores)
    line = next(line for line in verdicts.claim_g(tmp_path) if line.name == "G5")
    assert line.what == f"the better of MOPO and MOBILE{what} - model"
    assert line.verdict == ("shown" if what else comparisons.NOT_YET)


def probed(method: str, task: str, first: int, predicted: float, achieved: float) -> dict[str, Any]:
    """What `doc_curves.py` keeps of a run of five lanes."""
    seeds = [achieved + 0.001 * i for i in range(5)]
    probe = asdict(Probe(f"/home/me/{first}", method, task, True, [predicted] * 5, seeds, None, None))
    return {f"{method}/forge_{task}/seed{first}-{first + 4}-0": {"likeliest": probe, "sampled": probe}}


def test_claim_d_is_judged_without_the_seeds_known_before(tmp_path: Path) -> None:
    """On each of six tasks with luck DoC keeps its promise and DT does not, but for the first five seeds, which don't count."""
    told: dict[str, Any] = {}
    for task in (
        "bandit_p0.1-v0",
        "bandit_p0.2-v0",
        "bandit_p0.3-v0",
        "bandit_p0.4-v0",
        "gambling_uniform-v0",
        "lake_p0.7-v0",
    ):
        scale = 20.0 if "gambling" in task else 1.0
        for first in (0, 5, 10, 15):
            kept, broken = (0.0, 0.9) if first == 0 else (0.9, 0.0)
            told |= probed("doc", task, first, 0.9 * scale, kept * scale) | probed(
                "dt", task, first, 0.9 * scale, broken * scale
            )
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "probes.json").write_text(json.dumps(told))
    lines = {line.name: line for line in verdicts.claim_d(tmp_path) if line.name}
    assert [lines[name].found for name in ("D1", "D2", "D3", "D4")] == ["6 of 6", "6 of 6", "5 of 5", "1 of 1"]
    assert lines["D3"].verdict == "shown"


def tuned(method: str, dataset: str, before: list[float], after: list[float], regret: float) -> SimpleNamespace:
    cell = SimpleNamespace(base=f"{method}+online")
    arrays = {"before": np.array(before), "after": np.array(after), "regret": np.array([regret] * len(before))}
    return SimpleNamespace(cell=cell, dataset=dataset, **arrays)


def test_claim_j_counts_robots_and_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody gains on average; one seed of IQL loses 11 points; Cal-QL's regret is the lower one on one robot of two."""
    made = []
    for i, robot in enumerate(verdicts.ROBOTS):
        for method in ("iql", "td3_bc", "rebrac", "cal_ql"):
            lost = 11 if method == "iql" and i == 0 else 0
            made.append(tuned(method, robot, [20.0, 20.0], [60.0, 20.0 - lost], 0.5))
        made.append(tuned("rlpd", robot, [0.0, 0.0], [30.0, 30.0], 0.6 - 0.2 * i))
    monkeypatch.setattr(verdicts, "Rows", lambda folder: SimpleNamespace(runs=[SimpleNamespace(folder=folder)]))
    monkeypatch.setattr(verdicts, "summary", lambda folders, out: (SimpleNamespace(fine_tunings=made), None))
    found = {line.name: (line.found, line.verdict) for line in verdicts.claim_j(tmp_path) if line.name}
    assert found == {
        "J1": ("8 of 8", "shown"),
        "J2": ("1 of 2", "not shown at this budget"),
        "J3": ("3 of 4", "not shown at this budget"),
    }


def test_runs_of_one_method_are_pooled() -> None:
    """Ten seeds in two runs of five: their lanes stand together, leakages too, and another dataset by itself."""
    runs = [
        *probed("dt", "bandit_p0.1-v0", 0, 1.0, 0.5).values(),
        *probed("dt", "bandit_p0.1-v0", 5, 1.0, 0.9).values(),
    ]
    other = next(iter(probed("dt", "bandit_p0.2-v0", 0, 1.0, 0.1).values()))
    for run in runs:
        run["sampled"]["outcome"] = {"label": [0.1] * 5}
    found = [{**run, "method": "dt", "dataset": "a", "exact": None} for run in runs]
    first, second = doc_curves.pooled([*found, {**other, "method": "dt", "dataset": "b", "exact": None}])
    assert first["sampled"]["achieved"] == runs[0]["sampled"]["achieved"] + runs[1]["sampled"]["achieved"]
    assert len(first["sampled"]["outcome"]["label"]) == len(first["likeliest"]["predicted"]) == 10
    assert second["sampled"]["achieved"] == other["sampled"]["achieved"]


def test_claim_i_keeps_the_two_weights_apart(tmp_path: Path) -> None:
    """The fixed weight answers I1 and I2, the smaller one I4, which only the grid has."""
    assert histories.planned("forge/hopper/medium-replay-v1") == ["k = 1", "GRU", "GRU, loss 0.5"]
    assert histories.planned("forge/grid/cue-n2000-v0") == list(histories.METHODS)
    (tmp_path / "i").mkdir()
    seeds = np.arange(5.0)
    for task in ("cue", "place"):
        for agent in ("iql", "discrete_cql"):
            levels = {
                "k = 1": 0.0,
                "GRU": 20.0,
                "GRU, loss 0.5": 0.0,
                "GRU, loss 0.001": 60.0 if task == "cue" else 20.0,
            }
            cell = {name: {"scores": (level + seeds).tolist(), "last": [9.0]} for name, level in levels.items()}
            cell["GRU, loss 0.5"]["last"] = [1.0]
            path = tmp_path / "i" / f"histories_{agent}_forge_grid_{task}-n2000-v0.json"
            path.write_text(json.dumps(cell))
    found = {line.name: (line.found, line.verdict) for line in verdicts.claim_i(tmp_path) if line.name}
    assert found["I1"] == ("0 of 5, 1 not run yet", "not shown at this budget")
    assert found["I2"] == ("0 of 4", "not shown at this budget")
    assert found["I3"] == ("4 of 5, 1 not run yet", "shown")
    assert found["I4"] == ("2 of 4", "shown")


def test_a_stopped_run_makes_no_row_of_histories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A signal ends a run early but leaves its last scores, which say nothing of 100,000 updates."""
    monkeypatch.setattr(
        histories.offrl, "fit", lambda **_: SimpleNamespace(status="interrupted", step=19_000, scores=[84.9])
    )
    monkeypatch.setattr(sys, "argv", ["histories.py", "--out", str(tmp_path), "--agents", "iql"])
    with pytest.raises(SystemExit, match="stopped at update 19000"):
        histories.main()
    assert not list(tmp_path.iterdir())
