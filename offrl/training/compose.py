"""Hydra's side: from a command line to the composed configuration as plain dictionaries."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from offrl.training.schema import TABLED, TrainConfig
from offrl.utils.errors import OffrlError
from offrl.utils.paths import conf_dir


def groups(extra: Path | None = None) -> set[str]:
    """Names of the configuration groups, those of a user's own folder included."""
    folders = [conf_dir(), *([extra] if extra else [])]
    return {child.name for folder in folders if folder.is_dir() for child in folder.iterdir() if child.is_dir()}


def choices(group: str, extra: Path | None = None) -> list[str]:
    """Names that `group=NAME` can have, those of a user's own folder included."""
    folders = [folder / group for folder in (conf_dir(), extra) if folder]
    return sorted({path.relative_to(f).with_suffix("").as_posix() for f in folders for path in f.rglob("*.yaml")})


def register() -> None:
    """Let `conf/train.yaml` build on the defaults of the dataclasses, which so stand in one place."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="options", node=_defaults())


def _defaults() -> dict[str, Any]:
    """All but those that a method's table for the dataset fills in where nobody has given them."""
    return {key: value for key, value in asdict(TrainConfig()).items() if key not in ("data", *TABLED)}


def to_hydra_overrides(arguments: Sequence[str]) -> list[str]:
    """Command-line words for Hydra, where `key=value` also adds a key that no file names, such as `agent.alpha`.

    Which keys exist is decided by the dataclasses (see `build`), not by the files: so a typing error still gets a clear
    sentence, and defaults need to stand nowhere else.
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
    _check_choices(arguments, known, extra)
    words = []
    for word in arguments:
        key = word.split("=", 1)[0]
        plain = "=" in word and not word.startswith(("-", "+", "~")) and not key.startswith("hydra")
        named = key in known or key in options or "@" in key or "/" in key
        words.append(f"++{word}" if plain and not named else word)
    # Hydra's parser wants its flags and their values on one side of the overrides.
    overrides = [word for word in words if not word.startswith("-") and ("=" in word or word.startswith("~"))]
    return [word for word in words if word not in overrides] + overrides


def _check_choices(words: Sequence[str], known: set[str], extra: Path | None) -> None:
    """Refuse names that no group has: of a wrong `experiment=` or `suite=` Hydra's own message would list dozens.

    What is more than names (`glob(*)`, a further search path) is left to Hydra.
    """
    given = dict(word.lstrip("+").split("=", 1) for word in words if "=" in word)
    named = {group: text for group, text in given.items() if group in known and re.fullmatch(r"[\w./, -]*", text)}
    if "hydra.searchpath" in given:
        return
    for group, text in named.items():
        there = choices(group, extra)
        for name in (part.strip().removesuffix(".yaml") for part in text.split(",")):
            if name not in (*there, "null"):
                near = difflib.get_close_matches(name, there, 1, cutoff=0.5)
                hint = f"did you mean {group}={near[0]}?" if near else f"there are {', '.join(there)}."
                raise OffrlError(f"{group}={name} is unknown; {hint}")
    if "suite" in named and "experiment" in named and _own_datasets(named["experiment"], extra):
        raise OffrlError(
            f"experiment={named['experiment']} brings datasets of its own, which suite= can't replace; give dataset=ID,..."
        )


def _own_datasets(experiment: str, extra: Path | None) -> bool:
    """Whether a recipe's own file lists datasets, instead of choosing a suite."""
    from omegaconf import OmegaConf

    paths = [folder / "experiment" / f"{experiment}.yaml" for folder in (conf_dir(), extra) if folder]
    recipes = [OmegaConf.load(path) for path in paths if path.is_file()]
    return any(OmegaConf.select(recipe, "hydra.sweeper.params.dataset") is not None for recipe in recipes)


def compose(options: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that `offrl train key=value ...` would have, from `{key: value}`.

    Raises:
        OffrlError: an unknown choice, or a recipe or suite that sweeps over a key which `options` gives no value.
    """
    known = groups()
    words = [f"{key}={value if key in known else _literal(value)}" for key, value in options.items()]
    values, swept = _composed(words)
    if missing := [key for key in swept if key not in options]:
        raise OffrlError(
            f"this recipe sweeps over {' and '.join(swept)}, and a single run needs one value of each; give "
            f"{' and '.join(f'{key}=...' for key in missing)} too, or sweep with `offrl train`."
        )
    return values


def compose_words(arguments: Sequence[str]) -> dict[str, Any]:
    """The same from the words of a command line, whatever its recipe sweeps over."""
    return _composed(arguments)[0]


def _composed(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The configuration, and the keys over which its recipe or suite sweeps."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    words = to_hydra_overrides(arguments)
    register()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = hydra_compose("train", overrides=words, return_hydra_config=True)
    except HydraException as error:
        raise OffrlError(f"{error} (see `offrl train --help` for options and `offrl agents` for agents)") from error
    ours = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    return plain(ours), list(cfg.hydra.sweeper.get("params") or {})


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
