"""An agent of seohongpark/fql, in JAX, on the rows and with the settings of ours: its success on a task of OGBench.

    python benchmarks/tables/peers_fql.py PATH --agent rebrac --task 1 --out FILE preset=ogbench agent.hidden=[256,256]

PATH is a checkout of seohongpark/fql; needs jax, flax, optax, distrax and ml_collections beside offrl. Our evaluator plays its
policy, without noise, from the seeds of `offrl train`. Ours is what `offrl train` makes of the same words.

Their ReBRAC has one Adam for actor and critics, so that the actor drifts on by its momentum in updates that leave it out, and
the targets average the networks from before the step.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_policy import PeerPolicy
from torch import Tensor

from offrl.data.dataset import OfflineDataset
from offrl.evaluation.evaluator import Evaluator
from offrl.training.compose import compose_words
from offrl.training.run_config import resolve_config
from offrl.training.trainer import Trainer
from offrl.utils.paths import replacing

Fields = dict[str, np.ndarray[Any, Any]]
CLASSES = {"rebrac": "ReBRACAgent", "fql": "FQLAgent"}


def settings(agent: str, cfg: Any) -> dict[str, Any]:
    """Ours under the names that theirs have."""
    shared = {"discount": cfg.discount, "tau": cfg.tau}
    shared |= {"actor_hidden_dims": tuple(cfg.hidden), "value_hidden_dims": tuple(cfg.hidden)}
    if agent == "fql":
        own = {"alpha": cfg.alpha, "normalize_q_loss": cfg.normalize_q, "q_agg": cfg.target, "lr": cfg.lr}
        return {**shared, **own, "flow_steps": cfg.flow_steps}
    return {**shared, "alpha_actor": cfg.actor_bc, "alpha_critic": cfg.critic_bc, "lr": cfg.actor_lr}


class Policy(PeerPolicy):
    """Their agent for the evaluator, one lane."""

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.spec, self.agent, self.draws = spec, None, 0

    def __deepcopy__(self, memo: Any) -> Policy:  # nothing in it changes while it plays but the number of draws
        return self

    def select_action(self, obs: Tensor, state: Any = None) -> Tensor:
        import jax

        self.draws += 1
        assert self.agent is not None
        action = self.agent.sample_actions(obs[0].float().numpy(), seed=jax.random.PRNGKey(self.draws), temperature=0.0)
        return torch.from_numpy(np.asarray(action).copy())[None].clamp(-1, 1)


def fields_of(store: OfflineDataset) -> Fields:
    """Their names; a row without a next action, the last of its episode, has its own."""
    following = torch.arange(1, len(store) + 1)
    following[store.offsets[1:] - 1] -= 1
    names = {
        "observations": store.observations,
        "actions": store.actions,
        "next_observations": store.next_observations,
        "rewards": store.rewards,
        "masks": 1 - store.terminations.float(),
        "next_actions": store.actions[following],
    }
    return {name: tensor.numpy() for name, tensor in names.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of `offrl train`")
    parser.add_argument("--agent", choices=CLASSES, default="rebrac")
    parser.add_argument("--dataset", default="forge/ogbench/cube-single-play-v0")
    parser.add_argument("--task", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=100_000)
    parser.add_argument("--evaluations", type=int, default=4)
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--final-episodes", type=int, default=50)
    parser.add_argument("--out", type=Path, help="JSON file for the numbers, written after each evaluation")
    arguments = parser.parse_intermixed_args()
    words = [f"agent={arguments.agent}", f"dataset={arguments.dataset}", f"data.task={arguments.task}", "device=cpu"]
    words += [f"seed={arguments.seed}", f"updates={arguments.updates}", "progress=false", *arguments.options]
    trainer = Trainer(resolve_config(compose_words(words)), Path(arguments.agent))
    torch.set_num_threads(1)

    sys.path.insert(0, str(arguments.checkout))
    module = importlib.import_module(f"agents.{arguments.agent}")
    config = module.get_config()
    config.update(settings(arguments.agent, trainer.agent.cfg))
    fields, size = fields_of(trainer.store), trainer.cfg.batch_size
    agent = getattr(module, CLASSES[arguments.agent]).create(
        arguments.seed, fields["observations"][:1], fields["actions"][:1], config
    )
    rng, policy, scores = np.random.default_rng(arguments.seed), Policy(trainer.spec), {}
    with Evaluator(trainer.store.info, 1, 1) as evaluator:
        for step in range(1, arguments.updates + 1):
            rows = rng.integers(len(trainer.store), size=size)
            batch = {name: field[rows] for name, field in fields.items()}
            turn = {"full_update": step % config["actor_freq"] == 0} if arguments.agent == "rebrac" else {}
            agent, told = agent.update(batch, **turn)
            if step % (arguments.updates // arguments.evaluations):
                continue
            policy.agent = agent
            played = evaluator.run(
                policy, arguments.final_episodes if step == arguments.updates else arguments.episodes
            )
            scores[step] = float(played.normalized.mean())
            print(
                step, f"success {scores[step]:.1f}", {name: round(float(v), 3) for name, v in told.items()}, flush=True
            )
            if arguments.out:
                about = {k: v for k, v in vars(arguments).items() if k not in ("checkout", "out")}
                with replacing(arguments.out) as temporary:
                    text = {**about, "fingerprint": trainer.store.fingerprint, "settings": dict(config.items())}
                    temporary.write_text(json.dumps({**text, "scores": scores}, indent=1) + "\n")


if __name__ == "__main__":
    main()
