"""FQL's and flow BC's updates against a plain restatement of the authors', in float64, and closed forms of their parts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plain import BOXES, Bounds, Box, SmoothMLP, boxed, difference, drawn, make_store, pool, spec_of
from torch import Tensor, nn

from offrl.agents.base import Spec, WindowBatch
from offrl.agents.chunks import chunked
from offrl.agents.flow_bc import FlowBC, FlowBCConfig
from offrl.agents.fql import FQL, FQLConfig
from offrl.data.batch import Batch
from offrl.data.dataset import OfflineDataset
from offrl.nets import Adam, FlowPolicy
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager, Taped
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom

BATCH = 16
UNIT: Bounds = (-1.0, 1.0)


def euler(v: nn.Module, s: Tensor, z: Tensor, steps: int) -> Tensor:
    x = z
    for i in range(steps):
        t = torch.full((len(s), 1), i / steps, dtype=s.dtype)
        x = x + v(torch.cat([s, x, t], 1)) / steps
    return torch.clip(x, -1, 1)


def flow_loss(v: nn.Module, s: Tensor, a: Tensor, x0: Tensor, t: Tensor, valid: Tensor | float = 1.0) -> Tensor:
    x = (1 - t) * x0 + t * a
    return ((v(torch.cat([s, x, t], 1)) - (a - x0)) ** 2 * valid).mean()


class Plain:
    """One seed of FQL with ordinary modules: one joint gradient, one Adam, target critics a step behind."""

    def __init__(self, agent: FQL) -> None:
        self.cfg, self.box = agent.cfg, Box(agent.chunk)
        self.flow, self.actor = SmoothMLP(agent.flow.mlp), SmoothMLP(agent.actor)
        self.critics = nn.ModuleList(SmoothMLP(agent.critics.mlp, 0, i) for i in range(agent.cfg.members))
        self.critics_target = copy.deepcopy(self.critics)
        self.networks = nn.ModuleList([self.flow, self.actor, self.critics])
        self.adam = torch.optim.Adam(self.networks.parameters(), lr=self.cfg.lr)

    def q(self, critics: nn.ModuleList, s: Tensor, a: Tensor) -> Tensor:
        a = self.box.centre + self.box.half * a
        return torch.stack([critic(torch.cat([s, a], 1)).squeeze(1) for critic in critics])

    def step(self, rows: dict[str, Tensor], draws: dict[str, Tensor]) -> None:
        cfg, s, a = self.cfg, rows["s"], (rows["a"] - self.box.centre) / self.box.half
        with torch.no_grad():
            a2 = torch.clip(self.actor(torch.cat([rows["s2"], draws["target_action"]], 1)), -1, 1)
            next_q = pool(self.q(self.critics_target, rows["s2"], a2), cfg.target, cfg.pessimism)
            y = rows["r"] + cfg.discount**cfg.action_chunk * (1 - rows["d"]) * next_q
            g = euler(self.flow, s, draws["distill"], cfg.flow_steps)
        critic_loss = ((self.q(self.critics, s, a) - y) ** 2 * rows.get("complete", torch.ones(()))).mean()
        u = self.actor(torch.cat([s, draws["distill"]], 1))
        frozen = copy.deepcopy(self.critics).requires_grad_(False)
        q = self.q(frozen, s, torch.clip(u, -1, 1)).mean(0)
        q_loss = -q.mean() / (q.abs().mean().item() if cfg.normalize_q else 1)
        policy_loss = cfg.alpha * ((u - g) ** 2).mean() + q_loss
        cloning = flow_loss(self.flow, s, a, draws["flow/x0"], draws["flow/t"], rows.get("valid", 1.0))
        loss = critic_loss + cloning + policy_loss
        for target, online in zip(self.critics_target.parameters(), self.critics.parameters()):
            target.data = (1 - cfg.tau) * target.data + cfg.tau * online.data
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()

    def distance(self, agent: FQL) -> float:
        members = range(agent.cfg.members)
        pairs = [(SmoothMLP(agent.flow.mlp), self.flow), (SmoothMLP(agent.actor), self.actor)]
        for theirs, mine in ((agent.critics, self.critics), (agent.critics_target, self.critics_target)):
            pairs += [(SmoothMLP(theirs.mlp, 0, i), mine[i]) for i in members]
        return max(difference(*pair) for pair in pairs)


def make(store: OfflineDataset, cls: Any = FQL, **settings: Any) -> Any:
    return cls(spec_of(store, (11,)), cls.Config(**{"hidden": (24, 16), "flow_steps": 4, **settings})).double()


def loader(store: OfflineDataset) -> BatchLoader:
    return BatchLoader([(store, Uniform(store), 1.0)], BATCH)


def draws_of(random: LaneRandom, action: Tensor) -> dict[str, Tensor]:
    """One lane's draws of an update, by name."""
    draws = {name: random.normal(name, action.unsqueeze(0))[0] for name in ("target_action", "distill", "flow/x0")}
    return draws | {"flow/t": random.uniform("flow/t", (len(action), 1))[0]}


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 1e-3},
        {"alpha": 10.0, "normalize_q": False, "target": "min", "discount": 0.995},
        {"members": 5, "target": "lcb", "pessimism": 0.7, "critic_norm": False},
    ],
    ids=str,
)
@pytest.mark.parametrize(("updates", "tolerance", "box"), [(30, 1e-9, UNIT), *((3, 1e-10, box) for box in BOXES)])
def test_updates_equal_the_authors(updates: int, tolerance: float, box: Bounds, settings: dict[str, Any]) -> None:
    """Same weights, batches and noise; in 30 updates the target that lags a step is off by more than 1e-6 if it does not."""
    store = boxed(make_store(), box)
    agent = make(store, **settings)
    plain = Plain(agent)
    for _, rows in drawn(store, random := LaneRandom((11,)), updates, BATCH):
        names = {"s": "observations", "a": "actions", "r": "rewards", "s2": "next_observations", "d": "terminations"}
        batch = {short: getattr(store, name)[rows].double() for short, name in names.items()}
        plain.step(batch, draws_of(random, batch["a"]))
    before = plain.distance(agent)
    Eager(agent, loader(store)).run(0, updates)
    assert plain.distance(agent) < tolerance < before


