"""Guidance: the gradient against autograd, what it may touch, and what guided samples follow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from offrl.agents.base import Agent
from offrl.augment import edm
from offrl.augment.diffusion import Denoiser, DenoiserConfig
from offrl.augment.edm import SamplerConfig
from offrl.augment.policy_guided import PerStep, PolicyGuidedConfig, Product, policy_gaussian
from offrl.data.dataset import DatasetInfo, OfflineDataset


class Policy(Agent):
    """mean = tanh(W s), with the given deviations (None: no Gaussian); one W for each lane."""

    class Config:  # nothing to set
        pass

    def __init__(self, weights: Tensor, std: float | None = None) -> None:
        torch.nn.Module.__init__(self)
        self.weights, self.std = weights, std

    def normalize(self, obs: Tensor) -> Tensor:
        return obs

    def act(self, obs: Tensor) -> Tensor:
        return (obs @ self.weights.transpose(-1, -2)).tanh()

    def policy_gaussian(self, obs: Tensor) -> tuple[Tensor, Tensor] | None:
        return None if self.std is None else (self.act(obs), torch.full_like(self.act(obs), self.std))


def denoiser(low: float = -1.0, high: float = 1.0, plain: bool = False) -> Denoiser:
    """A denoiser for two observations and two actions, in float64; `plain`: its coding only has tanh in it."""
    n = 64
    info = DatasetInfo(action_low=low, action_high=high)
    generator = torch.Generator().manual_seed(1)
    obs, actions = torch.randn(n, 2, generator=generator), low + (high - low) * torch.rand(n, 2, generator=generator)
    store = OfflineDataset(
        obs, actions, torch.randn(n, generator=generator), obs, torch.zeros(n), torch.tensor([0, n]), info
    )
    made = Denoiser(store, DenoiserConfig(features=16)).double()
    if not plain:
        raw = made.codec.raw(store.observations, store.actions, store.rewards, store.terminations)
        made.codec.fit(raw, torch.ones(n))
    return made


def samples(lanes: int = 2, n: int = 3, steps: int = 5, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(lanes, n, steps, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


WEIGHTS = torch.tensor([[[0.5, -1.0], [0.2, 0.3]], [[-0.4, 0.9], [1.0, 0.1]]], dtype=torch.float64)


def config(**changes: Any) -> PolicyGuidedConfig:
    return PolicyGuidedConfig(**{"sampling": SamplerConfig(steps=16), **changes})


@pytest.mark.parametrize("std", [None, 0.3])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.5, 2.0)])
def test_the_gradient_is_autograds(low: float, high: float, std: float | None) -> None:
    model, policy = denoiser(low, high), Policy(WEIGHTS, std)
    guide = PerStep(policy, model, config(normalize=False, policy_std=0.7))
    x = samples()
    coded = x[..., 2:4].clone().requires_grad_()
    unit = (coded * model.codec.std[2:4] + model.codec.mean[2:4]).tanh()
    action = unit * (high - low) / 2 + (high + low) / 2
    obs = x[..., :2] * model.codec.std[:2] + model.codec.mean[:2]
    mean = (obs.flatten(1, 2) @ WEIGHTS.transpose(1, 2)).tanh().unflatten(1, (3, 5))
    density = torch.distributions.Normal(mean, 0.7 if std is None else std).log_prob(action).sum()
    wanted = torch.autograd.grad(density, coded)[0]
    torch.testing.assert_close(guide.gradient(x), wanted, rtol=0, atol=1e-9)


def test_the_gradient_points_to_the_policy_and_vanishes_there() -> None:
    model, policy = denoiser(), Policy(WEIGHTS)
    guide = PerStep(policy, model, config(normalize=False))
    x = samples()
    mean, _ = guide.gaussian(x)
    at_policy = guide.with_actions(x, (mean.atanh() - model.codec.mean[2:4]) / model.codec.std[2:4])
    assert guide.gradient(at_policy).abs().max() < 1e-10
    difference = mean - model.codec.unit_actions(x)
    assert torch.equal(guide.gradient(x).sign(), difference.sign())


def test_normalised_gradients() -> None:
    model, policy = denoiser(), Policy(WEIGHTS)
    plain = PerStep(policy, model, config(normalize=False)).gradient(samples())
    unit = PerStep(policy, model, config()).gradient(samples())
    torch.testing.assert_close(torch.linalg.vector_norm(unit, dim=(-2, -1)), torch.ones(2, 3, dtype=torch.float64))
    direction = plain / torch.linalg.vector_norm(plain, dim=(-2, -1), keepdim=True)
    torch.testing.assert_close(unit, direction, rtol=0, atol=1e-6)
    narrow = PerStep(policy, model, config(policy_std=0.1)).gradient(samples())  # the scale cancels
    torch.testing.assert_close(narrow, unit, rtol=0, atol=1e-6)


def test_saturated_actions_have_no_gradient() -> None:
    guide = PerStep(Policy(WEIGHTS), denoiser(), config())
    x = samples()
    x[..., 2:4] = 1e3
    assert torch.equal(guide.gradient(x), torch.zeros_like(guide.gradient(x)))
    x[0, 0, 0, 2:4] = 0.0  # one row that isn't: it gets all the length
    g = guide.gradient(x)
    assert float(torch.linalg.vector_norm(g[0, 0, 0])) == pytest.approx(1, abs=1e-6)
    assert not g[0, 0, 1:].any()


@pytest.mark.parametrize("kind", [PerStep, Product])
def test_only_actions_are_touched(kind: Any) -> None:
    guide = kind(Policy(WEIGHTS), denoiser(), config())
    x = samples()
    for after in (guide.move(x, 3, 1.0, lambda y, _: y), guide.denoised(x, x, 1.0)):
        assert torch.equal(after[..., :2], x[..., :2])
        assert torch.equal(after[..., 4:], x[..., 4:])
    moved = guide.move(x, 3, 1.0, lambda y, _: y) if kind is PerStep else guide.denoised(x, x, 1.0)
    assert bool((moved[..., 2:4] != x[..., 2:4]).all())
    if kind is PerStep:
        assert torch.equal(guide.move(x, 15, 1.0, lambda y, _: y), x)  # the last step is left alone


def test_where_the_gradient_is_taken() -> None:
    model, policy = denoiser(), Policy(WEIGHTS)
    x, elsewhere = samples(), 0.5 * samples()
    at_denoised = PerStep(policy, model, config(at_denoised=True))
    g = PerStep(policy, model, config()).gradient(elsewhere)
    moved = at_denoised.move(x, 0, 1.0, lambda y, _: 0.5 * y)
    torch.testing.assert_close(moved[..., 2:4], x[..., 2:4] + at_denoised.strength(0) * g)


def test_lanes_are_guided_by_their_own_policy_and_coefficient() -> None:
    model, x = denoiser(), samples()
    both = PerStep(Policy(WEIGHTS), model, config(coefficient=torch.tensor([1.0, 3.0], dtype=torch.float64)))
    together = both.move(x, 2, 1.0, lambda y, _: y)
    for lane, w in enumerate((1.0, 3.0)):
        alone = PerStep(Policy(WEIGHTS[lane : lane + 1]), model, config(coefficient=w))
        one = alone.move(x[lane : lane + 1], 2, 1.0, lambda y, _: y)
        torch.testing.assert_close(together[lane : lane + 1], one, rtol=0, atol=1e-12)


def test_policies() -> None:
    obs = torch.randn(2, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, std = policy_gaussian(Policy(WEIGHTS), obs, torch.tensor([0.5, 2.0]))
    assert torch.equal(mean, Policy(WEIGHTS).act(obs))
    assert std[0].unique().tolist() == [0.5]
    assert std[1].unique().tolist() == [2.0]
    assert policy_gaussian(Policy(WEIGHTS, 0.3), obs, 1.0)[1].unique().tolist() == [0.3]


# ---- what guided samples follow ------------------------------------------------------------------------------------------


class Still(Policy):
    """N(2, 1) in coded actions, where these are atanh(a) alone: the mean is tanh(2), to first order."""

    def __init__(self) -> None:
        super().__init__(WEIGHTS[:1], 1 - math.tanh(2) ** 2)

    def act(self, obs: Tensor) -> Tensor:
        return obs.new_full((*obs.shape[:-1], 2), math.tanh(2))


def tilted(coefficient: float, steps: int = 64) -> tuple[float, float]:
    """Exact mean and variance of an action of samples for data N(0, 1), guided by `product` towards N(2, 1)."""
    sampling = SamplerConfig(steps=steps)
    guide = Product(Still(), denoiser(plain=True), config(coefficient=coefficient, sampling=sampling))

    def run(start: Tensor) -> Tensor:
        x = start.view(1, -1, 1, 1).expand(1, -1, 1, 6)
        return edm.sample(lambda y, s: y / (1 + s**2), lambda _: x, sampling, guide)[0, :, 0, 2]

    ends = run(torch.tensor([0.0, 1.0], dtype=torch.float64))  # without churn the one normal goes through a linear map
    return float(ends[0]), float((ends[1] - ends[0]).square())


@pytest.mark.parametrize(
    ("coefficient", "mean", "variance"), [(0.5, 0.660, 0.671), (1, 0.991, 0.503), (2, 1.324, 0.336)]
)
def test_the_product_is_the_exact_tilt(coefficient: float, mean: float, variance: float) -> None:
    """N(0, 1) times N(2, 1)^lambda is N(2 lambda / (1 + lambda), 1 / (1 + lambda)); 1 % is lost at the start, sigma = 80."""
    got = tilted(coefficient)
    assert got[0] == pytest.approx(mean, abs=6e-4)
    assert got[1] == pytest.approx(variance, abs=6e-4)
    exact = 2 * coefficient / (1 + coefficient), 1 / (1 + coefficient)
    assert got == pytest.approx(exact, rel=0.012)


def test_the_product_does_not_depend_on_the_number_of_steps() -> None:
    means = [tilted(1.0, steps)[0] for steps in (16, 32, 64, 256)]
    assert max(means) - min(means) < 0.004  # within 0.002 of their middle
    assert tilted(0.0)[0] == 0


def test_more_guidance_makes_the_policys_actions_likelier() -> None:
    """With samples of a coding that has everything in it: `product` is monotone."""
    model, policy = denoiser(), Policy(WEIGHTS)
    likelihoods = []
    for coefficient in (0.0, 0.3, 1.0, 3.0, 10.0):
        guide = Product(policy, model, config(coefficient=coefficient, policy_std=0.3))
        noise = samples(2, 200, 4)
        x = edm.sample(lambda y, s: y / (1 + s**2), lambda _, n=noise: n, SamplerConfig(steps=16), guide)
        mean, variance = guide.gaussian(x)
        likelihoods.append(float(-((model.codec.unit_actions(x) - mean) ** 2 / variance).mean()))
    assert likelihoods == sorted(likelihoods)
    assert likelihoods[-1] > likelihoods[0] + 1


def test_no_guidance_is_bitwise_unguided() -> None:
    x, sampling = samples(), SamplerConfig(steps=12, churn=20.0)
    model = denoiser()

    def run(guide: edm.Guide | None) -> Tensor:
        return edm.sample(
            lambda y, s: model(y.flatten(0, 1), s).view_as(y),
            lambda name: samples(scale=1 + 0.1 * len(name)),
            sampling,
            guide,
        )

    plain = run(None)
    assert torch.equal(run(edm.Guide()), plain)
    nothing = Product(Policy(WEIGHTS), model, config(coefficient=0.0, sampling=sampling))
    assert torch.equal(run(nothing), plain)
    some = torch.tensor([0.0, 1.0], dtype=torch.float64)  # a lane without guidance beside one with
    mixed = run(PerStep(Policy(WEIGHTS), model, config(coefficient=some, sampling=sampling)))
    assert torch.equal(mixed[0], plain[0])
    assert not torch.equal(mixed[1], plain[1])
    assert x.shape == plain.shape
