"""`offrl select`: rank trained policies without the environment, and compare with true scores where there are some."""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import track

from offrl import results
from offrl.agents.base import Agent
from offrl.data.dataset import OfflineDataset
from offrl.evaluation.fqe import FQEConfig, fitted_q
from offrl.evaluation.selection import Policy, Selection, judge
from offrl.results import budget, figures, tables
from offrl.results.labels import label_lanes, scale_of
from offrl.training.run_config import resolve_config
from offrl.training.runs import load_agent, read_data
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError
from offrl.utils.paths import replacing
from offrl.utils.process import tune_process

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FQE_OPTIONS: dict[str, type] = {"updates": int, "batch-size": int, "lr": float, "discount": float}
FQE_OPTIONS |= {"target-every": int, "seed": int}


FILES = ("select.md", "select.csv", "select.png")


def select(
    paths: Iterable[Path | str],
    out: Path | str,
    cfg: FQEConfig | None = None,
    all_checkpoints: bool = False,
    device: str = "cpu",
    show: bool = True,
) -> list[Selection]:
    """Rank the policies of all runs in or below the given folders, one ranking per dataset.

    Args:
        out: folder for select.md, select.csv and select.png.
        all_checkpoints: also those that `keep_checkpoints=true` has kept.

    Raises:
        OffrlError: no checkpoint, a damaged one, a dataset that is gone or has changed, or `out` can't be written.
    """
    cfg = cfg or FQEConfig()
    by_dataset: dict[str, list[results.Run]] = {}
    paths = [Path(path) for path in paths]
    for run in results.runs(paths):
        if (run.folder / checkpoint.NAME).exists():
            by_dataset.setdefault(str(run.config.get("dataset")), []).append(run)
    if not by_dataset:
        raise OffrlError(f"no checkpoint in {', '.join(map(str, paths)) or 'no folder'}: name folders of trained runs.")
    rows = results.read(paths)
    made, notes = [], []
    for dataset, runs in sorted(by_dataset.items()):
        selection, left_out = _rank(dataset, runs, rows, cfg, all_checkpoints, device)
        notes += left_out
        if selection:
            made.append(selection)
    if not made:
        raise OffrlError(f"nothing to rank: {' '.join(notes)}")
    shown = [table for selection in made for table in _tables(selection)]
    text = "\n".join(
        ["# Selection\n", *(t.markdown() for t in shown), "![curves](select.png)\n", *_legend(cfg), *notes]
    )
    folder = Path(out)
    try:
        with replacing(folder / "select.md") as path:
            path.write_text(text + "\n", encoding="utf-8")
        with replacing(folder / "select.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            columns = ("dataset", "method", "seed", "step", "value", "soft_opc", "td_error", "score", "episodes", "run")
            writer.writerow(columns)
            writer.writerows(_record(s.dataset, p) for s in made for p in s.policies)
        with replacing(folder / "select.png") as path:
            draw(made).savefig(path, format="png", dpi=200, bbox_inches="tight")
    except OSError as error:
        raise OffrlError(f"{out} could not be written ({error.strerror or error}): choose another --out.") from error
    if show:
        console = Console(soft_wrap=True, markup=False, highlight=False)
        for table in shown:
            console.print(tables.layout(table))
        for line in [*_legend(cfg), *notes, f"Written to {folder}: {', '.join(FILES)}"]:
            console.print(line, style="dim")
    return made


# ---- from runs to policies -----------------------------------------------------------------------------------


def _rank(
    dataset: str, runs: list[results.Run], rows: Any, cfg: FQEConfig, all_checkpoints: bool, device: str
) -> tuple[Selection | None, list[str]]:
    import polars as pl

    store: OfflineDataset | None = None
    agents: list[tuple[results.Run, int, Agent]] = []
    notes = []
    for run in runs:
        for path in _checkpoints(run.folder, all_checkpoints):
            metadata, agent = checkpoint.metadata(path), load_agent(path, device)
            if agent.initial_state(1) is not None:
                notes.append(f"Left out, it acts by its history: {run.folder.name}.")
                break
            store = store or _data(metadata, device)
            if metadata["fingerprint"] != store.fingerprint:
                notes.append(f"Left out, trained on other data than {dataset} holds: {run.folder.name}.")
                break
            agents.append((run, int(metadata["step"]), agent))
    if store is None or not agents:
        return None, notes
    estimates = fitted_q(store, [agent for *_, agent in agents], cfg, _tracker(dataset, cfg.updates))
    here = rows.filter(pl.col("folder").is_in([str(run.folder) for run in runs]))
    labels = {(f, lane): label for f, lane, _, label in label_lanes(here, runs).iter_rows()} if len(here) else {}
    unscored = here.filter(pl.col("normalized").is_null() & pl.col("return_raw").is_not_nan())
    column = "return_raw" if len(unscored) else "normalized"
    scores = {
        (folder, lane, step): group[column].drop_nulls().to_numpy()
        for (folder, lane, step), group in here.partition_by(["folder", "lane", "step"], as_dict=True).items()
    }
    policies, at = [], 0
    for run, step, agent in agents:
        for lane, seed in enumerate(agent.spec.seeds):
            key = (str(run.folder), lane)
            numbers = {name: float(getattr(estimates, name)[at]) for name in ("value", "soft_opc", "td_error")}
            label = labels.get(key, str(run.config.get("label") or run.config.get("method")))
            policies.append(
                Policy(label, seed, step, run.folder, **numbers, episodes=scores.get((*key, step), np.empty(0)))
            )
            at += 1
    scale = "return" if len(unscored) else scale_of(dataset)
    return judge(dataset, scale, policies, cfg.seed), notes


def _checkpoints(folder: Path, every: bool) -> list[Path]:
    """Files of a run's checkpoints; the last one stands among those that were kept."""
    kept = sorted((folder / "checkpoints").glob("*.safetensors")) if every else []
    return kept or [folder / checkpoint.NAME]


def _data(metadata: dict[str, Any], device: str) -> OfflineDataset:
    """The dataset that a checkpoint was trained on, with its rewards as recorded: methods transform them differently."""
    return read_data(resolve_config(metadata["config"], trusted=False).train, device)


def _tracker(dataset: str, updates: int) -> Any:
    def tracker(steps: Iterable[int]) -> Iterable[int]:
        quiet = not sys.stderr.isatty()
        return track(steps, f"fitted Q evaluation, {dataset}", updates, console=Console(stderr=True), disable=quiet)

    return tracker


# ---- what is shown -------------------------------------------------------------------------------------------


def _tables(s: Selection) -> list[tables.Table]:
    def text(value: float, digits: int = 1) -> str:
        return "–" if math.isnan(value) else f"{value:.{digits}f}"

    rows = [
        [
            p.method,
            str(p.seed),
            f"{p.step:,}",
            text(p.value, 2),
            text(p.soft_opc, 2),
            text(p.td_error, 2),
            text(p.score),
        ]
        for p in s.policies
    ]
    columns = ["", "method", "seed", "update", "FQE value", "soft OPC", "TD error", s.scale]
    ranked = [[str(i), *row] for i, row in enumerate(rows, start=1)]
    made = [
        tables.Table(
            f"Policies of {s.dataset}, best estimate first", columns, ranked, [set() for _ in ranked], flat=True
        )
    ]
    if not s.known[1:]:
        return made
    metadata = [["policies with a true score", str(len(s.known))], ["Spearman rank correlation", text(s.spearman, 2)]]
    metadata += [[f"regret@{k}", text(value, 2)] for k, value in s.regret.items()]
    metadata = [[s.dataset, *row] for row in metadata]
    made.append(
        tables.Table("The ranking against true scores", ["dataset", "", "value"], metadata, [set() for _ in metadata])
    )
    ks = [k for k in budget.KS if k <= len(s.ks)]
    spent = [
        [
            s.dataset,
            f"best of {k} configurations",
            f"{s.uniform[k - 1]:.1f} ± {s.spread[k - 1]:.1f}",
            text(s.selected[k - 1]),
        ]
        for k in ks
    ]
    if s.bandit:
        for pulls in budget.PULLS:
            at = s.bandit.mean[pulls - 1], s.bandit.low[pulls - 1], s.bandit.high[pulls - 1]
            spent.append([s.dataset, f"{pulls} episodes by UCB", "{:.1f} ({:.1f} to {:.1f})".format(*at), ""])
        spent.append([s.dataset, f"best of {s.bandit.k} policies, known exactly", text(s.bandit.limit), ""])
    columns = ["dataset", "online budget", "expected, chosen blindly", "chosen by the estimates"]
    made.append(tables.Table("What online evaluations buy", columns, spent, [set() for _ in spent]))
    return made


def _legend(cfg: FQEConfig) -> list[str]:
    copies, needed = cfg.updates // cfg.target_every, 3 / max(1e-9, 1 - cfg.discount)
    short = f"Not converged: {copies} copies to the target for a horizon of {needed / 3:.0f} steps; raise --updates."
    return [
        *([short] if copies < needed else []),
        f"FQE value: discounted (gamma {cfg.discount:g}) value of the policy at the starts of held-out episodes, from the data "
        f"alone ({cfg.updates:,} updates). Compare ranks, not amounts.",
        "regret@k: what is lost when only the k policies with the best estimates are evaluated; 0 nothing, 1 everything.",
        "Best of k: mean ± deviation of one practitioner's best of k configurations (their seeds averaged), drawn with "
        "replacement. UCB: at most 8 policies a trial, scores as they are; the interval is over redrawn policies.",
    ]


def _record(dataset: str, p: Policy) -> list[Any]:
    numbers = [p.value, p.soft_opc, p.td_error, "" if math.isnan(p.score) else p.score]
    return [dataset, p.method, p.seed, p.step, *numbers, len(p.episodes), p.folder.name]


def draw(made: Sequence[Selection]) -> Figure:
    """A row per dataset: true score against estimate, best-of-k curves, and the bandit's."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(9.3, 2.6 * len(made)), layout="constrained")
        for s, row in zip(made, figure.subplots(len(made), 3, squeeze=False)):
            methods = sorted({p.method for p in s.known})
            for i, method in enumerate(methods):
                mine = [p for p in s.known if p.method == method]
                style = {"color": figures.COLOURS[i % 8], "markersize": 3.5, "alpha": 0.8}
                row[0].plot([p.value for p in mine], [p.score for p in mine], "o", label=method, **style)
            row[0].set(xlabel="FQE value", ylabel=s.scale, title=s.dataset)
            if 1 < len(methods) <= 8:
                row[0].legend(frameon=False, fontsize=6)
            if s.ks:
                row[1].plot(s.ks, s.uniform, "o-", markersize=3, color=figures.COLOURS[0], label="chosen blindly")
                low, high = s.uniform - s.spread, s.uniform + s.spread
                row[1].fill_between(s.ks, low, high, color=figures.COLOURS[0], alpha=0.15, linewidth=0)
                colour = figures.COLOURS[1]
                row[1].plot(s.ks, s.selected, "s--", markersize=3, color=colour, label="chosen by the estimates")
                row[1].xaxis.get_major_locator().set_params(integer=True)
                row[1].set(xlabel="configurations evaluated", ylabel=f"best {s.scale}")
                row[1].legend(frameon=False, fontsize=6)
            if s.bandit:
                b = s.bandit
                row[2].semilogx(b.pulls, b.mean, color=figures.COLOURS[2])
                row[2].fill_between(b.pulls, b.low, b.high, color=figures.COLOURS[2], alpha=0.15, linewidth=0)
                row[2].axhline(b.limit, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)))
                row[2].set(xlabel="episodes spent by UCB", ylabel=f"recommended {s.scale}")
            for panel in row:
                figures.tidy(panel)
    return figure


def add_parser(subparsers: Any) -> None:
    """Add `offrl select`; the parsed arguments carry `run`, which returns the exit status."""
    parser = subparsers.add_parser(
        "select",
        help="rank trained policies without the environment",
        description="Rank the policies of all runs in or below the given folders by fitted Q evaluation on their dataset.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders of runs, or folders above them")
    parser.add_argument(
        "--out", type=Path, help="where to write (default: `select` in the folder, or here for several)"
    )
    parser.add_argument("--all-checkpoints", action="store_true", help="those of keep_checkpoints=true as well")
    parser.add_argument("--device", help="of fitted Q evaluation (default: a GPU where there is one)")
    for option, kind in FQE_OPTIONS.items():  # their defaults stand in offrl/ope.py
        parser.add_argument(f"--{option}", type=kind, default=argparse.SUPPRESS, help="see FQEConfig in offrl/ope.py")
    parser.add_argument("--hidden", type=int, nargs="+", default=argparse.SUPPRESS, help="widths of its network")
    parser.set_defaults(run=_command)


def _command(arguments: argparse.Namespace) -> int:
    import torch

    tune_process(1)
    names = [*(option.replace("-", "_") for option in FQE_OPTIONS), "hidden"]
    cfg = FQEConfig(**{name: getattr(arguments, name) for name in names if hasattr(arguments, name)})
    if min(cfg.updates, cfg.batch_size, cfg.target_every) < 1:
        raise OffrlError("--updates, --batch-size and --target-every should be at least 1.")
    out = arguments.out or (arguments.runs[0] / "select" if len(arguments.runs) == 1 else Path("select"))
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    select(arguments.runs, out, cfg, arguments.all_checkpoints, device)
    return 0
