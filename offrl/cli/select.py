"""`offrl select`: rank trained policies without the environment, and compare the ranking with true scores."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from offrl import results
from offrl.agents.base import Agent
from offrl.data.dataset import OfflineDataset
from offrl.evaluation.fqe import FQEConfig, fitted_q
from offrl.evaluation.selection import Policy, Selection, judge
from offrl.results import budget, style, tables
from offrl.results.cells import scored
from offrl.results.labels import label_lanes, scale_of
from offrl.training.run_config import resolve_config
from offrl.training.runs import load_agent, read_data, reward_transform, transform_rewards
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError
from offrl.utils.paths import replacing
from offrl.utils.process import pick_device, tune_process
from offrl.utils.progress import Bar

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FQE_OPTIONS: dict[str, type] = {"updates": int, "batch-size": int, "lr": float, "discount": float}
FQE_OPTIONS |= {"target-every": int, "seed": int}
FILES = ("select.md", "select.csv", "select.png")
COLUMNS = ("dataset", "method", "seed", "step", "value", "soft_opc", "td_error", "score", "episodes", "run", "lane")
_Trained = tuple[results.Run, int, Agent]  # a checkpoint: its run, its update and its agent


def select(
    paths: Iterable[Path | str],
    out: Path | str,
    cfg: FQEConfig | None = None,
    all_checkpoints: bool = False,
    device: str = "cpu",
    show: bool = True,
) -> list[Selection]:
    """Rank the policies of all runs in or below the given folders, one ranking per dataset and per `data` options.

    Args:
        out: folder for select.md, select.csv and select.png.
        all_checkpoints: whether to rank the checkpoints kept by `keep_checkpoints=true` too.
        show: whether to print tables and progress.

    Raises:
        OffrlError: no checkpoint, a damaged one, a dataset that is gone or has changed, or `out` can't be written.
    """
    cfg = cfg or FQEConfig()
    paths = [Path(path) for path in paths]
    trained = [run for run in results.runs(paths) if (run.folder / checkpoint.NAME).exists()]
    if not trained:
        raise OffrlError(f"no checkpoint in {', '.join(map(str, paths)) or 'no folder'}: name folders of trained runs.")
    rows = results.read(paths)
    made, notes = [], []
    for dataset, runs in by_data(trained):
        selection, left_out = _rank(dataset, runs, rows, cfg, all_checkpoints, device, show)
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
            writer.writerow(COLUMNS)
            writer.writerows(_record(s.dataset, p) for s in made for p in s.policies)
        style.save(draw(made), folder / "select.png")
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


def by_data(runs: Iterable[results.Run]) -> list[tuple[str, list[results.Run]]]:
    """Runs by what they see of which dataset, with its name, which also says how those of one dataset differ."""
    groups: dict[str, dict[str, list[results.Run]]] = {}
    for run in runs:
        dataset, data = str(run.config.get("dataset")), run.config.get("data") or {}
        ignored = {"cache"} if dataset.startswith("forge/") else {"cache", "size", "seed"}
        ignored -= {"seed"} if data.get("flicker") else set()
        seen = {key: value for key, value in data.items() if key not in ignored and not key.startswith("reward_")}
        same = groups.setdefault(dataset, {})
        same.setdefault(json.dumps(seen, sort_keys=True), []).append(run)
    found = []
    for dataset, same in sorted(groups.items()):
        settings = {key: json.loads(key) for key in same}
        names = sorted({name for each in settings.values() for name in each})
        differ = [name for name in names if len({json.dumps(each.get(name)) for each in settings.values()}) > 1]
        for key, members in sorted(same.items()):
            given = {name: settings[key].get(name) for name in differ}
            how = ", ".join(f"data.{name}={json.dumps(value)}" for name, value in given.items() if value)
            found.append((f"{dataset} ({how})" if how else dataset, members))
    return found


def _rank(
    dataset: str,
    runs: list[results.Run],
    rows: pl.DataFrame,
    cfg: FQEConfig,
    all_checkpoints: bool,
    device: str,
    progress: bool,
) -> tuple[Selection | None, list[str]]:
    """The ranking of a dataset's policies (None: there is none to rank), and notes on runs that were left out."""
    store: OfflineDataset | None = None
    agents: list[_Trained] = []
    notes = []
    fingerprints: dict[tuple[float, float], str] = {}  # by the transform of rewards that methods train with
    for run in runs:
        for path in _checkpoints(run.folder, all_checkpoints):
            metadata, agent = checkpoint.metadata(path), load_agent(path, device)
            if agent.initial_state(1) is not None:
                notes.append(
                    f"Left out, its policy needs more than the observation (the history, or a draw): {run.folder.name}."
                )
                break
            if metadata["config"].get("data", {}).get("tasks"):
                notes.append(
                    "Left out, its lanes have rewards of their own (data.tasks; train with data.task to rank): "
                    f"{run.folder.name}."
                )
                break
            # Rewards as recorded: methods transform them differently.
            train = resolve_config(metadata["config"], trusted=False).train
            store = store or read_data(train, device, run.folder)
            transform = reward_transform(store, train.data)
            if transform not in fingerprints:
                fingerprints[transform] = transform_rewards(store, train.data).fingerprint
            if metadata["fingerprint"] != fingerprints[transform]:
                further = (metadata["config"].get("sampler") or {}).get("datasets")
                why = "trained on further datasets, too" if further else f"trained on other data than {dataset} holds"
                notes.append(f"Left out, {why}: {run.folder.name}.")
                break
            agents.append((run, int(metadata["step"]), agent))
    if store is None or not agents:
        return None, notes
    with Bar(progress, f"fitted Q evaluation, {dataset}", total=cfg.updates) as bar:
        estimates = fitted_q(store, [agent for *_, agent in agents], cfg, bar.track)
    labels = _labels(rows, agents, dataset)
    scores, scale = _scores(rows, runs, dataset)
    policies: list[Policy] = []
    for run, step, agent in agents:
        for lane, seed in enumerate(agent.spec.seeds):
            key, at = (str(run.folder), lane), len(policies)
            numbers = {name: float(getattr(estimates, name)[at]) for name in ("value", "soft_opc", "td_error")}
            episodes = scores.get((*key, step), np.empty(0))
            policies.append(Policy(labels[key], seed, step, run.folder, lane, **numbers, episodes=episodes))
    if lost := sum(not math.isfinite(policy.value) for policy in policies):
        notes.append(
            f"No estimate for {lost} of {len(policies)} policies of {dataset} (fitted Q evaluation diverged): they are ranked "
            "last; lower --lr."
        )
    return judge(dataset, scale, policies, cfg.seed), notes


