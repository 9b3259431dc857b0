"""VAE-BC's and DoC's updates against a plain restatement in float64; who gets which gradient; bandits with known optima."""

from __future__ import annotations

import copy
import math
from itertools import chain
from typing import Any

import pytest
import torch
from plain import BOXES, Bounds, Box, boxed, difference, make_store, sequential
from test_esper import make_gamble
from test_rvs import make_agent as make_rvs
from test_rvs import make_bandit
from torch import Tensor, nn

from offrl.agents.base import Batch, Spec
from offrl.agents.doc import DoC
from offrl.agents.vae_bc import VAEBC
from offrl.data.dataset import OfflineDataset
from offrl.datasets import load
from offrl.evaluation.evaluator import Evaluator
from offrl.evaluation.probes import label_leakage, reward_and_state
from offrl.forge import registry as forge
from offrl.nets.contrastive import gradient_reversal, info_nce
from offrl.nets.latents import Categorical, Gaussian
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Taped
from offrl.training.runs import make_agent as from_settings
from offrl.utils.random import LaneRandom

SMALL: dict[str, Any] = {"hidden": (12, 12), "latent_size": 3, "suffix": 4, "lr": 1e-2, "normalize_obs": False}
ROWS = [0, 5, 7, 8, 12, 20]  # starts, middles and last steps of episodes of 7, 1, 3 and 11 steps


def make_agent(cls: Any, store: OfflineDataset, seeds: tuple[int, ...] = (0,), **settings: Any) -> Any:
    box = {"action_low": store.info.action_low, "action_high": store.info.action_high}
    spec = Spec(store.obs_dim, store.action_dim, seeds, discrete=bool(store.info.discrete), **box)
    agent = cls(spec, cls.Config(**{**SMALL, **settings})).to(store.rewards.dtype)
    agent.setup(store)
    return agent


def windows(agent: Any, store: OfflineDataset, rows: list[int] = ROWS) -> Batch:
    index = torch.tensor(rows).expand(agent.spec.lanes, -1)
    return agent.prepare(store.windows(index, agent.cfg.suffix, agent.batch_fields))


# ---- the update -----------------------------------------------------------------------------------------------


