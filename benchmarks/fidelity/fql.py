"""FQL against its authors' JAX class, on the same weights, batches and noise.

    python benchmarks/fidelity/fql.py PATH       # PATH: a checkout of seohongpark/fql

Needs jax, flax, optax, distrax and ml_collections, which offrl doesn't. Prints the largest difference of any parameter
after 1, 10, 100 and 1000 updates, in float32 and in float64.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from common import ACTION, BATCH, OBS, Comparison, Fed, Pair, authors_module, flax_layers, nested, run
from torch import Tensor

from offrl.agents.fql import FQL, FQLConfig

REPOSITORY = "seohongpark/fql"
CONFIG = FQLConfig(alpha=3.0, normalize_q=True, target="min", discount=0.98, tau=0.01, hidden=(64, 64, 64))


def networks(agent: FQL) -> dict[str, dict[str, Tensor]]:
    return {
        "modules_actor_bc_flow": flax_layers("mlp", agent.flow.mlp),
        "modules_actor_onestep_flow": flax_layers("mlp", agent.actor),
        "modules_critic": flax_layers("value_net", agent.critics.mlp),
        "modules_target_critic": flax_layers("value_net", agent.critics_target.mlp),
    }


class Theirs:
    """Their agent; `mirror` holds all its parameters as tensors, which the first update starts from."""

    def __init__(self, module: Any, agent: FQL) -> None:
        import jax

        jax.config.update("jax_enable_x64", torch.get_default_dtype() == torch.float64)
        self.jax, self.started = jax, False
        self.mirror = {n: {k: v.detach().clone() for k, v in net.items()} for n, net in networks(agent).items()}
        config = module.get_config()
        config.update({"alpha": CONFIG.alpha, "normalize_q_loss": CONFIG.normalize_q, "q_agg": CONFIG.target})
        config.update({"discount": CONFIG.discount, "tau": CONFIG.tau, "lr": CONFIG.lr})
        config.update({"actor_hidden_dims": CONFIG.hidden, "value_hidden_dims": CONFIG.hidden})
        cls = module.FQLAgent
        for name in ("update", "total_loss", "sample_actions", "compute_flow_actions"):
            # As plain functions, which `step` compiles as one: a compiled part would keep the noise of its first call.
            setattr(cls, name, getattr(getattr(cls, name), "__wrapped__", getattr(cls, name)))
        self.agent = cls.create(0, jax.numpy.zeros((1, OBS)), jax.numpy.zeros((1, ACTION)), config)
        self.step = jax.jit(self.one_update)

    def one_update(self, agent: Any, batch: Any, normals: Any, times: Any) -> Any:
        """Their update with these normals, in the order in which they draw, and these times of the flow."""
        random, waiting = self.jax.random, iter(normals)
        originals = random.normal, random.uniform
        random.normal, random.uniform = lambda *_: next(waiting), lambda *_: times
        try:
            return agent.update(batch)[0]
        finally:
            random.normal, random.uniform = originals

    def array(self, tensor: Tensor) -> Any:
        return self.jax.numpy.asarray(tensor.detach().numpy())

    def start(self) -> None:
        params = {n: nested({k: self.array(v) for k, v in net.items()}) for n, net in self.mirror.items()}
        network = self.agent.network
        self.agent = self.agent.replace(network=network.replace(params=params, opt_state=network.tx.init(params)))
        self.started = True

    def train(self, buffer: Fed, size: int) -> None:
        if not self.started:
            self.start()
        names = ("observations", "actions", "rewards", "next_observations", "masks")
        rows = dict(zip(names, buffer.sample(size)))
        rows["rewards"], rows["masks"] = rows["rewards"].flatten(), rows["masks"].flatten()
        batch = {name: self.array(value) for name, value in rows.items()}
        # The target's action, the flow's start, the distillation; the last is of a metric.
        normals = [self.array(torch.randn_like(rows["actions"])) for _ in range(3)]  # dictated
        times = (torch.empty(BATCH, 1).uniform_(-1, 1) + 1) / 2  # dictated
        self.agent = self.step(self.agent, batch, [*normals, normals[0]], self.array(times))
        for name, flat in self.mirror.items():
            for path, tensor in flat.items():
                leaf = functools.reduce(lambda node, key: node[key], path.split("/"), self.agent.network.params[name])
                tensor.copy_(torch.from_dlpack(leaf))


def comparison(checkout: Path) -> Comparison:
    module = authors_module(checkout, "agents.fql", REPOSITORY)

    def pairs(agent: FQL, theirs: Theirs) -> dict[str, list[Pair]]:
        ours = networks(agent)
        return {n: [(ours[n][path], other) for path, other in net.items()] for n, net in theirs.mirror.items()}

    return Comparison(
        ours=lambda spec, _: FQL(spec, CONFIG),
        theirs=lambda agent, _: Theirs(module, agent),
        pairs=pairs,
        draws=(("target_action", ACTION), ("flow/x0", ACTION), ("distill", ACTION)),
        uniforms=(("flow/t", 1),),
    )


if __name__ == "__main__":
    run(str(__doc__), REPOSITORY, comparison)
