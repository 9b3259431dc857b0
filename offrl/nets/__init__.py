"""Networks with a lane axis: layers, actors, critics, optimisers, the nearest-pair index."""

from offrl.nets.mlp import *  # noqa: F403
