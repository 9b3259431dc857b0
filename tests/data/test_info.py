"""`describe` against closed forms and plain numpy; the picture is written and not empty."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from offrl.cli.dataset_info import describe, episode_ends, plot, print_info
from offrl.data import DatasetInfo, OfflineDataset, from_arrays
from offrl.data.statistics import positive_sided_variance


def dataset(**info: object) -> OfflineDataset:
    """Four episodes of 3, 3, 3 and 2 steps: one terminates, two meet the time limit, one is unfinished."""
    rewards = np.array([1, 1, 1, 2, 2, 2, 3, 3, 4, 0, 0], float)
    terminals, timeouts = np.zeros(11), np.zeros(11)
    terminals[2] = timeouts[5] = timeouts[8] = 1
    observations = np.stack([np.arange(11.0), np.full(11, 5.0)], axis=1)
    data = {"observations": observations, "rewards": rewards, "terminals": terminals, "timeouts": timeouts}
    actions = np.linspace(-1, 1, 11)[:, None]
    after = observations + [1, 0]
    after[[2, 5, 8], 0] += 0.5  # an episode's last state is not the next one's first
    return from_arrays(data | {"actions": actions, "next_observations": after}, DatasetInfo(**info))


def test_counts_returns_and_scores() -> None:
    d = describe(dataset(ref_min=0.0, ref_max=10.0))
    assert (d["transitions"], d["episodes"]) == (11, 4)
    assert d["ends"] == {"terminated": 1, "truncated": 2, "unfinished": 1}
    assert d["terminal_share"] == pytest.approx(1 / 11)
    assert d["terminated_episodes_share"] == 0.25
    assert d["truncated_episodes_share"] == 0.5
    returns = np.array([3.0, 6.0, 10.0, 0.0])
    assert d["returns"]["median"] == 4.5
    assert d["returns"]["mean"] == returns.mean()
    assert d["returns"]["std"] == pytest.approx(returns.std())
    assert d["returns"]["q90"] == pytest.approx(np.quantile(returns, 0.9))
    assert d["score"]["mean"] == pytest.approx(47.5)
    assert d["lengths"] == {**d["lengths"], "min": 2.0, "max": 3.0, "mean": 2.75}


def test_ranges_and_constant_dimensions() -> None:
    d = describe(dataset())
    assert d["score"] is None
    assert d["observations"][0] == {
        "min": 0.0,
        "mean": 5.0,
        "std": pytest.approx(10**0.5),
        "max": 10.0,
        "constant": False,
    }
    assert d["observations"][1]["constant"] is True
    assert (d["actions"][0]["min"], d["actions"][0]["max"]) == (-1.0, 1.0)
    assert d["rewards"]["mean"] == pytest.approx(19 / 11)


def test_a_tail_counts_as_a_step_and_ends_as_its_timeout() -> None:
    data = {
        "observations": np.zeros((10, 1)),
        "actions": np.zeros((10, 1)),
        "rewards": np.ones(10),
        "terminals": np.zeros(10),
        "timeouts": np.arange(10) % 5 == 4,
    }
    d = describe(from_arrays(data))
    assert d["transitions"] == 8
    assert (d["lengths"]["mean"], d["returns"]["mean"]) == (5.0, 5.0)
    assert d["ends"] == {"terminated": 0, "truncated": 2, "unfinished": 0}


def test_discrete_actions_are_shares() -> None:
    data = {
        "observations": np.zeros((8, 1)),
        "actions": np.array([0, 0, 0, 2, 2, 2, 2, 0]),
        "rewards": np.zeros(8),
        "terminals": np.arange(8) % 4 == 3,
    }
    d = describe(from_arrays(data))
    assert [row["share"] for row in d["actions"]] == [0.5, 0.0, 0.5]
    assert d["positive_sided_variance"] == 0.0  # all returns are equal


def test_positive_sided_variance_in_closed_form() -> None:
    one_good = torch.tensor([0.0, 0, 0, 0, 10])
    assert positive_sided_variance(one_good) == pytest.approx(12.8)  # (10 - 2)^2 / 5
    assert positive_sided_variance(-one_good) == pytest.approx(3.2)  # 4 * 2^2 / 5
    assert positive_sided_variance(torch.tensor([0.0, 1, 2])) == pytest.approx(1 / 3)
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    both = positive_sided_variance(values) + positive_sided_variance(-values)
    assert both == pytest.approx(float(values.var(correction=0)))
    assert positive_sided_variance(3 * values + 7) == pytest.approx(9 * positive_sided_variance(values))


def test_positive_sided_variance_is_of_normalised_returns() -> None:
    returns = torch.tensor([3.0, 6, 10, 0])
    assert describe(dataset(ref_min=0.0, ref_max=20.0))["positive_sided_variance"] == pytest.approx(
        positive_sided_variance(returns / 20)
    )
    assert describe(dataset())["positive_sided_variance"] == pytest.approx(positive_sided_variance(returns / 10))


def test_what_samplers_would_draw() -> None:
    """100 episodes of 2 steps, returns 0 ... 99: bands are counts of trajectories."""
    data = {
        "observations": np.zeros((200, 1)),
        "actions": np.zeros((200, 1)),
        "rewards": np.repeat(np.arange(100), 2) / 2,
        "next_observations": np.zeros((200, 1)),
        "terminals": np.arange(200) % 2 == 1,
    }
    d = describe(from_arrays(data))
    assert d["normalisation"] == "returns scaled to [0, 1]"
    samplers = d["samplers"]
    assert list(samplers) == ["uniform", "RW", "AW", "Top-10%"]
    assert list(samplers["uniform"]["mass"].values()) == pytest.approx([0.01, 0.09, 0.15, 0.25, 0.5])
    assert list(samplers["Top-10%"]["mass"].values()) == pytest.approx([0.1, 0.9, 0, 0, 0])
    assert samplers["Top-10%"]["effective_rows"] == pytest.approx(20)
    weights = np.exp(np.arange(99, -1, -1) / 99 / 0.1)
    expected = [part.sum() / weights.sum() for part in np.split(weights, [1, 10, 25, 50])]
    for name in ("RW", "AW"):
        assert list(samplers[name]["mass"].values()) == pytest.approx(expected)
        assert samplers[name]["effective_rows"] == pytest.approx(2 * weights.sum() ** 2 / (weights**2).sum())
        assert samplers[name]["fallback"] is None


def test_goals_on_the_way_are_no_ends() -> None:
    data = {
        "observations": np.zeros((10, 1)),
        "actions": np.zeros((10, 1)),
        "rewards": np.ones(10),
        "terminals": np.arange(10) % 5 == 3,
        "timeouts": np.arange(10) % 5 == 4,
    }
    antmaze = from_arrays(data, DatasetInfo(family="antmaze"))
    assert episode_ends(antmaze).tolist() == [1, 1]
    assert describe(antmaze)["terminal_share"] == 0.25


def test_names_with_brackets_are_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    name = "run=3 [a].npz"
    print_info(describe(dataset(id=name, env_id="[red]Env-v0", source=f"/data/{name}")))
    shown = capsys.readouterr().out
    assert name in shown
    assert f"/data/{name}" in shown
    assert "[red]Env-v0" in shown


def test_everything_is_json_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    description = describe(dataset(id="mine", ref_min=0.0, ref_max=10.0))
    assert json.loads(json.dumps(description)) == description
    print_info(description)
    shown = capsys.readouterr().out
    for text in ("mine", "11", "1 terminated, 2 truncated, 1 unfinished", "47.5", "constant", "9.0909%"):
        assert text in shown


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("plain", "one")]


@pytest.mark.parametrize("kind", ["scored", "discrete", "wide", *SLOW])
def test_picture(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    n = 4 if kind == "one" else 600
    data = {
        "observations": rng.standard_normal((n, 60 if kind == "wide" else 3)),
        "actions": rng.integers(0, 3, n) if kind == "discrete" else rng.uniform(-1, 1, (n, 2)),
        "rewards": rng.standard_normal(n),
        "terminals": np.arange(n) % 20 == 19,
        "timeouts": np.arange(n) % 50 == 3,
    }
    info = DatasetInfo(ref_min=0.0, ref_max=9.0, max_episode_steps=20) if kind == "scored" else DatasetInfo()
    path = tmp_path / "picture.png"
    plot(from_arrays(data, info), path)
    from matplotlib.image import imread

    picture = imread(path)
    assert picture.shape[0] > 700
    assert picture.shape[1] > 1200
    assert 0.02 < (picture[..., :3].min(-1) < 0.9).mean() < 0.9  # drawn on, and not all over
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]
