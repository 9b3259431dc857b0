"""Checkpoints: one safetensors file that is replaced whole, with the facts about it as JSON in the file's header.

It holds everything that training changes: networks, targets, optimiser moments and observation statistics as tensors (and
what a sampler has learnt, under `sampler/`); the update's number, seeds, configuration and data fingerprint as JSON. Random
numbers and most samplers are functions of seed and update number, so nothing else needs saving. No pickle is involved.
A checksum over all of it stands beside the facts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from offrl.utils.errors import OffrlError, one_line
from offrl.utils.files import parse_json
from offrl.utils.paths import replacing

NAME = "checkpoint.safetensors"
_KEY = "offrl"
_CHECKSUM = "checksum"
_SAMPLER = "sampler/"
_FOREIGN = "this is no offrl checkpoint, or it is damaged"


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
    text = json.dumps(metadata)
    with replacing(path, own_folder=True) as temporary:
        save_file(plain, temporary, metadata={_KEY: text, _CHECKSUM: _digest(plain, text)})


def load(path: Path, schema: Any = dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """Tensors and facts of a checkpoint.

    Args:
        schema: what the facts have to be, as `offrl.utils.files.read_json` takes it.

    Raises:
        OffrlError: there is none, the file is damaged, or its facts do not fit the schema.
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        header = file.metadata() or {}
        if _CHECKSUM in header and header[_CHECKSUM] != _digest(tensors, header[_KEY]):  # earlier versions wrote none
            raise ValueError("its content differs from its checksum")
    return tensors, _facts(header, schema, path)


def metadata(path: Path, schema: Any = dict[str, Any]) -> Any:
    """What a checkpoint says besides its tensors; raises as `load` does, but for damage to the tensors."""
    with _opened(path) as file:
        header = file.metadata() or {}
    return _facts(header, schema, path)


def _facts(header: Mapping[str, str], schema: Any, path: Path) -> Any:
    if _KEY not in header:
        raise OffrlError(f"{path}: {_FOREIGN} (it has no offrl header); {_remedy(path)}.")
    return parse_json(header[_KEY], schema, f"{path}: {_FOREIGN}", _remedy(path))


def _remedy(path: Path) -> str:
    """What to do about a file that is no checkpoint: nobody should remove what merely was named by mistake."""
    return "remove it" if path.suffix == ".safetensors" else f"name the folder of a run, or its {NAME}"


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """Of names, types, shapes, numbers and facts: one flipped bit changes it."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"blake2b:{digest.hexdigest()}"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no regular file")
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise OffrlError(f"{path}: there is no checkpoint; train first, or name the folder of a run.") from error
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, MemoryError) as error:
        raise OffrlError(f"{path}: {_FOREIGN} ({one_line(error)}); {_remedy(path)}.") from error


def restore(agent: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy a checkpoint's tensors into an agent made from the same configuration.

    Raises:
        OffrlError: names, shapes or types are others than the agent's, or a number is not finite.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_SAMPLER)}
    check_fits(agent.state_dict(), tensors, path, "agent")
    agent.load_state_dict(tensors)


def check_fits(mine: Mapping[str, Tensor], kept: Mapping[str, Tensor], path: Path, owner: str) -> None:
    """Raise OffrlError unless the kept tensors are finite and have names, shapes and types of those here.

    Args:
        owner: whose tensors they are, for the message.
    """
    odd = sorted(mine.keys() ^ kept.keys()) or sorted(
        name for name, tensor in mine.items() if (tensor.shape, tensor.dtype) != (kept[name].shape, kept[name].dtype)
    )
    if odd:
        raise OffrlError(f"{path}: the checkpoint does not fit this {owner}'s configuration (at {odd[0]}).")
    if broken := first_not_finite(kept):
        raise OffrlError(f"{path}: the checkpoint holds numbers that are not finite (in {broken}); remove it.")


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first name whose tensor holds an infinity or NaN; None where all are finite."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def of_sampler(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a checkpoint's tensors that belongs to the sampler."""
    return {name.removeprefix(_SAMPLER): t for name, t in tensors.items() if name.startswith(_SAMPLER)}
