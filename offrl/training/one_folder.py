"""Jobs of a sweep that would have one run folder: the sweep is refused before any of them begins."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from offrl.training.compose import named, plain
from offrl.training.run_config import resolve_config
from offrl.utils.settings import FREE

PLACES = ("name", "out")  # options that name a folder outright
# Options that name none, but for some of a run with an online phase.
UNNAMED = FREE - {*PLACES, "lanes", "seed", "seeds"}
MOST = 50  # jobs that are composed, which takes some tenths of a second each


def clash(config: Any, jobs: Sequence[Sequence[str]]) -> str:
    """Why a sweep can't begin: two of its jobs would have one folder. Empty: none of those that were looked at.

    Jobs are composed only where their words give no reason for two folders.

    Args:
        config: Hydra's, of the sweep. jobs: the words of each.
    """
    places = OmegaConf.to_container(OmegaConf.masked_copy(config, [k for k in PLACES if k in config]), resolve=False)
    assert isinstance(places, dict)
    texts = [*map(str, places.values()), *(word for words in jobs for word in words)]
    if any("${hydra:" in text for text in texts):  # known when a job is launched
        return ""
    alike: dict[tuple[str, ...], list[int]] = {}
    for number, words in enumerate(jobs):
        alike.setdefault(_naming(words, bool(places.get("name"))), []).append(number)
    looked = [number for numbers in alike.values() if len(numbers) > 1 for number in numbers]
    first_in: dict[Path, int] = {}
    for number in looked[:MOST]:
        folder = _folder(config, jobs[number])
        if folder and (first := first_in.setdefault(folder, number)) != number:
            return _refusal(jobs[first], jobs[number], folder)
    return ""


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _naming(words: Sequence[str], is_named: bool) -> tuple[str, ...]:
    """The words of a job that may give it a folder of its own."""
    is_named = is_named or any(_key(word) == "name" for word in words)
    chosen = [w for w in words if (_key(w) in PLACES if is_named else _key(w).partition(".")[0] not in UNNAMED)]
    return tuple(sorted(word.lstrip("+") for word in chosen))


def _folder(config: Any, words: Sequence[str]) -> Path | None:
    """The folder of a job; None where its settings are wrong, of which it fails alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the job itself warns
            composed = GlobalHydra.instance().config_loader().load_sweep_config(config, list(words))
            ours = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
            return resolve_config(named(plain(ours), composed.hydra.runtime.choices, words)).folder()
    except Exception:
        return None


def _refusal(one: Sequence[str], other: Sequence[str], folder: Path) -> str:
    """The sentence that refuses two jobs, given by their words."""
    sides = [[w.lstrip("+") for w in a if w not in b] for a, b in ((one, other), (other, one))]
    keys = {_key(word) for side in sides for word in side}
    if not keys:
        return f"two jobs of the sweep have the same words, and so one run folder, {folder}; give each value once."
    what = f"{' '.join(sides[0])} and {' '.join(sides[1])} would have one run folder, {folder}"
    if all(key.partition(".")[0] in UNNAMED for key in keys):
        what = f"{', '.join(sorted(keys))} can't be swept, since {what}"
    kept = ", or train the longer run with keep_checkpoints=true" if "updates" in keys else ""
    return f"{what}; give each job a name= or out= of its own{kept}."