def chunk_rows(store: OfflineDataset, first: Tensor, length: int, discount: float) -> dict[str, Tensor]:
    """Row by row: a chunk's fields from the dataset's rows, up to its episode's end."""
    found: dict[str, list[Tensor]] = {name: [] for name in ("s", "a", "r", "s2", "d", "valid", "complete")}
    for row in first.tolist():
        end = int(store.offsets[1:][store.episode_of_row[row]])
        inside = range(row, min(row + length, end))
        actions = [
            store.actions[i].double() if i in inside else 0 * store.actions[row].double()
            for i in range(row, row + length)
        ]
        ended, total = 0.0, torch.zeros((), dtype=torch.float64)
        for i in inside:
            total = total + (0.0 if ended else discount ** (i - row)) * store.rewards[i].double()
            ended = max(ended, float(store.terminations[i]))
        found["s"].append(store.observations[row].double())
        found["a"].append(torch.cat(actions))
        found["r"].append(total)
        found["s2"].append(store.next_observations[inside[-1]].double())
        found["d"].append(torch.tensor(ended).double())
        width = store.action_dim
        found["valid"].append(
            torch.tensor([float(i in inside) for i in range(row, row + length) for _ in range(width)])
        )
        found["complete"].append(torch.tensor(float(len(inside) == length)))
    return {name: torch.stack(values) for name, values in found.items()}


