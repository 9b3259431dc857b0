"""ReBRAC against the functions of its authors' JAX code, as CORL carries it, on the same weights, batches and noise.

    python benchmarks/fidelity/rebrac.py PATH       # PATH: a checkout of corl-team/CORL

Needs jax, flax, optax and chex, which offrl doesn't. Prints the largest difference of any parameter after 1, 10, 100 and 1000
updates, in float32 and in float64.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from common import ACTION, Comparison, Fed, Pair, flax_layers, nested, run
from torch import Tensor

from offrl.agents.rebrac import ReBRAC, ReBRACConfig

sys.path.append(str(Path(__file__).parents[1]))
import corl

CONFIG = ReBRACConfig(actor_bc=0.1, critic_bc=0.5, discount=0.98, tau=0.01, actor_lr=1e-3, critic_lr=5e-4)
METRICS = ("critic_loss", "q_min", "actor_loss", "bc_mse_policy", "bc_mse_random", "action_mse")


def networks(agent: ReBRAC) -> dict[str, dict[str, Tensor]]:
    return {
        "actor": flax_layers("params", agent.actor.mlp),
        "actor_target": flax_layers("params", agent.actor_target.mlp),
        "critics": flax_layers("params/VmapCritic_0", agent.critics.mlp),
        "critics_target": flax_layers("params/VmapCritic_0", agent.critics_target.mlp),
    }


class Theirs:
    """Their two states; `mirror` holds all parameters as tensors, which the first update starts from."""

    def __init__(self, module: Any, agent: ReBRAC) -> None:
        import jax

        jax.config.update("jax_enable_x64", torch.get_default_dtype() == torch.float64)
        self.module, self.jax, self.updates = module, jax, 0
        self.mirror = {n: {k: v.detach().clone() for k, v in net.items()} for n, net in networks(agent).items()}
        settings = {"actor_bc_coef": CONFIG.actor_bc, "critic_bc_coef": CONFIG.critic_bc, "gamma": CONFIG.discount}
        settings |= {"tau": CONFIG.tau, "policy_noise": CONFIG.policy_noise, "noise_clip": CONFIG.noise_clip}
        both = functools.partial(module.update_td3, normalize_q=True, **settings)
        critic = functools.partial(module.update_td3_no_targets, **settings)
        self.steps = [jax.jit(functools.partial(self.step, function)) for function in (both, critic)]

    def step(self, function: Any, noise: Any, **states: Any) -> Any:
        """One of their updates whose normals are `noise`."""
        original, self.jax.random.normal = self.jax.random.normal, lambda *_: noise
        try:
            key, metrics = self.jax.random.PRNGKey(0), self.module.Metrics.create(METRICS)
            return function(key=key, metrics=metrics, **states)[1:3]
        finally:
            self.jax.random.normal = original

    def start(self) -> None:
        import optax

        module = self.module
        params = {n: nested({k: self.array(v) for k, v in net.items()}) for n, net in self.mirror.items()}
        actor = module.DetActor(ACTION, CONFIG.hidden[0], layernorm=False, n_hiddens=len(CONFIG.hidden))
        critic = module.EnsembleCritic(CONFIG.hidden[0], 2, layernorm=True, n_hiddens=len(CONFIG.hidden))
        self.actor = module.ActorTrainState.create(
            apply_fn=actor.apply,
            params=params["actor"],
            target_params=params["actor_target"],
            tx=optax.adam(CONFIG.actor_lr),
        )
        self.critic = module.CriticTrainState.create(
            apply_fn=critic.apply,
            params=params["critics"],
            target_params=params["critics_target"],
            tx=optax.adam(CONFIG.critic_lr),
        )

    def array(self, tensor: Tensor) -> Any:
        return self.jax.numpy.asarray(tensor.detach().numpy())

    def train(self, buffer: Fed, size: int) -> None:
        if self.updates == 0:
            self.start()
        names = ("states", "actions", "rewards", "next_states", "next_actions", "dones")
        rows = dict(zip(names, buffer.sample(size)))
        rows["rewards"], rows["dones"] = rows["rewards"].flatten(), 1 - rows["dones"].flatten()
        noise = torch.randn_like(rows["actions"])  # dictated
        batch = {name: self.array(value) for name, value in rows.items()}
        update = self.steps[self.updates % 2]
        self.actor, self.critic = update(self.array(noise), actor=self.actor, critic=self.critic, batch=batch)
        self.updates += 1
        now = {
            "actor": self.actor.params,
            "actor_target": self.actor.target_params,
            "critics": self.critic.params,
            "critics_target": self.critic.target_params,
        }
        for name, flat in self.mirror.items():
            for path, tensor in flat.items():
                leaf = functools.reduce(lambda node, key: node[key], path.split("/"), now[name])
                tensor.copy_(torch.from_dlpack(leaf))


def comparison(checkout: Path) -> Comparison:
    module = corl.load(checkout, "rebrac")

    def pairs(agent: ReBRAC, theirs: Theirs) -> dict[str, list[Pair]]:
        ours = networks(agent)
        return {n: [(ours[n][path], other) for path, other in net.items()] for n, net in theirs.mirror.items()}

    return Comparison(
        ours=lambda spec, _: ReBRAC(spec, CONFIG),
        theirs=lambda agent, _: Theirs(module, agent),
        pairs=pairs,
        order=("obs", "action", "reward", "next_obs", "next_action", "mask"),
    )


if __name__ == "__main__":
    run(str(__doc__), corl.REPOSITORY, comparison)
