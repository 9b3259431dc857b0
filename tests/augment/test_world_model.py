"""The ensemble of one-step models: its loss, what it learns of a system that is known, and its rollouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from offrl.agents.base import Spec
from offrl.augment.base import make_augmentation
from offrl.augment.fitting import model_path
from offrl.augment.world_model import (
    EliteDynamics,
    Ensemble,
    EnsembleConfig,
    EnsembleFit,
    WorldModelConfig,
    targets,
)
from offrl.data.arrays import from_arrays
from offrl.data.checks import ReadOptions
from offrl.data.dataset import MADE_UP, DatasetInfo, OfflineDataset
from offrl.training.runs import make_agent
from offrl.utils.errors import OffrlError

WORLD = "offrl.augment.world_model.WorldModel"
MODEL = {"hidden": [24], "updates": 40, "members": 3, "elites": 2, "batch_size": 32}


def linear_system(n: int = 4000, info: DatasetInfo | None = None) -> OfflineDataset:
    """s' = s + 0.3 a + noise of deviation 0.1, r = s_0; episodes of 20."""
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(n, 2, generator=generator)
    action = torch.rand(n, 2, generator=generator) * 2 - 1
    following = obs + 0.3 * action + 0.1 * torch.randn(n, 2, generator=generator)
    info = info or DatasetInfo(id="linear")
    return OfflineDataset(obs, action, obs[:, 0].clone(), following, torch.zeros(n), torch.arange(0, n + 1, 20), info)


def test_the_loss() -> None:
    """Gaussian likelihood with softly bounded variances, members apart, in plain steps."""
    store = linear_system(200)
    fit = EnsembleFit(store, EnsembleConfig(hidden=(8,), members=3, elites=2))
    fit.model.double()
    store64 = OfflineDataset(**{k: v.double() if v.is_floating_point() else v for k, v in store.tensors().items()})
    fit.store = store64
    rows = torch.tensor([3, 50, 117])
    x = torch.cat([store64.observations, store64.actions], -1)
    y = torch.cat([store64.next_observations - store64.observations, store64.rewards[:, None]], -1)
    x = (x - fit.model.in_mean) / fit.model.in_std
    y = (y - fit.model.out_mean) / fit.model.out_std
    total = torch.zeros((), dtype=torch.float64)
    for member in range(3):
        (w1, w2), (b1, b2) = ([p[0, member] for p in part] for part in (fit.model.mlp.weights, fit.model.mlp.biases))
        out = (x[rows] @ w1.T + b1).clamp(min=0) @ w2.T + b2
        mean, raw = out[:, :3], out[:, 3:]
        bounded = 0.5 - torch.log1p((0.5 - raw).exp())
        bounded = -10 + torch.log1p((bounded + 10).exp())
        total += ((mean - y[rows]) ** 2 / bounded.exp() + bounded).mean()
    total += 0.01 * (0.5 + 10) * 3
    torch.testing.assert_close(fit.loss(rows), total, rtol=0, atol=1e-10)


def test_the_penalty_on_the_bounds_width_ends_where_they_meet() -> None:
    fits = [EnsembleFit(linear_system(200), EnsembleConfig(hidden=(8,), bound_weight=w)) for w in (0.0, 5.0)]
    for fit in fits:
        fit.model.most.data[..., 0] = -10.5  # below the lower one, in one of three outputs
    without, penalised = (fit.loss(torch.arange(5)) for fit in fits)
    assert penalised.item() == pytest.approx(without.item() + 5 * 2 * (0.5 + 10), abs=1e-4)  # float32
    (slope,) = torch.autograd.grad(penalised - without.detach(), fits[1].model.most)
    (likelihood,) = torch.autograd.grad(without, fits[0].model.most)
    torch.testing.assert_close((slope - likelihood).flatten(), torch.tensor([0.0, 5.0, 5.0]))


def test_the_range_of_the_aleatoric_uncertainty_is_reached_and_not_left() -> None:
    """By log-variances pushed to both ends, which the bounds hold."""
    torch.manual_seed(0)
    model = EnsembleFit(linear_system(200), EnsembleConfig(hidden=(8,), members=3, elites=3)).model
    model.least.data.uniform_(-6, -3)
    low, high = model.aleatoric_range()
    found = []
    for push in (-50.0, -4.0, -2.0, 50.0):
        model.mlp.biases[-1].data[..., 3:] = push
        with torch.no_grad():
            u = model.uncertainty(model(torch.randn(100, 2), torch.randn(100, 2)), "aleatoric")
        assert low * 0.9999 < u.min() <= u.max() < high * 1.0001  # float32
        found += [float(u.min()), float(u.max())]
    assert found[0] == pytest.approx(low, rel=1e-4)
    assert found[-1] == pytest.approx(high, rel=1e-4)


