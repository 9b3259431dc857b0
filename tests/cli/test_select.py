"""`offrl select`: from runs to a ranking, what is said of it, and what is refused."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from test_cli import main
from test_train import options, world  # noqa: F401 - a fixture

from offrl.cli.select import FILES, by_data, select
from offrl.evaluation.fqe import FQEConfig
from offrl.evaluation.selection import Policy, judge
from offrl.results import Run, has_critic, read, runs
from offrl.results.budget import expected_best
from offrl.results.report import summary
from offrl.training.trainer import train
from offrl.utils.errors import OffrlError

QUICK = FQEConfig(updates=60, batch_size=64, lr=1e-2, hidden=(16,))


def policy(method: str, seed: int, value: float, score: float = math.nan, step: int = 10) -> Policy:
    episodes = np.empty(0) if math.isnan(score) else np.array([score - 1, score + 1])
    return Policy(method, seed, step, Path("runs") / method, 0, value, 0.0, 0.1, episodes)


def test_a_ranking_is_judged_by_policies_and_by_configurations() -> None:
    found = [policy("a", 0, 5, 10), policy("a", 1, 1, 30), policy("b", 0, 4, 50), policy("b", 1, 4.5, 70)]
    made = judge("d", "score", [*found, policy("c", 0, 99)])
    assert [p.value for p in made.policies] == [99, 5, 4.5, 4, 1]
    assert [p.score for p in made.known] == [10, 70, 50, 30]
    assert made.spearman == pytest.approx(1 - 6 * (9 + 1 + 1 + 1) / 60)  # ranks 4 3 2 1 against 1 4 3 2
    assert made.regret == {1: 1.0, 2: 0.0, 3: 0.0}
    # a: value 3, score 20; b: value 4.25, score 60.
    assert made.ks == [1, 2]
    assert made.selected.tolist() == [60, 60]
    np.testing.assert_allclose(made.uniform, expected_best([20, 60], [1, 2])[0])
    assert made.bandit.limit == pytest.approx(70)
    assert judge("d", "score", [policy("a", 0, 1), policy("b", 0, 2, 3)]).bandit is None
    two = judge("d", "score", [policy("a", 0, 1, 4), policy("b", 0, 2, 3)])  # which are enough
    assert two.spearman == pytest.approx(-1)


def test_runs_are_ranked_on_their_data(world: Path) -> None:  # noqa: F811
    """Two settings of two seeds; true scores are those of the rows, estimates those of the policies."""
    evaluation = {"every": 0, "final_episodes": 3, "workers": 1}
    for alpha in (0.0, 2.5):
        values = options(
            "toy.npz", 300, agent={"alpha": alpha, "actor_lr": 3e-3, "critic_lr": 3e-3}, keep_checkpoints=True
        )
        train({**values, "eval": evaluation, "checkpoint_every": 100})
    (made,) = select(["runs"], "out", QUICK, show=False)
    assert {(p.method, p.seed) for p in made.policies} == {
        (f"td3_bc (alpha={a})", s) for a in (0.0, 2.5) for s in (0, 1)
    }
    assert all(has_critic(run) and "critic" in run.manifest for run in runs(["runs"]))
    rows = read(["runs"])
    for p in made.policies:
        mine = rows.filter(rows["folder"] == str(p.folder), rows["seed"] == p.seed)
        assert p.score == pytest.approx(mine["normalized"].mean())
        assert -8 < p.value < 0  # four rewards between -1.5 and 0 each
    assert made.scale == "normalised score"  # by references of its own
    assert {path.name for path in Path("out").iterdir()} == set(FILES)
    with open("out/select.csv") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["value"]) for line in lines] == [p.value for p in made.policies]
    text = Path("out/select.md").read_text()
    assert "Spearman rank correlation" in text
    assert "1 episodes by UCB" in text
    everything = select(["runs"], "out", QUICK, all_checkpoints=True, show=False)[0]
    assert {p.step for p in everything.policies} == {100, 200, 300}
    assert sum(math.isnan(p.score) for p in everything.policies) == 8  # not evaluated there


def test_the_command(
    toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs that were never evaluated are ranked all the same; other data, or none, are refused in a sentence."""
    monkeypatch.chdir(tmp_path)
    assert main("select", "gone") == 2
    train(options(toy_file, 40, name="one"))
    given = ["select", "runs", "--updates", "30", "--batch-size", "32", "--hidden", "8", "--discount", "0.9"]
    assert main(*given) == 0
    shown = capsys.readouterr().out
    assert "Policies of" in shown
    assert "Spearman" not in shown
    assert "gamma 0.9" in shown
    assert Path("runs/select/select.md").exists()
    assert main(*given[:2], "--updates", "0") == 2
    data = dict(np.load(toy_file))
    np.savez(toy_file, **{**data, "rewards": data["rewards"] + 1})
    assert main(*given) == 2
    assert "nothing to rank: Left out, trained on other data than" in capsys.readouterr().err
    with pytest.raises(OffrlError, match="no checkpoint in"):
        select([], "out")
    assert main(*given, "--device", "gpu") == 2
    assert "device=gpu is unknown; choose auto, cpu, cuda or cuda:N." in capsys.readouterr().err


