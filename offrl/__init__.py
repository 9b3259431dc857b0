"""offrl: an offline reinforcement learning zoo.

Train from Python as from the command line, with the same options:

    import offrl
    result = offrl.fit(agent="td3_bc", dataset="forge/hopper/medium-replay-v0", preset="laptop", lanes=5)
    agent = offrl.load_agent(result.folder)
    action, _ = agent.predict(observation)    # arrays: [obs] -> [action], or a batch
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offrl.agents.base import Agent
    from offrl.data.dataset import OfflineDataset
    from offrl.training.hooks import Evaluation
    from offrl.training.runs import Result

__version__ = "0.1.0"
__all__ = ["fit", "load_agent", "load_data"]

# Idle threads of GNU OpenMP spin for milliseconds and keep a core from others, such as PRDC's searches, which took a third
# longer on two cores; 10,000 turns outlast the gaps between an update's operations. Read when PyTorch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def fit(
    config_dir: Path | str | None = None,
    *,
    dataset: Any = None,
    on_evaluation: Callable[[Evaluation], object] | None = None,
    on_checkpoint: Callable[[int, Path], object] | None = None,
    **options: Any,
) -> Result:
    """Train, evaluate and save; `offrl train key=value ...` as a function.

    Nested options are tables, or dotted keys in a dictionary: `fit(agent="td3_bc", eval={"every": 0}, **{"agent.alpha": 1.0})`.

    Args:
        config_dir: a folder with agents, samplers, presets of your own, as `--config-dir` names it.
        dataset: an id, a file or folder; or data in memory: what `load_data` returns, a dictionary of the arrays
            `observations`, `actions`, `rewards`, `terminals` (docs/own_data.md has all names and shapes), or a Minari
            dataset. Data in memory is kept below OFFRL_HOME, so that the run can be resumed.
        on_evaluation: called after each evaluation with an `offrl.training.hooks.Evaluation`.
        on_checkpoint: called after each checkpoint with the updates made and the checkpoint's file.
        options: options of `offrl train`; `eval={"env": ...}` may also be a function that makes an environment.

    Raises:
        OffrlError: bad input, in one sentence.
    """
    from offrl.training.fit import fit
    from offrl.training.hooks import Hooks

    return fit(dataset, options, config_dir, Hooks(on_evaluation, on_checkpoint))


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
