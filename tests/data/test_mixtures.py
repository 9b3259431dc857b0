"""Mixtures: the authors' counts, whole trajectories, exact shares, reproducible draws."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from offrl.data import catalogue, from_arrays
from offrl.data.arrays import to_arrays
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.data.mixtures import build_mixture
from offrl.datasets import load
from offrl.utils.errors import OffrlError


def make_store(name: str, lengths: list[int], value: float, obs_dim: int = 2) -> OfflineDataset:
    """Row i of the dataset observes i (so that copies can be recognised); the last row of odd episodes terminates."""
    n = sum(lengths)
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    rows = torch.arange(n, dtype=torch.float32)
    terminations = torch.zeros(n)
    terminations[offsets[2::2] - 1] = 1
    return OfflineDataset(
        observations=rows[:, None].repeat(1, obs_dim),
        actions=rows[:, None] / n,
        rewards=torch.full((n,), value),
        next_observations=rows[:, None].repeat(1, obs_dim) + 1,
        terminations=terminations,
        offsets=offsets,
        info=DatasetInfo(id=name, ref_min=0.0, ref_max=1000.0),
    )


@pytest.mark.parametrize(("sigma", "good_draws"), [(0.01, 11), (0.05, 51), (0.1, 101), (0.5, 501)])
def test_counts_are_the_authors(sigma: float, good_draws: int) -> None:
    # Their halfcheetah sets with a hundredth of the steps: 1000 episodes of equal length in either source.
    good, bad = make_store("good", [10] * 1000, 1.0), make_store("bad", [10] * 1000, 0.0)
    mixture, manifest = build_mixture(good, bad, sigma)
    sources = [source for source, _ in manifest["episodes"]]
    assert sources.count(0) == good_draws
    assert sources.count(1) == 1000 - good_draws + 1
    assert len(mixture) == manifest["transitions"] == 10_010


def test_draws_are_uniform_with_replacement() -> None:
    good, bad = make_store("good", [10] * 1000, 1.0), make_store("bad", [10] * 1000, 0.0)
    distinct = [build_mixture(good, bad, 0.01, seed=seed)[1]["distinct_episodes"][1] for seed in range(20)]
    # 990 draws of 1000: 1000 (1 - (1 - 1/1000)^990) = 628.6 distinct, standard deviation 9.6 a mixture.
    assert abs(np.mean(distinct) - 628.6) < 4 * 9.6 / np.sqrt(20)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.5])
def test_share_is_within_one_trajectory(sigma: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    good = make_store("good", rng.integers(1, 200, 80).tolist(), 1.0)
    bad = make_store("bad", rng.integers(1, 30, 500).tolist(), 0.0)
    n = 5000
    mixture, manifest = build_mixture(good, bad, sigma, n, seed)
    assert sigma < manifest["realised_sigma"] <= sigma + 199 / n
    rows_good = sum(int(good.lengths[e]) for source, e in manifest["episodes"] if source == 0)
    assert manifest["realised_sigma"] == rows_good / n
    assert manifest["share"] == rows_good / len(mixture)
    assert n < len(mixture) <= n + 29  # one bad trajectory too many, no more


def test_pieces_are_whole_episodes_of_the_sources() -> None:
    good, bad = make_store("good", [7, 3, 11, 5], 1.0), make_store("bad", [2, 4, 3], 0.0)
    mixture, manifest = build_mixture(good, bad, 0.4, 60, seed=3)
    assert mixture.episodes == len(manifest["episodes"])
    order = [source for source, _ in manifest["episodes"]]
    assert order == sorted(order)  # good ones first
    for piece, (source, episode) in enumerate(manifest["episodes"]):
        store = (good, bad)[source]
        a, b = mixture.offsets[piece], mixture.offsets[piece + 1]
        c, d = store.offsets[episode], store.offsets[episode + 1]
        for key in OfflineDataset.ROW_FIELDS:
            assert torch.equal(getattr(mixture, key)[a:b], getattr(store, key)[c:d])


def test_same_seed_same_mixture_and_manifest_is_json() -> None:
    good, bad = make_store("good", [7, 3, 11, 5] * 10, 1.0), make_store("bad", [2, 4, 3] * 40, 0.0)
    runs = [build_mixture(good, bad, 0.1, 400, seed) for seed in (5, 5, 6)]
    texts = [json.dumps(manifest) for _, manifest in runs]
    assert texts[0] == texts[1] != texts[2]
    assert runs[0][0].fingerprint == runs[1][0].fingerprint != runs[2][0].fingerprint
    assert runs[0][1]["sources"] == [
        {"id": "good", "fingerprint": good.fingerprint},
        {"id": "bad", "fingerprint": bad.fingerprint},
    ]


def test_pieces_that_their_file_cut_off_are_marked_as_ended() -> None:
    """Else a file made of the mixture would join them to the next piece."""
    good, bad = make_store("good", [7, 3], 1.0), make_store("bad", [2, 4], 0.0)
    cut = OfflineDataset(**good.tensors() | {"complete": torch.tensor([True, False])}, info=good.info)
    mixture, _ = build_mixture(cut, bad, 0.4, 60)
    assert bool(mixture.complete.all())
    assert mixture.episodes == from_arrays(to_arrays(mixture)).episodes


@pytest.mark.parametrize("name", ["hopper-random-expert-0.1-v2", "ant-random-medium-0.01-v2"])
def test_published_names_mix_two_d4rl_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env, level, sigma = name.split("-")[0], name.split("-")[2], float(name.split("-")[3])
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    with pytest.raises(OffrlError, match=f"{env}-{level}-v2: not on this machine yet; get it with `offrl data fetch"):
        load(name)
    for source, value in ((level, 1.0), ("random", 0.0)):
        write_file(tmp_path / f"{env}-{source}-v2.hdf5", value)
    store = load(name)
    assert store.info.id == name
    references = catalogue.d4rl()[f"{env}-{level}-v2"].info()
    assert (store.info.ref_min, store.info.env_id) == (references.ref_min, references.env_id)
    assert store.info.family == "gym-mujoco"
    assert catalogue.d4rl_task(store.info) == (f"ant-{level}-v2" if env == "ant" else None)
    made = store.info.provenance["mixture"]
    assert sigma < made["realised_sigma"] <= sigma + 10 / 1000
    assert float((store.returns > 0).double().mean()) == pytest.approx(made["share"])
    assert store.fingerprint == load(name).fingerprint


def write_file(path: Path, value: float) -> None:
    """1000 steps in episodes of 10, each row with the reward `value`."""
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(1000, 3)).astype(np.float32)
    after = np.roll(obs, -1, axis=0)
    after[9::10] += 1
    with h5py.File(path, "w") as file:
        data = {"observations": obs, "next_observations": after, "actions": obs[:, :2].clip(-1, 1)}
        data |= {"rewards": np.full(1000, value), "terminals": np.zeros(1000, bool)}
        for key, array in (data | {"timeouts": np.arange(1000) % 10 == 9}).items():
            file[key] = array


def test_positive_sided_variance_of_scores() -> None:
    # One good episode (score 0.01 of 1) and its n bad ones (0): z has mean m = 0.01 / (n + 1).
    good, bad = make_store("good", [10], 1.0), make_store("bad", [10], 0.0)
    _, manifest = build_mixture(good, bad, 0.01, 50)
    count = len(manifest["episodes"])
    mean = 0.01 / count
    assert manifest["psv"] == pytest.approx((0.01 - mean) ** 2 / count, rel=1e-12)
    assert manifest["return_max"] == 10
    assert manifest["return_mean"] == pytest.approx(10 / count)


@pytest.mark.parametrize(
    ("sigma", "n", "obs_dim", "message"),
    [
        (0.0, 100, 2, "sigma=0.0"),
        (1.0, 100, 2, "sigma=1.0"),
        (0.1, 0, 2, "n_total=0"),
        (0.5, 5, 2, "5 transitions are too few"),
        (0.1, 100, 3, "good and bad differ"),
    ],
)
def test_bad_input(sigma: float, n: int, obs_dim: int, message: str) -> None:
    good, bad = make_store("good", [10] * 5, 1.0), make_store("bad", [10] * 5, 0.0, obs_dim)
    with pytest.raises(OffrlError, match=message):
        build_mixture(good, bad, sigma, n)
