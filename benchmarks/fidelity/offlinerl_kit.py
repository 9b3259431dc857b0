"""MOPO, COMBO and MOBILE against OfflineRL-Kit's classes on the same weights, batches, noise and model.

    python benchmarks/fidelity/offlinerl_kit.py PATH mopo      # PATH: a checkout of yihaosun1124/OfflineRL-Kit
    python benchmarks/fidelity/offlinerl_kit.py PATH combo
    python benchmarks/fidelity/offlinerl_kit.py PATH mobile
    python benchmarks/fidelity/offlinerl_kit.py PATH mopo --as-is    # with the kit's approximate density of the policy

Prints the largest difference of any parameter after 1, 10, 100 and 1000 updates, in float32 and in float64. Nine tenths of a
batch stand for rollouts. Declared differences: unless it is run as it is, the kit's policy gets the exact density of its
actions, without the 1e-6 inside the logarithm; COMBO runs with `pooled=false`, the kit's log-sum-exp over 3 values
(`--pooled`: ours over all 30, which differs); both clamp MOBILE's target at 0 and the learnt temperature at 1 (COMBO's is free
in both). The kit casts its inputs to float32, which is lifted, and its MOBILE asks our ensemble, since its own would draw
other numbers.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import ACTION, OBS, SEED, Comparison, Fed, Pair, linears, network_pairs, random_store, run
from torch import Tensor, nn

from offrl.agents.combo import COMBO, COMBOConfig
from offrl.agents.mobile import MOBILE, MOBILEConfig
from offrl.agents.mopo import MOPO, MOPOConfig
from offrl.augment.world_model import EliteDynamics, Ensemble, EnsembleConfig
from offrl.utils.random import LaneRandom

sys.path.append(str(Path(__file__).parents[1]))
from kit import REPOSITORY, make_importable

SYNTHETIC, DRAWS, NAMES = 0.9, 3, ("observations", "actions", "rewards", "next_observations", "terminals")


def kit(checkout: Path) -> Any:
    """The kit's policies and networks."""
    make_importable(checkout)
    from offlinerlkit import policy
    from offlinerlkit.modules import actor_module, critic_module, dist_module
    from offlinerlkit.nets import MLP

    return SimpleNamespace(policy=policy, actors=actor_module, critics=critic_module, dists=dist_module, MLP=MLP)


def without_casts(module: Any, exact: bool) -> None:
    """Let networks take float64, and the policy have the exact log-density."""
    module.actors.ActorProb.forward = lambda self, obs: self.dist_net(self.backbone(obs))
    module.critics.Critic.forward = lambda self, obs, action: self.last(self.backbone(torch.cat([obs, action], 1)))
    torch.FloatTensor = torch.DoubleTensor if torch.get_default_dtype() == torch.float64 else torch.FloatTensor

    def log_prob(self: Any, action: Tensor, raw: Tensor) -> Tensor:
        normal = torch.distributions.Normal.log_prob(self, raw)
        return (normal - 2 * (math.log(2) - raw - nn.functional.softplus(-2 * raw))).sum(-1, keepdim=True)

    if exact:
        module.dists.TanhNormalWrapper.log_prob = log_prob


class Learner:
    """A policy of the kit's that learns from one batch, whose first rows are the dataset's."""

    def __init__(self, policy: Any, dynamics: Any = None) -> None:
        self.policy, self.dynamics = policy, dynamics

    def train(self, buffer: Fed, size: int) -> None:
        obs, action, reward, following, mask = buffer.sample(size)
        parts = dict(zip(NAMES, (obs, action, reward, following, 1 - mask)))
        real = size - round(SYNTHETIC * size)
        halves = {"real": slice(None, real), "fake": slice(real, None)}
        if self.dynamics is not None:
            self.dynamics.step += 1
        self.policy.learn({half: {name: part[rows] for name, part in parts.items()} for half, rows in halves.items()})


class SameDynamics:
    """What the kit's MOBILE asks: next states of our ensemble with our agent's noise."""

    def __init__(self, dynamics: EliteDynamics) -> None:
        self.ours, self.step = dynamics, 0

    def sample_next_obss(self, obs: Tensor, action: Tensor, draws: int) -> Tensor:
        random = LaneRandom((SEED,))
        random.step.fill_(self.step)
        mean, std = self.ours.next_gaussians(obs, action)
        return mean + std * random.normal("model", mean.new_empty(1, draws, *mean.shape))[0]


def ensemble() -> EliteDynamics:
    dtype = torch.get_default_dtype()
    model = Ensemble(OBS, ACTION, EnsembleConfig(hidden=(32,)))
    model.fit_scales(random_store(dtype))
    model.elites.copy_(torch.tensor([4, 1, 0, 6, 2]))
    return EliteDynamics(model.to(dtype).requires_grad_(False), clip_states=False)


