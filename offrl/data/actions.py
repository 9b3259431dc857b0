"""Which actions are discrete, and the box that continuous ones live in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offrl.data.checks import ReadOptions
from offrl.data.dataset import DatasetInfo
from offrl.utils.advice import option
from offrl.utils.errors import OffrlError

# A tanh policy's action may leave the box by rounding; more than this share of the bound is another action space.
ACTION_TOLERANCE = 1e-3
# Human demonstrations whose simulator clips the recorded action, so that clipping gives what was executed
# (D4RL: kitchen_multitask_v0.py).
CLIPPED_BY_SIMULATOR = ("kitchen",)
# A larger class index is rather a number than a class; a policy would have an output for each.
MOST_CLASSES = 65_536


def discrete_actions(array: np.ndarray, info: DatasetInfo, where: str, first: int = 0) -> tuple[Tensor, DatasetInfo]:
    """`[N]` int64 class indices from 0 on, of bools, integers, one-hot rows, or floats that are class indices.

    Args:
        array: bools or integers, or floats of which the source says that they are discrete; `[N, ...]`.
        first: number of the first action in `array`; one-hot rows have none.

    Raises:
        OffrlError: several columns that are not one-hot, numbers that are no class indices.
    """
    array = array.reshape(len(array), -1)
    if array.shape[1] != 1:
        if not (((array == 0) | (array == 1)).all() and (array.sum(1) == 1).all()):
            raise OffrlError(
                f"{where}: actions holds {array.dtype} in {array.shape[1]} columns; integers are read as discrete "
                "actions, one index a row or one-hot; store float32 if they are continuous."
            )
        return torch.from_numpy(array.argmax(1)), replace(info, discrete=info.discrete or array.shape[1])
    if array.dtype.kind == "u" and len(array):
        # As they are stored: from 2^63 on, int64 would turn them negative.
        check_indices(array[:, 0], info, where, first)
    indices = whole(array[:, 0], "actions", where)
    if len(indices):
        check_indices(indices, info, where, first)
        indices -= first
        count = 2 if array.dtype.kind == "b" else int(indices.max()) + 1
        info = replace(info, discrete=info.discrete or count)
    return torch.from_numpy(indices), info


def whole(numbers: np.ndarray, key: str, where: str) -> np.ndarray:
    """`[N]` int64 of bools, integers, or floats that are whole numbers; `key` is what messages call them.

    Raises:
        OffrlError: a fraction, NaN or an infinity.
    """
    with np.errstate(invalid="ignore"):  # what int64 cannot hold differs from what it becomes
        integers = numbers.astype(np.int64)
    if numbers.dtype.kind == "f" and (odd := np.flatnonzero(integers != numbers)).size:
        raise OffrlError(f"{where}: {key} holds {numbers[odd[0]]} in row {odd[0]}, which is no discrete action.")
    return integers


def check_indices(indices: np.ndarray, info: DatasetInfo, where: str, first: int = 0) -> None:
    """Refuse numbers that are no class indices, the least of which is `first`."""
    least, most = int(indices.min()), int(indices.max())
    if least >= first and most - first < (info.discrete or MOST_CLASSES):
        return
    worst = least if least < first else most
    row = int(np.flatnonzero(indices == worst)[0])
    if info.discrete is not None:
        raise OffrlError(
            f"{where}: actions holds {worst} in row {row}; it must lie between {first} and {first + info.discrete - 1}: "
            "correct it, or the declared number of actions (action_count, DatasetInfo.discrete or Minari's action space)."
        )
    raise OffrlError(
        f"{where}: actions holds {worst} in row {row}; integers are read as discrete actions {first}, {first + 1}, "
        f"{first + 2}, ...: number them from {first} (action_start tells another first number), or store float32 if they "
        "are continuous."
    )


def looks_discrete(actions: Tensor) -> str | None:
    """A sentence where continuous actions `[N, A]` look like class indices or one-hot rows; None otherwise."""
    if len(actions) < 2 or not bool(((actions[:100] == actions[:100].round()) & (actions[:100] >= 0)).all()):
        return None
    if bool((actions < 0).any()) or bool((actions != actions.round()).any()):
        return None
    if actions.shape[1] == 1 and float(actions.max()) > 0 and float(actions.min()) < float(actions.max()):
        kind = "class indices"
    elif actions.shape[1] > 1 and bool((actions.sum(1) == 1).all()):
        kind = "one-hot rows"
    else:
        return None
    return f"actions are floats that look like {kind} and are read as continuous; store integers if they are discrete"


def bounds(low: Any, high: Any, where: str, width: int | None = None) -> dict[str, Any]:
    """`action_low` and `action_high` for a DatasetInfo from numbers or arrays, one a dimension.

    Args:
        width: dimensions of the actions where these are known.

    Raises:
        OffrlError: one of the two is missing, they are no finite numbers of float32, low is not below high, or there are
            neither one nor `width` of them.
    """
    if low is None or high is None:
        raise OffrlError(f"{where}: action_low and action_high belong together; give both.")
    try:
        lower, upper = (np.asarray(bound, dtype=np.float64).reshape(-1) for bound in (low, high))
        if width is not None and (odd := [bound.size for bound in (lower, upper) if bound.size not in (1, width)]):
            raise OffrlError(
                f"{where}: the actions have {width} dimensions but their bounds {odd[0]}; they must agree."
            )
        lower, upper = np.broadcast_arrays(lower, upper)
    except (ValueError, TypeError) as error:
        raise OffrlError(
            f"{where}: action_low and action_high must be numbers, one or one a dimension ({error})."
        ) from error
    with np.errstate(over="ignore"):
        least, most = lower.astype(np.float32), upper.astype(np.float32)
    if lower.size == 0 or not (np.isfinite(least).all() and np.isfinite(most).all()):
        raise OffrlError(
            f"{where}: action_low and action_high must be finite as float32; clip the actions to bounds you choose."
        )
    if not (least < most).all():
        worst = int(np.flatnonzero(~(least < most))[0])
        raise OffrlError(
            f"{where}: action_low is {lower[worst]:g} and action_high {upper[worst]:g} in dimension {worst}; low must "
            "be below high (leave out a dimension that never changes)."
        )
    return {"action_low": tuple(lower.tolist()), "action_high": tuple(upper.tolist())}


def check_actions(actions: Tensor, info: DatasetInfo, options: ReadOptions, where: str) -> DatasetInfo:
    """Check actions against their bounds, clipping in place what may be clipped; returns `info` with the bounds used.

    What leaves the box by rounding (`ACTION_TOLERANCE`) is clipped: the simulator did so, and a squashed Gaussian has
    no density outside. The count of clipped numbers stays in `info.provenance`.
    """
    if info.discrete is not None:
        check_indices(actions.numpy(), info, where)
        return info
    width = actions.shape[1]
    if options.action_bound is not None:
        info = replace(info, action_low=-options.action_bound, action_high=options.action_bound)
    elif options.action_low is not None or options.action_high is not None:
        info = replace(info, **bounds(options.action_low, options.action_high, where, width))
    for bound in (info.action_low, info.action_high):
        if isinstance(bound, tuple) and len(bound) != width:
            raise OffrlError(
                f"{where}: the actions have {width} dimensions but their bounds {len(bound)}; they must agree."
            )
    low, high = (torch.tensor(bound, dtype=torch.float64) for bound in (info.action_low, info.action_high))
    lowest, highest = (extreme.double() for extreme in torch.aminmax(actions, dim=0))
    if bool((lowest >= low).all()) and bool((highest <= high).all()):
        return info
    tolerance = ACTION_TOLERANCE * torch.maximum(low.abs(), high.abs())
    excess = torch.maximum(low - lowest, highest - high)
    outside = (actions < low) | (actions > high)
    far = excess > tolerance
    if bool(far.any()) and not options.clip_actions and info.family not in CLIPPED_BY_SIMULATOR:
        raise _outside(actions, low.expand(width), high.expand(width), tolerance.expand(width), where)
    actions.clamp_(low.float(), high.float())
    return replace(info, provenance=info.provenance | {"clipped_actions": int(outside.sum())})


def _outside(actions: Tensor, low: Tensor, high: Tensor, tolerance: Tensor, where: str) -> OffrlError:
    row, column = ((actions < low - tolerance) | (actions > high + tolerance)).nonzero()[0].tolist()
    hint = ""
    if actions.shape[1] == 1 and bool((actions == actions.round()).all()) and bool((actions >= 0).all()):
        hint = "; store integers if they are class indices"
    return OffrlError(
        f"{where}: actions holds {float(actions[row, column]):.6g} in row {row}, column {column}, outside "
        f"[{float(low[column]):g}, {float(high[column]):g}]; give the true bound ({option('data.action_bound', 'B')}; arrays "
        f"action_low and action_high in the file for other boxes) or clip ({option('data.clip_actions', True)}){hint}."
    )