def test_it_learns_mean_and_noise_of_a_linear_system() -> None:
    store = linear_system(8000)
    fit = EnsembleFit(store, EnsembleConfig(hidden=(32,), members=3, elites=2, updates=400, lr=5e-3, batch_size=128))
    for fit.step in range(1, 401):
        fit.update()
    obs, action = torch.tensor([[0.5, -0.4]]), torch.tensor([[0.2, -0.7]])
    with torch.no_grad():
        mean, log_variance = fit.model(obs, action)
    change = mean[..., :2] * fit.model.out_std[:2] + fit.model.out_mean[:2]
    std = (0.5 * log_variance[..., :2]).exp() * fit.model.out_std[:2]
    torch.testing.assert_close(change, (0.3 * action).expand(3, 1, 2), rtol=0, atol=0.03)
    torch.testing.assert_close(std, torch.full((3, 1, 2), 0.1), rtol=0, atol=0.02)
    # Standardised: the noise is 0.01 of a change's variance 0.3^2 / 3 + 0.01, in two of three dimensions.
    floor = 2 / 3 * 0.01 / (0.09 / 3 + 0.01)
    assert float(fit.validation_errors().max()) == pytest.approx(floor, rel=0.15)


def poisoned(store: OfflineDataset, rows: Tensor) -> OfflineDataset:
    """The same without the numbers of some rows."""
    tensors = store.tensors()
    for name in ("observations", "actions", "rewards", "next_observations"):
        tensors[name] = tensors[name].clone()
        tensors[name][rows] = torch.nan
    return OfflineDataset(**tensors, info=store.info)


def test_held_out_transitions_choose_the_elites_and_teach_nothing() -> None:
    """A share of the transitions at random: training never sees them, and validation sees nothing else."""
    store = linear_system(500)
    fit = EnsembleFit(store, EnsembleConfig(hidden=(8,), members=3, elites=2, holdout=0.3, batch_size=256))
    assert len(fit.held) == 150
    assert torch.equal(torch.cat([fit.held, fit.learned]).sort().values, torch.arange(500))
    fit.store = poisoned(store, fit.held)
    for fit.step in range(1, 9):  # 2048 draws of 500 rows: one that may be drawn is
        assert fit.update().isfinite()
    assert all(p.isfinite().all() for p in fit.model.parameters())
    assert fit.validation_errors().isnan().all()
    fit.store = poisoned(store, fit.learned)
    errors = fit.validation_errors()
    assert errors.isfinite().all()
    fit.store = store.select_episodes(torch.arange(store.episodes))
    assert torch.equal(fit.validation_errors(), errors)


@pytest.mark.parametrize("semantics", ["exact", "d4rl"])
def test_successors_that_a_source_does_not_have_are_neither_learnt_nor_measured(semantics: Any) -> None:
    """Whatever stands behind a termination without `next_observations`, the model and its errors are the same."""
    full = linear_system(200)
    ends = np.arange(200) % 20 == 19
    columns = {key: getattr(full, key).numpy() for key in ("observations", "actions", "rewards")}
    columns["observations"][1:][~ends[:-1]] = full.next_observations.numpy()[:-1][~ends[:-1]]
    flat = from_arrays(columns | {"terminals": ends}, options=ReadOptions(semantics=semantics))
    terminal = flat.terminations > 0
    assert terminal.sum() == (10 if semantics == "exact" else 9)  # d4rl: the file's last row is no transition
    other = OfflineDataset(**flat.tensors() | {"next_observations": flat.next_observations.clone()}, info=flat.info)
    other.next_observations[terminal] = 1e3
    cfg = EnsembleConfig(hidden=(8,), members=3, elites=2, updates=10, batch_size=32)
    fits = [EnsembleFit(store, cfg) for store in (flat, other)]
    for fit in fits:
        for fit.step in range(1, 11):
            fit.update()
        assert not terminal[torch.cat([fit.held, fit.learned])].any()
        assert len(fit.held) == round(0.2 * int((~terminal).sum()))
    for name, tensor in fits[0].state_dict().items():
        if name not in (
            "model.low",
            "model.high",
        ):  # the range of states, which no made-up one can widen when they are read
            assert torch.equal(tensor, fits[1].state_dict()[name]), name
    assert torch.equal(fits[0].validation_errors(), fits[1].validation_errors())
    torch.testing.assert_close(fits[0].model.out_mean, targets(flat)[~terminal].mean(0))


