"""Mixtures of a good and a bad dataset by whole trajectories, for methods that reweight or filter trajectories.

Recipe of the mixed datasets of Hong et al. 2023 ("Harnessing Mixed Offline RL Datasets via Trajectory Weighting"):
draw good trajectories with replacement up to a share of the *transitions*, then bad ones up to the size of the whole.
Theirs were drawn without a seed and can't be made again; these can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offrl.data.dataset import OfflineDataset, concatenate
from offrl.data.statistics import positive_sided_variance
from offrl.utils.dataset_names import D4RL_MIXTURE
from offrl.utils.errors import OffrlError


def d4rl_mixture(name: str, load: Callable[[str], OfflineDataset]) -> OfflineDataset:
    """The authors' set of that name, such as `hopper-random-expert-0.1-v2`, drawn anew from two D4RL sets with seed 0.

    Args:
        load: of the sources, here `hopper-expert-v2` and `hopper-random-v2`.

    Scores use the references of the better source.
    """
    match = D4RL_MIXTURE.fullmatch(name)
    assert match is not None
    good, bad = (load(f"{match[1]}-{level}-v2") for level in (match[2], "random"))
    mixture, manifest = build_mixture(good, bad, float(match[3]))
    summary = {key: value for key, value in manifest.items() if key != "episodes"}
    source = f"{good.info.source} and {bad.info.source}"
    return mixture.with_info(id=name, source=source, provenance=mixture.info.provenance | {"mixture": summary})


def build_mixture(
    good: OfflineDataset, bad: OfflineDataset, sigma: float, n_total: int | None = None, seed: int = 0
) -> tuple[OfflineDataset, dict[str, Any]]:
    """Mix whole trajectories of two datasets.

    Good trajectories are drawn uniformly with replacement while their transitions are at most `floor(sigma n_total)`,
    then bad ones while theirs are at most what is left. Hence one trajectory too many of each kind, as in the
    authors' recipe: a tenth of the data is *at least* a tenth. Good ones come first.

    Args:
        good, bad: datasets with the same observations and actions.
        sigma: share of good transitions, between 0 and 1.
        n_total: transitions of the mixture; default `len(good)`. A little more comes out, see above.
        seed: of the draws.

    Returns:
        The mixture, every piece an episode of its own that is marked as ended, under `good`'s info; and a manifest in plain
        JSON types: `episodes` as pairs (source, episode), `realised_sigma` (good transitions / n_total, above sigma by
        at most one trajectory), `share` (good transitions / all), `distinct_episodes`, `return_mean`, `return_max`, and
        `psv`, the positive-sided variance of the scores / 100 (of the returns where there are no references).

    Raises:
        OffrlError: sigma or n_total out of range, or datasets that don't fit together.
    """
    total = len(good) if n_total is None else n_total
    if not 0 < sigma < 1:
        raise OffrlError(f"sigma={sigma} must lie between 0 and 1; it is the share of the better policy's transitions.")
    if total < 1:
        raise OffrlError(f"n_total={total} must be at least 1.")
    if good.observations.shape[1:] != bad.observations.shape[1:] or good.actions.shape[1:] != bad.actions.shape[1:]:
        raise OffrlError(f"{good.info.id} and {bad.info.id} differ in observations or actions and can't be mixed.")
    rng = np.random.default_rng(seed)
    chosen_good = _draw(rng, good.lengths.cpu().numpy(), int(sigma * total))
    rows_good = int(good.lengths.cpu().numpy()[chosen_good].sum())
    if rows_good >= total:
        raise OffrlError(
            f"{total} transitions are too few: {len(chosen_good)} good trajectories fill them; raise the size."
        )
    chosen_bad = _draw(rng, bad.lengths.cpu().numpy(), total - rows_good)
    parts = [(good, chosen_good), (bad, chosen_bad)]
    mixture = concatenate([store.select_episodes(torch.from_numpy(chosen)) for store, chosen in parts], info=good.info)
    # A piece that its file cut off ends like one at the time limit, so that no file made of the mixture joins it to the next.
    mixture.complete = torch.ones_like(mixture.complete)
    returns, scores = mixture.returns, good.info.normalized(mixture.returns)
    manifest = {
        "sources": [{"id": store.info.id, "fingerprint": store.fingerprint} for store, _ in parts],
        "seed": seed,
        "sigma": sigma,
        "n_total": total,
        "realised_sigma": rows_good / total,
        "share": rows_good / len(mixture),
        "transitions": len(mixture),
        "distinct_episodes": [len(np.unique(chosen)) for _, chosen in parts],
        "return_mean": float(returns.mean()),
        "return_max": float(returns.max()),
        "psv": positive_sided_variance(returns if scores is None else scores / 100),
        "episodes": [[source, int(e)] for source, (_, chosen) in enumerate(parts) for e in chosen],
    }
    return mixture, manifest


def _draw(rng: np.random.Generator, lengths: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Episodes drawn with replacement while the rows drawn so far are at most `most`."""
    drawn = np.empty(0, np.int64)
    while (rows := lengths[drawn].sum()) <= most:
        batch = int((most - rows) / lengths.mean()) + 16
        drawn = np.concatenate((drawn, rng.integers(len(lengths), size=batch)))
        drawn = drawn[: np.searchsorted(lengths[drawn].cumsum(), most, side="right") + 1]
    return drawn
