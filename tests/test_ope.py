"""Fitted Q evaluation against exact values: a tabular problem, closed forms, and lanes that keep apart."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from offrl.agents.base import Agent, Spec
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.evaluation.fqe import FQEConfig, fitted_q
from offrl.nets import Critics

STATES, ACTIONS, GAMMA = 4, 2, 0.8
# Transition probabilities and rewards of a small random problem; from the last state nothing follows.
_GENERATOR = torch.Generator().manual_seed(0)
P = torch.rand(STATES, ACTIONS, STATES, generator=_GENERATOR, dtype=torch.float64).softmax(-1)
R = torch.rand(STATES, ACTIONS, generator=_GENERATOR, dtype=torch.float64) * 2 - 0.5


@dataclass
class Nothing:
    pass


class Fixed(Agent):
    """Each lane follows a table of actions `[lanes, states]`; observations are unit vectors.

    A continuous action is the unit vector of the pair (state, action): a linear network is then a table of Q.
    """

    Config = Nothing
    takes_discrete = True

    def __init__(self, table: list[list[int]], seeds: list[int] | None = None, discrete: bool = False) -> None:
        lanes = len(table)
        size = ACTIONS if discrete else STATES * ACTIONS
        super().__init__(Spec(STATES, size, tuple(seeds or range(lanes)), discrete=discrete))
        self.table = torch.tensor(table)

    def build(self) -> None:
        pass

    def act(self, obs: Tensor) -> Tensor:
        state = obs.argmax(-1)
        action = self.table.gather(1, state)
        return action if self.spec.discrete else pair(state, action)


def pair(state: Tensor, action: Tensor) -> Tensor:
    return one_hot(state * ACTIONS + action, STATES * ACTIONS).float()


def random_data(rows: int, discrete: bool = False) -> OfflineDataset:
    """Steps from uniform states under random actions; episodes of one step that go on unless they terminate."""
    generator = torch.Generator().manual_seed(1)
    state = torch.randint(STATES, (rows,), generator=generator)
    action = torch.randint(ACTIONS, (rows,), generator=generator)
    after = torch.multinomial(P[state, action], 1, generator=generator)[:, 0]
    done = (after == STATES - 1).float()
    vectors = [one_hot(s, STATES).float() for s in (state, after)]
    info = DatasetInfo(discrete=ACTIONS if discrete else None)
    reward = R[state, action].float()
    return OfflineDataset(
        vectors[0], action if discrete else pair(state, action), reward, vectors[1], done, torch.arange(rows + 1), info
    )


def exact_q(store: OfflineDataset, policy: list[int]) -> Tensor:
    """`[states, actions]`: the solution of Bellman's equation of the data's own frequencies; the last state is terminal."""
    state, after = store.observations.argmax(-1), store.next_observations.argmax(-1)
    action = store.actions.argmax(-1) % ACTIONS
    counts = torch.zeros(STATES, ACTIONS, STATES, dtype=torch.float64)
    counts.index_put_((state, action, after), torch.ones(len(store), dtype=torch.float64), accumulate=True)
    going = counts / counts.sum(-1, keepdim=True)
    going[:, :, -1] = 0
    chosen = one_hot(torch.tensor(policy), ACTIONS).double()
    to = torch.einsum("sat,tb->satb", going, chosen).reshape(STATES * ACTIONS, STATES * ACTIONS)
    q = torch.linalg.solve(torch.eye(STATES * ACTIONS, dtype=torch.float64) - GAMMA * to, R.flatten())
    return q.view(STATES, ACTIONS)


POLICIES = [[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 1, 0]]
QUICK = FQEConfig(updates=1500, lr=1e-2, discount=GAMMA, target_every=50, hidden=(), batch_size=512)


def test_tabular_values_are_the_exact_ones() -> None:
    """Four policies in two agents: each lane's value is its own solution, and so is their order."""
    store, cfg = random_data(2000), replace(QUICK, held_out=0.0, updates=3000, lr=3e-3)
    value = fitted_q(store, [Fixed(POLICIES[:1]), Fixed(POLICIES[1:])], cfg).value.double()
    start = store.observations.argmax(-1)
    exact = torch.stack([exact_q(store, p)[start, torch.tensor(p)[start]].mean() for p in POLICIES])
    # What is left, 2 % of a value, is the noise of batches of 512 at a constant learning rate.
    torch.testing.assert_close(value, exact, atol=0.025, rtol=0)
    assert exact.max() - exact.min() > 0.3
    assert value.argsort().tolist() == exact.argsort().tolist()


@pytest.mark.parametrize("discrete", [False, True])
def test_without_discount_it_is_the_mean_reward(discrete: bool) -> None:
    """gamma = 0: Q(s, a) = r(s, a), so the value is the mean of r(s, pi(s)), and no TD error is left."""
    store = random_data(4000, discrete)
    cfg = replace(QUICK, discount=0.0, held_out=0.0, updates=800, hidden=(64,) if discrete else ())
    estimates = fitted_q(store, [Fixed(POLICIES, discrete=discrete)], cfg)
    start = store.observations.argmax(-1)
    exact = torch.stack([R[start, torch.tensor(p)[start]].mean() for p in POLICIES])
    torch.testing.assert_close(estimates.value.double(), exact, atol=0.01, rtol=0)
    assert (estimates.td_error < 0.02).all()


