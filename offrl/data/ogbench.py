"""Reader of OGBench's files (Park et al. 2025, arXiv 2410.20092): trajectories, to which a task's rewards are added.

    observations [N, O], actions [N, A], terminals [N], qpos [N, Q], and of scene and puzzle button_states [N, B]

A file has one more row a trajectory than it has transitions: its last row (`terminals` 1) holds the last state only. That is
the end of a *trajectory* and never a termination. Reward and mask of a single task are computed from the simulator's state of
the same row:

    maze, soccer:  success = |xy - goal| <= tolerance;  reward = success - 1
    manipulation:  reward = (subgoals that are fulfilled) - (number of subgoals);  success = all are fulfilled
    mask = 1 - success

Trajectories go on behind a success, so that rows with mask 0 stand in the middle of episodes, which they don't end.
The package's two layouts in memory, once saved, are read as well: the compact one (`valids` 0 in a trajectory's last
row) and the regular one (`next_observations`).
"""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offrl.data.arrays import UNREADABLE, Arrays, NpzFile
from offrl.data.checks import ReadOptions, check_length, file_kind, flags, with_notices
from offrl.data.columns import read_rows, shortened
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.data.episodes import to_store
from offrl.data.ogbench_names import FAMILY, Name, Task, environments
from offrl.data.schema import from_json
from offrl.utils.errors import OffrlError

REQUIRED = ("observations", "actions", "terminals")
REACH = 0.04  # metres: distance of a cube, the drawer or the window from its goal that counts as reached
ARM = 14  # numbers of qpos that are the arm's and the gripper's; cubes of 7 each follow
BALL = 15  # number of qpos at which antsoccer's ball begins
BLOCK = 65_536  # rows at a time, which bounds the float64 copies


def holds_trajectories(path: Path) -> bool:
    """Whether an NPZ file is OGBench's: trajectories with the simulator's state and without rewards."""
    if file_kind(path) != "npz":
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            keys = {name.removesuffix(".npy") for name in archive.namelist()}
    except UNREADABLE:
        return False  # the reader of other files says what is wrong
    return "rewards" not in keys and keys.issuperset({*REQUIRED, "qpos"})


def check_trajectories(path: Path) -> None:
    """Read every array of a file once, so that each proves its own checksum.

    Raises:
        OffrlError: no NPZ file, cut off, or without what every file of OGBench has.
    """
    with open(path, "rb") as content:
        head = content.read(16)
    if not head.startswith(b"PK"):
        raise OffrlError(f"{path}: this is no NPZ file (it begins with {head!r}); fetch it from another place.")
    try:
        with zipfile.ZipFile(path) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist()]
            damaged = archive.testzip()
    except UNREADABLE as error:
        raise OffrlError(f"{path}: the file is cut off or damaged ({error}); fetch it again.") from error
    if damaged:
        raise OffrlError(f"{path}: {damaged} is damaged; fetch it again.")
    if missing := [key for key in (*REQUIRED, "qpos") if key not in keys]:
        raise OffrlError(f"{path}: missing {' and '.join(missing)}; fetch it from another place.")


def read_ogbench(path: Path, name: Name, options: ReadOptions | None = None) -> OfflineDataset:
    """The transitions of a file with the rewards and masks of the task `name.task`.

    Raises:
        OffrlError: a damaged file, one without the simulator's state, one of another environment.
    """
    options = options or ReadOptions()
    if options.semantics != "exact":
        raise OffrlError(f"{name.id}: semantics={options.semantics} is for D4RL's files; leave it out.")
    if file_kind(path) != "npz":
        raise OffrlError(f"{path}: this is no NPZ file; fetch or build it again.")
    info = DatasetInfo(id=name.id, source=str(path), family=FAMILY)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = _with_task(NpzFile(file, path), name, str(path))
            made_by = from_json(str(file["made_by"]), f"{path}: made_by") if "made_by" in file.files else {}
    except UNREADABLE as error:
        raise OffrlError(f"{path}: the file is cut off or damaged ({error}); fetch or build it again.") from error
    if isinstance(made_by, dict):
        info = replace(info, provenance=made_by)
    rows, info = read_rows(Arrays(arrays, str(path), copy=False), info)
    dataset = to_store(rows, info, options, str(path))
    return dataset.with_info(**_known(dataset, name))


def _known(dataset: OfflineDataset, name: Name) -> dict[str, Any]:
    """Fields of `info` that only hold once episodes are cut: the limit is that of evaluations and not of trajectories."""
    successes = int((dataset.terminations > 0).sum())
    info = dataset.info
    if not successes:
        info = with_notices(info, [f"no row is a success of task {name.task}, so a policy has to piece one together"])
    provenance = info.provenance | {"task": name.task, "success_rows": successes}
    return {
        "env_id": name.env_id,
        "max_episode_steps": environments()[name.environment].limit,
        "provenance": provenance,
    }


