"""The seam: how synthetic rows reach a batch, what a killed run draws from when it goes on, and who can use it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_toy
from torch import Tensor

from offrl.agents.base import Agent, Spec
from offrl.agents.prdc import PRDC, PRDCConfig
from offrl.augment.base import Augmentation, LaneSegments, Synthetic, SyntheticConfig, check_agent, make_augmentation
from offrl.augment.diffusion import DenoiserConfig, Training, denoiser_path, trained_denoiser
from offrl.augment.trajectories import split_episodes
from offrl.data.batch import Batch
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.nets.neighbors import brute_force
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import CudaGraph, Eager
from offrl.training.run_config import resolve_config
from offrl.training.runs import Result, load_agent, make_agent
from offrl.training.trainer import resume, train
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom

PGD = "offrl.augment.policy_guided.PolicyGuidedDiffusion"
DENOISER = {"features": 16, "blocks": 2, "window": 4, "updates": 60, "batch_size": 16, "ema_decay": 0.9}
TINY: dict[str, Any] = {
    "_target_": PGD,
    "transitions": 24,
    "length": 3,
    "refresh_every": 10,
    "coefficient": 3.0,
    "denoiser": DENOISER,
    "sampling": {"steps": 4},
}


def values(file: Path, out: Path, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "agent": {"_target_": "offrl.agents.td3_bc.TD3BC", "hidden": [16, 16]},
        "augment": TINY,
        "dataset": str(file),
        "out": str(out),
        "updates": 35,
        "batch_size": 16,
        "lanes": 2,
        "checkpoint_every": 7,
        "progress": False,
        "eval": {"every": 0, "final_episodes": 0},
    }
    return given | changes


def tensors(result: Result) -> dict[str, Tensor]:
    return checkpoint.load(result.folder / checkpoint.NAME)[0]


def same(a: Result, b: Result) -> bool:
    mine, theirs = tensors(a), tensors(b)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


# ---- drawing -----------------------------------------------------------------------------------------------------------


def pieces(*lengths: int) -> OfflineDataset:
    """Episodes of these lengths; the observation is the row's number."""
    n = sum(lengths)
    rows = torch.arange(n).float()
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return OfflineDataset(rows[:, None], torch.zeros(n, 1), rows, rows[:, None], torch.zeros(n), offsets)


def test_a_lane_draws_uniformly_from_its_own_rows() -> None:
    """Lanes of 2 x 3 episodes with 9 and 14 rows; chi-square at the 99.9 % point."""
    sampler = LaneSegments(pieces(5, 3, 1, 4, 2, 8), lanes=2)
    drawn = sampler.draw(LaneRandom((0, 1)), torch.arange(50), 280)
    for lane, (low, high, limit) in enumerate([(0, 9, 26.1), (9, 23, 34.5)]):
        rows = drawn[:, lane].reshape(-1)
        assert int(rows.min()) >= low
        assert int(rows.max()) < high
        counts = torch.bincount(rows - low, minlength=high - low).double()
        expected = len(rows) / (high - low)
        assert float(((counts - expected) ** 2 / expected).sum()) < limit


class Counted(Augmentation):
    """Its rewards tell when they were made, for which lane, and whether by a policy."""

    made: list[int]

    def generate(self, policy: Agent | None, step: int) -> OfflineDataset:
        lanes, n = len(self.seeds), self.cfg.trajectories * self.cfg.length
        self.__dict__.setdefault("made", []).append(step)
        rewards = step + 0.1 * torch.arange(lanes).repeat_interleave(n) + (0.01 if policy is not None else 0.0)
        obs, offsets = torch.zeros(lanes * n, 1), torch.arange(0, lanes * n + 1, self.cfg.length)
        return OfflineDataset(obs, torch.zeros(lanes * n, 1), rewards, obs.clone(), torch.zeros(lanes * n), offsets)


def counted(folder: Path, **settings: Any) -> tuple[Synthetic, BatchLoader]:
    real = pieces(10, 10).with_rewards(0.0, -1.0)
    cfg = SyntheticConfig(**{"transitions": 6, "length": 3, "refresh_every": 100, **settings})
    synthetic = Synthetic(Counted(real, cfg, (0, 1)), (real, Uniform(real)), (1.0, 0.0), folder)
    return synthetic, BatchLoader(synthetic.sources, 256)


POLICY: Any = object()


