"""IQL against CORL's class on the same weights, batches and schedule.

    python benchmarks/fidelity/iql.py PATH                    # PATH: a checkout of corl-team/CORL
    python benchmarks/fidelity/iql.py PATH --deterministic    # the policy that two Hopper sets are published with

Prints the largest difference of any parameter after 1, 10, 100 and 1000 updates, in float32 and in float64. Dropout is not
compared here: its coins are the library's in one and the lane's in the other.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from common import ACTION, OBS, Comparison, Pair, Trains, linears, network_pairs, run

from offrl.agents.iql import IQL, IQLConfig

sys.path.append(str(Path(__file__).parents[1]))
import corl

UPDATES = 1000  # of the actor's schedule


def comparison(checkout: Path, deterministic: bool) -> Comparison:
    module = corl.load(checkout, "iql")
    # No setting is the default of either side, so that each is seen; binary fractions, since CORL rounds expectile and
    # discount to float32 whatever the type of its tensors.
    config = IQLConfig(
        expectile=0.75, beta=2.0, discount=0.96875, tau=0.01, deterministic=deterministic, actor_decay=UPDATES
    )

    def theirs(*_: Any) -> Trains:
        policy = module.DeterministicPolicy if deterministic else module.GaussianPolicy
        actor, critics, value = policy(OBS, ACTION, 1.0), module.TwinQ(OBS, ACTION), module.ValueFunction(OBS)
        adams = [
            torch.optim.Adam(net.to(torch.get_default_dtype()).parameters(), lr=3e-4) for net in (actor, critics, value)
        ]
        settings = {"iql_tau": config.expectile, "beta": config.beta, "discount": config.discount, "tau": config.tau}
        nets = (actor, adams[0], critics, adams[1], value, adams[2])
        return Trains(module.ImplicitQLearning(1.0, *nets, max_steps=UPDATES, **settings))

    def pairs(agent: IQL, other: Trains) -> dict[str, list[Pair]]:
        trainer = other.trainer
        result = {"actor": network_pairs(agent.actor.mlp, linears(trainer.actor))}
        if not deterministic:
            result["log_std"] = [(agent.actor.log_std[0], trainer.actor.log_std)]
        result["value"] = network_pairs(agent.value, linears(trainer.vf))
        for name, mine, twins in (
            ("critics", agent.critics, trainer.qf),
            ("targets", agent.critics_target, trainer.q_target),
        ):
            result[name] = [
                p for i, q in enumerate((twins.q1, twins.q2)) for p in network_pairs(mine.mlp, linears(q), i)
            ]
        return result

    return Comparison(ours=lambda spec, _: IQL(spec, config), theirs=theirs, pairs=pairs, draws=())


if __name__ == "__main__":
    chosen = "--deterministic" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--deterministic"]
    run(str(__doc__), corl.REPOSITORY, lambda checkout: comparison(checkout, chosen))
