"""CORL's classes and ours on the same data, for the same number of updates: scores and rates of one run.

    python benchmarks/tables/peers.py PATH                               # PATH: a checkout of corl-team/CORL
    python benchmarks/tables/peers.py PATH --dataset forge/walker2d/medium-replay-v0 --methods td3_bc,iql --updates 100000

    python benchmarks/tables/peers.py PATH data.size=200000 batch_size=128   # further options of `offrl train`

Both sides get the same rows (rewards transformed as our table for the dataset says), the same settings and the same batch
size, and are scored by our evaluator from the same environment seeds. Initial weights and draws are each side's own, so
scores agree as two sets of seeds do. Everyone trains on one thread, in short turns, so that a noisy machine is noisy for all;
evaluation is not timed. A rate is seed-updates per second: CORL trains its seeds one after another, ours are lanes of one
process.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offrl.agents.base import Spec
from offrl.data.dataset import OfflineDataset
from offrl.evaluation.evaluator import Evaluator
from offrl.training.compose import compose_words
from offrl.training.run_config import resolve_config
from offrl.training.trainer import Trainer
from offrl.utils.paths import replacing

sys.path.append(str(Path(__file__).parents[1]))
import corl
from peer_policy import PeerPolicy

TURN = 500  # updates of each side before the other's turn


# ---- CORL's classes --------------------------------------------------------------------------------------------------


def td3_bc(module: Any, spec: Spec, cfg: Any, updates: int) -> tuple[Any, nn.Module]:
    """The trainer and its actor, with our settings."""
    needs(cfg.hidden == (256, 256), "td3_bc", cfg)
    sizes, largest = (spec.obs_dim, spec.action_dim), spec.action_high
    actor = module.Actor(*sizes, largest)
    both = [part for _ in range(2) for part in with_adam(module.Critic(*sizes), cfg.critic_lr)]
    noise = {"policy_noise": cfg.policy_noise * largest, "noise_clip": cfg.noise_clip * largest}
    settings = {"discount": cfg.discount, "tau": cfg.tau, "alpha": cfg.alpha, **noise}
    return module.TD3_BC(largest, *with_adam(actor, cfg.actor_lr), *both, **settings), actor


def iql(module: Any, spec: Spec, cfg: Any, updates: int) -> tuple[Any, nn.Module]:
    needs(cfg.hidden == (256, 256), "iql", cfg)
    sizes, largest = (spec.obs_dim, spec.action_dim), spec.action_high
    policy = module.DeterministicPolicy if cfg.deterministic else module.GaussianPolicy
    actor = policy(*sizes, largest, dropout=cfg.dropout or None)
    critics = with_adam(module.TwinQ(*sizes), cfg.critic_lr)
    value = with_adam(module.ValueFunction(spec.obs_dim), cfg.value_lr)
    settings = {"iql_tau": cfg.expectile, "beta": cfg.beta, "discount": cfg.discount, "tau": cfg.tau}
    nets = (*with_adam(actor, cfg.actor_lr), *critics, *value)
    return module.ImplicitQLearning(largest, *nets, max_steps=updates, **settings), actor


def cql(module: Any, spec: Spec, cfg: Any, updates: int) -> tuple[Any, nn.Module]:
    needs(cfg.hidden == (256, 256, 256) and cfg.critic_hidden is None, "cql", cfg)
    sizes, largest = (spec.obs_dim, spec.action_dim), spec.action_high
    actor = module.TanhGaussianPolicy(*sizes, largest, orthogonal_init=True)
    both = [part for _ in range(2) for part in with_adam(module.FullyConnectedQFunction(*sizes, True), cfg.critic_lr)]
    settings = {
        "discount": cfg.discount,
        "soft_target_update_rate": cfg.tau,
        "policy_lr": cfg.actor_lr,
        "qf_lr": cfg.critic_lr,
        "backup_entropy": cfg.backup_entropy,
        "bc_steps": cfg.bc_steps,
        "cql_n_actions": cfg.actions,
        "cql_lagrange": cfg.lagrange,
        "cql_target_action_gap": cfg.gap,
        "cql_temp": cfg.temperature,
        "cql_alpha": cfg.cql_alpha,
        "cql_max_target_backup": cfg.max_backup,
        "cql_clip_diff_min": cfg.diff_min,
    }
    return module.ContinuousCQL(*both, *with_adam(actor, cfg.actor_lr), -float(spec.action_dim), **settings), actor


def bc(module: Any, spec: Spec, cfg: Any, updates: int) -> tuple[Any, nn.Module]:
    needs(cfg.hidden == (256, 256), "bc", cfg)
    actor = module.Actor(spec.obs_dim, spec.action_dim, spec.action_high)
    return module.BC(spec.action_high, *with_adam(actor, cfg.lr)), actor


METHODS: dict[str, Callable[..., tuple[Any, nn.Module]]] = {"td3_bc": td3_bc, "iql": iql, "cql": cql, "bc": bc}
FILES = {"bc": "any_percent_bc"}  # of the checkout, where they have another name


def needs(fits: bool, method: str, cfg: Any) -> None:
    if not fits:
        raise SystemExit(f"{method}: CORL's networks have fixed sizes, not those of {cfg}.")


def with_adam(network: nn.Module, lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    return network, torch.optim.Adam(network.parameters(), lr=lr)


def mean_action(method: str, actor: nn.Module, obs: Tensor, largest: float) -> Tensor:
    """What their `act` returns when evaluating, for many observations at once."""
    if method == "cql":
        return actor(obs, True)[0]
    out = actor(obs)
    if method in ("td3_bc", "bc"):
        return out
    return (out if isinstance(out, Tensor) else out.mean) * largest


# ---- both sides ------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What one side has done.

    Attributes:
        settings: those that differ from our defaults, and how rewards were transformed.
        scores: by updates made, one score a seed; the last ones are of the final evaluation.
    """

    method: str
    side: str
    seeds: list[int]
    settings: dict[str, Any]
    updates: int = 0
    seconds: float = 0.0
    scores: dict[int, list[float]] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.updates * len(self.seeds) / self.seconds


