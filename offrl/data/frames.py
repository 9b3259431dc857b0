"""Episodes as a list, and tables of pandas or polars, as a dataset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from offrl.data.arrays import from_arrays
from offrl.data.checks import ReadOptions, as_array, flags
from offrl.data.columns import FLAGS
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.utils.errors import OffrlError

Columns = str | Sequence[str]


def from_episodes(
    episodes: Iterable[Mapping[str, Any]], info: DatasetInfo | None = None, options: ReadOptions | None = None
) -> OfflineDataset:
    """A dataset of episodes, each with arrays of its own.

    Args:
        episodes: each a dictionary with `observations` `[T + 1, ...]` (the last one is the state behind the last step;
            `[T, ...]` where it is not known), `actions` `[T, ...]` and `rewards` `[T]`. An episode ends by a termination
            where `terminals` (or `terminations`, `terminated`) says so, one flag or `[T]` with a 1 only at the last step;
            else it was cut, by a time limit for example. `timeouts` (or `truncations`, `truncated`) may stand beside them.
        info, options: as of `from_arrays`.

    Raises:
        OffrlError: a missing key, lengths that differ within an episode or widths between them, flags other than 0 and 1
            or that end an episode before its last step, `dones`, `masks` or the like, or bad numbers.
    """
    if isinstance(episodes, Mapping) or not isinstance(episodes, Iterable):
        raise OffrlError(f"episodes is of type {type(episodes).__name__}; give a list of dictionaries, one an episode.")
    parts = [_episode(number, episode) for number, episode in enumerate(episodes)]
    if not parts:
        raise OffrlError("episodes is empty; give at least one episode.")
    if len({"next_observations" in part for part in parts}) > 1:
        raise OffrlError("some episodes have observations of T + 1 states and some of T; give the same for all.")
    try:
        arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    except ValueError as error:
        shapes = {key: {part[key].shape[1:] for part in parts} for key in ("observations", "actions")}
        wrong = next((key for key, found in shapes.items() if len(found) > 1), "an array")
        raise OffrlError(f"{wrong} has rows of different shapes in different episodes; they must agree.") from error
    return from_arrays(arrays, info, options)


def _episode(number: int, episode: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The columns of one episode."""
    where = f"episode {number}"
    if not isinstance(episode, Mapping):
        raise OffrlError(
            f"{where} is of type {type(episode).__name__}; give a dictionary with observations, actions and rewards."
        )
    if missing := [key for key in ("observations", "actions", "rewards") if key not in episode]:
        raise OffrlError(
            f"{where}: missing {' and '.join(missing)}; each episode needs observations, actions and rewards."
        )
    _refuse_unread(episode, where)
    observations, actions, rewards = (
        as_array(key, episode[key], where) for key in ("observations", "actions", "rewards")
    )
    if not (observations.ndim and actions.ndim and rewards.ndim):
        raise OffrlError(
            f"{where}: observations, actions or rewards is a single value; give one row for each step of the episode."
        )
    steps = len(rewards)
    if steps == 0 or len(actions) != steps or len(observations) not in (steps, steps + 1):
        raise OffrlError(
            f"{where}: {len(observations)} observations, {len(actions)} actions and {steps} rewards don't fit together; "
            "T steps have T actions, T rewards and T + 1 observations (or T, where the last state is not known)."
        )
    ends = np.zeros(steps, dtype=bool)
    ends[-1] = True
    terminated = np.zeros(steps, dtype=bool)
    terminated[-1] = _flagged("terminals", episode, steps, where)
    _flagged("timeouts", episode, steps, where)  # an episode without a termination was cut, with or without a 1
    columns = {"actions": actions, "rewards": rewards, "terminals": terminated, "timeouts": ends & ~terminated}
    columns["dones"] = ends  # of a family whose terminations end no episode by themselves, too
    if len(observations) == steps:
        return {"observations": observations, **columns}
    return {"observations": observations[:-1], "next_observations": observations[1:], **columns}


def _refuse_unread(episode: Mapping[str, Any], where: str) -> None:
    """Refuse arrays that `from_arrays` reads and episodes have no place for, since what they tell would be lost."""
    advice = dict.fromkeys(
        FLAGS["dones"], "it may mix terminations with time limits: give terminals (1 at a termination)"
    )
    advice["masks"] = "give terminals = 1 - masks"
    advice["valids"] = "give observations of T + 1 states without it"
    advice["next_observations"] = "give observations of T + 1 states, the last one behind the last step"
    if key := next((name for name in advice if name in episode), None):
        raise OffrlError(f"{where}: {key} is not read in an episode; {advice[key]}, and leave {key} out.")


