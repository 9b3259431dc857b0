"""Fixtures that several test files share. Datasets and runs live in a folder of the test session."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from absl import logging as absl_logging

from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.nets import kernels
from offrl.training import trainer

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CC"] = "none"  # no kernels but in their own tests: every folder of caches would ask the compiler for them
KERNELS_CC = os.environ.get("KERNELS_CC", "cc")  # the compiler of those tests, with its options
torch.set_num_threads(1)
# dm_control's logger, when Hydra replaces it, closes the stream that was stderr at its import: here one of pytest's own.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The kernels, compiled by the system's compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFRL_HOME", str(tmp_path_factory.getbasetemp() / "offrl-home"))  # the session's, as in each test
        patch.setenv("CC", KERNELS_CC)
        kernels._library.cache_clear()
        if kernels.problem():
            pytest.skip(kernels.problem())
        yield
    kernels._library.cache_clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With the variable OFFRL_AGENT: the tests of that agent alone, as `make contract AGENT=NAME` wants them."""
    if agent := os.environ.get("OFFRL_AGENT"):
        items[:] = [i for i in items if isinstance(i, pytest.Function) and _agent_of(i) == agent]
        if not items:
            raise pytest.UsageError(f"no agent {agent}; is CONFIG_DIR the folder with agent/{agent}.yaml in it?")


def _agent_of(test: pytest.Function) -> str | None:
    return test.callspec.params.get("name") if hasattr(test, "callspec") else None


@pytest.fixture(autouse=True)
def _no_walk_of_all_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training begins with a pass of the cycle collector. Over all that a test session holds it takes longer than most of
    the trainings here; those in processes of their own have it."""
    monkeypatch.setattr(trainer, "_no_collector", nullcontext)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's caches; the session shares one, so that what is built is built once."""
    home = tmp_path_factory.getbasetemp() / "offrl-home"
    monkeypatch.setenv("OFFRL_HOME", str(home))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(home / "minari"))
    for name in ("D4RL_DATASET_DIR", "OFFRL_D4RL_URL", "OGBENCH_DATASET_DIR", "OFFRL_OGBENCH_URL"):
        monkeypatch.delenv(name, raising=False)


def best_action(obs: torch.Tensor) -> torch.Tensor:
    """The optimum of the toy task, inside the box of actions."""
    return 0.5 * torch.stack([obs[..., 0].sin(), (obs[..., 0] * obs[..., 1]).tanh()], -1)


def make_toy(rows: int = 4096, bias: float = 0.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> OfflineDataset:
    """Episodes of four independent states with reward -4 |a - best_action(s)|^2, so the optimal policy is known.

    The behaviour is the optimum plus `bias` plus uniform noise: cloning it has about the error `bias`.
    """
    generator = torch.Generator().manual_seed(seed)
    obs = torch.rand(rows, 3, generator=generator, dtype=torch.float64) * 3 - 1.5
    noise = torch.rand(rows, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.8
    action = (best_action(obs) + bias + noise).clamp(-1, 1)
    reward = -4 * (action - best_action(obs)).square().sum(-1)
    termination = torch.zeros(rows)
    termination[3::4] = 1
    tensors = (obs, action, reward, obs.roll(-1, 0), termination)
    obs, action, reward, next_obs, termination = (t.to(dtype) for t in tensors)
    info = DatasetInfo(id="toy", ref_min=-10.0, ref_max=0.0)
    return OfflineDataset(obs, action, reward, next_obs, termination, torch.arange(0, rows + 1, 4), info)


def best_choice(obs: torch.Tensor) -> torch.Tensor:
    """The optimum of the toy task of three integer actions."""
    return (obs[..., 0] > -0.5).long() + (obs[..., 0] > 0.5).long()


def make_discrete_toy(rows: int = 4096, dtype: torch.dtype = torch.float32, seed: int = 0) -> OfflineDataset:
    """The toy task with three integer actions, drawn alike, and reward -4 1[a != best_choice(s)]."""
    toy = make_toy(rows, dtype=dtype, seed=seed)
    action = torch.randint(3, (rows,), generator=torch.Generator().manual_seed(seed + 1))
    reward = -4.0 * (action != best_choice(toy.observations)).to(dtype)
    tensors = toy.tensors() | {"actions": action, "rewards": reward, "tail_actions": action[::4]}
    return OfflineDataset(**tensors, info=replace(toy.info, discrete=3))


def tiny(cls: Any, width: int = 32) -> dict[str, Any]:
    """Settings that make an agent small: every `hidden` and `..._hidden`, and what its `Config` says itself."""
    hidden = [f.name for f in fields(cls.Config) if f.name.endswith("hidden")]
    return {name: [width, width] for name in hidden} | getattr(cls.Config, "tiny", {})


@pytest.fixture
def toy() -> OfflineDataset:
    return make_toy()


@pytest.fixture
def toy_file(tmp_path: Path, toy: OfflineDataset) -> Path:
    """The toy task as an NPZ file."""
    return write_toy(tmp_path / "toy.npz", toy)


def write_toy(path: Path, toy: OfflineDataset) -> Path:
    import numpy as np

    timeouts = np.zeros(len(toy), dtype=bool)
    np.savez(
        path,
        observations=toy.observations.numpy(),
        actions=toy.actions.numpy(),
        rewards=toy.rewards.numpy(),
        next_observations=toy.next_observations.numpy(),
        terminals=toy.terminations.numpy().astype(bool),
        timeouts=timeouts,
    )
    return path