class Plain:
    """One lane, window by window and step by step, from ordinary layers and optimisers."""

    def __init__(self, agent: Any, store: OfflineDataset) -> None:
        self.agent, self.cfg, self.store, self.discrete = agent, agent.cfg, store, agent.spec.discrete
        self.box = Box(agent.spec)
        actor = agent.policy if self.discrete else agent.policy.mlp
        names = ("embed", "posterior_head", "prior", "value")
        self.nets = {n: sequential(getattr(agent, n), 0) for n in names} | {"policy": sequential(actor, 0)}
        self.log_std = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        learnt = [p for net in self.nets.values() for p in net.parameters()]
        self.learnt = learnt if self.discrete else [*learnt, self.log_std]
        self.adam = torch.optim.AdamW(self.learnt, self.cfg.lr, weight_decay=self.cfg.weight_decay)
        self.energies: dict[str, nn.Sequential] = {}
        if isinstance(agent, DoC):
            for name in ("energy_base", "energy"):
                for part in ("phi", "psi"):
                    self.energies[f"{name}/{part}"] = sequential(getattr(getattr(agent, name), part), 0)
            parameters = chain.from_iterable(net.parameters() for net in self.energies.values())
            self.energy_adam = torch.optim.Adam(parameters, self.cfg.energy_lr)
        self.updates = 0

    def episode(self, row: int) -> tuple[int, int]:
        """First row of the window's episode, and the row behind the window."""
        offsets, episode = self.store.offsets, int(self.store.episode_of_row[row])
        return int(offsets[episode]), min(row + self.cfg.suffix, int(offsets[episode + 1]))

    def state(self, row: int) -> Tensor:
        return torch.cat(
            [self.store.observations[row], torch.tensor([(row - self.episode(row)[0]) / 11], dtype=torch.float64)]
        )

    def action(self, row: int) -> Tensor:
        action = self.store.actions[row]
        return nn.functional.one_hot(action, 3).double() if self.discrete else action

    def reward(self, row: int) -> Tensor:
        return (self.store.rewards[row] / (self.store.rewards.std(correction=0) + 1e-6)).view(1)

    def posterior(self, row: int) -> Tensor:
        steps = range(row, self.episode(row)[1])
        tokens = [torch.cat([self.state(i), self.action(i), self.reward(i)]) for i in steps]
        return self.nets["posterior_head"](torch.stack([self.nets["embed"](x).relu() for x in tokens]).mean(0))

    def distribution(self, outputs: Tensor) -> Any:
        if self.cfg.latent == "categorical":
            return torch.distributions.Categorical(logits=outputs)
        mean, log_std = outputs.chunk(2)
        return torch.distributions.Normal(mean, log_std.exp())

    def latent(self, q: Any, noise: Tensor) -> Tensor:
        """A sample by the given normals, or by the given number in [0, 1)."""
        if self.cfg.latent == "gaussian":
            return q.mean + q.stddev * noise
        kind = int((q.probs.detach().cumsum(0)[:-1] <= noise).sum())
        return torch.eye(3, dtype=torch.float64)[kind] + q.probs - q.probs.detach()

    def divergence(self, q: Tensor, p: Tensor) -> Tensor:
        return torch.distributions.kl_divergence(self.distribution(q), self.distribution(p)).sum()

    def step(self, rows: list[int], noise: list[Tensor], picks: list[list[float]]) -> dict[str, float]:
        """One update.

        Args:
            noise: of each window's latent.
            picks: for every update of the energies in turn, where in each window its step lies, in [0, 1).
        """
        self.updates += 1
        q = [self.posterior(row) for row in rows]
        z = [self.latent(self.distribution(x), e) for x, e in zip(q, noise)]
        if self.energies:
            for pick in picks[:-1]:
                self.energy_adam.zero_grad()
                sum(self.contrasts(rows, [x.detach() for x in z], pick)).backward()
                self.energy_adam.step()
        steps = [(row, i, x) for row, x in zip(rows, z) for i in range(row, self.episode(row)[1])]
        losses = {"action_loss": torch.stack([self.imitation(i, x) for _, i, x in steps]).mean()}
        returns = self.store.return_to_go
        keep = (lambda x: x.detach()) if self.energies else (lambda x: x)
        errors, divergences = [], []
        for row, x, y in zip(rows, z, q):
            target = (returns[row] - returns.mean()) / (returns.std(correction=0) + 1e-6)
            errors.append((self.nets["value"](torch.cat([self.state(row), keep(x)])) - target).square().sum())
            divergences.append(self.divergence(keep(y), self.nets["prior"](self.state(row))))
        losses["value_loss"] = torch.stack(errors).mean()
        losses["prior_loss"] = self.cfg.kl_weight * torch.stack(divergences).sum() / len(steps)
        total = sum(losses.values())
        if self.energies:
            beta = self.cfg.beta * min(1, (self.updates - 1) / self.cfg.beta_warmup)
            base, constraint = self.contrasts(rows, [x.detach() - beta * (x - x.detach()) for x in z], picks[-1])
            total = total + base + constraint
            losses |= {"contrastive_loss": constraint, "information": base - constraint}
            self.energy_adam.zero_grad()
            if self.cfg.posterior_kl_weight:
                divergences = [self.divergence(y, self.nets["prior"](self.state(r)).detach()) for r, y in zip(rows, q)]
                losses["posterior_kl"] = self.cfg.posterior_kl_weight * torch.stack(divergences).sum() / len(steps)
                total = total + losses["posterior_kl"]
        self.adam.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.learnt, self.cfg.grad_clip)
        self.adam.step()
        if self.energies:
            self.energy_adam.step()
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def imitation(self, i: int, z: Tensor) -> Tensor:
        out = self.nets["policy"](torch.cat([self.state(i), z]))
        if self.discrete:
            return nn.functional.cross_entropy(out, self.store.actions[i])
        policy = torch.distributions.Normal(self.box.squash(out), self.log_std.exp() * self.box.half)
        return -policy.log_prob(self.store.actions[i]).sum()

    def contrasts(self, rows: list[int], z: list[Tensor], pick: list[float]) -> list[Tensor]:
        chosen = [row + int(u * (self.episode(row)[1] - row)) for row, u in zip(rows, pick)]
        known = [torch.cat([self.state(i), self.action(i)]) for i in chosen]
        outcomes = [torch.cat([self.reward(i), self.store.next_observations[i]]) for i in chosen]
        losses: list[list[Tensor]] = [[], []]
        for i, context in enumerate(known):
            base, full = [], []
            for outcome in outcomes:
                pair = {n: net(outcome) for n, net in self.energies.items() if n.endswith("psi")}
                f0 = self.energies["energy_base/phi"](context) @ pair["energy_base/psi"] / 8
                f1 = self.energies["energy/phi"](torch.cat([context, z[i]])) @ pair["energy/psi"] / 8
                base.append(f0)
                full.append(f0.detach() + f1)
            for mine, energies in zip(losses, (base, full)):
                mine.append(torch.stack(energies).exp().mean().log() - energies[i])
        return [torch.stack(mine).mean() for mine in losses]

    def distance(self) -> float:
        agent, pairs = self.agent, []
        for name, net in self.nets.items():
            mlp = getattr(agent, name)
            pairs.append((net, sequential(mlp if name != "policy" or self.discrete else mlp.mlp, 0)))
        for name, net in self.energies.items():
            energy, part = name.split("/")
            pairs.append((net, sequential(getattr(getattr(agent, energy), part), 0)))
        largest = max(difference(*pair) for pair in pairs)
        return largest if self.discrete else max(largest, (self.log_std - agent.policy.log_std[0]).abs().max().item())


