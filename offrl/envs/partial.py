"""The environment of a partially observed dataset: it shows what the dataset's observations hold (`offrl.data.partial`)."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from offrl.data.partial import Partial
from offrl.utils.errors import OffrlError


class PartialObservation(gymnasium.ObservationWrapper):
    """Leaves out dimensions of a vector observation, and loses whole observations at random.

    The draws have a generator of their own, seeded by the reset's seed: states and rewards are those of the environment
    without this wrapper.
    """

    def __init__(self, env: gymnasium.Env, partial: Partial) -> None:
        super().__init__(env)
        space = env.observation_space
        width = space.shape[0] if isinstance(space, spaces.Box) and len(space.shape) == 1 else 0
        if not width or max(partial.kept or (0,)) >= width:
            raise OffrlError(
                f"{env}: its observation is no vector that holds the dimensions {partial.kept}; change data.mask."
            )
        assert isinstance(space, spaces.Box)
        self.partial, self.kept = partial, slice(None) if partial.kept is None else list(partial.kept)
        low, high = space.low[self.kept], space.high[self.kept]
        if partial.flicker:
            low, high = np.minimum(low, 0), np.maximum(high, 0)
        self.observation_space = spaces.Box(low, high, dtype=space.dtype.type)
        self.generator: np.random.Generator | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None or self.generator is None:
            self.generator = np.random.default_rng(None if seed is None else [seed, 0xF11C])
        return super().reset(seed=seed, options=options)

    def observation(self, observation: NDArray[Any]) -> NDArray[Any]:
        assert self.generator is not None, "reset comes before step"
        shown = observation[self.kept]
        lost = self.partial.flicker and self.generator.random() < self.partial.flicker
        return np.zeros_like(shown) if lost else shown