def test_a_model_of_made_up_successors_is_fitted_anew() -> None:
    """One of the same numbers was fitted with them by earlier versions; other datasets keep their models."""
    store = linear_system(40)
    noted = store.with_info(provenance={MADE_UP: True})
    wanted = {**MODEL, "updates": 2}
    paths = []
    for each in (store, noted):
        model = make_augmentation({"_target_": WORLD, "model": wanted}, each, (0,))
        model.prepare()
        paths.append(model.path)
    assert paths[0] == model_path("world_model", 3, store, model.cfg.model) != paths[1]


def test_a_dataset_of_nothing_but_made_up_successors_is_refused() -> None:
    n = 5
    values = {"observations": np.eye(n), "actions": np.zeros((n, 1)), "rewards": np.zeros(n), "terminals": np.ones(n)}
    with pytest.raises(OffrlError, match=r"terminate at once.*give next_observations, or set augment=none"):
        EnsembleFit(from_arrays(values), EnsembleConfig(members=2, elites=1))


def test_elites_are_the_best_members() -> None:
    fit = EnsembleFit(linear_system(500), EnsembleConfig(hidden=(8,), members=5, elites=2))
    tensors, metadata = fit.result()
    errors = metadata["validation_errors"]
    assert sorted(tensors["elites"].tolist()) == sorted(np.argsort(errors)[:2].tolist())
    model = Ensemble(2, 2, fit.cfg)
    model.load_state_dict(tensors)
    obs, action = torch.randn(4, 2), torch.randn(4, 2)
    nothing = torch.zeros(4, 3)
    both = [model.draw(obs, action, torch.full((4,), elite), nothing)[1] for elite in (0, 1)]
    mixed = model.draw(obs, action, torch.tensor([0, 1, 1, 0]), nothing)[1]
    torch.testing.assert_close(mixed, torch.stack([both[0][0], both[1][1], both[1][2], both[0][3]]))


def test_a_draw_is_the_change_of_the_state_and_the_reward() -> None:
    """s' = s + change and r, in raw units, for states of three numbers: the last column is the reward's."""
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(200, 3, generator=generator)
    action, noise = torch.rand(200, 1, generator=generator), torch.randn(200, 4, generator=generator)
    info = DatasetInfo(id="three")
    store = OfflineDataset(obs, action, 5 + obs[:, 1], obs * 0.9, torch.zeros(200), torch.arange(0, 201, 20), info)
    model = EnsembleFit(store, EnsembleConfig(hidden=(8,), members=2, elites=2)).model
    mean, log_variance = model(obs, action)
    for elite in (0, 1):
        drawn = mean[model.elites[elite]] + (0.5 * log_variance[model.elites[elite]]).exp() * noise
        expected = drawn * model.out_std + model.out_mean
        member = torch.full((200,), elite)
        following, reward = model.draw(obs, action, member, noise, clip=False)
        torch.testing.assert_close(following, obs + expected[:, :3])
        torch.testing.assert_close(reward, expected[:, 3])


def test_states_stay_in_the_datasets_range() -> None:
    store = linear_system(500)
    fit = EnsembleFit(store, EnsembleConfig(hidden=(8,), members=2, elites=2))
    far = torch.full((3, 2), 1e6)
    following, _ = fit.model.draw(far, torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), torch.zeros(3, 3))
    assert torch.equal(following, fit.model.high.expand(3, 2))
    following, _ = fit.model.draw(-far, torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), torch.zeros(3, 3))
    assert torch.equal(following, fit.model.low.expand(3, 2))


# ---- rollouts ----------------------------------------------------------------------------------------------------------


def rolled(
    seeds: tuple[int, ...], policy: bool = True, name: str = "td3_bc.TD3BC", **changes: Any
) -> tuple[OfflineDataset, Any]:
    store = linear_system(1000)
    settings = {"_target_": WORLD, "transitions": 24, "length": 4, "model": MODEL, **changes}
    augmentation = make_augmentation(settings, store, seeds)
    augmentation.prepare()
    agent = make_agent({"_target_": f"offrl.agents.{name}", "hidden": [16]}, Spec(2, 2, seeds))
    return augmentation.generate(agent if policy else None, 7), agent


