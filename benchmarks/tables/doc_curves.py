"""Returns over stochasticity, predicted returns and label leakage of the dichotomy-of-control recipes: figures and a table.

    offrl train experiment=dichotomy_of_control/bandit         # and lake, gambling; %BC: agent=bc sampler=top_percent
    python benchmarks/tables/doc_curves.py runs --out docs/img

    offrl train experiment=dichotomy_of_control/noisy          # robots: fewer episodes, since each is a thousand steps
    python benchmarks/tables/doc_curves.py runs --out docs/img --name dichotomy_of_control_noisy --episodes 10

Every run's policy is probed (`offrl probe`), with both decodings where its actions are discrete; what was found is kept beside
the run.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from offrl import results
from offrl.cli.probe import draw, probe
from offrl.evaluation.probes import Probe
from offrl.results.style import RC, looks_of
from offrl.training.runs import dataset_info
from offrl.utils import checkpoint
from offrl.utils.paths import replacing

METHODS = ("doc", "esper", "vae_bc", "dt", "rvs", "bc", "bc+Top-10%")
NAMES = {
    "bc": "BC",
    "bc+Top-10%": "10%BC",
    "rvs": "RvS",
    "dt": "DT",
    "esper": "ESPER",
    "vae_bc": "VAE-BC",
    "doc": "DoC",
}
# Columns of the figure: title, label of the x axis, and the datasets with a number in their id.
SWEEPS = (
    ("bandit", "chance p of the worse arm", r"forge/bandit/p([\d.]+)-v0"),
    ("lake, behaviour 0.4-greedy", "chance p of no slip", r"forge/lake/p([\d.]+)-eps0.4-n1000-v0"),
    ("lake, behaviour 0.1-greedy", "chance p of no slip", r"forge/lake/p([\d.]+)-eps0.1-n1000-v0"),
    ("noisy hopper", "strength sigma", r"forge/noisy-hopper/medium-replay-s([\d.]+)-v0"),
    ("noisy halfcheetah", "strength sigma", r"forge/noisy-halfcheetah/medium-replay-s([\d.]+)-v0"),
)
LEAKAGE = ("forge/bandit/skewed-v0", "forge/gambling/uniform-v0", "forge/lake/p0.7-eps0.4-n1000-v0")
PREDICTED = (*LEAKAGE, "forge/noisy-hopper/medium-replay-s0.3-v0", "forge/noisy-halfcheetah/medium-replay-s0.3-v0")


def probed(folder: Path, episodes: int, updates: int) -> dict[str, Any]:
    """What both decodings' probes of a run found, from the file beside it when that is newer than the checkpoint."""
    info = dataset_info(folder)
    updates = updates if info.id in LEAKAGE else 0  # leakage takes longer than all else
    path = folder / f"probe-{episodes}-{updates}.json"
    if not path.exists() or path.stat().st_mtime < (folder / checkpoint.NAME).stat().st_mtime:
        greedy = probe(folder, episodes, updates)
        sampled = probe(folder, episodes, 0, sampled=True) if info.discrete else greedy
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"likeliest": asdict(greedy), "sampled": asdict(sampled)}))
    found = {decoding: asdict(Probe.from_dict(one)) for decoding, one in json.loads(path.read_text()).items()}
    return {**found, "method": found["sampled"]["method"], "dataset": info.id, "exact": info.provenance.get("exact")}


def pooled(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each method and dataset, with the lanes of all of its runs."""
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for one in found:
        cell = cells.setdefault((one["method"], one["dataset"]), one)
        if cell is not one:
            cells[one["method"], one["dataset"]] = cell | {d: joined(cell[d], one[d]) for d in ("likeliest", "sampled")}
    return list(cells.values())


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Lists, also those further in, behind each other; of all else the first one's."""

    def both(a: Any, b: Any) -> Any:
        if isinstance(a, dict) and isinstance(b, dict):
            return joined(a, b)
        return [*a, *b] if isinstance(a, list) and isinstance(b, list) else a

    return {key: both(value, second[key]) for key, value in first.items()}


def draw_returns(found: list[dict[str, Any]]) -> Figure | None:
    """A column per sweep and a row per decoding (continuous actions: one); mean return over seeds, deviation as a band.

    Exact values are black. None when no dataset belongs to a sweep.
    """
    methods = [m for m in METHODS if any(one["method"] == m for one in found)]
    looks, sweeps = looks_of(methods), []
    for title, x_label, pattern in SWEEPS:
        here = [(float(m[1]), one) for one in found if (m := re.fullmatch(pattern, one["dataset"]))]
        if len({x for x, _ in here}) > 1:
            sweeps.append((title, x_label, here))
    if not sweeps:
        return None
    decodings = {"sampled": "return, actions sampled", "likeliest": "return, likeliest action"}
    if all(one["sampled"]["achieved"] == one["likeliest"]["achieved"] for _, _, here in sweeps for _, one in here):
        decodings = {"sampled": "return"}
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(max(5.8, 2.9 * len(sweeps)), 0.5 + 2.3 * len(decodings)), layout="constrained")
        panels = figure.subplots(len(decodings), len(sweeps), squeeze=False, sharex="col", sharey="col")
        for column, (title, x_label, here) in zip(panels.T, sweeps):
            column[0].set_title(title)
            column[-1].set_xlabel(x_label)
            for panel, decoding in zip(column, decodings):
                draw_panel(panel, [(x, one["method"], one[decoding]["achieved"]) for x, one in here], looks)
                for name, style in (("optimal", "--"), ("behaviour", ":")):
                    exact = sorted({x: one["exact"][name] for x, one in here if one["exact"]}.items())
                    panel.plot(*zip(*exact), color="black", linewidth=0.9, linestyle=style) if exact else None
        for panel, label in zip(panels[:, 0], decodings.values()):
            panel.set_ylabel(label)
        lines = [Line2D([], [], color=looks[m][0], label=NAMES[m]) for m in methods]
        if any(one["exact"] for _, _, here in sweeps for _, one in here):
            lines.append(Line2D([], [], color="black", linestyle="--", label="optimum (exact)"))
            lines.append(Line2D([], [], color="black", linestyle=":", label="behaviour (exact)"))
        figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    return figure


