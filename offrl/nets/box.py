"""The box of continuous actions, with the same bounds for all dimensions or bounds of their own."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from offrl.nets.spec import Bound


class ActionBox(nn.Module):
    """What networks and agents compute with the bounds of actions.

    Attributes:
        low, high: the bounds.
        half_width, centre: half the distance of the bounds, and their middle.

    They are numbers if all dimensions have the same bounds, else tensors `[A]`. The tensors move with the module, and a
    checkpoint doesn't hold them, since the Spec does.
    """

    low: float | Tensor
    high: float | Tensor
    half_width: float | Tensor
    centre: float | Tensor

    def __init__(self, low: Bound, high: Bound) -> None:
        super().__init__()
        self.exact: dict[str, Tensor] = {}  # float64, of which the tensors are roundings
        if isinstance(low, tuple) or isinstance(high, tuple):
            least, most = (torch.tensor(bound, dtype=torch.float64) for bound in (low, high))
            least, most = torch.broadcast_tensors(least, most)
            self.exact = {"low": least, "high": most, "half_width": (most - least) / 2, "centre": (most + least) / 2}
            for name, value in self.exact.items():
                self.register_buffer(name, value.to(torch.get_default_dtype()), persistent=False)
        else:
            self.low, self.high = low, high
            self.half_width, self.centre = (high - low) / 2, (high + low) / 2
        self.is_unit = not self.exact and self.half_width == 1 and self.centre == 0

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for name, value in self.exact.items():  # a wider type gets the digits that a narrower one lacks
            getattr(self, name).copy_(value)
        return self

    def from_unit(self, x: Tensor) -> Tensor:
        """Actions of points `[..., A]` of [-1, 1]^A."""
        return x if self.is_unit else x * self.half_width + self.centre

    def to_unit(self, action: Tensor) -> Tensor:
        """The inverse of `from_unit`."""
        return action if self.is_unit else (action - self.centre) / self.half_width

    def clip(self, action: Tensor) -> Tensor:
        """The nearest actions inside the box."""
        return action.clamp(self.low, self.high)  # type: ignore[arg-type]  # both numbers or both tensors