KINDS = [(cls, latent) for cls in (VAEBC, DoC) for latent in ("categorical", "gaussian")]


@pytest.mark.parametrize(
    ("cls", "latent", "discrete", "box"),
    [
        *((*kind, discrete, (-1, 1)) for kind in KINDS for discrete in (None, 3)),
        *((*kind, None, box) for kind, box in zip(KINDS, [*BOXES, BOXES[2]])),
    ],
)
def test_updates_equal_a_plain_restatement(cls: Any, latent: str, discrete: int | None, box: Bounds) -> None:
    store = make_store(discrete) if discrete else boxed(make_store(), box)
    more = (
        {"beta": 1.5, "beta_warmup": 2, "energy_steps": 2, "energy_lr": 1e-2, "posterior_kl_weight": 0.3}
        if cls is DoC
        else {}
    )
    agent = make_agent(cls, store, latent=latent, kl_weight=0.7, **more)
    plain = Plain(agent, store)
    assert plain.distance() == 0
    for update in (1, 2, 3, 4):
        agent.random.step.fill_(update)
        if latent == "categorical":
            noise = agent.random.uniform("doc/posterior", (6,))[0]
        else:
            noise = agent.random.normal("doc/posterior", torch.zeros(1, 6, 3, dtype=torch.float64))[0]
        picks = [agent.random.uniform(name, (6,))[0].tolist() for name in ("doc/step/0", "doc/step")]
        expected = plain.step(ROWS, list(noise), picks)
        metrics = agent.update(windows(agent, store), 0)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert abs(metrics[name].item() - value) < 1e-10, name
        assert plain.distance() < 1e-10 * update


@pytest.mark.parametrize("cls", [VAEBC, DoC])
@pytest.mark.parametrize("reward", [0.0, 0.1, -1000.0, 1e-9])
def test_constant_rewards_are_zero_to_the_networks(cls: Any, reward: float) -> None:
    """Also where they differ by float32 rounding, whose std is not 0; the posterior is that of rewards of zero."""
    store = make_store(3).with_rewards(0.0, reward)
    store.rewards[::2] *= 1 + 1e-7
    zero = make_store(3).with_rewards(0.0)
    agent, other = make_agent(cls, store), make_agent(cls, zero)
    assert agent.reward_scale == 0
    assert torch.equal(agent.posterior(windows(agent, store)), other.posterior(windows(other, zero)))
    assert torch.equal(reward_and_state(store), reward_and_state(zero))


