"""The rules by which docs/claims.md is judged, and what the collector copies."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")
sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "tables"))
import collect
import verdicts

from offrl.results import RunWriter


def test_welch_interval_by_hand() -> None:
    """Two seeds a side with equal spread: two degrees of freedom, whose t quantile has a closed form."""
    found = verdicts.difference(np.array([10.0, 12.0]), np.array([4.0, 6.0]))
    p = 0.975
    t = (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    error = math.sqrt(2 / 2 + 2 / 2)  # variance 2 over 2 seeds, on each side
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((6.0, 6 - t * error, 6 + t * error))
    assert verdicts.difference(np.array([1.0]), np.array([1.0, 2.0])) is None


def test_paired_interval_by_hand() -> None:
    """Two pairs: one degree of freedom, whose t quantile is the tangent of a Cauchy distribution."""
    found = verdicts.paired(np.array([10.0, 20.0]), np.array([4.0, 10.0]))
    error = math.sqrt(8 / 2)  # differences 6 and 10: variance 8 over 2 pairs
    half = math.tan(math.pi * (0.975 - 0.5)) * error
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((8.0, 8 - half, 8 + half))
    assert verdicts.paired(np.array([1.0]), np.array([1.0])) is None


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
    assert verdicts.Difference(mean, low, high).verdict(margin=3) == verdict


def test_equal_scores_need_a_narrow_interval() -> None:
    def judge(mean: float, half: float) -> str:
        wide, narrow = (verdicts.Difference(mean, mean - h, mean + h) for h in (half, 0.8 * half))
        return verdicts.equality(wide, narrow, 3)

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
    assert verdicts.counted("", "", [True, True, None], 2).verdict == "shown"
    assert verdicts.counted("", "", [True, False, None], 2).verdict == verdicts.NOT_YET
    assert verdicts.counted("", "", [False, False, None], 2).verdict == "not shown at this budget"


def make_run(folder: Path, **result: Any) -> None:
    with RunWriter(folder, {"method": "bc", "dataset": "d", "updates": 10}, None) as writer:
        writer.episodes(10, [0], [[5.0]], [[3]], [[50.0]], [1])
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
    assert verdicts.Rows(tmp_path / "kept" / "a").scores("bc", "d").tolist() == [50.0]


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
