"""MOPO of yihaosun1124/OfflineRL-Kit, its ensemble and its agent, on the rows and with the settings of ours.

    python benchmarks/tables/peers_mopo.py PATH --ours RUN --out FILE data.size=200000   # PATH: its checkout

One seed. The ensemble is fitted as the kit does (bootstraps, patience of five epochs, snapshots of the best), and asked for
its penalty on 5,000 rows of the dataset; then its agent learns, and our evaluator plays the policy from the seeds of
`offrl train`. Beside it stands what a run of `offrl train agent=mopo` with the same words logged, lane by lane. The kit's
cosine of the actor's rate is that of its three million updates.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peer_policy import PeerPolicy
from torch import Tensor

from offrl.augment.termination import termination
from offrl.data.dataset import OfflineDataset
from offrl.evaluation.evaluator import Evaluator
from offrl.training.compose import compose_words
from offrl.training.run_config import resolve_config
from offrl.training.trainer import Trainer
from offrl.utils.paths import replacing

sys.path.append(str(Path(__file__).parents[1]))
from kit import make_importable

DECAYS = [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4]  # weight decay of the ensemble's layers, as in run_mopo.py
HIDDEN, MEMBERS, ELITES, MODEL_LR, EPOCHS = [200] * 4, 7, 5, 1e-3, 3000
SAMPLE = 5000  # rows on which the penalty is reported


def kit(checkout: Path) -> Any:
    """The kit's classes."""
    make_importable(checkout)
    from offlinerlkit import buffer, dynamics, modules, nets, policy
    from offlinerlkit.utils.scaler import StandardScaler

    return SimpleNamespace(
        buffer=buffer, dynamics=dynamics, modules=modules, MLP=nets.MLP, policy=policy, Scaler=StandardScaler
    )


class EpochLogger:
    """The kit's logger: prints an epoch's losses, and names the folder for the ensemble's file."""

    def __init__(self, folder: str) -> None:
        self.model_dir, self.numbers = folder, {}

    def log(self, text: str) -> None:
        print(text, flush=True)

    def logkv(self, key: str, value: float) -> None:
        self.numbers[key] = round(float(value), 4)

    def set_timestep(self, step: int) -> None:
        print("epoch", step, self.numbers, flush=True)

    def dumpkvs(self, exclude: Any = None) -> None:
        """Nothing is kept."""


def fitted(offline: Any, store: OfflineDataset, real: Any, penalty: float, epochs: int | None) -> Any:
    """Their ensemble of the dataset, fitted for `epochs` at most."""
    obs_dim, action_dim = store.obs_dim, store.actions.shape[-1]
    model = offline.modules.EnsembleDynamicsModel(obs_dim, action_dim, HIDDEN, MEMBERS, ELITES, weight_decays=DECAYS)
    terminates = termination(store.info)

    def done(obs: Any, action: Any, following: Any) -> Any:
        return terminates(torch.from_numpy(following)).numpy()[:, None].astype(bool)

    optimizer = torch.optim.Adam(model.parameters(), MODEL_LR)
    dynamics = offline.dynamics.EnsembleDynamics(model, optimizer, offline.Scaler(), done, penalty_coef=penalty)
    with tempfile.TemporaryDirectory() as folder:
        dynamics.train(real.sample_all(), EpochLogger(folder), max_epochs=epochs, max_epochs_since_update=5)
    return dynamics


def penalty_of(dynamics: Any, store: OfflineDataset) -> dict[str, float]:
    """Mean and upper quantiles of their uncertainty u over rows of the dataset, as `uncertainty` in our manifest.json."""
    rows = torch.linspace(0, len(store) - 1, min(SAMPLE, len(store))).long()
    u = dynamics.step(store.observations[rows].numpy(), store.actions[rows].numpy())[3]["penalty"]
    return {
        "mean": float(u.mean()),
        **{f"q{percent}": float(np.quantile(u, percent / 100)) for percent in (50, 95, 100)},
    }


def learner(offline: Any, dynamics: Any, spec: Any, cfg: Any) -> Any:
    """Their agent with our settings, and the scheduler of its actor's rate."""
    hidden, parts = list(cfg.hidden), offline.modules
    gaussian = parts.TanhDiagGaussian(hidden[-1], spec.action_dim, unbounded=True, conditioned_sigma=True, max_mu=1.0)
    actor = parts.ActorProb(offline.MLP(spec.obs_dim, hidden), gaussian, "cpu")
    critics = [parts.Critic(offline.MLP(spec.obs_dim + spec.action_dim, hidden), "cpu") for _ in range(2)]
    actor_optimizer = torch.optim.Adam(actor.parameters(), cfg.actor_lr)
    optimizers = [torch.optim.Adam(critic.parameters(), cfg.critic_lr) for critic in critics]
    log_alpha = torch.zeros(1, requires_grad=True)
    target = -spec.action_dim if cfg.target_entropy is None else cfg.target_entropy
    alpha = (target, log_alpha, torch.optim.Adam([log_alpha], cfg.alpha_lr))
    agent = offline.policy.MOPOPolicy(
        dynamics, actor, *critics, actor_optimizer, *optimizers, tau=cfg.tau, gamma=cfg.discount, alpha=alpha
    )
    return agent, torch.optim.lr_scheduler.CosineAnnealingLR(actor_optimizer, EPOCHS)


