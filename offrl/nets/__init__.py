"""Networks with a lane axis: layers, actors, critics, the optimiser. Each has its own module; their names are here."""

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
from offrl.nets.critics import Critics
from offrl.nets.lanes import column, keep_uncompiled, lane_generators, leave_uncompiled
from offrl.nets.mlp import MLP, Drop, dropout, layer_norm, orthogonal_, relu_mlp_reference
from offrl.nets.optim import Adam, clip_by_lane, polyak, target_of

__all__ = [
    "MLP",
    "Adam",
    "Critics",
    "DeterministicActor",
    "Drop",
    "GaussianActor",
    "TanhGaussian",
    "TanhGaussianActor",
    "categorical_log_prob",
    "choose",
    "clip_by_lane",
    "column",
    "dropout",
    "keep_uncompiled",
    "lane_generators",
    "layer_norm",
    "leave_uncompiled",
    "normal_log_prob",
    "one_hot",
    "orthogonal_",
    "polyak",
    "relu_mlp_reference",
    "target_of",
]
