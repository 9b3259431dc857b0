"""Coefficients and initial random numbers per lane, and the methods that `torch.compile` leaves alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offrl.utils.random import LaneRandom


def lane_generators(seeds: Sequence[int], name: str) -> list[torch.Generator]:
    """One CPU generator per lane, for initialisation; `name` names the stream, so that networks of one lane differ."""
    start = LaneRandom(seeds).bits(f"init/{name}", 1)[:, 0]
    return [torch.Generator().manual_seed(int(s) & (2**63 - 1)) for s in start]


def normal_(lane: Tensor, generator: torch.Generator, std: float = 1.0) -> None:
    """Fill a lane's part of a tensor with N(0, std^2).

    Not on the `meta` device, which has shapes alone: there PyTorch would import its compiler, for two seconds, to do nothing.
    """
    if not lane.is_meta:
        lane.normal_(0, std, generator=generator)


_NO_COMPILE: list[tuple[type, str]] = []


def no_compile(cls: type, name: str) -> None:
    """Declare a method that `torch.compile` cannot speed up or cannot read."""
    _NO_COMPILE.append((cls, name))


def apply_no_compile() -> None:
    """Make `torch.compile` skip the declared methods; engines that compile call this.

    A decorator at each method would import the compiler, which costs a second, in every process.
    """
    while _NO_COMPILE:
        cls, name = _NO_COMPILE.pop()
        setattr(cls, name, torch.compiler.disable(getattr(cls, name)))


def per_lane(value: float | Tensor, axes: int = 1) -> Any:
    """A coefficient that can multiply `[lanes, ...]` with `axes` further axes.

    A number is returned as it is; a tensor `[lanes]` becomes `[lanes, 1, ...]` with `axes` ones.
    """
    return value.view(-1, *[1] * axes) if isinstance(value, Tensor) else value