def test_rewards_that_are_rare_are_not_constant() -> None:
    """One in 24 rows, and small ones: their scale is 1 / std as ever."""
    for factor in (1.0, 1e-8):
        rare = make_store(3).with_rewards(0.0)
        rare.rewards[5] = factor
        std = rare.rewards.std(correction=0)
        assert make_agent(VAEBC, rare).reward_scale == 1 / (std + 1e-6)
        centred = rare.rewards - rare.rewards.mean()
        torch.testing.assert_close(reward_and_state(rare)[:, 0], centred / (std + 1e-6))


def test_without_warm_up_the_constraint_has_its_whole_weight_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[float] = []

    def reversal(z: Tensor, weight: Tensor) -> Tensor:
        weights.append(float(weight))
        return gradient_reversal(z, weight)

    monkeypatch.setattr("offrl.agents.doc.gradient_reversal", reversal)
    store = make_store(3)
    for warmup, expected in ((0, [1.5, 1.5, 1.5]), (2, [0.0, 0.75, 1.5])):
        weights.clear()
        agent = make_agent(DoC, store, beta=1.5, beta_warmup=warmup)
        for step in (1, 2, 3):
            agent.random.step.fill_(step)
            agent.update(windows(agent, store), 0)
        assert weights == expected
        assert all(bool(parameter.isfinite().all()) for parameter in agent.parameters())


def test_a_setting_goes_by_its_name_of_before_too() -> None:
    """Checkpoints of before hold `squeeze`."""
    settings = {"_target_": "offrl.agents.doc.DoC", "hidden": [8], "squeeze": 0.1}
    assert from_settings(settings, Spec(3, 2)).cfg.posterior_kl_weight == 0.1


# ---- who gets which gradient ----------------------------------------------------------------------------------


def touched(agent: Any, loss: Tensor) -> set[str]:
    """Networks that a loss has a gradient other than zero for."""
    names = ("embed", "posterior_head", "policy", "prior", "value", "energy_base", "energy")
    nets = {name: list(getattr(agent, name).parameters()) for name in names if hasattr(agent, name)}
    gradients = torch.autograd.grad(loss.sum(), list(chain(*nets.values())), allow_unused=True, retain_graph=True)
    rest = iter(gradients)
    found = {name: [next(rest) for _ in parameters] for name, parameters in nets.items()}
    return {name for name, some in found.items() if any(g is not None and g.abs().max() > 0 for g in some)}


@pytest.mark.parametrize("latent", ["categorical", "gaussian"])
def test_each_loss_reaches_its_own_networks(latent: str) -> None:
    """Posterior and policy imitate; energies learn the constraint and only the posterior suffers it; the rest looks on."""
    store = make_store(3)
    agent = make_agent(DoC, store, latent=latent)
    batch = windows(agent, store)
    q = agent.posterior(batch)
    z = agent.latent.sample(q, agent.random, "z")
    losses = agent.losses(batch, q, z)
    posterior = {"embed", "posterior_head"}
    assert touched(agent, losses["action_loss"]) == posterior | {"policy"}
    assert touched(agent, losses["value_loss"]) == {"value"}
    assert touched(agent, losses["prior_loss"]) == {"prior"}
    base, constraint = agent.contrastive_losses(batch, z, "step")
    assert touched(agent, base) == {"energy_base"}
    assert touched(agent, constraint) == posterior | {"energy"}
    vae = make_agent(VAEBC, store, latent=latent)
    losses = vae.losses(batch, q := vae.posterior(batch), vae.latent.sample(q, vae.random, "z"))
    assert touched(vae, losses["value_loss"]) == posterior | {"value"}
    assert touched(vae, losses["prior_loss"]) == posterior | {"prior"}


