"""What all readers share: options, float32 memory, and checks that turn a bad file into one clear sentence."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from offrl.data.catalogue import check_family
from offrl.data.dataset import Bound, DatasetInfo
from offrl.utils.errors import OffrlError
from offrl.utils.locks import READ_ONLY

Semantics = Literal["exact", "d4rl"]


@dataclass(frozen=True)
class ReadOptions:
    """How a source becomes a dataset.

    Attributes:
        semantics: `exact`, or `d4rl` for the very rows of D4RL's `qlearning_dataset`; see `offrl.data.episodes`.
        clip_actions: clip actions that leave their bounds instead of refusing them.
        action_bound: b when actions live in [-b, b] instead of the bounds that the source or its family tells.
        unfinished: read data without any episode end as one unfinished episode instead of refusing it.
        goals: keep the goals of goal-conditioned mazes in the observation.
        action_low, action_high: any other box, one number or one a dimension.
        family: family by whose rules a file is read whose name is no id of the catalogue, e.g. `antmaze` (only
            timeouts end an episode) or `kitchen`.
    """

    semantics: Semantics = "exact"
    clip_actions: bool = False
    action_bound: float | None = None
    unfinished: bool = False
    goals: bool = False
    action_low: Bound | None = None
    action_high: Bound | None = None
    family: str | None = None

    def __post_init__(self) -> None:
        if self.semantics not in ("exact", "d4rl"):
            raise OffrlError(f"semantics={self.semantics!r} is unknown; use 'exact' or 'd4rl'.")
        if self.action_bound is not None and not 0 < float32(self.action_bound) < np.inf:
            raise OffrlError(
                f"action_bound={self.action_bound} must be positive and finite as float32; leave it out to use [-1, 1]."
            )
        if self.action_bound is not None and (self.action_low is not None or self.action_high is not None):
            raise OffrlError("action_bound is short for action_low and action_high; give one or the other.")
        if self.family is not None:
            check_family(self.family)

    def changed(self) -> dict[str, Any]:
        """The options that are not the default, as JSON has them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        default = vars(type(self)())
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value != default[name]
        }


def float32(value: float) -> float:
    """What is left of a number as float32, as data and networks have it: infinity from about 3.4e38 on, 0 below 1e-45."""
    with np.errstate(over="ignore", under="ignore"):
        return float(np.float32(value))


def check_read_already(options: ReadOptions, where: str, read_with: Mapping[str, Any] | None = None) -> None:
    """Refuse options for data that were read when their flat file was written; `read_with`: those of that reading."""
    changed = options.changed()
    if changed and changed != read_with:
        hint = "; preset=d4rl sets semantics, preset=paper does not" if "semantics" in changed else ""
        raise OffrlError(
            f"{where}: this dataset has been read already; leave out {' and '.join(changed)} here, or give it to what reads "
            f"the source{hint}."
        )


def with_notices(info: DatasetInfo, notices: list[str]) -> DatasetInfo:
    """`info` with sentences that a user of the data should read, under `provenance["notices"]`."""
    if not notices:
        return info
    return replace(info, provenance=info.provenance | {"notices": [*info.provenance.get("notices", []), *notices]})


def warn_of(info: DatasetInfo, stacklevel: int = 3) -> None:
    """Show a dataset's notices as warnings."""
    for notice in info.provenance.get("notices", []):
        warnings.warn(f"{info.source}: {notice}.", stacklevel=stacklevel)


def empty(*shape: int) -> Tensor:
    """Uninitialised float32 tensor. Memory comes from numpy, which asks the kernel for huge pages: a third faster to
    fill for the first time, and a little faster to gather from, than `torch.empty`."""
    return torch.from_numpy(np.empty(shape, np.float32))


def check_dtype(key: str, dtype: np.dtype, where: str) -> None:
    """Only plain numbers may become tensors."""
    if dtype.kind not in "fiub":
        name = "object" if dtype.kind == "O" else str(dtype)
        raise OffrlError(f"{where}: {key} has dtype {name}; store it as plain numbers (float32, int64 or bool).")


