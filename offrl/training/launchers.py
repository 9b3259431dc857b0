"""Options of our own Hydra launchers and sweeper, which `hydra_plugins` holds; Hydra imports them by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins


@dataclass
class LocalConf:
    """Options of `hydra/launcher=local`."""

    _target_: str = "hydra_plugins.offrl_launchers.LocalLauncher"
    n_jobs: int = -1  # jobs at once; -1: one a core, -2: all cores but one


@dataclass
class RayOptions:
    """Arguments of Ray's functions; `+hydra.launcher.ray.init.KEY=VALUE` adds one that is not listed."""

    init: dict[str, Any] = field(default_factory=lambda: {"address": None, "num_cpus": None, "num_gpus": None})
    remote: dict[str, Any] = field(default_factory=dict)  # what a job needs, such as num_gpus


@dataclass
class RayConf:
    """Options of `hydra/launcher=ray`."""

    _target_: str = "hydra_plugins.offrl_launchers.RayLauncher"
    ray: RayOptions = field(default_factory=RayOptions)


@dataclass
class OptunaConf:
    """Options of `hydra/sweeper=optuna`."""

    _target_: str = "hydra_plugins.offrl_optuna.OptunaSweeper"
    n_trials: int = 20  # finished trials of the study at the end; the same command continues it
    n_jobs: int = 1  # trials at once; they know nothing of each other
    objective: str = "score"  # what is maximised: score (a return without references), or fqe, from the dataset alone
    fqe_updates: int = 20_000  # of fitted Q evaluation
    seed: int = 0  # of Optuna's sampler
    study: str = "offrl"  # name of the study
    params: dict[str, Any] = field(default_factory=dict)  # settings and ranges of a recipe


def register() -> None:
    """Make launchers and sweeper selectable; `joblib` is another name of `local`."""
    Plugins.instance()  # imports third-party launchers, which may register the same names: ours come last
    store = ConfigStore.instance().store
    for name, conf in (("local", LocalConf), ("joblib", LocalConf), ("ray", RayConf)):
        store(group="hydra/launcher", name=name, node=conf, provider="offrl")
    store(group="hydra/sweeper", name="optuna", node=OptunaConf, provider="offrl")
