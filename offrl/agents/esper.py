"""ESPER: a decision transformer conditioned on the average return of a cluster of futures instead of a return.

Paster, McIlraith & Ba, "You Can't Count on Luck: Why Decision Transformers and RvS Fail in Stochastic Environments", NeurIPS
2022 (arXiv 2205.15967); authors' code keirp/return_transforms. A network assigns each future (s_t, a_t, s_{t+1}, ...) to a
cluster that predicts the actions to come but does not help an adversary to predict next states. Such a cluster describes
intent, not luck, so acting with that intent obtains the average return of the cluster's futures.

Training has three stages, counted in updates: clusters against their adversary; the average return of state, action and
cluster; then the dataset is relabelled with these averages and the decision transformer learns from the labels alone.

Deviations. The future is the set of its timesteps, whose embeddings are averaged, not a sequence that an LSTM reads; it
ends after `suffix` timesteps. There is no batch normalisation (as in later forks). A cluster is compared with the
actions and states of all timesteps of its future at once, where the authors sample an earlier cluster for every
timestep: the same pairs, though later timesteps weigh more. Padding counts nowhere. A terminal timestep counts with
whatever successor the dataset has: where the file has none, that is the state itself or the next episode's first one,
and the adversary learns to predict that. The target return defaults to the best label of an episode's start; rewards
are subtracted from it, which is exact where rewards come last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from offrl.agents.base import WindowBatch
from offrl.agents.dt import DT, DTConfig
from offrl.nets import MLP, Adam, categorical_log_prob, choose, no_compile, one_hot, per_lane

if TYPE_CHECKING:
    from offrl.data.dataset import OfflineDataset

CLUSTERS, RETURNS, POLICY = range(3)  # training stages
ROWS = 4096  # number of rows relabelled at once


@dataclass
class ESPERConfig(DTConfig):
    cluster_updates: int = 5000  # updates of clusters and adversary, the first stage
    return_updates: int = 1000  # updates of the clusters' average returns, the second stage
    suffix: int = 64  # number of timesteps of a future
    groups: int = 4  # number of categorical variables that make up a cluster
    kinds: int = 32  # number of categories of each
    action_weight: float = 0.05  # weight of the action prediction
    adversary_weight: float = 1.0  # weight of the adversary's loss, which the clusters maximise
    label_step: float = 0.1  # rounding step of the labels, after `return_scale`; 0: labels as they are
    cluster_lr: float = 1e-4  # learning rate of clusters and average returns
    adversary_lr: float = 5e-4  # learning rate of the adversary
    label_hidden: tuple[int, ...] = (512, 512)  # widths of the hidden layers of all networks but the transformer
    label_decay: float = 0.01  # weight decay of these networks
    least: ClassVar[dict[str, int]] = {**DTConfig.least, "suffix": 1, "groups": 1, "kinds": 1}
    tiny: ClassVar[dict[str, Any]] = {  # settings of the contract tests
        **DTConfig.tiny,
        "suffix": 3,
        "cluster_updates": 3,
        "return_updates": 2,
        "groups": 2,
        "kinds": 4,
    }
    toy: ClassVar[dict[str, Any]] = {  # with these it learns their toy task
        "cluster_updates": 150,
        "return_updates": 250,
        "cluster_lr": 1e-3,
        "adversary_lr": 1e-3,
    }


class ESPER(DT):
    """pi(. | the last K labels, states and actions), label = E[R_t | s_t, a_t, cluster of the future]."""

    Config = ESPERConfig
    cfg: ESPERConfig
    horizon: Tensor

    def build(self) -> None:
        super().build()
        spec, cfg = self.spec, self.cfg
        if not cfg.label_hidden:
            raise ValueError("label_hidden=[] should name the width of one hidden layer at least.")
        self.window = max(cfg.context, cfg.suffix)
        self.pretrain_updates = cfg.cluster_updates + cfg.return_updates
        self.register_buffer("horizon", torch.ones(()))
        code, pair = cfg.groups * cfg.kinds, spec.obs_dim + spec.action_dim  # widths of a cluster and of (s, a)

        def mlp(name: str, fan_in: int, fan_out: int) -> MLP:
            return MLP(spec.seeds, [fan_in, *cfg.label_hidden, fan_out], name=f"esper/{name}")

        self.embed_step = mlp("embed", pair + 1, cfg.label_hidden[-1])
        self.cluster_head = mlp("cluster", cfg.label_hidden[-1], code)
        self.action_head = mlp("action", spec.obs_dim + code, spec.action_dim)
        self.adversary = mlp("adversary", pair + code, spec.obs_dim)
        self.return_head = mlp("return", pair + code, 1)
        clusters = [*self.embed_step.parameters(), *self.cluster_head.parameters(), *self.action_head.parameters()]
        decay = cfg.label_decay
        self.cluster_optimizer = Adam(clusters, cfg.cluster_lr, weight_decay=decay)
        self.adversary_optimizer = Adam(self.adversary.parameters(), cfg.adversary_lr, weight_decay=decay)
        self.return_optimizer = Adam(self.return_head.parameters(), cfg.cluster_lr, weight_decay=decay)

    def setup(self, dataset: OfflineDataset) -> None:
        super().setup(dataset)
        self.horizon.fill_(dataset.steps.max())
        self.dataset_index = Relabelled(dataset)

    def phase(self, step: int) -> int:
        """The training stage."""
        clusters, returns = self.cfg.cluster_updates, self.cfg.return_updates
        return CLUSTERS if step < clusters else RETURNS if step < clusters + returns else POLICY

    # ---- clusters ---------------------------------------------------------------------------------------------

    def pair(self, obs: Tensor, action: Tensor) -> Tensor:
        """(s, a) as one vector, with discrete actions as one-hot vectors."""
        if self.spec.discrete:
            action = one_hot(action, self.spec.action_dim, obs.dtype)
        return torch.cat([obs, action], -1)

    def future(self, batch: WindowBatch) -> WindowBatch:
        """The windows' first `suffix` timesteps: the policy's `context` may be longer, and is no part of a future."""
        return first_timesteps(batch, self.cfg.suffix)

    def embedded(self, obs: Tensor, action: Tensor, timestep: Tensor) -> Tensor:
        """Embeddings `[lanes, n, time, width]` of timesteps `[lanes, n, time, ...]`."""
        time = (timestep / self.horizon).to(obs.dtype).unsqueeze(-1)
        steps = torch.cat([self.pair(obs, action), time], -1)
        return self.embed_step(steps.flatten(1, 2)).unflatten(1, obs.shape[1:3])

    def logits(self, batch: WindowBatch) -> Tensor:
        """Logits of the cluster of each future, `[lanes, batch, groups, kinds]`."""
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

    def hard(self, logits: Tensor, stream: str, steps: Tensor | None = None) -> Tensor:
        """One-hot samples, `[lanes, batch, code]`."""
        uniform = self.random.uniform(stream, logits.shape[1:-1], steps)
        return one_hot(choose(logits, uniform), self.cfg.kinds, logits.dtype).flatten(2)

    def cluster_update(self, batch: WindowBatch) -> dict[str, Tensor]:
        """Clusters learn to predict actions but not next states; the adversary predicts these with and without clusters."""
        code = self.soft(self.logits(batch))
        each = code.unsqueeze(2).expand(-1, -1, batch.obs.shape[2], -1)
        action_loss = masked_mean(self.action_error(batch, each), batch.valid)
        with_code = masked_mean(self.next_state_error(batch, each, frozen=True), batch.valid)
        self.cluster_optimizer.step(self.cfg.action_weight * action_loss - self.cfg.adversary_weight * with_code)
        with_code = masked_mean(self.next_state_error(batch, each.detach()), batch.valid)
        without = masked_mean(self.next_state_error(batch, torch.zeros_like(each)), batch.valid)
        self.adversary_optimizer.step(with_code + without)
        return {"cluster_action_loss": action_loss, "adversary_loss": with_code, "advantage": without - with_code}

    def action_error(self, batch: WindowBatch, code: Tensor) -> Tensor:
        """`[lanes, batch, time]`: cross-entropy, or squared error, of the action predicted from state and cluster."""
        out = self.action_head(torch.cat([batch.obs, code], -1).flatten(1, 2)).unflatten(1, batch.obs.shape[1:3])
        if self.spec.discrete:
            return -categorical_log_prob(out, batch.action)
        return (out - batch.action).square().mean(-1)

    def next_state_error(self, batch: WindowBatch, code: Tensor, frozen: bool = False) -> Tensor:
        """`[lanes, batch, time]`: the adversary's squared error of the next state."""
        inputs = torch.cat([self.pair(batch.obs, batch.action), code], -1)
        out = self.adversary(inputs.flatten(1, 2), frozen=frozen).unflatten(1, batch.obs.shape[1:3])
        return (out - batch.next_obs).square().mean(-1)

    # ---- labels -----------------------------------------------------------------------------------------------

    def expected_return(self, obs: Tensor, action: Tensor, code: Tensor) -> Tensor:
        """E[R | s, a, cluster] `[lanes, n]`, times `return_scale`."""
        return self.return_head(torch.cat([self.pair(obs, action), code], -1)).squeeze(-1)

    def return_update(self, batch: WindowBatch) -> dict[str, Tensor]:
        """The return head regresses the return of each future's first timestep on (s, a) and a cluster of the future."""
        with torch.no_grad():
            code = self.hard(self.logits(batch), "esper/cluster")
        target = batch.return_to_go[:, :, 0] * per_lane(self.cfg.return_scale)
        loss = (self.expected_return(batch.obs[:, :, 0], batch.action[:, :, 0], code) - target).square().mean(1)
        self.return_optimizer.step(loss)
        return {"return_loss": loss}

    def rounded(self, scaled: Tensor) -> Tensor:
        """Labels in units of returns: scaled ones, rounded and divided by `return_scale`."""
        step = per_lane(self.cfg.label_step)
        exact = torch.as_tensor(step == 0, device=scaled.device)
        rounded = torch.where(exact, scaled, (scaled / step).round() * step)
        return rounded / per_lane(self.cfg.return_scale)

    @torch.no_grad()
    def label(self, batch: WindowBatch) -> Tensor:
        """The label of each window's first timestep, from a sampled cluster of its future."""
        batch = self.future(batch)
        code = self.hard(self.logits(batch), "esper/label")
        return self.rounded(self.expected_return(batch.obs[:, :, 0], batch.action[:, :, 0], code)).unsqueeze(-1)

    @torch.no_grad()
    def relabel(self) -> None:
        """Compute the labels of all rows, and take the best label of an episode's start for the target return.

        A row's label is that of the window that starts there. Example with suffix = 3 and an episode of rows 0 to 3:

            row                      0          1          2       3
            rows of its future       0, 1, 2    1, 2, 3    2, 3    3
            mean embedding e         (C[3] - C[0]) / 3, (C[4] - C[1]) / 3, (C[4] - C[2]) / 2, (C[4] - C[3]) / 1

        with C[i] the sum of the embeddings of rows 0, ..., i - 1. Then label = rounded E[R | s, a, cluster sampled from e].
        """
        dataset, labels = self.dataset_index.dataset, []
        ends = dataset.offsets[1:][dataset.episode_of_row]
        fixed = torch.zeros(
            (), dtype=torch.int64, device=dataset.device
        )  # no update's number: every call samples the same
        obs, action = self.normalize(dataset.observations), dataset.actions
        for start in range(0, len(dataset), ROWS):
            rows = torch.arange(start, min(start + ROWS, len(dataset)), device=dataset.device)
            ahead = torch.arange(start, min(start + ROWS + self.cfg.suffix, len(dataset)), device=dataset.device)
            steps = (x[ahead].expand(self.spec.lanes, 1, *x[ahead].shape) for x in (obs, action, dataset.timesteps))
            total = self.embedded(*steps)[:, 0].double().cumsum(1)
            total = torch.cat([torch.zeros_like(total[:, :1]), total], 1)  # C, counted from `start`
            end = torch.minimum(ends[rows], rows + self.cfg.suffix)
            mean = (total[:, end - start] - total[:, rows - start]) / (end - rows).unsqueeze(-1)
            logits = self.grouped(self.cluster_head(mean.to(obs.dtype)))
            s, a = (x[rows].expand(self.spec.lanes, *x[rows].shape) for x in (obs, action))
            code = self.hard(logits, f"esper/label/{start}", fixed)
            labels.append(self.rounded(self.expected_return(s, a, code)))
        self.dataset_index.labels = torch.cat(labels, 1)
        if self.cfg.target_return is None:
            self.target.copy_(self.dataset_index.labels[:, dataset.offsets[:-1]].amax(1))

    # ---- the policy -------------------------------------------------------------------------------------------

    def relabelled(self, batch: WindowBatch) -> WindowBatch:
        """The first `context` timesteps of the windows, with labels in place of returns to go."""
        if self.dataset_index is None:
            raise RuntimeError("ESPER relabels the dataset; call agent.setup(dataset) before the first update")
        if self.dataset_index.labels is None:
            self.relabel()
        labels = self.dataset_index.labels
        rows = batch.index.unsqueeze(-1) + torch.arange(self.cfg.context, device=labels.device)
        rows = rows.clamp(max=labels.shape[1] - 1)
        return first_timesteps(batch, self.cfg.context).replace(
            return_to_go=labels.gather(1, rows.flatten(1)).view(rows.shape)
        )

    def update(self, batch: WindowBatch, phase: int) -> dict[str, Tensor]:
        if phase == CLUSTERS:
            return self.cluster_update(self.future(batch))
        if phase == RETURNS:
            return self.return_update(self.future(batch))
        return super().update(self.relabelled(batch), phase)


class Relabelled:
    """A dataset and its labels `[lanes, N]`; None until `ESPER.relabel`."""

    def __init__(self, dataset: OfflineDataset) -> None:
        self.dataset = dataset
        self.labels: Tensor | None = None


no_compile(ESPER, "relabel")  # it runs once


def first_timesteps(batch: WindowBatch, count: int) -> WindowBatch:
    """Windows `[lanes, batch, T, ...]`, cut to their first `count` timesteps."""
    return batch.map(lambda x: x if x.ndim == 2 else x[:, :, :count])


def masked_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid timesteps, `[lanes]`."""
    return (x * valid).sum((1, 2)) / valid.sum((1, 2))
