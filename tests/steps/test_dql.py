"""Diffusion-QL's update against a plain restatement in float64; its moving average, its coin and its choice of actions."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from plain import BOXES, Bounds, Box, SmoothMLP, boxed, difference, drawn, make_store, spec_of
from torch import Tensor, nn

from offrl.agents.base import Spec
from offrl.agents.dql import DQL
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager
from offrl.utils.random import LaneRandom

BATCH = 16


class Chain(nn.Module):
    """The denoising policy of one lane, as Ho et al. and the authors' helpers define it, t = 1 ... T."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.time, self.net = SmoothMLP(policy.time), SmoothMLP(policy.mlp)
        self.steps, self.half = policy.steps, policy.time_dim // 2
        self.alpha = [
            math.exp(-0.1 / self.steps - 4.95 * (2 * t - 1) / self.steps**2) for t in range(1, self.steps + 1)
        ]
        self.abar = [math.prod(self.alpha[:t]) for t in range(self.steps + 1)]  # abar_0 = 1

    def eps(self, s: Tensor, x: Tensor, t: Tensor) -> Tensor:
        frequency = torch.tensor([10_000 ** (-i / (self.half - 1)) for i in range(self.half)], dtype=torch.float64)
        angle = (t - 1).double().unsqueeze(1) * frequency
        return self.net(torch.cat([x, self.time(torch.cat([angle.sin(), angle.cos()], 1)), s], 1))

    def loss(self, s: Tensor, a: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        abar = torch.tensor([self.abar[int(i)] for i in t]).double().unsqueeze(1)
        return ((self.eps(s, abar.sqrt() * a + (1 - abar).sqrt() * eps, t) - eps) ** 2).mean()

    def sample(self, s: Tensor, noise: list[Tensor]) -> Tensor:
        """From x_T = noise[0] by q(x_{t-1} | x_t, x_0), with noise[1], noise[2], ... but at the last step."""
        x = noise[0]
        for i, t in enumerate(range(self.steps, 0, -1)):
            abar, before, beta = self.abar[t], self.abar[t - 1], 1 - self.alpha[t - 1]
            eps = self.eps(s, x, torch.full((len(s),), t))
            x0 = torch.clip((x - math.sqrt(1 - abar) * eps) / math.sqrt(abar), -1, 1)
            mean = (beta * math.sqrt(before) * x0 + (1 - before) * math.sqrt(1 - beta) * x) / (1 - abar)
            x = mean if t == 1 else mean + math.sqrt(beta * (1 - before) / (1 - abar)) * noise[i + 1]
        return torch.clip(x, -1, 1)


class Plain:
    """One seed in the authors' order, with ordinary modules, optimisers, clipping and schedules."""

    def __init__(self, agent: DQL) -> None:
        cfg = self.cfg = agent.cfg
        self.box, self.step_count = Box(agent.spec), 0
        self.policy = Chain(agent.policy)
        self.critics = nn.ModuleList(SmoothMLP(agent.critics.mlp, 0, i) for i in (0, 1))
        self.average, self.critics_target = copy.deepcopy(self.policy), copy.deepcopy(self.critics)
        self.parts = [(self.critics, cfg.critic_lr), (self.policy, cfg.actor_lr)]
        self.adams = [torch.optim.Adam(part.parameters(), lr) for part, lr in self.parts]
        self.schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(adam, cfg.lr_decay) for adam in self.adams]

    def minimise(self, which: int, loss: Tensor) -> None:
        self.adams[which].zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parts[which][0].parameters(), self.cfg.grad_clip)
        self.adams[which].step()
        self.schedules[which].step()

    def q(self, critics: nn.ModuleList, s: Tensor, unit: Tensor) -> list[Tensor]:
        return [critic(torch.cat([s, self.box.centre + self.box.half * unit], 1))[:, 0] for critic in critics]

    def step(self, rows: dict[str, Tensor], z: dict[str, list[Tensor]], eps: Tensor, t: Tensor, coin: float) -> None:
        cfg, s = self.cfg, rows["s"]
        n = cfg.backup_actions if cfg.max_backup else 1
        many = rows["s2"].repeat_interleave(n, 0)
        with torch.no_grad():
            q = self.q(self.critics_target, many, self.average.sample(many, z["target_action"]))
            best = torch.minimum(*(values.view(BATCH, n).max(1).values for values in q))
            y = rows["r"] + cfg.discount * (1 - rows["d"]) * best
        unit = (rows["a"] - self.box.centre) / self.box.half
        self.minimise(0, sum(((q - y) ** 2).mean() for q in self.q(self.critics, s, unit)))

        q1, q2 = self.q(self.critics, s, self.policy.sample(s, z["new_action"]))
        q_loss = -q1.mean() / q2.abs().mean().detach() if coin > 0.5 else -q2.mean() / q1.abs().mean().detach()
        self.minimise(1, self.policy.loss(s, unit, eps, t) + cfg.eta * q_loss)

        if self.step_count % cfg.ema_every == 0 and self.step_count >= cfg.ema_start:
            for slow, fast in zip(self.average.parameters(), self.policy.parameters()):
                slow.data = (1 - cfg.ema_tau) * slow.data + cfg.ema_tau * fast.data
        for slow, fast in zip(self.critics_target.parameters(), self.critics.parameters()):
            slow.data = cfg.tau * fast.data + (1 - cfg.tau) * slow.data
        self.step_count += 1

    def distance(self, agent: DQL) -> float:
        pairs: list[Any] = [(Chain(agent.policy), self.policy), (Chain(agent.policy_average), self.average)]
        for theirs, mine in ((agent.critics, self.critics), (agent.critics_target, self.critics_target)):
            pairs += [(SmoothMLP(theirs.mlp, 0, i), mine[i]) for i in (0, 1)]
        return max(difference(*pair) for pair in pairs)