def _flagged(kind: str, episode: Mapping[str, Any], steps: int, where: str) -> bool:
    """Whether a flag of this kind, under any of its names, stands at the last of an episode's steps."""
    found: dict[str, bool] = {}
    for name in FLAGS[kind]:
        if name not in episode:
            continue
        array = flags(name, np.atleast_1d(as_array(name, episode[name], where)), where)
        if len(array) not in (1, steps):
            raise OffrlError(
                f"{where}: {name} has {len(array)} rows; give one flag, or one for each of its {steps} steps."
            )
        if early := np.flatnonzero(array[:-1]).tolist():
            raise OffrlError(
                f"{where}: {name} is 1 in row {early[0]}, before the last of {steps} steps; split the episode behind that row."
            )
        found[name] = bool(array[-1])
    if len(set(found.values())) > 1:
        raise OffrlError(f"{where}: {' and '.join(found)} mean the same but differ; remove one.")
    return any(found.values())


def from_frame(
    frame: Any,
    observations: Columns,
    actions: Columns,
    rewards: str = "reward",
    terminals: str | None = "terminal",
    timeouts: str | None = None,
    episode: str | None = None,
    info: DatasetInfo | None = None,
    options: ReadOptions | None = None,
) -> OfflineDataset:
    """A dataset of a pandas or polars frame with one row a step, the rows of an episode in order.

    Args:
        observations, actions: columns of numbers, one for each dimension; one column of integers is a discrete action.
        terminals: column of flags, 1 where the task ended; None: it never does.
        timeouts: column of flags, 1 where a time limit or a log's end cut the episode.
        episode: column that tells episodes apart; where its value changes without a termination, the episode was cut.
        info, options: as of `from_arrays`.

    Raises:
        OffrlError: a column that the frame lacks, or what `from_arrays` refuses.
    """
    if hasattr(frame, "collect"):
        raise OffrlError("the frame is a lazy one, which holds no numbers yet; give frame.collect().")
    if not hasattr(frame, "columns"):
        raise OffrlError(f"frame is of type {type(frame).__name__}; give a frame of pandas or polars.")
    names = [str(name) for name in frame.columns]
    lists = {"observations": observations, "actions": actions, "rewards": rewards, "terminals": terminals}
    lists |= {"timeouts": timeouts, "episode": episode}
    columns = {
        key: [value] if isinstance(value, str) else list(value) for key, value in lists.items() if value is not None
    }
    for key, listed in columns.items():
        if missing := [name for name in listed if name not in names]:
            raise OffrlError(
                f"the frame has no column {missing[0]}, which {key}= names; it has {', '.join(names[:20])}"
                + (f" and {len(names) - 20} more." if len(names) > 20 else ".")
            )

    def array(key: str) -> np.ndarray:
        return np.stack([frame[name].to_numpy() for name in columns[key]], axis=1)

    arrays = {key: array(key) for key in ("observations", "actions")} | {"rewards": array("rewards")[:, 0]}
    ended = array("terminals")[:, 0] if "terminals" in columns else np.zeros(len(frame), dtype=bool)
    arrays["terminals"] = ended
    if "timeouts" in columns:
        arrays["timeouts"] = array("timeouts")[:, 0]
    if "episode" in columns and len(frame):
        number = array("episode")[:, 0]
        last = np.append(number[1:] != number[:-1], True)
        runs, values = int(last.sum()), len(np.unique(number))
        if (
            2 * runs > len(number) and runs > 2 * values
        ):  # most are of one row; a counter that begins anew has long ones
            raise OffrlError(
                f"the rows of an episode don't stand together: {episode} changes {runs - 1} times between {values} values; "
                "sort the frame by episode and step."
            )
        cut = last & (np.asarray(ended) != 1)
        arrays["timeouts"] = cut | (np.asarray(arrays["timeouts"]) == 1) if "timeouts" in arrays else cut
        if not (
            (np.asarray(ended) == 1) & ~last
        ).any():  # else a termination ends an episode that goes on under its number
            arrays["dones"] = last
    return from_arrays(arrays, info, options)
