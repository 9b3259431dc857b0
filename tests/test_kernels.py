"""Hand-written kernels against float64, and what keeps them off."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_toy
from test_nets import SHAPES, random_net, relu_mlp_reference
from torch import Tensor

from offrl.agents.base import Spec
from offrl.agents.td3_bc import TD3BC, TD3BCConfig
from offrl.nets import Critics, kernels
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager, Native, Taped, make_engine
from offrl.utils.errors import OffrlError

# Blocks of 256 terms and 264 rows, and tiles of 12 x 32, 6 x 16 or 6 x 8, are crossed by one, met, and not filled.
SHAPES = [*SHAPES, (1, 265, (257, 33, 1)), (1, 264, (256, 32, 6)), (2, 513, (23, 31, 1)), (1, 11, (300, 17, 300))]
RTOL = 1e-5  # some hundred float32 roundings of 6e-8 in a sum, relative to the largest number


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The kernels, compiled by the system's compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFRL_HOME", str(tmp_path_factory.getbasetemp() / "offrl-home"))  # the session's, as in each test
        patch.delenv("CC", raising=False)
        kernels._library.cache_clear()
        if kernels.problem():
            pytest.skip(kernels.problem())
        yield
    kernels._library.cache_clear()


def assert_near(mine: Tensor, exact: Tensor) -> None:
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine.double(), exact, rtol=0, atol=RTOL * exact.abs().max().item())


def net32(n: int, batch: int, sizes: tuple[int, ...]) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """A random network in float32, and the same numbers in float64; weights are of a usual size."""
    x, parameters = random_net(n, batch, sizes)
    parameters = [p / p.shape[-1] ** 0.5 if p.ndim == 3 else p for p in parameters]
    small = [t.detach().float().requires_grad_() for t in (x, *parameters)]
    exact = [t.detach().double().requires_grad_() for t in small]
    return small[0], small[1:], exact[0], exact[1:]


@pytest.mark.parametrize(("n", "batch", "sizes"), SHAPES, ids=str)
def test_values_and_gradients_are_those_of_float64(compiled: None, n: int, batch: int, sizes: tuple[int, ...]) -> None:
    x, parameters, x64, exact = net32(n, batch, sizes)
    with kernels.in_use():
        out = kernels.mlp(x, parameters)
        assert out is not None
        with torch.no_grad():
            torch.testing.assert_close(kernels.mlp(x, parameters), out, rtol=0, atol=0)
    expected = relu_mlp_reference(x64, exact)
    assert_near(out.detach(), expected.detach())
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad(out, [x, *parameters], direction)
    for gradient, right in zip(mine, torch.autograd.grad(expected, [x64, *exact], direction.double())):
        assert_near(gradient, right)


def test_one_member_of_each_lanes_ensemble_is_read_where_it_lies(compiled: None) -> None:
    critics = Critics((0, 1, 2), 5, 2, (40, 40), members=2)
    obs, action = torch.randn(3, 9, 5), torch.randn(3, 9, 2, requires_grad=True)
    results = []
    for switch in (False, True):
        q = _q(critics, obs, action, switch)
        results.append((q, *torch.autograd.grad(q.sum(), action)))
    assert not torch.equal(results[0][0], results[1][0])  # they round differently, so the kernels did run
    for plain, mine in zip(*results):
        assert_near(mine.detach(), plain.detach().double())


def _q(critics: Critics, obs: Tensor, action: Tensor, by_kernels: bool) -> Tensor:
    if not by_kernels:
        return critics(obs, action, member=1, frozen=True)
    with kernels.in_use():
        return critics(obs, action, member=1, frozen=True)


def test_a_row_does_not_depend_on_the_rows_beside_it(compiled: None) -> None:
    x, parameters, *_ = net32(1, 300, (20, 70, 70, 3))
    with kernels.in_use(), torch.no_grad():
        together = kernels.mlp(x, parameters)
        assert together is not None
        for rows in (1, 2, 3, 5, 13):
            assert torch.equal(kernels.mlp(x[:, :rows].contiguous(), parameters), together[:, :rows])


def test_a_nan_is_not_hidden_by_a_relu(compiled: None) -> None:
    x, parameters, *_ = net32(1, 8, (3, 20, 1))
    x = x.detach().clone()
    x[0, 4, 1] = torch.nan
    with kernels.in_use(), torch.no_grad():
        out = kernels.mlp(x, parameters)
    assert out is not None
    assert out[0, :, 0].isnan().tolist() == [row == 4 for row in range(8)]


def test_kernels_are_off_unless_switched_on_and_for_other_types(compiled: None) -> None:
    x, parameters, x64, exact = net32(1, 4, (3, 8, 1))
    assert kernels.mlp(x, parameters) is None
    with kernels.in_use():
        assert kernels.mlp(x64, exact) is None
        assert kernels.mlp(x, [p.transpose(-1, -2).contiguous().transpose(-1, -2) for p in parameters]) is None
    assert kernels.mlp(x, parameters) is None


# ---- engines --------------------------------------------------------------------------------------------------


def made(seeds: tuple[int, ...] = (0, 1), **settings: Any) -> tuple[TD3BC, BatchLoader]:
    store = make_toy(2048)
    spec = Spec(store.obs_dim, store.action_dim, seeds, *store.observation_statistics())
    agent = TD3BC(spec, TD3BCConfig(**{"hidden": (32, 32), **settings}))
    return agent, BatchLoader([(store, Uniform(store), 1.0)], 32)


def test_the_native_engine_trains_as_eager_does(compiled: None) -> None:
    """Roundings of 1e-7 grow in eight updates to far less than Adam's steps of 3e-4."""
    (one, rows), (other, _) = made(), made()
    metrics, others = Eager(one, rows).run(0, 8), make_engine("native", other, rows).run(0, 8)
    for name, value in metrics.items():
        torch.testing.assert_close(others[name], value, rtol=1e-4, atol=1e-5)
    distances = [(a - b).abs().max() for a, b in zip(one.state_dict().values(), other.state_dict().values())]
    assert 0 < max(distances) < 3e-5


