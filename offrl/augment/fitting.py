"""Models that are fitted to a dataset once and cached; an interrupted fit is resumed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from offrl.data.dataset import OfflineDataset
from offrl.nets import kernels
from offrl.nets.take import Take
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError
from offrl.utils.paths import cache_dir, one_at_a_time
from offrl.utils.progress import Bar
from offrl.utils.random import LaneRandom

SAVE_EVERY = 500  # updates between checkpoints of a fit


class Drawn(SimpleNamespace):
    """What one update learns from: tensors by name."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Drawn:
        return Drawn(**{name: function(tensor) for name, tensor in vars(self).items()})


class FitLoop:
    """The loop of updates that fits a model. On a CPU an update is played from a tape, which gives the same numbers sooner.

    Attributes:
        step, updates: number of updates made, and in total.
        random: random numbers of the updates.
    """

    step: int = 0
    updates: int
    random: LaneRandom
    take: Take | None = None  # the update on tape
    warm: bool = False  # whether an update was made: the first one makes what later ones find

    def draw(self) -> Drawn:
        """What update number `step` learns from."""
        raise NotImplementedError

    def learn(self, drawn: Drawn) -> Tensor:
        """Make an update from these numbers, without a branch on a value; returns its loss."""
        raise NotImplementedError

    def settle(self) -> None:
        """What follows an update."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that updates change, except `step`."""
        raise NotImplementedError

    def update(self) -> Tensor:
        """Make update number `step`; returns its loss."""
        drawn = self.draw()
        if not self.warm or self.random.step.device.type != "cpu":
            self.warm = True
            loss = self.learn(drawn)
        else:
            self.take = self.take or Take(self, drawn)
            loss = self.take.make(drawn, lambda drawn: {"loss": self.learn(drawn)})["loss"]
        self.settle()
        return loss

    def result(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The fitted model's tensors and metadata."""
        raise NotImplementedError

    def run(self, path: Path, progress: bool, title: str) -> None:
        """Make the remaining updates, by the kernels where there are some; the state is saved to `path` every `SAVE_EVERY`.

        Raises:
            OffrlError: the loss is no longer finite; `path` is then removed.
        """
        self._restore(path)
        with kernels.in_use(), Bar(progress, title, self.step, self.updates) as bar:
            while self.step < self.updates:
                self.step += 1
                loss = self.update()
                if self.step % SAVE_EVERY == 0 or self.step == self.updates:
                    _check_finite({"loss": loss}, path, title)
                if self.step % SAVE_EVERY == 0:
                    bar.note(f"loss {float(loss):.3f}")
                    write(path, self.state_dict(), {"step": self.step})
                bar.update(self.step)

    def _restore(self, path: Path) -> None:
        try:
            tensors, metadata = checkpoint.load(path)
        except OffrlError:  # none, or a damaged one: from the beginning
            return
        for key, tensor in self.state_dict().items():
            tensor.copy_(tensors[key])
        self.step = metadata["step"]


def fit_or_load(
    path: Path, start: Callable[[], FitLoop], progress: bool, title: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The result of a fit from the cache; if it is not there it is fitted (or the interrupted fit resumed) and cached.

    If another process fits the same model, wait for that.

    Raises:
        OffrlError: the fit diverged, of which no file is kept.
    """
    with one_at_a_time(path.with_suffix(".lock")):
        try:
            tensors, metadata = checkpoint.load(path)
            if not checkpoint.first_not_finite(tensors):  # earlier versions kept fits that had diverged
                return tensors, metadata
        except OffrlError:
            pass  # none, or a damaged one
        loop = start()
        unfinished = path.with_suffix(".training.safetensors")
        loop.run(unfinished, progress, title)
        tensors, metadata = loop.result()
        _check_finite(tensors, unfinished, title)
        write(path, tensors, metadata)
        unfinished.unlink(missing_ok=True)
        return checkpoint.load(path)


def _check_finite(tensors: Mapping[str, Tensor], path: Path, title: str) -> None:
    """Raise OffrlError where a fit has diverged, and remove its state: repeated from there it would diverge again."""
    if broken := checkpoint.first_not_finite(tensors):
        path.unlink(missing_ok=True)
        raise OffrlError(f"{title}: its {broken} is no longer finite; lower the learning rate (lr).")


def model_path(kind: str, version: int, store: OfflineDataset, cfg: Any, *more: Any) -> Path:
    """The cache file of a kind of model with these settings for this dataset.

    Args:
        more: what the model depends on besides, and a fingerprint leaves out.
    """
    key = json.dumps([version, store.fingerprint, asdict(cfg), *more], sort_keys=True)
    digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    stem = re.sub(r"[^\w.-]+", "_", store.info.id)[-60:]
    return cache_dir() / "augment" / f"{kind}-{stem}-{digest}.safetensors"


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and metadata in the format of checkpoints."""
    try:
        checkpoint.write(path, tensors, metadata)
    except (OSError, SafetensorError) as error:
        raise OffrlError(f"{path} can't be written ({error}); free some space, or set OFFRL_HOME.") from error
