"""What the coefficient of guidance does: scores of lanes that differ in it, and the measures of trajectories made at each.

    offrl train experiment=policy_guided_diffusion/forge agent=td3_bc augment=policy_guided_diffusion \\
        dataset=forge/hopper/medium-replay-v0 lanes=15 "seeds=[0,1,2,0,1,2,0,1,2,0,1,2,0,1,2]" \\
        "augment.coefficient=[0,0,0,0.3,0.3,0.3,1,1,1,3,3,3,10,10,10]"
    offrl augment metrics runs/td3_bc/... --coefficients 0,0.3,1,3,10 --no-world-model
    python benchmarks/tables/guidance_curve.py RUN METRICS.json --out docs/img/policy_guided_diffusion_coefficient.png

RUN is the first command's folder, METRICS.json the second's. Prints the numbers of the figure as a Markdown table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from offrl import results
from offrl.figures import STYLE
from offrl.paths import replacing
from offrl.train import read_config

MEASURES = (("log_likelihood_policy", "mean log π(a | s)"), ("dynamics_error", "dynamics error (variances)"))


def last_scores(run: Path) -> dict[float, list[float]]:
    """Coefficient to the last scores of the lanes that had it."""
    coefficients = read_config(run).get("augment", {}).get("coefficient")
    if not isinstance(coefficients, list):
        raise SystemExit(f"{run}: its lanes don't differ in augment.coefficient; name the first command's folder.")
    rows = results.read([run])
    rows = rows.filter(rows["step"] == rows["step"].max())
    scores: dict[float, list[float]] = {}
    for lane, coefficient in enumerate(coefficients):
        mine = rows.filter(rows["lane"] == lane)["normalized"].to_numpy()
        scores.setdefault(float(coefficient), []).append(float(mine.mean()))
    return dict(sorted(scores.items()))


def measures(path: Path) -> dict[float, dict[str, float]]:
    """Coefficient to the measures of the trajectories that it made."""
    kinds = json.loads(path.read_text())["kinds"]
    named = {"unguided": 0.0} | {name: float(name.split(", ")[1]) for name in kinds if name.startswith("guided, ")}
    return dict(sorted((named[name], kinds[name]) for name in kinds if name in named))


def table(scores: dict[float, list[float]], found: dict[float, dict[str, float]]) -> str:
    lines = ["| coefficient | score | dynamics error | log pi(a\\|s) |", "|---|---|---|---|"]
    for coefficient in sorted({*scores, *found}):
        lanes, made = scores.get(coefficient), found.get(coefficient)
        score = f"{np.mean(lanes):.1f} ± {np.std(lanes, ddof=1):.1f}" if lanes else ""
        told = f"{made['dynamics_error']:.2f} | {made['log_likelihood_policy']:.2f}" if made else " | "
        lines.append(f"| {coefficient:g} | {score} | {told} |")
    return "\n".join(lines)


def draw(scores: dict[float, list[float]], found: dict[float, dict[str, float]]) -> Figure:
    """Three panels over the coefficients, which stand at equal distances: score, likelihood, dynamics error."""
    places = {coefficient: i for i, coefficient in enumerate(sorted({*scores, *found}))}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 2.6), layout="constrained")
        first, *others = figure.subplots(1, 3)
        x, mean = [places[c] for c in scores], np.array([np.mean(v) for v in scores.values()])
        std = np.array([np.std(v, ddof=1) for v in scores.values()])
        for coefficient, lanes in scores.items():
            first.plot([places[coefficient]] * len(lanes), lanes, "o", color="grey", markersize=3, alpha=0.6)
        first.errorbar(x, mean, std, color="C0", marker="o", markersize=4, capsize=3, linewidth=1.3)
        first.set_ylabel("normalised score")
        for panel, (name, label) in zip(others, MEASURES):
            panel.plot(
                [places[c] for c in found], [one[name] for one in found.values()], color="C1", marker="o", markersize=4
            )
            panel.set_ylabel(label)
        for panel in (first, *others):
            panel.set_xticks(list(places.values()), [f"{c:g}" for c in places])
            panel.set_xlabel("coefficient of guidance")
            panel.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("metrics", type=Path)
    parser.add_argument("--out", type=Path, default=Path("guidance_curve.png"), help="default %(default)s")
    arguments = parser.parse_args()
    scores, found = last_scores(arguments.run), measures(arguments.metrics)
    print(table(scores, found))
    with replacing(arguments.out) as temporary:
        draw(scores, found).savefig(temporary, dpi=160, format="png")


if __name__ == "__main__":
    main()
