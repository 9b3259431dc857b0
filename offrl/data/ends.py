"""Where episodes end: by the source's marks, by the successors that it stores, by a time limit.

Stored successors prove ends that no flag marks: within an episode the successor of a row is the next row's observation.
So a row whose successor differs from the next row is an episode's last, whatever the flags say; without a mark it was
cut by a limit or by the collector (a truncation). Conversely, where a limit ended an episode and the stored successor
*is* the next row, it is the reset observation that an auto-resetting environment returned, and the successor is unknown.

A time limit that is only known from outside (a catalogue) applies where neither flags nor successors tell of limits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offrl.data.checks import ReadOptions
from offrl.data.columns import Rows
from offrl.data.dataset import DatasetInfo
from offrl.utils.advice import option
from offrl.utils.errors import OffrlError

# Successors that were computed on another way may differ by rounding; this share of a column's largest number.
ROUNDING = 1e-6


@dataclass
class Ends:
    """Episodes of flat columns.

    Attributes:
        last: `[E]` last row of each episode.
        timeouts: `[N]` bool, ends that are no terminations.
        unknown: `[N]` bool, ends whose stored successor is not the episode's own.
        complete: whether the last episode is.
        notices: sentences on what was found beyond the flags.
    """

    last: np.ndarray
    timeouts: np.ndarray
    unknown: np.ndarray
    complete: bool
    notices: list[str]


def horizon_timeouts(terminals: np.ndarray, horizon: int, count_after_terminal: int = 0) -> np.ndarray:
    """`[N]` bool: rows at which a step counter, restarted at every end, reaches `horizon`.

    Args:
        count_after_terminal: value the counter restarts with after a termination; 1 repeats D4RL's off-by-one.
    """
    timeouts = np.zeros(len(terminals), dtype=bool)
    start = count = 0
    for end in np.append(np.flatnonzero(terminals), len(terminals) - 1):
        timeouts[start + horizon - 1 - count : end + 1 : horizon] = True
        count = 0 if timeouts[end] else count_after_terminal
        start = end + 1
    return timeouts


def find_ends(rows: Rows, info: DatasetInfo, options: ReadOptions, where: str) -> Ends:
    """Where the episodes of `rows` end.

    Raises:
        OffrlError: no row ends an episode (and `unfinished` does not allow it), or marks that contradict successors.
    """
    exact, terminals, n = options.semantics == "exact", rows.terminals, len(rows.terminals)
    successors = rows.next_observations if exact else None
    jumps = np.zeros(n, dtype=bool)
    if successors is not None:
        jumps[:-1] = _jumps(rows.observations, successors)
    timeouts = np.zeros(n, dtype=bool) if rows.timeouts is None else rows.timeouts.copy()
    limit = None if jumps.any() else info.max_episode_steps
    if rows.timeouts is None and limit and not (exact and info.family == "kitchen" and terminals.any()):
        timeouts = horizon_timeouts(terminals, limit, 0 if exact else 1)
    if rows.ends is not None:
        ends = rows.ends | timeouts
    elif info.family == "antmaze" and rows.timeouts is not None:
        ends = timeouts.copy()  # its terminals say "at the goal" while the trajectory goes on
    else:
        ends = terminals | timeouts

    notices, lost = [], jumps & ~ends
    if lost.any():
        notices.append(_lost(lost, ends, jumps, where))
        ends = ends | lost  # of truncations: `timeouts` counts without successors alone, where nothing is found lost
    if not ends.any() and not options.unfinished:
        raise _no_end(rows, info, where)
    unknown = np.zeros(n, dtype=bool) if rows.unknown is None else rows.unknown.copy()
    if successors is not None and not rows.checked:
        reset = _resets(rows.observations, successors, np.flatnonzero(ends[:-1] & ~terminals[:-1]))
        unknown[reset] = True
        if len(reset):
            notices.append(
                f"next_observations is the next episode's first observation at {len(reset):,} of the ends without a "
                f"termination (first: row {reset[0]}), so the successor is unknown there; these steps count in returns "
                "but are no transitions"
            )
        if resets := _steps_of_resets(rows, successors, ends):
            notices.append(
                f"each of the {resets:,} ends is followed by a step with reward 0 that begins in the state where the episode "
                "ended, as environments record it that reset in the step after an end (Gymnasium's vector environments): these "
                "steps count as transitions of the next episode; leave them out of the file"
            )
    complete, ends[-1] = bool(ends[-1]), True
    return Ends(np.flatnonzero(ends), timeouts, unknown, complete, notices)


def _jumps(observations: Tensor, successors: Tensor) -> np.ndarray:
    """`[N - 1]` bool: whether a row's successor differs from the next row, by more than rounding."""
    if len(observations) < 2 or observations.shape[1] == 0:
        return np.zeros(max(0, len(observations) - 1), dtype=bool)
    low, high = torch.aminmax(observations, dim=0)
    tolerance = ROUNDING * torch.maximum(low.abs(), high.abs())
    parts = []
    for after, successor in zip(observations[1:].split(65_536), successors[:-1].split(65_536)):
        different = (successor - after).abs_() > tolerance  # bounded blocks, so that no copy of the whole is held
        parts.append(different.any(1).numpy())
    return np.concatenate(parts)