def test_settings_of_runs_that_were_never_evaluated_are_told_apart(
    toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two settings are two lanes of one seed, and there is a run with another one: each row says which policy it is."""
    monkeypatch.chdir(tmp_path)
    train(options(toy_file, 4, name="pair", agent={"alpha": [1.0, 5.0]}, lanes=1, seeds=[0, 0]))
    train(options(toy_file, 4, name="single", agent={"alpha": 2.5}, lanes=1))
    assert main("select", "runs", "--updates", "5", "--hidden", "4") == 0
    expected = {("td3_bc (alpha=1.0)", "pair", "0"), ("td3_bc (alpha=5.0)", "pair", "1")}
    expected |= {("td3_bc (alpha=2.5)", "single", "0")}
    with open("runs/select/select.csv") as file:
        lines = list(csv.DictReader(file))
    assert {(line["method"], line["run"], line["lane"]) for line in lines} == expected
    assert [line["seed"] for line in lines] == ["0"] * 3
    assert ",".join(lines[0]) == "dataset,method,seed,step,value,soft_opc,td_error,score,episodes,run,lane"
    for shown in (capsys.readouterr().out, Path("runs/select/select.md").read_text()):
        assert all(label in shown for label, *_ in expected)
    heading, *_ = (line for line in Path("runs/select/select.md").read_text().splitlines() if "FQE value" in line)
    assert [name.strip() for name in heading.strip("| ").split("|")][-2:] == ["lane", "run"]


def test_a_run_that_was_evaluated_and_one_that_was_not_have_labels_of_one_kind(world: Path) -> None:  # noqa: F811
    """Labels are a report's, and evaluated or not is no setting."""
    evaluation = {"every": 0, "final_episodes": 2, "workers": 1}
    for alpha in (1.0, 2.5):
        train({**options("toy.npz", 4, agent={"alpha": alpha}, name=f"seen{alpha}"), "eval": evaluation})
    train(options("toy.npz", 4, agent={"alpha": 2.5}, lanes=1, seed=7, name="unseen"))
    (made,) = select(["runs"], "out", FQEConfig(updates=3, hidden=(8,)), show=False)
    assert {p.method for p in made.policies if p.folder.name == "unseen"} == {"td3_bc (alpha=2.5)"}
    assert len(made.known) == 4
    reported, _ = summary(["runs"], "report")
    assert {p.method for p in made.policies} == {cell.method for cell in reported.cells}


def test_runs_of_transformed_rewards_are_ranked_by_the_recorded_ones(
    toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in (
        ("plain", {}),
        ("scaled", {"reward_scale": 2.0, "reward_shift": -1.0}),
        ("normal", {"reward_normalize": True}),
    ):
        train(options(toy_file, 4, name=name, data=data))
    (made,) = select(["runs"], "out", FQEConfig(updates=3, hidden=(8,)), show=False)
    assert {p.folder.name for p in made.policies} == {"plain", "scaled", "normal"}
    assert "Left out" not in Path("out/select.md").read_text()


def test_policies_without_an_estimate_come_last(
    toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [policy("a", 0, math.nan, 10), policy("b", 0, 1, 20), policy("c", 0, math.inf, 15), policy("d", 0, 5, 30)]
    made = judge("d", "score", found)
    assert [p.method for p in made.policies] == ["d", "b", "a", "c"]
    assert made.spearman == pytest.approx(
        judge("d", "score", [policy(p.method, 0, p.merit, p.score) for p in found]).spearman
    )
    assert made.regret[1] == 0
    assert made.selected.tolist() == [30, 30, 30, 30]
    monkeypatch.chdir(tmp_path)
    train(options(toy_file, 4, name="one"))
    select(["runs"], "out", FQEConfig(updates=60, hidden=(8,), lr=1e30), show=False)
    assert "No estimate for 2 of 2 policies" in Path("out/select.md").read_text()


@pytest.mark.parametrize(
    ("name", "text"),
    [("config.json", "{"), ("manifest.json", "[]"), ("episodes.jsonl", "x\n"), ("checkpoint.safetensors", "x")],
)
def test_a_damaged_run_is_refused_and_nothing_is_written(
    name: str,
    text: str,
    world: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A ranking without one of its policies would be another ranking; the sentence names the file and the way out."""
    for seed in (0, 3):
        folder = train({**options("toy.npz", 4, lanes=1, seed=seed), "eval": {"every": 0, "final_episodes": 0}}).folder
    (folder / name).write_text(text)
    assert main("select", "runs", "--updates", "3", "--out", "out") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("offrl: error: ")
    assert str(folder / name) in shown
    assert shown.count("\n") == 1
    assert not Path("out").exists()


def test_runs_that_see_a_dataset_differently_are_ranked_apart(world: Path) -> None:  # noqa: F811
    """Two settings with an observation left out and one without; rewards' scale, caches and other seeds see the same."""
    small = {"every": 0, "final_episodes": 0}
    for data in ({}, {"mask": [0]}, {"mask": [0], "reward_scale": 2.0}):
        train({**options("toy.npz", 20), "data": data, "eval": small})
    made = select(["runs"], "out", QUICK, show=False)
    assert [selection.dataset for selection in made] == ["toy.npz (data.mask=[0])", "toy.npz"]
    assert [len({p.folder for p in selection.policies}) for selection in made] == [2, 1]
    assert "Left out" not in Path("out/select.md").read_text()
    config = {"dataset": "a.npz", "data": {"seed": 0}}
    other = [
        Run(Path("b"), {**config, "data": {"seed": 1}}, {}),
        Run(Path("c"), {**config, "data": {"seed": 1, "flicker": 0.5}}, {}),
    ]
    assert [name for name, _ in by_data([Run(Path("a"), config, {}), *other])] == [
        "a.npz (data.flicker=0.5, data.seed=1)",
        "a.npz",
    ]
