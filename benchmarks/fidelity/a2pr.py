"""A2PR against the authors' class on the same weights, batches and noise.

    python benchmarks/fidelity/a2pr.py PATH       # PATH: a checkout of ltlhuuu/A2PR

Prints the largest difference of any parameter after 1, 10, 100 and 1000 updates, in float32 and in float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import ACTION, OBS, Comparison, Pair, authors_module, layers, network_pairs, run, td3_pairs

from offrl.agents.a2pr import A2PR, A2PRConfig

REPOSITORY = "ltlhuuu/A2PR"
LATENT = 2 * ACTION
SETTINGS = {"vae_weight": 1.5, "discount": 0.995}  # no weight is 1 here, so that each is seen
BC_WEIGHT = 0.8


def pairs(agent: A2PR, theirs: Any) -> dict[str, list[Pair]]:
    """Each of our parameters beside the authors'."""
    result = td3_pairs(agent, theirs, "l1 l2 l3 l4", ("l1 l2 l3 l4 l5", "l6 l7 l8 l9 l10"))
    result["value"] = network_pairs(agent.value, layers(theirs.value, "l1 l2 l3 l4 l5"))
    result["decoder"] = network_pairs(agent.vae.decoder, layers(theirs.vae, "d1 d2 d3"))
    # Our encoder's last layer is the authors' two heads, one above the other.
    encoder, heads = agent.vae.encoder, layers(theirs.vae, "mean log_std")
    result["encoder"] = network_pairs(encoder, layers(theirs.vae, "e1 e2"))
    width = heads[0].in_features
    for rows, head in zip((slice(0, LATENT), slice(LATENT, 2 * LATENT)), heads):
        result["encoder"].append((encoder.weights[-1][0, rows, :width], head.weight))
        result["encoder"].append((encoder.biases[-1][0, rows], head.bias))
    return result


def comparison(checkout: Path) -> Comparison:
    module = authors_module(checkout, "A2PR", REPOSITORY)
    return Comparison(
        ours=lambda spec, _: A2PR(spec, A2PRConfig(bc_weight=BC_WEIGHT, **SETTINGS)),
        theirs=lambda *_: module.A2PR(OBS, ACTION, 1.0, "cpu", mask=BC_WEIGHT, **SETTINGS),
        pairs=pairs,
        draws=[("target_action", ACTION), ("vae/data", LATENT), ("vae/policy", LATENT)],
    )


if __name__ == "__main__":
    run(str(__doc__), REPOSITORY, comparison)
