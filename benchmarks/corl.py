"""Classes of corl-team/CORL from the user's checkout, without the packages that their files import for other ends."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

REPOSITORY = "corl-team/CORL"


def load(checkout: Path, name: str) -> Any:
    """The module `algorithms/offline/NAME.py`; its imports of D4RL, Gym, wandb and the like are empty stand-ins."""
    path = checkout / "algorithms" / "offline" / f"{name}.py"
    if not path.exists():
        raise SystemExit(f"{path} is missing; name a checkout of {REPOSITORY}.")
    for missing in ("d4rl", "gym", "pyrallis", "wandb", "tqdm"):
        if missing not in sys.modules and importlib.util.find_spec(missing) is None:
            sys.modules[missing] = types.ModuleType(missing)
    stubs: Any = sys.modules
    for package, attribute, value in (
        ("gym", "Env", object),
        ("pyrallis", "wrap", lambda: lambda function: function),
        ("tqdm", "trange", range),
    ):
        if package in stubs and not hasattr(stubs[package], attribute):
            setattr(stubs[package], attribute, value)
    location = importlib.util.spec_from_file_location(f"corl_{name}", path)
    assert location is not None
    assert location.loader is not None
    module = importlib.util.module_from_spec(location)
    sys.modules[location.name] = module
    location.loader.exec_module(module)
    return module
