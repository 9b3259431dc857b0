"""A diffusion model of whole trajectories, and the augmentation that samples from it without guidance.

The trajectory denoiser of Jackson, Matthews, Lu, Ellis, Whiteson & Foerster, "Policy-Guided Diffusion", RLC 2024 (arXiv
2404.06356; authors' code EmptyJackson/policy-guided-diffusion), in the frame of EDM (`offrl.augment.edm`). Unguided it plays
the part of SynthER (Lu et al., NeurIPS 2023), for trajectories instead of single transitions.

A denoiser is trained once per dataset and settings, cached, and shared by all runs and lanes.

Deviations from the authors: the last step before a time limit is a transition, so no row is dropped; flags are encoded as -1
and 1, and windows extend past a termination (`terminal_padding`), because their windows have a flag in the last row only, which
sampling discards; what follows a termination is the successor that the dataset has: of `semantics=d4rl` the next episode's
first observation; lengths of training and sampling agree by default (theirs: 32 and 129 rows).
`conf/experiment/policy_guided_diffusion/gym.yaml` has their settings.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from offrl.agents.base import Agent
from offrl.augment import edm
from offrl.augment.base import Augmentation, SyntheticConfig
from offrl.augment.fitting import Drawn, FitLoop, fit_or_load, model_path
from offrl.augment.trajectories import Codec, Windows, split_episodes, synthetic_store
from offrl.augment.unet import UNet
from offrl.data.dataset import OfflineDataset
from offrl.nets import Adam, kernels, make_target, polyak
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom

_VERSION = 2  # raise it when the same settings give other weights
_FEW_ROWS = 0.5  # share of the rows in windows, below which a warning says so
_CHUNK = 8192  # steps of each lane that go through the network at once


@dataclass
class DenoiserConfig:
    features: int = 64  # channels of the U-Net's first level (the authors: 1024)
    blocks: int = 3  # levels of the U-Net
    groups: int = 1  # groups of channels in the group normalisation (the authors: 8, of 128 channels and more)
    window: int = 32  # steps of a training trajectory
    updates: int = 20_000
    batch_size: int = 32  # windows
    lr: float = 4e-3  # after a warm-up over the first tenth, then down to 0 along a cosine (the authors: 2e-3)
    ema_decay: float = 0.995  # decay of the averaged weights, which are used for sampling
    ema_every: int = 10  # updates between averages
    stride: int = 8  # take every n-th window start
    holdout: float = 0.05  # share of held-out episodes, for the validation loss
    terminal_padding: bool = True  # whether windows extend past a termination (the authors: no)
    terminals: Literal["sign", "zscore"] = "sign"  # encoding of flags: -1 and 1, or standardised (the authors)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("window", "updates", "batch_size", "ema_every", "stride"):
            if getattr(self, name) < 1:
                raise OffrlError(f"augment.denoiser.{name}={getattr(self, name)} should be at least 1.")
        if not 1 <= self.blocks <= 16:
            raise OffrlError(f"augment.denoiser.blocks={self.blocks} should be from 1 to 16.")
        if self.lr <= 0 or not 0 <= self.ema_decay < 1 or not 0 <= self.holdout < 1:
            raise OffrlError("augment.denoiser: lr should be above 0, ema_decay and holdout from 0 to below 1.")
        if self.window < self.shortest:
            raise OffrlError(
                f"augment.denoiser.window={self.window}: {self.blocks} blocks need windows of at least {self.shortest} steps; "
                "lengthen it, or take fewer augment.denoiser.blocks."
            )

    @property
    def shortest(self) -> int:
        """The fewest steps of a trajectory that the U-Net can halve on each of its levels."""
        return 2 ** (self.blocks - 1)


class Denoiser(nn.Module):
    """The network and the encoding of trajectories.

    Attributes:
        action_variance: `[A]`, variance of the behaviour's encoded actions given the state (at most 1): the residual variance
            of a linear regression on the state.
    """

    action_variance: Tensor

    def __init__(self, store: OfflineDataset, cfg: DenoiserConfig) -> None:
        super().__init__()
        info, sizes = store.info, (store.obs_dim, store.action_dim)
        self.codec = Codec(*sizes, info.action_low, info.action_high, cfg.terminals)
        self.network = UNet(self.codec.width, cfg.features, cfg.blocks, cfg.groups, cfg.seed)
        self.register_buffer("action_variance", torch.ones(store.action_dim))

    def forward(self, noised: Tensor, sigma: float) -> Tensor:
        """D(y; sigma) for trajectories `[n, L, D]`."""
        return edm.precondition(self.network, noised, noised.new_tensor([sigma], dtype=torch.float64))


@dataclass
class Trained:
    """A denoiser, the metadata of its training, and its file."""

    denoiser: Denoiser
    metadata: dict[str, Any]
    path: Path


# ---- training ----------------------------------------------------------------------------------------------------------


class Training(FitLoop):
    """Training of one denoiser."""

    def __init__(self, store: OfflineDataset, cfg: DenoiserConfig) -> None:
        self.store, self.cfg, self.device, self.updates = store, cfg, store.device, cfg.updates
        self.average = Denoiser(store, cfg).to(self.device).requires_grad_(False)
        learn, held = (part.to(self.device) for part in split_episodes(store, cfg.holdout, cfg.seed))
        self.windows = self._windows(store, learn)
        self.windows.fit()
        self.held = self._held_out(store, held)
        self.average.action_variance.copy_(_action_variance(self.windows))
        self.online = make_target(self.average.network).requires_grad_(True)
        self.optimizer = Adam(self.online.parameters(), cfg.lr).to(self.device)
        self.optimizer.lr = torch.zeros((), device=self.device)  # a tensor, which a tape reads anew
        self.random = LaneRandom((cfg.seed,), self.device)

    def _windows(self, store: OfflineDataset, episodes: Tensor) -> Windows:
        cfg = self.cfg
        return Windows(store, self.average.codec, cfg.window, cfg.stride, cfg.terminal_padding, episodes)

    def _held_out(self, store: OfflineDataset, episodes: Tensor) -> Windows | None:
        try:
            return self._windows(store, episodes) if len(episodes) else None
        except OffrlError:  # those episodes are too short
            return None

    def draw(self) -> Drawn:
        """A batch of windows, its noise levels and noise."""
        self.random.go_to(self.step)
        index = self.random.integers("windows", len(self.windows), (self.cfg.batch_size,), self.random.step[None])[0, 0]
        assert isinstance(self.optimizer.lr, Tensor)
        self.optimizer.lr.fill_(self.rate(self.step))
        return self._noised(self.windows.gather(index), "train")

    def learn(self, drawn: Drawn) -> Tensor:
        """One step of Adam."""
        loss = edm.loss(self.online, **vars(drawn))
        self.optimizer.step(loss)
        return loss.detach()

    def settle(self) -> None:
        if self.step % self.cfg.ema_every == 0:
            polyak(self.average.network, self.online, 1 - self.cfg.ema_decay)

    def rate(self, step: int) -> float:
        """Learning rate: linear from a tenth of `lr` over the first tenth of the updates, then a cosine to 0."""
        warm = max(1, self.cfg.updates // 10)
        if step <= warm:
            return self.cfg.lr * (0.1 + 0.9 * step / warm)
        return self.cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.cfg.updates - warm)))

    def _noised(self, clean: Tensor, draw: str) -> Drawn:
        """What the loss takes of these windows: a level of noise each, and noise."""
        log_sigma = self.random.normal(f"{draw}/sigma", clean.new_empty(1, len(clean)))[0]
        sigma = (edm.LOG_SIGMA_MEAN + edm.LOG_SIGMA_STD * log_sigma).exp()
        return Drawn(clean=clean, sigma=sigma, noise=self.random.normal(f"{draw}/noise", clean.unsqueeze(0))[0])

    @torch.no_grad()
    def validation_loss(self, most: int = 2048) -> float | None:
        """Loss of the averaged network on at most `most` held-out windows; None without any."""
        if self.held is None:
            return None
        self.random.look_ahead(0, 0)
        index = torch.arange(min(len(self.held), most), device=self.device)
        index = index * len(self.held) // len(index)
        parts = [
            (
                float(edm.loss(self.average.network, **vars(self._noised(self.held.gather(rows), f"held/{i}")))),
                len(rows),
            )
            for i, rows in enumerate(index.split(256))
        ]
        return sum(value * n for value, n in parts) / len(index)

    def state_dict(self) -> dict[str, Tensor]:
        modules = {"average": self.average.network, "online": self.online, "optimizer": self.optimizer}
        return {f"{name}.{key}": t for name, module in modules.items() for key, t in module.state_dict().items()}

    def result(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        metadata = {
            "dataset": self.store.info.id,
            "fingerprint": self.store.fingerprint,
            "settings": asdict(self.cfg),
            "windows": len(self.windows),
            "share_of_rows": self.windows.share_of_rows,
            "validation_loss": self.validation_loss(),
            "parameters": sum(p.numel() for p in self.average.parameters()),
        }
        return self.average.state_dict(), metadata


def _action_variance(windows: Windows) -> Tensor:
    """`[A]`: residual variance of the encoded actions after linear regression on the encoded state, at most 1."""
    x = windows.gather(torch.arange(0, len(windows), max(1, len(windows) // 4096), device=windows.starts.device))
    x = x.flatten(0, 1).double()
    states, actions = x[:, windows.codec.obs], x[:, windows.codec.act]
    states = torch.cat([states, torch.ones_like(states[:, :1])], 1)
    gram = states.T @ states + 1e-6 * len(states) * torch.eye(states.shape[1], dtype=x.dtype, device=x.device)
    rest = actions - states @ torch.linalg.solve(gram, states.T @ actions)
    return rest.square().mean(0).clamp(1e-6, 1.0)


def trained_denoiser(store: OfflineDataset, cfg: DenoiserConfig, progress: bool = False) -> Trained:
    """The denoiser of a dataset, on its device; trained only if it is not cached."""
    path = denoiser_path(store, cfg)
    tensors, metadata = fit_or_load(path, lambda: Training(store, cfg), progress, f"denoiser of {store.info.id}")
    denoiser = Denoiser(store, cfg)
    denoiser.load_state_dict(tensors)
    return Trained(denoiser.to(store.device).requires_grad_(False).eval(), metadata, path)


def denoiser_path(store: OfflineDataset, cfg: DenoiserConfig) -> Path:
    """Cache file of the denoiser of a dataset."""
    return model_path("denoiser", _VERSION, store, cfg, store.info.action_low, store.info.action_high)  # of its codec


# ---- the augmentation ----------------------------------------------------------------------------------------------------


@dataclass
class DiffusionConfig(SyntheticConfig):
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    sampling: edm.SamplerConfig = field(default_factory=edm.SamplerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length + 1 < self.denoiser.shortest:  # the last row has the state that the last transition reaches
            raise OffrlError(
                f"augment.length={self.length}: {self.denoiser.blocks} blocks need trajectories of at least "
                f"{self.denoiser.shortest - 1} transitions; lengthen them, or take fewer augment.denoiser.blocks."
            )


class Diffusion(Augmentation):
    """Unguided samples of the denoiser."""

    Config: ClassVar[type] = DiffusionConfig
    name = "diffusion"

    def prepare(self, progress: bool = False) -> None:
        self.trained = trained_denoiser(self.store, self.cfg.denoiser, progress)
        self.denoiser = self.trained.denoiser
        share = self.trained.metadata.get("share_of_rows", 1.0)  # files of earlier versions don't say
        if share < _FEW_ROWS and self.cfg.denoiser.stride <= self.cfg.denoiser.window:
            warnings.warn(
                f"{self.store.info.id}: the denoiser learns from {share:.0%} of the rows: the others are of episodes shorter "
                f"than augment.denoiser.window={self.cfg.denoiser.window} steps, or one longer where a time limit ends them.",
                stacklevel=2,
            )

    def guide(self, policy: Agent | None) -> edm.Guide | None:
        """Guidance of samples by the policy; None: none."""
        return None

    @torch.no_grad()
    def generate(self, policy: Agent | None, step: int) -> OfflineDataset:
        rows = self.denoiser.codec.decode(self.sample(policy, step).flatten(0, 1))
        if not bool((self.store.terminations > 0).any()):  # a short fit may draw flags that no row has
            rows = replace(rows, terminations=torch.zeros_like(rows.terminations))
        return synthetic_store(rows, self.store, self.name)

    @torch.no_grad()
    @kernels.in_use()
    def sample(self, policy: Agent | None, step: int) -> Tensor:
        """Encoded trajectories `[lanes, trajectories, T + 1, D]`."""
        cfg, random, guide = self.cfg, self.random(step), self.guide(policy)
        lanes, rows = len(self.seeds), cfg.length + 1
        at_once = max(1, _CHUNK // rows)  # independent of the number of lanes, because it is part of the RNG key

        def denoise(noised: Tensor, sigma: float) -> Tensor:
            return self.denoiser(noised.flatten(0, 1), sigma).unflatten(0, noised.shape[:2])

        parts = []
        for first in range(0, cfg.trajectories, at_once):
            like = self.denoiser.codec.mean.new_empty(
                lanes, min(at_once, cfg.trajectories - first), rows, self.denoiser.codec.width
            )

            def noise(name: str, like: Tensor = like, first: int = first) -> Tensor:
                return random.normal(f"synthetic/{first}/{name}", like)

            parts.append(edm.sample(denoise, noise, cfg.sampling, guide))
        return torch.cat(parts, 1)

    def metadata(self) -> dict[str, Any]:
        return {"denoiser": {"file": self.trained.path.name, **self.trained.metadata}}