def draw_panel(panel: Any, points: list[tuple[float, str, list[float]]], looks: dict[str, tuple[str, Any]]) -> None:
    """Curves of (x, method, returns of the lanes); methods are set apart a little, so that equal ones can be seen."""
    step = 0.004 * (max(x for x, _, _ in points) - min(x for x, _, _ in points))
    for i, (method, (colour, _)) in enumerate(looks.items()):
        mine = sorted((x, y) for x, name, y in points if name == method)
        if mine:
            mean = np.array([np.mean(y) for _, y in mine])
            std = np.array([np.std(y, ddof=1) if len(y) > 1 else 0.0 for _, y in mine])
            at = np.array([x for x, _ in mine]) + step * (i - len(looks) / 2)
            panel.plot(at, mean, color=colour, linewidth=1.3, marker="o", markersize=2.5)
            panel.fill_between(at, mean - std, mean + std, color=colour, alpha=0.13, linewidth=0)
    panel.spines[["top", "right"]].set_visible(False)


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: per dataset and method the returns of both decodings, the predicted return, the label leakage."""
    rows = [
        "| dataset | method | sampled | likeliest | predicted or target | label leakage (shuffled label), nats |",
        "|---|---|---|---|---|---|",
    ]
    for dataset in sorted({one["dataset"] for one in found}):
        here = {one["method"]: one for one in found if one["dataset"] == dataset}
        exact = next(iter(here.values()))["exact"]
        rows.append(f"| `{dataset}` | | | | | |")
        if exact:
            rcsl = exact["rcsl"][0]
            known = (
                f"optimum {exact['optimal']:.3f}, behaviour {exact['behaviour']:.3f}; target return {rcsl['target']}"
            )
            rows.append(f"| | *exact: {known}* | *{rcsl['sampled']:.3f}* | *{rcsl['likeliest']:.3f}* | | |")
        for method in METHODS:
            if method in here:
                one = here[method]
                sampled, greedy = one["sampled"], one["likeliest"]
                about = greedy["outcome"]
                leakage = (
                    "" if about is None else f"{np.mean(about['label']):.3f} ({np.mean(about['shuffled_label']):.3f})"
                )
                cells = (
                    _spread(sampled["achieved"]),
                    _spread(greedy["achieved"]),
                    _spread(sampled["predicted"]),
                    leakage,
                )
                rows.append(f"| | {NAMES[method]} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _spread(values: Iterable[float] | None) -> str:
    if values is None:
        return ""
    array = np.array(list(values))
    digits = 3 if abs(array).max() < 100 else 0
    return f"{array.mean():.{digits}f} ± {array.std(ddof=1) if len(array) > 1 else 0.0:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument(
        "--updates", type=int, default=400, help="updates of the contrastive networks, on three datasets"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the figures")
    parser.add_argument("--name", default="dichotomy_of_control", help="what the figures' file names begin with")
    arguments = parser.parse_args()
    folders = [run.folder for run in results.runs(arguments.runs) if (run.folder / checkpoint.NAME).exists()]
    found = pooled([probed(folder, arguments.episodes, arguments.updates) for folder in folders])
    arguments.out.mkdir(parents=True, exist_ok=True)
    if figure := draw_returns(found):
        figure.savefig(arguments.out / f"{arguments.name}.png", dpi=170)
    predicting = [
        Probe.from_dict(one["sampled"]) for one in found if one["dataset"] in PREDICTED and one["sampled"]["predicted"]
    ]
    if predicting:
        draw(predicting).savefig(arguments.out / f"{arguments.name}_promises.png", dpi=170)
    print(table(found))


if __name__ == "__main__":
    main()
