"""Agents that see encodings: what the encoder sees, where its gradient comes from, and that nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_discrete_toy, make_toy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from offrl.agents.base import Spec, WindowBatch
from offrl.agents.history import HistoryAgent
from offrl.agents.iql import expectile_loss
from offrl.data.dataset import OfflineDataset
from offrl.data.lane_tasks import LaneTasks
from offrl.nets.history import memories
from offrl.sampling import BatchLoader, Uniform
from offrl.training.compose import compose
from offrl.training.engine import Eager
from offrl.training.run_config import resolve_config
from offrl.training.runs import load_agent, make_agent
from offrl.training.trainer import train
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError

AGENTS = {
    "iql": "iql.IQL",
    "dql": "dql.DQL",
    "td3_bc": "td3_bc.TD3BC",
    "cql": "cql.CQL",
    "discrete_cql": "discrete_cql.DiscreteCQL",
}
GRU = {"encoder": "gru", "length": 3, "burn_in": 2, "hidden": 12, "latent": 5, "model_hidden": 8}
WINDOW = {"encoder": "window", "length": 3, "context": 3, "hidden": 12, "latent": 5, "model_hidden": 8}
STACK = {"encoder": "window", "length": 1, "context": 1, "latent": 0, "models": False}


def history_of(
    store: OfflineDataset, history: dict[str, Any], name: str = "iql", seeds: tuple[int, ...] = (0,), **settings: Any
) -> Any:
    numbers, discrete = store.observation_statistics(), store.info.discrete is not None
    spec = Spec(store.obs_dim, store.action_dim, seeds, *numbers, discrete=discrete)
    settings = {"_target_": f"offrl.agents.{AGENTS[name]}", "hidden": [16, 16], **settings}
    agent = make_agent(settings, spec, history).to(store.rewards.dtype)
    agent.setup(store)
    return agent


def advance(agent: Any, store: OfflineDataset, updates: int, start: int = 0, batch: int = 8) -> dict[str, Tensor]:
    loader = BatchLoader([(store, Uniform(store), 1.0)], batch, agent.window, agent.batch_fields, agent.window_before)
    return Eager(agent, loader).run(start, updates)


def windows(agent: Any, store: OfflineDataset, batch: int = 8, step: int = 1) -> WindowBatch:
    loader = BatchLoader([(store, Uniform(store), 1.0)], batch, agent.window, agent.batch_fields, agent.window_before)
    agent.random.step.fill_(step)
    return agent.prepare(loader.draw(agent.random, torch.tensor([step])))[0]


def distance(a: Any, b: Any) -> float:
    mine, theirs = a.state_dict(), b.state_dict()
    return max((mine[k] - theirs[k]).abs().max().item() for k in mine)


double = {"dtype": torch.float64}


# ---- what the encoder sees ------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", [GRU, WINDOW], ids=["gru", "window"])
def test_an_episode_step_by_step_is_the_episode_as_a_sequence(history: dict[str, Any]) -> None:
    store = make_discrete_toy(64, **double)
    agent = history_of(store, history, "discrete_cql", seeds=(0, 1))
    obs, action = agent.normalize(store.observations[:6]), store.actions[:6].expand(2, -1)
    previous = torch.cat([torch.zeros(1, 3).double(), agent.as_input(store.actions[:5])])
    exists = torch.tensor([0.0, 1, 1, 1, 1, 1]).double().unsqueeze(-1)
    whole = (part.expand(2, 1, 6, -1) for part in (obs, previous, exists))
    z = agent.encoder.read(memories(agent.encoder, *whole).flatten(1, 2))
    state, seen = agent.initial_state(1), []
    for t in range(6):
        agent.select_action(store.observations[t].expand(2, 1, -1), state)
        seen.append(agent.encoder.read(state.latest)[:, 0])
        state = agent.update_state(state, action[:, t : t + 1], torch.zeros(2, 1))
    torch.testing.assert_close(torch.stack(seen, 1), z, rtol=0, atol=1e-12)


@pytest.mark.parametrize("history", [GRU, WINDOW], ids=["gru", "window"])
def test_an_encoding_knows_nothing_of_later_timesteps_and_a_window_nothing_of_much_earlier_ones(
    history: dict[str, Any],
) -> None:
    agent = history_of(make_toy(64, **double), history)
    g = torch.Generator().manual_seed(0)
    sequence = [torch.randn(1, 1, 7, width, generator=g).double() for width in (3, 2)]
    exists = torch.ones(1, 1, 7, 1).double()
    before = agent.encoder.read(memories(agent.encoder, *sequence, exists).flatten(1, 2))
    changed = [part.clone() for part in sequence]
    for part in changed:
        part[:, :, 3] += 1
    after = agent.encoder.read(memories(agent.encoder, *changed, exists).flatten(1, 2))
    moved = (before - after).abs().sum(-1)[0] > 0
    expected = [False, False, False, True, True, True, history is GRU]
    assert moved.tolist() == expected


def test_the_gated_unit_is_pytorchs() -> None:
    agent = history_of(make_toy(64, **double), GRU)
    encoder, cell = agent.encoder, torch.nn.GRUCell(12, 12).double()
    last, recurrent = encoder.inputs, encoder.recurrent
    cell.weight_ih.data, cell.bias_ih.data = last.weights[1][0].detach(), last.biases[1][0].detach()
    cell.weight_hh.data, cell.bias_hh.data = recurrent.weights[0][0].detach(), recurrent.biases[0][0].detach()
    x, memory = (torch.randn(1, 4, w, generator=torch.Generator().manual_seed(w)).double() for w in (6, 12))
    first = torch.nn.functional.linear(x[0], last.weights[0][0], last.biases[0][0]).relu()
    found = encoder.advance(encoder.features(x[..., :3], x[..., 3:5], torch.ones(1, 4, 1).double()), memory)
    x[..., 5] = 1
    first = torch.nn.functional.linear(x[0], last.weights[0][0], last.biases[0][0]).relu()
    torch.testing.assert_close(found[0], cell(first, memory[0]), rtol=0, atol=1e-12)


# ---- what is learnt from --------------------------------------------------------------------------------------


def test_learnable_timesteps_are_those_behind_the_burn_in_of_a_whole_window() -> None:
    """A window of 2 + 3 timesteps around a drawn row, whose episode may begin within it: places by hand."""
    store = make_toy(64, **double)  # episodes of four
    agent = history_of(store, GRU)
    batch = windows(agent, store, batch=200)
    first, count = agent.learnable(batch)
    for row, start in enumerate(batch.index[0].tolist()):
        wanted = start - int(batch.cut[0, row])  # where a whole window would begin
        expected = [t for t in range(start, start // 4 * 4 + 4) if wanted + 2 <= t < wanted + 5]
        assert list(range(start + int(first[0, row]), start + int(first[0, row] + count[0, row]))) == expected
        assert expected
        assert batch.cut[0, row] == 0 or start % 4 == 0
    at = agent.chosen(batch)
    assert at.shape == (1, 200 * 3)
    made = agent.transitions(batch, at, batch.obs.flatten(1, 2)[:, :1], batch.obs.flatten(1, 2)[:, :1])
    by_window = made.index.view(200, 3)
    for row, rows in enumerate(by_window.tolist()):
        of_window = range(int(batch.index[0, row] + first[0, row]), int(batch.index[0, row] + (first + count)[0, row]))
        assert set(rows) <= set(of_window)
        assert len(set(rows)) == min(3, len(of_window))
    assert torch.equal(made.reward, store.rewards[made.index])  # the rows are those of the dataset
    assert torch.equal(made.action, store.actions[made.index])


@pytest.mark.parametrize("history", [GRU, {**WINDOW, "length": 6}, {**STACK, "length": 5}], ids=str)
def test_rows_are_learnt_from_as_often_as_the_sampler_draws_them(history: dict[str, Any]) -> None:
    """In episodes shorter and longer than a window, at their starts and ends too; and twice as often where its law says so."""
    lengths = [1, 3, 30, 2, 4]
    plain, n = make_toy(40, **double), sum(lengths)
    parts = {name: getattr(plain, name)[:n] for name in OfflineDataset.ROW_FIELDS}
    store = OfflineDataset(**parts, offsets=torch.tensor([0, *lengths]).cumsum(0), info=plain.info)
    agent = history_of(store, history)
    twice = torch.tensor([2.0, 1, 2, 1, 1]).repeat_interleave(torch.tensor(lengths)).double()
    for weight in (torch.ones(n).double(), twice):
        drawn = torch.multinomial(weight, 120_000, replacement=True, generator=torch.Generator().manual_seed(0))
        sampler: Any = SimpleNamespace(draw=lambda *_, rows=drawn: rows.view(1, 1, -1))
        loader = BatchLoader([(store, sampler, 1.0)], len(drawn), agent.window, agent.batch_fields, agent.window_before)
        agent.random.step.fill_(1)
        batch = agent.prepare(loader.draw(agent.random, torch.tensor([1])))[0]
        z = batch.obs.flatten(1, 2)[:, :1]
        counts = agent.transitions(batch, agent.chosen(batch), z, z).index[0].bincount(minlength=n)
        expected = weight / weight.sum() * counts.sum()
        # `length` rows a window come together: as many times the variance of single draws, at most.
        assert ((counts - expected).abs() < 5 * (agent.cfg.length * expected).sqrt()).all()


def test_padding_changes_nothing() -> None:
    store = make_toy(64, **double)
    pair = [history_of(store, GRU | {"bisimulation": 0.5}) for _ in range(2)]
    batch = windows(pair[0], store)
    assert (batch.valid == 0).any()
    dirty = batch.map(lambda x: x)
    for name in ("obs", "next_obs", "action", "reward", "mask"):
        part = getattr(batch, name)
        keep = batch.valid.view(*batch.valid.shape, *[1] * (part.ndim - 3))
        setattr(dirty, name, torch.where(keep > 0, part, 7.0))
    for agent, one in zip(pair, (batch, dirty)):
        agent.random.step.fill_(1)
        agent.update(one, 0)
    assert distance(*pair) < 1e-12


@pytest.mark.parametrize("name", ["iql", "discrete_cql"])
def test_a_stack_of_one_is_the_agent_without_histories(name: str) -> None:
    """k = 1 and no network: the same rows, whose sums differ by rounding at most."""
    store = (make_discrete_toy if name == "discrete_cql" else make_toy)(512, **double)
    agent, plain = history_of(store, STACK, name), history_of(store, {}, name)
    assert not isinstance(plain, HistoryAgent)
    for one in (agent, plain):
        advance(one, store, 5, batch=32)
    # Adam's first steps divide by gradients that may be tiny, which makes rounding larger.
    assert distance(agent.agent, _without_statistics(plain, agent.agent)) < 1e-9


def _without_statistics(plain: Any, like: Any) -> Any:
    plain = copy.deepcopy(plain)
    plain.obs_mean, plain.obs_scale = like.obs_mean, like.obs_scale
    return plain


# ---- gradients ------------------------------------------------------------------------------------------------


def test_the_encoder_gets_the_gradient_of_values_and_critics_and_not_of_the_actor() -> None:
    """Against autograd through IQL's losses as written out, with the parameters from before the update."""
    store = make_toy(64, **double)
    agent = history_of(store, GRU | {"models": False})
    batch = windows(agent, store)
    before = copy.deepcopy(agent)
    losses: list[Tensor] = []
    agent.encoder_optimizer.step = losses.append
    agent.update(batch, 0)
    found = torch.autograd.grad(losses[0].sum(), list(agent.encoder.parameters()))

    z, next_z = before.encodings(batch, before.chosen(batch))
    at, iql = before.chosen(batch), before.agent
    action, reward, mask = (getattr(batch, n).flatten(1, 2)[0, at[0]] for n in ("action", "reward", "mask"))
    q = iql.critics_target(z.detach(), action[None]).amin(1)
    target = reward + mask * 0.99 * iql.value(next_z).squeeze(-1)
    value_loss = expectile_loss(q.detach() - iql.value(z).squeeze(-1), 0.7)
    critic_loss = (iql.critics(z, action[None]) - target.detach().unsqueeze(1)).square().mean((-2, -1))
    expected = torch.autograd.grad((value_loss + critic_loss).sum(), list(before.encoder.parameters()))
    for one, two in zip(found, expected):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    assert max(g.abs().max() for g in found) > 1e-6


