"""CQL's update against a plain restatement of CORL's, in float64, and its conservative term against exact integrals."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import make_toy
from plain import BOXES, Bounds, Box, batches, boxed, difference, sequential, spec_of
from torch import Tensor, nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from offrl.agents.base import Spec
from offrl.agents.cql import CQL, CQLConfig
from offrl.nets import TanhGaussian
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager, Taped
from offrl.training.runs import make_agent
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom


class Plain:
    """One seed in CORL's order: the policy runs once per sampled action, and each critic on each kind of action by itself."""

    def __init__(self, agent: CQL, random: LaneRandom) -> None:
        self.cfg, self.random, self.count, self.box = agent.cfg, random, 0, Box(agent.spec)
        self.network = sequential(agent.actor.mlp, 0)
        self.critics = [sequential(agent.critics.mlp, 0, i) for i in (0, 1)]
        self.targets = copy.deepcopy(self.critics)
        values = {"factor": 1.0, "offset": -1.0, "log_alpha": 0.0, "log_alpha_prime": 1.0}
        self.scalars = {k: nn.Parameter(torch.tensor(v, dtype=torch.float64)) for k, v in values.items()}
        self.log_alpha, self.log_alpha_prime = self.scalars["log_alpha"], self.scalars["log_alpha_prime"]
        of_actor = [*self.network.parameters(), self.scalars["factor"], self.scalars["offset"]]
        of_critics = [p for critic in self.critics for p in critic.parameters()]
        self.actor_adam = torch.optim.Adam(of_actor, lr=self.cfg.actor_lr)
        self.critic_adam = torch.optim.Adam(of_critics, lr=self.cfg.critic_lr)
        self.alpha_adam = torch.optim.Adam([self.log_alpha], lr=self.cfg.actor_lr)
        self.alpha_prime_adam = torch.optim.Adam([self.log_alpha_prime], lr=self.cfg.critic_lr)

    def law(self, s: Tensor) -> TransformedDistribution:
        mean, log_std = self.network(s).split(2, -1)
        log_std = torch.clamp(self.scalars["factor"] * log_std + self.scalars["offset"], -20, 2)
        return TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))

    def sample(self, s: Tensor, name: str, repeat: int | None = None) -> tuple[Tensor, Tensor]:
        """tanh(u) and its log-densities `[batch, (repeat)]`; the noise is the agent's of that name."""
        if repeat is not None:
            s = s.unsqueeze(1).repeat_interleave(repeat, 1)
        law = self.law(s)
        normal = law.base_dist
        noise = self.random.normal(name, normal.mean.unsqueeze(0))[0]
        u = normal.mean + normal.stddev * noise
        action = law.transforms[0](u)
        return action, law.log_prob(action).sum(-1)

    def q(self, critic: nn.Sequential, s: Tensor, a: Tensor) -> Tensor:
        """Of actions in units of half the box; the critic sees those of the environment."""
        a = self.box.centre + self.box.half * a
        if a.ndim == 3:
            s = s.unsqueeze(1).repeat_interleave(a.shape[1], 1)
        return critic(torch.cat([s, a], -1)).squeeze(-1)

    def step(self, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, not_done: Tensor) -> None:
        cfg, n = self.cfg, self.cfg.actions
        a = (a - self.box.centre) / self.box.half
        self.count += 1
        action, log_pi = self.sample(s, "policy")
        alpha = self.log_alpha.exp()
        alpha_loss = -(self.log_alpha * (log_pi - 2).detach()).mean()
        if self.count <= cfg.bc_steps:
            inverse = torch.atanh(a.clamp(-1 + 1e-6, 1 - 1e-6))
            base = self.law(s).base_dist
            value = (base.log_prob(inverse) - TanhTransform().log_abs_det_jacobian(inverse, a)).sum(-1)
            value = value - self.box.half.log().sum()  # a density of the environment's actions
        else:
            value = torch.min(*(self.q(critic, s, action) for critic in self.critics))
        actor_loss = (alpha.detach() * log_pi - value).mean()

        with torch.no_grad():
            a2, log_pi2 = self.sample(s2, "target", n if cfg.max_backup else 1)
            smaller = torch.min(*(self.q(critic, s2, a2) for critic in self.targets))
            target, best = smaller.max(1)
            if cfg.backup_entropy:
                target = target - alpha * log_pi2.gather(1, best.unsqueeze(1)).squeeze(1)
            y = r + cfg.discount * not_done * target
            chance = self.random.uniform("cql/uniform", (len(s), n, 2))[0] * 2 - 1
            current, log_current = self.sample(s, "cql/current", n)
            following, log_following = self.sample(s2, "cql/next", n)
        errors, differences = [], []
        for critic in self.critics:
            q = self.q(critic, s, a)
            errors.append(nn.functional.mse_loss(q, y))
            weighted = [
                self.q(critic, s, chance) - math.log(0.5**2),
                self.q(critic, s, following) - log_following,
                self.q(critic, s, current) - log_current,
            ]
            soft = torch.logsumexp(torch.cat(weighted, 1) / cfg.temperature, 1) * cfg.temperature
            differences.append(torch.clamp(soft - q, cfg.diff_min, math.inf).mean())
        penalties = [cfg.cql_alpha * d for d in differences]
        if cfg.lagrange:
            alpha_prime = self.log_alpha_prime.exp().clamp(0, 1e6)
            penalties = [alpha_prime * cfg.cql_alpha * (d - cfg.gap) for d in differences]
            self.minimise(self.alpha_prime_adam, -sum(penalties) / 2, keep=True)
        critic_loss = sum(errors) + sum(penalties)

        self.minimise(self.alpha_adam, alpha_loss)
        self.actor_adam.zero_grad()
        gradients = torch.autograd.grad(actor_loss, [p for g in self.actor_adam.param_groups for p in g["params"]])
        for p, gradient in zip(self.actor_adam.param_groups[0]["params"], gradients):
            p.grad = gradient
        self.actor_adam.step()
        self.minimise(self.critic_adam, critic_loss)
        for online, slow in zip(self.critics, self.targets):
            for p, p2 in zip(online.parameters(), slow.parameters()):
                p2.data = (1 - cfg.tau) * p2.data + cfg.tau * p.data

    def minimise(self, optimizer: torch.optim.Optimizer, loss: Tensor, keep: bool = False) -> None:
        """A step of what the optimiser has; alpha' is in the critics' loss as the number it was."""
        optimizer.zero_grad()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=keep)):
            p.grad = gradient
        optimizer.step()

    def distance(self, agent: CQL) -> float:
        """Largest difference of any parameter from lane 0 of the agent."""
        largest = [difference(sequential(agent.actor.mlp, 0), self.network)]
        for name, mine in self.scalars.items():
            largest.append((getattr(agent.actor if hasattr(agent.actor, name) else agent, name)[0] - mine).abs().item())
        for network, mines in ((agent.critics, self.critics), (agent.critics_target, self.targets)):
            largest += [difference(sequential(network.mlp, 0, i), mine) for i, mine in enumerate(mines)]
        return max(largest)


