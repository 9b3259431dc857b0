"""TD3+BC against the authors' class on the same weights, batches and noise.

    python benchmarks/fidelity/td3_bc.py PATH       # PATH: a checkout of sfujim/TD3_BC

Prints the largest difference of any parameter after 1, 10, 100 and 1000 updates, in float32 and in float64.
"""

from __future__ import annotations

from pathlib import Path

import torch
from common import ACTION, OBS, Comparison, authors_module, run, td3_pairs

from offrl.agents.td3_bc import TD3BC

REPOSITORY = "sfujim/TD3_BC"


def comparison(checkout: Path) -> Comparison:
    module = authors_module(checkout, "TD3_BC", REPOSITORY)
    module.device = torch.device("cpu")
    return Comparison(
        ours=lambda spec, _: TD3BC(spec),
        theirs=lambda *_: module.TD3_BC(OBS, ACTION, 1.0),
        pairs=lambda agent, theirs: td3_pairs(agent, theirs, "l1 l2 l3", ("l1 l2 l3", "l4 l5 l6")),
        order=("obs", "action", "next_obs", "reward", "mask"),
    )


if __name__ == "__main__":
    run(str(__doc__), REPOSITORY, comparison)
