"""Networks with a lane axis: layers, actors, critics, the optimiser and the Spec that they are built from."""

import warnings
from typing import Any

from offrl.nets.actors import (
    DeterministicActor,
    GaussianActor,
    TanhGaussian,
    TanhGaussianActor,
    categorical_log_prob,
    choose,
    normal_log_prob,
    one_hot,
)
from offrl.nets.box import ActionBox
from offrl.nets.critics import Critics, DiscreteCritics, Pooling, pool
from offrl.nets.denoising import DenoisingPolicy
from offrl.nets.flow import FlowPolicy
from offrl.nets.lanes import apply_no_compile, lane_generators, no_compile, per_lane
from offrl.nets.mlp import MLP, Activation, Drop, activate, check_dropout, dropout, layer_norm, orthogonal_, pad_hidden_
from offrl.nets.optim import Adam, clip_by_lane, make_target, polyak
from offrl.nets.spec import Bound, Spec

__all__ = [
    "MLP",
    "ActionBox",
    "Activation",
    "Adam",
    "Bound",
    "Critics",
    "DenoisingPolicy",
    "DeterministicActor",
    "DiscreteCritics",
    "Drop",
    "FlowPolicy",
    "GaussianActor",
    "Pooling",
    "Spec",
    "TanhGaussian",
    "TanhGaussianActor",
    "activate",
    "apply_no_compile",
    "categorical_log_prob",
    "check_dropout",
    "choose",
    "clip_by_lane",
    "dropout",
    "lane_generators",
    "layer_norm",
    "make_target",
    "no_compile",
    "normal_log_prob",
    "one_hot",
    "orthogonal_",
    "pad_hidden_",
    "per_lane",
    "polyak",
    "pool",
]

# Names of version 0.1; agents outside this package may still import them.
_RENAMED = {
    "column": "per_lane",
    "target_of": "make_target",
    "keep_uncompiled": "no_compile",
    "leave_uncompiled": "apply_no_compile",
}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(f"offrl.nets.{name} is now offrl.nets.{_RENAMED[name]}.", DeprecationWarning, stacklevel=2)
        return globals()[_RENAMED[name]]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