def as_array(key: str, value: Any, where: str) -> np.ndarray:
    """A caller's array, nested list or tensor (of any device, bfloat16 as float32) as a numpy array.

    Raises:
        OffrlError: rows of different shapes or kinds, such as `(observation, info)` or None among observations; numbers
            that are masked, whose place holds whatever stood there before.
    """
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        masked = int(np.argwhere(np.ma.getmaskarray(value))[0][0]) if value.ndim else 0
        raise OffrlError(f"{where}: {key} is masked in row {masked}; fill in or leave out what is missing.")
    try:
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) and isinstance(value[0], Tensor):
            return np.stack([as_array(key, row, where) for row in value])
        if not isinstance(value, Tensor):
            return np.asarray(value)
        tensor = value.detach().cpu()
        narrow = tensor.is_floating_point() and tensor.element_size() < 4
        return (tensor.float() if narrow else tensor).numpy()
    except (ValueError, TypeError, RuntimeError) as error:
        raise OffrlError(
            f"{where}: {key} has dtype object; store it as plain numbers (float32, int64 or bool), each row of the same shape."
        ) from error


def check_length(key: str, length: int, expected: int, where: str) -> None:
    if length != expected:
        raise OffrlError(f"{where}: {key} has {length} rows but observations has {expected}; they must agree.")


def check_finite(key: str, tensor: Tensor, where: str) -> None:
    """Refuse NaN and infinity, naming key and row. Costs one pass and no memory unless something is wrong."""
    if tensor.numel() == 0:
        raise OffrlError(
            f"{where}: {key} has no columns (shape {tuple(tensor.shape)}); check that the file is the right one."
        )
    low, high = torch.aminmax(tensor)
    if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
        return
    for start, chunk in enumerate(tensor.split(65_536)):
        bad = (~torch.isfinite(chunk)).nonzero()
        if len(bad):
            index, value = bad[0].tolist(), float(chunk[tuple(bad[0])])
            place = f"row {start * 65_536 + index[0]}" + (f", column {index[1]}" if len(index) > 1 else "")
            raise OffrlError(f"{where}: {key} holds {value} in {place}; remove or repair that episode.")


def flags(key: str, array: np.ndarray, where: str) -> np.ndarray:
    """`[N]` bool from an end-of-episode column; files store it as bool, integer or float, (N,) or (N, 1)."""
    check_dtype(key, array.dtype, where)
    if array.ndim == 0:
        raise OffrlError(f"{where}: {key} is a single value; it must be one flag a row.")
    if array.size == 0:
        return np.zeros(len(array), dtype=bool)
    array = array.reshape(len(array), -1)
    if array.shape[1] != 1:
        raise OffrlError(f"{where}: {key} has {array.shape[1]} columns; it must be one flag a row.")
    array = array[:, 0]
    if array.dtype == np.bool_:
        return array
    ones = array == 1
    odd = np.flatnonzero(~ones & (array != 0))
    if len(odd):
        raise OffrlError(f"{where}: {key} holds {array[odd[0]]} in row {odd[0]}; it must hold only 0 and 1.")
    return ones


def file_kind(path: Path) -> str:
    """`hdf5`, `npz`, `gzip` or `safetensors` by the first bytes; a pickle is recognised and never opened.

    Raises:
        OffrlError: the file is empty, a pickle, or nothing that can be read.
    """
    try:
        with open(os.open(path, READ_ONLY), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OffrlError(f"{path}: this is a pipe, a device or a folder; give a file, or a Minari folder.")
            head = file.read(16)
    except OSError as error:
        raise OffrlError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions.") from error
    if not head:
        raise OffrlError(f"{path}: the file is empty; fetch or write it again.")
    suffix = path.suffix.lower()
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "hdf5"
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head.startswith(b"PK"):
        return "npz"
    if head[8:9] == b"{":
        return "safetensors"
    if head[0] == 0x80 or suffix in (".pkl", ".pickle", ".p"):
        raise OffrlError(
            f"{path}: this is a pickle, which can run any code when opened, so it is never read; "
            "save its arrays with numpy.savez or as HDF5."
        )
    if suffix in (".hdf5", ".h5"):
        raise OffrlError(f"{path}: this is no HDF5 file (it begins with {head[:12]!r}); fetch or write it again.")
    if suffix == ".npz":
        raise OffrlError(f"{path}: this is no NPZ file (it begins with {head[:12]!r}); write it with numpy.savez.")
    if suffix in (".csv", ".tsv", ".parquet", ".feather"):
        raise OffrlError(
            f"{path}: a table has no fixed names of columns; read it with pandas or polars, and name them in Python: "
            "offrl.fit(dataset=offrl.data.from_frame(frame, observations=[...], actions=[...], ...))."
        )
    raise OffrlError(f"{path}: not a format that can be read; use .hdf5, .h5, .hdf5.gz, .npz or a Minari folder.")
