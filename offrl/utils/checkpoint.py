"""Checkpoints: one safetensors file that is replaced whole, with the facts about it as JSON in the file's header.

It holds everything that training changes: networks, targets, optimiser moments and observation statistics as tensors (and
what a sampler has learnt, under `sampler/`); the update's number, seeds, configuration and data fingerprint as JSON. Random
numbers and most samplers are functions of seed and update number, so nothing else needs saving. No pickle is involved.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from offrl.utils.errors import OffrlError
from offrl.utils.paths import replacing

NAME = "checkpoint.safetensors"
_KEY = "offrl"
_SAMPLER = "sampler/"


def save(path: Path, agent: nn.Module, metadata: dict[str, Any], sampler: Mapping[str, Tensor] | None = None) -> None:
    """Write a checkpoint beside `path` and rename it over the old one.

    Args:
        sampler: what the sampler's `tensors` gives.

    Raises:
        OffrlError: the disk is full or the folder can't be written; the old checkpoint is intact.
    """
    state = agent.state_dict() | {_SAMPLER + name: tensor for name, tensor in (sampler or {}).items()}
    try:
        write(path, state, metadata)
    except (OSError, SafetensorError) as error:
        raise OffrlError(
            f"{path}: the checkpoint could not be written ({error}); free some space or choose another folder with "
            "out=DIR. The last good checkpoint is untouched."
        ) from error


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
    """Any tensors and facts in a checkpoint's format, whole or not at all; `load` reads them."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(plain, temporary, metadata={_KEY: json.dumps(metadata)})


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint.

    Raises:
        OffrlError: there is none, or the file is damaged.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _metadata(file)  # noqa: SIM118 - not a dict


def metadata(path: Path) -> dict[str, Any]:
    """What a checkpoint says besides its tensors; raises as `load` does."""
    with _opened(path) as file:
        return _metadata(file)


def _metadata(file: Any) -> dict[str, Any]:
    value = json.loads((file.metadata() or {})[_KEY])
    if not isinstance(value, dict):
        raise ValueError("its facts are no dictionary")
    return value


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise OffrlError(f"{path}: there is no checkpoint; train first, or name the folder of a run.") from error
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise OffrlError(f"{path}: this is no offrl checkpoint, or it is damaged ({error}); remove it.") from error


def restore(agent: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy a checkpoint's tensors into an agent made from the same configuration."""
    mine, tensors = agent.state_dict(), {k: v for k, v in tensors.items() if not k.startswith(_SAMPLER)}
    odd = sorted(set(mine) ^ set(tensors)) or sorted(k for k in mine if mine[k].shape != tensors[k].shape)
    if odd:
        raise OffrlError(f"{path}: the checkpoint does not fit this agent's configuration (at {odd[0]}).")
    agent.load_state_dict(tensors)


def of_sampler(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a checkpoint's tensors that belongs to the sampler."""
    return {name.removeprefix(_SAMPLER): t for name, t in tensors.items() if name.startswith(_SAMPLER)}
