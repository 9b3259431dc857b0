"""The figure of claim C: scores under each sampler, and the expert's own mean return as a dashed line.

    python benchmarks/tables/mixtures_figure.py --out docs/img/claims_mixtures.png   # rows in results/claims/c

Points are seeds, bars their means; agents and datasets without a run are left out.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import matplotlib
import verdicts
from matplotlib.figure import Figure

from offrl.results.figures import looks_of
from offrl.results.style import RC

SAMPLERS = {"": "uniform", "+RW": "RW", "+AW": "AW", "+Top-10%": "Top-10 %"}
AGENTS = {"td3_bc": "TD3+BC", "iql": "IQL", "cql": "CQL"}


def draw(rows: verdicts.Rows) -> Figure:
    """A panel a dataset."""
    looks, width = looks_of(list(SAMPLERS.values())), 0.8 / len(SAMPLERS)
    found = {
        (dataset, agent, name): scores
        for dataset in verdicts.MIXTURES
        for agent, (suffix, name) in product(AGENTS, SAMPLERS.items())
        if len(scores := rows.scores(f"{agent}{suffix}", dataset))
    }
    datasets, agents = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(0.6 + 3.3 * len(datasets), 3.2), layout="constrained")
        panels = figure.subplots(1, len(datasets), sharey=True, squeeze=False)[0]
        for panel, dataset in zip(panels, datasets):
            for j, name in enumerate(SAMPLERS.values()):
                for i, agent in enumerate(agents):
                    if (scores := found.get((dataset, agent, name))) is not None:
                        x = i + (j - (len(SAMPLERS) - 1) / 2) * width
                        panel.bar(x, scores.mean(), 0.9 * width, color=looks[name][0], alpha=0.6)
                        panel.plot([x] * len(scores), scores, "o", color=looks[name][0], markersize=3)
            panel.axhline(verdicts.expert_score(dataset), color="black", linestyle="--", linewidth=0.9)
            panel.set_xticks(range(len(agents)), [AGENTS[agent] for agent in agents])
            panel.set_xlim(-0.5, len(agents) - 0.5)
            panel.set_title(dataset.removeprefix("forge/"))
        panels[0].set_ylabel("normalised score")
        handles = [matplotlib.patches.Patch(color=looks[name][0], alpha=0.6, label=name) for name in SAMPLERS.values()]
        handles.append(matplotlib.lines.Line2D([], [], color="black", linestyle="--", label="expert's own return"))
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=verdicts.HERE / "claims" / "c")
    parser.add_argument("--out", type=Path, default=Path("claims_mixtures.png"))
    arguments = parser.parse_args()
    draw(verdicts.Rows(arguments.rows)).savefig(arguments.out, dpi=170)


if __name__ == "__main__":
    main()