def _resets(observations: Tensor, successors: Tensor, rows: np.ndarray) -> np.ndarray:
    """Those of `rows` whose successor is exactly the next row's observation, and not simply a state that stays."""
    index = torch.from_numpy(rows)
    after = observations[index + 1]
    same = (successors[index] == after).all(1) & (observations[index] != after).any(1)
    return rows[same.numpy()]


def _steps_of_resets(rows: Rows, successors: Tensor, ends: np.ndarray) -> int:
    """How many ends are followed by the step of a reset; 0 where one is not, or rewards of 0 are too common to tell."""
    last = torch.from_numpy(np.flatnonzero(ends[:-1]))
    behind, usual = rows.rewards[last + 1], (rows.rewards != 0).double().mean()
    if len(last) < 3 or usual < 0.5 or (behind != 0).any():
        return 0
    begins_there = (successors[last] == rows.observations[last + 1]).all(1)
    stays = (rows.observations[last] == successors[last]).all(1)  # of a made-up successor equality tells nothing
    return len(last) if bool(begins_there.all()) and not bool(stays.any()) else 0


def _lost(lost: np.ndarray, ends: np.ndarray, jumps: np.ndarray, where: str) -> str:
    """The sentence on ends that no flag marks; refused where the flags mark the wrong row instead."""
    found, first = int(lost.sum()), int(np.flatnonzero(lost)[0])
    if found > 1 and np.array_equal(ends[1:], jumps[:-1]):
        raise OffrlError(
            f"{where}: terminals and timeouts mark the row behind each end that next_observations shows (row "
            f"{first + 1} instead of {first}); mark the last row of an episode."
        )
    sentence = (
        f"no flag marks {found:,} of the episode ends that next_observations shows by differing from the next row "
        f"(first: row {first}); they are read as truncations"
    )
    if found > (len(lost) - int(ends.sum())) / 2:
        sentence += ". Most rows do not follow the row before, so returns and windows of this data mean little"
    return sentence


def _no_end(rows: Rows, info: DatasetInfo, where: str) -> OffrlError:
    if rows.timeouts is not None:
        reason = "terminals and timeouts are never 1"
    elif info.max_episode_steps is None:
        reason = "terminals are never 1, there are no timeouts and no time limit is known"
    else:
        limit = info.max_episode_steps
        reason = f"terminals are never 1 and its {len(rows.terminals)} rows do not reach the time limit of {limit}"
    return OffrlError(
        f"{where}: no episode ends ({reason}); mark the ends, or read it as one unfinished episode "
        f"({option('data.unfinished', True)})."
    )
