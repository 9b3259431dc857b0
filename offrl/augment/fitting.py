"""Models that are fitted to a dataset once and kept in the cache; a fit that was cut short goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from offrl.data.dataset import OfflineDataset
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError
from offrl.utils.paths import cache_dir, one_at_a_time
from offrl.utils.progress import Bar

SAVE_EVERY = 500  # updates between checkpoints of a fit


class Fit:
    """A fit under way.

    Attributes:
        step, updates: how many updates are made, and how many there will be.
    """

    step: int = 0
    updates: int

    def update(self) -> Tensor:
        """The next update; its loss."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """All that updates change besides `step`."""
        raise NotImplementedError

    def result(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What is kept in the end: the model's tensors, and facts about it."""
        raise NotImplementedError

    def run(self, path: Path, progress: bool, title: str) -> None:
        """All updates that are left; the state goes to `path` now and then."""
        self._restore(path)
        with Bar(progress, title, self.step, self.updates) as bar:
            while self.step < self.updates:
                self.step += 1
                loss = self.update()
                if self.step % SAVE_EVERY == 0:
                    bar.note(f"loss {float(loss):.3f}")
                    if not bool(loss.isfinite()):
                        raise OffrlError(f"{title}: the loss is no longer finite; lower the learning rate (lr).")
                    write(path, self.state(), {"step": self.step})
                bar.update(self.step)

    def _restore(self, path: Path) -> None:
        try:
            tensors, metadata = checkpoint.load(path)
        except OffrlError:  # none, or a damaged one: from the beginning
            return
        for key, tensor in self.state().items():
            tensor.copy_(tensors[key])
        self.step = metadata["step"]


def kept(path: Path, start: Callable[[], Fit], progress: bool, title: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The result of a fit: from the cache, else fitted (or fitted on) and left there.

    Another process that makes the same one is waited for.
    """
    with one_at_a_time(path.with_suffix(".lock")):
        try:
            return checkpoint.load(path)
        except OffrlError:
            pass  # none, or a damaged one
        fit = start()
        unfinished = path.with_suffix(".training.safetensors")
        fit.run(unfinished, progress, title)
        write(path, *fit.result())
        unfinished.unlink(missing_ok=True)
        return checkpoint.load(path)


def model_path(kind: str, version: int, store: OfflineDataset, cfg: Any) -> Path:
    """One file for a kind of model, a dataset's numbers and the settings."""
    key = json.dumps([version, store.fingerprint, asdict(cfg)], sort_keys=True)
    digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    stem = re.sub(r"[^\w.-]+", "_", store.info.id)[-60:]
    return cache_dir() / "augment" / f"{kind}-{stem}-{digest}.safetensors"


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Tensors and facts into the cache, as checkpoints hold them."""
    try:
        checkpoint.write(path, tensors, metadata)
    except (OSError, SafetensorError) as error:
        raise OffrlError(f"{path} can't be written ({error}); free some space, or set OFFRL_HOME.") from error