def test_rollouts_start_in_the_dataset_and_follow_the_policy() -> None:
    made, agent = rolled((3, 9))
    assert made.offsets.tolist() == list(range(0, 49, 4))
    known = {tuple(row) for row in linear_system(1000).observations.tolist()}
    assert all(tuple(row) in known for row in made.initial_observations.tolist())
    within = made.episode_of_row[1:] == made.episode_of_row[:-1]
    assert torch.equal(made.next_observations[:-1][within], made.observations[1:][within])
    obs = made.observations.view(2, 24, 2)
    torch.testing.assert_close(made.actions.view(2, 24, 2), agent.act(agent.normalize(obs)))


def test_a_rollout_terminates_where_no_state_of_the_dataset_is() -> None:
    """As with an expert's episodes, none of which falls: the flag is that of the state before it is clipped."""
    augmentation: Any = make_augmentation(
        {"_target_": WORLD, "transitions": 400, "length": 4, "model": MODEL}, linear_system(1000), (3,)
    )
    augmentation.prepare()
    low, high = augmentation.model.low, augmentation.model.high
    high.copy_(linear_system(1000).observations.quantile(0.7, dim=0))  # some rollouts leave this range

    def beyond(obs: torch.Tensor) -> torch.Tensor:
        return ((obs < low) | (obs > high)).any(-1)

    augmentation.terminates = beyond
    agent = make_agent({"_target_": "offrl.agents.td3_bc.TD3BC", "hidden": [16]}, Spec(2, 2, (3,)))
    made = augmentation.generate(agent, 7)
    ended = made.terminations > 0
    assert 10 < ended.sum() < made.episodes
    assert not beyond(made.next_observations).any()
    at_bound = ((made.next_observations == low) | (made.next_observations == high)).any(-1)
    assert torch.equal(at_bound, ended)


STOCHASTIC = {"sac_n.SACN": {"members": 2}, "cql.CQL": {}}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_squashed_policy_draws_its_actions(name: str) -> None:
    """At every step anew, from tanh of N(mean, std^2), stretched to the box: atanh of the actions is normal."""
    info = DatasetInfo(id="linear", action_low=-0.5, action_high=2.0)
    augmentation = make_augmentation(
        {"_target_": WORLD, "transitions": 2000, "length": 2, "model": MODEL}, linear_system(1000, info), (3,)
    )
    augmentation.prepare()
    settings = {"_target_": f"offrl.agents.{name}", "hidden": [16], **STOCHASTIC[name]}
    policy: Any = make_agent(settings, Spec(2, 2, (3,), action_low=-0.5, action_high=2.0))
    made = augmentation.generate(policy, 7)
    law = policy.actor(policy.normalize(made.observations.unsqueeze(0)))
    u = ((made.actions.double() - 0.75) / 1.25).atanh()
    z = ((u - law.mean[0]) / law.log_std[0].exp()).detach()
    usual = u.abs() < 4  # where atanh of a float32 has three digits left
    assert usual.double().mean() > 0.99
    assert stats.kstest(z[usual].numpy(), "norm").pvalue > 1e-4
    assert abs(np.corrcoef(z.view(-1, 2, 2)[..., 0].T)[0, 1]) < 0.16  # five standard errors of 1000 trajectories