def test_the_posterior_climbs_what_the_energy_descends() -> None:
    store = make_store()
    agent = make_agent(DoC, store, seeds=(0, 1), latent="gaussian")
    batch, beta = windows(agent, store), torch.tensor([0.5, 3.0])
    z = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    energy = list(agent.energy.parameters())
    with_sign = agent.contrastive_losses(batch, gradient_reversal(z, beta), "step")[1]
    without = agent.contrastive_losses(batch, z, "step")[1]
    assert torch.equal(with_sign, without)
    up, *mine = torch.autograd.grad(with_sign.sum(), [z, *energy])
    down, *theirs = torch.autograd.grad(without.sum(), [z, *energy])
    torch.testing.assert_close(up, -beta.double().view(2, 1, 1) * down)
    assert down.abs().max() > 0
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs))


def test_the_contrastive_loss_knows_its_outcomes() -> None:
    """Other rewards, or other next states, make another loss; so do shuffled latents."""
    store = make_store()
    agent = make_agent(DoC, store)
    batch = windows(agent, store)
    z = torch.eye(3, dtype=torch.float64)[torch.tensor([[0, 1, 2, 0, 1, 2]])]
    before = agent.contrastive_losses(batch, z, "step")
    for name in ("reward", "next_obs"):
        other = copy.copy(batch)
        setattr(other, name, getattr(batch, name).flip(1))
        assert all((a - b).abs() > 1e-6 for a, b in zip(before, agent.contrastive_losses(other, z, "step")))
    after = agent.contrastive_losses(batch, z.roll(1, 1), "step")
    assert torch.equal(before[0], after[0])
    assert (before[1] - after[1]).abs() > 1e-6