def _checkpoints(folder: Path, every: bool) -> list[Path]:
    """Files of a run's checkpoints, each once: the last is among the kept ones if these were kept to the end."""
    last = folder / checkpoint.NAME
    kept = sorted((folder / "checkpoints").glob("*.safetensors")) if every else []
    if not kept:
        return [last]
    among = f"{int(checkpoint.metadata(last)['step']):08d}" in {path.stem for path in kept}
    return kept if among else [*kept, last]


def _labels(rows: pl.DataFrame, agents: Sequence[_Trained], dataset: str) -> dict[tuple[str, int], str]:
    """Labels by (folder, lane), as a report of the dataset has them; one without rows has what its run would write."""
    import polars as pl

    names = ("folder", "lane", "dataset", "method", "env_id", "policy_mode")
    schema = {name: pl.Int64 if name == "lane" else pl.String for name in names}
    found = {(str(run.folder), lane): run for run, _, agent in agents for lane in range(agent.spec.lanes)}
    lanes = [
        (*key, dataset, str(run.config.get("method")), _environment(run), "deterministic") for key, run in found.items()
    ]
    unseen = pl.DataFrame(lanes, schema=schema, orient="row").join(rows, on=["folder", "lane"], how="anti")
    mine = pl.col("folder").is_in([folder for folder, _ in found])
    seen = rows.filter(mine).with_columns(dataset=pl.lit(dataset)).select(names)
    labelled = label_lanes(pl.concat([seen, unseen]), [run for run, *_ in agents])
    return {(folder, lane): label for folder, lane, label in labelled.select("folder", "lane", "label").iter_rows()}


