"""Episodes as a list, and tables of pandas or polars, as a dataset."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from offrl.data.arrays import from_arrays
from offrl.data.checks import ReadOptions, as_array, check_dtype, flags
from offrl.data.columns import FLAGS
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.utils.errors import OffrlError

Columns = str | Sequence[str]
SINGLE = ("rewards", "terminals", "timeouts")  # arguments of `from_frame` that name one column


def from_episodes(
    episodes: Iterable[Mapping[str, Any]],
    info: DatasetInfo | None = None,
    options: ReadOptions | None = None,
    action_start: int = 0,
) -> OfflineDataset:
    """A dataset of episodes, each with arrays of its own.

    Args:
        episodes: each a dictionary with `observations` `[T + 1, ...]` (the last one is the state behind the last step;
            `[T, ...]` where it is not known), `actions` `[T, ...]` and `rewards` `[T]`. An episode ends by a termination
            where `terminals` (or `terminations`, `terminated`) says so, one flag or `[T]` with a 1 only at the last step;
            else it was cut, by a time limit for example. `timeouts` (or `truncations`, `truncated`) may stand beside them.
        info, options: as of `from_arrays`.
        action_start: number of the first discrete action, `start` of the environment's Discrete.

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
    return from_arrays(arrays | {"action_start": action_start}, info, options)


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
    episode: Columns | None = None,
    info: DatasetInfo | None = None,
    options: ReadOptions | None = None,
    action_start: int = 0,
) -> OfflineDataset:
    """A dataset of a pandas or polars frame with one row a step, the rows of an episode in order.

    Args:
        frame: `N` rows; each name below is that of a column `[N]` (`[N, ...]` where cells are arrays of one shape).
        observations, actions: columns of numbers, one for each dimension; one column of integers is a discrete action.
        rewards: one column of numbers `[N]`.
        terminals: one column of flags `[N]`, 1 where the task ended; None: it never does.
        timeouts: one column of flags `[N]`, 1 where a time limit or a log's end cut the episode.
        episode: one or several columns `[N]` that tell episodes apart, such as `["run", "episode"]`; where the value of
            any of them changes without a termination, the episode was cut.
        info, options: as of `from_arrays`.
        action_start: as of `from_episodes`.

    Raises:
        OffrlError: a column that the frame lacks, no name or several where one is needed, a column of dates, texts or
            other things than numbers, a row without a value of `episode`, rows of an episode that don't stand together,
            or what `from_arrays` refuses.
    """
    if hasattr(frame, "collect"):
        raise OffrlError("the frame is a lazy one, which holds no numbers yet; give frame.collect().")
    if not hasattr(frame, "columns"):
        raise OffrlError(f"frame is of type {type(frame).__name__}; give a frame of pandas or polars.")
    given = {"observations": observations, "actions": actions, "rewards": rewards}
    optional = {"terminals": terminals, "timeouts": timeouts, "episode": episode}
    given |= {key: value for key, value in optional.items() if value is not None}
    names = {key: _names(frame, key, value) for key, value in given.items()}
    arrays = {key: _numbers(frame, key, listed) for key, listed in names.items() if key != "episode"}
    arrays |= {key: arrays[key][:, 0] for key in SINGLE if key in arrays}
    arrays.setdefault("terminals", np.zeros(len(arrays["rewards"]), dtype=bool))
    if "episode" in names and len(arrays["rewards"]):
        arrays |= _marks(_last_rows(frame, names["episode"]), arrays)
    return from_arrays(arrays | {"action_start": np.asarray(action_start)}, info, options)


def _names(frame: Any, key: str, value: Any) -> list[str]:
    """The columns that an argument names, all of which the frame has."""
    try:
        names = [value] if isinstance(value, str) else list(value)
    except TypeError:
        names = [value]
    if not names:
        raise OffrlError(f"{key} names no column; give the name of a column of the frame.")
    if wrong := [type(name).__name__ for name in names if not isinstance(name, str)]:
        raise OffrlError(
            f"{key} holds a value of type {wrong[0]} as a column's name; give a name as text, or a list of names."
        )
    if key in SINGLE and len(names) > 1:
        raise OffrlError(f"{key} names {len(names)} columns ({', '.join(names[:20])}); give the name of one column.")
    known = [str(name) for name in frame.columns]
    if missing := [name for name in names if name not in known]:
        raise OffrlError(
            f"the frame has no column {missing[0]}, which {key}= names; it has {', '.join(known[:20])}"
            + (f" and {len(known) - 20} more." if len(known) > 20 else ".")
        )
    return names


def _numbers(frame: Any, key: str, names: list[str]) -> np.ndarray:
    """`[N, len(names), ...]`: columns of numbers side by side."""
    columns = [frame[name].to_numpy() for name in names]
    for name, column in zip(names, columns, strict=True):
        check_dtype(f"column {name} of {key}", column.dtype, "frame")
        if column.shape != columns[0].shape:
            raise OffrlError(f"{key}: columns {names[0]} and {name} have cells of different shapes; they must agree.")
    return np.stack(columns, axis=1)


def _last_rows(frame: Any, names: list[str]) -> np.ndarray:
    """`[N]` bool: rows behind which the value of one of these columns changes, and the last row."""
    columns = [_labels(frame, name) for name in names]
    last = np.append(np.any([column[1:] != column[:-1] for column in columns], axis=0), True)
    runs = int(last.sum())
    values = len(set(zip(*(column[last].tolist() for column in columns), strict=True)))
    # Rows that stand apart make most runs one row long; a counter that begins anew has long ones.
    if 2 * runs > len(last) and runs > 2 * values:
        change = f"{names[0]} changes" if len(names) == 1 else f"{' and '.join(names)} together change"
        raise OffrlError(
            f"the rows of an episode don't stand together: {change} {runs - 1} times between {values} values; "
            f"sort the frame by {', '.join(names)} and step."
        )
    return last


def _labels(frame: Any, name: str) -> np.ndarray:
    """`[N]`: the column of this name, one number, text, date or the like a row."""
    column = frame[name].to_numpy()
    objects = column.dtype.kind == "O"
    if column.ndim != 1 or (objects and not all(isinstance(value, Hashable) for value in column)):
        raise OffrlError(
            f"column {name}, which episode= names, holds more than one value a row; give a number or text."
        )
    empty = np.array([_is_missing(value) for value in column]) if objects else column != column
    if empty.any():
        raise OffrlError(
            f"column {name}, which episode= names, has no value in {int(empty.sum())} of {len(empty)} rows "
            f"(first: row {int(empty.argmax())}); fill in the episode of these rows, or leave them out."
        )
    return column


def _is_missing(value: Any) -> bool:
    """Whether this is None, or NaN or the like, which differs from itself."""
    try:
        return value is None or bool(value != value)
    except TypeError:  # pandas.NA is neither equal nor unequal to anything
        return True


def _marks(last: np.ndarray, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Flags `[N]` of the ends that the last rows of episodes `[N]` tell, beside those of the frame."""
    ended = arrays["terminals"] == 1
    cut = last & ~ended
    marks = {"timeouts": cut | (arrays["timeouts"] == 1) if "timeouts" in arrays else cut}
    if not (ended & ~last).any():  # else a termination ends an episode that goes on under its number
        marks["dones"] = last
    return marks