# ---- closed forms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "chosen"), [(0.0, [0] * 6), (0.5, [2, 1, 0, 1, 2, 1]), (1.0, [3, 1, 0, 2, 3, 1])])
def test_an_outcome_is_of_a_valid_timestep(share: float, chosen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of windows with 4, 2, 1, 3, 4 and 2 valid rows; a float32 random number may be rounded up to the end of its range."""
    store = make_store()
    agent = make_agent(DoC, store)
    batch = windows(agent, store)
    assert batch.valid.sum(-1).tolist() == [[4, 2, 1, 3, 4, 2]]
    monkeypatch.setattr(agent.random, "uniform", lambda stream, shape: torch.full((1, *shape), share))
    context, outcome = agent.sample_steps(batch, "energy")
    rows = torch.tensor(ROWS) + torch.tensor(chosen)
    torch.testing.assert_close(context[0, :, : store.obs_dim], store.observations[rows])
    torch.testing.assert_close(outcome[0, :, 1:], store.next_observations[rows])


def test_the_contrastive_bound_equals_the_information_at_the_best_energy() -> None:
    """f = log P(y | x) / P(y) makes the loss minus the information; a constant makes it 0; log(batch) is the most it sees."""
    joint = torch.tensor([[0.3, 0.1], [0.15, 0.45]], dtype=torch.float64)
    counts = (joint * 20).round().long()
    x, y = (
        torch.cat([torch.full((int(n),), i) for i, row in enumerate(counts) for n in row]),
        torch.cat([torch.full((int(n),), j) for row in counts for j, n in enumerate(row)]),
    )
    ratio = (joint / joint.sum(1, keepdim=True) / joint.sum(0)).log()
    information = (joint * ratio).sum()
    torch.testing.assert_close(info_nce(ratio[x][:, y].unsqueeze(0)), -information.view(1))
    assert info_nce(torch.full((1, 20, 20), 3.0).double()).abs() < 1e-12
    torch.testing.assert_close(
        info_nce(1e3 * torch.eye(20).double().unsqueeze(0)), torch.tensor([-math.log(20)]).double()
    )


def test_latents_diverge_as_their_laws_do() -> None:
    generator = torch.Generator().manual_seed(0)
    q, p = torch.randn(2, 1, 5, 6, generator=generator).double()
    normal, kinds = torch.distributions.Normal, torch.distributions.Categorical
    halves = [x.chunk(2, -1) for x in (q, p)]
    expected = torch.distributions.kl_divergence(*(normal(m, s.exp()) for m, s in halves)).sum(-1)
    torch.testing.assert_close(Gaussian(3).divergence(q, p), expected)
    expected = torch.distributions.kl_divergence(kinds(logits=q), kinds(logits=p))
    torch.testing.assert_close(Categorical(6).divergence(q, p), expected)


def test_latents_are_drawn_from_their_laws() -> None:
    random, outputs = LaneRandom((0,)), torch.tensor([0.0, 1.0, -1.0, 0.5]).double()
    many = outputs.expand(1, 40_000, 4).requires_grad_()
    z = Categorical(4).sample(many, random, "z")
    probability = outputs.softmax(0)
    assert ((z == 0) | (z == 1)).all()
    torch.testing.assert_close(z.mean((0, 1)), probability, rtol=0, atol=0.01)  # four standard errors
    (gradient,) = torch.autograd.grad(z[..., 1].sum(), many)
    torch.testing.assert_close(gradient[0, 0], probability[1] * (torch.eye(4).double()[1] - probability))
    several, _ = Gaussian(2).candidates(many[:, :10_000], 4, 0.0, random, "z")
    for z in (Gaussian(2).sample(many, random, "z"), several.flatten(1, 2)):
        torch.testing.assert_close(z.mean((0, 1)), outputs[:2], rtol=0, atol=0.04)
        torch.testing.assert_close(z.std((0, 1)), outputs[2:].exp(), rtol=0, atol=0.04)


# ---- acting ---------------------------------------------------------------------------------------------------


def test_an_unlikely_kind_is_no_candidate() -> None:
    """The value of a kind that the prior never gives means nothing, however high it is."""
    store = make_store(3)
    agent = make_agent(DoC, store, least_mass=[0.01])
    obs = store.observations[:5].unsqueeze(0)
    with torch.no_grad():
        agent.value.weights[1].abs_()
        agent.value.weights[2].abs_()  # so that what lifts the first layer lifts the value
        agent.prior.biases[-1][0] = torch.tensor([0.0, 0.5, -30.0])
        before, promised = agent.select_action(obs), agent.predicted_return(obs, agent.initial_state(5))
        agent.value.weights[0][0, :, -1] += 50.0  # the last input is the last kind
        assert torch.equal(agent.select_action(obs), before)
        assert torch.equal(agent.predicted_return(obs, agent.initial_state(5)), promised)
        agent.prior.biases[-1][0, 2] = 0.0
        assert (agent.predicted_return(obs, agent.initial_state(5)) > promised + 1).all()
        agent.cfg.least_mass = 1.0  # nothing has so much: the likeliest kinds remain
        assert agent.predicted_return(obs, agent.initial_state(5)).isfinite().all()


@pytest.mark.parametrize("latent", ["categorical", "gaussian"])
def test_the_latent_in_use_has_the_highest_value(latent: str) -> None:
    """Among the candidates, which differ; it is kept for the episode, or for as many steps as `hold` says."""
    store = make_store()
    agent = make_agent(DoC, store, seeds=(0, 1), latent=latent, candidates=50, hold=2)
    obs = store.observations[:4].expand(2, -1, -1)
    memory = agent.initial_state(4)
    agent.select_action(obs, memory)
    state = agent.state(obs, 0)
    z, _ = agent.latent.candidates(agent.prior(state), 50, 0.0, agent.random, f"{memory.stream}/latent/0")
    values = torch.stack([agent.values(state, z[:, :, i]) for i in range(z.shape[2])], -1)
    assert (values.std(-1) > 0).all()
    torch.testing.assert_close(memory.value, values.max(-1).values)
    torch.testing.assert_close(
        memory.latent, z.gather(2, values.argmax(-1).view(2, 4, 1, 1).expand(-1, -1, 1, 3))[:, :, 0]
    )
    promised = memory.value * agent.return_std + agent.return_mean
    torch.testing.assert_close(agent.predicted_return(obs, memory), promised)
    after = agent.update_state(memory, store.actions[:4].expand(2, -1, -1), torch.zeros(2, 4))
    assert after.latent is memory.latent
    assert agent.update_state(after, store.actions[:4].expand(2, -1, -1), torch.zeros(2, 4)).latent is None


@pytest.mark.parametrize("cls", [VAEBC, DoC])
def test_an_episode_does_not_depend_on_how_many_run_beside_it(cls: Any) -> None:
    """Two and fifty episodes with one observation: the first two have the same latents, which differ from each other."""
    agent = make_agent(cls, make_store(), seeds=(0, 1), latent="gaussian", latent_size=3, candidates=5)
    found = []
    for count in (2, 50):
        agent.episode_batches, obs = 0, torch.ones(2, count, 3).double()
        state = agent.initial_state(count)
        agent.select_action(obs, state)
        found.append(state.latent[:, :2])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)  # a product of another size rounds differently
    assert (found[0][:, 0] != found[0][:, 1]).all()


@pytest.mark.parametrize("hold", [1, 2, 3, None])
def test_a_latent_is_chosen_anew_after_every_so_many_steps(hold: int | None) -> None:
    """Again and again: by the state and the time of that step, with numbers of its own; in between it stays what it was."""
    store = make_store()
    agent = make_agent(DoC, store, latent="gaussian", candidates=20, hold=hold)
    state, held = agent.initial_state(3), None
    for t in range(8):
        obs = store.observations[3 * t % 19 : 3 * t % 19 + 3].unsqueeze(0)
        if t == 0 or (hold and t % hold == 0):
            held = agent.choose_latent(agent.state(obs, t), f"{state.stream}/latent/{t}")
        action = agent.select_action(obs, state)
        assert held is not None
        assert torch.equal(state.latent, held[0])
        assert torch.equal(state.value, held[1])
        state = agent.update_state(state, action, torch.zeros(1, 3))
    assert state.timestep == 8


# ---- bandits --------------------------------------------------------------------------------------------------

BANDIT: dict[str, Any] = {"latent_size": 4, "suffix": 1, "hidden": (32,), "lr": 3e-3}


def play(agent: Any, p: float) -> tuple[Tensor, Tensor]:
    """What each lane's policy earns on average, and what it promises; both exact, `[lanes]`."""
    lanes = agent.spec.lanes
    obs, memory = torch.ones(lanes, 1, 1), agent.initial_state(1)
    promise = agent.predicted_return(obs, memory)[:, 0]
    with torch.no_grad():
        share = agent.policy(torch.cat([agent.state(obs, 0), memory.latent], -1)).softmax(-1)[:, 0, 1]
    return p + (1 - 2 * p) * share, promise


def learn(
    cls: Any, store: OfflineDataset, seeds: tuple[int, ...] = tuple(range(10)), updates: int = 1000, **settings: Any
) -> Any:
    agent = make_agent(cls, store, seeds, **{**BANDIT, **settings})
    Taped(agent, BatchLoader([(store, Uniform(store), 1.0)], 64, agent.window, agent.batch_fields)).run(0, updates)
    return agent


def test_doc_finds_the_better_arm_where_conditioning_on_luck_prefers_the_worse() -> None:
    """p = 0.3, the worse arm pulled 19 times of 20: P(better | R = 1) = 0.11. The best policy earns 0.7.

    VAE-BC, the same without the constraint, takes the latent that says "it paid", promises more than it gets, and pulls the
    worse arm; so does return conditioning (tests/steps/test_rvs.py).
    """
    store = make_bandit(0.3, 0.95, 1000)
    earned, promised = play(learn(DoC, store, updates=500, energy_lr=6e-3), 0.3)
    assert (earned > 0.67).sum() >= 9
    assert ((promised - earned).abs() < 0.1).sum() >= 9  # the better arm was pulled 50 times: its mean's error is 0.065
    earned, promised = play(learn(VAEBC, store, updates=500), 0.3)
    assert (earned < 0.4).sum() >= 9
    assert (promised - earned > 0.1).sum() >= 9


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.1, 0.2, 0.3, 0.4])
def test_doc_earns_the_better_arm_at_every_chance(p: float) -> None:
    """Behaviour that mirrors the arms' chances: return conditioning earns 0.5 for every p, the best policy 1 - p."""
    store = make_bandit(p, 1 - p, 1000)
    earned, promised = play(learn(DoC, store, updates=1500, energy_lr=3e-3), p)
    assert (earned > 1 - p - 0.03).sum() >= 9
    assert ((promised - earned).abs() < 0.1).sum() >= 9  # the better arm was pulled 100 p times ten: errors up to 0.05


