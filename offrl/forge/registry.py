"""The forge: D4RL-like datasets made on the spot from policies that ship with the package, as Minari datasets.

Same id, size and seed give the same bytes on the same machine with the same versions of MuJoCo, NumPy and PyTorch
(another processor may round the policies' matrix products differently).

Robots (`forge/hopper/medium-v0`): Gymnasium's v5 Hopper, Walker2d and HalfCheetah; see `offrl.forge.robots`.
Mazes (`forge/pointmaze/umaze-v0`, `...-dense-v0`): see `offrl.forge.mazes`.
Robots with unseen noise (`forge/noisy-hopper/medium-replay-s0.2-v0`): see `offrl.forge.noisy`.
OGBench's sets (`forge/ogbench/cube-single-play-v0`), as NPZ files of its form: see `offrl.forge.ogbench`.
Finite stochastic tasks (`forge/bandit/p0.1-v0`, `forge/lake/p0.7-eps0.4-n1000-v0`): see `offrl.forge.tabular`.
"""

from __future__ import annotations

import glob
from pathlib import Path

from offrl.forge.build import build
from offrl.forge.names import DEFAULT_SIZE, family, folder_of, known, names, sources_of
from offrl.forge.robots import LEVELS, REPLAY_V1, ROBOTS, segments
from offrl.utils.errors import OffrlError
from offrl.utils.paths import one_at_a_time, remove_torn

__all__ = ["DEFAULT_SIZE", "LEVELS", "REPLAY_V1", "ROBOTS", "ensure", "family", "folder_of", "names", "segments"]


def ensure(name: str, *, size: int | None = None, seed: int = 0, force: bool = False, progress: bool = True) -> Path:
    """Folder of a forge dataset in Minari's format (it holds `data/`), or file of an OGBench set, built when it is missing.

    With `MINARI_DATASETS_PATH` set to the cache folder, `minari.load_dataset` finds it as well.

    Args:
        name: one of `names()`, or a finite task or noisy robot with other numbers.
        size: transitions; default 100,000 (D4RL's sets have 1,000,000), of a finite task its number of episodes.
        seed: of resets, action noise and draws.
        force: build it again.
        progress: show a progress bar.

    Raises:
        OffrlError: an unknown name, a bad size, a missing package, or an unwritable folder.
    """
    name = known(name)
    if (size is not None and size < 1) or seed < 0:
        raise OffrlError(f"{name}: size={size} must be at least 1 and seed={seed} at least 0.")
    folder = folder_of(name, size, seed)
    if not force and _is_built(folder):
        return folder
    with one_at_a_time(folder.with_name(f".{folder.name}.lock")):  # the jobs of a sweep often want the same one
        remove_torn(folder.parent, glob.escape(folder.name))  # of builds that were killed
        if force or not _is_built(folder):
            sources = [ensure(source, size=size, seed=seed, progress=progress) for source in sources_of(name)]
            build(folder, name, size, seed, progress, sources)
    return folder


def _is_built(folder: Path) -> bool:
    return folder.is_file() if folder.suffix == ".npz" else (folder / "data" / "metadata.json").is_file()
