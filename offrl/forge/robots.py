"""Hopper, Walker2d and HalfCheetah: behaviour policies of each level, and D4RL's reference returns.

`random` takes uniform actions; `medium` and `expert` are our own SAC policies with their own exploration noise;
`medium-expert` is half and half; `medium-replay` replays the training up to `medium`, its `-v1` (Hopper and Walker2d)
up to a later policy. Mixtures (`random-expert-0.1`) hold a small share of good trajectories among random ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from offrl.forge.rollout import behavior_levels

REPLAY_WARMUP = 5_000  # steps of uniform actions with which the policies' training began
SHARES = ("0.01", "0.05", "0.1", "0.5")


@dataclass(frozen=True)
class Robot:
    """A robot: environment, levels (training steps) of its medium and expert policies, D4RL's reference returns.

    `replay` is the level at which `medium-replay-v1` ends; None where `-v0` has the spread of D4RL's returns.
    """

    env_id: str
    medium: int
    expert: int
    ref_min: float
    ref_max: float
    replay: int | None = None
    note: str = ""


ROBOTS = {
    "hopper": Robot("Hopper-v5", 180_000, 360_000, -20.272305, 3234.3, replay=260_000),
    "walker2d": Robot("Walker2d-v5", 200_000, 360_000, 1.629008, 4592.3, replay=260_000),
    "halfcheetah": Robot(
        *("HalfCheetah-v5", 160_000, 280_000, -280.178953, 12135.0),
        note="The expert reaches about 6,900 (a score of 59), far below D4RL's reference of 12,135.",
    ),
}
LEVELS = ("random", "medium", "expert", "medium-expert", "medium-replay")
REPLAY_V1 = "medium-replay-v1"
MIXTURES = tuple(f"random-{good}-{share}" for good in ("medium", "expert") for share in SHARES)


def segments(robot: str, level: str, size: int) -> list[tuple[int | None, int]]:
    """Which policies play how many transitions, in order: pairs (level, transitions), level None for uniform actions.

    `medium-replay` stretches the training up to the medium policy (`medium-replay-v1`: up to `Robot.replay`) over `size`
    transitions: the first 5,000 training steps are uniform actions, every later one is played by the first policy kept
    at or after it.
    """
    spec = ROBOTS[robot]
    single = {"random": None, "medium": spec.medium, "expert": spec.expert}
    if level in single:
        return [(single[level], size)]
    if level == "medium-expert":
        steps: list[int | None] = [spec.medium, spec.expert]
        ends = [size // 2, size]
    else:
        last = spec.replay if level == REPLAY_V1 and spec.replay else spec.medium
        ladder = [step for step in behavior_levels(robot) if step <= last]
        steps, ends = [None, *ladder], [round(end * size / last) for end in (REPLAY_WARMUP, *ladder)]
    return [(step, end - start) for step, start, end in zip(steps, [0, *ends], ends) if end > start]
