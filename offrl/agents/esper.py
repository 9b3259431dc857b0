"""ESPER: a decision transformer that is asked for the average return of a cluster of futures instead of a return.

Paster, McIlraith & Ba, "You Can't Count on Luck: Why Decision Transformers and RvS Fail in Stochastic Environments", NeurIPS
2022 (arXiv 2205.15967); authors' code keirp/return_transforms. A future (s_t, a_t, s_{t+1}, a_{t+1}, ...) is put into a cluster
such that the cluster tells the actions to come and an adversary can't use it to foretell next states. What is left is intent
and not luck, so the average return of the cluster's futures can be had by intending the same.

Training has three stages, counted in updates: clusters against their adversary; the average return of state, action and
cluster; then the dataset is relabelled and the decision transformer learns from the labels alone. It knows nothing before.

Deviations. The future is the set of its steps, whose embeddings are averaged, and not a sequence that an LSTM reads; it ends
after `suffix` steps. There is no batch normalisation (as in later forks). A cluster is compared with the actions and states of
all steps of its future at once, where the authors draw an earlier cluster for every step: the same pairs, though later steps
weigh more. Padding counts nowhere. The return asked for defaults to the best label of an episode's start; what is earned is
taken off it, which is exact where rewards come last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offrl.agents.base import Batch
from offrl.agents.dt import DT, DTConfig
from offrl.nets import MLP, Adam, categorical_log_prob, choose, no_compile, one_hot, per_lane

if TYPE_CHECKING:
    from offrl.data.dataset import OfflineDataset

CLUSTERS, RETURNS, POLICY = range(3)  # stages
ROWS = 4096  # that are relabelled at once


@dataclass
class ESPERConfig(DTConfig):
    cluster_updates: int = 5000  # updates of clusters and adversary
    return_updates: int = 1000  # then, of the clusters' average returns
    suffix: int = 64  # steps of a future
    groups: int = 4  # a cluster is one kind out of each group
    kinds: int = 32
    action_weight: float = 0.05  # of the action's prediction
    adversary_weight: float = 1.0  # of the adversary's loss, which clusters raise
    label_step: float = 0.1  # labels are rounded to multiples of it, after `return_scale`
    cluster_lr: float = 1e-4
    adversary_lr: float = 5e-4
    label_hidden: tuple[int, ...] = (512, 512)  # widths of all networks but the transformer
    label_decay: float = 0.01  # weight decay of theirs


class ESPER(DT):
    """pi(. | the last K labels, states and actions), label = E[R_t | s_t, a_t, cluster of the future]."""

    Config = ESPERConfig

    def build(self) -> None:
        super().build()
        spec, cfg = self.spec, self.cfg
        self.window = max(cfg.context, cfg.suffix)
        self.pretrain_updates = cfg.cluster_updates + cfg.return_updates
        self.horizon: Tensor
        self.register_buffer("horizon", torch.ones(()))
        code, known = cfg.groups * cfg.kinds, spec.obs_dim + spec.action_dim

        def mlp(name: str, fan_in: int, fan_out: int) -> MLP:
            return MLP(spec.seeds, [fan_in, *cfg.label_hidden, fan_out], name=f"esper/{name}")

        self.embed_step = mlp("embed", known + 1, cfg.label_hidden[-1])
        self.cluster_head = mlp("cluster", cfg.label_hidden[-1], code)
        self.action_head = mlp("action", spec.obs_dim + code, spec.action_dim)
        self.adversary = mlp("adversary", known + code, spec.obs_dim)
        self.return_head = mlp("return", known + code, 1)
        clusters = [*self.embed_step.parameters(), *self.cluster_head.parameters(), *self.action_head.parameters()]
        decay = {"weight_decay": cfg.label_decay}
        self.cluster_optimizer = Adam(clusters, cfg.cluster_lr, **decay)
        self.adversary_optimizer = Adam(self.adversary.parameters(), cfg.adversary_lr, **decay)
        self.return_optimizer = Adam(self.return_head.parameters(), cfg.cluster_lr, **decay)

    def setup(self, store: OfflineDataset) -> None:
        super().setup(store)
        self.horizon.fill_(store.steps.max())
        self.dataset_index = Relabelled(store)

    def phase(self, step: int) -> int:
        """The stage."""
        clusters, returns = self.cfg.cluster_updates, self.cfg.return_updates
        return CLUSTERS if step < clusters else RETURNS if step < clusters + returns else POLICY

    # ---- clusters ---------------------------------------------------------------------------------------------

    def known(self, obs: Tensor, action: Tensor) -> Tensor:
        if self.spec.discrete:
            action = one_hot(action, self.spec.action_dim, obs.dtype)
        return torch.cat([obs, action], -1)

    def embedded(self, obs: Tensor, action: Tensor, timestep: Tensor) -> Tensor:
        """`[lanes, n, time, width]` of steps `[lanes, n, time, ...]`."""
        time = (timestep / self.horizon).to(obs.dtype).unsqueeze(-1)
        steps = torch.cat([self.known(obs, action), time], -1)
        return self.embed_step(steps.flatten(1, 2)).unflatten(1, obs.shape[1:3])

    def logits(self, batch: Batch) -> Tensor:
        """Of the cluster of each window, `[lanes, batch, groups, kinds]`."""
        assert batch.valid is not None
        assert batch.timestep is not None
        valid = batch.valid.unsqueeze(-1)
        embedded = self.embedded(batch.obs, batch.action, batch.timestep)
        return self.grouped(self.cluster_head((embedded * valid).sum(2) / valid.sum(2)))

    def grouped(self, logits: Tensor) -> Tensor:
        return logits.unflatten(-1, (self.cfg.groups, self.cfg.kinds))

    def soft(self, logits: Tensor) -> Tensor:
        """Gumbel-softmax samples at temperature 1, `[lanes, batch, code]`."""
        uniform = self.random.uniform("esper/cluster", logits.shape[1:])
        gumbel = -(-(uniform + 2.0**-54).log()).log()
        return (logits + gumbel.to(logits.dtype)).softmax(-1).flatten(2)

    def hard(self, logits: Tensor, name: str, steps: Tensor | None = None) -> Tensor:
        """One-hot samples, `[lanes, batch, code]`."""
        uniform = self.random.uniform(name, logits.shape[1:-1], steps)
        return one_hot(choose(logits, uniform), self.cfg.kinds, logits.dtype).flatten(2)

    def cluster_update(self, batch: Batch) -> dict[str, Tensor]:
        """Clusters tell actions and not next states; the adversary tells next states, with the cluster and without."""
        assert batch.valid is not None
        code = self.soft(self.logits(batch))
        each = code.unsqueeze(2).expand(-1, -1, batch.obs.shape[2], -1)
        action_loss = masked_mean(self.action_error(batch, each), batch.valid)
        told = masked_mean(self.next_state_error(batch, each, frozen=True), batch.valid)
        self.cluster_optimizer.step(self.cfg.action_weight * action_loss - self.cfg.adversary_weight * told)
        told = masked_mean(self.next_state_error(batch, each.detach()), batch.valid)
        untold = masked_mean(self.next_state_error(batch, torch.zeros_like(each)), batch.valid)
        self.adversary_optimizer.step(told + untold)
        found = {"cluster_action_loss": action_loss, "adversary_loss": told, "advantage": untold - told}
        return {name: value.detach() for name, value in found.items()}

    def action_error(self, batch: Batch, code: Tensor) -> Tensor:
        """`[lanes, batch, time]`: cross-entropy, or squared error, of the action that state and cluster suggest."""
        out = self.action_head(torch.cat([batch.obs, code], -1).flatten(1, 2)).unflatten(1, batch.obs.shape[1:3])
        if self.spec.discrete:
            return -categorical_log_prob(out, batch.action)
        return (out - batch.action).square().mean(-1)

    def next_state_error(self, batch: Batch, code: Tensor, frozen: bool = False) -> Tensor:
        """`[lanes, batch, time]`: the adversary's squared error."""
        known = torch.cat([self.known(batch.obs, batch.action), code], -1)
        out = self.adversary(known.flatten(1, 2), frozen=frozen).unflatten(1, batch.obs.shape[1:3])
        return (out - batch.next_obs).square().mean(-1)

    # ---- labels -----------------------------------------------------------------------------------------------

    def expected_return(self, obs: Tensor, action: Tensor, code: Tensor) -> Tensor:
        """`[lanes, n]`, scaled by `return_scale`."""
        return self.return_head(torch.cat([self.known(obs, action), code], -1)).squeeze(-1)

    def return_update(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.return_to_go is not None
        with torch.no_grad():
            code = self.hard(self.logits(batch), "esper/cluster")
        target = batch.return_to_go[:, :, 0] * per_lane(self.cfg.return_scale)
        loss = (self.expected_return(batch.obs[:, :, 0], batch.action[:, :, 0], code) - target).square().mean(1)
        self.return_optimizer.step(loss)
        return {"return_loss": loss.detach()}

    def rounded(self, scaled: Tensor) -> Tensor:
        """Labels as returns, of scaled ones."""
        step = per_lane(self.cfg.label_step)
        return (scaled / step).round() * step / per_lane(self.cfg.return_scale)

    @torch.no_grad()
    def label(self, batch: Batch) -> Tensor:
        """The label of each window's first step, from a cluster drawn for it."""
        code = self.hard(self.logits(batch), "esper/label")
        return self.rounded(self.expected_return(batch.obs[:, :, 0], batch.action[:, :, 0], code)).unsqueeze(-1)

    @torch.no_grad()
    def relabel(self) -> None:
        """Labels of all rows; and ask for the best one of an episode's start, unless the configuration names a return."""
        store, labels = self.dataset_index.store, []
        last = store.offsets[1:][store.episode_of_row]
        never = torch.zeros((), dtype=torch.int64, device=store.device)  # no update's number: every call draws the same
        obs, action = self.normalize(store.observations), store.actions
        for start in range(0, len(store), ROWS):
            rows = torch.arange(start, min(start + ROWS, len(store)), device=store.device)
            ahead = torch.arange(start, min(start + ROWS + self.cfg.suffix, len(store)), device=store.device)
            seen = (x[ahead].expand(self.spec.lanes, 1, *x[ahead].shape) for x in (obs, action, store.timesteps))
            total = self.embedded(*seen)[:, 0].double().cumsum(1)
            total = torch.cat([torch.zeros_like(total[:, :1]), total], 1)
            end = torch.minimum(last[rows], rows + self.cfg.suffix)
            mean = (total[:, end - start] - total[:, rows - start]) / (end - rows).unsqueeze(-1)
            logits = self.grouped(self.cluster_head(mean.to(obs.dtype)))
            state, taken = (x[rows].expand(self.spec.lanes, *x[rows].shape) for x in (obs, action))
            code = self.hard(logits, f"esper/label/{start}", never)
            labels.append(self.rounded(self.expected_return(state, taken, code)))
        self.dataset_index.labels = torch.cat(labels, 1)
        if self.cfg.target_return is None:
            self.target.copy_(self.dataset_index.labels[:, store.offsets[:-1]].amax(1))

    # ---- the policy -------------------------------------------------------------------------------------------

    def relabelled(self, batch: Batch) -> Batch:
        """The policy's windows, with labels for returns to go."""
        if self.dataset_index is None:
            raise RuntimeError("ESPER relabels the dataset; call agent.setup(dataset) before the first update")
        if self.dataset_index.labels is None:
            self.relabel()
        labels, steps = self.dataset_index.labels, slice(0, self.cfg.context)
        rows = batch.index.unsqueeze(-1) + torch.arange(self.cfg.context, device=labels.device)
        rows = rows.clamp(max=labels.shape[1] - 1)
        cut = batch.map(lambda x: x if x.ndim == 2 else x[:, :, steps])
        return replace(cut, return_to_go=labels.gather(1, rows.flatten(1)).view(rows.shape))

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        if phase == CLUSTERS:
            return self.cluster_update(batch)
        if phase == RETURNS:
            return self.return_update(batch)
        return super().update(self.relabelled(batch), phase)


class Relabelled:
    """A dataset and its labels `[lanes, N]`, once they are made."""

    def __init__(self, store: OfflineDataset) -> None:
        self.store = store
        self.labels: Tensor | None = None


no_compile(ESPER, "relabel")  # once a run, in pieces


def masked_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean over the steps that exist, `[lanes]`."""
    return (x * valid).sum((1, 2)) / valid.sum((1, 2))