def comparison(checkout: Path, name: str, exact: bool, pooled: bool) -> Comparison:
    module, many = kit(checkout), 10 * ACTION
    cls, config = {
        "mopo": (MOPO, MOPOConfig()),
        "combo": (COMBO, COMBOConfig(pooled=pooled)),
        "mobile": (MOBILE, MOBILEConfig(draws=DRAWS)),
    }[name]

    def ours(spec: Any, _: Any) -> Any:
        agent = cls(spec, config)
        agent.dynamics = ensemble() if name == "mobile" else None
        return agent

    def theirs(agent: Any, _: Any) -> Learner:
        without_casts(module, exact)
        dtype, hidden = torch.get_default_dtype(), list(config.hidden)
        backbone = module.MLP(OBS, hidden)
        head = module.dists.TanhDiagGaussian(hidden[-1], ACTION, unbounded=True, conditioned_sigma=True)
        actor = module.actors.ActorProb(backbone, head).to(dtype)
        critics = [module.critics.Critic(module.MLP(OBS + ACTION, hidden)).to(dtype) for _ in range(2)]
        log_alpha = torch.zeros(1, requires_grad=True, dtype=dtype)
        rate = config.alpha_lr if isinstance(config, MOPOConfig) else config.actor_lr
        alpha = (-ACTION, log_alpha, torch.optim.Adam([log_alpha], lr=rate))
        actor_adam = torch.optim.Adam(actor.parameters(), lr=config.actor_lr)
        shared = {"tau": config.tau, "gamma": config.discount, "alpha": alpha}
        if name == "mobile":
            dynamics, both = SameDynamics(agent.dynamics), nn.ModuleList(critics)
            adam = torch.optim.Adam(both.parameters(), lr=config.critic_lr)
            settings = {"penalty_coef": config.penalty, "num_samples": DRAWS, "deterministic_backup": True}
            policy = module.policy.MOBILEPolicy(dynamics, actor, both, actor_adam, adam, **shared, **settings)
            return Learner(policy, dynamics)
        adams = [torch.optim.Adam(critic.parameters(), lr=config.critic_lr) for critic in critics]
        parts = (None, actor, *critics, actor_adam, *adams)
        if name == "mopo":
            return Learner(module.policy.MOPOPolicy(*parts, **shared))
        box = SimpleNamespace(low=-np.ones(ACTION), high=np.ones(ACTION))
        settings = {"cql_weight": config.cql_alpha, "with_lagrange": False}
        return Learner(module.policy.COMBOPolicy(*parts, box, **shared, **settings))

    def pairs(agent: Any, other: Learner) -> dict[str, list[Pair]]:
        policy, mine = other.policy, agent.actor.mlp
        result = {
            "actor": network_pairs(mine, linears(policy.actor.backbone)),
            "alpha": [(agent.log_alpha, policy._log_alpha)],
        }
        heads = ((slice(ACTION), policy.actor.dist_net.mu), (slice(ACTION, None), policy.actor.dist_net.sigma))
        for rows, head in heads:  # our last layer is the kit's two, one above the other
            result["actor"] += [(mine.weights[-1][0, rows], head.weight), (mine.biases[-1][0, rows], head.bias)]
        if name == "mobile":
            twins = {"critics": policy.critics, "targets": policy.critics_old}
        else:
            twins = {
                "critics": (policy.critic1, policy.critic2),
                "targets": (policy.critic1_old, policy.critic2_old),
            }
        for key, network in (("critics", agent.critics), ("targets", agent.critics_target)):
            both = [network_pairs(network.mlp, linears(q), i) for i, q in enumerate(twins[key])]
            result[key] = [pair for one in both for pair in one]
        return result

    draws = {
        "mopo": [("target", ACTION), ("policy", ACTION)],
        "mobile": [("model_action", DRAWS * 5 * ACTION), ("target", ACTION), ("policy", ACTION)],
        "combo": [("policy", ACTION), ("target", ACTION), ("cql/current", many), ("cql/next", many)],
    }[name]
    uniforms = [("cql/uniform", many)] if name == "combo" else []
    return Comparison(ours, theirs, pairs, draws, uniforms, SYNTHETIC)


if __name__ == "__main__":
    flags = {flag for flag in ("--as-is", "--pooled") if flag in sys.argv}
    methods = [word for word in sys.argv if word in ("mopo", "combo", "mobile")]
    sys.argv = [word for word in sys.argv if word not in flags and word not in methods]
    method = methods[0] if methods else "mopo"
    run(str(__doc__), REPOSITORY, lambda path: comparison(path, method, "--as-is" not in flags, "--pooled" in flags))
