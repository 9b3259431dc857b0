"""Flat columns, one row a step: the names under which files hold them, and what their flags mean together.

Two things are kept apart. A *termination* ends the task, so that nothing is bootstrapped (mask 0); an *end* is the
last row of an episode, be it by a termination, a time limit or the collector.

| column | other names | meaning |
|---|---|---|
| `terminals` | `terminations`, `terminated` | terminations; each ends its episode unless another column marks the ends |
| `timeouts` | `truncations`, `truncated` | ends by a time limit |
| `dones` | `dones_float`, `episode_terminals` | ends of either kind, beside `terminals`, `masks` or `timeouts` |
| `masks` | | 1 - termination; `terminals` beside them mark the ends only (OGBench) |
| `valids` | | 0 in a row that holds only the state behind an episode's last step (OGBench's compact layout) |
| `action_low`, `action_high` | | bounds of the actions, one number or one a dimension |
| `discrete_action` | | whether actions are class indices, also where they are stored as floats (d3rlpy 1) |
| `action_count` | | number of discrete actions, where the last ones may never occur |
| `action_start` | | number of the first discrete action, where it is not 0 (`start` of Gymnasium's Discrete) |

Every other key is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from offrl.data.actions import MOST_CLASSES, bounds, discrete_actions
from offrl.data.checks import check_dtype, check_length, flags, with_notices
from offrl.data.dataset import FIRST_ACTION, DatasetInfo
from offrl.data.memory import check_memory
from offrl.utils.errors import OffrlError, one_line

REQUIRED = ("observations", "actions", "rewards")
FLAGS = {
    "terminals": ("terminals", "terminations", "terminated"),
    "timeouts": ("timeouts", "truncations", "truncated"),
    "dones": ("dones", "dones_float", "episode_terminals"),
    "masks": ("masks",),
    "valids": ("valids",),
}
UNSEEN_ENDS = (
    "semantics=d4rl ignores next_observations, and no timeouts are stored, so that time limits are counted; semantics=exact "
    "takes the ends that next_observations shows"
)


@dataclass
class Rows:
    """Flat columns; `to_store` may overwrite them.

    Attributes:
        observations: `[N, O]` float32. next_observations: the same, or None when the source has none.
        actions: `[N, A]` float32, or `[N]` int64 when discrete. rewards: `[N]` float32.
        terminals, timeouts: `[N]` bool: terminations, and ends that are none; timeouts None when the source has none.
        ends: `[N]` bool: last rows of episodes, of whatever kind, where the source tells them.
        unknown: `[N]` bool: ends whose row of `next_observations` means nothing.
        checked: whether the rows were written by offrl, which wrote every end.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminals: np.ndarray
    timeouts: np.ndarray | None = None
    next_observations: Tensor | None = None
    ends: np.ndarray | None = None
    unknown: np.ndarray | None = None
    checked: bool = False