@pytest.mark.parametrize("box", [UNIT, BOXES[-1]], ids=str)
def test_updates_on_chunks_equal_a_restatement(box: Bounds) -> None:
    """Chunks of three actions, of which some end with the episode: the authors' losses with their two masks."""
    store = boxed(make_store(), box)
    agent, taped = (make(store, action_chunk=3, discount=0.9) for _ in range(2))
    plain, short = Plain(agent), 0
    for _, first in drawn(store, random := LaneRandom((11,)), 10, BATCH):
        rows = chunk_rows(store, first, 3, 0.9)
        short += int((rows["complete"] == 0).sum())
        plain.step(rows, draws_of(random, rows["a"]))
    before = plain.distance(agent)
    for each, engine in ((agent, Eager), (taped, Taped)):
        engine(each, BatchLoader([(store, Uniform(store), 1.0)], BATCH, each.window, each.batch_fields)).run(0, 10)
    assert short > 0
    assert plain.distance(taped) < 1e-10
    assert plain.distance(agent) < 1e-10 < before


def test_rewards_of_a_chunk_stop_at_the_first_mask_of_zero() -> None:
    """1 + 0.5 2 counts, 4 behind the success does not; the second window is cut short after one step."""
    fields = {
        "obs": torch.arange(6.0).reshape(1, 2, 3, 1),
        "next_obs": torch.arange(1.0, 7.0).reshape(1, 2, 3, 1),
        "action": torch.arange(12.0).reshape(1, 2, 3, 2),
        "reward": torch.tensor([[[1.0, 2.0, 4.0], [8.0, 0.0, 0.0]]]),
        "mask": torch.tensor([[[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]]),
        "valid": torch.tensor([[[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]]),
        "index": torch.tensor([[0, 3]]),
    }
    found = chunked(WindowBatch.of(fields), 0.5)
    assert found.reward.tolist() == [[2.0, 8.0]]
    assert found.mask.tolist() == [[0.0, 0.0]]
    assert found.obs.tolist() == [[[0.0], [3.0]]]
    assert found.next_obs.tolist() == [[[3.0], [6.0]]]
    assert found.action[0].tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert found.complete.tolist() == [[1.0, 0.0]]
    assert found.valid[0].tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]


def test_chunks_that_no_episode_holds_are_refused() -> None:
    """The longest episode has 11 transitions; the clone of the data needs no whole chunk."""
    store = make_store()
    make(store, action_chunk=11).setup(store)
    make(store, FlowBC, action_chunk=12).setup(store)
    with pytest.raises(OffrlError, match=r"action_chunk=12 is longer than the dataset's longest episode, of 11 tran"):
        make(store, action_chunk=12).setup(store)


@pytest.mark.parametrize("cls", [FQL, FlowBC])
def test_a_chunk_is_carried_out_before_the_policy_looks_again(cls: type[FlowBC]) -> None:
    """Observations within a chunk change nothing; the next chunk has its own noise; bounds are each dimension's own."""
    store = boxed(make_store(), BOXES[-1])
    agent = make(store, cls, action_chunk=2)
    obs = torch.randn(6, 1, 4, store.obs_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def walk(seen: Tensor) -> list[Tensor]:
        agent.episode_batches, state, taken = 0, agent.initial_state(4), []
        for now in seen:
            taken.append(agent.select_action(now, state))
            state = agent.update_state(state, taken[-1], torch.zeros(1, 4))
        return taken

    first, other = walk(obs), walk(torch.cat([obs[:1], obs[:1] + 9, obs[2:]]))
    for one, two in zip(first, other):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert not torch.equal(walk(obs[:1].expand(6, -1, -1, -1))[0], walk(obs[:1].expand(6, -1, -1, -1))[2])
    assert first[0].shape == (1, 4, store.action_dim)
    alone, state = agent.predict(obs[0, 0, 0].numpy(), lane=0)
    assert agent.predict(obs[1, 0, 0].numpy(), state)[0].shape == alone.shape == (store.action_dim,)


@pytest.mark.parametrize("box", [UNIT, BOXES[-1]], ids=str)
def test_flow_bc_equals_the_flow_of_fql(box: Bounds) -> None:
    """FQL's parts share no parameter, so its flow is that of cloning alone, in one Adam or in its own."""
    store = boxed(make_store(), box)
    agent, whole = make(store, FlowBC), make(store)
    start = copy.deepcopy(agent.flow)
    for each in (agent, whole):
        Eager(each, loader(store)).run(0, 5)
    assert difference(agent.flow, whole.flow) < 1e-12 < difference(agent.flow, start)


# ---- where gradients go -------------------------------------------------------------------------------------------


def batch_of(store: OfflineDataset, agent: FlowBC) -> Batch:
    return agent.prepare(store.transitions(torch.arange(20).unsqueeze(0)))


def norms(loss: Tensor, agent: FQL) -> dict[str, float]:
    """Largest gradient of a loss by each network's parameters."""
    found = {}
    for name in ("flow", "actor", "critics"):
        parameters = list(getattr(agent, name).parameters())
        gradients = torch.autograd.grad(loss.sum(), parameters, retain_graph=True, allow_unused=True)
        found[name] = max(0.0 if g is None else g.abs().max().item() for g in gradients)
    return found


def test_each_loss_moves_its_own_network_alone() -> None:
    store = make_store()
    agent = make(store)
    batch = batch_of(store, agent)
    for loss, own in (
        (agent.critic_loss(batch), "critics"),
        (agent.flow_loss(batch), "flow"),
        (agent.policy_loss(batch)[0], "actor"),
    ):
        for name, size in norms(loss, agent).items():
            assert (size > 0) == (name == own), (own, name)


def actor_gradient(agent: FQL, batch: Batch) -> Tensor:
    loss, _ = agent.policy_loss(batch)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), list(agent.actor.parameters()))])


