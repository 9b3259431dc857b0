"""Classes of corl-team/CORL from the user's checkout, without the packages that their files import for other ends."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

REPOSITORY = "corl-team/CORL"


def load(checkout: Path, name: str, folder: str = "offline") -> Any:
    """The module `algorithms/FOLDER/NAME.py`; its imports of D4RL, Gym, wandb and the like are empty stand-ins."""
    path = checkout / "algorithms" / folder / f"{name}.py"
    if not path.exists():
        raise SystemExit(f"{path} is missing; name a checkout of {REPOSITORY}.")
    stubs: dict[str, dict[str, Any]] = {
        "d4rl": {},
        "gym": {"Env": object},
        "pyrallis": {"wrap": lambda: lambda function: function},
        "wandb": {},
        "tqdm": {"trange": range},
        "tqdm.auto": {"trange": range},
    }
    before = {package: sys.modules.get(package) for package in stubs}
    for package, contents in stubs.items():
        stub = types.ModuleType(package)
        vars(stub).update(contents)
        sys.modules[package] = stub
    location = importlib.util.spec_from_file_location(f"corl_{name}", path)
    assert location is not None
    assert location.loader is not None
    module = importlib.util.module_from_spec(location)
    sys.modules[location.name] = module
    try:
        location.loader.exec_module(module)
    finally:
        for package, original in before.items():
            if original is None:
                del sys.modules[package]
            else:
                sys.modules[package] = original
    return module
