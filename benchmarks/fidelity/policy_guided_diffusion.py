"""The denoiser and the guided sampler against the authors' JAX code, on the same weights, data and noise.

    python benchmarks/fidelity/policy_guided_diffusion.py PATH     # PATH: a checkout of EmptyJackson/policy-guided-diffusion

Needs jax, flax and optax beside offrl. Prints, in float64: the largest difference of the network's output at several lengths;
of the parameters after steps of training; of trajectories from `sampler=reference`, unguided and guided, in standardised units.
Their modules are imported as they are, but for the parts of `util` that need gym, d4rl and wandb (not used here), and for
distrax's `Normal`, which stands below.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offrl.agents.base import Agent
from offrl.augment import edm
from offrl.augment.diffusion import Denoiser, DenoiserConfig
from offrl.augment.edm import SamplerConfig
from offrl.augment.policy_guided import PerStep, PolicyGuidedConfig
from offrl.augment.unet import UNet
from offrl.data.dataset import OfflineDataset

REPOSITORY = "EmptyJackson/policy-guided-diffusion"
OBS, ACTION, FEATURES = 5, 3, 32
WIDTH = OBS + ACTION + 2


class Normal:
    """What the authors use of distrax."""

    def __init__(self, mean: Any, std: float) -> None:
        self.mean, self.std = mean, std

    def log_prob(self, x: Any) -> Any:
        return -0.5 * ((x - self.mean) / self.std) ** 2 - np.log(self.std * np.sqrt(2 * np.pi))


def authors(checkout: Path) -> tuple[Any, Any]:
    """Their modules `diffusion.edm` and `models.diffusion`; rollouts stay the matrices that they are made of."""
    if not (checkout / "diffusion" / "edm.py").exists():
        raise SystemExit(f"{checkout}: there is no diffusion/edm.py; name a checkout of {REPOSITORY}.")
    sys.path.insert(0, str(checkout))
    gym: Any = types.ModuleType("gym")
    gym.spaces = types.SimpleNamespace(Dict=dict)
    distrax: Any = types.ModuleType("distrax")
    distrax.Normal = Normal
    package: Any = types.ModuleType("util")
    package.__path__ = [str(checkout / "util")]
    sys.modules |= {"gym": gym, "distrax": distrax, "util": package}
    data = importlib.import_module("util.data")
    for name in vars(data):
        setattr(package, name, getattr(data, name))
    package.construct_rollout = lambda trajectory, *_: trajectory
    return importlib.import_module("diffusion.edm"), importlib.import_module("models.diffusion")


def to_flax(network: UNet) -> dict[str, Any]:
    """Our weights under the names that theirs have."""

    def dense(layer: Any) -> dict[str, Any]:
        return {"kernel": layer.weight.detach().numpy().T, "bias": layer.bias.detach().numpy()}

    def conv(layer: Any) -> dict[str, Any]:
        kernel = layer.weight.detach().permute(1, 2, 0).numpy()
        return {"kernel": kernel, "bias": layer.bias.detach().numpy()}

    def norm(layer: Any) -> dict[str, Any]:
        return {"scale": layer.weight.detach().numpy(), "bias": layer.bias.detach().numpy()}

    def numbered(kind: str, layers: list[Any], convert: Any) -> dict[str, Any]:
        return {f"{kind}_{i}": convert(layer) for i, layer in enumerate(layers)}

    down, up = list(network.down), list(network.up)
    encoder = (
        numbered("Conv", [c for level in down for c in (level.first, level.second)], conv)
        | numbered("Dense", [level.time for level in down], dense)
        | numbered("GroupNorm", [n for level in down for n in (level.first_norm, level.second_norm)], norm)
    )
    convolutions = [c for level in up for c in (level.grow, level.first, level.second)]
    norms = [n for level in up for n in (level.grow_norm, level.first_norm, level.second_norm)]
    decoder = (
        numbered("Conv", [*convolutions, network.out], conv)
        | numbered("Dense", [level.time for level in up], dense)
        | numbered("GroupNorm", norms, norm)
    )
    embedding = numbered("Dense", [network.embed_first, network.embed_second], dense)
    return {"params": {"TimeEmbedding_0": embedding, "Encoder_0": encoder, "Decoder_0": decoder}}


class Linear(Agent):
    """A policy that both sides have: tanh(W s)."""

    def __init__(self, weight: Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.weight = weight

    def normalize(self, obs: Tensor) -> Tensor:
        return obs

    def act(self, obs: Tensor) -> Tensor:
        return (obs @ self.weight.T).tanh()

    def policy_gaussian(self, obs: Tensor) -> None:
        return None


def made_denoiser() -> Denoiser:
    generator = torch.Generator().manual_seed(0)
    n = 64
    obs = 3 * torch.randn(n, OBS, generator=generator) + 1
    action, reward = torch.rand(n, ACTION, generator=generator) * 2 - 1, torch.randn(n, generator=generator)
    flags = (torch.arange(n) % 9 == 8).float()
    store = OfflineDataset(obs, action, reward, obs, flags, torch.tensor([0, n]))
    denoiser = Denoiser(store, DenoiserConfig(features=FEATURES, groups=8, terminals="zscore")).double()
    denoiser.codec.fit(denoiser.codec.raw(obs, action, reward, flags), torch.ones(n))
    with torch.no_grad():  # biases and norms that say something
        for parameter in denoiser.network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return denoiser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help=f"checkout of {REPOSITORY}")
    arguments = parser.parse_args()
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp

    torch.set_num_threads(1)
    their_edm, their_models = authors(arguments.checkout)
    denoiser = made_denoiser()
    theirs = their_models.UNet(FEATURES, 3)
    params = jax.tree_util.tree_map(jnp.asarray, to_flax(denoiser.network))
    compare_network(jax, denoiser, theirs, params)
    compare_training(jax, their_edm, denoiser, theirs, params)
    compare_sampling(jax, their_edm, denoiser, theirs, params)


def compare_network(jax: Any, denoiser: Denoiser, theirs: Any, params: Any) -> None:
    for length in (8, 32, 33, 129):
        x = torch.randn(4, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
        level = torch.tensor([-1.5, -0.2, 0.3, 1.1], dtype=torch.float64)
        with torch.no_grad():
            ours = denoiser.network(x, level)
        one = jax.vmap(lambda row, t: theirs.apply(params, row, t))  # a trajectory at a time, as they train and sample
        gap = np.abs(ours.numpy() - np.asarray(one(x.numpy(), level.numpy()))).max()
        print(f"network, {length:3} steps: largest difference {gap:.1e} (outputs up to {float(ours.abs().max()):.1f})")


def compare_training(jax: Any, their_edm: Any, denoiser: Denoiser, theirs: Any, params: Any) -> None:
    import optax
    from flax.training.train_state import TrainState

    hypers = their_edm.DenoiserHyperparams()
    state = TrainState.create(apply_fn=theirs.apply, params=params, tx=optax.adam(1e-3))
    network = UNet(WIDTH, FEATURES).double()
    network.load_state_dict(denoiser.network.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    step = jax.jit(lambda rng, batch, state: their_edm.train_step(rng, batch, state, hypers))
    for count in range(1, 11):
        batch = torch.randn(6, 32, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
        rng = jax.random.PRNGKey(count)
        state, their_loss = step(rng, batch.numpy(), state)
        sigma, noise = drawn_as_they_do(jax, rng, batch)
        loss = edm.loss(network, batch, sigma, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if count in (1, 10):
            mine = jax.tree_util.tree_leaves(to_flax(network))
            gaps = [np.abs(a - np.asarray(b)).max() for a, b in zip(mine, jax.tree_util.tree_leaves(state.params))]
            print(
                f"training, {count:2} steps: losses {loss.item():.12f} and {float(their_loss):.12f}, "
                f"largest difference of a parameter {max(gaps):.1e}"
            )


def drawn_as_they_do(jax: Any, rng: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Levels `[B]` and noise `[B, L, D]` of their training step."""
    levels, noises = [], []
    for key in jax.random.split(rng, len(batch)):
        key, own = jax.random.split(key)
        levels.append(np.exp(-1.2 + 1.2 * np.asarray(jax.random.normal(own))))
        key, own = jax.random.split(key)
        noises.append(np.asarray(jax.random.normal(own, shape=tuple(batch.shape[1:]))))
    return torch.tensor(np.array(levels)), torch.tensor(np.array(noises))


