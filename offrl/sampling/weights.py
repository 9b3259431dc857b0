"""From a dataset's returns to weights of trajectories, as plain functions of tensors.

Hong, Agrawal, Tachet des Combes & Laroche, "Harnessing Mixed Offline Reinforcement Learning Datasets via Trajectory
Weighting", ICLR 2023 (arXiv 2306.13085). A weight belongs to every transition of its trajectory, so a trajectory is drawn with
probability proportional to weight x length. `docs/trajectory_weighting.md` has the equations and what differs from the authors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offrl.utils.errors import OffrlError

BaselineName = Literal["ols", "ridge", "kfold", "network", "mean"]
Array = NDArray[np.float64]

_NO_SPREAD = 1e-8  # relative to the largest return: below it, returns differ by rounding only
_NO_RESIDUAL = 1e-6  # relative to the returns' std: below it, the baseline has interpolated them
_ROWS_PER_COLUMN = 3  # trajectories per coefficient under which least squares mostly fits noise
_FOLDS = 5


def checked_returns(returns: Tensor) -> Tensor:
    """The returns as float64.

    Raises:
        OffrlError: one of them is not finite.
    """
    if not bool(returns.isfinite().all()):
        raise OffrlError("sampler: the dataset has rewards that are not finite; fix them or use sampler=uniform.")
    return returns.double()


# ---- weights ---------------------------------------------------------------------------------------------------------


def boltzmann(scores: Tensor, temperature: float | Tensor) -> tuple[Tensor, str | None]:
    """exp(g / temperature) up to a factor, with g the scores brought to [0, 1].

    Args:
        scores: `[E]` returns or advantages of trajectories.
        temperature: one, or `[lanes]`.

    Returns:
        `[E]` or `[lanes, E]` float64 weights, the largest of which is 1 (so that nothing overflows); and a warning where all
        are equal because the scores are.
    """
    scores, reason = scores.double(), None
    low, span = scores.min(), scores.max() - scores.min()
    if float(span) < _NO_SPREAD * max(1.0, float(scores.abs().max())):
        centred, reason = torch.zeros_like(scores), "all trajectories are equally good, so sampling is uniform"
    else:
        centred = (scores - low) / span - 1
    if isinstance(temperature, Tensor):
        return (centred / temperature.double().unsqueeze(-1)).exp(), reason
    return (centred / temperature).exp(), reason


def top(scores: Tensor, percent: float) -> Tensor:
    """`[E]` float64: 1 for the best `percent` of trajectories (one at least), 0 for the others; earlier ones win ties."""
    count = max(1, int(percent / 100 * len(scores) + 1e-9))  # 0.29 * 100 is 28.999999999999996
    weights = torch.zeros(len(scores), dtype=torch.float64, device=scores.device)
    weights[scores.argsort(descending=True, stable=True)[:count]] = 1.0
    return weights


# ---- metadata --------------------------------------------------------------------------------------------------------


def effective_rows(weights: Tensor, lengths: Tensor) -> Tensor:
    """Effective sample size 1 / sum of p^2 over transitions; `[...]` for weights `[..., E]`."""
    mass = weights.double() * lengths
    return mass.sum(-1).square() / (mass * weights.double()).sum(-1)


# ---- the value of an initial state -----------------------------------------------------------------------------------


@dataclass
class Baseline:
    """V(s_0) of every trajectory.

    Attributes:
        values: `[E]` float64.
        used: method that made them.
        r2: share of the returns' variance that the values explain; with `kfold` and `network`, of returns that they were not
            fitted to, so it may be negative.
        fallback: reason why `used` is not the method asked for; None where it is.
    """

    values: Tensor
    used: str
    r2: float
    fallback: str | None = None


def baseline(observations: Tensor, returns: Tensor, method: BaselineName = "ols") -> Baseline:
    """Fit V(s_0) to one (initial observation, return) pair per trajectory.

    Args:
        observations: `[E, O]` initial observations.
        returns: `[E]`.
        method: `ols` least squares with an intercept, as the authors have it; `ridge` with the penalty that predicts
            trajectories left out best; `kfold` least squares of the other four fifths; `network` the same with a small
            network instead of an affine function; `mean` no function of the state at all, which makes AW of it RW.

    Least squares with about as many coefficients as trajectories interpolates the returns: what remains is rounding noise, and
    scaled to [0, 1] it would be random weights. Then `ridge` takes over, and the mean where that predicts no better.
    """
    y = returns.double().cpu().numpy()
    x = _design(observations.detach().cpu().numpy())
    used, fallback = str(method), None
    if not x.shape[1]:
        used = "mean"  # all start alike: nothing to explain by
    elif method in ("ols", "kfold") and len(y) < _ROWS_PER_COLUMN * (x.shape[1] + 1):
        used, fallback = "ridge", f"{len(y)} trajectories are too few for {x.shape[1] + 1} coefficients"
    elif method == "network" and len(y) < 2 * _FOLDS:
        used, fallback = "mean", f"{len(y)} trajectories are too few to fit a network"
    values = _fit(used, x, y)
    if used != "mean" and x.shape[1] and (y - values).std() < _NO_RESIDUAL * y.std():
        used, fallback = "ridge", "the baseline explains every return exactly"
        values = _fit(used, x, y)
    if fallback and used == "ridge" and (y - values).std() < 1e3 * _NO_RESIDUAL * y.std():
        used, values = "mean", _fit("mean", x, y)
    if used != "mean" and np.ptp(values) == 0:  # ridge found nothing, or no column varies
        used = "mean"
    if fallback:
        fallback += ", so V(s_0) is " + ("their mean (AW is RW here)" if used == "mean" else "a ridge regression")
    r2 = 1 - float(np.square(y - values).mean() / y.var()) if y.std() > 0 else 0.0
    return Baseline(torch.from_numpy(values).to(returns.device), used, r2, fallback)


def _design(observations: NDArray[np.float32]) -> Array:
    """`[E, d]`: columns that vary, standardised."""
    x = observations.reshape(len(observations), -1).astype(np.float64)
    x = x[:, np.ptp(x, axis=0) > 1e-6 * np.abs(x).max(axis=0, initial=0.0)]
    return np.asarray((x - x.mean(0)) / x.std(0))


def _fit(method: str, x: Array, y: Array) -> Array:
    if method == "mean" or not x.shape[1]:
        return np.full_like(y, y.mean())
    if method == "ols":
        return _affine(x, y, x)
    if method == "ridge":
        return _ridge(x, y)
    if method == "network":
        return _network(x, y)
    fold = np.arange(len(y)) % _FOLDS
    values = np.empty_like(y)
    for k in range(_FOLDS):
        values[fold == k] = _affine(x[fold != k], y[fold != k], x[fold == k])
    return values


def _affine(x: Array, y: Array, at: Array) -> Array:
    """Least squares with an intercept, read off at other rows; directions of next to no variance are left out."""
    centre, mean = x.mean(0), y.mean()
    slope = np.linalg.lstsq(x - centre, y - mean, rcond=1e-6)[0]
    return np.asarray((at - centre) @ slope + mean)


def _ridge(x: Array, y: Array) -> Array:
    """Ridge regression whose penalty has the least error on trajectories left out one by one (in closed form).

    An infinite penalty, which is the mean, is among them.
    """
    n, mean = len(y), y.mean()
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    best = np.full_like(y, mean)
    least = np.square((y - mean) / (1 - 1 / max(n, 2))).mean() if n > 1 else 0.0
    for penalty in n * np.logspace(-4, 3, 22):
        shrink = s**2 / (s**2 + penalty)
        values = mean + u @ (shrink * (u.T @ (y - mean)))
        leverage = 1 / n + (u**2 * shrink).sum(1)
        error = np.square((y - values) / np.maximum(1 - leverage, 1e-9)).mean()
        if error < least:
            least, best = error, values
    return best


def _network(x: Array, y: Array) -> Array:
    """A network of 32 x 32 ReLUs fitted to the other four fifths, five of them at once, with a little weight decay."""
    fold = torch.arange(len(y)) % _FOLDS
    scale, generator = y.std() or 1.0, torch.Generator().manual_seed(0)
    inputs = torch.from_numpy(x).float().expand(_FOLDS, -1, -1)
    target = torch.from_numpy((y - y.mean()) / scale).float().unsqueeze(-1)
    train = (fold.unsqueeze(0) != torch.arange(_FOLDS).unsqueeze(1)).float().unsqueeze(-1)  # [folds, E, 1]
    layers = []
    for fan_in, fan_out in ((x.shape[1], 32), (32, 32), (32, 1)):
        bound = fan_in**-0.5
        weight = torch.empty(_FOLDS, fan_in, fan_out).uniform_(-bound, bound, generator=generator)
        layers += [weight.requires_grad_(), torch.zeros(_FOLDS, 1, fan_out, requires_grad=True)]

    def predict() -> Tensor:
        hidden = inputs
        for i in (0, 2):
            hidden = torch.baddbmm(layers[i + 1], hidden, layers[i]).relu()
        return torch.baddbmm(layers[5], hidden, layers[4])

    optimizer = torch.optim.AdamW(layers, lr=3e-3, weight_decay=1e-2)
    for _ in range(300):
        loss = ((predict() - target).square() * train).sum() / train.sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        held_out = predict()[fold, torch.arange(len(y)), 0]
    return np.asarray(held_out.double().numpy() * scale + y.mean())