# ---- longer episodes ------------------------------------------------------------------------------------------


def evaluated(agent: Any, store: OfflineDataset, sampled: bool) -> tuple[Tensor, Tensor]:
    """Mean return and promise of 1000 episodes, `[lanes]` each."""
    agent.cfg.sample_actions = sampled
    with Evaluator(store.info, agent.spec.lanes, workers=1, slots=1000 * agent.spec.lanes) as evaluator:
        played = evaluator.run(agent, 1000)
    assert played.predicted is not None
    return torch.from_numpy(played.returns).mean(1), torch.from_numpy(played.predicted).mean(1)


def forge_store(name: str) -> OfflineDataset:
    return load(forge.ensure(name, progress=False))


@pytest.mark.slow
def test_return_conditioning_on_the_lake_is_the_exact_conditional_policy() -> None:
    """RvS, asked for 1, against dynamic programming: 0.158 with drawn actions, 0.740 with the likeliest ones."""
    store = forge_store("forge/lake/p0.33-eps0.4-n10000-v0")
    agent = make_rvs(store, (0, 1), hidden=(64, 64), average=False)
    Taped(agent, BatchLoader([(store, Uniform(store), 1.0)], 512, None, agent.batch_fields)).run(0, 3000)
    exact = store.info.provenance["exact"]["rcsl"][0]
    assert (
        evaluated(agent, store, True)[0] - exact["sampled"]
    ).abs().max() < 0.04  # 0.012 is the error of 1000 episodes
    assert (evaluated(agent, store, False)[0] - exact["likeliest"]).abs().max() < 0.05


