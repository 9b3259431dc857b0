"""ESPER's label stages against a plain restatement in float64; its labels against the exact returns of a gamble."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import difference, make_store, sequential
from torch import Tensor, nn

from offrl.agents.base import Batch, Spec
from offrl.agents.esper import CLUSTERS, ESPER, POLICY, RETURNS
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Taped
from offrl.training.trainer import train
from offrl.utils.errors import OffrlError

SMALL: dict[str, Any] = {"context": 3, "embed": 8, "layers": 1, "dropout": 0.0, "normalize_obs": False}
SMALL |= {"suffix": 4, "groups": 2, "kinds": 3, "label_hidden": (12,), "cluster_lr": 1e-2, "adversary_lr": 2e-2}
ROWS = [0, 5, 7, 8, 12, 20]  # starts, middles and last steps of episodes of 7, 1, 3 and 11 steps


def make_agent(store: OfflineDataset, seeds: tuple[int, ...] = (0,), **settings: Any) -> ESPER:
    spec = Spec(store.obs_dim, store.action_dim, seeds, discrete=bool(store.info.discrete))
    agent = ESPER(spec, ESPER.Config(**{**SMALL, **settings})).to(store.rewards.dtype)
    agent.setup(store)
    return agent


def windows(agent: ESPER, store: OfflineDataset, rows: list[int] = ROWS) -> Batch:
    assert agent.window is not None
    index = torch.tensor(rows).expand(agent.spec.lanes, -1)
    return agent.prepare(store.windows(index, agent.window, agent.batch_fields))


class Plain:
    """One lane, future by future, from ordinary layers and optimisers."""

    NAMES = ("embed_step", "cluster_head", "action_head", "adversary", "return_head")

    def __init__(self, agent: ESPER, store: OfflineDataset) -> None:
        self.agent, self.store, self.discrete = agent, store, agent.spec.discrete
        self.nets = {name: sequential(getattr(agent, name), 0) for name in self.NAMES}
        clusters = [p for name in self.NAMES[:3] for p in self.nets[name].parameters()]
        self.adams = [torch.optim.AdamW(clusters, 1e-2, weight_decay=0.01)]
        self.adams.append(torch.optim.AdamW(self.nets["adversary"].parameters(), 2e-2, weight_decay=0.01))
        self.adams.append(torch.optim.AdamW(self.nets["return_head"].parameters(), 1e-2, weight_decay=0.01))

    def steps(self, row: int) -> range:
        return range(row, min(row + 4, int(self.store.offsets[self.store.episode_of_row[row] + 1])))

    def action(self, i: int) -> Tensor:
        return nn.functional.one_hot(self.store.actions[i], 3).double() if self.discrete else self.store.actions[i]

    def known(self, i: int) -> Tensor:
        return torch.cat([self.store.observations[i], self.action(i)])

    def logits(self, row: int) -> Tensor:
        tokens = [torch.cat([self.known(i), self.store.timesteps[i].double().view(1) / 11]) for i in self.steps(row)]
        return self.nets["cluster_head"](torch.stack([self.nets["embed_step"](x) for x in tokens]).mean(0)).view(2, 3)

    def errors(self, rows: list[int], codes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean errors of actions and of next states over all steps of all futures."""
        action_errors, state_errors = [], []
        for row, code in zip(rows, codes):
            for i in self.steps(row):
                out = self.nets["action_head"](torch.cat([self.store.observations[i], code]))
                if self.discrete:
                    action_errors.append(nn.functional.cross_entropy(out, self.store.actions[i]))
                else:
                    action_errors.append((out - self.store.actions[i]).square().mean())
                foretold = self.nets["adversary"](torch.cat([self.known(i), code]))
                state_errors.append((foretold - self.store.next_observations[i]).square().mean())
        return torch.stack(action_errors).mean(), torch.stack(state_errors).mean()

    def cluster_step(self, rows: list[int], uniforms: Tensor, weight: float) -> list[float]:
        gumbel = -(-uniforms.log()).log()
        codes = [(self.logits(row) + g).softmax(1).flatten() for row, g in zip(rows, gumbel)]
        action_error, state_error = self.errors(rows, codes)
        self.adams[0].zero_grad()
        (weight * action_error - state_error).backward()
        self.adams[0].step()
        self.adams[1].zero_grad()
        told = self.errors(rows, [code.detach() for code in codes])[1]
        untold = self.errors(rows, [torch.zeros(6, dtype=torch.float64) for _ in codes])[1]
        (told + untold).backward()
        self.adams[1].step()
        return [float(x.detach()) for x in (action_error, told, untold - told)]

    def return_step(self, rows: list[int], uniforms: Tensor, scale: float) -> float:
        losses = []
        for row, uniform in zip(rows, uniforms):
            code = one_hot_sample(self.logits(row).detach(), uniform)
            target = self.store.return_to_go[row] * scale
            losses.append((self.nets["return_head"](torch.cat([self.known(row), code])) - target).square())
        self.adams[2].zero_grad()
        torch.stack(losses).mean().backward()
        self.adams[2].step()
        return float(torch.stack(losses).mean().detach())

    def distance(self) -> float:
        return max(difference(net, sequential(getattr(self.agent, name), 0)) for name, net in self.nets.items())


