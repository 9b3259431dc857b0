"""What the coefficient of guidance does: scores of runs or lanes that differ in it, and measures of trajectories made at each.

    offrl train experiment=policy_guided_diffusion/forge agent=td3_bc augment=policy_guided_diffusion lanes=15 \\
        dataset=forge/hopper/medium-replay-v0 augment.coefficient=0,0.3,1,3,10 out=runs_curve
    offrl augment metrics runs/td3_bc/... --coefficients 0,0.3,1,3,10 --no-world-model --out measured
    python benchmarks/tables/guidance_curve.py runs_curve/*/*/* --measured measured/metrics.json --out curve.png

Lanes of one run may differ too (`"augment.coefficient=[0,1,3]" "seeds=[0,0,0]"`); unguided diffusion counts as 0. Prints the
numbers of the figure as a Markdown table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from offrl import results
from offrl.augment.base import augmentation_config
from offrl.augment.diffusion import Diffusion
from offrl.results.style import RC
from offrl.training.runs import read_config
from offrl.utils.paths import replacing

MEASURES = (("log_likelihood_policy", "mean log π(a | s)"), ("dynamics_error", "dynamics error (variances)"))


def last_scores(runs: list[Path]) -> dict[float, list[float]]:
    """Coefficient to the last scores of all lanes that had it."""
    scores: dict[float, list[float]] = {}
    for run in runs:
        rows = results.read([run])
        rows = rows.filter(rows["step"] == rows["step"].max())
        lanes = sorted(rows["lane"].unique())
        for lane, coefficient in zip(lanes, coefficients(run, len(lanes)), strict=True):
            scores.setdefault(coefficient, []).append(float(rows.filter(rows["lane"] == lane)["normalized"].mean()))
    return dict(sorted(scores.items()))


def coefficients(run: Path, lanes: int) -> list[float]:
    """Each lane's coefficient of guidance."""
    augment = read_config(run).get("augment")
    cls, cfg = augmentation_config(augment, lanes) if augment else (None, None)
    if cls is None or not issubclass(cls, Diffusion):
        raise SystemExit(f"{run}: no run with diffusion as its augmentation; leave it out.")
    value = getattr(cfg, "coefficient", 0.0)
    return [float(one) for one in value] if isinstance(value, list) else [float(value)] * lanes


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
        numbers = f"{made['dynamics_error']:.3f} | {made['log_likelihood_policy']:.2f}" if made else " | "
        lines.append(f"| {coefficient:g} | {score} | {numbers} |")
    return "\n".join(lines)


def draw(scores: dict[float, list[float]], found: dict[float, dict[str, float]]) -> Figure:
    """Three panels over the coefficients, which stand at equal distances: score, likelihood, dynamics error."""
    places = {coefficient: i for i, coefficient in enumerate(sorted({*scores, *found}))}
    with matplotlib.rc_context(RC):
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
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--measured", type=Path, required=True, help="metrics.json of `offrl augment metrics`")
    parser.add_argument("--out", type=Path, default=Path("guidance_curve.png"), help="default %(default)s")
    arguments = parser.parse_args()
    scores, found = last_scores(arguments.runs), measures(arguments.measured)
    print(table(scores, found))
    with replacing(arguments.out) as temporary:
        draw(scores, found).savefig(temporary, dpi=160, format="png")


if __name__ == "__main__":
    main()
