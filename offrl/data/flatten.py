"""Which parts of a Dict observation an agent sees, and in which order; readers and evaluation share this one rule."""

from __future__ import annotations

from collections.abc import Iterable


def flat_keys(env_id: str, keys: Iterable[str]) -> list[str]:
    """Keys of a Dict observation that are concatenated into the flat vector, in order.

    D4RL's mazes have a fixed goal that is no part of the observation. AntMaze's position stands under
    `achieved_goal` and not in `observation`; PointMaze repeats its position there. Every other environment is
    concatenated in alphabetical order of its keys.

    Args:
        env_id: Gymnasium id, e.g. `AntMaze_UMaze-v5`; only its name is looked at.
        keys: keys of the observation space.
    """
    available, name = set(keys), env_id.rsplit("/", 1)[-1].lower()
    if name.startswith("antmaze"):
        wanted = ["achieved_goal", "observation"]
    elif name.startswith("pointmaze"):
        wanted = ["observation"]
    else:
        return sorted(available)
    return wanted if available.issuperset(wanted) else sorted(available)
