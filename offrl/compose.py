"""Hydra's side: from a command line to the composed configuration as plain dictionaries."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from offrl.config import TABLED, TrainConfig
from offrl.errors import OffrlError
from offrl.paths import conf_dir


def groups(extra: Path | None = None) -> set[str]:
    """Names of the configuration groups, those of a user's own folder included."""
    folders = [conf_dir(), *([extra] if extra else [])]
    return {child.name for folder in folders if folder.is_dir() for child in folder.iterdir() if child.is_dir()}


def register() -> None:
    """Let `conf/train.yaml` build on the defaults of the dataclasses, which so stand in one place; name our launchers."""
    from hydra.core.config_store import ConfigStore

    from hydra_plugins import offrl_launchers

    ConfigStore.instance().store(name="options", node=_defaults())
    offrl_launchers.register()


def _defaults() -> dict[str, Any]:
    """All but those that a method's table for the dataset fills in where nobody has given them."""
    return {key: value for key, value in asdict(TrainConfig()).items() if key not in ("data", *TABLED)}


def tolerant(arguments: Sequence[str]) -> list[str]:
    """Command-line words for Hydra, where `key=value` also adds a key that no file names, such as `agent.alpha`.

    Which keys exist is decided by the dataclasses (`offrl.config.build`), not by the files: so a typing error still gets a
    clear sentence, and defaults need to stand nowhere else.
    """
    defaults = _defaults()
    options = {*defaults, *(f"eval.{key}" for key in defaults["eval"])}
    extra = next((Path(b) for a, b in zip(arguments, arguments[1:]) if a in ("--config-dir", "-cd")), None)
    extra = extra or next((Path(a.split("=", 1)[1]) for a in arguments if a.startswith("--config-dir=")), None)
    if extra and not extra.is_dir():
        raise OffrlError(
            f"--config-dir {extra}: there is no such folder; name one with agent/, preset/ and the like in it."
        )
    known = groups(extra)
    words = []
    for word in arguments:
        key = word.split("=", 1)[0]
        plain = "=" in word and not word.startswith(("-", "+", "~")) and not key.startswith("hydra")
        named = key in known or key in options or "@" in key or "/" in key
        words.append(f"++{word}" if plain and not named else word)
    # Hydra's parser wants its flags and their values on one side of the overrides.
    overrides = [word for word in words if not word.startswith("-") and ("=" in word or word.startswith("~"))]
    return [word for word in words if word not in overrides] + overrides


def compose(options: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that `offrl train key=value ...` would have, from `{key: value}`."""
    known = groups()
    return compose_words([f"{key}={value if key in known else _literal(value)}" for key, value in options.items()])


def compose_words(arguments: Sequence[str]) -> dict[str, Any]:
    """The same from the words of a command line."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    words = tolerant(arguments)
    register()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return plain(hydra_compose("train", overrides=words))
    except HydraException as error:
        raise OffrlError(f"{error} (see `offrl train --help` for options and `offrl agents` for agents)") from error


def plain(cfg: Any) -> dict[str, Any]:
    """Dictionaries, lists and numbers; attribute access on Hydra's own objects costs microseconds."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise OffrlError(f"the configuration can't be resolved: {error}") from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _literal(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_literal(v) for v in value) + "]"
    if isinstance(value, (str, Path)):
        # In Hydra's quotes a quote, and backslashes in front of one, are escaped; everything else stands for itself.
        escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), str(value))
        return f"'{escaped}'"
    return str(value)
