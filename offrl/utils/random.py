"""Counter-based random numbers, one independent stream per lane.

A draw is a pure function of (lane seed, name of the draw, update number, element): nothing is advanced and nothing has
to be saved. So a lane's numbers do not depend on the lanes beside it, a resumed run continues exactly, drawing many
updates at once equals drawing them one by one, and the same tensor code runs eagerly, compiled or inside a CUDA graph.

The generator is SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): a
counter with the golden-ratio step through a 64-bit mixer; each (seed, name, update) starts it at a hashed place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_STEP = -3335678366873096957  # 0xD1B54A32D192ED03, another odd constant: updates don't walk along the counter
_LARGEST_KEPT = 1 << 14  # numbers of an update that are kept; of more, making them one by one costs little
_MADE_AT_ONCE = 64  # updates whose numbers are made together where updates are asked for one by one
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch shifts int64 arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of int64 (wrapping multiplication)."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _name_key(name: str) -> int:
    """FNV-1a, 63 bits: arithmetic that a compiler of tensor code can fold, unlike a library's hash."""
    key = 0xCBF29CE484222325
    for character in name:
        key = ((key ^ ord(character)) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return key >> 1


class LaneRandom:
    """Random tensors `[lanes, ...]`, lane l from its own seed.

    Args:
        seeds: one integer per lane.
        device: where the numbers are made.

    Attributes:
        step: int64 scalar tensor, the number of the update under way; whoever runs updates sets it.
        place: gives normals a place of their own, `place(name, like, draw)`; None: `draw(name, like)` itself.

    Many updates' normals can be made in one go: between `look_ahead(first, count)` and the next such call, the first
    request of a name makes its numbers for all these updates, and `step` moves by `advance`. A loop that takes updates one by
    one calls `go_to` instead, and uniforms of one update are made with those of the next. The numbers are the same.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        # On the CPU first: on the `meta` device, PyTorch multiplies by Python code that takes seconds to import.
        numbers = torch.tensor([int(seed) for seed in seeds], dtype=torch.int64, device="cpu")
        self.seeds = mix(numbers * _GOLDEN).to(device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        # As a tensor: a compiler would multiply a number into the index of a view, beyond what its integers hold.
        self.golden = torch.tensor(_GOLDEN, device=device)
        self._block: tuple[Tensor | None, int] = (None, 0)  # the updates looked ahead to, and which one is under way
        self._first = 0  # the first of these, as a number: reading it from the tensor would wait for a GPU
        self._normals: dict[tuple[str, torch.Size, torch.dtype], Tensor] = {}
        # Uniforms of single updates: from which update on, and the numbers.
        self._uniforms: dict[tuple[str, tuple[int, ...]], tuple[int, Tensor]] = {}
        self.place: Callable[[str, Tensor, Callable[[str, Tensor], Tensor]], Tensor] | None = None

    def look_ahead(self, first: int, count: int) -> None:
        """The next updates are number `first ... first + count - 1`; the first one is under way."""
        steps = torch.arange(first, first + count, device=self.seeds.device) if count else None
        self._block, self._first, self._normals = (steps, 0), first, {}
        self.step.fill_(first)

    def advance(self) -> None:
        """The next update is under way."""
        self._block = (self._block[0], self._block[1] + 1)
        self.step.add_(1)

    def go_to(self, step: int) -> None:
        """Update number `step` is under way, in a loop that takes them one by one: it looks ahead by itself."""
        steps, _ = self._block
        if steps is None or not 0 <= step - self._first < len(steps):
            self.look_ahead(step, _MADE_AT_ONCE)
        self._block = (self._block[0], step - self._first)
        self.step.fill_(step)

    def bits(self, name: str, count: int, steps: Tensor | None = None) -> Tensor:
        """`[*steps, lanes, count]` int64 of 64 random bits; `steps` defaults to the update under way."""
        steps = self.step if steps is None else steps
        key = mix(mix(self.seeds ^ _name_key(name)) + (steps * _STEP).unsqueeze(-1))
        counter = torch.arange(1, count + 1, device=self.seeds.device) * self.golden
        return mix(key.unsqueeze(-1) + counter)

    def uniform(self, name: str, shape: Sequence[int], steps: Tensor | None = None) -> Tensor:
        """`[*steps, lanes, *shape]` float64 in [0, 1) with 53 random bits."""
        few = math.prod(shape) * len(self.seeds) <= _LARGEST_KEPT
        if few and steps is not None and steps.shape == (1,) and steps.device.type == "cpu":
            return self._kept_uniform(name, tuple(shape), int(steps))
        bits = self.bits(name, math.prod(shape), steps)
        return (_shift(bits, 11).double() * 2.0**-53).unflatten(-1, tuple(shape))

    def _kept_uniform(self, name: str, shape: tuple[int, ...], step: int) -> Tensor:
        """The uniforms of one update; whoever asks for one asks for the next ones too, so they are made with it and kept."""
        first, kept = self._uniforms.get((name, shape), (step + 1, self.step))
        if not 0 <= step - first < _MADE_AT_ONCE:
            first, kept = step, self.uniform(name, shape, torch.arange(step, step + _MADE_AT_ONCE))
            self._uniforms[name, shape] = first, kept
        return kept[step - first].unsqueeze(0)

    def integers(self, name: str, high: int, shape: Sequence[int], steps: Tensor | None = None) -> Tensor:
        """`[*steps, lanes, *shape]` int64, uniform on 0 ... high - 1 (bias below high / 2^53)."""
        return (self.uniform(name, shape, steps) * high).to(torch.int64)

    def normal_rows(self, name: str, rows: int, width: int, steps: Tensor | None = None) -> Tensor:
        """Standard normals `[*steps, lanes, rows, width]` in float64; a row doesn't depend on how many there are."""
        uniform = self.uniform(name, (rows, 2, width), steps)
        radius, angle = (-2 * torch.log1p(-uniform[..., 0, :])).sqrt(), 2 * math.pi * uniform[..., 1, :]
        return radius * angle.cos()

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Standard normals with the shape and type of `like` (`[lanes, ...]`), by Box and Muller's transform.

        One 64-bit draw makes two normals: 32 bits for the radius and 32 for the angle, so |z| stays below 6.8.
        """
        return self.draw_normal(name, like) if self.place is None else self.place(name, like, self.draw_normal)

    def draw_normal(self, name: str, like: Tensor) -> Tensor:
        """`normal`, whoever gives numbers a `place`."""
        steps, under_way = self._block
        if steps is None:
            return self._normal(name, like, None)
        key = (name, like.shape, like.dtype)
        if key not in self._normals:
            self._normals[key] = self._normal(name, like, steps)
        return self._normals[key][under_way]

    def _normal(self, name: str, like: Tensor, steps: Tensor | None) -> Tensor:
        count = like[0].numel()
        bits = self.bits(name, (count + 1) // 2, steps)
        radius = ((_shift(bits, 32).to(like.dtype) + 0.5) * 2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = (bits & 0xFFFFFFFF).to(like.dtype).mul_(2.0 * math.pi * 2.0**-32)
        z = torch.cat([radius * angle.cos(), radius * angle.sin()], -1)
        return z[..., :count].reshape(*z.shape[:-2], *like.shape)
