"""EDAC's update against a plain restatement of CORL's, in float64, and its term against automatic differentiation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import make_toy
from plain import BOXES, Bounds, spec_of
from test_sac_n import Plain, compare, toy
from torch import Tensor

from offrl.agents.base import Spec
from offrl.agents.edac import EDAC, EDACConfig
from offrl.agents.sac_n import SACN, SACNConfig
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager, Taped
from offrl.training.runs import make_agent
from offrl.utils.errors import OffrlError


class PlainEDAC(Plain):
    """SAC-N's restatement with the term of every pair of critics, each gradient differentiated a second time."""

    def critic_loss(self, s: Tensor, a: Tensor, y: Tensor) -> Tensor:
        directions = []
        for critic in self.critics:
            action = a.clone().requires_grad_()
            value = critic(torch.cat([s, action], 1)).sum()
            (slope,) = torch.autograd.grad(value, action, create_graph=True)
            directions.append(slope / (slope.norm(dim=1, keepdim=True) + 1e-10))
        pairs = itertools.permutations(directions, 2)
        term = sum((g * h).sum(1).mean() for g, h in pairs) / (len(directions) - 1)
        return super().critic_loss(s, a, y) + self.cfg.eta * term


PLAIN = [(2, 1.0, 1, 1e-10), (4, 1.0, 1, 1e-10), (4, 5.0, 2, 1e-10), (4, 1.0, 50, 1e-8)]


@pytest.mark.parametrize(
    ("members", "eta", "updates", "tolerance", "box"),
    [*((*case, (-1, 1)) for case in PLAIN), *((4, 1.0, 3, 1e-10, box) for box in BOXES)],
)
def test_updates_equal_corls(members: int, eta: float, updates: int, tolerance: float, box: Bounds) -> None:
    """Same weights, batches and noise; rounding differences grow with the updates, hence the second tolerance."""
    config = EDACConfig(members=members, eta=eta, hidden=(24, 16, 12), critic_lr=1e-3)
    agent = EDAC(spec_of(toy(box), (11,)), config).double()
    before, after = compare(agent, PlainEDAC, updates, box)
    assert after < tolerance < before


def test_without_weight_it_is_sac_n() -> None:
    dataset = make_toy(512, dtype=torch.float64)
    with_term = EDAC(Spec(3, 2, (4,)), EDACConfig(members=3, eta=0.0, hidden=(8, 8))).double()
    without = SACN(Spec(3, 2, (4,)), SACNConfig(members=3, hidden=(8, 8))).double()
    for agent in (with_term, without):
        Eager(agent, BatchLoader([(dataset, Uniform(dataset), 1.0)], 16)).run(0, 5)
    for mine, other in zip(with_term.parameters(), without.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_the_term_of_known_gradients() -> None:
    """All alike: N; N = 2, opposed: -2; in the corners of a regular simplex: -N / (N - 1), the least there is."""
    angles = torch.arange(3) * 2 * math.pi / 3
    simplex = torch.stack([angles.cos(), angles.sin()], -1).double()
    cases = [
        (torch.ones(5, 3).double(), 5.0),
        (torch.tensor([[2.0, 1.0], [-6.0, -3.0]]).double(), -2.0),
        (simplex, -1.5),
    ]
    for slopes, expected in cases:
        agent = EDAC(Spec(3, 2, (0, 1)), EDACConfig(members=len(slopes), hidden=(8,)))
        slope = slopes.unsqueeze(1).expand(2, -1, 7, -1).reshape(2, len(slopes), 7, -1)
        torch.testing.assert_close(agent.similarity(slope), torch.full((2,), expected, dtype=torch.float64))


def test_the_term_drives_the_gradients_apart() -> None:
    """After the same updates from the same weights the critics' gradients differ more, the larger eta is; lanes may differ."""
    dataset = make_toy(4096)
    config = EDACConfig(members=4, eta=torch.tensor([0.0, 0.1, 10.0]), hidden=(32, 32), critic_lr=1e-3)
    agent = EDAC(Spec(3, 2, (5, 5, 5)), config)
    metrics = Taped(agent, BatchLoader([(dataset, Uniform(dataset), 1.0)], 64)).run(0, 300)
    cosine = metrics["cosine"].tolist()
    assert cosine[0] > cosine[1] + 0.3 > cosine[2] + 0.4
    assert cosine[2] > -1 / 3 - 1e-6  # the least mean cosine of four vectors


def test_a_single_critic_is_refused() -> None:
    with pytest.raises(OffrlError, match=r"agent.members=1 should be at least 2"):
        make_agent({"_target_": "offrl.agents.edac.EDAC", "members": 1}, Spec(3, 2))