@pytest.mark.slow
def test_without_luck_the_constraint_costs_nothing() -> None:
    """On a lake that never slips state and action tell all: DoC is its baseline without the constraint, and both succeed."""
    store = forge_store("forge/lake/p1-eps0.4-n1000-v0")
    settings = {"latent_size": 16, "suffix": 8, "hidden": (64, 64), "lr": 1e-3, "energy_lr": 1e-3}
    agent = learn(DoC, store, (0, 1, 0, 1), 1200, beta=[2.0, 2.0, 0.0, 0.0], **settings)
    assert evaluated(agent, store, False)[0].min() > 0.97
    assert max(map(abs, label_leakage(agent, store, reward_and_state(store), 200).label)) < 0.03
    constrained, free = evaluated(agent, store, True)[0].view(2, 2).mean(1)
    assert (constrained - free).abs() < 0.15


@pytest.mark.slow
def test_a_gamble_is_declined() -> None:
    """The sure 1 instead of 5 or -15; return conditioning, asked for 5, gambles (-5 on average)."""
    store = make_gamble()
    settings = {"latent_size": 16, "suffix": 2, "hidden": (64, 64), "lr": 1e-3, "energy_lr": 1e-3}
    agent = learn(DoC, store, tuple(range(5)), 2500, **settings)
    start = store.observations[:1].expand(5, 1, -1)
    assert (agent.select_action(start, agent.initial_state(1)) == 2).sum() >= 4
    rvs = make_rvs(store, tuple(range(5)), hidden=(64, 64), average=False, return_scale=0.2)
    Taped(rvs, BatchLoader([(store, Uniform(store), 1.0)], 128, None, rvs.batch_fields)).run(0, 800)
    assert (rvs.select_action(start, rvs.initial_state(1)) == 0).all()