def test_shares_of_a_batch(tmp_path: Path) -> None:
    synthetic, loader = counted(tmp_path, share=0.9375)
    synthetic.begin(loader, POLICY, 0)
    batch = loader.draw(LaneRandom((0, 1)), torch.arange(1, 4))
    assert ((batch.reward == -1).sum(-1) == 16).all()
    assert (batch.index[batch.reward == -1] >= 0).all()
    assert (batch.index[batch.reward != -1] == -1).all()
    for lane in range(2):
        assert batch.reward[:, lane].unique().tolist() == pytest.approx([-1.0, 0.1 * lane])
    synthetic.refresh(POLICY, 100)
    after = loader.draw(LaneRandom((0, 1)), torch.arange(1, 4))
    for lane in range(2):  # nothing of the old ones is left
        assert after.reward[:, lane].unique().tolist() == pytest.approx([-1.0, 100 + 0.1 * lane + 0.01])
    assert torch.equal(after.index, batch.index)


def test_all_can_be_synthetic(tmp_path: Path) -> None:
    synthetic, loader = counted(tmp_path, share=1.0)
    synthetic.begin(loader, POLICY, 0)
    assert not (loader.draw(LaneRandom((0, 1)), torch.arange(3)).reward == -1).any()


def test_several_generations_are_kept_in_turn(tmp_path: Path) -> None:
    synthetic, loader = counted(tmp_path, share=0.75, keep=3)
    synthetic.begin(loader, POLICY, 0)
    seen = []
    for step in (100, 200, 300, 400, 500):
        synthetic.refresh(POLICY, step)
        batch = loader.draw(LaneRandom((0, 1)), torch.arange(2))
        parts = {round(value) for value in batch.reward[0, 0].tolist()} - {-1}
        seen.append(sorted(parts))
        assert ((batch.reward == -1).sum(-1) == 64).all()
        assert sorted(set(synthetic.places(step))) == seen[-1]
    assert seen == [[0, 100], [0, 100, 200], [100, 200, 300], [200, 300, 400], [300, 400, 500]]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_resumed_run_draws_from_the_same_generations(keep: int, tmp_path: Path) -> None:
    """Saved at any update, whatever was made since then."""
    for stop in (50, 100, 130, 250, 300, 470):
        folder = tmp_path / str(stop)
        first, loader = counted(folder, keep=keep)
        first.begin(loader, POLICY, 0)
        for step in range(100, stop + 1, 100):
            first.refresh(POLICY, step)
        first.save()
        first.sweep()
        expected = loader.draw(LaneRandom((0, 1)), torch.arange(5))
        first.refresh(POLICY, stop // 100 * 100 + 100)  # made, but the run was killed before the next checkpoint
        second, loader = counted(folder, keep=keep)
        second.begin(loader, POLICY, stop)
        got = loader.draw(LaneRandom((0, 1)), torch.arange(5))
        assert torch.equal(got.reward, expected.reward)
        assert getattr(second.augmentation, "made", []) == []
        assert len(list((folder / "synthetic").glob("*.safetensors"))) == len(set(second.places(stop)))


def test_what_is_lost_is_made_again_or_missed(tmp_path: Path) -> None:
    first, loader = counted(tmp_path)
    first.begin(loader, POLICY, 0)
    first.refresh(POLICY, 100)
    first.save()
    (tmp_path / "synthetic" / "00000100.safetensors").unlink()
    again, loader = counted(tmp_path)
    again.begin(loader, POLICY, 100)  # at this very update: the policy is at hand
    assert getattr(again.augmentation, "made", []) == [100]
    later, loader = counted(tmp_path)
    with pytest.raises(OffrlError, match=r"00000100.safetensors is missing: .* start over with fresh=true"):
        later.begin(loader, POLICY, 150)


def test_rewards_are_transformed_as_the_datasets(tmp_path: Path) -> None:
    synthetic, loader = counted(tmp_path)
    synthetic.rewards = (10.0, -3.0)
    synthetic.begin(loader, POLICY, 0)
    rewards = loader.draw(LaneRandom((0, 1)), torch.arange(2)).reward[:, 1].unique().tolist()
    assert rewards == pytest.approx([-2.0, -1.0])  # 10 x 0.1 - 3, and the dataset's own


class _Recorded(CudaGraph):
    """A graph that goes on reading the datasets that it was captured with."""

    def _capture(self) -> None:
        sources = list(self.eager.loader.sources)
        this = self

        class Graph:
            def replay(self) -> None:
                now, this.eager.loader.sources = this.eager.loader.sources, sources
                this.metrics = this._updates()
                this.eager.loader.sources = now

        self.graph = Graph()  # type: ignore[assignment]


def test_a_captured_graph_is_renewed(tmp_path: Path) -> None:
    ends = []
    for kind in (Eager, _Recorded, _Recorded):
        synthetic, loader = counted(tmp_path)
        synthetic.begin(loader, POLICY, 0)
        agent = make_agent({"_target_": "offrl.agents.td3_bc.TD3BC", "hidden": [8]}, Spec(1, 1, (0, 1)))
        engine = kind(agent, loader, **({} if kind is Eager else {"updates_per_launch": 4}))
        engine.run(0, 20)
        synthetic.refresh(POLICY, 100)
        if len(ends) < 2:
            engine.invalidate()
        engine.run(20, 20)
        ends.append(agent.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    assert not all(torch.equal(ends[0][k], ends[2][k]) for k in ends[0])  # what would happen without


# ---- runs --------------------------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_ends_as_an_undisturbed_one(toy_file: Path, tmp_path: Path) -> None:
    """Stopped between refreshes, at one, and at the end, where the refresh is left to whoever goes on."""
    through = train(values(toy_file, tmp_path / "through"))
    assert sorted(p.name for p in (through.folder / "synthetic").iterdir()) == ["00000030.safetensors"]
    for stops in [(30,), (7, 10, 21)]:
        out = tmp_path / "_".join(map(str, stops))
        for stop in stops:
            train(values(toy_file, out, updates=stop))
        assert same(train(values(toy_file, out)), through), stops
    manifest = (through.folder / "manifest.json").read_text()
    assert "denoiser-" in manifest
    assert '"method": "td3_bc+PGD"' in manifest
    assert load_agent(through.folder).spec.lanes == 2


def test_a_run_killed_while_it_works_ends_as_an_undisturbed_one(
    toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after each of its writes in turn: the checkpoints', the trajectories', and removals.

    New trajectories would be due after the last update, which nothing draws from any more.
    """
    short = {"updates": 12, "checkpoint_every": 3, "augment": {**TINY, "refresh_every": 4}}
    through = train(values(toy_file, tmp_path / "through", **short))
    kept = sorted(path.name for path in (through.folder / "synthetic").iterdir())

    class Killed(BaseException):
        pass

    for nth in range(1, 9):
        events = 0

        def count(real: Any) -> Any:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                nonlocal events
                done = real(*args, **kwargs)
                events += str(args[-1]).endswith(".safetensors")
                if events == nth:  # noqa: B023 - used within this turn
                    raise Killed
                return done

            return wrapped

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", count(os.replace))
            patch.setattr(Path, "unlink", count(Path.unlink))
            with pytest.raises(Killed):
                train(values(toy_file, tmp_path / str(nth), **short))
        again = train(values(toy_file, tmp_path / str(nth), **short))
        assert same(again, through), nth
        assert sorted(path.name for path in (again.folder / "synthetic").iterdir()) == kept


WORLD = {
    "_target_": "offrl.augment.world_model.WorldModel",
    "transitions": 24,
    "length": 3,
    "model": {"hidden": [8], "updates": 20, "members": 2, "elites": 1, "batch_size": 16},
}


@pytest.mark.parametrize("augment", [TINY, WORLD], ids=["guided", "world model"])
def test_a_run_killed_behind_its_last_checkpoint_ends_as_it_would(
    augment: dict[str, Any], toy_file: Path, tmp_path: Path
) -> None:
    """No trajectories are made for it any more; its result and its files are those of a run that was left alone."""
    given = values(toy_file, tmp_path, updates=8, augment={**augment, "refresh_every": 4})
    folder = train(given).folder
    files, result = sorted(folder.rglob("*")), (folder / "result.json").read_bytes()
    (folder / "result.json").unlink()
    train(given)
    assert sorted(folder.rglob("*")) == files
    assert (folder / "result.json").read_bytes() == result


def test_starting_over_forgets_old_trajectories(toy_file: Path, tmp_path: Path) -> None:
    first = train(values(toy_file, tmp_path))
    stale = first.folder / "synthetic" / "00000000.safetensors"
    (first.folder / "synthetic" / "00000030.safetensors").rename(stale)
    before = stale.read_bytes()
    again = train(values(toy_file, tmp_path, fresh=True, updates=7))
    assert stale.read_bytes() != before
    assert again.step == 7


def test_other_augmentations_under_one_name_are_refused(toy_file: Path, tmp_path: Path) -> None:
    first = train(values(toy_file, tmp_path, name="x", updates=7))
    for other in ({**TINY, "coefficient": 1.0}, {}):
        with pytest.raises(OffrlError, match=r"other settings \(augment"):
            train(values(toy_file, tmp_path, name="x", updates=14, augment=other))
    assert resume(first.folder, {"updates": 9}).step == 9


@pytest.mark.parametrize("agent", ["td3_bc.TD3BC", "prdc.PRDC", "a2pr.A2PR"])
@pytest.mark.parametrize("sampler", ["Uniform", "AdvantageWeighted"])
@pytest.mark.parametrize("augment", [{}, TINY])
def test_agents_samplers_and_augmentations_compose(
    agent: str, sampler: str, augment: dict[str, Any], toy_file: Path, tmp_path: Path
) -> None:
    settings = {"_target_": f"offrl.agents.{agent}", "hidden": [16, 16]}
    settings |= {"vae_hidden": [16]} if "a2pr" in agent else {}
    sampler_settings = {"_target_": f"offrl.sampling.{sampler}"}
    given = values(toy_file, tmp_path, agent=settings, sampler=sampler_settings, augment=augment, updates=12)
    result = train(given)
    labels = [agent.split(".")[0], {"Uniform": "", "AdvantageWeighted": "AW"}[sampler], "PGD" if augment else ""]
    assert result.folder.parts[-3] == "+".join(filter(None, labels))
    assert all(bool(t.isfinite().all()) for t in tensors(result).values())


def test_neighbours_of_synthetic_states() -> None:
    """PRDC finds the nearest pair of the dataset to a state that stands nowhere in it."""
    store = make_toy(2048)
    spec = Spec(3, 2, (0, 1), *store.observation_statistics())
    agent = PRDC(spec, PRDCConfig(hidden=(16,)))
    agent.setup(store)
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(2, 10, 3, generator=generator)
    index = torch.full((2, 10), -1)
    index[:, :4] = torch.tensor([5, 900, 2047, 5])
    obs[:, :4] = agent.normalize(store.observations[index[:, :4]])
    nothing = torch.zeros(2, 10)
    batch = Batch(obs, torch.zeros(2, 10, 2), nothing, obs, nothing, index)
    action = torch.rand(2, 10, 2, generator=generator) * 2 - 1
    loss, _ = agent.policy_regularizer(batch, action)
    for lane in range(2):
        states = agent.normalize(store.observations)
        rows, _ = brute_force(states, store.actions, obs[lane], action[lane], 2.0)
        wanted = (action[lane] - store.actions[rows]).square().mean()
        torch.testing.assert_close(loss[lane], wanted)


# ---- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"share": 0.5}, "augment.share: there is no augmentation to set; choose one with augment=NAME."),
        ({"_target_": "offrl.augment.Nothing"}, "augment._target_=offrl.augment.Nothing can't be imported"),
        ({"_target_": "offrl.sampling.Uniform"}, "augment._target_=offrl.sampling.Uniform is no "),
        ({"_target_": PGD, "shore": 0.5}, "augment.shore is no option; did you mean augment.share?"),
        ({"_target_": PGD, "share": 1.5}, "augment.share=1.5 should be above 0 and at most 1."),
        ({"_target_": PGD, "share": [0.5, 0.6]}, "augment.share=[0.5, 0.6]: lanes share this setting"),
        ({"_target_": PGD, "coefficient": [1.0]}, "augment.coefficient has 1 values for 2 lanes"),
        ({"_target_": PGD, "keep": 0}, "augment.keep=0 should be at least 1."),
        ({"_target_": PGD, "guidance": "none"}, "augment.guidance=none should be one of per_step, product."),
        (
            {"_target_": PGD, "denoiser": {"featrues": 3}},
            "augment.denoiser.featrues is no option; did you mean augment.",
        ),
        ({"_target_": PGD, "denoiser": {"updates": 0}}, "augment.denoiser.updates=0 should be at least 1."),
        ({"_target_": PGD, "sampling": {"steps": 1}}, "augment.sampling.steps=1 should be at least 2."),
        ({"_target_": PGD, "length": 2}, "augment.length=2: 3 blocks need trajectories of at least 3 transitions"),
        (
            {"_target_": PGD, "denoiser": {"window": 3}},
            "augment.denoiser.window=3: 3 blocks need windows of at least 4",
        ),
    ],
    ids=str,
)
def test_bad_settings(augment: dict[str, Any], message: str) -> None:
    with pytest.raises(OffrlError) as caught:
        resolve_config(values(Path("toy.npz"), Path("runs"), augment=augment))
    assert str(caught.value).startswith(message)


def test_runs_without_an_augmentation_are_as_before(toy_file: Path) -> None:
    """Their configuration, and so their folder, has no word of it."""
    made = resolve_config(values(toy_file, Path("runs"), augment={}))
    assert "augment" not in made.to_dict()
    assert (
        made.config_hash()
        == resolve_config({k: v for k, v in values(toy_file, Path("runs")).items() if k != "augment"}).config_hash()
    )


def test_who_cannot_use_it(toy_file: Path, tmp_path: Path) -> None:
    transformer = {"_target_": "offrl.agents.dt.DT", "embed": 16, "layers": 1, "context": 3}
    with pytest.raises(OffrlError, match="DT needs the return from each step to an episode's end"):
        train(values(toy_file, tmp_path, agent=transformer))
    n = 8
    obs = torch.zeros(n, 1)
    discrete = OfflineDataset(obs, torch.zeros(n, dtype=torch.int64), obs[:, 0], obs, obs[:, 0], torch.tensor([0, n]),
                     DatasetInfo(discrete=3))  # fmt: skip
    with pytest.raises(OffrlError, match="need continuous actions; set augment=none"):
        make_augmentation(TINY, discrete, (0,))


def test_pieces_shorter_than_an_agents_windows_are_refused() -> None:
    """Chunks of K actions are learnt from windows of K timesteps; and a model asks for each action anew."""
    spec, model = (
        Spec(3, 2, (0,)),
        make_augmentation({"_target_": "offrl.augment.world_model.WorldModel"}, make_toy(64), (0,)),
    )
    agent = make_agent({"_target_": "offrl.agents.fql.FQL", "hidden": [8], "action_chunk": 5}, spec)
    with pytest.raises(
        OffrlError, match=r"FQL learns from 5 timesteps in a row, and augment\.length=4; raise augment\.length"
    ):
        check_agent(agent, length=4)
    check_agent(agent, length=5)
    with pytest.raises(OffrlError, match=r"FQL acts on the episode so far"):
        check_agent(agent, type(model), 5)
    check_agent(make_agent({"_target_": "offrl.agents.fql.FQL", "hidden": [8]}, spec), type(model), 5)


# ---- generating --------------------------------------------------------------------------------------------------------


def made_for(seeds: tuple[int, ...], store: OfflineDataset, **changes: Any) -> Any:
    augmentation: Any = make_augmentation({**TINY, **changes}, store, seeds)
    augmentation.prepare()
    augmentation.denoiser.double()
    agent = make_agent({"_target_": "offrl.agents.td3_bc.TD3BC", "hidden": [16]}, Spec(3, 2, seeds)).double()
    return augmentation.sample(agent, 40)


def test_lanes_are_guided_apart() -> None:
    """Each by its own policy and seed: together they are what they are alone, in float64 to rounding."""
    store = make_toy(512)
    together = made_for((3, 9), store)
    for lane, seed in enumerate((3, 9)):
        alone = made_for((seed,), store)
        torch.testing.assert_close(together[lane : lane + 1], alone, rtol=0, atol=1e-10)
    assert not torch.allclose(together[0], together[1], atol=0.1)
    by_coefficient = made_for((3, 3), store, coefficient=[0.0, 3.0])
    torch.testing.assert_close(by_coefficient[1:], together[:1], rtol=0, atol=1e-5)  # a list is a float32 tensor
    torch.testing.assert_close(by_coefficient[:1], made_for((3,), store, coefficient=0.0), rtol=0, atol=1e-10)


def test_no_guidance_is_the_unguided_augmentation() -> None:
    store = make_toy(512)
    agent = make_agent({"_target_": "offrl.agents.td3_bc.TD3BC", "hidden": [16]}, Spec(3, 2, (0, 1)))
    plain = {k: v for k, v in TINY.items() if k != "coefficient"} | {"_target_": "offrl.augment.diffusion.Diffusion"}
    stores = []
    for settings in (plain, {**TINY, "coefficient": 0.0}, TINY):
        augmentation = make_augmentation(settings, store, (0, 1))
        augmentation.prepare()
        stores.append(augmentation.generate(agent, 10))
    assert torch.equal(stores[0].observations, stores[1].observations)
    assert torch.equal(stores[0].actions, stores[1].actions)
    assert not torch.equal(stores[0].actions[:8], stores[2].actions[:8])


def test_how_samples_are_cut_into_calls_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of lanes must not: names of random numbers depend on the trajectory alone."""
    store = make_toy(512)
    monkeypatch.setattr("offrl.augment.diffusion._CHUNK", 8)
    cut = made_for((3, 9), store)
    alone = made_for((9,), store)
    torch.testing.assert_close(cut[1:], alone, rtol=0, atol=1e-10)


# ---- the denoiser's training -------------------------------------------------------------------------------------------


def test_training_learns_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_toy(2048, seed=5)
    cfg = DenoiserConfig(features=16, blocks=2, window=4, updates=150, lr=3e-3, ema_decay=0.9, ema_every=1)
    untrained = Training(store, cfg).validation_loss()
    once = trained_denoiser(store, cfg)
    assert untrained is not None
    # Only the position within an episode and the actions' mean can be known from a noised window of independent states.
    assert once.metadata["validation_loss"] < 0.8 * untrained
    assert once.path == denoiser_path(store, cfg)
    assert not list(once.path.parent.glob("*.training.safetensors"))
    monkeypatch.setattr(Training, "update", None)  # the second time nothing is trained
    twice = trained_denoiser(store, cfg)
    assert all(torch.equal(a, b) for a, b in zip(once.denoiser.parameters(), twice.denoiser.parameters()))
    assert twice.metadata == once.metadata
    assert denoiser_path(store, DenoiserConfig(features=24)) != once.path
    assert denoiser_path(make_toy(2048, seed=6), cfg) != once.path


def test_held_out_episodes_are_for_the_validation_loss_alone() -> None:
    """Without their numbers training is what it was, and its validation loss is lost."""
    store, cfg = make_toy(512), DenoiserConfig(features=16, blocks=2, window=4, holdout=0.2, batch_size=64)
    _, held = split_episodes(store, cfg.holdout, cfg.seed)
    assert len(held) == 26
    spoilt = torch.isin(store.episode_of_row, held)
    tensors = store.tensors()
    for name in ("observations", "actions", "rewards", "next_observations"):
        tensors[name] = torch.where(spoilt.view(-1, *[1] * (tensors[name].ndim - 1)), torch.nan, tensors[name])
    whole, poor = (Training(s, cfg) for s in (store, OfflineDataset(**tensors, info=store.info)))
    for step in range(1, 9):
        whole.step = poor.step = step
        assert torch.equal(whole.update(), poor.update())
    assert math.isfinite(whole.validation_loss() or math.nan)
    assert math.isnan(poor.validation_loss() or 0)


def episodes(lengths: list[int], terminated: bool) -> OfflineDataset:
    """Episodes with the toy's numbers, all ended by time limits, or the last one by a termination."""
    toy, n = make_toy(64), sum(lengths)
    rows = {name: getattr(toy, name)[:n] for name in OfflineDataset.ROW_FIELDS}
    rows["terminations"] = torch.zeros(n)
    rows["terminations"][-1] = float(terminated)
    return OfflineDataset(**rows, offsets=torch.tensor([0, *lengths]).cumsum(0), info=toy.info)


def test_rows_that_no_window_holds_are_told() -> None:
    """Windows of four steps in an episode of 20 steps, whose last row is in none, and ten of 3."""
    tiny = {"features": 16, "blocks": 2, "window": 4, "stride": 1, "updates": 1, "holdout": 0.0}
    augmentation = make_augmentation({**TINY, "denoiser": tiny}, episodes([20, *[3] * 10], False), (0,))
    with pytest.warns(UserWarning, match=r"learns from 38% of the rows.*augment\.denoiser\.window=4 steps"):
        augmentation.prepare()
    assert augmentation.metadata()["denoiser"]["share_of_rows"] == 19 / 50


@pytest.mark.parametrize("terminated", [False, True])
def test_no_termination_is_drawn_where_no_row_has_one(terminated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an undertrained denoiser says: here that every step of three trajectories of seven is the last."""
    augmentation: Any = make_augmentation(TINY, episodes([20, 20], terminated), (0,))
    augmentation.prepare()
    said = torch.full((1, 3, 8, augmentation.denoiser.codec.width), 0.5)
    monkeypatch.setattr(augmentation, "sample", lambda *_: said)
    assert augmentation.generate(None, 1).lengths.tolist() == ([1, 1, 1] if terminated else [7, 7, 7])


@pytest.mark.parametrize("updates", [3, 12], ids=["before a check", "behind a check"])
def test_a_fit_that_diverges_leaves_no_file(updates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offrl.augment.fitting.SAVE_EVERY", 10)
    store = make_toy(512, seed=11)
    cfg = DenoiserConfig(features=16, blocks=2, window=4, updates=updates, batch_size=8, lr=1e-3)
    real = Training.update

    def diverging(self: Training) -> Tensor:
        loss = real(self)
        return loss * torch.nan if self.step > 10 or updates < 10 else loss

    path = denoiser_path(store, cfg)
    with monkeypatch.context() as patch:
        patch.setattr(Training, "update", diverging)
        with pytest.raises(OffrlError, match="loss is no longer finite; lower the learning rate"):
            trained_denoiser(store, cfg)
    assert [file.suffix for file in path.parent.glob(f"{path.stem}*")] in ([], [".lock"])
    result = Training.result

    def spoilt(self: Training) -> Any:
        tensors, metadata = result(self)
        return {name: tensor * torch.nan for name, tensor in tensors.items()}, metadata

    with monkeypatch.context() as patch:
        patch.setattr(Training, "result", spoilt)
        with pytest.raises(OffrlError, match="is no longer finite"):
            trained_denoiser(store, cfg)
    assert not path.exists()
    tensors, metadata = spoilt(Training(store, cfg))
    checkpoint.write(path, tensors, metadata)  # as earlier versions kept it
    assert checkpoint.first_not_finite(trained_denoiser(store, cfg).denoiser.state_dict()) is None


def test_training_goes_on_where_it_was_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = make_toy(512, seed=7)
    cfg = DenoiserConfig(features=16, blocks=2, window=4, updates=40, batch_size=8)
    monkeypatch.setattr("offrl.augment.fitting.SAVE_EVERY", 6)
    through = Training(store, cfg)
    through.run(tmp_path / "a.safetensors", False, "")
    killed, real = Training(store, cfg), Training.update

    def update(self: Training) -> Tensor:
        if self.step == 22:
            raise KeyboardInterrupt
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "update", update)
        with pytest.raises(KeyboardInterrupt):
            killed.run(tmp_path / "b.safetensors", False, "")
    again = Training(store, cfg)
    again.run(tmp_path / "b.safetensors", False, "")
    assert again.step == 40
    assert all(torch.equal(a, b) for a, b in zip(through.state_dict().values(), again.state_dict().values()))


def test_the_average_moves_on_every_tenth_update() -> None:
    training = Training(make_toy(512), DenoiserConfig(features=16, blocks=2, window=4))
    average = training.average.network.out.weight
    for step in range(1, 22):
        before = average.clone()
        training.step = step
        training.update()
        if step % 10:
            assert torch.equal(average, before)
        else:
            expected = 0.995 * before + 0.005 * training.online.out.weight.detach()
            torch.testing.assert_close(average, expected, rtol=0, atol=1e-7)


def test_the_rate_warms_up_and_cools_down() -> None:
    training = Training(make_toy(512), DenoiserConfig(features=16, blocks=2, window=4, updates=1000, lr=2.0))
    assert training.rate(1) == pytest.approx(2 * (0.1 + 0.9 / 100))
    assert training.rate(100) == pytest.approx(2)
    assert training.rate(550) == pytest.approx(1)
    assert training.rate(1000) == pytest.approx(0)


def test_variance_of_actions_given_states() -> None:
    """u = s / 2 plus noise of a fifth of the variance, in standardised units."""
    n = 40_000
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(n, 2, generator=generator)
    u = torch.stack([0.2 * obs[:, 0] + 0.1 * torch.randn(n, generator=generator),
                     0.2 * torch.randn(n, generator=generator)], 1)  # fmt: skip
    store = OfflineDataset(
        obs, u.tanh(), torch.randn(n, generator=generator), obs, torch.zeros(n), torch.arange(0, n + 1, 100)
    )
    training = Training(store, DenoiserConfig(features=16, blocks=2, window=8))
    torch.testing.assert_close(training.average.action_variance, torch.tensor([0.2, 1.0]), rtol=0, atol=0.02)