@pytest.mark.parametrize("weight", [0.3, [0.3, 2.0]], ids=str)
def test_the_bisimulation_loss_adds_its_weighted_gradient(weight: Any) -> None:
    """Against autograd through J down to the encoder, and what is logged of both gradients by z."""
    store = make_toy(64, **double)
    seeds = (0,) if isinstance(weight, float) else (0, 1)
    plain, agent = (history_of(store, GRU | more, seeds=seeds) for more in ({}, {"bisimulation": weight}))
    windows(plain, store)  # draws at the same step
    batch = windows(agent, store)
    before = copy.deepcopy(agent)
    found: list[Tensor] = []
    for one in (plain, agent):
        one.encoder_optimizer.step = lambda loss: found.append(loss)
        metrics = one.update(batch, 0)
    of_critics, both = (
        torch.autograd.grad(loss.sum(), list(one.encoder.parameters())) for loss, one in zip(found, (plain, agent))
    )

    at = before.chosen(batch)
    z, next_z = before.encodings(batch, at)
    with before.critics_differentiate(seen := z.detach().requires_grad_()):
        before.agent.update(before.transitions(batch, at, seen, next_z), 0)
        gradient = sum(before.of_critics())
    loss, _ = before.bisimulation(z, before.transitions(batch, at, seen, next_z))
    by_z = torch.autograd.grad(loss.sum(), z, retain_graph=True)[0]
    weighted = (torch.tensor(weight).view(-1).double() * loss).sum()
    of_loss = torch.autograd.grad(weighted, list(before.encoder.parameters()))
    for one, two, three in zip(both, of_critics, of_loss):
        torch.testing.assert_close(one, two + three, rtol=0, atol=1e-6)  # the weight is a number in float32
    assert max(float(g.abs().max()) for g in of_loss) > 1e-3
    torch.testing.assert_close(metrics["bisimulation_gradient"], by_z.norm(dim=(1, 2)))
    torch.testing.assert_close(metrics["critics_gradient"], gradient.norm(dim=(1, 2)))