@pytest.mark.parametrize("name", ["iql.IQL", "awac.AWAC"])
def test_a_gaussian_policy_draws_its_actions(name: str) -> None:
    """At every step anew, from N(mean, std^2) cut to the box of actions."""
    store = linear_system(1000, DatasetInfo(id="linear", action_low=-0.5, action_high=2.0))
    settings = {"_target_": WORLD, "transitions": 4000, "length": 4, "model": MODEL}
    augmentation = make_augmentation(settings, store, (3,))
    augmentation.prepare()
    policy = make_agent(
        {"_target_": f"offrl.agents.{name}", "hidden": [16]},
        Spec(2, 2, (3,), action_low=-0.5, action_high=2.0),
    )
    made = augmentation.generate(policy, 7)
    gaussian = policy.policy_gaussian(policy.normalize(made.observations.unsqueeze(0)))
    assert gaussian is not None
    mean, std = (part[0].detach() for part in gaussian)
    noise, action = (made.actions - mean) / std, made.actions
    inside = (action > -0.5) & (action < 2.0)
    assert inside.double().mean() > 0.5
    assert action.min() == -0.5
    assert action.max() <= 2.0
    # The law of what is not cut: a uniform number where the normal's distribution function is that of the box.
    normal = torch.distributions.Normal(0.0, 1.0)
    low, high = normal.cdf((-0.5 - mean) / std), normal.cdf((2.0 - mean) / std)
    share = ((normal.cdf(noise) - low) / (high - low))[inside].double().numpy()
    assert stats.kstest(share, "uniform").pvalue > 1e-4
    for step in range(4):  # not the same numbers at every step, nor in both dimensions
        for other in range(step + 1, 4):
            correlation = np.corrcoef(noise.view(-1, 4, 2)[:, [step, other], 0].T)[0, 1]
            assert abs(correlation) < 0.2  # five standard errors of 1000 trajectories, and what the cut does
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.1


@pytest.mark.parametrize("name", ["td3_bc.TD3BC", "fql.FQL", "dql.DQL"])
def test_lanes_roll_out_apart(name: str) -> None:
    together, _ = rolled((3, 9), name=name)
    for lane, seed in enumerate((3, 9)):
        alone, _ = rolled((seed,), name=name)
        rows = slice(24 * lane, 24 * lane + 24)
        torch.testing.assert_close(together.observations[rows], alone.observations, rtol=0, atol=1e-5)
        torch.testing.assert_close(together.rewards[rows], alone.rewards, rtol=0, atol=1e-5)


def test_without_a_policy_recorded_actions_are_replayed() -> None:
    made, _ = rolled((3,), policy=False)
    store = linear_system(1000)
    for start, action in zip(made.offsets[:-1].tolist(), made.initial_observations):
        row = int((store.observations == action).all(-1).nonzero()[0])
        last = int(store.offsets[1:][store.episode_of_row[row]]) - 1
        wanted = [min(row + t, last) for t in range(4)]
        assert torch.equal(made.actions[start : start + 4], store.actions[wanted])


@pytest.mark.parametrize("bad", [{"elites": 4}, {"elites": 0}, {"updates": 0}, {"holdout": 0.0}])
def test_settings_without_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(OffrlError, match=r"augment.model"):
        EnsembleConfig(**{"members": 3, "elites": 2, **bad})


# ---- uncertainty and penalty -------------------------------------------------------------------------------------------


def scaled_fit(members: int = 3) -> EnsembleFit:
    """An ensemble in float64 whose inputs and targets have means and scales of their own."""
    fit = EnsembleFit(linear_system(300), EnsembleConfig(hidden=(8,), members=members, elites=2))
    fit.model.double().requires_grad_(False)
    fit.model.out_std.copy_(torch.tensor([0.5, 3.0, 20.0]))
    fit.model.out_mean.copy_(torch.tensor([1.0, -2.0, 4.0]))
    fit.model.elites.copy_(torch.tensor([2, 0]))
    return fit


def test_uncertainties_are_in_raw_units() -> None:
    """Each kind restated member by member and row by row, from raw means and deviations."""
    model = scaled_fit().model
    obs, action = torch.randn(5, 2).double(), torch.randn(5, 2).double()
    mean, log_variance = model(obs, action)
    raw_mean, raw_std = mean * model.out_std + model.out_mean, log_variance.exp().sqrt() * model.out_std
    raw_mean[..., :-1] += obs
    model.elites.copy_(
        raw_std.norm(dim=-1)[:, 0].argsort()[:2]
    )  # not the one whose std is the longest in the first row
    first, second = model.elites.tolist()
    wanted: dict[Any, list[float]] = {"aleatoric": [], "aleatoric_elites": [], "pairwise": [], "ensemble_std": []}
    for n in range(5):
        lengths = [float(raw_std[m, n].square().sum().sqrt()) for m in range(3)]
        wanted["aleatoric"].append(max(lengths))
        wanted["aleatoric_elites"].append(max(lengths[first], lengths[second]))
        states = raw_mean[:, n, :2]
        centre = states.sum(0) / 3
        wanted["pairwise"].append(max(float((state - centre).square().sum().sqrt()) for state in states))
        variance = ((states - centre) ** 2).sum(0) / 3
        wanted["ensemble_std"].append(float((variance.sum() / 2).sqrt()))
    for kind, values in wanted.items():
        got = model.uncertainty((mean, log_variance), kind)
        torch.testing.assert_close(got, torch.tensor(values).double(), rtol=0, atol=1e-6)  # lists of Python's floats
    assert len({tuple(values) for values in wanted.values()}) == 4


