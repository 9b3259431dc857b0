"""DT's update against a plain restatement in float64; its acting against attention over the last K steps, done in full."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from plain import BOXES, Bounds, Box, boxed, make_store, to_go
from torch import Tensor, nn

from offrl.agents.base import Batch, Spec
from offrl.agents.dt import DT, STATES, DTConfig
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Taped

SMALL: dict[str, Any] = {"context": 4, "embed": 12, "heads": 2, "max_length": 9, "warmup": 50, "return_scale": 0.1}


def make_agent(store: OfflineDataset, seeds: tuple[int, ...] = (0,), **settings: Any) -> DT:
    sizes, box = (store.obs_dim, store.action_dim), (store.info.action_low, store.info.action_high)
    spec = Spec(*sizes, seeds, *store.observation_statistics(), *box, discrete=bool(store.info.discrete))
    agent = DT(spec, DTConfig(**{**SMALL, **settings})).double()
    agent.setup(store)
    # Initial weights of 0.02 leave attention almost uniform, which would hide mistakes.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in agent.net.parameters():
            p.add_(0.3 * torch.randn(p.shape[1:], generator=generator))
    return agent


def windows(agent: DT, store: OfflineDataset, rows: list[int]) -> Batch:
    index = torch.tensor(rows).expand(agent.spec.lanes, -1)
    return agent.prepare(store.windows(index, agent.cfg.context, agent.batch_fields))


# ---- the update -----------------------------------------------------------------------------------------------


class Plain:
    """One lane of the authors' model, for one sequence at a time and without padding, from ordinary functions."""

    def __init__(self, agent: DT, lane: int = 0) -> None:
        self.cfg, self.discrete, self.kinds = agent.cfg, agent.spec.discrete, agent.spec.action_dim
        self.box = Box(agent.spec)
        self.p = {k: nn.Parameter(v[lane].detach().clone()) for k, v in agent.net.named_parameters()}
        self.adam = torch.optim.AdamW(self.p.values(), lr=self.cfg.lr, weight_decay=self.cfg.weight_decay)
        warm = self.cfg.warmup
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, lambda n: min((n + 1) / warm, 1))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.p[f"{name}.weight"], self.p[f"{name}.bias"], 1e-5)

    def attention(self, name: str, x: Tensor, uniforms: dict[str, Tensor]) -> Tensor:
        """Head by head and query by query."""
        q, k, v = self.linear(f"{name}.query", x), *self.linear(f"{name}.key_value", x).chunk(2, 1)
        size, out = q.shape[1] // self.cfg.heads, torch.zeros_like(q)
        for head in range(self.cfg.heads):
            mine = slice(head * size, (head + 1) * size)
            for i in range(len(x)):
                weight = torch.softmax(k[: i + 1, mine] @ q[i, mine] / math.sqrt(size), 0)
                if uniforms:
                    weight = weight * uniforms[f"{name}/weights"][head, i, : i + 1]
                out[i, mine] = weight @ v[: i + 1, mine]
        return self.linear(f"{name}.mix", out)

    def __call__(self, returns: Tensor, obs: Tensor, action: Tensor, first: int, uniforms: dict[str, Tensor]) -> Tensor:
        """The head's outputs at the states of consecutive steps, the first of which is number `first`."""
        steps = torch.arange(first, first + len(obs)).clamp(max=self.cfg.max_length - 1)
        time = self.p["embed_time"][steps]
        action = nn.functional.one_hot(action, self.kinds).double() if self.discrete else action
        kinds = (("return", returns.unsqueeze(1) * self.cfg.return_scale), ("state", obs), ("action", action))
        three = [self.linear(f"embed_{kind}", value) + time for kind, value in kinds]
        x = self.norm("norm_in", torch.stack([token[t] for t in range(len(obs)) for token in three]))
        x = x * uniforms["embed"][: len(x)] if uniforms else x
        for i in range(self.cfg.layers):
            name = f"blocks.{i}"
            part = self.attention(name, self.norm(f"{name}.norm_attention", x), uniforms)
            x = x + (part * uniforms[f"{name}/attention"][: len(x)] if uniforms else part)
            part = self.linear(f"{name}.down", self.linear(f"{name}.up", self.norm(f"{name}.norm_mlp", x)).relu())
            x = x + (part * uniforms[f"{name}/mlp"][: len(x)] if uniforms else part)
        return self.linear("head", self.norm("norm_out", x))[STATES]

    def loss(self, store: OfflineDataset, rows: list[int], uniforms: list[dict[str, Tensor]]) -> Tensor:
        """Mean over all steps that the windows have."""
        errors = []
        mean, std = store.observations.mean(0), store.observations.std(0, correction=0)
        for row, mine in zip(rows, uniforms):
            episode = int(store.episode_of_row[row])
            end = min(row + self.cfg.context, int(store.offsets[episode + 1]))
            total = [to_go(store, t) for t in range(row, end)]
            obs = (store.observations[row:end] - mean) / (std + 1e-6)
            action = store.actions[row:end]
            out = self(torch.stack(total), obs, action, row - int(store.offsets[episode]), mine)
            if self.discrete:
                errors.append(nn.functional.cross_entropy(out, action, reduction="none"))
            else:
                errors.append((self.box.squash(out) - action).square().mean(1))
        return torch.cat(errors).mean()

    def step(self, store: OfflineDataset, rows: list[int], uniforms: list[dict[str, Tensor]]) -> float:
        """One update; the norm of the gradient before it was clipped."""
        self.adam.zero_grad()
        self.loss(store, rows, uniforms).backward()
        norm = nn.utils.clip_grad_norm_(self.p.values(), self.cfg.grad_clip)
        self.adam.step()
        self.schedule.step()
        return float(norm)

    def distance(self, agent: DT, lane: int = 0) -> float:
        pairs = [(v[lane], self.p[k]) for k, v in agent.net.named_parameters()]
        return max((a - b).abs().max().item() for a, b in pairs)