@pytest.mark.parametrize("name", ["td3_bc", "cql"])
def test_an_actors_loss_alone_moves_no_encoder(name: str) -> None:
    """With critics that are not optimised, the encoder's loss is zero, whatever the actor learns."""
    store = make_toy(64, **double)
    agent = history_of(store, GRU | {"models": False}, name)
    agent.agent.critic_optimizer.step = lambda loss: None
    encoder, actor = copy.deepcopy(agent.encoder), copy.deepcopy(agent.agent.actor)
    advance(agent, store, 4)
    assert distance(encoder, agent.encoder) == 0
    assert distance(actor, agent.agent.actor) > 0


def test_the_models_change_nothing_at_weight_zero_and_much_above() -> None:
    store = make_toy(64, **double)
    off, zero, on = (history_of(store, GRU | more) for more in ({"models": False}, {}, {"bisimulation": 1.0}))
    for agent in (off, zero, on):
        metrics = advance(agent, store, 6)
    assert {"bisimulation", "transition_loss", "reward_loss"} <= set(metrics)
    for name, tensor in off.state_dict().items():
        assert torch.equal(tensor, zero.state_dict()[name]), name
    assert distance(zero.encoder, on.encoder) > 1e-4


# ---- lanes, resume, engines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [0.0, 0.1, -1000.0])
def test_constant_rewards_have_no_scale_of_rounding_errors(reward: float) -> None:
    """In float32, where the std of equal numbers is not 0; the losses are those of any small numbers."""
    store = make_toy(256).with_rewards(0.0, reward)
    store.rewards[::2] *= 1 + 1e-7
    agent = history_of(store, GRU)
    assert agent.reward_scale == 1
    assert history_of(make_toy(256), GRU).reward_scale == 1 / make_toy(256).rewards.std(-1)


