"""GPT-2's block with a lane axis, and its layers.

Parameters are `[lanes, ...]`; tokens are `[lanes, batch, tokens, embed]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from offrl.nets import kernels
from offrl.nets.lanes import lane_generators, normal_
from offrl.nets.mlp import Drop, layer_norm


class Linear(nn.Module):
    """x W^T + b of every lane, for inputs with any number of axes between lane and feature.

    Args:
        name: name of the initial weights' random stream, so that a lane's layers differ.
        std: standard deviation of normal initial weights, with biases of zero; None: PyTorch's default of `nn.Linear`.
    """

    def __init__(self, seeds: Sequence[int], fan_in: int, fan_out: int, name: str, std: float | None = None) -> None:
        super().__init__()
        bound = 1 / math.sqrt(fan_in)
        weights, biases = torch.empty(len(seeds), fan_out, fan_in), torch.zeros(len(seeds), fan_out)
        for lane, g in enumerate(lane_generators(seeds, name)):
            if std is None:
                weights[lane].uniform_(-bound, bound, generator=g)
                biases[lane].uniform_(-bound, bound, generator=g)
            else:
                normal_(weights[lane], g, std)
        self.weight, self.bias = nn.Parameter(weights), nn.Parameter(biases)

    def forward(self, x: Tensor) -> Tensor:
        """`[lanes, ..., in]` to `[lanes, ..., out]`."""
        flat = x.flatten(1, -2)
        out = kernels.mlp(flat, (self.weight, self.bias))
        if out is None:  # they are off
            out = torch.baddbmm(self.bias.unsqueeze(1), flat, self.weight.transpose(1, 2))
        return out.view(*x.shape[:-1], out.shape[-1])


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, with scale and shift per lane."""

    def __init__(self, lanes: int, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(lanes, width)), nn.Parameter(torch.zeros(lanes, width))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias)


class Block(nn.Module):
    """A GPT-2 block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, seeds: Sequence[int], embed: int, heads: int, name: str) -> None:
        super().__init__()

        def linear(fan_in: int, fan_out: int, part: str) -> Linear:
            return Linear(seeds, fan_in, fan_out, f"{name}/{part}", std=0.02)  # GPT-2's

        self.name, self.heads = name, heads
        self.norm_attention, self.norm_mlp = LayerNorm(len(seeds), embed), LayerNorm(len(seeds), embed)
        self.query, self.key_value = linear(embed, embed, "query"), linear(embed, 2 * embed, "key_value")
        self.mix = linear(embed, embed, "mix")
        self.up, self.down = linear(embed, 4 * embed, "up"), linear(4 * embed, embed, "down")

    def forward(self, x: Tensor, visible: Tensor, wanted: slice, drop: Drop | None) -> Tensor:
        """Tokens `[lanes, batch, tokens, embed]` to the outputs at the `wanted` ones.

        Args:
            visible: `[tokens, tokens]` bool, whether the row's token may attend to the column's.
            drop: dropout, as in `MLP`; None: none.
        """
        normal, keep = self.norm_attention(x), drop or (lambda _, y: y)
        key, value = self.key_value(normal).chunk(2, -1)
        mixed = self.attention(self.query(normal[:, :, wanted]), key, value, visible[wanted], drop)
        x = x[:, :, wanted] + keep(f"{self.name}/attention", self.mix(mixed))
        return x + keep(f"{self.name}/mlp", self.mlp(self.norm_mlp(x)))

    def mlp(self, x: Tensor) -> Tensor:
        """The layer of four times the width and the one that leads back."""
        up, down = self.up, self.down
        out = kernels.mlp(x.flatten(1, -2), (up.weight, up.bias, down.weight, down.bias))
        return down(up(x).relu()) if out is None else out.view(x.shape)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor, drop: Drop | None) -> Tensor:
        """Attention of queries `[lanes, batch, n, embed]` to keys and values `[lanes, batch, tokens, embed]`."""
        lanes_batch = query.shape[:2]
        split = (x.flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        q, k, v = split  # [lanes * batch, heads, tokens, embed / heads]
        if drop is None:
            out = nn.functional.scaled_dot_product_attention(q, k, v, visible)
        else:  # the fused operator would use PyTorch's random numbers, not the lane's
            scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
            weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
            out = drop(f"{self.name}/weights", weights.unflatten(0, lanes_batch)).flatten(0, 1) @ v
        return out.transpose(1, 2).flatten(2).unflatten(0, lanes_batch)
