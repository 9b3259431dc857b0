"""SAC-N, or EDAC, against CORL's class on the same weights, batches and noise.

    python benchmarks/fidelity/sac_n.py PATH            # PATH: a checkout of corl-team/CORL
    python benchmarks/fidelity/sac_n.py PATH --edac
    python benchmarks/fidelity/sac_n.py PATH --as-is    # with CORL's approximate density of the policy

Prints the largest difference of any parameter after 1, 10, 100 and 1000 updates, in float32 and in float64. Unless it is run as
it is, CORL's policy is given the exact density of its actions, without the 1e-6 inside the logarithm.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from common import ACTION, OBS, Comparison, Pair, Trains, linears, network_pairs, run
from torch import Tensor, nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from offrl.agents.edac import EDAC, EDACConfig
from offrl.agents.sac_n import SACN, SACNConfig

sys.path.append(str(Path(__file__).parents[1]))
import corl

MEMBERS, HIDDEN = 5, 256


def exact(actor_class: Any) -> Any:
    """CORL's actor with the density of a tanh-Gaussian as PyTorch computes it."""

    class Exact(actor_class):
        def forward(self, state: Tensor, deterministic: bool = False, need_log_prob: bool = False) -> Any:
            hidden = self.trunk(state)
            normal = Normal(self.mu(hidden), self.log_sigma(hidden).clip(-5, 2).exp())
            law = TransformedDistribution(normal, TanhTransform(cache_size=1))
            action = law.rsample()
            return action, law.log_prob(action).sum(-1)

    return Exact


def comparison(checkout: Path, name: str, as_is: bool) -> Comparison:
    module = corl.load(checkout, name)
    actor_class = module.Actor if as_is else exact(module.Actor)
    config = EDACConfig(members=MEMBERS, eta=2.0) if name == "edac" else SACNConfig(members=MEMBERS)

    def theirs(*_: Any) -> Trains:
        dtype = torch.get_default_dtype()
        actor, critics = actor_class(OBS, ACTION, HIDDEN), module.VectorizedCritic(OBS, ACTION, HIDDEN, MEMBERS)
        parts = [x for net in (actor, critics) for x in (net, torch.optim.Adam(net.to(dtype).parameters(), lr=3e-4))]
        settings = {"eta": config.eta} if isinstance(config, EDACConfig) else {}
        trainer = (module.EDAC if settings else module.SACN)(*parts, alpha_learning_rate=3e-4, **settings)
        trainer.log_alpha.data = trainer.log_alpha.data.to(dtype)
        return Trains(trainer, "update")

    def pairs(agent: SACN, other: Trains) -> dict[str, list[Pair]]:
        trainer, actor = other.trainer, agent.actor.mlp
        result = {
            "actor": network_pairs(actor, linears(trainer.actor.trunk)),
            "alpha": [(agent.log_alpha, trainer.log_alpha)],
        }
        # Our last layer is CORL's two heads, one above the other.
        for rows, head in ((slice(ACTION), trainer.actor.mu), (slice(ACTION, None), trainer.actor.log_sigma)):
            result["actor"] += [(actor.weights[-1][0, rows], head.weight), (actor.biases[-1][0, rows], head.bias)]
        for key, mine, ensemble in (
            ("critics", agent.critics.mlp, trainer.critic),
            ("targets", agent.critics_target.mlp, trainer.target_critic),
        ):
            layers = [layer for layer in ensemble.critic if not isinstance(layer, nn.ReLU)]
            result[key] = [(w[0].transpose(1, 2), layer.weight) for w, layer in zip(mine.weights, layers)]
            result[key] += [(b[0].unsqueeze(1), layer.bias) for b, layer in zip(mine.biases, layers)]
        return result

    ours = EDAC if name == "edac" else SACN
    # CORL samples the policy once for the temperature and once for the actor: here it gets the same noise twice.
    draws = [("policy", ACTION), ("policy", ACTION), ("target", ACTION)]
    return Comparison(lambda spec, _: ours(spec, config), theirs, pairs, draws)


if __name__ == "__main__":
    name, as_is = "edac" if "--edac" in sys.argv else "sac_n", "--as-is" in sys.argv
    sys.argv = [word for word in sys.argv if word not in ("--edac", "--as-is")]
    run(str(__doc__), corl.REPOSITORY, lambda checkout: comparison(checkout, name, as_is))
