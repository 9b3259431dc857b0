"""Files of d3rlpy 2 (`ReplayBuffer.dump`): arrays `observations_I`, `actions_I`, `rewards_I`, `terminated_I` of episode I.

Episodes hold no state behind their last step, so that a last step without a termination has no known successor. Files of
d3rlpy 1 (`MDPDataset.dump`) are flat columns; `offrl.data.columns` knows their `episode_terminals`. An episode without a step
is left out.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
from torch import Tensor

from offrl.data.checks import check_dtype, empty
from offrl.data.hdf5 import column, reading
from offrl.utils.errors import OffrlError


class D3rlpyFile:
    """The episodes of a file, one behind the other, as a source of columns."""

    def __init__(self, file: h5py.File, names: list[str], path: Path) -> None:
        self.file, self.known, self.path, self.where = file, set(names), path, str(path)
        if "observations_0_0" in self.known:
            raise OffrlError(
                f"{path}: this d3rlpy file has observations of several parts; store them as one array each episode."
            )
        lengths = [len(self._part("rewards", number)) for number in range(sum(n.startswith("rewards_") for n in names))]
        self.episodes = [number for number, length in enumerate(lengths) if length]
        self.lengths = [lengths[number] for number in self.episodes]

    def keys(self) -> list[str]:
        return ["observations", "actions", "rewards", "terminals", "dones"]

    def described(self, key: str) -> tuple[tuple[int, ...], np.dtype]:
        if key in ("terminals", "dones"):
            return (sum(self.lengths),), np.dtype(bool)
        first = self._part(key, self.episodes[0] if self.episodes else 0)
        return (sum(self.lengths), *first.shape[1:]), first.dtype

    def floats(self, key: str) -> Tensor:
        tensor = empty(*self.described(key)[0])
        self._fill(key, tensor.numpy())
        return tensor

    def array(self, key: str) -> np.ndarray:
        shape, dtype = self.described(key)
        array = np.zeros(shape, dtype)
        ends = np.cumsum(self.lengths) - 1
        if key == "dones":
            array[ends] = True
        elif key == "terminals":
            array[ends] = [self._terminated(number) for number in self.episodes]
        else:
            self._fill(key, array)
        return array

    def _part(self, key: str, number: int) -> h5py.Dataset:
        name = f"{key}_{number}"
        if name not in self.known:
            raise OffrlError(f"{self.path}: this d3rlpy file lacks {name}; dump it again.")
        part = column(self.file, name, self.path)
        check_dtype(name, part.dtype, self.where)
        return part

    def _terminated(self, number: int) -> bool:
        with reading(self.path, f"terminated_{number}"):
            return bool(np.any(self.file[f"terminated_{number}"][()]))

    def _fill(self, key: str, out: np.ndarray) -> None:
        start = 0
        for number, length in zip(self.episodes, self.lengths):
            part = self._part(key, number)
            if part.shape != (length, *out.shape[1:]):
                raise OffrlError(
                    f"{self.where}: {key}_{number} has shape {part.shape}, where {(length, *out.shape[1:])} belongs."
                )
            with reading(self.path, f"{key}_{number}"):
                out[start : start + length] = part[()]
            start += length


def is_d3rlpy(names: list[str]) -> bool:
    """Whether an HDF5 file with these arrays is one of d3rlpy 2."""
    return "rewards_0" in names and any(name.startswith("observations_0") for name in names)
