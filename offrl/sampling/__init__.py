"""Samplers: which rows a batch is made of."""

from offrl.sampling.samplers import *  # noqa: F403
