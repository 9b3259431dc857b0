"""Statistics over several cells: aggregates of a family, comparisons, and what tuning is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from offrl.results import budget, stats
from offrl.results.cells import Cell
from offrl.results.labels import OWN
from offrl.results.published import Published, lookup_tuned
from offrl.results.stats import Array

if TYPE_CHECKING:
    import polars as pl

    from offrl.results.finetuning import FineTuning

ENOUGH_SEEDS = 10  # seeds below which a difference between methods is not called one


@dataclass(frozen=True)
class Aggregate:
    """A method over the datasets of a family; `interval` is NaN when a dataset has a single seed."""

    family: str
    method: str
    datasets: list[str]
    seeds: int
    mean: float
    iqm: float
    interval: tuple[float, float]
    gap: float  # optimality gap: by how much runs fall short of 100


@dataclass(frozen=True)
class Tuning:
    """A method that was run with several settings: what selecting among them by online evaluations is worth.

    Attributes:
        where: a dataset, or a family: then each configuration was averaged over its datasets first.
        configurations: how many; a score of one is the mean over its seeds.
        best: k -> expected best of k configurations, and its std.
        bandit: single episodes spent on the policies of a dataset by UCB; None for a family.
        published: k -> what somebody published for a D4RL family, over a range of settings of their own.
    """

    where: str
    method: str
    configurations: int
    best: dict[int, tuple[float, float]]
    bandit: budget.BanditCurve | None
    published: dict[int, Published]


@dataclass(frozen=True)
class Comparison:
    """Method `better` (the higher IQM) against `other`, on the datasets that all methods of the family have.

    `short`: whether a seed of one of them has not reached its budget of updates.
    """

    family: str
    better: str
    other: str
    datasets: int
    seeds: int
    probability: float
    probability_interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    short: bool = False

    @property
    def verdict(self) -> str:
        low, _ = self.difference_interval
        found = "higher" if low > 0 else "no difference detected"
        doubts = ["unfinished runs (†)"] if self.short else []
        if low > 0 and self.seeds < ENOUGH_SEEDS:
            doubts.append(f"fewer than {ENOUGH_SEEDS} seeds")
        return found + (f", but {' and '.join(doubts)}" if doubts else "")


@dataclass
class Report:
    """Everything that tables, figures and files are made of.

    Attributes:
        folder: where to write. damage: a sentence for each run that is left out since a file of it can't be read.
    """

    folder: Path
    cells: list[Cell]
    aggregates: list[Aggregate]
    comparisons: list[Comparison]
    tunings: list[Tuning]
    notes: list[str]
    damage: list[str] = field(default_factory=list)
    fine_tunings: list[FineTuning] = field(default_factory=list)


def summarise(folder: Path, cells: list[Cell], rows: pl.DataFrame, notes: Sequence[str] = ()) -> Report:
    """All statistics of the cells; `rows` are those that the cells were built from."""
    warning = caution(cells)
    return Report(
        folder,
        cells,
        _aggregates(cells),
        _comparisons(cells),
        _tunings(cells, rows),
        [*notes, *([warning] if warning else [])],
    )


# ---- how provisional an order is ---------------------------------------------------------------------------------

# Share of pairs of methods whose order at a number of updates is not their order at 500k updates: TD3+BC, IQL, CQL and AWAC
# on twelve D4RL Gym datasets, ten seeds each, the 35 pairs that end more than five points apart (takuseno/d3rlpy-benchmarks).
REVERSED = {10_000: 43, 50_000: 20, 200_000: 9}  # updates -> percent
FEW_UPDATES, FEW_SEEDS = 50_000, 5


def caution(cells: Sequence[Cell]) -> str | None:
    """One sentence where methods are compared after few updates of a critic, or by few seeds; None where neither is so."""
    datasets = [cell.dataset for cell in cells]
    compared = [cell for cell in cells if datasets.count(cell.dataset) > 1]
    early = [cell for cell in compared if cell.critic and cell.steps[0] < FEW_UPDATES]
    few = [cell for cell in compared if len(cell.last) < FEW_SEEDS]
    if not early and not few:
        return None
    parts = [f"{len(early)} have fewer than {FEW_UPDATES:,} updates of a critic"] if early else []
    parts += [f"{len(few)} have fewer than {FEW_SEEDS} seeds"] if few else []
    shares = ", ".join(f"{percent} % at {updates:,}" for updates, percent in REVERSED.items())
    later = (
        " (published learning curves of ten seeds: the share of orders of two methods that is reversed later is "
        f"{shares} updates)"
    )
    what = " and ".join(parts) + (later if early else "")
    return f"Orders of methods are provisional: of {len(compared)} compared cells {what}."


# ---- several datasets --------------------------------------------------------------------------------------------


def _groups(cells: list[Cell]) -> dict[str, list[Cell]]:
    """Normalised cells by family, and all of one scale together where it has several families.

    Scores by references of one's own are pooled within a family alone: those of two families need have nothing in common.
    """
    families: dict[str, dict[str, list[Cell]]] = {}
    for cell in cells:
        if cell.normalized:
            families.setdefault(cell.scale, {}).setdefault(cell.family, []).append(cell)
    groups: dict[str, list[Cell]] = {}
    for scale, found in families.items():
        collection = scale.partition("-")[0]
        groups |= {name if len(families) == 1 else f"{collection} {name}": group for name, group in found.items()}
        if len(found) > 1 and scale != OWN:
            groups[f"all {collection}"] = [cell for group in found.values() for cell in group]
    return groups


def _by_method(cells: list[Cell]) -> dict[str, dict[str, Array]]:
    scores: dict[str, dict[str, Array]] = {}
    for cell in cells:
        scores.setdefault(cell.method, {})[cell.dataset] = cell.last
    return scores


def _fewest_seeds(*methods: Sequence[Array]) -> int:
    return min(len(runs) for tasks in methods for runs in tasks)


def _on_common_datasets(cells: list[Cell]) -> dict[str, list[Array]]:
    """Scores of every method on the datasets that all methods have; empty where these are fewer than two.

    A method with a single dataset is left out, and one of which a score is not finite.
    """
    methods = {
        method: scores
        for method, scores in _by_method(cells).items()
        if len(scores) > 1 and not any(np.isnan(runs).any() for runs in scores.values())
    }
    common = sorted(set.intersection(*(set(scores) for scores in methods.values()))) if methods else []
    if len(common) < 2:
        return {}
    return {method: [scores[dataset] for dataset in common] for method, scores in methods.items()}


def profiles(cells: list[Cell]) -> dict[str, dict[str, list[Array]]]:
    """Scores by family and method for performance profiles, which need at least two common datasets."""
    made = {family: _on_common_datasets(group) for family, group in _groups(cells).items()}
    return {family: scores for family, scores in made.items() if scores}


def _aggregates(cells: list[Cell]) -> list[Aggregate]:
    made = []
    for family, group in _groups(cells).items():
        for method, scores in sorted(_by_method(group).items()):
            if len(scores) < 2:
                continue
            tasks = list(scores.values())
            seeds = _fewest_seeds(tasks)
            interval = stats.stratified_bootstrap(stats.iqm, tasks) if seeds > 1 else (math.nan, math.nan)
            mean, middle, gap = (float(f(tasks)) for f in (stats.task_mean, stats.iqm, stats.optimality_gap))
            made.append(Aggregate(family, method, sorted(scores), seeds, mean, middle, interval, gap))
    return made


def _comparisons(cells: list[Cell]) -> list[Comparison]:
    """The method with the highest IQM of a family against every other, on the datasets that all of them have."""
    made = []
    for family, group in _groups(cells).items():
        tasks = _on_common_datasets(group)
        if len(tasks) < 2 or _fewest_seeds(*tasks.values()) < 2:
            continue
        best = max(tasks, key=lambda method: float(stats.iqm(tasks[method])))
        unfinished = {cell.method for cell in group if cell.short}
        for other in sorted(tasks.keys() - {best}):
            short = not unfinished.isdisjoint({best, other})
            made.append(_compare(family, best, other, tasks[best], tasks[other], short))
    return made


def _compare(family: str, better: str, other: str, x: list[Array], y: list[Array], short: bool) -> Comparison:
    def difference(x: stats.Tasks, y: stats.Tasks) -> Array:
        return stats.iqm(x) - stats.iqm(y)

    return Comparison(
        family=family,
        better=better,
        other=other,
        datasets=len(x),
        seeds=_fewest_seeds(x, y),
        probability=float(stats.probability_of_improvement(x, y)),
        probability_interval=stats.stratified_bootstrap(stats.probability_of_improvement, x, y),
        difference=float(difference(x, y)),
        difference_interval=stats.stratified_bootstrap(difference, x, y),
        short=short,
    )


def _tunings(cells: list[Cell], rows: pl.DataFrame) -> list[Tuning]:
    """Of every method that has several settings: per dataset, and per family on the settings that all its datasets have."""
    made = []
    variants: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if not math.isnan(cell.mean) and cell.scale != "length":
            variants.setdefault((cell.dataset, cell.base), []).append(cell)
    for (dataset, base), here in variants.items():
        if len(here) > 1:
            episodes = _last_episodes(rows, dataset, [cell.method for cell in here])
            made.append(_tuning(dataset, base, [cell.mean for cell in here], budget.bandit_curve(episodes, pools=0)))
    for family, group in _groups(cells).items():
        for base in sorted({cell.base for cell in group}):
            scores = _by_method([cell for cell in group if cell.base == base and not math.isnan(cell.mean)])
            datasets = {dataset for found in scores.values() for dataset in found}
            means = [
                np.mean([s.mean() for s in found.values()]) for found in scores.values() if found.keys() == datasets
            ]
            if len(means) > 1 and len(datasets) > 1:
                plain = {cell.family for cell in group if cell.scale.startswith("D4RL")}
                published = lookup_tuned(base, plain.pop()) if len(plain) == 1 else {}
                made.append(_tuning(family, base, means, None, published))
    return made


def _tuning(
    where: str,
    method: str,
    means: Sequence[Any],
    bandit: budget.BanditCurve | None,
    published: Mapping[int, Published] | None = None,
) -> Tuning:
    ks = [k for k in budget.KS if k <= len(means)]
    best = {k: (float(mean), float(std)) for k, mean, std in zip(ks, *budget.expected_best(means, ks))}
    return Tuning(where, method, len(means), best, bandit, dict(published or {}))


def _last_episodes(rows: pl.DataFrame, dataset: str, methods: Sequence[str]) -> list[Array]:
    """Scores of each lane's last evaluation, one array a lane."""
    import polars as pl

    mine = rows.filter(pl.col("dataset") == dataset, pl.col("label").is_in(methods), pl.col("value").is_not_nan())
    last = mine.filter(pl.col("step") == pl.col("step").max().over("folder", "lane"))
    return [group["value"].to_numpy() for _, group in last.group_by("folder", "lane", maintain_order=True)]
