"""CQL against CORL's class on the same weights, batches and noise.

    python benchmarks/fidelity/cql.py PATH              # PATH: a checkout of corl-team/CORL
    python benchmarks/fidelity/cql.py PATH --antmaze    # the multiplier, the best of ten next actions and the clip

Prints the largest difference of any parameter after 1, 10, 100 and 1000 updates, in float32 and in float64. Both critics have
three hidden layers here, since CORL deepens the first alone. An update takes about a fifth of a second: `--updates 1,10,100`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from common import ACTION, OBS, Comparison, Pair, Trains, linears, network_pairs, run

from offrl.agents.cql import CQL, CQLConfig

sys.path.append(str(Path(__file__).parents[1]))
import corl

ANTMAZE = {"lagrange": True, "gap": 0.75, "max_backup": True, "diff_min": -200.0, "cql_alpha": 5.0, "actor_lr": 1e-4}


def comparison(checkout: Path, antmaze: bool) -> Comparison:
    module = corl.load(checkout, "cql")
    config = CQLConfig(tau=0.01, **(ANTMAZE if antmaze else {}))
    many = config.actions * ACTION

    def theirs(*_: Any) -> Trains:
        networks = [module.FullyConnectedQFunction(OBS, ACTION) for _ in range(2)]
        networks.append(module.TanhGaussianPolicy(OBS, ACTION, 1.0))
        parts = []
        for network, lr in zip(networks, (config.critic_lr, config.critic_lr, config.actor_lr)):
            adam = torch.optim.Adam(network.to(torch.get_default_dtype()).parameters(), lr=lr)
            parts += [network, adam]
        trainer = module.ContinuousCQL(
            *parts,
            target_entropy=-ACTION,
            policy_lr=config.actor_lr,
            qf_lr=config.critic_lr,
            soft_target_update_rate=config.tau,
            bc_steps=0,
            cql_lagrange=config.lagrange,
            cql_target_action_gap=config.gap,
            cql_alpha=config.cql_alpha,
            cql_max_target_backup=config.max_backup,
            cql_clip_diff_min=config.diff_min,
        )
        for scalar in (trainer.log_alpha, trainer.log_alpha_prime):
            scalar.to(torch.get_default_dtype())
        return Trains(trainer)

    def pairs(agent: CQL, other: Trains) -> dict[str, list[Pair]]:
        trainer = other.trainer
        twins = ((trainer.critic_1, trainer.critic_2), (trainer.target_critic_1, trainer.target_critic_2))
        result = {"actor": network_pairs(agent.actor.mlp, linears(trainer.actor))}
        for name, mine, both in zip(("critics", "targets"), (agent.critics, agent.critics_target), twins):
            result[name] = [pair for i, q in enumerate(both) for pair in network_pairs(mine.mlp, linears(q), i)]
        scalars = (
            (agent.actor.factor, trainer.actor.log_std_multiplier),
            (agent.actor.offset, trainer.actor.log_std_offset),
            (agent.log_alpha, trainer.log_alpha),
            (agent.log_alpha_prime, trainer.log_alpha_prime),
        )
        result["scalars"] = [(mine[0], scalar.constant) for mine, scalar in scalars]
        return result

    draws = [("policy", ACTION), ("target", many if antmaze else ACTION), ("cql/current", many), ("cql/next", many)]
    return Comparison(lambda spec, _: CQL(spec, config), theirs, pairs, draws, [("cql/uniform", many)])


if __name__ == "__main__":
    chosen = "--antmaze" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--antmaze"]
    run(str(__doc__), corl.REPOSITORY, lambda checkout: comparison(checkout, chosen))
