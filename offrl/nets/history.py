"""Encoders of histories with a lane axis: a recurrent network, and a window of the last timesteps.

An encoder carries a memory through an episode. At a timestep with observation o_t and previous action a_{t-1}

    memory_t = advance(features(o_t, a_{t-1}, exists), memory_{t-1}),    z_t = read(memory_t),

with memory_{-1} = 0, and `exists` = 0 at the first timestep, which has no previous action. z_t is a function of o_0, a_0, ...,
o_t alone: rewards are not part of a history.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from offrl.nets.mlp import MLP
from offrl.nets.recurrent import gru


class GRUEncoder(nn.Module):
    """A gated recurrent unit (Cho et al. 2014, in PyTorch's form) between a layer of inputs and a linear layer to z.

    Args:
        latent: width of z. hidden: width of the state, and of the layer of inputs.

    Attributes:
        memory_dim: width of the memory.
    """

    def __init__(self, seeds: Sequence[int], obs_dim: int, action_dim: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.memory_dim = hidden
        self.inputs = MLP(seeds, [obs_dim + action_dim + 1, hidden, 3 * hidden], name="history/inputs")
        self.recurrent = MLP(seeds, [hidden, 3 * hidden], name="history/recurrent")
        self.latent = MLP(seeds, [hidden, latent], name="history/latent")

    def features(self, obs: Tensor, previous: Tensor, exists: Tensor) -> Tensor:
        """The part of the gates that does not depend on the memory, `[lanes, n, 3 hidden]`.

        Args:
            obs: `[lanes, n, O]`. previous: previous actions `[lanes, n, A]`. exists: `[lanes, n, 1]`, 1 if there is one.
        """
        return self.inputs(torch.cat([obs, previous * exists, exists], -1))

    def advance(self, features: Tensor, memory: Tensor) -> Tensor:
        """The memory `[lanes, n, hidden]` after a timestep."""
        reset, update, new = features.chunk(3, -1)
        own_reset, own_update, own_new = self.recurrent(memory).chunk(3, -1)
        update = (update + own_update).sigmoid()
        new = (new + (reset + own_reset).sigmoid() * own_new).tanh()
        return (1 - update) * new + update * memory

    def read(self, memory: Tensor) -> Tensor:
        """z `[lanes, n, latent]` of memories."""
        return self.latent(memory)


class WindowEncoder(nn.Module):
    """The last `context` observations, and the actions between them, through an MLP; `context = 1` is memoryless.

    Args:
        latent: width of z; 0: z is the window itself (frames are stacked and nothing is learnt).
        hidden: width of the two hidden layers.

    Timesteps before the episode are zeros, and a flag tells them apart.
    """

    def __init__(
        self, seeds: Sequence[int], obs_dim: int, action_dim: int, latent: int, hidden: int, context: int
    ) -> None:
        super().__init__()
        self.obs_dim, self.pair = obs_dim, action_dim + obs_dim + 1
        self.memory_dim = obs_dim + (context - 1) * self.pair
        sizes = [self.memory_dim, hidden, hidden, latent]
        self.latent = MLP(seeds, sizes, name="history/latent") if latent else nn.Identity()

    def features(self, obs: Tensor, previous: Tensor, exists: Tensor) -> Tensor:
        """As of `GRUEncoder`; here the three side by side."""
        return torch.cat([obs, previous, exists], -1)

    def advance(self, features: Tensor, memory: Tensor) -> Tensor:
        """The window `[lanes, n, memory_dim]` one timestep on: o_t, then (a, o, exists) of each earlier one, newest first."""
        obs, previous, exists = features.split([self.obs_dim, self.pair - self.obs_dim - 1, 1], -1)
        newest = torch.cat([previous, memory[..., : self.obs_dim], torch.ones_like(exists)], -1) * exists
        return torch.cat([obs, newest, memory[..., self.obs_dim :]], -1)[..., : self.memory_dim]

    def read(self, memory: Tensor) -> Tensor:
        z: Tensor = self.latent(memory)
        return z


Encoder = GRUEncoder | WindowEncoder


def memories(encoder: Encoder, obs: Tensor, previous: Tensor, exists: Tensor) -> Tensor:
    """Memories at every timestep of sequences, `[lanes, n, T, memory_dim]`, from an empty one.

    Args:
        obs, previous, exists: `[lanes, n, T, ...]` as in `features`.
    """
    in_time = [part.transpose(1, 2) for part in (obs, previous, exists)]
    length, n = in_time[0].shape[1:3]
    features = encoder.features(*(part.flatten(1, 2) for part in in_time)).unflatten(1, (length, n))
    if isinstance(encoder, GRUEncoder):
        found = gru(features, *encoder.recurrent.layers)
        if found is not None:
            return found.transpose(1, 2)
    memory, each = obs.new_zeros(len(obs), n, encoder.memory_dim), []
    # Taken apart at once: the gradient of each index would be as large as all timesteps.
    for features_t in features.unbind(1):
        memory = encoder.advance(features_t, memory)
        each.append(memory)
    return torch.stack(each, 2)
