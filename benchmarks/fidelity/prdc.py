"""PRDC against the authors' class on the same weights, batches and noise.

    python benchmarks/fidelity/prdc.py PATH       # PATH: a checkout of LAMDA-RL/PRDC

Prints the largest difference of any parameter after 1, 10, 100 and 1000 updates, in float32 and in float64. In float32 two
pairs may be equally near up to rounding; which one is named can then differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ACTION, OBS, Comparison, authors_module, run, td3_pairs

from offrl.agents.prdc import PRDC, PRDCConfig
from offrl.data.dataset import OfflineDataset

REPOSITORY = "LAMDA-RL/PRDC"
# Random states of 17 dimensions are far apart: with the usual beta of 2 every row would be its own neighbour.
ALPHA, BETA = 40.0, 0.25


def comparison(checkout: Path) -> Comparison:
    module = authors_module(checkout, "prdc", REPOSITORY)

    def ours(spec: Any, store: OfflineDataset) -> PRDC:
        agent = PRDC(spec, PRDCConfig(alpha=ALPHA, beta=BETA)).to(store.rewards.dtype)
        agent.setup(store)
        batch = agent.prepare(store.transitions(torch.arange(1000).unsqueeze(0)))
        share = agent.policy_regularizer(batch, agent.act(batch.obs).detach())[1]["other_row"]
        print(f"neighbours that are other rows, under the initial policy: {share.item():.0%}")
        return agent

    def theirs(agent: PRDC, store: OfflineDataset) -> Any:
        states = agent.normalize(store.observations).numpy()
        pairs = np.hstack([BETA * states, store.actions.numpy()])
        return module.PRDC(pairs, OBS, ACTION, 1.0, "cpu", alpha=ALPHA, beta=BETA)

    return Comparison(
        ours, theirs, pairs=lambda agent, other: td3_pairs(agent, other, "l1 l2 l3", ("l1 l2 l3", "l4 l5 l6"))
    )


if __name__ == "__main__":
    run(str(__doc__), REPOSITORY, comparison)