@torch.no_grad()
def scale_critics(agent: FQL, factor: float) -> None:
    for p in (agent.critics.mlp.weights[-1], agent.critics.mlp.biases[-1]):
        p.mul_(factor)


def test_the_policys_loss_at_the_ends_of_alpha() -> None:
    """alpha = 0: Q alone, whatever the flow is; large alpha: the distance alone, whatever Q is."""
    store = make_store()
    agent = make(store, alpha=0.0, normalize_q=False)
    batch = batch_of(store, agent)
    alone = actor_gradient(agent, batch)
    with torch.no_grad():
        agent.flow.mlp.weights[-1].mul_(3)
    torch.testing.assert_close(actor_gradient(agent, batch), alone, rtol=0, atol=0)
    agent.cfg.alpha = 1e9
    near = actor_gradient(agent, batch) / 1e9
    scale_critics(agent, 0)
    far = actor_gradient(agent, batch) / 1e9
    torch.testing.assert_close(near, far, rtol=0, atol=1e-8)
    assert far.abs().max() > 1e-3


def test_normalised_q_has_no_scale() -> None:
    """Critics times 1000 change nothing with it, and 1000 times the gradient without it (alpha = 0)."""
    store = make_store()
    for normalize, factor in ((True, 1.0), (False, 1000.0)):
        agent = make(store, alpha=0.0, normalize_q=normalize)
        batch = batch_of(store, agent)
        before = actor_gradient(agent, batch)
        scale_critics(agent, 1000)
        torch.testing.assert_close(actor_gradient(agent, batch), factor * before, rtol=1e-9, atol=1e-12)


def test_q_pulls_only_inside_the_box_and_the_distance_outside_too() -> None:
    """u = 2 lies outside: Q's gradient is cut by the clip; the distance's is that of the unclipped u to the clipped flow."""
    store = make_store()
    agent = make(store, normalize_q=False)
    batch = batch_of(store, agent)
    for p in (*agent.actor.parameters(), *agent.flow.parameters()):
        p.data.zero_()
    agent.flow.mlp.biases[-1].data.fill_(50.0)  # the flow's action is 1, the nearest end of the box
    agent.actor.biases[-1].data.fill_(2.0)
    loss, metrics = agent.policy_loss(batch)
    (gradient,) = torch.autograd.grad(loss.sum(), agent.actor.biases[-1])
    torch.testing.assert_close(metrics["distill_loss"], torch.ones(1).double())
    torch.testing.assert_close(gradient, torch.full((1, 2), 1.0).double())  # 2 (u - g) / A, no part of Q