def noise(agent: DQL, random: LaneRandom, name: str, n: int) -> list[Tensor]:
    """The chain's noises, each `[batch * n, A]`, x_T first."""
    width = agent.cfg.denoising_steps * agent.spec.action_dim
    drawn = random.normal(name, torch.empty(1, BATCH, n, width, dtype=torch.float64))[0]
    return list(drawn.view(BATCH * n, agent.cfg.denoising_steps, -1).unbind(1))


# The gradient is clipped in all of them but for grad_clip=100; lr_decay is so short that the rate halves.
CASES: list[dict[str, Any]] = [
    {"ema_start": 4, "ema_every": 3, "ema_tau": 0.3},
    {"max_backup": True, "backup_actions": 3, "eta": 2.5, "grad_clip": 0.05, "ema_start": 0},
    {"grad_clip": 100.0, "lr_decay": 20, "actor_lr": 1e-3, "denoising_steps": 3, "discount": 0.9},
]


@pytest.mark.parametrize(("settings", "box"), list(zip(CASES, [(-1.0, 1.0), BOXES[-1], BOXES[1]])), ids=str)
def test_updates_equal_the_authors(settings: dict[str, Any], box: Bounds) -> None:
    updates, store = 10, boxed(make_store(), box)
    agent = DQL(spec_of(store, (11,)), DQL.Config(hidden=(24, 16), **settings)).double()
    plain, coins = Plain(agent), []
    for _, rows in drawn(store, random := LaneRandom((11,)), updates, BATCH):
        names = {"s": "observations", "a": "actions", "r": "rewards", "s2": "next_observations", "d": "terminations"}
        batch = {short: getattr(store, name)[rows].double() for short, name in names.items()}
        counts = {"target_action": agent.cfg.backup_actions if agent.cfg.max_backup else 1, "new_action": 1}
        z = {name: noise(agent, random, name, n) for name, n in counts.items()}
        eps = random.normal("denoising/eps", batch["a"].unsqueeze(0))[0]
        t = random.integers("denoising/t", agent.cfg.denoising_steps, (BATCH, 1))[0, :, 0] + 1
        coins.append(random.uniform("coin", (1,)).item())
        plain.step(batch, z, eps, t, coins[-1])
    assert min(coins) < 0.5 < max(coins)
    before = plain.distance(agent)
    Eager(agent, BatchLoader([(store, Uniform(store), 1.0)], BATCH)).run(0, updates)
    # Looser than elsewhere: Adam divides a vanishing gradient, here one through the whole chain, by 1e-8.
    assert plain.distance(agent) < 1e-9 < before