def ours(run: Path, steps: Sequence[int]) -> dict[str, Any]:
    """What a run of ours has of the same numbers: its model's uncertainty, and by update and metric one number per lane."""
    results: dict[str, Any] = {
        "uncertainty": json.loads((run / "manifest.json").read_text())["augment"]["uncertainty"],
        "after": {},
    }
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["lane"] is not None and row["step"] in steps and row["metric"] in ("alpha", "q_data"):
            results["after"].setdefault(row["step"], {}).setdefault(row["metric"], []).append(row["value"])
    return results


class Policy(PeerPolicy):
    """Their agent for the evaluator, one lane."""

    def __init__(self, spec: Any, agent: Any) -> None:
        super().__init__()
        self.spec, self.act = spec, agent.select_action  # the agent itself would become float64 with this module

    def __deepcopy__(self, memo: Any) -> Policy:  # nothing in it changes while it plays
        return self

    def select_action(self, obs: Tensor, state: Any = None) -> Tensor:
        return torch.from_numpy(self.act(obs[0].float().numpy(), deterministic=True))[None].clamp(-1, 1)


def buffers(offline: Any, store: OfflineDataset, augment: Any) -> tuple[Any, Any]:
    """Their buffers: the dataset's rows, and room for the generations in use."""
    shapes = (store.obs_dim,), np.float32, store.actions.shape[-1], np.float32
    real = offline.buffer.ReplayBuffer(len(store), *shapes)
    names = {"observations": store.observations, "actions": store.actions, "next_observations": store.next_observations}
    names |= {"rewards": store.rewards, "terminals": store.terminations.float()}
    real.load_dataset({name: tensor.numpy() for name, tensor in names.items()})
    return real, offline.buffer.ReplayBuffer(augment.transitions * augment.keep, *shapes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of `offrl train`")
    parser.add_argument("--dataset", default="forge/halfcheetah/medium-replay-v0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument(
        "--epochs", type=int, help="most epochs of the ensemble's fit; without it as many as improve it"
    )
    parser.add_argument("--evaluations", type=int, default=2)
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--ours", type=Path, help="folder of our run")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers, written after each evaluation")
    arguments = parser.parse_intermixed_args()
    words = ["agent=mopo", f"dataset={arguments.dataset}", "preset=paper", "device=cpu", f"seed={arguments.seed}"]
    words += [f"updates={arguments.updates}", "progress=false", *arguments.options]
    trainer = Trainer(resolve_config(compose_words(words)), Path("mopo"))
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    np.random.seed(arguments.seed)  # noqa: NPY002  the kit draws rows from NumPy's own generator

    offline, store, augment = kit(arguments.checkout), trainer.store, trainer.synthetic.augmentation.cfg
    real, fake = buffers(offline, store, augment)
    dynamics = fitted(offline, store, real, float(augment.penalty), arguments.epochs)
    agent, rate = learner(offline, dynamics, trainer.spec, trainer.agent.cfg)
    about = {k: v for k, v in vars(arguments).items() if k not in ("checkout", "ours", "out")}
    results: dict[str, Any] = {
        **about,
        "fingerprint": store.fingerprint,
        "uncertainty": penalty_of(dynamics, store),
        "after": {},
    }
    synthetic = round(trainer.cfg.batch_size * augment.share)
    with Evaluator(store.info, 1, 1) as evaluator:
        for step in range(1, arguments.updates + 1):
            if (step - 1) % augment.refresh_every == 0:
                start = real.sample(augment.transitions // augment.length)["observations"].numpy()
                fake.add_batch(**agent.rollout(start, augment.length)[0])
            agent.learn({"real": real.sample(trainer.cfg.batch_size - synthetic), "fake": fake.sample(synthetic)})
            if step % augment.refresh_every == 0:
                rate.step()
            if step % (arguments.updates // arguments.evaluations):
                continue
            rows = fake.sample(SAMPLE)
            with torch.no_grad():
                value = float(agent.critic1(rows["observations"], rows["actions"]).mean())
            played = evaluator.run(Policy(trainer.spec, agent), arguments.episodes)
            results["after"][step] = {
                "score": float(played.normalized.mean()),
                "alpha": float(agent._alpha),
                "q_data": value,
            }
            print(step, results["after"][step], flush=True)
            if arguments.ours:
                results["ours"] = ours(arguments.ours, list(results["after"]))
            if arguments.out:
                with replacing(arguments.out) as temporary:
                    temporary.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