ANTMAZE = {"lagrange": True, "gap": 0.8, "max_backup": True, "diff_min": -200.0, "critic_hidden": (20, 16, 16)}
VARIANTS: dict[str, dict[str, Any]] = {
    "locomotion": {},
    "antmaze": ANTMAZE,
    "clipped": {"diff_min": 3.2, "temperature": 0.7},
    "entropy in the target": {"backup_entropy": True, "max_backup": True},
    "cloning first": {"bc_steps": 1},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("updates", "tolerance", "box"),
    [(1, 1e-10, (-1, 1)), (3, 1e-10, (-1, 1)), (30, 1e-8, (-1, 1)), *((3, 1e-10, box) for box in BOXES)],
)
def test_updates_equal_corls(name: str, updates: int, tolerance: float, box: Bounds) -> None:
    """Same weights, batches and noise; rounding differences grow with the updates, hence the last tolerance."""
    dataset = boxed(make_toy(512, bias=0.2, dtype=torch.float64), box)
    config = CQLConfig(hidden=(24, 16), actions=4, cql_alpha=2.0, actor_lr=1e-3, critic_lr=1e-3, **VARIANTS[name])
    agent = CQL(spec_of(dataset, (11,)), config).double()
    plain = Plain(agent, random := LaneRandom((11,)))
    for _, rows in batches(dataset, random, updates, 32):
        plain.step(*rows)
    before = plain.distance(agent)
    Eager(agent, BatchLoader([(dataset, Uniform(dataset), 1.0)], 32)).run(0, updates)
    assert plain.distance(agent) < tolerance < before


def small(**settings: Any) -> CQL:
    return CQL(Spec(3, 2, (0, 1)), CQLConfig(hidden=(8,), **settings)).double()


