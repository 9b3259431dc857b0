"""Updates per second of code in JAX: nissymori/JAX-CORL's TD3+BC, IQL or CQL, or corl-team/CORL's ReBRAC.

    PYTHON benchmarks/speed/jax_corl.py AGENT CHECKOUT THREADS CORE

`updates.py` starts this in JAX's own interpreter, which needs jax, flax, optax, distrax, omegaconf, pydantic and tqdm. The
checkout's own classes run, with its settings but for layer normalisation, which JAX-CORL's TD3+BC and IQL have and the papers
don't: it is off; for the hidden layers of JAX-CORL's CQL, which are three here as in CORL's and ours, not two; and for
ReBRAC's batches, which are 256 here. Arrays are those of `updates.py` in kind. When it is warm the
script writes "ready", reads seconds and a clock (wall or processor), and writes its updates per second.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np

OBS, ACTION, ROWS, BATCH = 17, 6, 200_000, 256
FILES = {"td3_bc": ("td3bc", "TD3BC"), "iql": ("iql", "IQL"), "cql": ("cql", "CQL")}
REBRAC_UPDATES = 32  # in one call; the checkout makes 1,000
REBRAC_METRICS = ("critic_loss", "q_min", "actor_loss", "bc_mse_policy", "bc_mse_random", "action_mse")

Burst = Callable[[], int]  # makes some updates and tells how many


def load(folder: str, name: str) -> Any:
    """A module of a checkout, whose simulators and tracker stay away."""
    for absent in ("d4rl", "gym", "wandb", "pyrallis"):
        sys.modules[absent] = types.ModuleType(absent)
    sys.modules["gym"].Env = object  # type: ignore[attr-defined]
    sys.modules["pyrallis"].wrap = lambda: lambda function: function  # type: ignore[attr-defined]
    sys.path.insert(0, folder)
    return importlib.import_module(name)


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    obs = rng.standard_normal((ROWS + 1, OBS)).astype(np.float32)
    return {
        "observations": obs[:-1],
        "actions": rng.uniform(-1, 1, (ROWS, ACTION)).astype(np.float32),
        "rewards": rng.standard_normal(ROWS).astype(np.float32),
        "next_observations": obs[1:],
        "dones": np.zeros(ROWS, np.float32),
    }


def jax_corl_burst(module: Any, agent: str) -> Burst:
    import jax

    if hasattr(module, "MLP"):
        network = module.MLP
        module.MLP = lambda *sizes, **options: network(*sizes, **{**options, "layer_norm": False})
    fields = arrays()
    fields["dones_float"] = fields["dones"]
    data = module.Transition(**{name: jax.numpy.array(fields[name]) for name in module.Transition._fields})
    config = module.config
    if agent == "cql":
        config.action_dim, config.target_entropy, config.hidden_dims = ACTION, -float(ACTION), (256, 256, 256)
    key = jax.random.PRNGKey(0)
    create = getattr(module, f"create_{FILES[agent][0]}_train_state")
    state = create(key, data.observations[0], data.actions[0], config)
    update = jax.jit(getattr(module, FILES[agent][1])().update_n_times, static_argnums=(3,))

    def burst() -> int:
        nonlocal key, state
        key, now = jax.random.split(key)
        state, metrics = update(state, data, now, config)
        jax.block_until_ready((state, metrics))
        return int(config.n_jitted_updates)

    return burst


def rebrac_states(module: Any, config: Any, seeds: list[Any], obs: Any, action: Any) -> dict[str, Any]:
    """Networks, targets and optimisers of `actor` and `critic`."""
    import optax

    actor = module.DetActor(ACTION, config.hidden_dim, config.actor_ln, config.actor_n_hiddens)
    critic = module.EnsembleCritic(config.hidden_dim, 2, config.critic_ln, config.critic_n_hiddens)
    made = {}
    for name, net, kind, rate, inputs, seed in (
        ("actor", actor, module.ActorTrainState, config.actor_learning_rate, (obs,), seeds[0]),
        ("critic", critic, module.CriticTrainState, config.critic_learning_rate, (obs, action), seeds[1]),
    ):
        parameters = net.init(seed, *inputs)
        made[name] = kind.create(apply_fn=net.apply, params=parameters, target_params=parameters, tx=optax.adam(rate))
    return made


def rebrac_burst(module: Any) -> Burst:
    """The loop of the checkout's `train`, without its environment."""
    import jax

    if not hasattr(jax, "tree_map"):  # newer versions name it otherwise
        jax.tree_map = jax.tree_util.tree_map
    config, fields = module.Config(batch_size=BATCH), arrays()
    names = {"states": "observations", "actions": "actions", "rewards": "rewards", "next_states": "next_observations"}
    data = {name: jax.numpy.array(fields[of]) for name, of in (names | {"dones": "dones"}).items()}
    data["next_actions"] = jax.numpy.roll(data["actions"], -1, 0)
    key, *seeds = jax.random.split(jax.random.PRNGKey(0), 3)
    states = rebrac_states(module, config, seeds, data["states"][:1], data["actions"][:1])
    shared = {"gamma": config.gamma, "tau": config.tau, "actor_bc_coef": config.actor_bc_coef}
    shared |= {
        "policy_noise": config.policy_noise,
        "noise_clip": config.noise_clip,
        "critic_bc_coef": config.critic_bc_coef,
    }
    delayed = jax.numpy.arange(REBRAC_UPDATES) % config.policy_freq == 0

    def one(i: Any, carry: dict[str, Any]) -> dict[str, Any]:
        key, batch_key = jax.random.split(carry["key"])
        batch = carry["buffer"].sample_batch(batch_key, batch_size=config.batch_size)
        now = {"key": key, "batch": batch, **{name: carry[name] for name in ("actor", "critic", "metrics")}, **shared}

        def full() -> Any:
            return module.update_td3(**now, normalize_q=config.normalize_q)

        def critics_alone() -> Any:
            return module.update_td3_no_targets(**now)

        key, actor, critic, metrics = jax.lax.cond(delayed[i], full, critics_alone)
        return {**carry, "key": key, "actor": actor, "critic": critic, "metrics": metrics}

    @jax.jit
    def many(carry: dict[str, Any]) -> dict[str, Any]:
        return jax.lax.fori_loop(0, REBRAC_UPDATES, one, carry)  # type: ignore[no-any-return]

    metrics = module.Metrics.create(REBRAC_METRICS)
    carry = {"key": key, "buffer": module.ReplayBuffer(data=data), "metrics": metrics, **states}

    def burst() -> int:
        nonlocal carry
        carry = jax.block_until_ready(many(carry))
        return REBRAC_UPDATES

    return burst


def main() -> None:
    agent, checkout, threads, core = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    del sys.argv[1:]  # the checkout reads settings from there
    if threads == 1:
        os.sched_setaffinity(0, {core})
    rebrac = agent == "rebrac"
    module = load(f"{checkout}/algorithms/offline", agent) if rebrac else load(f"{checkout}/algos", FILES[agent][0])
    # The checkout sets flags for GPUs.
    os.environ["XLA_FLAGS"] = (
        "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" if threads == 1 else ""
    )
    burst = rebrac_burst(module) if rebrac else jax_corl_burst(module, agent)
    burst()
    burst()
    print("ready", flush=True)
    seconds, clock = input().split()
    now = time.process_time if clock == "processor" else time.perf_counter
    done, began = 0, now()
    while now() - began < float(seconds):
        done += burst()
    print(done / (now() - began), flush=True)


if __name__ == "__main__":
    main()
