"""Where trajectories of a model terminate: a function of the next state for each environment, since no model predicts it.

Rollouts that go on from dead states are the best-documented way to fail with a model. The limits are Gymnasium's with default
arguments (Hopper, Walker2d, Ant, Humanoid, the inverted pendulums) and those of D4RL's own pen, which ends when it has dropped;
Gymnasium-Robotics' pen never does. OfflineRL-Kit also ends HalfCheetah and Walker2d beyond |s| = 100, which the simulators do
not, and takes the absolute value of Hopper's comparison with 100, so that -200 passes there.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from offrl.data.catalogue import d4rl_task
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.data.partial import partial_of
from offrl.utils.errors import OffrlError

Termination = Callable[[Tensor], Tensor]
_PEN_HEIGHT = 26  # index of the object's height in the observation of Adroit's pen


def _hopper(obs: Tensor) -> Tensor:
    alive = obs.isfinite().all(-1) & (obs[:, 1:].abs() < 100).all(-1) & (obs[:, 0] > 0.7) & (obs[:, 1].abs() < 0.2)
    return ~alive


def _walker2d(obs: Tensor) -> Tensor:
    return ~((obs[:, 0] > 0.8) & (obs[:, 0] < 2.0) & (obs[:, 1].abs() < 1.0))


def _ant(obs: Tensor) -> Tensor:
    return ~(obs.isfinite().all(-1) & (obs[:, 0] >= 0.2) & (obs[:, 0] <= 1.0))


def _humanoid(obs: Tensor) -> Tensor:
    return ~((obs[:, 0] > 1.0) & (obs[:, 0] < 2.0))


def _inverted_pendulum(obs: Tensor) -> Tensor:
    return ~(obs.isfinite().all(-1) & (obs[:, 1].abs() <= 0.2))


def _inverted_double_pendulum(obs: Tensor) -> Tensor:
    """The tip's height: two poles of 0.6, the second one's angle counted from the first. Sines are 1 and 2, cosines 3 and 4."""
    height = 0.6 * (obs[:, 3] + obs[:, 3] * obs[:, 4] - obs[:, 1] * obs[:, 2])
    return ~(height > 1.0)


def _pen(obs: Tensor) -> Tensor:
    return obs[:, _PEN_HEIGHT] < 0.075


def _never(obs: Tensor) -> Tensor:
    return torch.zeros(len(obs), dtype=torch.bool, device=obs.device)


# Pattern of an environment's id -> its function, and the dimensions of the full observation that this can't do without.
_KNOWN: dict[str, tuple[Termination, tuple[int, ...]]] = {
    r"(offrl/Noisy)?Hopper-": (_hopper, (0, 1)),
    r"(offrl/Noisy)?Walker2d-": (_walker2d, (0, 1)),
    r"Ant-": (_ant, (0,)),
    r"Humanoid-": (_humanoid, (0,)),
    r"InvertedPendulum-": (_inverted_pendulum, (1,)),
    r"InvertedDoublePendulum-": (_inverted_double_pendulum, (1, 2, 3, 4)),
}


def termination(info: DatasetInfo) -> Termination:
    """The function that says whether states `[n, O]` are terminal in a dataset's environment.

    HalfCheetah, the other hands, mazes and every environment that is not known here never terminate. How far the function
    agrees with a dataset's own rows: `disagreement`, of which `warn_of_disagreement` speaks.

    Raises:
        OffrlError: observations by which a state is known to be terminal were left out or lost (`data.mask`, `data.flicker`).
    """
    env_id = (info.env_id or "").rsplit(":", 1)[-1]
    known = [found for pattern, found in _KNOWN.items() if re.match(pattern, env_id)]
    if (d4rl_task(info) or "").startswith("pen-"):
        known = [(_pen, (_PEN_HEIGHT,))]
    if not known:
        return _never
    (function, needed), partial = known[0], partial_of(info)
    if partial.flicker:
        raise OffrlError(
            f"{info.id}: a model's rollouts end by what is observed, and data.flicker={partial.flicker} loses observations; "
            "leave out data.flicker or set augment=none."
        )
    kept = partial.kept
    if kept is None:
        return function
    if not set(needed) <= set(kept):
        raise OffrlError(
            f"{info.id}: a model's rollouts end by dimensions {', '.join(map(str, needed))} of an observation, and data.mask "
            "leaves them out; change data.mask or set augment=none."
        )
    return lambda obs: function(
        obs.new_zeros(len(obs), max(kept) + 1).index_copy(1, torch.tensor(kept, device=obs.device), obs)
    )


def disagreement(dataset: OfflineDataset) -> float:
    """Share of a dataset's rows whose flag differs from what the function says of their next state.

    Rows without a known next state don't count. Not 0 where an environment marks something else, as AntMaze its reached goals,
    or is not known here.
    """
    said, flag = _said_and_flagged(dataset)
    return float((said != flag).double().mean())


_FEW, _MOST_MISSED = 0.001, 0.05  # shares of rows that may be wrong without a word, as rounding and clipping leave some


def warn_of_disagreement(dataset: OfflineDataset) -> None:
    """Warn where a model's rollouts would end elsewhere than the dataset's episodes terminate."""
    said, flag = _said_and_flagged(dataset)
    missed, early, terminal = (int(rows.sum()) for rows in (flag & ~said, said & ~flag, flag))
    if missed > _MOST_MISSED * terminal:
        warnings.warn(
            f"{dataset.info.id}: a model's rollouts don't end where its episodes terminate: {missed:,} of {terminal:,} "
            "terminal rows have a next observation that is not terminal in "
            f"{dataset.info.env_id or 'an unknown environment'}. Rollouts go on from such states, of which the data know "
            "nothing; keep augment.length short, or name the environment with eval.env.",
            stacklevel=2,
        )
    if early > _FEW * len(said):
        warnings.warn(
            f"{dataset.info.id}: a model's rollouts end at states from which its episodes go on: {early:,} of "
            f"{len(said):,} rows. The limits are those of {dataset.info.env_id} with its default arguments.",
            stacklevel=2,
        )


def _said_and_flagged(dataset: OfflineDataset) -> tuple[Tensor, Tensor]:
    """Bool `[n]` each, of the rows with a known next state: whether the function calls it terminal, and whether the row is."""
    said, flag = termination(dataset.info)(dataset.next_observations), dataset.terminations > 0
    known = dataset.known_successors
    return (said, flag) if known is None else (said[known], flag[known])
