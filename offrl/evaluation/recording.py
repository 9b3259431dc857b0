"""Episodes of one policy in one environment, step by step: as a video, and as a Minari dataset.

The evaluator plays many environments at once and keeps only returns. This plays the same episodes (environment seed, float64)
and shows or keeps every step.
"""

from __future__ import annotations

import ctypes.util
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offrl.agents.base import Agent
from offrl.data.catalogue import TASK_OF
from offrl.data.dataset import FIRST_ACTION, DatasetInfo
from offrl.data.minari_write import Episode, write_minari
from offrl.data.partial import KEY, Partial, partial_of
from offrl.data.writers import space_of_actions
from offrl.datasets import load
from offrl.envs import make_env
from offrl.envs.chosen import adapted_task
from offrl.utils.errors import OffrlError, one_line
from offrl.utils.paths import replacing

FRAMES_PER_SECOND = 30  # of a video, about; simulators make up to 125 steps a second
GIF_WIDTH = 320  # pixels: a GIF is an order of magnitude larger than an MP4
SUFFIXES = (".mp4", ".gif")
CAMERA_OPTIONS = {"camera_id", "camera_name", "default_camera_config"}  # of Gymnasium's MuJoCo environments
SHOWN_BY = (KEY, "observation_keys", FIRST_ACTION)  # of provenance: how rows relate to the environment's own
Frame = NDArray[np.uint8]


@torch.no_grad()
def play(
    agent: Agent, env: Any, seeds: Iterable[int], look: Callable[[Any, int], None] = lambda env, step: None
) -> Iterator[Episode]:
    """One episode for each environment seed, as the evaluator plays them.

    A policy that samples its actions draws others here than in the evaluator, which plays episodes side by side.

    Args:
        agent: has one lane.
        env: as `make_env` gives it.
        look: called with the environment and the step, at the start (0) and after every step.
    """
    policy = agent.lane(0).to(torch.float64)
    for seed in seeds:
        observation, _ = env.reset(seed=seed)
        state = policy.initial_state(1)
        observations, actions, rewards = [np.asarray(observation)], [], []
        terminated = truncated = False
        look(env, 0)
        while not (terminated or truncated):
            seen = torch.as_tensor(np.asarray(observation, dtype=np.float64)).view(1, 1, -1).to(policy.spec.device)
            chosen = policy.select_action(seen, state)
            action = chosen[0, 0].cpu().numpy()
            observation, reward, terminated, truncated, _ = env.step(action if action.ndim else int(action))
            state = policy.update_state(state, chosen, torch.full_like(seen[..., 0], float(reward)))
            observations.append(np.asarray(observation))
            actions.append(action)
            rewards.append(float(reward))
            look(env, len(rewards))
        kind = np.float32 if actions[0].ndim else np.int64
        yield Episode(
            observations=np.stack(observations).astype(np.float32),
            actions=np.stack(actions).astype(kind),
            rewards=np.array(rewards, np.float32),
            terminated=bool(terminated),
            seed=seed,
        )


# ---- video ---------------------------------------------------------------------------------------------------------


