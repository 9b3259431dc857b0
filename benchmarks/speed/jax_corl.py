"""Updates per second of nissymori/JAX-CORL's TD3+BC, IQL or CQL; `updates.py --jax` starts this in JAX's own interpreter.

    PYTHON benchmarks/speed/jax_corl.py AGENT CHECKOUT THREADS CORE

The interpreter needs jax, flax, optax, distrax, omegaconf, pydantic and tqdm. The checkout's own classes run, with its settings
but for layer normalisation, which its TD3+BC and IQL have and the papers don't: it is off. Arrays are those of `updates.py` in
kind. When it is warm the script writes "ready", reads seconds and a clock (wall or processor), and writes its
updates per second.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import types
from typing import Any

import numpy as np

OBS, ACTION, ROWS = 17, 6, 200_000
FILES = {"td3_bc": ("td3bc", "TD3BC"), "iql": ("iql", "IQL"), "cql": ("cql", "CQL")}


def load(agent: str, checkout: str) -> Any:
    """The checkout's module, whose simulators and tracker stay away."""
    for name in ("d4rl", "gym", "wandb"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["gym"].Env = object  # type: ignore[attr-defined]
    sys.path.insert(0, f"{checkout}/algos")
    module = importlib.import_module(FILES[agent][0])
    if hasattr(module, "MLP"):
        network = module.MLP
        module.MLP = lambda *sizes, **options: network(*sizes, **{**options, "layer_norm": False})
    return module


def main() -> None:
    agent, checkout, threads, core = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    del sys.argv[1:]  # the checkout reads settings from there
    if threads == 1:
        os.sched_setaffinity(0, {core})
    module = load(agent, checkout)
    # The checkout sets flags for GPUs.
    os.environ["XLA_FLAGS"] = (
        "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" if threads == 1 else ""
    )
    import jax

    rng = np.random.default_rng(0)
    obs = rng.standard_normal((ROWS + 1, OBS)).astype(np.float32)
    zeros = np.zeros(ROWS, np.float32)
    fields = {
        "observations": obs[:-1],
        "actions": rng.uniform(-1, 1, (ROWS, ACTION)).astype(np.float32),
        "rewards": rng.standard_normal(ROWS).astype(np.float32),
        "next_observations": obs[1:],
        "dones": zeros,
        "dones_float": zeros,
    }
    data = module.Transition(**{name: jax.numpy.array(fields[name]) for name in module.Transition._fields})
    config = module.config
    if agent == "cql":
        config.action_dim, config.target_entropy = ACTION, -float(ACTION)
    key = jax.random.PRNGKey(0)
    create = getattr(module, f"create_{FILES[agent][0]}_train_state")
    state = create(key, data.observations[0], data.actions[0], config)
    update = jax.jit(getattr(module, FILES[agent][1])().update_n_times, static_argnums=(3,))

    def burst() -> None:
        nonlocal key, state
        key, now = jax.random.split(key)
        state, metrics = update(state, data, now, config)
        jax.block_until_ready((state, metrics))

    burst()
    burst()
    print("ready", flush=True)
    seconds, clock = input().split()
    now = time.process_time if clock == "processor" else time.perf_counter
    done, began = 0, now()
    while now() - began < float(seconds):
        burst()
        done += config.n_jitted_updates
    print(done / (now() - began), flush=True)


if __name__ == "__main__":
    main()
