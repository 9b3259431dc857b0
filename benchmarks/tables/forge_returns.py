"""Returns of every level of the forge's robots beside D4RL's: a Markdown table, and a CSV file.

    python benchmarks/tables/forge_returns.py                # datasets that are missing are built: some five minutes of a core
    python benchmarks/tables/forge_returns.py --size 200000 --out returns.csv

Episodes that end only because their policy had played its share of the transitions are left out: D4RL's HalfCheetah has none.
D4RL's numbers are those of `results/d4rl_returns.csv` (docs/data.md says where they come from).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from offrl.data.dataset import OfflineDataset
from offrl.datasets import load
from offrl.forge import registry as forge

HERE = Path(__file__).parent / "results"
STATISTICS = ("mean", "std", "largest", "smallest")


def levels() -> Iterator[tuple[str, str]]:
    """Forge ids and the D4RL ids that they stand for, mixtures left out."""
    for robot, spec in forge.ROBOTS.items():
        for level in forge.LEVELS:
            yield f"forge/{robot}/{level}-v0", f"{robot}-{level}-v2"
        if spec.loader:
            yield f"forge/{robot}/{forge.REPLAY_V1}", f"{robot}-medium-replay-v2"


def whole(store: OfflineDataset) -> np.ndarray:
    """Returns of the episodes that terminated or reached the time limit, float64 `[E]`."""
    last = store.offsets[1:] - 1
    ended = store.terminations[last].bool() | (store.lengths == store.info.max_episode_steps)
    returns: np.ndarray = store.returns[ended].double().numpy()
    return returns


def summary(returns: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation over episodes (ddof 0, as D4RL's), largest and smallest."""
    return dict(zip(STATISTICS, (returns.mean(), returns.std(), returns.max(), returns.min())))


def rows(size: int | None) -> Iterator[dict[str, str | int | float]]:
    """A row a level: raw and normalised statistics of the forge and of D4RL, where that is known."""
    with open(HERE / "d4rl_returns.csv", newline="") as file:
        known = {row["dataset"]: {key: float(row[key]) for key in STATISTICS} for row in csv.DictReader(file)}
    for name, namesake in levels():
        store = load(forge.ensure(name, size=size, progress=False))
        returns = whole(store)
        low, high = store.info.ref_min, store.info.ref_max
        row: dict[str, str | int | float] = {"dataset": name, "transitions": len(store), "episodes": len(returns)}
        for source, found in (("forge", summary(returns)), ("d4rl", known.get(namesake, {}))):
            for key, value in found.items():
                row[f"{source}_{key}"] = round(value, 1)
                row[f"{source}_{key}_normalised"] = round(
                    100 * (value - (low if key != "std" else 0)) / (high - low), 1
                )
        yield row


def line(row: dict[str, str | int | float]) -> str:
    """A line of the Markdown table; normalised values in brackets."""

    def pair(source: str, key: str) -> str:
        return f"{row[f'{source}_{key}']:,.0f} ({row[f'{source}_{key}_normalised']:.1f})"

    def cells(source: str) -> list[str]:
        if f"{source}_mean" not in row:
            return ["", "", ""]
        spread = f"{row[f'{source}_mean']:,.0f} ± {row[f'{source}_std']:,.0f}"
        scores = f"({row[f'{source}_mean_normalised']:.1f} ± {row[f'{source}_std_normalised']:.1f})"
        return [f"{spread} {scores}", pair(source, "largest"), pair(source, "smallest")]

    return f"| `{row['dataset']}` | {row['episodes']:,} | " + " | ".join(cells("forge") + cells("d4rl")) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, help="transitions of each dataset (default: the forge's)")
    parser.add_argument("--out", type=Path, default=HERE / "forge_returns.csv")
    arguments = parser.parse_args()
    found = list(rows(arguments.size))
    columns = ["dataset", "transitions", "episodes"]
    columns += [f"{s}_{k}{n}" for s in ("forge", "d4rl") for k in STATISTICS for n in ("", "_normalised")]
    with open(arguments.out, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    print("| dataset | episodes | mean ± std | largest | smallest | D4RL: mean ± std | largest | smallest |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(map(line, found)))


if __name__ == "__main__":
    main()