def check_video(path: Path, info: DatasetInfo) -> None:
    """Raise OffrlError where no video can be written: an unknown suffix, a missing package, an environment without pictures.

    Without a display MuJoCo draws by EGL or OSMesa, which the variable MUJOCO_GL names; it is set here if nobody did.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise OffrlError(f"--video {path}: name a file that ends in .mp4 or .gif.")
    _encoder(path)
    choose_renderer()
    with closing(make_env(info)) as env:
        modes = env.metadata.get("render_modes") or []
    if "rgb_array" not in modes:
        raise OffrlError(
            f"--video {path}: {info.env_id} draws no pictures (it has no render mode rgb_array); leave it out."
        )


def choose_renderer() -> None:
    """Set MUJOCO_GL for a Linux without a display, if it isn't; MuJoCo reads it when it is imported.

    Raises:
        OffrlError: there is neither EGL nor OSMesa.
    """
    if os.environ.get("MUJOCO_GL") or not sys.platform.startswith("linux"):
        return
    found = [name for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")) if ctypes.util.find_library(library)]
    if found:
        os.environ["MUJOCO_GL"] = found[0]
    elif not os.environ.get("DISPLAY"):
        raise OffrlError(
            "--video: this machine has no display and neither EGL nor OSMesa, by which MuJoCo draws without one; install one "
            "of them (Debian and Ubuntu: apt-get install libegl1, or libosmesa6)."
        )


def _encoder(path: Path) -> Any:
    """The module that writes the file's format."""
    try:
        if path.suffix.lower() == ".gif":
            import PIL.Image

            return PIL.Image
        import imageio_ffmpeg

        return imageio_ffmpeg
    except ImportError as error:
        raise OffrlError(
            f"--video {path}: {path.suffix} needs a package ({error.name}); "
            'install it with `pip install ".[video]"` in the checkout of offrl.'
        ) from error


def film(
    agent: Agent,
    info: DatasetInfo,
    seeds: Iterable[int],
    path: Path,
    progress: Callable[[int], None] = lambda steps: None,
) -> list[Episode]:
    """Play episodes, write their pictures to `path` (one episode after another, whole or not at all), and return them.

    Args:
        agent: has one lane.
        progress: called with the number of steps so far; drawing without a graphics card takes some 0.1 s a picture.

    Raises:
        OffrlError: nothing can be drawn, or the file can't be written.
    """
    check_video(path, info)
    write = _write_gif if path.suffix.lower() == ".gif" else _write_mp4
    try:
        with closing(make_env(info, render=True)) as env, replacing(path) as temporary:
            follow_body(env)
            every = max(1, round(float(env.metadata.get("render_fps") or 30) / FRAMES_PER_SECOND))
            rate = float(env.metadata.get("render_fps") or 30) / every
            frames: list[Frame] = []
            episodes: list[Episode] = []
            sizes: set[tuple[int, ...]] = set()

            def look(env: Any, step: int) -> None:
                if step % every == 0:
                    frames.append(_frame(env, info))
                    sizes.add(frames[-1].shape)
                    if len(sizes) > 1:
                        raise OffrlError(
                            f"--video: the pictures of {info.env_id} change their size, and a film's have one."
                        )
                progress(sum(map(len, episodes)) + step)

            def pictures() -> Iterator[Frame]:
                """The pictures of an episode after it is played: one episode's are in memory at a time."""
                for episode in play(agent, env, seeds, look):
                    episodes.append(episode)
                    yield from frames
                    frames.clear()

            write(temporary, pictures(), rate)
    except OSError as error:
        raise OffrlError(
            f"--video {path}: can't be written ({error.strerror or one_line(error)}); choose another place."
        ) from error
    return episodes