class Ours:
    """What `offrl train` runs, all seeds as lanes."""

    side = "offrl"

    def __init__(self, trainer: Trainer) -> None:
        self.policy, self.engine, self.step = trainer.agent, trainer.engine, 0

    def advance(self, updates: int) -> None:
        self.engine.run(self.step, updates)
        self.step += updates


class Seed:
    """One seed of CORL's, with its own state of the global generators."""

    def __init__(self, method: str, module: Any, trainer: Trainer, buffer: Any, seed: int) -> None:
        self.buffer, self.batch = buffer, trainer.cfg.batch_size
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - theirs draws from it
        self.trainer, self.actor = METHODS[method](module, trainer.spec, trainer.agent.cfg, trainer.cfg.updates)
        self.numbers = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002

    def advance(self, updates: int) -> None:
        torch.set_rng_state(self.numbers[0])
        np.random.set_state(self.numbers[1])  # noqa: NPY002
        for _ in range(updates):
            self.trainer.train([tensor.to("cpu") for tensor in self.buffer.sample(self.batch)])
        self.numbers = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002


def replay_buffer(module: Any, store: OfflineDataset, normalize: bool) -> tuple[Any, Any, Any]:
    """Theirs, filled; and the observations' mean and deviation as their code takes them."""
    obs, next_obs = store.observations.numpy(), store.next_observations.numpy()
    mean, std = module.compute_mean_std(obs, eps=1e-3) if normalize else (np.zeros(1), np.ones(1))
    buffer = module.ReplayBuffer(store.obs_dim, store.action_dim, len(store))
    buffer.load_d4rl_dataset(
        {
            "observations": module.normalize_states(obs, mean, std),
            "actions": store.actions.numpy(),
            "rewards": store.rewards.numpy(),
            "next_observations": module.normalize_states(next_obs, mean, std),
            "terminals": store.terminations.numpy(),
        }
    )
    return buffer, mean, std


class Policies(PeerPolicy):
    """The actors of CORL's seeds as lanes of one policy, for the evaluator."""

    def __init__(self, method: str, spec: Spec, actors: Sequence[nn.Module], mean: Any, std: Any) -> None:
        super().__init__()
        self.method, self.spec = method, spec
        self.actors = nn.ModuleList(actors)
        self.register_buffer("mean", torch.as_tensor(mean))
        self.register_buffer("std", torch.as_tensor(std))
        self.eval()

    def select_action(self, obs: Tensor, state: Any = None) -> Tensor:
        obs = (obs - self.mean) / self.std
        largest = self.spec.action_high
        rows = [mean_action(self.method, actor, o, largest) for actor, o in zip(self.actors, obs)]
        return torch.stack(rows).clamp(-largest, largest)


