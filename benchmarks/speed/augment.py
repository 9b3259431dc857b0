"""What synthetic trajectories cost: updates per second of the models, transitions per second of each augmentation.

    python benchmarks/speed/augment.py                              # the default sizes, one thread of this machine
    python benchmarks/speed/augment.py --features 1024 --length 128 --steps 256 --churn 80 --device cuda
    python benchmarks/speed/augment.py --official PATH              # beside the authors' JAX code, at the same sizes

PATH is a checkout of EmptyJackson/policy-guided-diffusion; needs jax, flax and optax beside offrl. Contenders take turns in one
process, in an order that is shuffled every round; medians are shown. Data are random with Hopper's sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from offrl.agents.base import Spec
from offrl.agents.td3_bc import TD3BC, TD3BCConfig
from offrl.augment.diffusion import Denoiser, DenoiserConfig, Diffusion, Training
from offrl.augment.edm import SamplerConfig
from offrl.augment.fitting import FitLoop
from offrl.augment.policy_guided import PolicyGuidedConfig, PolicyGuidedDiffusion
from offrl.augment.world_model import Ensemble, EnsembleConfig, EnsembleFit, WorldModel, WorldModelConfig, termination
from offrl.data.dataset import OfflineDataset
from offrl.nets import kernels
from offrl.utils.process import tune_process

OBS, ACTION = 11, 3
PRODUCTS = "products of 256 x 256 matrices"
Work = Callable[[], int]  # does something and says how much


def make_store(rows: int = 20_000) -> OfflineDataset:
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(rows, OBS, generator=generator)
    action, reward = torch.rand(rows, ACTION, generator=generator) * 2 - 1, torch.randn(rows, generator=generator)
    return OfflineDataset(obs, action, reward, obs.roll(-1, 0), torch.zeros(rows), torch.arange(0, rows + 1, 200))


def denoiser_config(arguments: argparse.Namespace) -> DenoiserConfig:
    return DenoiserConfig(features=arguments.features, groups=arguments.groups, batch_size=arguments.batch)


def generators(store: OfflineDataset, arguments: argparse.Namespace) -> dict[str, Work]:
    """Each makes a generation of trajectories for one lane and says of how many transitions; models are untrained."""
    agent = TD3BC(Spec(OBS, ACTION, (0,), device=arguments.device), TD3BCConfig())
    denoiser = Denoiser(store, denoiser_config(arguments)).to(store.device).requires_grad_(False)
    sampling = SamplerConfig(steps=arguments.steps, churn=arguments.churn)
    sizes = {"transitions": arguments.trajectories * arguments.length, "length": arguments.length}
    works: dict[str, Work] = {}
    guided: list[tuple[str, dict[str, Any]]] = [("unguided", {"coefficient": 0.0})]
    guided += [(f"guided, {kind}", {"guidance": kind}) for kind in ("per_step", "product")]
    for name, settings in guided:
        cfg = PolicyGuidedConfig(sampling=sampling, **sizes, **settings)
        diffusion: Diffusion = PolicyGuidedDiffusion(store, cfg, (0,))
        diffusion.denoiser = denoiser
        works[name] = lambda diffusion=diffusion: diffusion.sample(agent, 1).shape[1] * arguments.length
    world = WorldModel(store, WorldModelConfig(**sizes), (0,))
    world.model, world.terminates = Ensemble(OBS, ACTION, EnsembleConfig()).to(store.device), termination(store.info)
    world.model.fit_scales(store)
    works["world model"] = lambda: len(world.generate(agent, 1))
    return works


def fits(store: OfflineDataset, arguments: argparse.Namespace) -> dict[str, FitLoop]:
    return {
        "denoiser": Training(store, denoiser_config(arguments)),
        "world model": EnsembleFit(store, EnsembleConfig()),
    }


def trainers(store: OfflineDataset, arguments: argparse.Namespace) -> dict[str, Work]:
    """Each makes a few updates."""

    def burst(fit: Any) -> int:
        with kernels.in_use():  # as `FitLoop.run`
            for _ in range(arguments.updates):
                fit.step += 1
                fit.update()
        return int(arguments.updates)

    return {name: lambda fit=fit: burst(fit) for name, fit in fits(store, arguments).items()}


def one_update(fit: FitLoop) -> int:
    """By PyTorch's operators, not from a tape."""
    fit.learn(fit.draw())
    return 1


