"""offrl: an offline reinforcement learning zoo.

Train from Python as from the command line, with the same options:

    import offrl
    result = offrl.fit(agent="td3_bc", dataset="forge/hopper/medium-replay-v0", preset="laptop", lanes=5)
    agent = offrl.load_agent(result.folder)
    action = agent.select_action(observations)    # [lanes, n, obs] -> [lanes, n, action]
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


def fit(**options: Any) -> Result:
    """Train, evaluate and save; `offrl train key=value ...` as a function.

    A dotted key goes in a dictionary: `fit(agent="td3_bc", **{"agent.alpha": [1.0, 2.5], "lanes": 2})`.

    Raises:
        OffrlError: bad input, in one sentence.
    """
    from offrl.training.compose import compose
    from offrl.training.trainer import train

    return train(compose(options))


def load_agent(folder: Path | str, device: str = "cpu") -> Agent:
    """The agent of a run's last checkpoint; `agent.select_action(obs)` maps `[lanes, n, O]` to `[lanes, n, A]`."""
    from offrl.training.runs import load_agent

    return load_agent(folder, device)


def load_data(name: Path | str, device: str = "cpu") -> OfflineDataset:
    """A dataset by id, file or folder (see `offrl data list`)."""
    from offrl.datasets import load

    return load(name, device=device)
