"""Environments that draw from generators which `reset(seed=...)` does not seed, made reproducible."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np


@contextmanager
def global_generator(state: Any) -> Iterator[dict[str, Any]]:
    """Run with numpy's global generator in `state`; the caller's is put back. Yields a dict that holds the `state` at the end.

    For packages that draw from it; our own code has generators of its own.
    """
    before, after = np.random.get_state(), {"state": state}  # noqa: NPY002
    np.random.set_state(state)  # noqa: NPY002
    try:
        yield after
    finally:
        after["state"] = np.random.get_state()  # noqa: NPY002
        np.random.set_state(before)  # noqa: NPY002


def seeded(seed: int) -> Any:
    """The state of numpy's global generator behind a seed."""
    return np.random.RandomState(seed % 2**32).get_state()


class OwnGenerators(gymnasium.Wrapper):
    """An OGBench environment whose episodes depend on the seed of their reset alone.

    Its resets draw places from numpy's global generator and take random actions from the action space, and teleporters draw
    at a step; `reset(seed=...)` seeds neither. All environments of a process share the global generator, so that an episode
    would depend on the others. Here each environment has a state of the global generator of its own, which is put in
    place while it runs, and the caller's is put back.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        # The arm's action space is a property that makes another, unseeded space at every look.
        inner: Any = env.unwrapped
        if isinstance(getattr(type(inner), "action_space", None), property):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its bounds are given as float64
                space = inner.action_space
            inner.__class__ = type(type(inner).__name__, (type(inner),), {"action_space": space})
        self.state = seeded(0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.state = seeded(seed)
            self.env.unwrapped.action_space.seed(seed)
        with global_generator(self.state) as own:
            result = self.env.reset(seed=seed, options=options)
        self.state = own["state"]
        return result

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        with global_generator(self.state) as own:
            result = self.env.step(action)
        self.state = own["state"]
        return result
