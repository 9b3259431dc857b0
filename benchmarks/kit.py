"""Makes a user's checkout of yihaosun1124/OfflineRL-Kit importable."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import MagicMock

REPOSITORY = "yihaosun1124/OfflineRL-Kit"


def make_importable(checkout: Path) -> None:
    """Let `import offlinerlkit` find the checkout; the simulators and loggers that its modules import are stand-ins."""
    if not (checkout / "offlinerlkit").is_dir():
        raise SystemExit(f"{checkout}: there is no offlinerlkit; name a checkout of {REPOSITORY}.")
    sys.path.insert(0, str(checkout))
    for name in ("gym", "gym.envs", "gym.envs.mujoco", "torch.utils.tensorboard"):
        sys.modules[name] = MagicMock()