def follow_body(env: Any) -> None:
    """Draw one of Gymnasium's robots by its model's camera `track`, which moves with the body, unless a camera was chosen.

    The camera that Gymnasium takes by itself stands still: a robot that walks leaves the picture.
    """
    robot = env.unwrapped
    if not type(robot).__module__.startswith("gymnasium.envs.mujoco.") or CAMERA_OPTIONS & robot.spec.kwargs.keys():
        return
    import mujoco

    camera = mujoco.mj_name2id(robot.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
    if camera >= 0:
        robot.mujoco_renderer.camera_id = camera


def _frame(env: Any, info: DatasetInfo) -> Frame:
    try:
        picture = env.render()
    except Exception as error:  # whatever an OpenGL library raises, or the user's own environment
        if "mujoco" not in sys.modules:
            reason = one_line(f"{type(error).__name__}: {error}")
            raise OffrlError(f"--video: render() of {info.env_id} failed ({reason}); leave --video out.") from error
        using = f" with MUJOCO_GL={os.environ['MUJOCO_GL']}" if "MUJOCO_GL" in os.environ else ""
        raise OffrlError(
            f"--video: {info.env_id} could not be drawn{using} ({one_line(error)}); set MUJOCO_GL=egl or MUJOCO_GL=osmesa, and "
            "install the library (Debian and Ubuntu: libegl1, libosmesa6)."
        ) from error
    if isinstance(picture, np.ndarray) and picture.dtype.kind in "iu" and picture.ndim == 3 and picture.shape[2] == 3:
        return picture.astype(np.uint8)
    found = f"{picture.dtype} {list(picture.shape)}" if isinstance(picture, np.ndarray) else type(picture).__name__
    raise OffrlError(
        f"--video: render() of {info.env_id} gave {found}, and a film needs an array uint8 [height, width, 3] "
        "where render_mode is rgb_array."
    )


def _write_mp4(path: Path, frames: Iterator[Frame], rate: float) -> None:
    first = next(frames)
    size = first.shape[1], first.shape[0]
    encoder = _encoder(path.with_suffix(".mp4")).write_frames(
        str(path), size, fps=rate, macro_block_size=2, output_params=["-f", "mp4"], ffmpeg_log_level="error"
    )
    encoder.send(None)
    for frame in itertools.chain([first], frames):
        encoder.send(np.ascontiguousarray(frame))
    encoder.close()


def _write_gif(path: Path, frames: Iterator[Frame], rate: float) -> None:
    image = _encoder(path.with_suffix(".gif"))

    def small(frame: Frame) -> Any:
        picture = image.fromarray(frame)
        picture.thumbnail((GIF_WIDTH, GIF_WIDTH))
        return picture

    first = small(next(frames))
    rest = (small(frame) for frame in frames)
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=round(1000 / rate), loop=0)


# ---- dataset -------------------------------------------------------------------------------------------------------


def check_record(folder: Path) -> None:
    """Raise OffrlError unless a new Minari dataset can stand in `folder`."""
    if not re.fullmatch(r"[\w-]+-v\d+", folder.name):
        raise OffrlError(
            f"--record {folder}: the name of a Minari dataset ends in -v0, -v1, ...; choose such a folder."
        )
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise OffrlError(f"--record {folder}: it exists already; name a new folder.")


def record(folder: Path, episodes: list[Episode], info: DatasetInfo, agent: Agent, description: str) -> None:
    """Write episodes as the Minari dataset `folder`, and read them back.

    Args:
        agent: the policy, of one lane.
    """
    check_record(folder)
    shown = {key: info.provenance[key] for key in SHOWN_BY if key in info.provenance}
    if task := adapted_task(info):
        shown[TASK_OF] = task
    provenance = {"policy": description, "recorded_on": info.id, **shown}
    own = replace(info, id=folder.name, source="offrl", provenance=provenance)
    write_minari(
        folder,
        episodes,
        own,
        folder.name,
        env_spec=_env_spec(info, agent),
        action_space=space_of_actions(info, agent.spec.action_dim),
        description=description,
    )
    again = load(folder)
    if (len(again), again.episodes) != (sum(map(len, episodes)), len(episodes)):
        raise OffrlError(f"--record {folder}: what was read back differs from what was written; remove it.")


def _env_spec(info: DatasetInfo, agent: Agent) -> str | None:
    """JSON of the environment's Gymnasium spec where its own observations are those of the dataset; None elsewhere, such as
    where observations are lost at random, and where the task is D4RL's own."""
    if partial_of(info) != Partial() or adapted_task(info):
        return None
    with closing(make_env(info)) as env:
        plain = env.unwrapped
        if plain.spec is None or getattr(plain.observation_space, "shape", None) != (agent.spec.obs_dim,):
            return None
        limit = env.spec.max_episode_steps if env.spec else None
        spec = replace(plain.spec, max_episode_steps=limit or plain.spec.max_episode_steps, additional_wrappers=())
        try:
            return str(spec.to_json())
        except (ValueError, TypeError):
            return None
