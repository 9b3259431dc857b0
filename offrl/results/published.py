"""Published scores of others, shown beside our numbers and never averaged with them."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from offrl.utils.paths import PACKAGE

# Protocols that select by online evaluation, or whose score is not that of one trained policy.
_NOT_COMPARABLE = re.compile(r"\bbest\b|maximum|EOP|offline-to-online|online", re.IGNORECASE)


@dataclass(frozen=True)
class Published:
    """A published number and its source."""

    method: str
    dataset: str
    mean: float
    std: float
    seeds: int | None
    protocol: str
    source: str

    @property
    def standard_error(self) -> float:
        """Standard error of the mean over seeds, 0 where std or seeds are unknown; a std with ddof 0 is corrected to ddof 1."""
        if math.isnan(self.std) or not self.seeds or self.seeds < 2:
            return 0.0
        return self.std / math.sqrt(self.seeds if "ddof 1" in self.protocol else self.seeds - 1)

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if math.isnan(self.std) else f"{self.mean:.1f} ± {self.std:.1f}"

    def cite(self) -> str:
        """Source and protocol of the number."""
        seeds = f"{self.seeds} seeds; " if self.seeds else ""
        return f"{self.source} ({seeds}{self.protocol})"


def lookup(method: str, dataset: str) -> list[Published]:
    """Published scores of a last checkpoint; one whose protocol says so comes first. Empty: there is none."""
    return _table().get((_same_name(method), dataset), [])


def lookup_tuned(method: str, family: str) -> dict[int, Published]:
    """Published expected best-of-k scores of a D4RL family, k -> score (ReBRAC's table 9). Empty: there is none."""
    return _tuned().get((_same_name(method), f"d4rl-{family}"), {})


@dataclass(frozen=True)
class OnlinePublished:
    """What somebody published of a method's fine-tuning on a dataset; regret is None where they give none."""

    before: Published
    after: Published
    regret: Published | None


def lookup_online(method: str, dataset: str) -> OnlinePublished | None:
    """Published scores before and after an online phase, and the regret in it; never those of offline training."""
    rows = _online().get((_same_name(method), dataset), [])

    def first(pattern: str) -> Published | None:
        return next((number for number in rows if re.search(pattern, number.protocol)), None)

    before, after = first("offline phase end"), first("online phase end")
    return OnlinePublished(before, after, first("REGRET")) if before and after else None


@lru_cache(maxsize=1)
def _online() -> dict[tuple[str, str], list[Published]]:
    found: dict[tuple[str, str], list[Published]] = {}
    for _, number in _rows("online"):
        found.setdefault((_same_name(number.method), number.dataset), []).append(number)
    return found


def _same_name(method: str) -> str:
    """One spelling of a method: `td3_bc`, `TD3+BC` and `TD3+BC+Uniform` are the same."""
    name = re.sub(r"[^a-z0-9%()]", "", re.sub(r"\+uniform$", "", method.lower()))
    return {"bctop10%": "10%bc", "bc10%": "10%bc", "diffusionql": "dql"}.get(name, name)


def _rows(name: str) -> Iterator[tuple[dict[str, str], Published]]:
    with open(PACKAGE / "assets" / "reference" / f"scores_{name}.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["mean"]:
                std = float(row["std"]) if row["std"] else math.nan
                seeds = int(row["seeds"]) if row["seeds"] else None
                metadata = (
                    row["method"],
                    row["dataset"],
                    float(row["mean"]),
                    std,
                    seeds,
                    row["protocol"],
                    row["source"],
                )
                yield row, Published(*metadata)


@lru_cache(maxsize=1)
def _tuned() -> dict[tuple[str, str], dict[int, Published]]:
    found: dict[tuple[str, str], dict[int, Published]] = {}
    for row, number in _rows("pgd"):
        if k := re.search(r"best of k=(\d+)", number.protocol):
            found.setdefault((_same_name(number.method), row["benchmark"]), {})[int(k[1])] = number
    return found


@lru_cache(maxsize=1)
def _table() -> dict[tuple[str, str], list[Published]]:
    """Published scores by method and dataset, those that state a last checkpoint first."""
    found: dict[tuple[str, str], list[Published]] = {}
    for name in ("zoo", "prdc_a2pr", "doc", "weighting", "ogbench", "flow", "model_based"):
        for _, number in _rows(name):
            if _NOT_COMPARABLE.search(number.protocol):
                continue
            cell = found.setdefault((_same_name(number.method), number.dataset), [])
            if not any(_same_number(number, other) for other in cell):  # the same table copied by two collections
                cell.append(number)
    for cell in found.values():
        cell.sort(key=lambda number: not re.search(r"^final|last evaluation", number.protocol))
    return found


def _same_number(a: Published, b: Published) -> bool:
    return a.mean == b.mean and (a.std == b.std or math.isnan(a.std) or math.isnan(b.std))
