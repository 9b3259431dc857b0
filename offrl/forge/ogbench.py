"""OGBench's data made here: `forge/ogbench/cube-single-play-v0` and others, by the rules of its generators.

Park et al. 2025, arXiv 2410.20092, appendix on datasets; the environments and the scripted oracles are those of the package
`ogbench`. Trajectories have 1,000 transitions (`stitch` 200), and the files have the published form, but other names: a set of
another size, or made by another version of MuJoCo, is another set.

Each trajectory has seeds of its own (the published generators are not seeded). So a build that was killed goes on behind the
pieces that it had written, and ends with the same bytes.

    navigate  from a random cell to random cells that are no straight corridor, one after another
    stitch    from a random cell to one that is four moves away
    play      an oracle follows a noisy plan for a random target, then for the next
    noisy     an oracle reacts to the state, with noise and random actions
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offrl.envs.generators import global_generator, seeded
from offrl.envs.registered import make_gymnasium
from offrl.utils.errors import OffrlError
from offrl.utils.paths import replacing

SETS = (
    *("pointmaze-medium-navigate", "pointmaze-medium-stitch", "cube-single-play", "cube-single-noisy"),
    *("scene-play", "puzzle-3x3-play"),
)
PREFIX = "ogbench/"
PIECE = 10  # trajectories between two writes to the disk
WALK_NOISE = 0.5  # std on the unit vector to the next cell
REACH = 4  # moves between start and goal of a `stitch` trajectory
NOISY_LEVEL = 0.1  # largest std of a `noisy` trajectory's actions
NOISY_SCALE = np.array([1.0, 1.0, 1.0, 3.0, 10.0])  # of that std: position, yaw, gripper
RANDOM_ACTION = 0.1  # probability in `noisy`
MOVES = ((-1, 0), (0, -1), (1, 0), (0, 1))

Columns = dict[str, Any]  # arrays by key
Cell = tuple[int, int]


def names() -> list[str]:
    """Subject and level of the sets that can be built."""
    return [f"{PREFIX}{name}" for name in SETS]


def build_file(
    path: Path, name: str, size: int, seed: int, made_by: dict[str, Any], advance: Callable[[int], None]
) -> None:
    """Write the set of `size` transitions, in OGBench's form, with `made_by` (JSON) beside the arrays.

    Args:
        name: one of `SETS`.
        advance: called with the number of transitions that are done.

    Raises:
        OffrlError: the package is not installed, or the file cannot be written.
    """
    length = 200 if name.endswith("stitch") else 1000
    lengths = [min(length, size - start) for start in range(0, size, length)]
    folder = path.with_name(f".{path.name}.pieces")
    pieces = [folder / f"{first:06d}.npz" for first in range(0, len(lengths), PIECE)]
    record = _recorder(name)
    try:
        for first, piece in zip(range(0, len(lengths), PIECE), pieces):
            if piece.is_file():
                continue
            trajectories = []
            for number in range(first, min(first + PIECE, len(lengths))):
                seeds = np.random.SeedSequence([zlib.crc32(name.encode()), seed, number])
                trajectories.append(record(lengths[number], seeds))
                advance(min(size, (number + 1) * length))
            with replacing(piece) as temporary, open(temporary, "wb") as file:
                np.savez(file, **_joined(trajectories))
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(
                file, **_joined([_read(piece) for piece in pieces]), made_by=np.array(json.dumps(made_by))
            )
    except OSError as error:
        reason = error.strerror or error
        raise OffrlError(f"{path} cannot be written ({reason}); free space or set OFFRL_HOME elsewhere.") from error
    shutil.rmtree(folder, ignore_errors=True)


def _read(piece: Path) -> Columns:
    with np.load(piece, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def _joined(parts: list[Columns]) -> Columns:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _recorder(name: str) -> Callable[[int, np.random.SeedSequence], Columns]:
    """The function that records a trajectory of some transitions from its seeds."""
    environment, _, kind = name.rpartition("-")
    if environment.startswith("pointmaze"):
        walker = Walker(environment, kind)
        return lambda steps, seeds: _recorded(walker, steps, seeds)
    arm = Arm(environment, kind)

    def record(steps: int, seeds: np.random.SeedSequence) -> Columns:
        while True:
            rows = _recorded(arm, steps, seeds)
            if environment != "scene" or _in_sight(rows["qpos"]):
                return rows
            (seeds,) = seeds.spawn(1)

    return record


def _recorded(actor: Walker | Arm, steps: int, seeds: np.random.SeedSequence) -> Columns:
    """`steps + 1` rows: the last one holds the last state, with an action whose outcome is not recorded."""
    reset_seed, global_seed = (int(number) for number in seeds.generate_state(2))
    rows: dict[str, list[Any]] = {key: [] for key in ("observations", "actions", "qpos", "qvel", "button_states")}
    with global_generator(seeded(global_seed)):
        observation = actor.reset(reset_seed % 2**31, np.random.default_rng(seeds))
        for _ in range(steps + 1):
            action = np.clip(actor.act(), -1.0, 1.0)
            rows["observations"].append(observation)
            rows["actions"].append(action)
            observation, info = actor.step(action)
            for key in ("qpos", "qvel", "button_states"):
                if f"prev_{key}" in info:
                    rows[key].append(info[f"prev_{key}"])
    columns = {key: np.array(values, np.float32) for key, values in rows.items() if values}
    if "button_states" in columns:
        columns["button_states"] = columns["button_states"].astype(np.int64)
    return columns | {"terminals": np.arange(steps + 1) == steps}


def _in_sight(qpos: NDArray[np.float32]) -> bool:
    """Whether the cube of scene stays where a camera sees it: not too far right, nor too far left outside the drawer."""
    y, z = qpos[:, 15], qpos[:, 16]
    in_drawer = (z >= 0.06) & (z <= 0.08)
    return not bool(((y >= 0.29) | ((y <= -0.3) & ~in_drawer)).any())


# ---- mazes -------------------------------------------------------------------------------------------------------


class Walker:
    """The point mass on its way from cell to cell; the wanted direction is disturbed before the action is clipped."""

    def __init__(self, environment: str, kind: str, noise: float = WALK_NOISE) -> None:
        env: Any = make_gymnasium(f"{environment}-v0", terminate_at_goal=False).unwrapped
        self.env = env
        self.free = {(int(i), int(j)) for i, j in np.argwhere(env.maze_map == 0)}
        self.cells = sorted(self.free)
        self.corners = [cell for cell in self.cells if not self._corridor(cell)]
        self.kind, self.noise = kind, noise

    def _corridor(self, cell: Cell) -> bool:
        """Whether the only free neighbours are the two on opposite sides."""
        up, left, down, right = ((cell[0] + i, cell[1] + j) in self.free for i, j in MOVES)
        return (up, down, left, right) in ((True, True, False, False), (False, False, True, True))

    def reset(self, seed: int, rng: np.random.Generator) -> Any:
        self.rng = rng
        start = self._any(self.cells)
        goal = self._any(self.corners if self.kind == "navigate" else self.away(start) or [start])
        observation, _ = self.env.reset(seed=seed, options={"task_info": {"init_ij": start, "goal_ij": goal}})
        return observation

    def _any(self, cells: list[Cell]) -> Cell:
        return cells[self.rng.integers(len(cells))]

    def away(self, start: Cell) -> list[Cell]:
        """Cells at a distance of `REACH` moves."""
        distance, queue = {start: 0}, deque([start])
        while queue:
            i, j = queue.popleft()
            for neighbour in ((i + di, j + dj) for di, dj in MOVES):
                if neighbour in self.free and neighbour not in distance:
                    distance[neighbour] = distance[i, j] + 1
                    queue.append(neighbour)
        return sorted(cell for cell, moves in distance.items() if moves == REACH)

    def act(self) -> Any:
        here = self.env.get_xy()
        way = self.env.get_oracle_subgoal(here, self.env.cur_goal_xy)[0] - here
        return way / (np.linalg.norm(way) + 1e-6) + self.noise * self.rng.standard_normal(2)

    def step(self, action: Any) -> tuple[Any, dict[str, Any]]:
        observation, _, _, _, info = self.env.step(action)
        if info["success"] and self.kind == "navigate":
            self.env.set_goal(goal_xy=self.env.add_noise(self.env.ij_to_xy(self._any(self.corners))))
        return observation, info


# ---- robot arm ---------------------------------------------------------------------------------------------------


class Arm:
    """The arm under the package's oracles, one for each kind of target; they draw from numpy's global generator."""

    def __init__(self, environment: str, kind: str) -> None:
        env = make_gymnasium(f"{environment}-v0", terminate_at_goal=False, mode="data_collection")
        self.env: Any = env.unwrapped
        self.oracles, self.noisy = _oracles(env, environment, kind), kind == "noisy"
        # Of a single cube nothing can be stacked; the other environments don't look at it, or have one cube.
        self.targets = {"p_stack": 0.0} if environment == "cube-single" else {}

    def reset(self, seed: int, rng: np.random.Generator) -> Any:
        self.rng = rng
        self.level = rng.uniform(0.0, NOISY_LEVEL)
        self.observation, self.info = self.env.reset(seed=seed)
        self._begin(self.observation, self.info)
        return self.observation

    def _begin(self, observation: Any, info: dict[str, Any]) -> None:
        self.oracle = self.oracles[info["privileged/target_task"]]
        self.oracle.reset(observation, info)

    def act(self) -> Any:
        if self.noisy and self.rng.uniform() < RANDOM_ACTION:
            return self.rng.uniform(-1.0, 1.0, 5)
        action = np.array(self.oracle.select_action(self.observation, self.info))
        return action + self.level * NOISY_SCALE * self.rng.standard_normal(5) if self.noisy else action

    def step(self, action: Any) -> tuple[Any, dict[str, Any]]:
        self.observation, _, _, _, self.info = self.env.step(action)
        if self.oracle.done:
            self._begin(*self.env.set_new_target(**self.targets))
        return self.observation, self.info


def _oracles(env: Any, environment: str, kind: str) -> dict[str, Any]:
    """The oracle of each kind of target."""
    from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
    from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
    from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
    from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

    if kind == "noisy":
        return {"cube": CubeMarkovOracle(env=env)}
    if environment.startswith("puzzle"):
        return {"button": ButtonPlanOracle(env=env, gripper_always_closed=True)}
    plans = {"cube": CubePlanOracle, "button": ButtonPlanOracle, "drawer": DrawerPlanOracle, "window": WindowPlanOracle}
    return {target: plan(env=env) for target, plan in plans.items()}
