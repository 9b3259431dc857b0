"""Samplers, which choose the rows of a batch, and the loader that gathers them."""

from offrl.sampling.alias import RowWeighted, alias_table
from offrl.sampling.base import (
    NoSettings,
    Sampler,
    as_list,
    check_above_zero,
    further_datasets,
    lane_values,
    make_sampler,
    sampler_config,
    warn,
)
from offrl.sampling.batches import BatchLoader
from offrl.sampling.mixture import Mixture, MixtureConfig, shared_out
from offrl.sampling.samplers import (
    AdvantageWeighted,
    AdvantageWeightedConfig,
    EpisodeWeighted,
    ReturnWeighted,
    ReturnWeightedConfig,
    TopPercent,
    TopPercentConfig,
    Uniform,
)

__all__ = [
    "AdvantageWeighted",
    "AdvantageWeightedConfig",
    "BatchLoader",
    "EpisodeWeighted",
    "Mixture",
    "MixtureConfig",
    "NoSettings",
    "ReturnWeighted",
    "ReturnWeightedConfig",
    "RowWeighted",
    "Sampler",
    "TopPercent",
    "TopPercentConfig",
    "Uniform",
    "alias_table",
    "as_list",
    "check_above_zero",
    "further_datasets",
    "lane_values",
    "make_sampler",
    "sampler_config",
    "shared_out",
    "warn",
]