def test_native_runs_repeat_and_continue_to_the_bit(compiled: None) -> None:
    """However the updates are cut, and with an engine made anew on the way, as after a resume."""
    (one, rows), (other, _) = made(), made()
    Native(one, rows).run(0, 30)
    Native(other, rows).run(0, 7)
    fresh, _ = made()
    fresh.load_state_dict(other.state_dict())
    engine = Native(fresh, rows)
    engine.run(7, 5)
    engine.run(12, 18)
    assert [take.faithful for take in engine.takes.values()] == [True, True]
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), fresh.state_dict().values()))


def test_lanes_do_not_change_each_other(compiled: None) -> None:
    (together, rows), (alone, _) = made(seeds=(3, 4)), made(seeds=(4,))
    Native(together, rows).run(0, 10)
    Native(alone, rows).run(0, 10)
    assert torch.equal(together.critics.mlp.weights[1][1], alone.critics.mlp.weights[1][0])


def test_without_a_compiler_the_numbers_are_eagers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    kernels._library.cache_clear()
    agent, rows = made()
    assert type(make_engine("auto", agent, rows)) is Taped
    with pytest.raises(
        OffrlError, match=r"engine=native has no kernels here: no C compiler built them .*; use engine=auto"
    ):
        make_engine("native", agent, rows)
    with kernels.in_use():
        assert kernels.mlp(torch.ones(1, 2, 3), [torch.ones(1, 1, 3), torch.ones(1, 1)]) is None


def test_the_compiled_file_is_made_once_and_beside_the_other_caches(compiled: None) -> None:
    path = kernels._built()  # in the session's own folder
    made_at = path.stat().st_mtime_ns
    assert path.parent == Path(os.environ["OFFRL_HOME"]) / "kernels"
    assert kernels._built() == path
    assert path.stat().st_mtime_ns == made_at


def test_a_file_that_others_may_write_is_not_loaded(compiled: None) -> None:
    """It is code. A usual mask of a group that may write does not matter, since the file is made for its owner alone."""
    path = kernels._built()
    assert kernels._ours_alone(path)
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    path.chmod(0o620)
    assert kernels._library.__wrapped__() is None
    path.chmod(0o600)
    assert kernels._library.__wrapped__() is not None


def test_half_precision_and_several_threads_keep_away_from_kernels(compiled: None) -> None:
    agent, rows = made()
    assert type(make_engine("auto", agent, rows, precision="bfloat16")) is Taped
    with pytest.raises(OffrlError, match="engine=native computes in float32 on a CPU"):
        make_engine("native", agent, rows, precision="bfloat16")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(OffrlError, match=r"they run on one thread \(threads=1\)"):
            make_engine("native", agent, rows)
    finally:
        torch.set_num_threads(threads)
