"""The replay: each lane's transitions of an environment, in a memory that grows up to a fixed capacity."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from offrl.data.batch import Batch
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError

ROW_FIELDS = ("observations", "actions", "rewards", "next_observations", "terminations", "timesteps")
NAME = re.compile(r"(\d{8,12})-(\d{8,12})\.safetensors", re.ASCII)  # of a file: its first row and its end


class Replay:
    """Transitions `[lanes, capacity, ...]`, of which each lane has the first `size`; a row is never overwritten.

    The tensors are allocated once and `count` lives on the device, so that a captured graph draws from what has been added
    since. A row's number, for `transitions`, is `lane * capacity + position`.

    Args:
        capacity: most rows of a lane.
        discrete: whether actions are integers.
    """

    def __init__(
        self, lanes: int, capacity: int, obs_dim: int, action_dim: int, discrete: bool, device: torch.device | str
    ) -> None:
        self.lanes, self.capacity, self.size = lanes, capacity, 0
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        rows = (lanes, capacity)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*rows, *shape, dtype=dtype, device=device)

        self.rows = {
            "observations": zeros(obs_dim),
            "actions": zeros(dtype=torch.int64) if discrete else zeros(action_dim),
            "rewards": zeros(),
            "next_observations": zeros(obs_dim),
            "terminations": zeros(),
            "timesteps": zeros(dtype=torch.int64),
        }
        self.flat = {name: tensor.flatten(0, 1) for name, tensor in self.rows.items()}

    def add(self, **rows: Tensor) -> None:
        """Append one row to every lane: each of `ROW_FIELDS`, `[lanes, ...]`."""
        if self.size >= self.capacity:
            raise OffrlError(f"the replay is full with {self.capacity} rows a lane; raise online.steps.")
        for name in ROW_FIELDS:
            self.rows[name][:, self.size] = rows[name]
        self.cut(self.size + 1)

    def cut(self, size: int) -> None:
        """Keep the first `size` rows of every lane."""
        self.size = size
        self.count.fill_(size)

    def transitions(self, index: Tensor, fields: tuple[str, ...] = ()) -> Batch:
        """Gather rows; the batch's `index` is -1 throughout, since they are none of a dataset.

        Args:
            index: int64 rows `[...]`.
            fields: any of `next_action`, `timestep`.
        """
        flat = index.reshape(-1)

        def rows(name: str, at: Tensor = flat) -> Tensor:
            source = self.flat[name]
            return source.index_select(0, at).view(*index.shape, *source.shape[1:])

        batch = Batch(
            obs=rows("observations"),
            action=rows("actions"),
            reward=rows("rewards"),
            next_obs=rows("next_observations"),
            mask=1 - rows("terminations"),
            index=torch.full_like(index, -1),
        )
        if "timestep" in fields:
            batch.timestep = rows("timesteps")
        if "next_action" in fields:
            following = torch.minimum(flat + 1, flat - flat % self.capacity + (self.count - 1).clamp(min=0))
            same = (following > flat) & (self.flat["timesteps"][following] > 0)
            batch.next_action = rows("actions", torch.where(same, following, flat))
            batch.has_next_action = same.view(index.shape)
        return batch

    def episode_actions(self, lengths: Sequence[int]) -> list[np.ndarray]:
        """The last `lengths[lane]` actions of each lane: those of the episode under way."""
        actions = self.rows["actions"]
        return [actions[lane, self.size - n : self.size].cpu().numpy() for lane, n in enumerate(lengths)]


class ReplayFiles:
    """The rows of a replay as files that are only added to: each holds the rows of all lanes since the one before.

    Args:
        folder: for the files, which are named by the rows that they hold, such as `00000000-00001000.safetensors`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.saved = folder, 0

    def save(self, replay: Replay) -> None:
        """Write the rows that are in no file yet; call it before the checkpoint that needs them."""
        if replay.size == self.saved:
            return
        path = self.folder / f"{self.saved:08d}-{replay.size:08d}.safetensors"
        part = {name: tensor[:, self.saved : replay.size] for name, tensor in replay.rows.items()}
        try:
            checkpoint.write(path, part, {"first": self.saved, "end": replay.size})
        except (OSError, SafetensorError) as error:
            raise OffrlError(
                f"{path}: the online rows could not be written ({error}); free some space, then resume the run."
            ) from error
        self.saved = replay.size

    def load(self, replay: Replay, size: int) -> None:
        """Fill the replay with its first `size` rows; nothing in the folder changes.

        Raises:
            OffrlError: a file is missing, damaged, or of another run.
        """
        at = 0
        for first, end, path in self._files():
            if first >= size:
                continue
            if first != at or end > size:
                break
            tensors, _ = checkpoint.load(path)
            checkpoint.check_fits({k: rows[:, first:end] for k, rows in replay.rows.items()}, tensors, path, "replay")
            for name, tensor in tensors.items():
                replay.rows[name][:, first:end] = tensor.to(replay.count.device)
            at = end
        if at != size:
            raise OffrlError(
                f"{self.folder}: online rows {at} to {size} are missing; restore them, or start over with fresh=true."
            )
        replay.cut(size)
        self.saved = size

    def drop_beyond(self, size: int) -> None:
        """Remove what a killed process wrote beyond the first `size` rows."""
        for first, _, path in self._files():
            if first >= size:
                path.unlink()

    def _files(self) -> list[tuple[int, int, Path]]:
        """First row, end and path of each file of rows; what has another name is none of ours."""
        named = [(NAME.fullmatch(path.name), path) for path in sorted(self.folder.glob("*.safetensors"))]
        return [(int(match[1]), int(match[2]), path) for match, path in named if match and path.is_file()]

    def clear(self) -> None:
        """Remove the files of an earlier run in the folder."""
        self.drop_beyond(0)
        self.saved = 0
