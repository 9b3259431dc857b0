"""The recurrent unit by kernels against float64, timestep by timestep, and an agent's updates from a tape."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_toy
from test_history import GRU, history_of
from torch import Tensor

from offrl.nets import kernels
from offrl.nets.history import GRUEncoder, memories
from offrl.nets.recurrent import gru
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager, make_engine

RTOL = 1e-5  # some hundred float32 roundings of 6e-8 in a sum, relative to the largest number
# Lanes, sequences, timesteps, width: no full vector, one timestep, a tile met, crossed by one, more than a block of terms.
SHAPES = [(2, 3, 5, 7), (1, 1, 1, 4), (2, 12, 3, 32), (3, 13, 9, 33), (1, 30, 4, 300)]


def sequences(lanes: int, n: int, steps: int, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    obs, previous = (size * torch.randn(lanes, n, steps, width, generator=generator) for width in (5, 3))
    exists = torch.ones(lanes, n, steps, 1)
    exists[:, :, 0] = 0
    return obs, previous, exists


# Of inputs of some hundred the gates' sums are, too, and are rounded to 1e-5 before the gates see them.
@pytest.mark.parametrize(("size", "tolerance"), [(1.0, RTOL), (300.0, 10 * RTOL)], ids=["usual", "saturated"])
@pytest.mark.parametrize(("lanes", "n", "steps", "width"), SHAPES, ids=str)
def test_states_and_gradients_are_those_of_float64(
    compiled: None, lanes: int, n: int, steps: int, width: int, size: float, tolerance: float
) -> None:
    encoder = GRUEncoder(range(lanes), 5, 3, 2, width)
    exact = copy.deepcopy(encoder).double()
    given = sequences(lanes, n, steps, size)
    found: list[list[Tensor]] = []
    for net, inputs in ((encoder, given), (exact, [x.double() for x in given])):
        with kernels.in_use():
            out = memories(net, *inputs)
            with torch.no_grad():  # where nothing is kept for a gradient
                torch.testing.assert_close(memories(net, *inputs), out, rtol=0, atol=0)
        by = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        parameters = [*net.inputs.parameters(), *net.recurrent.parameters()]
        found.append([out, *torch.autograd.grad(out, parameters, by)])
    for mine, theirs in zip(*found):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


def test_a_nan_stays_in_its_sequence_from_its_timestep_on(compiled: None) -> None:
    encoder = GRUEncoder(range(1), 5, 3, 2, 20)
    obs, previous, exists = sequences(1, 3, 6)
    obs[0, 1, 2] = float("nan")
    with kernels.in_use():
        bad = memories(encoder, obs, previous, exists).isnan().any(-1)[0]
    assert bad.tolist() == [[False] * 6, [False, False, True, True, True, True], [False] * 6]


def test_without_kernels_there_is_no_node() -> None:
    assert gru(torch.zeros(1, 2, 3, 12), torch.zeros(1, 12, 4), torch.zeros(1, 12)) is None


def test_an_agents_updates_from_a_tape_are_those_of_plain_operations(compiled: None) -> None:
    """IQL on encodings, with every loss: parameters differ by float32's rounding, which Adam's division enlarges."""
    store = make_toy(400, seed=2)
    mine, theirs = (history_of(store, GRU | {"bisimulation": 0.5, "hidden": 40}) for _ in range(2))
    loader = BatchLoader([(store, Uniform(store), 1.0)], 16, mine.window, mine.batch_fields, mine.window_before)
    make_engine("native", mine, loader).run(0, 10)
    Eager(theirs, loader).run(0, 10)
    for (name, parameter), other in zip(mine.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-5, msg=name)