def test_the_behaviours_value_is_its_mean_discounted_return() -> None:
    """Episodes of three rewards of one: 1 + gamma + gamma^2 at the start, if the end bootstraps nothing."""
    steps = torch.arange(3).repeat(50)
    vectors = [one_hot(s, STATES).float() for s in (steps, steps + 1)]
    done = (steps == 2).float()
    offsets = torch.arange(0, 151, 3)
    actions = pair(steps, torch.zeros_like(steps))
    store = OfflineDataset(vectors[0], actions, torch.ones(150), vectors[1], done, offsets)
    estimates = fitted_q(store, [Fixed([[0] * 4])], replace(QUICK, updates=1000))
    assert float(estimates.value[0]) == pytest.approx(1 + GAMMA + GAMMA**2, abs=0.02)
    assert float(estimates.soft_opc[0]) == pytest.approx(0, abs=1e-5)  # all episodes are equally good


def test_a_lane_does_not_depend_on_the_others() -> None:
    store, few = random_data(2000), replace(QUICK, updates=50)
    together = fitted_q(store, [Fixed(POLICIES)], few)
    for lane, policy in enumerate(POLICIES):
        alone = fitted_q(store, [Fixed([policy], [77])], few)
        for name in ("value", "soft_opc", "td_error"):
            torch.testing.assert_close(getattr(together, name)[lane], getattr(alone, name)[0])


def test_groups_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    store, few = random_data(2000), replace(QUICK, updates=50)
    agents = [Fixed([p]) for p in POLICIES]
    whole = fitted_q(store, agents, few)
    monkeypatch.setattr("offrl.evaluation.fqe._ACTION_BYTES", 3 * 4 * STATES * ACTIONS * len(store))
    torch.testing.assert_close(fitted_q(store, agents, few).value, whole.value)


def test_rewards_of_another_unit_give_values_of_that_unit() -> None:
    store, few = random_data(2000), replace(QUICK, updates=100)
    one, thousand = (fitted_q(s, [Fixed(POLICIES)], few) for s in (store, store.with_rewards(1000.0)))
    torch.testing.assert_close(thousand.value, 1000 * one.value, rtol=1e-3, atol=0)


def test_soft_opc_is_larger_where_good_episodes_are_valued() -> None:
    """Half the episodes are good; a constant Q tells nothing apart, one that fits the rewards does."""
    store = random_data(4000)
    fitted = fitted_q(store, [Fixed(POLICIES[:1])], replace(QUICK, discount=0.0, updates=800))
    good = store.rewards >= store.rewards.quantile(0.8)
    expected = float(store.rewards[good].mean() - store.rewards.mean())
    assert float(fitted.soft_opc[0]) == pytest.approx(expected, rel=0.15)


# ---- what is learnt from, and what is read ------------------------------------------------------------------


def episodes(count: int = 20, cut: int = 3) -> OfflineDataset:
    """Random walks of three steps, as in `random_data`; where one does not end it is cut off."""
    store = random_data(3 * count)
    done = store.terminations.clone()
    done[cut - 1 :: 6] = 1
    tensors = store.tensors()
    for name in OfflineDataset.EPISODE_FIELDS:
        tensors.pop(name)
    tensors |= {"terminations": done, "offsets": torch.arange(0, 3 * count + 1, 3)}
    return OfflineDataset(**tensors, info=store.info)


def held_out(store: OfflineDataset, cfg: FQEConfig) -> tuple[list[int], torch.Generator]:
    """Episodes that estimates are read on, a share of them at random; and the generator as batches find it."""
    generator = torch.Generator().manual_seed(cfg.seed)
    order = torch.randperm(store.episodes, generator=generator).tolist()
    return sorted(order[: round(cfg.held_out * store.episodes)]), generator


