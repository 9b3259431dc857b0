"""Coefficients and initialisation per lane, and what compilers are kept away from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offrl.utils.random import LaneRandom


def lane_generators(seeds: Sequence[int], name: str) -> list[torch.Generator]:
    """One CPU generator per lane, for initialisation; `name` keeps networks of one lane apart."""
    start = LaneRandom(seeds).bits(f"init/{name}", 1)[:, 0]
    return [torch.Generator().manual_seed(int(s) & (2**63 - 1)) for s in start]


_NO_COMPILE: list[tuple[type, str]] = []


def no_compile(cls: type, name: str) -> None:
    """Declare a method that a compiler of tensor code has nothing to gain from, or can't read."""
    _NO_COMPILE.append((cls, name))


def apply_no_compile() -> None:
    """Keep the compiler out of what was declared so; for an engine that compiles.

    Not done where the methods stand, since that imports the compiler, which would cost every process a second.
    """
    while _NO_COMPILE:
        cls, name = _NO_COMPILE.pop()
        setattr(cls, name, torch.compiler.disable(getattr(cls, name)))


def per_lane(value: float | Tensor, axes: int = 1) -> Any:
    """A coefficient ready to multiply `[lanes, ...]` with `axes` further axes: a number stays, `[lanes]` gets axes."""
    return value.view(-1, *[1] * axes) if isinstance(value, Tensor) else value