class Theirs:
    """CORL's class, once a seed."""

    side = "corl"

    def __init__(self, method: str, module: Any, trainer: Trainer) -> None:
        self.method, self.spec = method, trainer.spec
        buffer, self.mean, self.std = replay_buffer(module, trainer.store, trainer.agent.cfg.normalize_obs)
        self.seeds = [Seed(method, module, trainer, buffer, seed) for seed in trainer.seeds]

    @property
    def policy(self) -> Policies:
        return Policies(self.method, self.spec, [seed.actor for seed in self.seeds], self.mean, self.std)

    def advance(self, updates: int) -> None:
        for seed in self.seeds:
            seed.actor.train()
            seed.advance(updates)


# ---- the comparison --------------------------------------------------------------------------------------------------


def compare(method: str, arguments: argparse.Namespace, save: Callable[[], None], records: list[Record]) -> None:
    """Train both sides of a method in turns; adds to `records` and calls `save` after each evaluation."""
    words = [f"agent={method}", f"dataset={arguments.dataset}", f"updates={arguments.updates}"]
    words += [f"lanes={arguments.seeds}", "device=cpu", "engine=eager", "progress=false", *arguments.options]
    trainer = Trainer(resolve_config(compose_words(words)), Path(method))
    torch.set_num_threads(1)
    sides = [Theirs(method, corl.load(arguments.checkout, FILES.get(method, method)), trainer), Ours(trainer)]
    settings = {**trainer.job.agent, "batch_size": trainer.cfg.batch_size}
    settings |= {f"data.{k}": v for k, v in asdict(trainer.cfg.data).items() if k.startswith("reward")}
    mine = [Record(method, side.side, list(trainer.seeds), settings) for side in sides]
    records += mine
    with Evaluator(trainer.store.info, arguments.seeds, arguments.workers) as evaluator:
        for k in range(1, arguments.evaluations + 1):
            mark = arguments.updates * k // arguments.evaluations
            while mine[0].updates < mark:
                turn = min(TURN, mark - mine[0].updates)
                for side, record in zip(sides, mine):
                    began = time.perf_counter()
                    side.advance(turn)
                    record.seconds += time.perf_counter() - began
                    record.updates += turn
            episodes = arguments.final_episodes if k == arguments.evaluations else arguments.episodes
            for side, record in zip(sides, mine):
                played = evaluator.run(side.policy, episodes)
                scores = played.returns if played.normalized is None else played.normalized
                record.scores[mark] = scores.mean(-1).tolist()
                print(line(record), flush=True)
            save()


def line(record: Record) -> str:
    scores = np.array(record.scores[max(record.scores)])
    spread = f" +- {scores.std(ddof=1):.1f}" if len(scores) > 1 else ""
    return (
        f"{record.method:8} {record.side:6} {record.updates:9} updates: score {scores.mean():6.1f}{spread} "
        f"({len(scores)} seeds), {record.rate:7.1f} seed-updates/s"
    )


def commit(checkout: Path) -> str | None:
    told = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return told.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help=f"checkout of {corl.REPOSITORY}")
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of `offrl train`, for both sides")
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas")
    parser.add_argument("--dataset", default="forge/hopper/medium-replay-v0")
    parser.add_argument("--updates", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=10)
    parser.add_argument("--episodes", type=int, default=10, help="a seed, at each evaluation")
    parser.add_argument("--final-episodes", type=int, default=50)
    parser.add_argument("--workers", type=int, default=1, help="processes that step environments")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers, written after each evaluation")
    arguments = parser.parse_intermixed_args()
    methods = arguments.methods.split(",")
    if unknown := [method for method in methods if method not in METHODS]:
        raise SystemExit(f"{unknown[0]} is unknown here; there are {', '.join(METHODS)}.")
    records: list[Record] = []
    metadata = {k: v for k, v in vars(arguments).items() if k not in ("checkout", "out")}
    metadata |= {"machine": platform.platform(), "torch": torch.__version__, "corl": commit(arguments.checkout)}

    def save() -> None:
        if arguments.out:
            rows = [{**asdict(record), "seed_updates_per_second": record.rate} for record in records if record.updates]
            with replacing(arguments.out) as temporary:
                temporary.write_text(json.dumps({**metadata, "rows": rows}, indent=1) + "\n")

    for method in methods:
        compare(method, arguments, save, records)
    print()
    for record in records:
        print(line(record))
    for theirs, ours in zip(records[::2], records[1::2]):
        print(f"{ours.method}: {ours.rate / theirs.rate:.2f} times CORL's rate")


if __name__ == "__main__":
    main()
