"""The table of fine-tuned runs: regret in closed form, scores at both ends, every seed, and whose numbers stand beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offrl.cli import main as cli
from offrl.results import OnlineRows, RunWriter
from offrl.results.finetuning import OnlineRow, regret_of
from offrl.results.published import lookup, lookup_online
from offrl.results.report import report, summary
from offrl.results.rows import ConfigRecord

ONLINE = {"steps": 1000, "updates_per_step": 2, "random_steps": 100}


class Ended:
    """An episode of a lane."""

    def __init__(self, lane: int, number: int, ret: float, success: bool | None) -> None:
        self.lane, self.number, self.ret, self.success, self.seed, self.length = lane, number, ret, success, 7, 10


def make_run(
    folder: Path,
    method: str,
    before: list[float],
    after: list[float],
    success: list[bool] | None = None,
    **changes: Any,
) -> None:
    """A run of 500 offline updates and 1,000 environment steps; every lane's episodes return 25 and then 75.

    Args:
        changes: options of the configuration.
    """
    seeds, config = list(range(len(before))), {"updates": 500, "online": ONLINE, "agent": {"_target_": "x"}, **changes}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "manifest.json").write_text(json.dumps({"method": method, "dataset_info": {"family": "antmaze"}}))
    run = {"method": method, "dataset": "antmaze-large-play-v2", "updates": 2300}
    with RunWriter(folder, run) as writer:
        for step, scores in ((250, before), (500, before), (1400, before), (2300, after)):
            values = np.array(scores)[:, None] + [[-1.0, 1.0]]
            writer.episodes(step, seeds, values, np.ones_like(values), values, [0, 1])
    with OnlineRows(folder, seeds, lambda ret: ret, 0) as rows:
        told = success or [None, None]
        rows.add((10, Ended(lane, 0, 25.0, told[0])) for lane in seeds)
        rows.add((20, Ended(lane, 1, 75.0, told[1])) for lane in seeds)


def rows_of(returns: list[float], success: list[bool] | None = None) -> list[OnlineRow]:
    told: list[Any] = list(success or [None] * len(returns))
    return [
        OnlineRow(lane=0, step=i, return_raw=r, normalized=r, success=s) for i, (r, s) in enumerate(zip(returns, told))
    ]


def test_regret_is_one_minus_the_mean_over_episodes() -> None:
    assert regret_of(rows_of([0.0] * 3, [True] * 3), 0) == (0.0, True)
    assert regret_of(rows_of([9.0] * 3, [False] * 3), 0) == (1.0, True)
    assert regret_of(rows_of([-50.0, 50.0, 200.0, 100.0]), 0) == (1 - (0 + 50 + 100 + 100) / 400, False)  # clipped
    assert np.isnan(regret_of([], 0)[0])
    assert np.isnan(regret_of(rows_of([1.0]), 1)[0])


def test_the_table_has_both_ends_every_seed_and_the_published(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/a", "rebrac+online", [70.0, 68.0, 69.0], [88.0, 17.0, 0.0])
    make_run(tmp_path / "runs/b", "iql+online", [40.0, 40.0], [60.0, 60.0], success=[False, True])
    made = report([tmp_path / "runs"], tmp_path / "report", show=False)
    iql, rebrac = made.fine_tunings
    assert rebrac.before.tolist() == [70.0, 68.0, 69.0]
    assert rebrac.after.tolist() == [88.0, 17.0, 0.0]
    assert rebrac.regret.tolist() == [0.5] * 3
    assert not rebrac.by_success
    assert iql.regret.tolist() == [0.5, 0.5]
    assert iql.by_success
    # Updates 500, 1400 and 2300 are environment steps 0, 550 and 1000: two updates a step after 100 random ones.
    assert rebrac.cell.curve.steps.tolist() == [0, 550, 1000]
    assert rebrac.steps == 1000
    text = (tmp_path / "report/report.md").read_text()
    published = lookup_online("rebrac", "antmaze-large-play-v2")
    assert published is not None
    assert published.regret is not None
    shown = f"{published.before.mean:.1f} → {published.after.mean:.1f} ({published.regret.mean:.2f})"
    assert f"69.0 ± 1.0 → 35.0 ± 46.7 | 70→88, 68→17, 69→0 | 0.50 ± 0.00 (score) | 1,000 | {shown} |" in text
    assert "below half of the score before: rebrac+online on antmaze-large-play-v2 (seeds 1, 2)" in text
    assert (tmp_path / "report/online.png").exists()
    assert not any(cell.published for cell in made.cells)  # an offline number is another protocol


def test_a_label_tells_a_fine_tuned_run_from_its_offline_half(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/a", "mine", [70.0, 68.0], [70.0, 68.0], label="mine", online=None)
    make_run(tmp_path / "runs/b", "mine", [70.0, 68.0], [90.0, 92.0], label="mine")
    made = report([tmp_path / "runs"], tmp_path / "report", show=False)
    assert sorted(cell.method for cell in made.cells) == ["mine", "mine+online"]
    (tuned,) = made.fine_tunings
    assert (tuned.method, tuned.after.tolist()) == ("mine+online", [90.0, 92.0])
    assert "same settings and seed" not in (tmp_path / "report/report.md").read_text()


@pytest.mark.parametrize("text", ["x\n", '{"lane": "0", "step": 1, "return_raw": 1.0}\n', None])
def test_a_run_whose_online_rows_are_damaged_is_left_out_and_said(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report is that of the other runs; None: a folder stands in the file's place."""
    make_run(tmp_path / "runs/a", "iql+online", [40.0, 40.0], [60.0, 60.0])
    make_run(tmp_path / "runs/b", "rebrac+online", [70.0, 68.0], [88.0, 17.0])
    make_run(tmp_path / "runs/c", "bc", [50.0], [50.0], online=None)  # whose file nobody reads
    (tmp_path / "runs/c/online.jsonl").write_text("x\n")
    path = tmp_path / "runs/b/online.jsonl"
    path.unlink()
    if text is None:
        path.mkdir()
    else:
        path.write_text(text)
    made = report([tmp_path / "runs"], tmp_path / "report", show=False)
    assert [cell.method for cell in made.cells] == ["bc", "iql+online"]
    assert [(tuned.method, tuned.regret.tolist()) for tuned in made.fine_tunings] == [("iql+online", [0.5, 0.5])]
    (sentence,) = made.damage
    assert str(path) in sentence
    assert f"Left out, damaged: {sentence}" in (tmp_path / "report/report.md").read_text()
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"offrl: error: left out of the report: {path}")
    assert (tmp_path / "out/report.md").exists()
    assert cli.main(["report", str(tmp_path / "runs/b"), "--out", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("online", "label"),
    [
        ({"agent": {"discount": 0.9}}, "discount=0.9"),
        ({"anneal": {"actor_bc": 0.0}}, "actor_bc=0.0"),
    ],
)
def test_runs_whose_online_half_had_other_settings_are_not_pooled(
    online: dict[str, Any], label: str, tmp_path: Path
) -> None:
    """A run has of `online.agent` and `online.anneal` what was changed, so a key that it lacks was not."""
    make_run(tmp_path / "runs/a", "rebrac+online", [70.0, 68.0], [88.0, 90.0])
    make_run(tmp_path / "runs/b", "rebrac+online", [70.0, 68.0], [10.0, 12.0], online={**ONLINE, **online})
    for run in ("a", "b"):
        (tmp_path / "runs" / run / "manifest.json").write_text(
            json.dumps({"method": "rebrac+online", "non_default": []})
        )
    made = report([tmp_path / "runs"], tmp_path / "report", show=False)
    name = label.partition("=")[0]
    assert sorted((c.method, c.mean) for c in made.cells) == [
        (f"rebrac+online ({label})", 11.0),
        (f"rebrac+online ({name}=default)", 89.0),
    ]
    assert not any("same settings and seed" in note for note in made.notes)


def test_a_number_for_each_lane_of_the_online_half_makes_variants(tmp_path: Path) -> None:
    make_run(
        tmp_path / "runs/a", "rebrac+online", [9.0] * 3, [10.0, 50.0, 90.0],
        online={**ONLINE, "agent": {"discount": [0.9, 0.95, 0.99]}},
    )  # fmt: skip
    made = report([tmp_path / "runs"], tmp_path / "report", show=False)
    assert [(c.method, c.mean) for c in made.cells] == [
        (f"rebrac+online (discount={value})", score) for value, score in ((0.9, 10), (0.95, 50), (0.99, 90))
    ]


def test_seeds_collapse_from_scores_above_zero_alone(tmp_path: Path) -> None:
    """Half of -3 is above it."""
    make_run(tmp_path / "runs/a", "cal_ql+online", [-3.0, -3.0, 40.0], [-3.0, -2.0, 19.0])
    made = report([tmp_path / "runs"], tmp_path / "report", show=False)
    (note,) = [note for note in made.notes if note.startswith("Collapsed")]
    assert "(seeds 2)" in note


@pytest.mark.parametrize("task", [{"ref_min": 0.0, "ref_max": 7.0}, {"max_episode_steps": 50}], ids=str)
def test_published_scores_stand_beside_none_of_another_task(task: dict[str, Any], tmp_path: Path) -> None:
    make_run(tmp_path / "runs/a", "iql+online", [40.0, 40.0], [60.0, 60.0])
    make_run(tmp_path / "other/a", "iql+online", [40.0, 40.0], [60.0, 60.0], eval=task)
    ours, others = (report([tmp_path / name], tmp_path / "report", show=False) for name in ("runs", "other"))
    assert ours.fine_tunings[0].published is not None
    assert others.fine_tunings[0].published is None


def test_published_scores_are_those_of_the_file() -> None:
    found = lookup_online("cal_ql", "antmaze-large-play-v2")
    assert found is not None
    assert (round(found.before.mean), round(found.after.mean)) == (32, 97)
    assert found.regret is not None
    assert 0 < found.regret.mean < 1
    assert lookup_online("td3_bc", "antmaze-large-play-v2") is None
    for method in ("iql", "SPOT", "rebrac"):  # none of them stands in an offline table
        assert not any("offline-to-online" in number.protocol for number in lookup(method, "antmaze-large-play-v2"))


def test_a_runs_budget_counts_its_online_updates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ConfigRecord(updates=500, online=ONLINE).budget == 500 + 2 * 900
    assert ConfigRecord(updates=500).budget == 500
    make_run(tmp_path / "runs/a", "iql+online", [1.0], [2.0])
    assert cli.main(["status", str(tmp_path / "runs")]) == 0
    assert "2300" in capsys.readouterr().out


def test_an_online_phase_without_updates_is_no_configuration(tmp_path: Path) -> None:
    """A file that tells of none is damaged: no environment step could be told from an update."""
    make_run(tmp_path / "runs/good", "iql+online", [1.0], [2.0])
    make_run(tmp_path / "runs/bad", "iql+online", [1.0], [2.0], online={**ONLINE, "updates_per_step": 0})
    made = summary([tmp_path / "runs"], tmp_path / "out")[0]
    assert [list(tuned.after) for tuned in made.fine_tunings] == [[2.0]]
    assert ["bad" in sentence and "updates_per_step" in sentence for sentence in made.damage] == [True]