def one_hot_sample(logits: Tensor, uniform: Tensor) -> Tensor:
    kinds = (logits.softmax(1).cumsum(1)[:, :-1] <= uniform.unsqueeze(1)).sum(1)
    return nn.functional.one_hot(kinds, logits.shape[1]).double().flatten()


@pytest.mark.parametrize("context", [3, 6], ids="context {}".format)
@pytest.mark.parametrize("discrete", [None, 3])
def test_updates_equal_a_plain_restatement(discrete: int | None, context: int) -> None:
    """The future ends after 4 timesteps where the policy's windows are longer, too."""
    store = make_store(discrete)
    agent = make_agent(store, action_weight=0.3, return_scale=0.5, context=context)
    plain = Plain(agent, store)
    batch = windows(agent, store)
    for update in range(1, 7):
        agent.random.step.fill_(update)
        if update < 4:
            uniforms = agent.random.uniform("esper/cluster", (6, 2, 3))[0]
            expected = plain.cluster_step(ROWS, uniforms, 0.3)
            metrics = agent.update(batch, CLUSTERS)
            found = [metrics[name].item() for name in ("cluster_action_loss", "adversary_loss", "advantage")]
        else:
            expected = [plain.return_step(ROWS, agent.random.uniform("esper/cluster", (6, 2))[0], 0.5)]
            found = [agent.update(batch, RETURNS)["return_loss"].item()]
        assert max(abs(a - b) for a, b in zip(found, expected)) < 1e-10
        assert plain.distance() < 1e-10 * update


def test_the_dataset_is_relabelled_by_the_windows_own_labels() -> None:
    """Row by row what a window from there gives with the same coins; rounded; and the best of a start is asked for."""
    store = make_store()
    agent = make_agent(store, seeds=(0, 1), return_scale=0.5, label_step=0.01)
    agent.relabel()
    labels = agent.dataset_index.labels
    assert labels.shape == (2, 22)
    uniforms = agent.random.uniform("esper/label/0", (22, 2), torch.zeros((), dtype=torch.int64))
    for lane in range(2):
        plain = Plain(agent, store)
        plain.nets = {name: sequential(getattr(agent, name), lane) for name in plain.NAMES}
        for row in range(22):
            code = one_hot_sample(plain.logits(row), uniforms[lane, row])
            scaled = plain.nets["return_head"](torch.cat([plain.known(row), code])).item()
            assert abs(labels[lane, row].item() - round(scaled / 0.01) * 0.01 / 0.5) < 1e-6
    assert labels.unique().numel() > 4
    assert torch.equal(agent.target, labels[:, store.offsets[:-1]].amax(1))
    asked = make_agent(store, target_return=7.0)
    asked.relabel()
    assert asked.target == 7


def test_labels_average_the_very_steps_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the cluster's probabilities for a draw of it and next to no rounding a label moves with every step of its future.

    Five rows at a time, so that futures run over the pieces' ends; windows at the ends of episodes are shorter than the suffix.
    """
    store = make_store()
    agent = make_agent(store, label_step=1e-9)
    with torch.no_grad():
        agent.cluster_head.weights[-1].mul_(20)  # far from uniform
    monkeypatch.setattr("offrl.agents.esper.ROWS", 5)
    monkeypatch.setattr(agent, "hard", lambda logits, *_: logits.softmax(-1).flatten(2))
    agent.relabel()
    plain = Plain(agent, store)
    for row in range(22):
        code = plain.logits(row).softmax(1).flatten()
        expected = plain.nets["return_head"](torch.cat([plain.known(row), code])).item()
        assert abs(agent.dataset_index.labels[0, row].item() - expected) < 2e-9


def test_labels_and_training_see_the_same_future() -> None:
    """Of 4 timesteps, with windows of 6: `label` of a window equals the dataset's label, with probabilities for draws."""
    store = make_store()
    agent = make_agent(store, context=6, label_step=0.0)
    with torch.no_grad():
        agent.cluster_head.weights[-1].mul_(20)  # far from uniform
    agent.hard = lambda logits, *_: logits.softmax(-1).flatten(2)  # type: ignore[method-assign]
    agent.relabel()
    labels = agent.label(windows(agent, store, list(range(22))))[0, :, 0]
    torch.testing.assert_close(labels, agent.dataset_index.labels[0], rtol=0, atol=1e-10)


def test_labels_are_rounded_to_a_step_or_not_at_all() -> None:
    """Two lanes of the same seed, the second without rounding."""
    store = make_store()
    agent = make_agent(store, seeds=(0, 0), label_step=[0.1, 0.0], return_scale=0.5)
    agent.relabel()
    rounded, exact = agent.dataset_index.labels
    torch.testing.assert_close(rounded, (exact * 0.5 / 0.1).round() * 0.1 / 0.5, rtol=0, atol=1e-6)  # 0.1 in float32
    assert (rounded - exact).abs().max() > 0.01
    single = make_agent(store, label_step=0.0, return_scale=0.5)
    single.relabel()
    torch.testing.assert_close(single.dataset_index.labels[0], exact, rtol=0, atol=1e-10)


