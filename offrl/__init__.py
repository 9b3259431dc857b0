"""offrl: an offline reinforcement learning zoo.

Train from Python as from the command line, with the same options:

    import offrl
    result = offrl.fit(agent="td3_bc", dataset="forge/hopper/medium-replay-v0", preset="laptop", lanes=5)
    agent = offrl.load_agent(result.folder)
    action, _ = agent.predict(observation)    # arrays: [obs] -> [action], or a batch
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offrl.agents.base import Agent
    from offrl.data.dataset import OfflineDataset
    from offrl.training.runs import Result

__version__ = "0.1.0"
__all__ = ["fit", "load_agent", "load_data"]

# Idle threads of GNU OpenMP spin for milliseconds and keep a core from others, such as PRDC's searches, which took a third
# longer on two cores; 10,000 turns outlast the gaps between an update's operations. Read when PyTorch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def fit(config_dir: Path | str | None = None, **options: Any) -> Result:
    """Train, evaluate and save; `offrl train key=value ...` as a function.

    Nested options are tables, or dotted keys in a dictionary: `fit(agent="td3_bc", eval={"every": 0}, **{"agent.alpha": 1.0})`.

    Args:
        config_dir: a folder with agents, samplers, presets of your own, as `--config-dir` names it.

    Raises:
        OffrlError: bad input, in one sentence.
    """
    from offrl.training.compose import compose
    from offrl.training.trainer import train

    return train(compose(options, config_dir))


def load_agent(folder: Path | str, device: str = "cpu", trust: bool = False) -> Agent:
    """The agent of a run's last checkpoint; `agent.predict(obs)` maps an array `[O]` or `[n, O]` to actions.

    Args:
        trust: import the module of an agent that is not offrl's; only for folders whose origin you know.
    """
    from offrl.training import runs

    return runs.load_agent(folder, device, trust)


def load_data(name: Path | str, device: str = "cpu") -> OfflineDataset:
    """A dataset by id, file or folder (see `offrl data list`)."""
    from offrl.datasets import load

    return load(name, device=device)
