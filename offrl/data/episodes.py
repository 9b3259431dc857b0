"""From the flat columns of D4RL's layout to a dataset: where episodes end and which rows are transitions.

`exact` (default)
    A stored `next_observations` is used, and every row kept whose successor is its episode's own. Without it the
    successor is the next row of the same episode; the last row of an episode that ended by a time limit, or that the
    file cuts off, has no known successor and becomes the episode's tail (its reward counts in returns, its action is
    the a' of the row before). A row that terminates stays, with its own observation as successor, which the mask hides.
`d4rl`
    The rows of D4RL's `qlearning_dataset`, number for number: stored successors are ignored, a terminating row's
    successor is the next episode's first observation, rows with a timeout and the last row of the file are left out
    (here they become tails), and without `timeouts` the horizon's counter starts at 1 after a termination, so that
    it cuts one step early.

Successors that are made up this way are noted in `info.provenance` (`OfflineDataset.known_successors`), so that no model of the
environment learns them.

In both, a termination is what the file calls `terminals` (`offrl.data.columns` has the other names), also where the same
row is a timeout; a time limit alone never is one. Episodes end at either (`offrl.data.ends`), except where a family's
files mean something else: AntMaze's terminals say "at the goal" while the trajectory goes on, so that only timeouts end
it; Kitchen has no timeouts and marks the end of every demonstration by a terminal, so that its horizon (which
demonstrations exceed) is not applied in `exact`. An episode left without a transition disappears.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from offrl.data.actions import check_actions, looks_discrete
from offrl.data.checks import ReadOptions, check_finite, empty, with_notices
from offrl.data.columns import Rows
from offrl.data.dataset import MADE_UP, DatasetInfo, OfflineDataset
from offrl.data.ends import find_ends
from offrl.utils.errors import OffrlError


def _remove(arrays: list[np.ndarray], removed: np.ndarray) -> int:
    """Close the gaps that the rows `removed` leave, in place, and return how many rows are left."""
    length = len(arrays[0])
    stops = np.append(removed[1:], length)
    position = int(removed[0])
    for start, stop in zip(removed + 1, stops):
        for array in arrays:
            array[position : position + stop - start] = array[start:stop]
        position += int(stop - start)
    return position


def to_store(rows: Rows, info: DatasetInfo, options: ReadOptions, where: str) -> OfflineDataset:
    """Check the columns, split them into episodes and build the dataset.

    Args:
        rows: the columns, overwritten when rows have to leave.
        where: file or dataset that an error names.

    Raises:
        OffrlError: NaN or infinity, actions out of bounds, no episode end, no transition.
    """
    if len(rows.rewards) == 0:
        raise OffrlError(
            f"{where}: it holds no transition (observations has 0 rows); check that the file is the right one."
        )
    for key in ("observations", "actions", "rewards", "next_observations"):
        tensor = getattr(rows, key)
        if tensor is not None and tensor.is_floating_point():
            check_finite(key, tensor, where)
    info = check_actions(rows.actions, info, options, where)

    exact = options.semantics == "exact"
    found = find_ends(rows, info, options, where)
    notice = looks_discrete(rows.actions) if rows.actions.is_floating_point() else None
    info = with_notices(info, [*found.notices, *([notice] if notice else [])])
    ends = found.last
    starts = np.append(0, ends[:-1] + 1)
    terminated = rows.terminals[ends]
    stored = exact and rows.next_observations is not None
    if stored:
        tail = found.unknown[ends]
    elif exact:
        tail = ~terminated
    else:
        tail = found.timeouts[ends]
        tail[-1] = True

    if stored and rows.next_observations is not None:
        successors = rows.next_observations
    else:
        rows.next_observations = None  # frees what `d4rl` ignores before the shifted copy is made
        successors = empty(*rows.observations.shape)
        successors[:-1] = rows.observations[1:]
        successors[-1] = rows.observations[-1]
        if exact:
            own = torch.from_numpy(ends[terminated])
            successors[own] = rows.observations[own]

    last, has_tail = torch.from_numpy(ends), torch.from_numpy(tail)
    tail_rewards = torch.where(has_tail, rows.rewards[last], 0.0)
    mask = has_tail if rows.actions.ndim == 1 else has_tail[:, None]
    tail_actions = torch.where(mask, rows.actions[last], 0)
    lengths = ends - starts + 1 - tail
    alive = lengths > 0
    if not alive.any():
        raise OffrlError(f"{where}: no row has a known successor, so there is no transition; check its episode ends.")

    rows_in_file, n = len(rows.rewards), len(rows.rewards)
    if tail.any():
        tensors = (rows.observations, rows.actions, rows.rewards, successors)
        n = _remove([tensor.numpy() for tensor in tensors] + [rows.terminals], ends[tail])
    keep = torch.from_numpy(alive)
    finished = torch.ones(len(ends), dtype=torch.bool)
    finished[-1] = found.complete
    if not stored and bool((terminated & ~tail).any()):
        info = replace(info, provenance=info.provenance | {MADE_UP: True})
    counts = {
        "semantics": options.semantics,
        "rows_in_file": rows_in_file,
        "episodes_without_transition": int((~alive).sum()),
    }
    return OfflineDataset(
        observations=rows.observations[:n],
        actions=rows.actions[:n],
        rewards=rows.rewards[:n],
        next_observations=successors[:n],
        terminations=torch.from_numpy(rows.terminals[:n]).float(),
        offsets=torch.from_numpy(np.append(0, np.cumsum(lengths[alive]))),
        info=replace(info, provenance=info.provenance | counts),
        complete=finished[keep],
        tail_rewards=tail_rewards[keep],
        tail_actions=tail_actions[keep],
        has_tail=has_tail[keep],
    )
