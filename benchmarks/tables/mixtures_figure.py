"""The figure of claim C: scores under each sampler, and the expert's own mean return as a dashed line.

    python benchmarks/tables/mixtures_figure.py --out docs/img/claims_mixtures.png   # rows in results/claims/c

Points are seeds, bars their means; agents without a run are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import verdicts
from matplotlib.figure import Figure

from offrl.results.figures import looks_of
from offrl.results.html import STYLE

SAMPLERS = {"": "uniform", "+RW": "RW", "+AW": "AW", "+Top-10%": "Top-10 %"}
AGENTS = {"td3_bc": "TD3+BC", "iql": "IQL", "cql": "CQL"}


def draw(rows: verdicts.Rows) -> Figure:
    """A panel a dataset."""
    looks, width = looks_of(list(SAMPLERS.values())), 0.8 / len(SAMPLERS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.8), layout="constrained")
        panels = figure.subplots(1, len(verdicts.MIXTURES), sharey=True)
        for panel, dataset in zip(panels, verdicts.MIXTURES):
            for i, agent in enumerate(AGENTS):
                for j, (suffix, name) in enumerate(SAMPLERS.items()):
                    scores = rows.scores(f"{agent}{suffix}", dataset)
                    if len(scores):
                        x = i + (j - (len(SAMPLERS) - 1) / 2) * width
                        panel.bar(x, scores.mean(), 0.9 * width, color=looks[name][0], alpha=0.6)
                        panel.plot([x] * len(scores), scores, "o", color=looks[name][0], markersize=3)
            panel.axhline(verdicts.expert_score(dataset), color="black", linestyle="--", linewidth=0.9)
            panel.set_xticks(range(len(AGENTS)), AGENTS.values())
            panel.set_title(dataset.removeprefix("forge/"))
        panels[0].set_ylabel("normalised score")
        handles = [matplotlib.patches.Patch(color=looks[name][0], alpha=0.6, label=name) for name in SAMPLERS.values()]
        handles.append(matplotlib.lines.Line2D([], [], color="black", linestyle="--", label="the expert's own return"))
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=verdicts.HERE / "claims" / "c")
    parser.add_argument("--out", type=Path, default=Path("claims_mixtures.png"))
    arguments = parser.parse_args()
    draw(verdicts.Rows(arguments.rows)).savefig(arguments.out, dpi=170)


if __name__ == "__main__":
    main()
