"""The episodes in which an agent learns from its environment: their rows, and the regret that is computed from them.

`online.jsonl` of a run has one line for each episode of the online phase that has ended, in the order in which they did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from offrl.results.writer import _Log, finite

NAME = "online.jsonl"


class Ended(Protocol):
    """An episode that has ended."""

    lane: int
    number: int
    seed: int
    ret: float
    length: int
    success: bool | None


class OnlineRows:
    """Appends the episodes of an online phase; what was written behind environment step `keep_until` is dropped.

    Args:
        seeds: the lanes' seeds. normalized: normalised score of a return; its result is None without references.
    """

    def __init__(self, folder: Path, seeds: Sequence[int], normalized: Callable[[float], Any], keep_until: int) -> None:
        self.seeds, self.normalized = seeds, normalized
        self._log = _Log(folder / NAME, keep_until)

    def add(self, ended: Iterable[tuple[int, Any]]) -> None:
        """Add episodes, each with the environment step of its lane at which it ended."""
        rows = [self._row(step, episode) for step, episode in ended]
        if rows:
            self._log.append(rows)

    def _row(self, step: int, episode: Ended) -> dict[str, Any]:
        score = self.normalized(episode.ret)
        return {
            "lane": episode.lane,
            "seed": int(self.seeds[episode.lane]),
            "step": step,
            "episode": episode.number,
            "env_seed": episode.seed,
            "return_raw": finite(episode.ret),
            "length": episode.length,
            "normalized": None if score is None else finite(score),
            "success": episode.success,
        }

    def flush(self) -> None:
        """Sync all rows to disk; call it before a checkpoint is saved."""
        self._log.flush()

    def __enter__(self) -> OnlineRows:
        return self

    def __exit__(self, *exception: object) -> None:
        self._log.close()