def test_the_log_sum_of_exponents_is_the_integral_over_actions() -> None:
    """Q(a) = 2 a_1 - 4 a_2^2: log of the mean weighted exponent against log of the exact integral over the box."""
    agent = small(actions=20_000)
    mean, log_std = torch.zeros(2, 1, 2).double(), torch.full((2, 1, 2), 0.3).double()
    policies = [TanhGaussian(mean + shift, log_std) for shift in (0.3, -0.2)]
    actions, log_density = agent.proposals(*policies)
    q = 2 * actions[..., 0] - 4 * actions[..., 1].square()
    zero = torch.zeros(2, 2, 1).double()
    difference = agent.conservative_difference(zero, q.unsqueeze(1).expand(-1, 2, -1, -1), log_density)
    exact = math.log(math.sinh(2)) + math.log(math.sqrt(math.pi / 4) * math.erf(2))
    weight = (q - log_density).exp()
    error = (weight.std(-1) / weight.mean(-1) / math.sqrt(60_000)).max().item()  # one deviation of the mean, relative
    assert error < 0.01
    torch.testing.assert_close(
        difference - math.log(60_000), torch.full_like(difference, exact), rtol=0, atol=4 * error
    )


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_the_term_is_safe_at_huge_values(size: float) -> None:
    """In float32: finite, and its gradient is a softmax over the actions less one at the data's."""
    agent = CQL(Spec(3, 2, (0,)), CQLConfig(hidden=(8,), actions=2))
    q = torch.linspace(-1, 1, 6).expand(1, 2, 5, -1).clone().mul_(size).requires_grad_()
    q_data = torch.full((1, 2, 5), size).requires_grad_()
    difference = agent.conservative_difference(q_data, q, torch.zeros(1, 5, 6))
    up, down = torch.autograd.grad(difference.sum(), (q, q_data))
    assert difference.isfinite().all()
    torch.testing.assert_close(up.sum((-2, -1)), torch.ones(1, 2))
    torch.testing.assert_close(down.sum(-1), -torch.ones(1, 2))


def test_the_multiplier_climbs_above_the_gap_and_descends_below() -> None:
    agent = CQL(Spec(3, 2, (0, 1, 2)), CQLConfig(hidden=(8,), lagrange=True, gap=torch.tensor([5.0, 5.0, 2.0])))
    before = agent.log_alpha_prime.detach().clone()
    used = agent.multiplier(torch.tensor([[6.0, 6.0], [4.0, 4.0], [4.0, 4.0]]))
    torch.testing.assert_close(used, before.exp())  # the losses see the multiplier from before its step
    assert (agent.log_alpha_prime.detach() - before).sign().tolist() == [1, -1, 1]


def test_the_term_lowers_what_the_data_lack() -> None:
    """The larger its weight, the farther uniform actions and the policy's fall behind the data's; the lanes are weights."""
    dataset = make_toy(4096)
    weights = torch.tensor([0.0, 1.0, 10.0])
    spec = Spec(3, 2, (5, 5, 5), *dataset.observation_statistics())
    agent = CQL(spec, CQLConfig(hidden=(32, 32), actions=3, cql_alpha=weights, actor_lr=1e-3, critic_lr=1e-3))
    metrics = Taped(agent, BatchLoader([(dataset, Uniform(dataset), 1.0)], 64)).run(0, 200)
    gaps = metrics["q_data"] - metrics["q_uniform"]
    assert gaps[0] < gaps[1] < gaps[2]
    assert metrics["cql_diff"][0] > metrics["cql_diff"][2]


def test_cloning_first_looks_at_no_critic() -> None:
    """Up to `bc_steps` the policy's step is the same whatever the critics say, and from then on it is not."""
    dataset = make_toy(512, dtype=torch.float64)
    pair = [small(bc_steps=3, actor_lr=1e-2) for _ in range(2)]
    with torch.no_grad():
        pair[1].critics.mlp.weights[-1].mul_(-50.0)
    engines = [Eager(agent, BatchLoader([(dataset, Uniform(dataset), 1.0)], 16)) for agent in pair]

    def policies_agree() -> bool:
        return all(torch.equal(a, b) for a, b in zip(pair[0].actor.parameters(), pair[1].actor.parameters()))

    for engine in engines:
        engine.run(0, 3)
    assert policies_agree()
    for engine in engines:
        engine.run(3, 1)
    assert not policies_agree()


def test_initial_networks() -> None:
    """Critics start orthogonal with values near zero; the policy as tanh(N(0, 1/e^2)) nearly."""
    agent = CQL(Spec(17, 6, (0, 1)))
    obs, action = torch.randn(2, 64, 17), torch.rand(2, 64, 6) * 2 - 1
    assert agent.critics(obs, action).abs().max() < 0.2
    policy = agent.actor(obs)
    assert policy.mean.abs().max() < 0.05
    torch.testing.assert_close(policy.log_std, -torch.ones_like(policy.log_std), rtol=0, atol=0.05)


def test_critics_without_hidden_layers_are_linear() -> None:
    """And not as deep as the policy: an empty list is a choice, and only null stands for `hidden`."""
    spec = Spec(3, 2)
    linear, default = (CQL(spec, CQLConfig(hidden=(8, 8), critic_hidden=widths)) for widths in ((), None))
    assert [len(agent.critics.mlp.weights) for agent in (linear, default)] == [1, 3]


def test_no_action_is_refused() -> None:
    with pytest.raises(OffrlError, match=r"agent.actions=0 should be at least 1"):
        make_agent({"_target_": "offrl.agents.cql.CQL", "actions": 0}, Spec(3, 2))
