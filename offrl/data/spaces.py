"""Minari's spaces as flat vectors: which arrays make up an observation, and what an action is.

Every space that is read here is one that `offrl.envs.adapters` flattens alike, since a policy must see in evaluation what
it saw in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offrl.data import schema
from offrl.data.actions import bounds
from offrl.data.catalogue import flat_keys
from offrl.data.dataset import DatasetInfo
from offrl.utils.advice import option
from offrl.utils.errors import OffrlError


@dataclass(frozen=True)
class Leaf:
    """One array of a nested observation: its path in the file, how many numbers it gives, and how.

    Attributes:
        classes: numbers of values of discrete entries, which become one-hot one behind the other; None for a box.
        start: least value of each of them.
    """

    path: tuple[str, ...]
    size: int
    classes: tuple[int, ...] | None = None
    start: tuple[int, ...] = ()
    image: bool = False

    @property
    def name(self) -> str:
        """The path in dots, as `info.provenance["observation_keys"]` has it."""
        return ".".join(self.path)

    def flat(self, array: NDArray[Any]) -> NDArray[Any]:
        """`[T, size]` of an array `[T, ...]`.

        Raises:
            ValueError: the array does not fit the space.
        """
        rows = len(array)
        if self.classes is None:
            return array.reshape(rows, self.size)
        values = array.reshape(rows, -1)
        if values.shape[1] != len(self.classes):
            raise ValueError(f"{self.name} has {values.shape[1]} columns, where {len(self.classes)} belong")
        index = values.astype(np.int64) - np.array(self.start, np.int64)
        if (outside := (index < 0) | (index >= np.array(self.classes))).any():
            raise ValueError(
                f"{self.name or 'observations'} holds {values[outside][0]}, which is no value of its space"
            )
        hot = np.zeros((rows, self.size), np.float32)
        first = np.append(0, np.cumsum(self.classes[:-1]))
        np.put_along_axis(hot, index + first.astype(np.int64), 1, axis=1)
        return hot


def observation_leaves(space: Any, env_id: str, goals: bool, where: str) -> list[Leaf]:
    """The arrays that make up the flat observation, in order.

    Args:
        space: the observation space, as a model or as Minari's JSON of it.
        env_id: Gymnasium id, which decides what a maze's observation is.
        goals: take every key of a goal-conditioned maze instead.
    """
    if isinstance(space, dict):
        space = schema.parse(schema.Holder, {"space": space}, where).space
    leaves = list(_leaves(space, (), None if goals else env_id, where))
    if not leaves:
        raise OffrlError(f"{where}: its observation space ({space.type}) holds no numbers; it cannot be used.")
    names = [leaf.name for leaf in leaves]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise OffrlError(f"{where}: two parts of an observation have the path {twice}; rename one.")
    return leaves


def _leaves(space: schema.Space, path: tuple[str, ...], env_id: str | None, where: str) -> Iterator[Leaf]:
    if isinstance(space, schema.Dict):
        keys = sorted(space.subspaces) if env_id is None or path else flat_keys(env_id, space.subspaces)
        for key in keys:
            yield from _leaves(space.subspaces[key], (*path, key), env_id, where)
    elif isinstance(space, schema.Tuple):
        for index, subspace in enumerate(space.subspaces):
            yield from _leaves(subspace, (*path, f"_index_{index}"), env_id, where)
    elif isinstance(space, schema.Box):
        image = space.dtype == "uint8" and len(space.shape) == 3
        yield Leaf(path, int(np.prod(space.shape, dtype=np.int64)), image=image)
    elif isinstance(space, schema.Discrete):
        yield Leaf(path, space.n, (space.n,), (space.start,))
    elif isinstance(space, schema.MultiDiscrete):
        classes = tuple(space.nvec)
        start = tuple(space.start) if len(space.start) == len(classes) else tuple(space.start) * len(classes)
        yield Leaf(path, sum(classes), classes, start)
    elif isinstance(space, schema.MultiBinary):
        yield Leaf(path, int(np.prod(space.n, dtype=np.int64)))
    elif not isinstance(space, schema.Text):
        raise OffrlError(f"{where}: observations of type {space.type} are not supported; convert them to boxes.")


def action_info(space: schema.Space, info: DatasetInfo, where: str) -> tuple[DatasetInfo, int, int]:
    """`info` with the action bounds, the width of an action (0 when discrete), and the first discrete action."""
    if isinstance(space, schema.Discrete):
        return replace(info, discrete=space.n), 0, space.start
    if not isinstance(space, schema.Box):
        raise OffrlError(f"{where}: actions of type {space.type} are not supported; only Box and Discrete are.")
    if np.dtype(space.dtype).kind != "f":
        raise OffrlError(f"{where}: actions are a box of {space.dtype}; store them as Discrete or as a box of float32.")
    if not (_finite(space.low) and _finite(space.high)):
        raise OffrlError(
            f"{where}: its action space has no bounds; give them ({option('data.action_bound', 'B')}; other boxes: "
            "action_low and action_high of offrl data convert)."
        )
    info = replace(info, discrete=None, **bounds(space.low, space.high, where))
    return info, int(np.prod(space.shape, dtype=np.int64)), 0


def _finite(bound: Any) -> bool:
    try:
        return bool(np.isfinite(np.asarray(bound, dtype=np.float64)).all())
    except (TypeError, ValueError):
        return False