class Source(Protocol):
    """Named arrays of a file or of a caller."""

    where: str

    def keys(self) -> list[str]:
        """Names of all arrays."""

    def described(self, key: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype, before anything is read."""

    def floats(self, key: str) -> Tensor:
        """The array as float32."""

    def array(self, key: str) -> np.ndarray:
        """The array as it is stored."""


def shortened(names: Iterable[str]) -> str:
    """Up to ten names, and how many more there are."""
    listed = sorted(map(str, names))
    more = f" and {len(listed) - 10:,} more" if len(listed) > 10 else ""
    return ", ".join(name[:40] for name in listed[:10]) + more or "none"


def read_rows(source: Source, info: DatasetInfo, successors: bool = True) -> tuple[Rows, DatasetInfo]:
    """Read and check the columns of a source; `info` comes back with the bounds and the number of actions found.

    Args:
        successors: whether stored `next_observations` are read.

    Raises:
        OffrlError: a missing column, shapes that do not fit together, flags other than 0 and 1, actions that are not
            numbered as declared, too little memory.
    """
    keys, where = source.keys(), source.where
    found = {column: [key for key in names if key in keys] for column, names in FLAGS.items()}
    _check_keys(keys, found, where)
    wanted = [*REQUIRED, *(["next_observations"] if successors and "next_observations" in keys else [])]
    shapes = _check_shapes(source, [*wanted, *(key for names in found.values() for key in names)])
    widths = {key: int(np.prod(shapes[key][1:], dtype=np.int64)) for key in REQUIRED}
    check_memory(4 * shapes["observations"][0] * (2 * widths["observations"] + widths["actions"] + 2), where)
    if shapes["rewards"][0] and widths["rewards"] != 1:
        raise OffrlError(f"{where}: rewards has shape {shapes['rewards']}; it must be one number a row.")

    read = {column: _read_flags(source, names) for column, names in found.items() if names}
    low, high = (source.array(key) if key in keys else None for key in ("action_low", "action_high"))
    if low is not None or high is not None:
        width = widths["actions"] if source.described("actions")[1].kind == "f" else None
        info = replace(info, **bounds(low, high, where, width))
    info, first = _declared_actions(source, keys, info)
    indices = info.discrete is not None or first != 0
    if "discrete_action" in keys and not indices:
        indices = bool(np.asarray(source.array("discrete_action")).any())
    observations = _matrix(source.floats("observations"))
    if source.described("actions")[1].kind == "f" and not indices:
        actions = _matrix(source.floats("actions"))
    else:
        actions, info = discrete_actions(source.array("actions"), info, where, first)
    rows = Rows(
        observations=observations,
        actions=actions,
        rewards=source.floats("rewards").reshape(-1),
        terminals=np.zeros(0, bool),
        next_observations=_matrix(source.floats("next_observations")) if "next_observations" in wanted else None,
    )
    rows.terminals, rows.timeouts, rows.ends = meaning(read)
    if not successors and "next_observations" in keys and rows.timeouts is None:
        info = with_notices(info, [UNSEEN_ENDS])
    return _without_states(rows, read["valids"], where) if "valids" in read else rows, info


def _check_keys(keys: list[str], found: Mapping[str, list[str]], where: str) -> None:
    missing = [key for key in REQUIRED if key not in keys]
    known = found["terminals"] or found["masks"] or (found["dones"] and found["timeouts"])
    if found["valids"] and not found["masks"] and not missing:
        raise OffrlError(
            f"{where}: valids without masks do not tell where an episode terminated; add masks (0 at a termination)."
        )
    if missing or not known:
        hint = ""
        if found["dones"] and not known:
            hint = (
                f"; {found['dones'][0]} may mix terminations with time limits: add timeouts (1 at a time limit), or "
                "rename it to terminals if no episode ever met one"
            )
        elif not known and not missing:
            hint = "; give terminals of zeros if no episode ever terminates"
        names = " and ".join([*missing, *([] if known else ["terminals"])])
        raise OffrlError(f"{where}: missing {names} (its keys: {shortened(keys)}){hint}.")


def _check_shapes(source: Source, names: list[str]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for key in names:
        shapes[key], dtype = source.described(key)
        check_dtype(key, dtype, source.where)
        if not shapes[key]:
            raise OffrlError(f"{source.where}: {key} is a single number; it must have one row a step.")
        check_length(key, shapes[key][0], shapes["observations"][0], source.where)
    if shapes.get("next_observations", shapes["observations"]) != shapes["observations"]:
        both = f"{shapes['next_observations']} and {shapes['observations']}"
        raise OffrlError(f"{source.where}: next_observations and observations have shapes {both}; they must agree.")
    return shapes


def _declared_actions(source: Source, keys: list[str], info: DatasetInfo) -> tuple[DatasetInfo, int]:
    """`info` with what a source declares of discrete actions, and the number of the first one there.

    Raises:
        OffrlError: no integer, or a number of actions that contradicts `info`.
    """
    if "action_count" in keys:
        count = _integer(source, "action_count", 1)
        if info.discrete not in (None, count):
            raise OffrlError(
                f"{source.where}: action_count is {count}, but its description (DatasetInfo.discrete) says {info.discrete} "
                "discrete actions; remove one of them."
            )
        info = replace(info, discrete=count)
    first = _integer(source, "action_start", -MOST_CLASSES) if "action_start" in keys else 0
    if first:
        info = replace(info, provenance=info.provenance | {FIRST_ACTION: first})
    return info, first


def _integer(source: Source, key: str, least: int) -> int:
    value = np.asarray(source.array(key))
    if value.size == 1 and value.dtype.kind in "iu" and least <= int(value.item()) <= MOST_CLASSES:
        return int(value.item())
    raise OffrlError(
        f"{source.where}: {key} is {one_line(value, 60)}; it must be one integer from {least} to {MOST_CLASSES}."
    )


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), -1) if len(tensor) else tensor.reshape(0, 1)


def _read_flags(source: Source, names: list[str]) -> np.ndarray:
    """`[N]` bool of a column that may stand in a source under several names, which must then agree."""
    arrays = [flags(name, source.array(name), source.where).copy() for name in names]
    for name, other in zip(names[1:], arrays[1:]):
        if not np.array_equal(arrays[0], other):
            row = int(np.flatnonzero(arrays[0] != other)[0])
            raise OffrlError(
                f"{source.where}: {names[0]} and {name} mean the same but differ in row {row}; remove one."
            )
    return arrays[0]


def meaning(read: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Terminations, time limits and ends of the flags that a source has; see `Rows`."""
    terminals, timeouts, dones = read.get("terminals"), read.get("timeouts"), read.get("dones")
    ends = dones
    if "masks" in read:
        terminated = ~read["masks"]
        ends = terminals if ends is None else ends
    elif terminals is not None:
        terminated = terminals
    else:
        assert dones is not None
        assert timeouts is not None
        terminated = dones & ~timeouts  # Stable-Baselines3: `timeouts` where a limit ended an episode that goes on
    if ends is None:
        return terminated, timeouts, None
    if timeouts is not None:
        ends = ends | timeouts
    elif np.array_equal(ends, terminated):
        return terminated, None, None  # they tell no more than the terminations
    return terminated, ends & ~terminated, ends


def _without_states(rows: Rows, valid: np.ndarray, where: str) -> Rows:
    """Rows without those that hold a state only, which become successors of the rows before them."""
    if rows.next_observations is not None:
        raise OffrlError(f"{where}: it holds both valids and next_observations; remove the ones that are not right.")
    if not valid.any():
        return rows  # refused as soon as rows are counted
    n = len(valid)
    behind = np.append(~valid[1:], True)[valid]
    keep = torch.from_numpy(np.flatnonzero(valid))
    unknown = np.zeros(len(keep), dtype=bool)
    unknown[-1] = bool(valid[-1])  # no state behind it is stored
    terminals = rows.terminals[valid]
    ends = behind.copy()
    ends[-1] = not valid[-1]
    return Rows(
        observations=rows.observations[keep],
        actions=rows.actions[keep],
        rewards=rows.rewards[keep],
        terminals=terminals,
        timeouts=ends & ~terminals,
        next_observations=rows.observations[(keep + 1).clamp(max=n - 1)],
        ends=ends,
        unknown=unknown,
    )