def test_the_published_schedule_hardly_decays() -> None:
    """2,000 epochs of 1,000 updates, a cosine of 2,000 steps of which 40 are made: (1 + cos(pi 40 / 2000)) / 2 = 0.999."""
    agent = DQL(Spec(3, 2, (0,)), DQL.Config(hidden=(8,), lr_decay=100_000_000, actor_lr=1.0, grad_clip=1e9))
    agent.actor_optimizer.count.fill_(2_000_000)
    before = [p.detach().clone() for p in agent.policy.parameters()]
    for name, buffer in agent.actor_optimizer.named_buffers():
        if name.startswith(("mean", "square")):
            buffer.fill_(1.0)  # so that Adam's step is the rate
    agent.actor_optimizer.apply_gradients([torch.ones_like(p) for p in before])
    step = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, agent.policy.parameters())])
    torch.testing.assert_close(step, torch.full_like(step, 0.99901), rtol=0, atol=2e-5)


def test_the_average_waits_and_moves_every_fifth_update() -> None:
    agent = DQL(Spec(3, 2, (0,)), DQL.Config(hidden=(8,)))
    moves = [step for step in range(1021) if agent.phase(step)]
    assert moves == [1000, 1005, 1010, 1015, 1020]


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_the_policys_gradient_does_not_depend_on_the_scale_of_q(scale: float) -> None:
    store = make_store()
    agent = DQL(spec_of(store, (3,)), DQL.Config(hidden=(16,))).double()
    batch = agent.prepare(store.transitions(torch.arange(20).unsqueeze(0)))
    networks = list(agent.policy.parameters())
    plain = torch.autograd.grad(agent.policy_loss(batch)[0].sum(), networks)
    with torch.no_grad():
        for p in (agent.critics.mlp.weights[-1], agent.critics.mlp.biases[-1]):
            p.mul_(scale)
    torch.testing.assert_close(torch.autograd.grad(agent.policy_loss(batch)[0].sum(), networks), plain)


def test_no_gradient_of_q_reaches_the_critics() -> None:
    store = make_store()
    agent = DQL(spec_of(store, (3,)), DQL.Config(hidden=(16,))).double()
    batch = agent.prepare(store.transitions(torch.arange(20).unsqueeze(0)))
    others = [*agent.critics.parameters(), *agent.policy_average.parameters()]
    for p in others:
        p.requires_grad_(True)
    gradients = torch.autograd.grad(agent.policy_loss(batch)[0].sum(), others, allow_unused=True)
    assert all(g is None for g in gradients)


def test_acting_draws_candidates_by_the_softmax_of_the_target_critics() -> None:
    """4,000 episodes in one state with their own candidates: the shares of ranks follow the mean softmax (chi-square)."""
    agent = DQL(Spec(3, 2, (4,)), DQL.Config(hidden=(16,), candidates=3)).double()
    with torch.no_grad():  # so that the critics disagree about actions by about 1
        agent.critics_target.mlp.weights[-1].mul_(20)
    envs = 4000
    obs, state = torch.ones(1, envs, 3).double(), agent.initial_state(envs)
    actions = agent.sample(agent.policy, obs, agent.candidate_noise(obs, state, 3, agent.policy.noise_dim))
    chosen = agent.act(obs, state)
    q = torch.stack([agent.critics_target(obs, actions[:, :, i]).min(1).values[0] for i in range(3)], 1)
    probability = (q - q.max(1, keepdim=True).values).exp()
    probability = (probability / probability.sum(1, keepdim=True)).sort(1).values
    hit = (actions[0] == chosen[0].unsqueeze(1)).all(-1)  # [envs, 3]
    assert hit.any(1).all()
    hit = hit / hit.sum(1, keepdim=True)  # candidates may lie in the same corner of the box
    counts = hit.gather(1, q.argsort(1)).sum(0)  # of the worst candidate, the middle one, the best one
    expected = probability.sum(0)
    assert (expected - envs / 3).abs().min() > 30  # no uniform draw
    assert ((counts - expected) ** 2 / expected).sum() < 13.8  # 99.9 % of two degrees of freedom
    torch.testing.assert_close(agent.act(obs[:, :7], state), chosen[:, :7])  # whatever the number of episodes beside it


def test_without_a_state_the_best_candidate_acts() -> None:
    agent = DQL(Spec(3, 2, (4, 9)), DQL.Config(hidden=(16,), candidates=20)).double()
    obs = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    actions = agent.sample(agent.policy, obs, agent.candidate_noise(obs, None, 20, agent.policy.noise_dim))
    best = agent.critics_target.q_of_actions(obs, actions).amin(1).argmax(-1)
    expected = torch.stack([torch.stack([actions[i, j, best[i, j]] for j in range(5)]) for i in range(2)])
    torch.testing.assert_close(agent.act(obs), expected, rtol=0, atol=0)
