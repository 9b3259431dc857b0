"""Sampling distributions on a dataset: numbers, a table and two panels for `offrl data info`."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offrl import sampling
from offrl.data.dataset import OfflineDataset
from offrl.results import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

# Bands of trajectories from the best return to the worst: upper ends, as shares of the number of trajectories.
BANDS = {"best 1%": 0.01, "1-10%": 0.1, "10-25%": 0.25, "25-50%": 0.5, "worst half": 1.0}
LINE_COLOURS = (style.GREY, style.BLUE, style.YELLOW, style.GREEN)
BAND_COLOURS = ("#08306B", "#2B6CB0", "#6BAED6", "#BDD7EE", "#E4E4E4")


def sampling_distributions(store: OfflineDataset) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """By sampler with default settings: probability of each trajectory, `[E]` float64, and the sampler's metadata."""
    made: dict[str, tuple[Tensor, dict[str, Any]]] = {}
    uniform = sampling.EpisodeWeighted(store, torch.ones(store.episodes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the metadata has the fallback
        samplers = [sampling.ReturnWeighted(store), sampling.AdvantageWeighted(store), sampling.TopPercent(store)]
    for sampler in (uniform, *samplers):
        mass = sampler.weights * store.lengths
        name = "uniform" if sampler is uniform else type(sampler).label(sampler.Config())
        made[name] = ((mass / mass.sum()).cpu(), sampler.metadata())
    return made


def describe_draws(store: OfflineDataset) -> dict[str, Any]:
    """By sampler: effective sample size, its share of the dataset, probability of each band, and fallbacks."""
    order = store.returns.cpu().argsort(descending=True, stable=True)
    place = (torch.arange(store.episodes) + 0.5) / store.episodes
    band = torch.bucketize(place, torch.tensor(list(BANDS.values())[:-1]), right=True)
    samplers = {}
    for name, (share, metadata) in sampling_distributions(store).items():
        mass = torch.zeros(len(BANDS), dtype=torch.float64).index_add_(0, band, share[order])
        samplers[name] = {
            "effective_rows": metadata["effective_rows"],
            "effective_share": metadata["effective_share"],
            "mass": dict(zip(BANDS, mass.tolist())),
            "fallback": metadata.get("fallback"),
        }
    return samplers


def draws_table(samplers: dict[str, Any]) -> Table:
    """Probability of each band of trajectories, and the effective sample size (1 / sum of p^2)."""
    from rich.table import Table

    table = Table("draws", *BANDS, "ESS", "ESS / N")
    for name, metadata in samplers.items():
        shares = [f"{share:.1%}" for share in metadata["mass"].values()]
        table.add_row(name, *shares, f"{metadata['effective_rows']:,.0f}", f"{metadata['effective_share']:.2%}")
    return table


def fallbacks(samplers: dict[str, Any]) -> list[str]:
    """A line for every sampler that uses a fallback."""
    return [f"{name}: {metadata['fallback']}" for name, metadata in samplers.items() if metadata["fallback"]]


def plot_concentration(axes: Axes, store: OfflineDataset) -> None:
    """Probability of the best trajectories, against their share of all trajectories."""
    order = store.returns.cpu().argsort(descending=True, stable=True)
    best = (torch.arange(store.episodes) + 1) / store.episodes * 100
    for (name, (share, metadata)), colour in zip(sampling_distributions(store).items(), LINE_COLOURS):
        label = f"{name} (ESS / N {metadata['effective_share']:.1%})"
        style, width = {"uniform": ("--", 2.0), "RW": ("-", 4.5)}.get(name, ("-", 2.0))  # AW is often on top of RW
        axes.plot(best, share[order].cumsum(0) * 100, color=colour, linewidth=width, linestyle=style, label=label)
    axes.set_xscale("log")
    axes.set_xlim(min(float(best[0]), 50.0), 103)
    axes.set_ylim(0, 103)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    # Above the panel, because lines may cross any corner of it.
    axes.legend(ncols=2, fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 0.99), columnspacing=1.0)


def plot_bands(axes: Axes, samplers: dict[str, Any]) -> None:
    """A bar per sampler, divided into the probabilities of the bands."""
    left = [0.0] * len(samplers)
    for band, colour in zip(BANDS, BAND_COLOURS):
        widths = [100 * metadata["mass"][band] for metadata in samplers.values()]
        axes.barh(list(samplers), widths, left=left, color=colour, label=band, height=0.62)
        for row, (width, start) in enumerate(zip(widths, left)):
            if width >= 9:
                ink = "white" if colour in BAND_COLOURS[:2] else "#222222"
                axes.text(start + width / 2, row, f"{width:.0f}%", color=ink, ha="center", va="center", fontsize=9)
        left = [start + width for start, width in zip(left, widths)]
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    axes.legend(
        ncols=len(BANDS), fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.075),
        columnspacing=0.9, handlelength=1.0, handletextpad=0.4,
    )  # fmt: skip