def test_each_lanes_task_has_its_own_scale_of_rewards() -> None:
    """The first lane's rewards are constant."""
    store = make_toy(256)
    rewards = torch.stack([torch.full_like(store.rewards, 0.1), store.rewards])
    tasks = LaneTasks(store, rewards, store.terminations.expand(2, -1), store.info)
    agent = history_of(tasks, GRU, seeds=(0, 1))
    assert agent.reward_scale.tolist() == [1, 1 / store.rewards.std(-1)]


def test_lanes_equal_separate_runs() -> None:
    store, history = make_toy(256, **double), GRU | {"bisimulation": [0.0, 0.75], "events": [0.0, 0.3]}
    both = history_of(store, history, seeds=(5, 6))
    advance(both, store, 5)
    for lane, seed in enumerate((5, 6)):
        own = {name: history[name][lane] for name in ("bisimulation", "events")}
        alone = history_of(store, GRU | own, seeds=(seed,))
        advance(alone, store, 5)
        for (key, many), one in zip(both.state_dict().items(), alone.state_dict().values()):
            if many.shape != one.shape:
                torch.testing.assert_close(many[lane], one[0], rtol=0, atol=1e-10, msg=key)


def test_resume_is_exact(tmp_path: Path) -> None:
    store = make_toy(256)
    whole, first, second = (history_of(store, GRU, "td3_bc", seeds=(0, 9)) for _ in range(3))
    advance(whole, store, 9)
    advance(first, store, 5)
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, first, {"step": 5})
    checkpoint.restore(second, checkpoint.load(path)[0], path)
    advance(second, store, 4, start=5)
    assert distance(whole, second) == 0


