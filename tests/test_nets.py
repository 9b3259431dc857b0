"""Lane-batched networks against plain restatements: values, gradients, initial weights, optimiser, moving average."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from offrl.nets import (
    MLP,
    Adam,
    Critics,
    DeterministicActor,
    GaussianActor,
    TanhGaussian,
    clip_by_lane,
    lane_generators,
    make_target,
    normal_log_prob,
    orthogonal_,
    pad_hidden_,
    per_lane,
    polyak,
)
from offrl.nets.mlp import _ReluMLP

# Each side of the thresholds inside: single and few outputs, narrow inputs before wide layers, one row, no hidden layer.
SHAPES = [
    (1, 1, (3, 8, 1)),
    (2, 5, (3, 8, 8, 1)),
    (3, 7, (17, 64, 64, 6)),
    (2, 9, (5, 70, 16)),
    (2, 9, (5, 70, 17)),
    (1, 33, (70, 80, 90, 100)),
    (4, 1, (65, 66, 67)),
    (2, 6, (4, 3)),
    (2, 6, (4, 1)),
]
shapes = pytest.mark.parametrize(("n", "batch", "sizes"), SHAPES, ids=str)


def random_net(n: int, batch: int, sizes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Input and parameters in float64 that all ask for gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    pairs = [(normal(n, out, into), normal(n, out)) for into, out in zip(sizes[:-1], sizes[1:])]
    return normal(n, batch, sizes[0]), [p for pair in pairs for p in pair]


def relu_mlp_reference(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """What `_ReluMLP` computes, in plain operations: x `[n, batch, in]`, weights `[n, out, in]`, biases `[n, out]`."""
    for i in range(0, len(parameters), 2):
        x = x @ parameters[i].transpose(1, 2) + parameters[i + 1].unsqueeze(1)
        x = x.relu() if i < len(parameters) - 2 else x
    return x


@shapes
def test_the_fused_network_equals_the_plain_one(n: int, batch: int, sizes: tuple[int, ...]) -> None:
    x, parameters = random_net(n, batch, sizes)
    fused, plain = _ReluMLP.apply(x, *parameters), relu_mlp_reference(x, parameters)
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    direction = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(fused, [x, *parameters], direction)
    expected = torch.autograd.grad(plain, [x, *parameters], direction)
    for got, want in zip(gradients, expected):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * float(want.abs().max()))


@pytest.mark.parametrize("seed", range(5))
def test_the_fused_network_equals_the_plain_one_for_random_shapes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 130, (2 + seed % 3,), generator=generator).tolist()
    test_the_fused_network_equals_the_plain_one(1 + seed % 3, 1 + 11 * seed, tuple(sizes))


def test_gradients_equal_finite_differences() -> None:
    x, parameters = random_net(2, 3, (3, 5, 4, 2))
    assert torch.autograd.gradcheck(_ReluMLP.apply, (x, *parameters))


def test_biases_learn_beside_frozen_weights() -> None:
    x, parameters = random_net(2, 6, (20, 30, 40))
    for weight in (x, *parameters[0::2]):
        weight.requires_grad_(False)
    found = torch.autograd.grad(_ReluMLP.apply(x, *parameters).sum(), parameters[1::2])
    expected = torch.autograd.grad(relu_mlp_reference(x, parameters).sum(), parameters[1::2])
    for got, want in zip(found, expected):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grad_of", ["input", "parameters", "both"])
def test_only_what_is_asked_for_is_computed(grad_of: str) -> None:
    """Matrix products of a backward pass: one for each layer's weights, one for each layer's input, no other."""
    x, parameters = random_net(2, 6, (20, 30, 40, 50))
    asked = {"input": [x], "parameters": parameters, "both": [x, *parameters]}[grad_of]
    for tensor in (x, *parameters):
        tensor.requires_grad_(any(tensor is one for one in asked))
    out = _ReluMLP.apply(x, *parameters).sum()
    with _Products() as products:
        torch.autograd.grad(out, asked)
    # The network's input needs no gradient for the weights' sake: two products of inputs instead of three.
    assert products.count == {"input": 3, "parameters": 3 + 2, "both": 3 + 3}[grad_of]


class _Products(TorchDispatchMode):
    """Counts batched matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "bmm" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("member", [None, 0, 3])