def test_the_target_is_the_reward_alone_where_the_episode_ends() -> None:
    store = make_store()
    batch = batch_of(store, agent := make(store))
    y, ended = agent.target_value(batch), batch.mask == 0
    assert ended.any()
    assert torch.equal(y[ended], batch.reward[ended])
    assert not (y == batch.reward)[~ended].any()


# ---- the flow -----------------------------------------------------------------------------------------------------


class Field(FlowPolicy):
    """A flow with a given velocity."""

    def __init__(self, velocity: Any, steps: int) -> None:
        super().__init__((0,), 3, 2, (8,), steps)
        self.field = velocity

    def velocity(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.field(x, t)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_euler_is_exact_for_constant_fields_and_point_masses(steps: int) -> None:
    obs, z = torch.zeros(1, 50, 3).double(), torch.randn(1, 50, 2, generator=torch.Generator().manual_seed(0)).double()
    shift, point = torch.tensor([0.3, -0.1]).double(), torch.tensor([0.7, -0.4]).double()
    moved = Field(lambda x, t: shift.expand_as(x), steps).sample(obs, z)
    torch.testing.assert_close(moved, (z + shift).clamp(-1, 1))
    landed = Field(lambda x, t: (point - x) / (1 - t), steps).sample(obs, z)
    torch.testing.assert_close(landed, point.expand_as(z))


class LinearQ(nn.Module):
    """Q(s, a) = k sum of a."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, obs: Tensor, action: Tensor, frozen: bool = False) -> Tensor:
        return self.slope * action.sum(-1).unsqueeze(1)


def test_a_linear_q_translates_the_flows_actions() -> None:
    """For Q = k sum(a) the minimiser is mu(s, z) = flow(s, z) + A k / (2 alpha): for each z its own action, shifted.

    With another z in the two policies mu would be the flow's mean, shifted. The flow maps z to z / 4, k = 1 and A = 2.
    """
    alpha = 5.0
    spec = Spec(3, 2, (0,))
    agent = FQL(spec, FQLConfig(alpha=alpha, normalize_q=False, hidden=(32,), flow_steps=10)).double()
    agent.flow = Field(lambda x, t: -0.75 * x / (1 - 0.75 * t), 10)  # x(t) = (1 - 0.75 t) z
    agent.critics = LinearQ(1.0)  # type: ignore[assignment]
    optimizer = Adam(agent.actor.parameters(), 3e-3).double()
    zeros = torch.zeros(1, 256, dtype=torch.float64)
    batch = Batch(obs=torch.zeros(1, 256, 3).double(), action=torch.zeros(1, 256, 2).double(), reward=zeros,
                  next_obs=torch.zeros(1, 256, 3).double(), mask=zeros, index=zeros.long())  # fmt: skip
    for step in range(600):
        agent.random.step.fill_(step)
        if step == 400:
            optimizer.lr = 3e-4
        optimizer.step(agent.policy_loss(batch)[0])
    z = torch.randn(1, 1000, 2, generator=torch.Generator().manual_seed(0)).double() * 0.8
    obs = torch.zeros(1, 1000, 3).double()
    shift = (agent.one_step(obs, z) - agent.flow.sample(obs, z)).detach()
    expected = 2 * 1.0 / (2 * alpha)  # 0.2
    assert (shift.mean() - expected).abs() < 0.01
    assert (
        shift - expected
    ).square().mean().sqrt() < 0.03  # for each z; with independent z it is the std of z / 4, 0.2


def test_flow_matching_keeps_two_modes() -> None:
    """Actions are -0.5 or 0.5. Most samples are near one of them, half at each; a Gaussian's mean would be 0."""
    flow = FlowPolicy((0,), 1, 1, (64, 64), 10, activation="gelu", glorot=True)
    random, optimizer = LaneRandom((0,)), Adam(flow.parameters(), 3e-3)
    obs = torch.ones(1, 256, 1)
    action = torch.tensor([-0.5, 0.5]).repeat(128).view(1, 256, 1)
    for step in range(1200):
        random.step.fill_(step)
        optimizer.step(flow.error(obs, action, random).mean((-2, -1)))
    z = torch.randn(1, 4000, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = flow.sample(torch.ones(1, 4000, 1), z)
    near = (x.abs() - 0.5).abs() < 0.15
    assert near.float().mean() > 0.7  # uniform samples on [-1, 1] would have 0.3
    assert 0.4 < (x > 0).float().mean() < 0.6


# ---- acting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [FlowBC, FQL])
def test_acting_samples_by_lane_place_and_timestep(cls: Any) -> None:
    """A draw depends on the lane's seed, the episode's place and the timestep: not on lanes or episodes beside it."""
    settings: Any = cls.Config(hidden=(16,), flow_steps=3)
    obs = torch.ones(2, 5, 3)
    both, alone = cls(Spec(3, 2, (4, 9)), settings), cls(Spec(3, 2, (9,)), settings)
    states = [agent.initial_state(5) for agent in (both, alone)]
    first = both.select_action(obs, states[0])
    torch.testing.assert_close(first[1:], alone.select_action(obs[1:], states[1]), rtol=0, atol=1e-6)
    few = both.select_action(obs[:, :2], states[0])
    torch.testing.assert_close(few, first[:, :2], rtol=0, atol=1e-6)
    assert torch.equal(first, both.select_action(obs, states[0]))  # asked twice: the same
    assert len(first[0].unique(dim=0)) > 2  # episodes differ in one state (some may meet in a corner of the box)
    later = both.select_action(obs, both.update_state(states[0], first, torch.zeros(2, 5)))
    assert not torch.equal(later, first)
    assert not torch.equal(both.select_action(obs, both.initial_state(5)), first)  # the next batch of episodes
    still = both.select_action(obs)
    torch.testing.assert_close(still, still[:, :1].expand_as(still))  # without a state: z = 0
    calm = cls(Spec(3, 2, (4, 9)), cls.Config(hidden=(16,), flow_steps=3, sample_actions=False))
    assert calm.initial_state(5) is None
    torch.testing.assert_close(calm.select_action(obs), still)


def test_acting_noise_is_standard_normal() -> None:
    agent = FlowBC(Spec(1, 2, (0, 1)), FlowBCConfig(hidden=(4,)))
    state = agent.initial_state(1)
    z = agent.acting_noise(torch.zeros(2, 50_000, 1), state, 2)
    assert z is not None
    for column in z.flatten(0, 1).double().T:
        inside = (torch.erf(column / 2**0.5) + 1) / 2  # uniform on [0, 1] if z is normal
        counts = torch.histc(inside, 20, 0, 1)
        expected = len(inside) / 20
        assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
    assert abs(torch.corrcoef(z.flatten(0, 1).T)[0, 1]) < 0.01


def test_initial_weights_are_glorots() -> None:
    agent = FQL(Spec(28, 5), FQLConfig())
    sizes = {"critics": 1_619_970, "flow": 808_453, "actor": 807_941}  # of the authors' networks at this size
    for name, size in sizes.items():
        module = getattr(agent, name)
        assert sum(p.numel() for p in module.parameters()) == size
        mlp = module if name == "actor" else module.mlp
        assert all((b == 0).all() for b in mlp.biases)
        for weight in mlp.weights:
            bound = (6 / sum(weight.shape[-2:])) ** 0.5
            assert 0.98 * bound < weight.abs().max() <= bound
    assert len(agent.critics.mlp.gains) == 4
    assert not len(agent.flow.mlp.gains)