class _NoHostCopy(TorchDispatchMode):
    """Refuses what a captured graph can't hold."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        words = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "equal.default")
        assert not any(word in str(func) for word in words), f"{func} in an update: the graph can't hold it"
        return func(*args, **(kwargs or {}))


def test_an_update_can_be_captured() -> None:
    store = make_discrete_toy(256)
    agent = history_of(
        store, GRU | {"bisimulation": 0.5, "pairs": "same_action", "events": 0.25, "warmup": 3}, "discrete_cql"
    )
    batch = windows(agent, store)
    with _NoHostCopy():
        agent.update(batch, 0)


# ---- one lane -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [("iql", {"expectile": [0.6, 0.9], "beta": [1.0, 3.0]}), ("dql", {"eta": [0.1, 1.0], "candidates": 4})],
)
def test_predict_is_the_evaluation_of_one_lane(name: str, settings: dict[str, Any]) -> None:
    """Two episodes over three timesteps, by `predict`, step by step, and by the lane alone; settings have a value per lane.

    The sampling agent's `predict` samples nothing here. In float64 only the order of additions differs.
    """
    store = make_toy(256, **double)
    agent = history_of(store, GRU | {"bisimulation": [0.0, 0.5]}, name, seeds=(0, 9), **settings)
    advance(agent, store, 3)
    one, own = agent.lane(1), agent.state_dict()
    assert all(torch.equal(t, own[k] if own[k].shape == t.shape else own[k][1:]) for k, t in one.state_dict().items())
    obs = store.observations[:6].view(3, 2, 3)
    state, lone, wanted = None, None, agent.initial_state(2).without_samples()
    for step in range(3):
        action, state = agent.predict(obs[step].numpy(), state, None, True, lane=1)
        alone, lone = one.predict(obs[step, 0].numpy(), lone, None, True)
        chosen = agent.select_action(obs[step].expand(2, -1, -1), wanted)
        wanted = agent.update_state(wanted, chosen, torch.zeros(2, 2).double())
        np.testing.assert_allclose(action, chosen[1].numpy(), rtol=0, atol=1e-10)
        np.testing.assert_allclose(alone, action[0], rtol=0, atol=1e-10)


def test_one_lane_of_a_sampling_agent_draws_and_learns_as_it_did() -> None:
    store, history = make_toy(256, **double), GRU | {"bisimulation": [0.0, 0.5]}
    agent = history_of(store, history, "dql", seeds=(0, 9), eta=[0.1, 1.0], candidates=4)
    advance(agent, store, 3)
    agent.initial_state(1)  # the next episodes are not the first
    one, obs = agent.lane(1), store.observations[:5].expand(2, -1, -1)
    both, alone = agent.select_action(obs, agent.initial_state(5)), one.select_action(obs[:1], one.initial_state(5))
    torch.testing.assert_close(alone[0], both[1], rtol=0, atol=1e-10)
    advance(agent, store, 3, start=3)
    advance(one, store, 3, start=3)
    for (key, many), mine in zip(agent.state_dict().items(), one.state_dict().values()):
        torch.testing.assert_close(mine, many if many.shape == mine.shape else many[1:], rtol=0, atol=1e-10, msg=key)


def test_a_sampling_agent_samples_unless_asked_not_to_and_needs_no_rewards() -> None:
    store = make_toy(64)
    agent, many = history_of(store, GRU, "dql"), np.ones((50, 3))
    for deterministic in (True, False):
        state = None
        for _ in range(2):
            action, state = agent.predict(many, state, None, deterministic)
            assert (len(np.unique(action, axis=0)) == 1) == deterministic


# ---- runs -----------------------------------------------------------------------------------------------------


def test_a_run_trains_resumes_evaluates_and_loads(tmp_path: Path) -> None:
    options = {"agent": "iql", "history": "gru", "dataset": "forge/mstoy/uniform-v0", "data.size": 200}
    options |= {"history.hidden": 8, "history.latent": 4, "agent.hidden": [8], "lanes": 2, "batch_size": 4}
    options |= {"eval.every": 0, "eval.final_episodes": 3, "progress": False, "out": str(tmp_path)}
    options |= {"agent.actor_decay": 0, "eval.workers": 1}
    whole = train(compose({**options, "updates": 8, "name": "whole"}))
    train(compose({**options, "updates": 4, "name": "parts"}))
    parts = train(compose({**options, "updates": 8, "name": "parts"}))
    one, two = (load_agent(result.folder) for result in (whole, parts))
    assert isinstance(one, HistoryAgent)
    assert distance(one, two) == 0
    assert whole.returns == parts.returns
    job = resolve_config(compose({**options, "updates": 8}))
    assert job.method == "iql+GRU"
    assert job.to_dict()["history"]["burn_in"] == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"history.hidden": 8}, "choose history=gru or history=window"),
        ({"history": "gru", "augment": "world_model"}, "learns from histories"),
        ({"history": "gru", "online.steps": 10}, "learns from histories"),
        ({"history": "gru", "history.burnin": 8}, "did you mean history.burn_in"),
        ({"history": "window", "engine": "compile"}, "can't compile history=window; use engine=auto or engine=eager"),
        ({"history": "gru", "history.events": 1.5}, "history.events=1.5 should be a share of pairs, between 0 and 1"),
        ({"history": "gru", "history.length": 0}, "history.length=0 should be at least 1"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_get_a_sentence(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(OffrlError, match=words):
        resolve_config(compose({"agent": "iql", "dataset": "forge/hopper/medium-v0", **changes}))


@pytest.mark.parametrize(
    ("name", "words"),
    [("bc.BC", "no critic"), ("dt.DT", "windows by itself"), ("prdc.PRDC", "looks up"), ("fql.FQL", "one optimiser")],
)
def test_agents_that_can_not_see_encodings_are_refused(name: str, words: str) -> None:
    with pytest.raises(OffrlError, match=words):
        make_agent({"_target_": f"offrl.agents.{name}"}, Spec(3, 2), GRU)