def compare_sampling(jax: Any, their_edm: Any, denoiser: Denoiser, theirs: Any, params: Any) -> None:
    weight = torch.randn(ACTION, OBS, dtype=torch.float64, generator=torch.Generator().manual_seed(9)) / 3
    codec, length, steps = denoiser.codec, 33, 32

    def stats(columns: slice) -> dict[str, Any]:
        return {"mean": codec.mean[columns].numpy(), "std": codec.std[columns].numpy()}

    class Deterministic:
        def __init__(self, action: Any) -> None:
            self.action = action

        def sample(self, seed: Any) -> Any:
            return self.action

    for name, coefficient, normalize, at_denoised in [
        ("unguided", 0.0, False, False),
        ("guided", 0.02, False, False),
        ("guided, normalised", 1.0, True, False),
        ("guided at the denoised", 1.0, True, True),
    ]:
        rng = jax.random.PRNGKey(3)
        hypers = their_edm.DenoiserHyperparams(diffusion_timesteps=steps)
        expected = their_edm.sample_trajectory(
            rng,
            types.SimpleNamespace(apply_fn=theirs.apply, params=params),
            length,
            OBS,
            ACTION,
            {"obs": stats(codec.obs), "action": stats(codec.act)},
            hypers,
            policy_guidance_coeff=coefficient,
            policy_guidance_cosine_coeff=0.3,
            normalize_action_guidance=normalize,
            denoised_guidance=at_denoised,
            det_guidance=True,
            agent_apply_fn=lambda _, obs: Deterministic(jax.numpy.tanh(obs @ weight.numpy().T)),
            agent_params=1,
        )
        key, own = jax.random.split(rng)
        drawn = {"start": jax.random.normal(own, (length, WIDTH))}
        for i in range(steps):
            key, own = jax.random.split(key)
            drawn[f"churn/{i}"] = jax.random.normal(own, (length, WIDTH))
        sampling = SamplerConfig(steps=steps, churn=80.0, sampler="reference")
        cfg = PolicyGuidedConfig(
            coefficient=coefficient, normalize=normalize, at_denoised=at_denoised, sampling=sampling
        )
        guide = PerStep(Linear(weight), denoiser, cfg) if coefficient else None
        got = edm.sample(
            lambda y, sigma: denoiser(y[0], sigma).unsqueeze(0),
            lambda draw, drawn=drawn: torch.tensor(np.array(drawn[draw]))[None, None],
            sampling,
            guide,
        )
        gap = np.abs(got[0, 0].numpy() - np.asarray(expected)).max()
        print(f"sampling, {name:22}: largest difference {gap:.1e} (values up to {float(got.abs().max()):.1f})")


if __name__ == "__main__":
    main()
