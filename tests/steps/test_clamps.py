"""Bounds that are there for the rare case, where they bind: log deviations, multipliers, steps beyond the horizon.

The bounds are the authors': CORL's actors, the VAE of ltlhuuu/A2PR, [-5, 2] for our own latents and their policies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain import make_store
from torch import Tensor

from offrl.agents.a2pr import A2PR
from offrl.agents.awac import AWAC
from offrl.agents.base import Spec
from offrl.agents.cql import CQL
from offrl.agents.doc import DoC
from offrl.agents.edac import EDAC
from offrl.agents.iql import IQL
from offrl.agents.rvs import RvS
from offrl.agents.sac_n import SACN
from offrl.agents.vae_bc import VAEBC
from offrl.nets.latents import Gaussian
from offrl.utils.random import LaneRandom

OBS, ACTION = torch.zeros(1, 5, 3).double(), torch.zeros(1, 5, 2).double()
SMALL: dict[Any, dict[str, Any]] = {SACN: {"members": 2}, EDAC: {"members": 2}, A2PR: {"vae_hidden": (8,)}}


def make(cls: Any, **settings: Any) -> Any:
    return cls(Spec(3, 2), cls.Config(**{"hidden": (8,), **SMALL.get(cls, {}), **settings})).double()


# The network that says log sigma, what is read of it, what is added to it at first, and its bounds.
SAID: list[tuple[Any, Callable[[Any], Any], Callable[[Any], Tensor], float, tuple[float, float]]] = [
    (SACN, lambda agent: agent.actor.mlp, lambda agent: agent.actor(OBS).log_std, 0.0, (-5, 2)),
    (EDAC, lambda agent: agent.actor.mlp, lambda agent: agent.actor(OBS).log_std, 0.0, (-5, 2)),
    (CQL, lambda agent: agent.actor.mlp, lambda agent: agent.actor(OBS).log_std, -1.0, (-20, 2)),
    (A2PR, lambda agent: agent.vae.encoder, lambda agent: agent.vae.encode(OBS, ACTION)[1], 0.0, (-4, 15)),
]


@pytest.mark.parametrize(("cls", "network", "read", "offset", "bounds"), SAID, ids=[cls.__name__ for cls, *_ in SAID])
@pytest.mark.parametrize("beyond", [0.5, 50.0])
def test_log_deviations_of_a_network_stay_between_their_bounds(
    cls: Any, network: Any, read: Any, offset: float, bounds: tuple[float, float], beyond: float
) -> None:
    """One below and one above is a bound, without a gradient; one between them is as the network says."""
    agent = make(cls)
    last = network(agent)
    middle = sum(bounds) / 2 + 0.1
    for said, expected in ((bounds[0] - beyond, bounds[0]), (middle, middle), (bounds[1] + beyond, bounds[1])):
        with torch.no_grad():
            last.weights[-1].zero_()
            last.biases[-1].fill_(said - offset)
        found = read(agent)
        torch.testing.assert_close(found, torch.full_like(found, expected))
        (gradient,) = torch.autograd.grad(found.sum(), last.biases[-1])
        assert gradient.any() == (said == expected)


@pytest.mark.parametrize(
    ("cls", "bounds"), [(IQL, (-20, 2)), (AWAC, (-20, 2)), (RvS, (-20, 2)), (VAEBC, (-5, 2)), (DoC, (-5, 2))]
)
@pytest.mark.parametrize("beyond", [0.5, 50.0])
def test_learnt_log_deviations_stay_between_their_bounds(cls: Any, bounds: tuple[float, float], beyond: float) -> None:
    agent = make(cls)
    actor = agent.policy if cls in (VAEBC, DoC) else agent.actor
    told = torch.zeros(1, 5, actor.mlp.weights[0].shape[-1]).double()
    for said, expected in ((bounds[0] - beyond, bounds[0]), (-1.0, -1.0), (bounds[1] + beyond, bounds[1])):
        with torch.no_grad():
            actor.log_std.fill_(said)
        _, std = actor(told)
        torch.testing.assert_close(std.log(), torch.full_like(std, expected))
        (gradient,) = torch.autograd.grad(std.sum(), actor.log_std)
        assert gradient.any() == (said == expected)


def test_latents_log_deviations_stay_between_their_bounds() -> None:
    """In what is drawn, and in divergences: of N(0, e^-5) and N(0, e^2) it is -log ratio + (ratio^2 - 1) / 2."""
    latent = Gaussian(2)
    low, high = (torch.tensor([0.0, 0.0, x, x]).double().expand(1, 40_000, 4) for x in (-70.0, 9.0))
    random = LaneRandom((0,))
    noise = random.normal("z", low[..., :2])
    for outputs, bound in ((low, -5.0), (high, 2.0)):
        z = latent.sample(outputs, random, "z")
        torch.testing.assert_close(z, torch.tensor(bound).double().exp() * noise)
    narrow = latent.divergence(low[:, :1], high[:, :1])
    expected = 2 * (7 + 0.5 * (torch.tensor(-14.0).double().exp() - 1))
    torch.testing.assert_close(narrow, expected.view(1, 1))


def test_the_multiplier_of_the_conservative_term_has_a_largest_value() -> None:
    """CQL: 1e6, above which it is used as that and does not climb further, whatever the difference."""
    agent = make(CQL, lagrange=True)
    with torch.no_grad():
        agent.log_alpha_prime.fill_(20.0)
    used = agent.multiplier(torch.full((1, 2), 100.0).double())
    torch.testing.assert_close(used, torch.tensor([1e6]).double())
    assert agent.log_alpha_prime.item() == 20


def test_beyond_the_longest_episode_one_step_is_left() -> None:
    """RvS conditions on R / max(H - t, 1): acting may last longer than any episode of the data."""
    dataset = make_store()
    agent = make(RvS)
    agent.setup(dataset)
    goals = [agent.goal(torch.full((1, 1), 6.0).double(), t).item() for t in (0, 9, 10, 11, 12, 50)]
    assert goals == pytest.approx([6 / 11, 3, 6, 6, 6, 6])
