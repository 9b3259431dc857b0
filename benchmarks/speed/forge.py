"""Steps per second at which the forge builds datasets on one core: simulation, policy and writing together.

Time is the process's own CPU time, which is the time on the wall when nothing else wants the core.

    python benchmarks/speed/forge.py [--size 50000] [--sets hopper/medium-replay walker2d/medium ...]

The last column is what MuJoCo's own `mj_step` reaches on the same actions in a single environment: the floor.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from time import process_time

from rich.console import Console
from rich.table import Table

SETS = (
    *("hopper/random", "hopper/medium", "hopper/medium-replay", "hopper/expert"),
    *("walker2d/medium", "halfcheetah/medium", "pointmaze/umaze"),
)


def build(name: str, size: int) -> float:
    """Seconds to build a set from nothing, imports and the environment's first loading left out."""
    from offrl.forge import registry as forge

    forge.ensure(f"forge/{name}-v0", size=50, force=True, progress=False)
    start = process_time()
    forge.ensure(f"forge/{name}-v0", size=size, force=True, progress=False)
    return process_time() - start


def floor(name: str, size: int) -> float | None:
    """Steps per second of `mj_step` alone over the set's own actions."""
    import mujoco

    from offrl.data.minari import read_minari
    from offrl.forge import registry as forge
    from offrl.forge.rollout import Robots

    robot = name.split("/")[0]
    if robot not in forge.ROBOTS:
        return None
    env = Robots(forge.ROBOTS[robot].env_id, 1).env
    dataset = read_minari(forge.folder_of(f"forge/{name}-v0", size))
    spent, steps = 0.0, 0
    for start, stop in zip(dataset.offsets[:-1].tolist(), dataset.offsets[1:].tolist()):
        env.reset(seed=start)
        begin = process_time()
        for action in dataset.actions[start:stop].double().numpy():
            env.data.ctrl[:] = action
            mujoco.mj_step(env.model, env.data, env.frame_skip)
        spent, steps = spent + process_time() - begin, steps + stop - start
        if steps > 10_000:
            break
    return steps / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=50_000)
    parser.add_argument("--sets", nargs="+", default=SETS)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    table = Table("set", "steps/s", "mj_step alone", title=f"{arguments.size:,} steps on one core")
    with tempfile.TemporaryDirectory() as home:
        os.environ["OFFRL_HOME"] = home
        for name in arguments.sets:
            rate, alone = arguments.size / build(name, arguments.size), floor(name, arguments.size)
            table.add_row(name, f"{rate:,.0f}", "" if alone is None else f"{alone:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