def _environment(run: results.Run) -> str | None:
    """The environment in which a run would be evaluated."""
    name = (run.manifest.get("dataset_info") or {}).get("env_id")
    return name if isinstance(name, str) else None


def _scores(rows: pl.DataFrame, runs: list[results.Run], dataset: str) -> tuple[dict[Any, np.ndarray], str]:
    """Scores of episodes by (folder, lane, step), and their scale."""
    import polars as pl

    here = rows.filter(pl.col("folder").is_in([str(run.folder) for run in runs]))
    if not len(here):
        return {}, scale_of(str(runs[0].config.get("dataset")))
    here = scored(here, runs)
    finite = pl.col("value").is_not_nan().all().over("folder", "lane", "step")  # the mean of the others would flatter
    episodes = here.filter(finite).partition_by(["folder", "lane", "step"], as_dict=True)
    return {key: group["value"].to_numpy() for key, group in episodes.items()}, here["scale"][0]


# ---- what is shown -------------------------------------------------------------------------------------------


def _tables(s: Selection) -> list[tables.Table]:
    number = tables.number
    columns = ["", "method", "seed", "update", "FQE value", "soft OPC", "TD error", s.scale, "lane", "run"]
    ranked = []
    for place, p in enumerate(s.policies, start=1):
        estimates = [number(value, 2) for value in (p.value, p.soft_opc, p.td_error)]
        where = [str(p.lane), p.folder.name]
        ranked.append([str(place), p.method, str(p.seed), f"{p.step:,}", *estimates, number(p.score), *where])
    made = [tables.Table(f"Policies of {s.dataset}, best estimate first", columns, ranked, flat=True)]
    if not s.known[1:]:
        return made
    quality = [["policies with a true score", str(len(s.known))], ["Spearman rank correlation", number(s.spearman, 2)]]
    quality += [[f"regret@{k}", number(value, 2)] for k, value in s.regret.items()]
    title = "The ranking against true scores"
    made.append(tables.Table(title, ["dataset", "", "value"], [[s.dataset, *row] for row in quality]))
    spent = [
        [f"best of {k} configurations", f"{s.uniform[k - 1]:.1f} ± {s.spread[k - 1]:.1f}", number(s.selected[k - 1])]
        for k in budget.KS
        if k <= len(s.ks)
    ]
    if s.bandit:
        for pulls in budget.PULLS:
            at = s.bandit.mean[pulls - 1], s.bandit.low[pulls - 1], s.bandit.high[pulls - 1]
            spent.append([f"{pulls} episodes by UCB", "{:.1f} ({:.1f} to {:.1f})".format(*at), ""])
        spent.append([f"best of {s.bandit.k} policies, known exactly", number(s.bandit.limit), ""])
    columns = ["dataset", "online budget", "expected, drawn uniformly", "chosen by the estimates"]
    made.append(tables.Table("What online evaluations buy", columns, [[s.dataset, *row] for row in spent]))
    return made


def _legend(cfg: FQEConfig) -> list[str]:
    copies, needed = cfg.updates // cfg.target_every, 3 / max(1e-9, 1 - cfg.discount)
    short = f"Not converged: {copies} copies to the target for a horizon of {needed / 3:.0f} steps; raise --updates."
    return [
        *([short] if copies < needed else []),
        f"FQE value: discounted (gamma {cfg.discount:g}) value of the policy at the starts of held-out episodes, estimated "
        f"from the dataset alone ({cfg.updates:,} updates). Compare ranks, not amounts.",
        "regret@k: the loss when only the k policies with the best estimates are evaluated; 0 none, 1 all.",
        "Best of k: mean ± std of one practitioner's best of k configurations (averaged over seeds), drawn with replacement. "
        "UCB: at most 8 policies per trial, scores not rescaled; the interval is over resampled policies.",
    ]