def restated(store: OfflineDataset, policy: list[int], cfg: FQEConfig) -> dict[str, float]:
    """FQE of one policy from ordinary layers, row by row of the dataset's episodes."""
    held, generator = held_out(store, cfg)
    learn = [row for row in range(len(store)) if int(store.episode_of_row[row]) not in held]
    mean, std = store.observations.mean(0), store.observations.std(0, correction=0)
    weights = Critics([cfg.seed], store.obs_dim, store.action_dim, cfg.hidden, members=1).mlp
    layers: list[nn.Module] = []
    for w, b in zip(weights.weights, weights.biases):
        layer = nn.Linear(w.shape[-1], w.shape[-2])
        layer.weight.data, layer.bias.data = w[0, 0].detach().clone(), b[0, 0].detach().clone()
        layers += [layer, nn.ReLU()]
    q = nn.Sequential(*layers[:-1])
    slow, adam = copy.deepcopy(q), torch.optim.Adam(q.parameters(), lr=cfg.lr)
    unit = store.rewards.std()

    def value(net: nn.Module, obs: Tensor, action: Tensor) -> Tensor:
        return net(torch.cat([(obs - mean) / (std + 1e-3), action], -1))[..., 0]

    def acted(obs: Tensor) -> Tensor:
        state = obs.argmax(-1)
        return pair(state, torch.tensor(policy)[state])

    def error(rows: Any) -> Tensor:
        after = store.next_observations[rows]
        follows = value(slow, after, acted(after)).detach() * (1 - store.terminations[rows])
        wanted = store.rewards[rows] / unit + cfg.discount * follows
        return value(q, store.observations[rows], store.actions[rows]) - wanted

    for update in range(1, cfg.updates + 1):
        chosen = torch.randint(len(learn), (cfg.batch_size,), generator=generator)
        adam.zero_grad()
        error([learn[i] for i in chosen]).square().mean().backward()
        adam.step()
        if update % cfg.target_every == 1:  # d3rlpy: after update 1, then after every so many
            slow.load_state_dict(q.state_dict())
    starts = store.observations[store.offsets[held]]
    rows = [row for episode in held for row in range(3 * episode, 3 * episode + 3)]
    best = torch.quantile(store.returns[held], 0.8)
    good = [row for episode in held if store.returns[episode] >= best for row in range(3 * episode, 3 * episode + 3)]
    of_data = [value(q, store.observations[r], store.actions[r]).mean() for r in (good, rows)]
    found = {
        "value": value(q, starts, acted(starts)).mean(),
        "soft_opc": of_data[0] - of_data[1],
        "td_error": error(rows).square().mean().sqrt(),
    }
    return {name: float(x.detach() * unit) for name, x in found.items()}


@pytest.mark.parametrize("hidden", [(), (12, 8)], ids=str)
def test_estimates_equal_a_plain_restatement(hidden: tuple[int, ...]) -> None:
    """Batches, target copies, held-out episodes and units; in float32, hence the tolerance."""
    store = episodes()
    cfg = FQEConfig(updates=19, batch_size=32, lr=3e-2, discount=GAMMA, target_every=4, hidden=hidden, held_out=0.25)
    estimates = fitted_q(store, [Fixed(POLICIES)], cfg)
    for lane, policy in enumerate(POLICIES):
        for name, expected in restated(store, policy, cfg).items():
            assert float(getattr(estimates, name)[lane]) == pytest.approx(expected, abs=2e-5), name


def test_held_out_episodes_teach_nothing() -> None:
    """Their rewards exchanged, the policies are worth the same; exchanged elsewhere they are not."""
    store, few = episodes(), replace(QUICK, updates=50, held_out=0.25)
    held, _ = held_out(store, few)
    before = fitted_q(store, [Fixed(POLICIES)], few).value
    for chosen, same in ((held, True), ([e for e in range(20) if e not in held], False)):
        rows = (torch.tensor(chosen).unsqueeze(1) * 3 + torch.arange(3)).flatten()
        rewards = store.rewards.clone()
        rewards[rows] = store.rewards[rows.flip(0)]  # the deviation of all rewards stays
        other = OfflineDataset(**(store.tensors() | {"rewards": rewards}), info=store.info)
        torch.testing.assert_close(other.rewards.std(), store.rewards.std(), rtol=1e-6, atol=0)
        after = fitted_q(other, [Fixed(POLICIES)], few).value
        assert ((after - before).abs().max() < 1e-6) == same


def test_below_ten_episodes_all_are_used_for_both() -> None:
    cfg = FQEConfig(updates=10, batch_size=32, lr=3e-2, discount=GAMMA, target_every=4, hidden=(), held_out=0.25)
    small, large = (fitted_q(episodes(count), [Fixed(POLICIES)], cfg).value for count in (9, 10))
    everything = [fitted_q(episodes(count), [Fixed(POLICIES)], replace(cfg, held_out=0.0)).value for count in (9, 10)]
    assert torch.equal(small, everything[0])
    assert not torch.equal(large, everything[1])


def test_policies_with_a_memory_are_refused() -> None:
    agent = Fixed(POLICIES)
    agent.initial_state = lambda envs: torch.zeros(envs)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="of the observation alone"):
        fitted_q(random_data(100), [agent], QUICK)


@pytest.mark.parametrize("reward", [0.1, -0.01])
def test_constant_rewards_have_the_scale_of_one(reward: float) -> None:
    """Of their float32 rounding alone std is some 1e-8, by which values would be that of a network's errors."""
    store = random_data(2000).with_rewards(0.0, reward)
    estimates = fitted_q(store, [Fixed(POLICIES)], replace(QUICK, discount=0.0, updates=400))
    torch.testing.assert_close(estimates.value, torch.full((4,), reward), atol=2e-3, rtol=0)