def test_the_aleatoric_uncertainty_is_the_systems_noise() -> None:
    """Of the linear system ||sigma|| = (2 x 0.1^2)^0.5, since the reward has no noise, though targets are standardised."""
    store = linear_system(4000)
    fit = EnsembleFit(store, EnsembleConfig(hidden=(32,), members=1, elites=1, lr=5e-3, batch_size=128))
    for fit.step in range(1, 401):
        fit.update()
    with torch.no_grad():
        predicted = fit.model(torch.tensor([[0.5, -0.4]]), torch.tensor([[0.2, -0.7]]))
    assert float(fit.model.uncertainty(predicted, "aleatoric")) == pytest.approx(0.1 * 2**0.5, rel=0.1)


@pytest.mark.parametrize("uncertainty", ["aleatoric", "pairwise"])
def test_the_penalty_is_taken_from_the_reward(uncertainty: str) -> None:
    """r - c u(s, a) with each lane's c; nothing else changes, and c = 0 is the plain augmentation, bit by bit."""
    plain, _ = rolled((3, 3))
    none, _ = rolled((3, 3), penalty=0.0, uncertainty=uncertainty)
    assert all(torch.equal(a, b) for a, b in zip(plain.tensors().values(), none.tensors().values()))
    made, _ = rolled((3, 3), penalty=[0.0, 2.5], uncertainty=uncertainty)
    for name in ("observations", "actions", "next_observations", "terminations"):
        assert torch.equal(getattr(made, name), getattr(plain, name))
    assert torch.equal(made.rewards[:24], plain.rewards[:24])
    augmentation: Any = make_augmentation({"_target_": WORLD, "model": MODEL}, linear_system(1000), (3,))
    augmentation.prepare()
    model = augmentation.model
    u = model.uncertainty(model(made.observations, made.actions), uncertainty)
    torch.testing.assert_close(plain.rewards[24:] - made.rewards[24:], 2.5 * u[24:], rtol=1e-4, atol=1e-5)
    assert u.min() > 0


def test_a_negative_penalty_is_refused() -> None:
    with pytest.raises(OffrlError, match=r"augment.penalty=-1 should be at least 0"):
        WorldModelConfig(penalty=-1)


def test_states_may_leave_the_datasets_range() -> None:
    """Only where `clip_states` is false."""
    model = scaled_fit().model
    far, zero = torch.full((3, 2), 1e6).double(), torch.zeros(3, dtype=torch.int64)
    arguments = far, torch.zeros(3, 2).double(), zero, torch.zeros(3, 3).double()
    assert (model.draw(*arguments, clip=False)[0] > 1e5).all()
    assert (model.draw(*arguments)[0] < 10).all()
    assert (EliteDynamics(model, False).clip(far) == far).all()
    assert (EliteDynamics(model, True).clip(far) == model.high).all()


def test_updates_may_ask_the_elites() -> None:
    """Their mean and std of the next state are those that rollouts draw from, for any leading axes."""
    model = scaled_fit().model
    obs, action = torch.randn(2, 5, 2).double(), torch.randn(2, 5, 2).double()
    mean, std = EliteDynamics(model, True).next_gaussians(obs, action)
    noise = torch.randn(10, 3).double()
    for elite in range(2):
        member = torch.full((10,), elite)
        drawn = model.draw(obs.flatten(0, 1), action.flatten(0, 1), member, noise, clip=False)[0]
        wanted = mean[elite].flatten(0, 1) + std[elite].flatten(0, 1) * noise[:, :2]
        torch.testing.assert_close(wanted, drawn, rtol=0, atol=1e-10)


def test_the_manifest_tells_the_scale_of_the_penalty() -> None:
    augmentation: Any = make_augmentation({"_target_": WORLD, "model": MODEL}, linear_system(1000), (3,))
    augmentation.prepare()
    told = augmentation.metadata()
    assert 0 < told["uncertainty"]["q50"] <= told["uncertainty"]["q95"] <= told["uncertainty"]["q100"]
    assert told["termination_disagreement"] == 0