def _record(dataset: str, p: Policy) -> list[Any]:
    numbers = [p.value, p.soft_opc, p.td_error, "" if math.isnan(p.score) else p.score]
    return [dataset, p.method, p.seed, p.step, *numbers, len(p.episodes), p.folder.name, p.lane]


def draw(made: Sequence[Selection]) -> Figure:
    """A row per dataset: true score against estimate, best-of-k curves, and the bandit's curve."""
    with style.sheet(len(made), 3, (9.3, 2.6 * len(made))) as (figure, panels):
        for s, (scatter, best, bandit) in zip(made, panels):
            _draw_ranking(scatter, s)
            if s.ks:
                _draw_best(best, s)
            if s.bandit:
                bandit.semilogx(s.bandit.pulls, s.bandit.mean, color=style.GREEN)
                style.band(bandit, s.bandit.pulls, s.bandit.low, s.bandit.high, style.GREEN)
                bandit.axhline(s.bandit.limit, color="0.4", linewidth=0.8, linestyle=style.DOTTED)
                bandit.set(xlabel="episodes spent by UCB", ylabel=f"recommended {s.scale}")
            for panel in (scatter, best, bandit):
                style.tidy(panel)
    return figure


def _draw_ranking(panel: Axes, s: Selection) -> None:
    looks = style.looks_of(sorted({p.method for p in s.known}))
    for method, (colour, _) in looks.items():
        mine = [p for p in s.known if p.method == method]
        values, scores = [p.value for p in mine], [p.score for p in mine]
        panel.plot(values, scores, "o", label=method, color=colour, markersize=3.5, alpha=0.8)
    panel.set(xlabel="FQE value", ylabel=s.scale, title=s.dataset)
    if 1 < len(looks) <= 8:
        panel.legend(frameon=False, fontsize=6)


def _draw_best(panel: Axes, s: Selection) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.plot(s.ks, s.uniform, "o-", markersize=3, color=style.BLUE, label="drawn uniformly")
    style.band(panel, s.ks, s.uniform - s.spread, s.uniform + s.spread, style.BLUE)
    panel.plot(s.ks, s.selected, "s--", markersize=3, color=style.ORANGE, label="chosen by the estimates")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set(xlabel="configurations evaluated", ylabel=f"best {s.scale}")
    panel.legend(frameon=False, fontsize=6)


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
    parser.add_argument("--all-checkpoints", action="store_true", help="rank those of keep_checkpoints=true too")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default auto: a GPU where there is one)")
    for option, kind in FQE_OPTIONS.items():  # FQEConfig has their defaults
        parser.add_argument(
            f"--{option}", type=kind, default=argparse.SUPPRESS, help="see FQEConfig in offrl/evaluation/fqe.py"
        )
    parser.add_argument("--hidden", type=int, nargs="+", default=argparse.SUPPRESS, help="widths of its network")
    parser.set_defaults(run=_command)


def _command(arguments: argparse.Namespace) -> int:
    tune_process(1)
    names = [*(option.replace("-", "_") for option in FQE_OPTIONS), "hidden"]
    cfg = FQEConfig(**{name: getattr(arguments, name) for name in names if hasattr(arguments, name)})
    sizes = (cfg.updates, cfg.batch_size, cfg.target_every, *cfg.hidden)
    if not all(1 <= size < 2**31 for size in sizes) or not 0 <= cfg.seed < 2**63:
        raise OffrlError(
            "--updates, --batch-size, --target-every and --hidden should be from 1 to 2^31, --seed from 0."
        )
    if not (0 < cfg.lr < math.inf and 0 <= cfg.discount <= 1):
        raise OffrlError(f"--lr {cfg.lr} --discount {cfg.discount}: lr should be above 0, discount from 0 to 1.")
    out = arguments.out or (arguments.runs[0] / "select" if len(arguments.runs) == 1 else Path("select"))
    select(arguments.runs, out, cfg, arguments.all_checkpoints, str(pick_device(arguments.device or "auto")))
    return 0