def official(store: OfflineDataset, arguments: argparse.Namespace) -> tuple[dict[str, Work], dict[str, Work]]:
    """The authors' training step and sampler, compiled, at the same sizes (32 trajectories at a time, as theirs)."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "fidelity"))
    import jax
    import optax
    from flax.training.train_state import TrainState
    from policy_guided_diffusion import authors

    edm, models = authors(arguments.official)
    network, width = models.UNet(arguments.features, 3), OBS + ACTION + 2
    params = network.init(jax.random.PRNGKey(0), jax.numpy.ones((2, 64, width)), jax.numpy.ones((1,)))
    state = TrainState.create(apply_fn=network.apply, params=params, tx=optax.adam(1e-3))
    hypers = edm.DenoiserHyperparams(diffusion_timesteps=arguments.steps, s_churn=arguments.churn)
    step = jax.jit(lambda rng, batch, state: edm.train_step(rng, batch, state, hypers))
    batch = np.random.default_rng(0).standard_normal((arguments.batch, 32, width)).astype(np.float32)

    def train() -> int:
        nonlocal state
        for i in range(arguments.updates):
            state, loss = step(jax.random.PRNGKey(i), batch, state)
        loss.block_until_ready()
        return int(arguments.updates)

    stats = {"mean": np.zeros(OBS, np.float32), "std": np.ones(OBS, np.float32)}
    action_stats = {"mean": np.zeros(ACTION, np.float32), "std": np.ones(ACTION, np.float32)}
    policy = (
        np.random.default_rng(1).standard_normal((OBS, 256)),
        np.random.default_rng(2).standard_normal((256, ACTION)),
    )
    weights = [w.astype(np.float32) / np.sqrt(len(w)) for w in policy]

    def act(_: Any, obs: Any) -> Any:  # two layers
        action = jax.numpy.tanh(jax.numpy.maximum(obs @ weights[0], 0) @ weights[1])
        return types.SimpleNamespace(sample=lambda seed: action)

    def sampler(coefficient: float) -> Work:
        one = lambda rng: edm.sample_trajectory(  # noqa: E731 - vmapped and compiled below
            rng,
            state,
            arguments.length + 1,
            OBS,
            ACTION,
            {"obs": stats, "action": action_stats},
            hypers,
            policy_guidance_coeff=coefficient,
            policy_guidance_cosine_coeff=0.3,
            det_guidance=True,
            agent_apply_fn=act,
            agent_params=1,
        )
        many = jax.jit(jax.vmap(one))

        def work() -> int:
            for i in range(max(1, arguments.trajectories // 32)):
                many(jax.random.split(jax.random.PRNGKey(i), 32)).block_until_ready()
            return max(1, arguments.trajectories // 32) * 32 * int(arguments.length)

        return work

    return {"denoiser (authors)": train}, {
        "unguided (authors)": sampler(0.0),
        "guided, per_step (authors)": sampler(1.0),
    }


def products() -> int:
    """Operations of some products of [256, 256] matrices."""
    a, b = torch.randn(2, 256, 256).unbind()
    for _ in range(200):
        a @ b
    return 200 * 2 * 256**3


def flop_each(work: Work) -> float:
    """Operations in matrix products and convolutions of one update, or of one transition."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # keeps the kernels off, whose operations the counter does not see
    with FlopCounterMode(display=False) as counter:
        done = work()
    torch.set_num_threads(threads)
    return counter.get_total_flops() / done


def measure(works: dict[str, Work], arguments: argparse.Namespace) -> dict[str, float]:
    """Median rates, each contender once a round."""
    now = time.process_time if arguments.clock == "processor" else time.perf_counter
    rates: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    order = random.Random(0)
    for _ in range(arguments.rounds):
        for name in order.sample(list(works), len(works)):
            began = now()
            done = works[name]()
            if arguments.device != "cpu":
                torch.cuda.synchronize()
            rates[name].append(done / (now() - began))
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=DenoiserConfig().features)
    parser.add_argument("--groups", type=int, default=8, help="of channels; the authors' network has 8, our default 1")
    parser.add_argument("--batch", type=int, default=DenoiserConfig().batch_size, help="windows of an update")
    parser.add_argument("--steps", type=int, default=SamplerConfig().steps)
    parser.add_argument("--churn", type=float, default=SamplerConfig().churn)
    parser.add_argument("--length", type=int, default=31, help="transitions of a trajectory")
    parser.add_argument("--trajectories", type=int, default=128, help="of each generation")
    parser.add_argument("--updates", type=int, default=5, help="of each contender in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=("wall", "processor"), default="wall", help="processor: where others use the machine too"
    )
    parser.add_argument("--official", type=Path, help="checkout of the authors' code")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args()
    if arguments.official and arguments.device == "cpu":  # before jax is imported
        os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={str(arguments.threads > 1).lower()}"
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    tune_process(arguments.threads)
    store = make_store().to(arguments.device)
    training, sampling = trainers(store, arguments), generators(store, arguments)
    if arguments.official:
        theirs = official(store, arguments)
        training, sampling = training | theirs[0], sampling | theirs[1]
    found = {
        "updates_per_second": measure(training, arguments),
        "transitions_per_second": measure(sampling, arguments),
    }
    if arguments.device == "cpu":
        found["flop_per_second"] = measure({PRODUCTS: products}, arguments)
    ours = {name: work for name, work in sampling.items() if "(authors)" not in name}
    flop = {
        "updates_per_second": {
            name: flop_each(partial(one_update, fit)) for name, fit in fits(store, arguments).items()
        },
        "transitions_per_second": {name: flop_each(work) for name, work in ours.items()},
    }
    most = found.get("flop_per_second", {}).get(PRODUCTS)
    for unit, rates in found.items():
        print(unit.replace("_", " "))
        for name, rate in rates.items():
            each = flop.get(unit, {}).get(name)
            share = f"{rate * each / most:6.0%} of products" if most and each else ""
            print(f"  {name:30} {rate:16.1f} {share}")
    if arguments.out:
        metadata = {k: v.name if isinstance(v, Path) else v for k, v in vars(arguments).items() if k != "out"}
        about = {**metadata, "flop_each": flop, "machine": platform.platform(), "torch": torch.__version__}
        arguments.out.write_text(json.dumps({**about, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
