"""Lane-batched layers of a transformer against PyTorch's, and dropout's coins. `tests/steps/test_dt.py` tests the block."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import nn

from offrl.nets import dropout
from offrl.nets.transformer import LayerNorm, Linear
from offrl.utils.random import LaneRandom


def test_layers_equal_pytorchs_lane_by_lane() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 4, generator=generator)
    linear, norm = Linear((0, 1), 4, 6, "x"), LayerNorm(2, 4)
    with torch.no_grad():
        norm.weight.add_(torch.randn(2, 4, generator=generator))
        norm.bias.add_(torch.randn(2, 4, generator=generator))
    for lane in range(2):
        expected = nn.functional.linear(x[lane], linear.weight[lane], linear.bias[lane])
        torch.testing.assert_close(linear(x)[lane], expected)
        expected = nn.functional.layer_norm(x[lane], (4,), norm.weight[lane], norm.bias[lane])
        torch.testing.assert_close(norm(x)[lane], expected)


def test_initial_weights_are_pytorchs_or_gpt2s() -> None:
    """By default the law of `nn.Linear`; with `std` normal weights and no bias; a lane's own in either case."""
    layer = Linear(range(30), 25, 40, "x")
    for numbers in (layer.weight, layer.bias):
        assert stats.kstest(numbers.detach().flatten().numpy(), "uniform", args=(-0.2, 0.4)).pvalue > 1e-4
    normal = Linear(range(30), 25, 40, "x", std=0.02)
    assert stats.kstest(normal.weight.detach().flatten().numpy(), "norm", args=(0, 0.02)).pvalue > 1e-4
    assert not normal.bias.any()
    for many, std in ((layer, None), (normal, 0.02)):
        alone = Linear((7,), 25, 40, "x", std)
        assert torch.equal(many.weight[7], alone.weight[0])
        assert torch.equal(many.bias[7], alone.bias[0])
    assert not torch.equal(Linear((0,), 25, 40, "y").weight, Linear((0,), 25, 40, "x").weight)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_dropout_zeroes_a_share_and_keeps_the_mean(rate: float) -> None:
    x = torch.ones(2, 101, 997, dtype=torch.float64)
    y = dropout(x, rate, LaneRandom((0, 1)), "coins")
    share = (y == 0).double().mean((1, 2))
    deviation = (rate * (1 - rate) / (101 * 997)) ** 0.5
    assert ((share - rate).abs() <= 5 * deviation + 2**-16).all()
    assert y.unique().numel() == (1 if rate == 0 else 2)
    assert y.max().item() == pytest.approx(1 / (1 - rate), rel=1e-3)
    zeros = (y[0] == 0).double()
    if rate:  # neighbours, which share a draw, are independent
        for step in (1, 2, 3):
            both = (zeros[:, step:] * zeros[:, :-step]).mean()
            assert both.item() == pytest.approx(rate**2, abs=0.01)


def test_coins_belong_to_lane_name_and_update() -> None:
    x = torch.ones(2, 40, 7)
    random = LaneRandom((3, 4))
    first = dropout(x, 0.5, random, "a")
    assert torch.equal(first, dropout(x, 0.5, random, "a"))
    assert torch.equal(first[1:], dropout(x[1:], 0.5, LaneRandom((4,)), "a"))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, dropout(x, 0.5, random, "b"))
    random.step.add_(1)
    assert not torch.equal(first, dropout(x, 0.5, random, "a"))


def test_rates_may_differ_between_lanes() -> None:
    x = torch.randn(3, 40, 7)
    random = LaneRandom((3, 4, 5))
    rates = [0.0, 0.1, 0.7]
    together = dropout(x, torch.tensor(rates), random, "a")
    for lane, rate in enumerate(rates):
        torch.testing.assert_close(together[lane], dropout(x, rate, random, "a")[lane])