def test_networks_without_a_hidden_layer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"label_hidden=\[\] should name the width"):
        make_agent(make_store(), label_hidden=())


def test_the_policy_learns_from_labels_alone() -> None:
    """The third stage is the decision transformer's update on windows whose returns to go are labels."""
    store = make_store()
    agent = make_agent(store)
    agent.relabel()
    batch = agent.relabelled(windows(agent, store))
    assert batch.return_to_go is not None
    assert batch.valid is not None
    assert batch.obs.shape == (1, 6, 3, 3)
    for i, row in enumerate(ROWS):
        steps = int(batch.valid[0, i].sum())
        assert torch.equal(batch.return_to_go[0, i, :steps], agent.dataset_index.labels[0, row : row + steps])
    before = {name: p.clone() for name, p in agent.named_parameters()}
    agent.update(windows(agent, store), POLICY)
    moved = {name.split(".")[0] for name, p in agent.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"net"}


def test_stages_follow_each_other() -> None:
    agent = make_agent(make_store(), cluster_updates=3, return_updates=2)
    assert [agent.phase(step) for step in range(7)] == [CLUSTERS] * 3 + [RETURNS] * 2 + [POLICY] * 2
    assert agent.pretrain_updates == 5
    with pytest.raises(OffrlError, match="updates=6000: esper prepares for 6000 updates"):
        train({"agent": {"_target_": "offrl.agents.esper.ESPER"}, "dataset": "forge/bandit/p0.1-v0", "updates": 6000})


def make_gamble(rows: int = 1500) -> OfflineDataset:
    """ESPER's gambling task with its exact shares: action 0 pays 5 or -15, action 1 pays 1 or -6, action 2 pays 1."""
    episode = torch.arange(rows)
    action, uniform = episode % 3, episode // 3 % 2
    state = torch.stack([torch.zeros_like(action), 1 + 2 * action + uniform], 1).flatten()
    pays = torch.tensor([[5.0, -15.0], [1.0, -6.0], [1.0, 1.0]])[action, uniform]
    obs = nn.functional.one_hot(state, 7).float()
    nxt = obs.clone()
    nxt[0::2] = obs[1::2]
    second = torch.randint(3, (rows,), generator=torch.Generator().manual_seed(0))
    reward = torch.stack([torch.zeros(rows), pays], 1).flatten()
    terminal = torch.tensor([0.0, 1.0]).repeat(rows)
    offsets = torch.arange(0, 2 * rows + 1, 2)
    return OfflineDataset(
        obs, torch.stack([action, second], 1).flatten(), reward, nxt, terminal, offsets, DatasetInfo(discrete=3)
    )


GAMBLE: dict[str, Any] = {
    "suffix": 2,
    "context": 2,
    "groups": 1,
    "kinds": 8,
    "label_hidden": (64,),
    "return_scale": 0.2,
}
GAMBLE |= {
    "action_weight": 0.01,
    "cluster_updates": 900,
    "return_updates": 350,
    "cluster_lr": 1e-3,
    "adversary_lr": 2e-3,
}
GAMBLE |= {"embed": 16, "lr": 3e-3, "warmup": 20}


def test_labels_of_a_gamble_are_the_mean_returns_of_its_actions() -> None:
    """-5, -2.5 and 1, as in the labels that the authors published; so the best one asks for the sure thing."""
    store = make_gamble()
    agent = make_agent(store, (0, 1), **GAMBLE)
    Taped(agent, BatchLoader([(store, Uniform(store), 1.0)], 100, agent.window, agent.batch_fields)).run(0, 1400)
    first = store.offsets[:-1]
    for labels in agent.dataset_index.labels[:, first]:
        means = torch.stack([labels[store.actions[first] == action].mean() for action in range(3)])
        # Half of the smallest gap: none can be taken for another. Over eight seeds it was 0.2 to 1.
        assert (means - torch.tensor([-5.0, -2.5, 1.0])).abs().max() < 1.25
    start = store.observations[:1].expand(2, 1, -1)
    assert agent.select_action(start, agent.initial_state(1)).tolist() == [[2], [2]]
    assert (agent.predicted_return(start, agent.initial_state(1)) - 1).abs().max() < 0.6


def test_the_adversary_keeps_next_states_out_of_clusters() -> None:
    """`advantage`, what clusters are worth to who foretells states: near zero; clear where they help instead (weight -1)."""
    store = make_gamble()
    agent = make_agent(store, (0, 0), **GAMBLE, adversary_weight=[-1.0, 1.0])
    engine = Taped(agent, BatchLoader([(store, Uniform(store), 1.0)], 100, agent.window, agent.batch_fields))
    helped, fought = engine.run(0, 600)["advantage"].tolist()
    assert helped > 0.01  # of 0.02, the variance of a coin's two states in seven dimensions, over two steps
    assert abs(fought) < 0.003
