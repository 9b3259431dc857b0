"""Contents of a dataset: numbers (`describe`), tables for the terminal (`print_info`) and a figure (`plot`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from offrl.cli.sampler_stats import describe_draws, draws_table, fallbacks, plot_bands, plot_concentration
from offrl.data.dataset import OfflineDataset
from offrl.data.statistics import return_spread
from offrl.results import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUANTILES = {"min": 0.0, "q10": 0.1, "q25": 0.25, "median": 0.5, "q75": 0.75, "q90": 0.9, "max": 1.0}
ENDS = ("terminated", "truncated", "unfinished")
SHOWN_DIMENSIONS = 40


def describe(store: OfflineDataset) -> dict[str, Any]:
    """Counts, lengths, returns, scores and ranges as plain numbers, fit for JSON.

    Lengths are steps of the environment and include a tail (a step whose successor is unknown). `score` is the behaviour's
    normalised score over episodes, None without references (D4RL's AntMaze files count every step at the goal, so theirs is
    no success rate). `positive_sided_variance` is mean(max(G - mean(G), 0)^2) over episodes (Hong et al. 2023), which measures
    how much a few good episodes stand out; G is normalised by the references (score / 100), without them to [0, 1], as
    `normalisation` says. `samplers`: see `offrl.cli.sampler_stats`.
    """
    info, returns = store.info, store.returns.cpu()
    steps = store.steps.double().cpu()
    scores = info.normalized(returns)
    ends = episode_ends(store)
    counts = {end: int((ends == index).sum()) for index, end in enumerate(ENDS)}
    return {
        "id": info.id,
        "source": info.source,
        "family": info.family,
        "env_id": info.env_id,
        "references": None if scores is None else [info.ref_min, info.ref_max],
        "max_episode_steps": info.max_episode_steps,
        "transitions": len(store),
        "episodes": store.episodes,
        "observation_dimensions": store.obs_dim,
        "action_dimensions": store.action_dim,
        "discrete_actions": info.discrete is not None,
        "action_bounds": None if info.discrete else [info.action_low, info.action_high],
        "megabytes": round(store.nbytes / 1e6, 1),
        "fingerprint": store.fingerprint,
        "ends": counts,
        "terminal_share": float(store.terminations.double().mean()),
        "terminated_episodes_share": counts["terminated"] / store.episodes,
        "truncated_episodes_share": counts["truncated"] / store.episodes,
        "lengths": _summary(steps),
        "returns": _summary(returns),
        "score": None if scores is None else _summary(scores),
        "positive_sided_variance": return_spread(store),
        "normalisation": "returns scaled to [0, 1]" if scores is None else "normalised scores / 100",
        "samplers": describe_draws(store),
        "rewards": _columns(store.rewards[:, None])[0],
        "observations": _columns(store.observations),
        "actions": _discrete(store) if info.discrete else _columns(store.actions),
        "provenance": info.provenance,
    }


def episode_ends(store: OfflineDataset) -> Tensor:
    """`[E]` int64 index into `ENDS`: the kind of end of each episode.

    A termination counts at the last known step only (AntMaze's flags also mark the goal within an episode).
    """
    terminated = (store.terminations[store.offsets[1:] - 1] > 0) & ~store.has_tail
    ends = torch.where(store.complete, 1, 2)
    return torch.where(terminated, 0, ends).cpu()


def _summary(values: Tensor) -> dict[str, float]:
    array = values.double().cpu().numpy()
    quantiles = np.quantile(array, list(QUANTILES.values()))
    return dict(zip(QUANTILES, quantiles.tolist())) | {"mean": float(array.mean()), "std": float(array.std())}


def _columns(values: Tensor) -> list[dict[str, Any]]:
    """Range, mean and std of every column, and whether it is constant (float64 sums in blocks)."""
    low, high = values.amin(0).double(), values.amax(0).double()
    mean = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
    square = torch.zeros_like(mean)
    for block in values.split(65_536):
        mean += block.double().sum(0)
    mean /= len(values)
    for block in values.split(65_536):
        square += (block.double() - mean).square().sum(0)
    std = (square / len(values)).sqrt()
    rows = zip(low.tolist(), mean.tolist(), std.tolist(), high.tolist())
    return [{"min": a, "mean": m, "std": s, "max": b, "constant": a == b} for a, m, s, b in rows]


def _discrete(store: OfflineDataset) -> list[dict[str, Any]]:
    shares = torch.bincount(store.actions, minlength=store.action_dim).double() / len(store)
    return [{"action": index, "share": share} for index, share in enumerate(shares.tolist())]


# ---- tables ------------------------------------------------------------------------------------------------------


def print_info(description: dict[str, Any]) -> None:
    """Print what `describe` returned as tables."""
    from rich.console import Console
    from rich.table import Table

    console, d = Console(markup=False), description  # a name may have brackets
    metadata = Table(title=d["id"], title_style="bold", title_justify="left", show_header=False, box=None)
    metadata.add_column(no_wrap=True)
    metadata.add_column(overflow="fold")
    ends = ", ".join(f"{count:,} {end}" for end, count in d["ends"].items() if count)
    metadata.add_row("transitions", f"{d['transitions']:,} ({d['megabytes']} MB)")
    metadata.add_row("episodes", f"{d['episodes']:,} ({ends})")
    kind = "discrete" if d["discrete_actions"] else "numbers"
    metadata.add_row("observation, action", f"{d['observation_dimensions']} numbers, {d['action_dimensions']} {kind}")
    metadata.add_row("terminal share", f"{d['terminal_share']:.4%} of transitions")
    if d["score"] is not None:
        metadata.add_row(
            "behaviour's score",
            f"{d['score']['mean']:.1f} (0 is a return of {d['references'][0]:g}, 100 of {d['references'][1]:g})",
        )
    for row in _exact_rows(d["provenance"].get("exact")):
        metadata.add_row(*row)
    metadata.add_row("positive-sided variance", f"{d['positive_sided_variance']:.4g} (of {d['normalisation']})")
    metadata.add_row("environment", f"{d['env_id'] or 'none'} (family {d['family']})")
    metadata.add_row("source", d["source"])
    metadata.add_row("fingerprint", d["fingerprint"])
    console.print(metadata)

    keys = ("min", "q10", "median", "q90", "max", "mean", "std")
    spread = Table("per episode", *keys)
    for name in ("lengths", "returns", "score"):
        if d[name] is not None:
            spread.add_row(name, *(_short(d[name][key]) for key in keys))
    console.print(spread)

    console.print(draws_table(d["samplers"]))
    for line in fallbacks(d["samplers"]):
        console.print(line, style="dim", highlight=False)

    ranges = Table("dimension", "min", "mean", "std", "max", "")
    groups = {"reward": [d["rewards"]], "action": d["actions"], "observation": d["observations"]}
    for name, rows in groups.items():
        for index, row in enumerate(rows[:SHOWN_DIMENSIONS]):
            label = name if name == "reward" else f"{name} {index}"
            if "share" in row:
                ranges.add_row(label, "", f"{row['share']:.1%}", "", "", "of transitions")
            else:
                cells = [_short(row[key]) for key in ("min", "mean", "std", "max")]
                ranges.add_row(label, *cells, "constant" if row["constant"] else "")
        if len(rows) > SHOWN_DIMENSIONS:
            ranges.add_row(f"{name} ...", "", "", "", "", f"{len(rows) - SHOWN_DIMENSIONS} more with --json")
    console.print(ranges)


def _exact_rows(exact: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Exact values for the dataset of a tabular task."""
    if exact is None:
        return
    words = {
        "optimal": "the best policy",
        "state_optimal": "the best policy that sees the state",
        "behaviour": "the behaviour",
        "one_step_improvement": "one step of improvement",
        "uniform": "uniform actions",
    }
    yield "exact returns", ", ".join(f"{exact[key]:.4g} of {text}" for key, text in words.items() if key in exact)
    for rcsl in exact.get("rcsl", []):
        yield (
            f"exact RCSL on {rcsl['target']}",
            f"{rcsl['sampled']:.4g} sampled, {rcsl['likeliest']:.4g} likeliest action "
            f"(the behaviour returns {rcsl['target']} with probability {rcsl['probability']:.3g})",
        )


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# ---- figure ------------------------------------------------------------------------------------------------------

END_COLOURS = (style.BLUE, style.YELLOW, style.GREY)  # of `ENDS`
MARK = "#222222"  # means and limits
RC = {"font.size": 10}  # the panels are larger than a report's
DENSITY_ROWS = 200_000  # rows of a heat map; more do not change it


def plot(store: OfflineDataset, path: Path) -> None:
    """Write a PNG of eight panels: returns, lengths, returns in the file's order, rewards, actions, observations, and two of
    the sampling distributions."""
    with style.sheet(2, 4, (20, 8.6), RC) as (figure, axes):
        _draw(store, figure, axes)
    style.save(figure, path, dpi=110)


def _draw(store: OfflineDataset, figure: Figure, axes: Any) -> None:
    _plot_returns(axes[0, 0], store)
    _plot_lengths(axes[0, 1], store)
    _plot_order(axes[0, 2], store)
    _plot_rewards(axes[1, 0], store)
    _plot_actions(axes[1, 1], store)
    _plot_observations(axes[1, 2], store)
    plot_concentration(axes[0, 3], store)
    style.label(axes[0, 3], "Sampling of the best trajectories", "best trajectories (log)", "share of draws")
    plot_bands(axes[1, 3], describe_draws(store))
    style.label(axes[1, 3], "Samples by return", "share of draws", "")
    for panel, pad in ((axes[0, 3], 36), (axes[1, 3], 22)):  # legends stand above
        panel.set_title(panel.get_title(loc="left"), loc="left", fontsize=11, fontweight="bold", pad=pad)
    axes[1, 3].grid(False)
    score = store.info.normalized(store.returns)
    if score is not None:
        for panel in axes[0]:  # level with the panel that has a second axis above
            panel.set_title(panel.get_title(loc="left"), loc="left", fontsize=11, fontweight="bold", pad=36)
    parts = [f"{len(store):,} transitions", f"{store.episodes:,} episodes"]
    parts += [f"{store.obs_dim} observation and {store.action_dim} action dimensions"]
    if store.info.discrete:
        parts[-1] = f"{store.obs_dim} observation dimensions, {store.action_dim} discrete actions"
    parts += [] if score is None else [f"behaviour's normalised score {float(score.mean()):.1f}"]
    figure.suptitle(f"{store.info.id}\n", fontsize=15, fontweight="bold", x=0.01, ha="left")
    figure.text(0.0105, 0.945, "   |   ".join(parts), fontsize=11, color="#444444")


def _bins(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Edges that suit the number of values, and are wide enough to see when all values are equal."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, int(np.clip(2 * len(values) ** 0.5, 12, 60)) + 1)


def _stacked(axes: Axes, values: np.ndarray, ends: np.ndarray, edges: np.ndarray) -> None:
    """Histogram, stacked by the kind of end of the episodes."""
    present = [index for index in range(len(ENDS)) if (ends == index).any()]
    axes.hist(
        [values[ends == index] for index in present],
        bins=edges.tolist(),
        stacked=True,
        color=[END_COLOURS[index] for index in present],
        label=[f"{ENDS[index]} ({int((ends == index).sum()):,})" for index in present],
    )


def _plot_returns(axes: Axes, store: OfflineDataset) -> None:
    info, returns, ends = store.info, store.returns.cpu().numpy(), episode_ends(store).numpy()
    _stacked(axes, returns, ends, _bins(returns, returns.min(), returns.max()))
    axes.axvline(returns.mean(), color=MARK, linewidth=1.6, label=f"mean {_short(returns.mean())}")
    style.label(axes, "Returns", "return of an episode", "episodes")
    axes.legend(facecolor="white", framealpha=0.85, edgecolor="none", fontsize=9)
    if info.ref_min is not None and info.ref_max is not None:
        low, span = info.ref_min, (info.ref_max - info.ref_min) / 100
        top = axes.secondary_xaxis(
            "top", functions=(lambda value: (np.asarray(value) - low) / span, lambda s: low + np.asarray(s) * span)
        )
        top.set_xlabel("normalised score", fontsize=9)
        top.tick_params(labelsize=9)


def _plot_lengths(axes: Axes, store: OfflineDataset) -> None:
    steps = store.steps.cpu().numpy()
    limit = store.info.max_episode_steps
    # A limit far beyond the longest episode would squeeze the histogram.
    shown = limit if limit and limit <= 3 * steps.max() else None
    _stacked(axes, steps, episode_ends(store).numpy(), _bins(steps, 0, max(steps.max(), shown or 0) * 1.02))
    if shown:
        axes.axvline(shown, color=MARK, linewidth=1.2, linestyle=":", label=f"time limit {shown:,}")
    style.label(axes, "Lengths", "steps of an episode", "episodes")
    axes.legend(facecolor="white", framealpha=0.85, edgecolor="none", fontsize=9)


def _plot_order(axes: Axes, store: OfflineDataset) -> None:
    """Return against the position in the file: it rises in a replay buffer and is level in a policy's rollouts."""
    returns, ends = store.returns.cpu().numpy(), episode_ends(store).numpy()
    first = store.offsets[:-1].cpu().numpy()
    size = float(np.clip(6000 / store.episodes, 3, 20))
    for index, colour in enumerate(END_COLOURS):
        chosen = ends == index
        axes.scatter(first[chosen], returns[chosen], s=size, color=colour, alpha=0.5, linewidths=0)
    blocks = min(30, store.episodes // 10)
    if blocks >= 2:
        groups = np.array_split(np.arange(store.episodes), blocks)
        places, means = [first[group].mean() for group in groups], [returns[group].mean() for group in groups]
        axes.plot(places, means, color=MARK, linewidth=1.8, label=f"mean of about {len(groups[0]):,} episodes")
        axes.legend(facecolor="white", framealpha=0.85, edgecolor="none", fontsize=9, loc="upper left")
    style.label(axes, "Returns in the file's order", "first transition of the episode", "return")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:.0f}")


def _plot_rewards(axes: Axes, store: OfflineDataset) -> None:
    rewards = store.rewards.cpu().numpy()
    axes.hist(rewards, bins=_bins(rewards, float(rewards.min()), float(rewards.max())).tolist(), color=END_COLOURS[0])
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.8)
    axes.axvline(float(rewards.mean()), color=MARK, linewidth=1.6, label=f"mean {_short(float(rewards.mean()))}")
    style.label(axes, "Rewards", "reward of a step", "transitions (log)")
    axes.legend(facecolor="white", framealpha=0.85, edgecolor="none", fontsize=9)


def _plot_actions(axes: Axes, store: OfflineDataset) -> None:
    if store.info.discrete:
        shares = torch.bincount(store.actions, minlength=store.action_dim).cpu().numpy() / len(store)
        axes.bar(np.arange(store.action_dim), shares, color=END_COLOURS[0])
        style.label(axes, "Actions", "action", "share of transitions")
        return
    _density(axes, _thinned(store.actions), *store.info.action_range)
    style.label(axes, "Actions (darker: more transitions)", "value", "dimension")
    axes.grid(False)


def _plot_observations(axes: Axes, store: OfflineDataset) -> None:
    """Density of every dimension in units of its own std, with its range at the right."""
    mean, std = (tensor.cpu() for tensor in store.observation_statistics())
    scaled = (torch.from_numpy(_thinned(store.observations)) - mean) / torch.where(std > 0, std, 1.0)
    _density(axes, scaled.numpy(), -4.0, 4.0)
    style.label(axes, "Observations (darker: more transitions)", "stds from the dimension's mean", "dimension")
    axes.grid(False)
    low, high = store.observations.amin(0).tolist(), store.observations.amax(0).tolist()
    if store.obs_dim <= SHOWN_DIMENSIONS:
        for index, (a, b) in enumerate(zip(low, high)):
            text = f"constant {a:.3g}" if a == b else f"{a:.3g} .. {b:.3g}"
            axes.text(4.15, index, text, fontsize=8, va="center", color="#444444", clip_on=False)


def _thinned(values: Tensor) -> np.ndarray:
    return values[:: max(1, len(values) // DENSITY_ROWS)].cpu().numpy()


def _density(axes: Axes, values: np.ndarray, low: float, high: float) -> None:
    """Heat map with a row per dimension: share of transitions per bin (square-root colours show rare values)."""
    edges = np.linspace(low, high, 82)
    share = np.stack([np.histogram(np.clip(column, low, high), edges)[0] for column in values.T]) / len(values)
    rows = np.arange(len(share) + 1) - 0.5
    mesh = axes.pcolormesh(edges, rows, np.sqrt(share), cmap="Blues", rasterized=True)
    mesh.set_clim(0, float(np.sqrt(np.quantile(share, 0.995))) or 1.0)
    if len(share) <= SHOWN_DIMENSIONS:
        axes.hlines(rows[1:-1], low, high, color="white", linewidth=2)
        axes.set_yticks(range(0, len(share), 1 + len(share) // 20))
    axes.set_ylim(rows[-1], rows[0])
