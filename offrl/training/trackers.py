"""Optional mirrors of the logged metrics: TensorBoard and Weights & Biases.

The rows of `results.py` are what reports are made of; a tracker only shows a run while it goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from offrl.utils.errors import OffrlError


class Tracker(Protocol):
    """Shows scalars by step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show `values` at the given number of updates."""

    def close(self) -> None:
        """Write what is pending and let go."""


def by_lane(kind: str, values: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> dict[str, float]:
    """Scalars of metrics: each one's mean over lanes and, of several lanes, each lane's own."""
    shown = {}
    for name, lanes in values.items():
        shown[f"{kind}/{name}"] = float(np.mean(lanes))
        if len(lanes) > 1:
            own = enumerate(zip(seeds, lanes))
            shown |= {f"{kind}_lanes/{name}/lane{lane}_seed{seed}": float(value) for lane, (seed, value) in own}
    return shown


KINDS = ("none", "tensorboard", "wandb")


def check_tracker(kind: str | Sequence[str] | None) -> list[str]:
    """The kinds of tracker that `tracker=` asks for.

    Raises:
        OffrlError: an unknown kind, or a missing extra.
    """
    names = kind.split(",") if isinstance(kind, str) else kind or []
    for name in names:
        if name not in KINDS:
            raise OffrlError(f"tracker={name} is unknown: use none, tensorboard, wandb or a list of them.")
        if name != "none" and find_spec(name) is None:
            raise OffrlError(f'tracker={name} needs an extra: pip install ".[{name}]" in the checkout of offrl')
    return [name for name in names if name != "none"]


def make_tracker(
    kind: str | Sequence[str] | None,
    folder: Path | str,
    config: Mapping[str, Any],
    name: str,
    resume_step: int | None = None,
) -> Tracker:
    """A tracker by name.

    Args:
        kind: "tensorboard", "wandb", "none" (or None), or a list of them.
        folder: the run's folder; event files go to `tensorboard/` and `wandb/` in it.
        config: the run's resolved configuration, shown beside the curves.
        name: the run's name in the tracker. Weights & Biases also reads its own environment: `WANDB_MODE=offline`
            keeps everything on this machine, `WANDB_PROJECT` (else "offrl") and `WANDB_ENTITY` choose the place.
        resume_step: where a resumed run goes on; what was shown past it is hidden.

    Raises:
        OffrlError: an unknown kind, a missing extra, or a tracker that can't start.
    """
    trackers: list[Tracker] = []
    for wanted in check_tracker(kind):
        if wanted == "tensorboard":
            trackers.append(_TensorBoard(Path(folder), config, resume_step))
        else:
            trackers.append(_WeightsAndBiases(Path(folder), config, name, resume_step))
    return _Several(trackers)


class _Several:
    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


class _TensorBoard:
    def __init__(self, folder: Path, config: Mapping[str, Any], resume_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise OffrlError(
                'tracker=tensorboard needs an extra: pip install ".[tensorboard]" in the checkout of offrl'
            ) from error
        purge = None if resume_step is None else resume_step + 1
        try:
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        except OSError as error:
            raise OffrlError(f"{folder / 'tensorboard'} could not be written ({error.strerror}).") from error
        if resume_step is None:
            text = json.dumps(config, indent=2, default=str)
            self._writer.add_text("config", "    " + text.replace("\n", "\n    "), 0)  # indented: Markdown's code

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path, config: Mapping[str, Any], name: str, resume_step: int | None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise OffrlError('tracker=wandb needs an extra: pip install ".[wandb]" in the checkout of offrl') from error
        # The service refuses to go back in its own step counter, so the number of updates is a value of its own.
        identity = folder / "wandb" / "run_id"
        resuming = resume_step is not None and identity.is_file()
        try:
            identity.parent.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                dir=str(folder),
                config=dict(config),
                name=name,
                project=None if os.environ.get("WANDB_PROJECT") else "offrl",
                id=identity.read_text() if resuming else None,
                resume="allow" if resuming else None,
                settings=wandb.Settings(console="off", silent=True),
            )
            identity.write_text(self._run.id)
        except (wandb.errors.Error, OSError) as error:
            raise OffrlError(f"tracker=wandb could not start ({error}): set WANDB_MODE=offline or log in.") from error
        self._run.define_metric("updates")
        self._run.define_metric("*", step_metric="updates")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"updates": step, **{name: float(value) for name, value in values.items()}})

    def close(self) -> None:
        self._run.finish()