def dictated_coins(agent: DT, rate: float) -> tuple[Any, dict[str, Tensor]]:
    """A `drop` that multiplies by coins of its own, and what it has multiplied by, by name."""
    tossed: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(5)

    def drop(name: str, x: Tensor) -> Tensor:
        tossed[name] = (torch.rand(x.shape, generator=generator) >= rate).double() / (1 - rate)
        return x * tossed[name]

    return drop, tossed


def of_window(tossed: dict[str, Tensor], window: int, tokens: int, layers: int) -> dict[str, Tensor]:
    """The coins of one window of lane 0, under the restatement's names and at the tokens where it wants them.

    The last block is asked for states alone; elsewhere its outputs don't matter, and neither do their coins.
    """
    uniforms = {"embed": tossed["dt/embed"][0, window]}
    for i in range(layers):
        for part in ("weights", "attention", "mlp"):
            mine = tossed[f"dt/{i}/{part}"][0, window]
            if i == layers - 1:
                shape = (*mine.shape[:-2], tokens, mine.shape[-1])
                everywhere = torch.ones(shape, dtype=mine.dtype)
                everywhere[..., STATES, :] = mine
                mine = everywhere
            uniforms[f"blocks.{i}/{part}"] = mine
    return uniforms


ROWS = [0, 5, 6, 7, 8, 10, 12, 21]  # starts, middles and last steps of episodes


ANY = [(discrete, rate, clip, (-1, 1)) for discrete in (None, 3) for rate in (0.0, 0.3) for clip in (0.25, 100.0)]


@pytest.mark.parametrize(
    ("discrete", "rate", "grad_clip", "box"),
    [*ANY, *((None, 0.0, clip, box) for clip, box in zip((0.25, 100.0, 0.25), BOXES))],
)
def test_updates_equal_a_plain_restatement(discrete: int | None, rate: float, grad_clip: float, box: Bounds) -> None:
    store = make_store(discrete) if discrete else boxed(make_store(), box)
    agent = make_agent(store, dropout=rate, lr=1e-2, grad_clip=grad_clip)
    plain = Plain(agent)
    before = plain.distance(agent)
    agent.drop, tossed = dictated_coins(agent, rate)  # type: ignore[method-assign]
    for updates in (1, 2, 3):
        agent.update(windows(agent, store, ROWS), 0)
        uniforms = [of_window(tossed, i, 12, 3) if rate else {} for i in range(len(ROWS))]
        norm = plain.step(store, ROWS, uniforms)
        assert (norm > grad_clip) == (grad_clip == 0.25)
        assert before == 0
        assert plain.distance(agent) < 1e-10 * updates
    assert max((a - b).abs().max().item() for a, b in zip(plain.p.values(), Plain(make_agent(store)).p.values())) > 1e-4


def test_padding_may_count() -> None:
    """The other average: a window of one step weighs a quarter of a full one."""
    store = make_store()
    by_step, by_window = (make_agent(store, dropout=0.0, count_padding=flag) for flag in (False, True))
    full, single = windows(by_step, store, [0]), windows(by_step, store, [7])
    both = windows(by_step, store, [0, 7])
    assert single.valid is not None
    assert single.valid.sum() == 1
    a, b = by_step.action_loss(full), by_step.action_loss(single)
    torch.testing.assert_close(by_step.action_loss(both), (4 * a + b) / 5)
    torch.testing.assert_close(by_window.action_loss(both), (4 * a + b) / 8)