def test_ensembles_are_their_members(member: int | None) -> None:
    """Values and gradients of all members, or of a single one, against ordinary layers."""
    mlp = MLP((1, 2), [6, 20, 3], members=4).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    out = mlp(x, member)
    plain = plain_members(mlp, x)
    plain = plain if member is None else plain[:, member]
    torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)
    wanted = [x, *mlp.parameters()]
    gradients = torch.autograd.grad(out.sin().sum(), wanted)
    for got, want in zip(gradients, torch.autograd.grad(plain.sin().sum(), wanted)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def plain_members(mlp: MLP, x: Tensor) -> Tensor:
    """`[lanes, members, batch, out]` of a network with one hidden layer, member by member."""
    rows = []
    for lane, member in itertools.product(range(mlp.weights[0].shape[0]), range(mlp.weights[0].shape[1])):
        layers = [(w[lane, member], b[lane, member]) for w, b in zip(mlp.weights, mlp.biases)]
        hidden = nn.functional.relu(nn.functional.linear(x[lane], *layers[0]))
        rows.append(nn.functional.linear(hidden, *layers[1]))
    return torch.stack(rows).unflatten(0, mlp.weights[0].shape[:2])


@pytest.mark.parametrize("member", [None, 1])
def test_a_frozen_network_passes_gradients_on_and_computes_none_of_its_own(member: int | None) -> None:
    mlp = MLP((1, 2), [20, 30, 40, 50], members=2)
    x = torch.randn(2, 9, 20, requires_grad=True)
    free, frozen = mlp(x, member), mlp(x, member, frozen=True)
    assert torch.equal(free, frozen)
    (expected,) = torch.autograd.grad(free.square().sum(), x)
    with _Products() as products:
        frozen.square().sum().backward()
    assert products.count == 3
    torch.testing.assert_close(x.grad, expected)
    assert all(p.grad is None for p in mlp.parameters())
    mlp(x).sum().backward()
    assert all(p.grad is not None for p in mlp.parameters())


def normalised_members(mlp: MLP, x: Tensor) -> Tensor:
    """`[lanes, members, batch, out]`: Linear, ReLU, LayerNorm and so on, as ordinary layers."""
    lanes, members = mlp.weights[0].shape[:2]
    rows = []
    for lane, member in itertools.product(range(lanes), range(members)):
        h = x[lane]
        for weight, bias, gain, offset in zip(mlp.weights, mlp.biases, mlp.gains, mlp.offsets):
            h = nn.functional.linear(h, weight[lane, member], bias[lane, member]).relu()
            h = nn.functional.layer_norm(h, h.shape[-1:], gain[lane, member], offset[lane, member], 1e-6)
        rows.append(nn.functional.linear(h, mlp.weights[-1][lane, member], mlp.biases[-1][lane, member]))
    return torch.stack(rows).unflatten(0, (lanes, members))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("member", [None, 0, 2])
def test_normalised_layers_equal_pytorchs(member: int | None, frozen: bool) -> None:
    """Values and gradients; gains and offsets are moved away from 1 and 0 first."""
    mlp = MLP((1, 2), [6, 20, 12, 3], members=3, norm=True).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in (*mlp.gains, *mlp.offsets):
            p.add_(torch.randn_like(p))
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    out, plain = mlp(x, member, frozen), normalised_members(mlp, x)
    plain = plain if member is None else plain[:, member]
    torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)
    wanted = [x] if frozen else [x, *mlp.parameters()]
    gradients = torch.autograd.grad(out.sin().sum(), wanted)
    for got, want in zip(gradients, torch.autograd.grad(plain.sin().sum(), wanted)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    if frozen:
        mlp(x, member, frozen=True).sum().backward()
        assert all(p.grad is None for p in mlp.parameters())


def test_what_is_dropped_is_each_hidden_layers_output() -> None:
    mlp, x = MLP((1, 2), [3, 8, 6, 2], name="actor").double(), torch.randn(2, 5, 3, dtype=torch.float64)
    seen = []

    def drop(name: str, h: Tensor) -> Tensor:
        seen.append((name, h.shape))
        return h * 0.5

    out = mlp(x, drop=drop)
    assert seen == [("actor/0", (2, 5, 8)), ("actor/1", (2, 5, 6))]
    halved = copy.deepcopy(mlp)
    with torch.no_grad():
        for weight in list(halved.weights)[1:]:
            weight.mul_(0.5)
    torch.testing.assert_close(out, halved(x), rtol=1e-12, atol=1e-12)


def test_padded_widths_change_no_function_and_stay_zero() -> None:
    """Same initial weights, same outputs, same descent; the units that fill a width up never come to life."""
    sizes = (5, 18, 33, 3)
    plain, padded = (MLP((1, 2), sizes, members=2).double() for _ in range(2))
    pad_hidden_(padded, 16)
    assert [w.shape[-2:] for w in padded.weights] == [(32, 5), (48, 32), (3, 48)]
    x = torch.randn(2, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    adams = [Adam(net.parameters(), 1e-2).double() for net in (plain, padded)]
    for _ in range(5):
        torch.testing.assert_close(padded(x), plain(x), rtol=1e-9, atol=1e-9)
        for net, adam in zip((plain, padded), adams):
            adam.step((net(x) - 1).square().mean((1, 2, 3)))
    for many, few in zip([*padded.weights, *padded.biases], [*plain.weights, *plain.biases]):
        inner = many.detach().clone()
        own = tuple(slice(0, n) for n in few.shape)
        torch.testing.assert_close(inner[own], few.detach(), rtol=1e-9, atol=1e-9)
        inner[own] = 0
        assert not inner.any()


def test_lanes_have_no_influence_on_each_other() -> None:
    """The gradient of one lane's output is zero in every other lane."""
    mlp = MLP((1, 2, 3), [4, 8, 2])
    x = torch.randn(3, 5, 4, requires_grad=True)
    gradients = torch.autograd.grad(mlp(x)[1].square().sum(), [x, *mlp.parameters()])
    for gradient in gradients:
        assert not gradient[0].any()
        assert not gradient[2].any()
        assert gradient[1].any()


def test_actors_cover_their_box_and_no_more() -> None:
    actor = DeterministicActor((0,), 3, 2, (8,), low=-0.5, high=2.0)
    obs = torch.randn(1, 50, 3)
    plain = 0.75 + 1.25 * actor.mlp(obs).tanh()
    torch.testing.assert_close(actor(obs), plain)
    wild = actor(obs * 1e6)
    assert wild.min() >= -0.5
    assert wild.max() <= 2.0
    assert wild.max() - wild.min() > 2.4  # saturated at both ends


def test_gaussian_actors_have_their_means_box_and_bounded_deviations() -> None:
    x = torch.randn(1, 7, 3) * 100
    squashed = GaussianActor((0,), 3, 2, (8,), -1.0, 3.0, log_std=(-3.0, 0.5))
    with torch.no_grad():
        squashed.log_std.copy_(torch.tensor([[-10.0, 0.1]]))
    mean, std = squashed(x)
    torch.testing.assert_close(mean, DeterministicActor((0,), 3, 2, (8,), -1.0, 3.0)(x))
    # The deviation is in units of half the box, which is 2.
    torch.testing.assert_close(std, 2 * torch.tensor([-3.0, 0.1]).exp().expand(1, 7, 2))
    mean, std = GaussianActor((0,), 3, 2, (8,), -1.0, 3.0, squash=False)(x)
    assert mean.abs().max() > 3
    assert torch.equal(std, torch.ones(1, 7, 2))


def test_critics_see_observation_and_action() -> None:
    critics = Critics((0, 1), 3, 2, (8, 8), members=2)
    obs, action = torch.randn(2, 7, 3), torch.randn(2, 7, 2)
    q = critics(obs, action)
    assert q.shape == (2, 2, 7)
    torch.testing.assert_close(critics(obs, action, member=1), q[:, 1])
    torch.testing.assert_close(critics(obs, action, member=0, frozen=True), q[:, 0])
    assert not torch.allclose(critics(obs, action + 1), q)
    assert not torch.allclose(critics(obs + 1, action), q)


# ---- initial weights ------------------------------------------------------------------------------------------


def test_initial_weights_follow_the_law_of_linear_layers() -> None:
    """Weights and biases of every layer: the bounds, and the same distribution as `nn.Linear` draws."""
    sizes = (50, 400, 300, 3)
    mlp = MLP(range(40), sizes, members=2)
    torch.manual_seed(0)
    for fan_in, fan_out, weights, biases in zip(sizes[:-1], sizes[1:], mlp.weights, mlp.biases):
        bound = 1 / math.sqrt(fan_in)
        linear = nn.Linear(fan_in, fan_out)
        for mine, theirs in ((weights, linear.weight), (biases, linear.bias)):
            assert mine.shape == (40, 2, *theirs.shape)
            assert mine.abs().max() <= bound
            some = mine.detach().flatten()[:50_000].double()
            assert stats.kstest(some.numpy(), "uniform", args=(-bound, 2 * bound)).pvalue > 1e-4
            assert stats.ks_2samp(some, theirs.detach().flatten().double()).pvalue > 1e-4


def test_initial_values_on_request() -> None:
    """Hidden biases at a value, the last layer uniform on bounds of its own; hidden weights as ever."""
    sizes = (50, 400, 300, 60)
    mlp, plain = (MLP(range(4), sizes, members=2, **options) for options in ({"bias": 0.1, "last": 3e-3}, {}))
    assert all((bias == 0.1).all() for bias in mlp.biases[:-1])
    assert torch.equal(mlp.weights[0], plain.weights[0])
    for last in (mlp.weights[-1], mlp.biases[-1]):
        assert last.abs().max() <= 3e-3
        some = last.detach().flatten()[:50_000].double()
        assert stats.kstest(some.numpy(), "uniform", args=(-3e-3, 6e-3)).pvalue > 1e-4


def test_the_normal_density_equals_pytorchs() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, x = (torch.randn(2, 5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    std = torch.rand(2, 1, 3, generator=generator, dtype=torch.float64) + 0.1
    expected = torch.distributions.Normal(mean, std).log_prob(x).sum(-1)
    torch.testing.assert_close(normal_log_prob(mean, std, x), expected, rtol=1e-12, atol=1e-12)


def test_a_lanes_initial_weights_are_its_own() -> None:
    together = MLP((5, 6, 7), [4, 8, 2], members=3, name="critics")
    for lane, seed in enumerate((5, 6, 7)):
        alone = MLP((seed,), [4, 8, 2], members=3, name="critics")
        for many, one in zip(together.parameters(), alone.parameters()):
            assert torch.equal(many[lane], one[0])


def test_names_seeds_and_members_keep_initial_weights_apart() -> None:
    nets = [MLP((0, 1), [4, 8, 2], members=2, name=name) for name in ("actor", "critics")]
    first = torch.stack([net.weights[0].detach().flatten(2) for net in nets]).flatten(0, 2)
    assert torch.pdist(first).min() > 0.1
    numbers = torch.cat([p.detach().flatten() for net in nets for p in net.parameters()])
    assert numbers.unique().numel() > 0.999 * numbers.numel()


def test_initialisation_does_not_touch_the_global_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    MLP((0,), [4, 8, 2])
    assert torch.equal(torch.rand(4), expected)


def test_generators_of_lanes_are_reproducible_and_differ() -> None:
    draws = [torch.rand(8, generator=g) for g in lane_generators((0, 1, 0), "x")]
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_orthogonal_layers_start_orthogonal() -> None:
    """Of every lane and member: the shorter side's vectors are orthogonal and of norm `gain`; a lane's are its own."""
    mlp, alone = MLP((1, 2), [5, 24, 16, 1], members=3), MLP((2,), [5, 24, 16, 1], members=3)
    orthogonal_(mlp, (1, 2), gain=math.sqrt(2), last=0.01)
    orthogonal_(alone, (2,), gain=math.sqrt(2), last=0.01)
    for weight, square in zip(mlp.weights, (2.0, 2.0, 1e-4)):
        tall = weight if weight.shape[-2] >= weight.shape[-1] else weight.transpose(-1, -2)
        gram = tall.transpose(-1, -2) @ tall
        torch.testing.assert_close(gram, square * torch.eye(gram.shape[-1]).expand_as(gram), rtol=0, atol=1e-5 * square)
    assert all((bias == 0).all() for bias in mlp.biases)
    assert all(torch.equal(many[1], one[0]) for many, one in zip(mlp.parameters(), alone.parameters()))
    assert not torch.equal(mlp.weights[1][0, 0], mlp.weights[1][0, 1])


# ---- ensembles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [(), (12,), (20, 16, 12)], ids=str)
def test_the_written_out_gradient_equals_automatic_differentiation(hidden: tuple[int, ...]) -> None:
    """dQ/da, and through it the second derivatives by all weights, against differentiating the plain network twice."""
    critics = Critics((1, 2), 4, 3, hidden, members=5).double()
    generator = torch.Generator().manual_seed(0)
    obs, action = (torch.randn(2, 9, n, generator=generator, dtype=torch.float64) for n in (4, 3))
    q, slope = critics.q_and_grad(obs, action)
    torch.testing.assert_close(q, critics(obs, action), rtol=1e-12, atol=1e-12)

    x = torch.cat([obs, action], -1).unsqueeze(1).expand(2, 5, 9, 7).flatten(0, 1).requires_grad_()
    plain = relu_mlp_reference(x, [p.flatten(0, 1) for p in critics.mlp.layers])
    (expected,) = torch.autograd.grad(plain.sum(), x, create_graph=True)
    expected = expected[..., 4:].unflatten(0, (2, 5))
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-12)
    assert slope.shape == (2, 5, 9, 3)
    for mine, theirs in zip(
        torch.autograd.grad(q.sin().sum() + slope.sin().sum(), critics.mlp.layers, allow_unused=True),
        torch.autograd.grad(plain.sin().sum() + expected.sin().sum(), critics.mlp.layers, allow_unused=True),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_the_outputs_beside_the_written_out_gradient_have_one_by_the_input() -> None:
    """As the plain network's: an encoder before the critics learns by it. The gradient itself is constant in the input."""
    critics = Critics((1, 2), 4, 3, (20, 16), members=5).double()
    generator = torch.Generator().manual_seed(0)
    obs, action = (torch.randn(2, 9, n, generator=generator, dtype=torch.float64) for n in (4, 3))
    q, slope = critics.q_and_grad(obs.requires_grad_(), action)
    (mine,) = torch.autograd.grad(q.sin().sum() + slope.sin().sum(), obs)
    (expected,) = torch.autograd.grad(critics(obs, action).sin().sum(), obs)
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def test_many_actions_are_judged_as_one_by_one() -> None:
    critics = Critics((1, 2), 4, 3, (8,), members=2).double()
    obs, actions = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(2, 5, 6, 3, dtype=torch.float64)
    expected = torch.stack([critics(obs, actions[:, :, i]) for i in range(6)], -1)
    torch.testing.assert_close(critics.q_of_actions(obs, actions), expected, rtol=1e-12, atol=1e-12)


# ---- squashed Gaussians ---------------------------------------------------------------------------------------


def squashed(seed: int = 0, spread: float = 1.0, low: float = -1.0, high: float = 1.0) -> TanhGaussian:
    generator = torch.Generator().manual_seed(seed)
    mean, log_std = (torch.randn(2, 7, 3, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    return TanhGaussian(mean, log_std.clamp(-3, 1), low, high)


def test_the_squashed_density_equals_pytorchs() -> None:
    """Value and gradient, by the sample and by an action, against `TransformedDistribution`."""
    pi = squashed()
    mean, log_std = pi.mean.requires_grad_(), pi.log_std.requires_grad_()
    noise = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    action, log_pi = pi.sample(noise)
    normal = torch.distributions.Normal(mean, log_std.exp())
    plain = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform(cache_size=1))
    expected = plain.log_prob((mean + log_std.exp() * noise).tanh()).sum(-1)
    torch.testing.assert_close(log_pi, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pi.log_prob(action), expected, rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(
        torch.autograd.grad(log_pi.sum(), (mean, log_std)), torch.autograd.grad(expected.sum(), (mean, log_std))
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.4, 2.0)])
def test_the_squashed_density_is_one(low: float, high: float) -> None:
    """Integrated over the box, and its first two moments, by a fine grid in one dimension."""
    pi = TanhGaussian(torch.tensor([0.7], dtype=torch.float64), torch.tensor([-0.5], dtype=torch.float64), low, high)
    u = torch.linspace(-6, 6, 400_001, dtype=torch.float64)
    grid = (high - low) / 2 * u.tanh() + (high + low) / 2
    density = pi.log_prob(grid.unsqueeze(-1)).exp()
    total, mean, square = (torch.trapezoid(density * f, grid).item() for f in (grid**0, grid, grid**2))
    assert total == pytest.approx(1, abs=1e-6)
    middle, deviation = pi.moments()
    assert middle.item() == pytest.approx(mean, abs=1e-5)
    assert deviation.item() == pytest.approx(math.sqrt(square - mean**2), abs=1e-5)


def test_the_squashed_density_is_safe_at_the_box_edge() -> None:
    """Means of +-100 in float32: log(1 - tanh^2) is -197 there, where the plain formula has log 0."""
    pi = TanhGaussian(torch.tensor([[[100.0, -100.0]]], requires_grad=True), torch.zeros(1, 1, 2))
    action, log_pi = pi.sample(torch.zeros(1, 1, 2))
    (gradient,) = torch.autograd.grad(log_pi.sum(), pi.mean)
    assert action.flatten().tolist() == [1, -1]
    expected = -math.log(2 * math.pi) - 4 * (math.log(2) - 100)
    assert log_pi.item() == pytest.approx(expected, rel=1e-6)
    assert gradient.flatten().tolist() == [2, -2]  # of -log(1 - tanh^2 u): 2 tanh u
    assert pi.log_prob(action).isfinite().all()


def test_samples_of_a_squashed_gaussian_follow_its_law() -> None:
    """Kolmogorov and Smirnov's test against the normal law of atanh, per dimension, and the box."""
    pi = TanhGaussian(torch.tensor([[0.3, -1.0]]).double(), torch.tensor([[-0.2, 0.1]]).double(), -2.0, 3.0)
    noise = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    action, _ = pi.sample(noise)
    assert action.min() > -2
    assert action.max() < 3
    u = ((action - 0.5) / 2.5).atanh()
    for column_of_u, mean, log_std in zip(u.T, pi.mean[0], pi.log_std[0]):
        assert stats.kstest(column_of_u.numpy(), "norm", args=(mean.item(), log_std.exp().item())).pvalue > 1e-3
    assert ((action < pi.median()).double().mean(0) - 0.5).abs().max() < 0.015  # four deviations of 20,000 coin tosses


# ---- optimiser ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_lane", [False, True])
def test_adam_equals_pytorchs(per_lane: bool) -> None:
    """Fifty steps down a rugged loss in float64; with a rate per lane each lane is a separate optimiser."""
    rates = [1e-2, 3e-3, 1e-1] if per_lane else [1e-2] * 3
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 4, 5, generator=generator).double(), torch.randn(3, 4, generator=generator).double()]
    mine = [nn.Parameter(p.clone()) for p in start]
    adam = Adam(mine, torch.tensor(rates, dtype=torch.float64) if per_lane else rates[0]).double()
    theirs = [[nn.Parameter(p[lane].clone()) for p in start] for lane in range(3)]
    others = [torch.optim.Adam(lane, lr=rate) for lane, rate in zip(theirs, rates)]

    def loss(parameters: list[nn.Parameter], lead: int) -> Tensor:
        return sum((p.sin() + 0.1 * p.square()).flatten(lead).sum(-1) for p in parameters)

    for _ in range(50):
        adam.step(loss(mine, 1))
        for lane, other in zip(theirs, others):
            other.zero_grad()
            loss(lane, 0).backward()
            other.step()
    for lane in range(3):
        for many, one, origin in zip(mine, theirs[lane], start):
            torch.testing.assert_close(many[lane].detach(), one.detach(), rtol=1e-12, atol=1e-12)
            assert (one - origin[lane]).abs().min() > 0.01


def test_adam_takes_its_own_betas_and_epsilon() -> None:
    mine, theirs = (nn.Parameter(torch.ones(1, 3, dtype=torch.float64)) for _ in range(2))
    adam = Adam([mine], 0.1, betas=(0.5, 0.7), eps=1e-2).double()
    other = torch.optim.Adam([theirs], lr=0.1, betas=(0.5, 0.7), eps=1e-2)
    for _ in range(5):
        adam.step(mine.pow(4).sum(-1))
        other.zero_grad()
        theirs.pow(4).sum().backward()
        other.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("clip", [None, 0.25, [0.25, 100.0, 0.5]], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3, [0.3, 0.0, 0.1]], ids=str)
def test_decay_clipping_and_warmup_equal_pytorchs(clip: Any, weight_decay: Any) -> None:
    """Thirty steps of AdamW in float64, the last ones after the warm-up; every lane is a separate optimiser."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 4, 5, generator=generator).double(), torch.randn(3, 4, generator=generator).double()]
    mine = [nn.Parameter(p.clone()) for p in start]

    def given(value: Any) -> Any:
        return torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value

    adam = Adam(mine, 1e-2, weight_decay=given(weight_decay), clip=given(clip), warmup=20).double()
    theirs = [[nn.Parameter(p[lane].clone()) for p in start] for lane in range(3)]
    decays, clips = (value if isinstance(value, list) else [value] * 3 for value in (weight_decay, clip))
    others = [torch.optim.AdamW(lane, lr=1e-2, weight_decay=decay) for lane, decay in zip(theirs, decays)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(other, lambda n: min((n + 1) / 20, 1)) for other in others]

    def loss(parameters: list[nn.Parameter], lead: int) -> Tensor:
        return sum((p.sin() + 0.1 * p.square()).flatten(lead).sum(-1) for p in parameters)

    for _ in range(30):
        adam.step(loss(mine, 1))
        for lane, other, schedule, largest in zip(theirs, others, schedules, clips):
            other.zero_grad()
            loss(lane, 0).backward()
            if largest is not None:
                nn.utils.clip_grad_norm_(lane, largest)
            other.step()
            schedule.step()
    for lane in range(3):
        for many, one in zip(mine, theirs[lane]):
            torch.testing.assert_close(many[lane].detach(), one.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lr", [1e-2, [1e-2, 3e-3]], ids=str)
def test_cosine_decay_equals_pytorchs(lr: Any) -> None:
    """Twenty steps of Adam, and some more at a rate of zero, which change nothing."""
    rates = lr if isinstance(lr, list) else [lr, lr]
    start = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    mine, theirs = nn.Parameter(start.clone()), [nn.Parameter(lane.clone()) for lane in start]
    adam = Adam([mine], torch.tensor(lr, dtype=torch.float64) if isinstance(lr, list) else lr, decay=20).double()
    others = [torch.optim.Adam([p], lr=rate) for p, rate in zip(theirs, rates)]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(other, 20) for other in others]
    for _ in range(20):
        adam.step((mine.sin() + 0.1 * mine.square()).flatten(1).sum(-1))
        for p, other, schedule in zip(theirs, others, schedules):
            other.zero_grad()
            (p.sin() + 0.1 * p.square()).sum().backward()
            other.step()
            schedule.step()
    torch.testing.assert_close(mine.detach(), torch.stack(theirs).detach(), rtol=1e-12, atol=1e-12)
    last = mine.detach().clone()
    for _ in range(3):
        adam.step(mine.flatten(1).sum(-1))
    torch.testing.assert_close(mine.detach(), last, rtol=0, atol=1e-15)


def test_a_lanes_gradient_is_clipped_by_its_own_norm() -> None:
    """Over all tensors of the lane; what is short stays as it is."""
    gradients = [torch.ones(2, 3, 3), torch.full((2, 7), 1.0)]  # each lane's norm is 4
    gradients = [g * per_lane(torch.tensor([1.0, 1e-3]), g.ndim - 1) for g in gradients]
    long, short = ([g[lane] for g in clip_by_lane(gradients, 2.0)] for lane in (0, 1))
    assert torch.cat([g.flatten() for g in long]).norm().item() == pytest.approx(2.0)
    for clipped, own in zip(short, gradients):
        assert torch.equal(clipped, own[1])


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_adam_takes_gradients_of_any_layout(clip: float | None) -> None:
    """Products with a transposed weight have transposed gradients."""
    start = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    ends = []
    for one in (gradient, gradient.transpose(1, 2).contiguous().transpose(1, 2)):
        parameter = nn.Parameter(start.clone())
        Adam([parameter], 0.1, clip=clip).apply_gradients([one])
        ends.append(parameter.detach())
    assert torch.equal(*ends)
    assert torch.equal((ends[0] - start).sign(), -gradient.sign())


def test_adams_moments_travel_with_the_state() -> None:
    """Saved after some steps and loaded into a fresh one, it goes on as if nothing had happened."""
    first = nn.Parameter(torch.ones(2, 3))
    adam = Adam([first], 1e-2)
    for _ in range(3):
        adam.step(first.square().sum(-1))
    second = nn.Parameter(first.detach().clone())
    other = Adam([second], 1e-2)
    other.load_state_dict(adam.state_dict())
    for parameter, optimizer in ((first, adam), (second, other)):
        optimizer.step(parameter.square().sum(-1))
    assert torch.equal(first, second)


# ---- moving average -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.005, 0.3, 1.0, [0.005, 0.5]], ids=str)
def test_polyak_is_geometric(tau: float | list[float]) -> None:
    """Towards a constant network the n-th average has covered 1 - (1 - tau)^n of the way, in each lane at its rate."""
    online = MLP((0, 1), [3, 4, 2]).double()
    target = make_target(MLP((2, 3), [3, 4, 2]).double())
    start = [p.clone() for p in target.parameters()]
    rate = torch.tensor(tau, dtype=torch.float64) if isinstance(tau, list) else tau
    for _ in range(20):
        polyak(target, online, rate)
    way = 1 - (1 - torch.as_tensor(rate, dtype=torch.float64).expand(2)) ** 20
    for slow, fast, origin in zip(target.parameters(), online.parameters(), start):
        w = per_lane(way, slow.ndim - 1)
        torch.testing.assert_close(slow, origin + w * (fast.detach() - origin), rtol=1e-12, atol=1e-14)


def test_targets_are_copies_without_gradients() -> None:
    online = MLP((0,), [3, 4, 2])
    target = make_target(online)
    assert not any(p.requires_grad for p in target.parameters())
    assert all(p.requires_grad for p in online.parameters())
    with torch.no_grad():
        online.weights[0].add_(1.0)
    assert not torch.equal(target.weights[0], online.weights[0])


def test_columns_line_up_with_lanes() -> None:
    assert per_lane(2.0, 3) == 2.0
    assert per_lane(torch.tensor([1.0, 2.0]), 2).shape == (2, 1, 1)


def test_a_saturated_policys_std_is_not_zero() -> None:
    """Rounding leaves no spread of tanh there, and a density of spread 0 is infinite; its gradient stays finite too."""
    mean = torch.full((1, 1, 2), 50.0, requires_grad=True)
    middle, std = TanhGaussian(mean, torch.full((1, 1, 2), -2.0), -0.5, 2.0).moments()
    torch.testing.assert_close(middle, torch.full((1, 1, 2), 2.0))
    torch.testing.assert_close(std, torch.full((1, 1, 2), 1.25e-6))
    assert torch.autograd.grad((middle + std).sum(), mean)[0].isfinite().all()