def _with_task(source: NpzFile, name: Name, where: str) -> dict[str, NDArray[Any]]:
    """Columns as `offrl.data.columns` has them: `terminals` (ends of trajectories), `valids`, rewards and masks."""
    keys = source.keys()
    if missing := [key for key in REQUIRED if key not in keys]:
        raise OffrlError(f"{where}: missing {' and '.join(missing)} (its keys: {shortened(keys)}); fetch it again.")
    _check_widths(source, keys, name, where)
    ends = flags("terminals", source.array("terminals"), where)
    arrays = {"observations": source.array("observations"), "actions": source.array("actions")}
    if "next_observations" in keys:
        arrays["next_observations"] = source.array("next_observations")
    else:
        state_only = ~flags("valids", source.array("valids"), where) if "valids" in keys else ends
        arrays["valids"] = ~state_only
        ends = state_only | np.append(state_only[1:], False)
    rewards, masks = relabel(source.array("qpos"), _buttons(source, keys), name)
    return arrays | {"terminals": ends, "rewards": rewards, "masks": masks}


def _buttons(source: NpzFile, keys: list[str]) -> NDArray[Any] | None:
    return source.array("button_states") if "button_states" in keys else None


def _check_widths(source: NpzFile, keys: list[str], name: Name, where: str) -> None:
    """Raise OffrlError for a file of another environment, or one without the simulator's state."""
    known = environments()[name.environment]
    wanted = {"observations": known.observation, "actions": known.action, "qpos": known.qpos}
    if name.goal.buttons is not None:
        wanted["button_states"] = len(name.goal.buttons)
    if missing := [key for key in wanted if key not in keys]:
        raise OffrlError(
            f"{where}: it lacks {' and '.join(missing)}, from which the rewards of a single task are computed; fetch the "
            "published file again."
        )
    for key, width in wanted.items():
        shape, _ = source.described(key)
        if len(shape) != 2 or shape[1] != width:
            raise OffrlError(
                f"{where}: {key} has shape {shape}, but {name.environment} has {width} columns; it is another environment's "
                "file."
            )
        check_length(key, shape[0], source.described("observations")[0][0], where)


# ---- rewards of a task -------------------------------------------------------------------------------------------


def relabel(
    qpos: NDArray[Any], buttons: NDArray[Any] | None, name: Name
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Rewards `[N]` and masks `[N]` of the task, of simulator states `[N, Q]` and button states `[N, B]`."""
    rewards, masks = np.empty(len(qpos), np.float32), np.empty(len(qpos), np.bool_)
    for start in range(0, len(qpos), BLOCK):
        rows = slice(start, start + BLOCK)
        reached = subgoals(qpos[rows], None if buttons is None else buttons[rows], name)
        rewards[rows] = reached.sum(1) - reached.shape[1]
        masks[rows] = ~reached.all(1)
    return rewards, masks


def subgoals(qpos: NDArray[Any], buttons: NDArray[Any] | None, name: Name) -> NDArray[np.bool_]:
    """`[N, subgoals]`: whether each subgoal is fulfilled: cubes, buttons, drawer, window, in this order, or the place."""
    goal, known = name.goal, environments()[name.environment]
    if goal.xy is not None:
        first = BALL if name.environment.startswith("antsoccer") else 0
        distance = np.linalg.norm(qpos[:, first : first + 2] - np.array(goal.xy), axis=-1)
        return (distance <= known.tolerance)[:, None]
    return np.concatenate(list(_manipulation(qpos, buttons, goal)), axis=1)


def _manipulation(qpos: NDArray[Any], buttons: NDArray[Any] | None, goal: Task) -> list[NDArray[np.bool_]]:
    """`qpos` is 14 numbers of the arm, 7 a cube, one a button, drawer, window."""
    reached = []
    if goal.cubes is not None:
        cubes = qpos[:, ARM : ARM + 7 * len(goal.cubes)].reshape(len(qpos), -1, 7)[:, :, :3]
        reached.append(np.linalg.norm(np.array(goal.cubes) - cubes, axis=-1) <= REACH)
    if goal.buttons is not None:
        assert buttons is not None
        reached.append(buttons == np.array(goal.buttons))
    if goal.drawer is not None and goal.window is not None:
        joints = qpos[:, -2:]  # drawer and window are the last two
        reached.append(np.abs(joints - np.array([goal.drawer, goal.window])) <= REACH)
    return reached


def with_success_timing(dataset: OfflineDataset, timing: str) -> OfflineDataset:
    """The dataset whose environment looks at the state before a step (`pre`, as the data) or behind it (`post`).

    `post` is what `ogbench` had before 1.2, and with it the first published tables. The data are the same.
    """
    kwargs = {} if timing == "pre" else {"success_timing": timing}
    return dataset if dataset.info.env_kwargs == kwargs else dataset.with_info(env_kwargs=kwargs)