def test_dropout_is_on_while_learning_and_off_while_acting() -> None:
    store = make_store()
    agent = make_agent(store, dropout=0.5)
    batch = windows(agent, store, ROWS)
    one, same = agent.predictions(batch), agent.predictions(batch)
    agent.random.step.add_(1)
    assert torch.equal(one, same)
    assert not torch.allclose(one, agent.predictions(batch))
    obs = store.observations[:5].unsqueeze(0)
    first = agent.select_action(obs)
    agent.random.step.add_(1)
    assert torch.equal(first, agent.select_action(obs))


# ---- what an output may depend on -----------------------------------------------------------------------------


def test_outputs_depend_on_the_past_alone() -> None:
    """The prediction at s_t sees R_t, s_t and what came before; not a_t, and nothing behind it."""
    store = make_store()
    agent = make_agent(store, dropout=0.0)
    batch = windows(agent, store, [0, 11])
    before = agent.predictions(batch)
    for t in range(4):
        for name, last_seen in (("return_to_go", t), ("obs", t), ("action", t + 1)):
            other = copy.deepcopy(batch)
            getattr(other, name)[:, :, t:].add_(1.0)
            after = agent.predictions(other)
            assert torch.equal(after[:, :, :last_seen], before[:, :, :last_seen])
            assert not torch.isclose(after[:, :, last_seen:], before[:, :, last_seen:]).any()


def test_padding_changes_nothing() -> None:
    store = make_store()
    agent = make_agent(store, dropout=0.0)
    batch = windows(agent, store, [5, 7, 9])  # of two, one and two steps
    assert batch.valid is not None
    assert batch.valid.sum(-1).tolist() == [[2, 1, 2]]
    spoilt = copy.deepcopy(batch)
    for name in ("obs", "action", "return_to_go"):
        tensor = getattr(spoilt, name)
        absent = (batch.valid == 0).view(*batch.valid.shape, *[1] * (tensor.ndim - 3))
        setattr(spoilt, name, torch.where(absent, 100.0, tensor))
    losses = [agent.action_loss(b) for b in (batch, spoilt)]
    gradients = [torch.autograd.grad(loss.sum(), list(agent.net.parameters())) for loss in losses]
    assert torch.equal(*losses)
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


def test_windows_begin_and_end_with_their_episode() -> None:
    """Timesteps are places in the episode, returns-to-go those of the whole episode, and nothing crosses its end."""
    store = make_store()
    agent = make_agent(store)
    batch = windows(agent, store, [0, 5, 10, 19])
    assert batch.timestep is not None
    assert batch.return_to_go is not None
    assert batch.timestep[0].tolist() == [[0, 1, 2, 3], [5, 6, 0, 0], [2, 0, 0, 0], [8, 9, 10, 0]]
    torch.testing.assert_close(batch.return_to_go[0, 1, :2], store.rewards[5:7].flip(0).cumsum(0).flip(0))
    torch.testing.assert_close(batch.return_to_go[0, 3, 0], store.rewards[19:].sum())


# ---- acting ---------------------------------------------------------------------------------------------------


