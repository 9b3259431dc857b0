"""AWAC against CORL's class on the same weights, batches and noise.

    python benchmarks/fidelity/awac.py PATH       # PATH: a checkout of corl-team/CORL

Prints the largest difference of any parameter after 1, 10, 100 and 1000 updates, in float32 and in float64.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from common import ACTION, OBS, Comparison, Pair, Trains, linears, network_pairs, run

from offrl.agents.awac import AWAC, AWACConfig

sys.path.append(str(Path(__file__).parents[1]))
import corl


def comparison(checkout: Path) -> Comparison:
    module = corl.load(checkout, "awac")
    config = AWACConfig(temperature=0.5, discount=0.98, tau=0.01)

    def theirs(*_: Any) -> Trains:
        nets = [module.Actor(OBS, ACTION, 256), *(module.Critic(OBS, ACTION, 256) for _ in range(2))]
        nets = [net.to(torch.get_default_dtype()) for net in nets]
        both = [part for net in nets for part in (net, torch.optim.Adam(net.parameters(), lr=3e-4))]
        settings = {"gamma": config.discount, "tau": config.tau, "awac_lambda": config.temperature}
        return Trains(module.AdvantageWeightedActorCritic(*both, **settings), "update")

    def pairs(agent: AWAC, other: Trains) -> dict[str, list[Pair]]:
        trainer = vars(other.trainer)
        result = {
            "actor": network_pairs(agent.actor.mlp, linears(trainer["_actor"])),
            "log_std": [(agent.actor.log_std[0], trainer["_actor"]._log_std)],
        }
        for name, mine, prefix in (("critics", agent.critics, ""), ("targets", agent.critics_target, "_target")):
            twins = [trainer[f"{prefix}_critic_{i}"] for i in (1, 2)]
            result[name] = [p for i, q in enumerate(twins) for p in network_pairs(mine.mlp, linears(q), i)]
        return result

    draws = [("next_action", ACTION), ("action", ACTION)]
    return Comparison(ours=lambda spec, _: AWAC(spec, config), theirs=theirs, pairs=pairs, draws=draws)


if __name__ == "__main__":
    run(str(__doc__), corl.REPOSITORY, comparison)