def full_attention(agent: DT, lane: int, env: int, played: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The head's output at the last of the steps (R, s, a), from a fresh pass over the last K of them."""
    recent = played[-agent.cfg.context :]
    returns, obs, action = (torch.stack([step[i][lane, env] for step in recent]) for i in range(3))
    return Plain(agent, lane)(returns, agent.normalize(obs), action, len(played) - len(recent), {})[-1]


@pytest.mark.parametrize("discrete", [None, 3])
@pytest.mark.parametrize("context", [1, 4])
def test_acting_equals_full_attention_over_the_last_steps(discrete: int | None, context: int) -> None:
    """With a window that fills up at first and slides later, and beyond the table of timesteps."""
    store = make_store(discrete) if discrete else boxed(make_store(), (-1, 1) if context == 1 else BOXES[2])
    agent = make_agent(store, seeds=(0, 1), context=context, target_return=[3.0, 5.0])
    agent.target.copy_(torch.tensor([3.0, 5.0]))
    generator = torch.Generator().manual_seed(2)
    goal, state = agent.target.unsqueeze(1).expand(2, 3), agent.initial_state(3)
    played: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(12):
        obs = torch.randn(2, 3, 3, generator=generator).double()
        action = agent.select_action(obs, state)
        assert torch.equal(action, agent.select_action(obs, state))  # asking twice does no harm
        played.append((goal, obs, action))
        for lane, env in ((0, 0), (1, 2)):
            out = full_attention(agent, lane, env, played)
            expected = out.argmax(-1) if discrete else Box(agent.spec).squash(out)
            torch.testing.assert_close(action[lane, env], expected, rtol=0, atol=1e-12)
        reward = torch.randn(2, 3, generator=generator).double()
        state = agent.update_state(state, action, reward)
        goal = goal - reward
        torch.testing.assert_close(state.return_to_go, goal)
        assert state.history.shape[2] == 3 * min(len(played), context - 1)


def test_acting_follows_the_data_it_was_trained_on() -> None:
    """Along an episode of the dataset, acting puts out what training predicts for it: same tokens, same returns."""
    store = make_store(lengths=(4, 4))
    agent = make_agent(store, dropout=0.0)
    expected = agent.squash(agent.predictions(windows(agent, store, [0, 4])))
    agent.target.copy_(store.returns[0])
    state = agent.initial_state(1)
    for t in range(4):
        action = agent.select_action(store.observations[t].view(1, 1, -1), state)
        torch.testing.assert_close(action[0, 0], expected[0, 0, t], rtol=0, atol=1e-12)
        state = agent.update_state(state, store.actions[t].view(1, 1, -1), store.rewards[t].view(1, 1))
    assert state.return_to_go.abs() < 1e-12


def test_the_default_target_is_the_best_complete_return() -> None:
    store = make_store()
    assert make_agent(store).target == store.returns.max()
    complete = store.returns < store.returns.max()
    cut = OfflineDataset(**{**store.tensors(), "complete": complete}, info=store.info)
    assert make_agent(cut).target == store.returns[complete].max()
    named = DT(Spec(3, 2, (0, 1)), DTConfig(**SMALL, target_return=7.0))
    named.setup(store)
    assert named.target.tolist() == [7, 7]
    other = make_agent(make_store(seed=1))
    other.load_state_dict(make_agent(store).state_dict())  # a saved agent needs no dataset
    assert other.target == store.returns.max()


def test_lanes_ask_for_their_own_return() -> None:
    store = make_store()
    agent = make_agent(store, seeds=(0, 0))
    agent.target.copy_(torch.tensor([1.0, 30.0]))
    obs = torch.ones(2, 3, 3).double()
    action = agent.select_action(obs)
    torch.testing.assert_close(action, agent.select_action(obs, agent.initial_state(3)))
    torch.testing.assert_close(action[0, 0], action[0, 2])
    assert not torch.allclose(action[0], action[1])


# ---- behaviour ------------------------------------------------------------------------------------------------


def make_gamble(discrete: bool) -> OfflineDataset:
    """Episodes of one step: either action half of the time; the right one earns 1, the left one 0."""
    rows = 256
    right = torch.arange(rows) % 2
    obs = torch.randn(rows, 2, generator=torch.Generator().manual_seed(0))
    action = right if discrete else (right.float() - 0.5).unsqueeze(1)
    info = DatasetInfo(discrete=2 if discrete else None)
    return OfflineDataset(obs, action, right.float(), obs, torch.ones(rows), torch.arange(rows + 1), info)


@pytest.mark.parametrize("discrete", [False, True])
def test_a_higher_target_picks_the_better_action(discrete: bool) -> None:
    store = make_gamble(discrete)
    spec = Spec(2, store.action_dim, (0, 1), *store.observation_statistics(), discrete=discrete)
    agent = DT(spec, DTConfig(context=2, embed=16, layers=1, lr=1e-2, warmup=20))
    agent.setup(store)
    assert agent.target.tolist() == [1, 1]
    Taped(agent, BatchLoader([(store, Uniform(store), 1.0)], 32, agent.window, agent.batch_fields)).run(0, 200)
    obs = store.observations[:50].expand(2, -1, -1)
    for target in (1.0, 0.0):
        agent.target.fill_(target)
        action = agent.select_action(obs, agent.initial_state(50))
        assert (action - (target if discrete else target - 0.5)).abs().max() < 0.15


def test_sampled_actions_follow_the_policy() -> None:
    """Shares of many episodes' first actions; the same again in a copy, as evaluation makes it, and others in the next wave."""
    store = make_store(discrete=3)
    agent = make_agent(store, sample_actions=True)
    obs = store.observations[:1].expand(1, 4000, -1)
    twin = copy.deepcopy(agent)
    first = agent.select_action(obs, agent.initial_state(4000))
    assert torch.equal(first, twin.select_action(obs, twin.initial_state(4000)))
    assert not torch.equal(first, agent.select_action(obs, agent.initial_state(4000)))
    out = full_attention(agent, 0, 0, [(agent.target.unsqueeze(1), obs, torch.zeros(1, 1, dtype=torch.int64))])
    shares = torch.stack([(first == kind).double().mean() for kind in range(3)])
    torch.testing.assert_close(shares, out.softmax(-1).detach(), rtol=0, atol=0.03)
    assert agent.select_action(obs).unique().numel() == 1  # without a state: the likeliest
