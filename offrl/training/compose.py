"""Hydra's side: from a command line to the composed configuration as plain dictionaries."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from offrl.training import launchers
from offrl.training.schema import TABLED, TrainConfig
from offrl.utils.errors import OffrlError, one_line
from offrl.utils.files import read_bytes
from offrl.utils.paths import conf_dir, config_dir_of, use_config_dir, without_config_dir


def groups(extra: Path | None = None) -> set[str]:
    """Names of the configuration groups, those of a user's own folder included."""
    folders = [conf_dir(), *([extra] if extra else [])]
    return {child.name for folder in folders if folder.is_dir() for child in folder.iterdir() if child.is_dir()}


def choices(group: str, extra: Path | None = None) -> list[str]:
    """Names that `group=NAME` can have, those of a user's own folder included."""
    folders = [folder / group for folder in (conf_dir(), extra) if folder]
    return sorted({path.relative_to(f).with_suffix("").as_posix() for f in folders for path in f.rglob("*.yaml")})


def choice_file(group: str, name: str, extra: Path | None = None) -> Path:
    """The yaml of a choice; a user's own goes before ours."""
    paths = [folder / group / f"{name}.yaml" for folder in (extra, conf_dir()) if folder]
    return next(path for path in paths if path.is_file())


def register() -> None:
    """Let `conf/train.yaml` build on the defaults of the dataclasses, which so stand in one place; name our launchers."""
    ConfigStore.instance().store(name="options", node=_defaults())
    launchers.register()


def _defaults() -> dict[str, Any]:
    """All but those that a method's table for the dataset fills in where nobody has given them."""
    return {key: value for key, value in asdict(TrainConfig()).items() if key not in ("data", "online", *TABLED)}


def to_hydra_overrides(arguments: Sequence[str], extra: Path | None = None) -> list[str]:
    """Command-line words for Hydra, where `key=value` also adds a key that no file names, such as `agent.alpha`.

    Which keys exist is decided by the dataclasses (see `build`), not by the files: so a typing error still gets a clear
    sentence, and defaults need to stand nowhere else.
    """
    extra = extra or config_dir_of(arguments)
    known = groups(extra)
    _check_choices(arguments, known, extra)
    _check_flags(arguments)
    words = []
    for before, word in zip(["", *arguments], map(quoted, arguments)):
        if before not in WITH_VALUE:
            _check_word(word)
        key = word.split("=", 1)[0]
        plain = "=" in word and not word.startswith(("-", "+", "~")) and not key.startswith("hydra")
        words.append(f"++{word}" if plain and not in_files(key, known) else word)
    # Hydra's parser wants its flags and their values on one side of the overrides.
    overrides = [word for word in words if not word.startswith("-") and ("=" in word or word.startswith("~"))]
    return [word for word in words if word not in overrides] + overrides


def in_files(key: str, known: Set[str]) -> bool:
    """Whether a key is a group, of which `known` has the names, or stands in a file: Hydra has to add all others."""
    defaults = _defaults()
    options = {*defaults, *(f"eval.{key}" for key in defaults["eval"] if key != "env_kwargs")}
    return key in known or key in options or "@" in key or "/" in key


def let_recipes_add(config: Any) -> None:
    """Let what a recipe sweeps over have keys that no file names, as on the command line (`to_hydra_overrides`).

    Args:
        config: Hydra's, of a sweep that has not begun; it changes.
    """
    sweeper, known = config.hydra.sweeper, {*groups(), *config.hydra.runtime.choices}
    params = OmegaConf.to_container(sweeper.get("params") or OmegaConf.create(), resolve=False)
    assert isinstance(params, dict)
    named = {str(key): value for key, value in params.items()}
    with flag_override(config, ["struct", "readonly"], False):
        sweeper.params = {
            key if key[0] in "+~" or in_files(key, known) else f"++{key}": value for key, value in named.items()
        }


# Hydra's flags whose value is the next word.
WITH_VALUE: tuple[str, ...] = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p")
WITH_VALUE += ("--cfg", "-c", "--info", "-i", "--experimental-rerun")
MOST_BYTES = 1 << 20  # of a user's file of settings
TEXTS = ("dataset", "out", "name", "label", "eval.env")  # options whose values are paths and names, in any letters


def quoted(word: str) -> str:
    """`dataset=PATH` in quotes of Hydra's, where the path is there or Hydra could not read it otherwise."""
    key, _, text = word.partition("=")
    if key not in TEXTS or not text or text[0] in "'\"":
        return word
    if key == "dataset" and not re.fullmatch(r"[\w./~-]+", text) and _exists(text):
        return f"{key}={_literal(text)}"
    try:
        OverridesParser.create().parse_override(word)
        readable = True
    except Exception:  # HydraException, or its lexer's own
        readable = False
    return word if readable or text[0] == "[" or re.match(r"\w+\(", text) else f"{key}={_literal(text)}"


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # a name that is too long, no home, a zero in it
        return False


def _check_flags(arguments: Sequence[str]) -> None:
    """Refuse a flag without its value: Hydra would take an option for it, and train with that option's default."""
    for flag, value in zip(arguments, [*arguments[1:], ""]):
        if flag in WITH_VALUE and flag not in ("--info", "-i") and (not value or value[0] == "-" or "=" in value):
            raise OffrlError(f"{flag} needs a value behind it; `offrl train --help` lists the options.")


def _check_word(word: str) -> None:
    """Raise OffrlError for a word that Hydra can't read, or would read as something else than is meant."""
    if word.startswith("-"):
        return
    if word.startswith("~") and word[1:].partition("=")[0] in {*_defaults(), *TABLED}:
        raise OffrlError(f"{word}: an option can't be removed; leave the word out, and its default holds.")
    try:
        OverridesParser.create().parse_override(word)
    except Exception as error:  # HydraException, or its lexer's own
        key, equals, _ = word.partition("=")
        hint = f"put a value with odd letters in two pairs of quotes: {key}=\"'...'\"" if equals else "give key=value"
        raise OffrlError(f"{word} can't be read; {hint} (`offrl train --help` lists the options).") from error


def sentence(error: Exception) -> OffrlError:
    """What Hydra or OmegaConf says, in a line and with what to do."""
    text = one_line(
        str(error).replace("\nSet the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace.", "")
    )
    return OffrlError(f"{text.rstrip('.')} (see `offrl train --help` for options and `offrl agents` for agents).")


def from_hydra(error: Exception) -> bool:
    """Whether it is Hydra's answer to what the user wrote: an error of its own, or one raised in the midst of its code."""
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame else ""
    own = isinstance(error, (HydraException, OmegaConfBaseException))
    return own or module.partition(".")[0] in ("hydra", "omegaconf", "yaml")


def _check_choices(words: Sequence[str], known: set[str], extra: Path | None) -> None:
    """Refuse names that no group has: of a wrong `experiment=` or `suite=` Hydra's own message would list dozens.

    What is more than names (`glob(*)`, a further search path) is left to Hydra.
    """
    given = dict(word.lstrip("+").split("=", 1) for word in words if "=" in word)
    named = {group: text for group, text in given.items() if group in known and re.fullmatch(r"[\w./, +&-]*", text)}
    if "hydra.searchpath" in given:
        return
    for group, text in named.items():
        there = choices(group, extra)
        for name in (part.strip().removesuffix(".yaml") for part in text.split(",")):
            if name not in (*there, "null"):
                near = difflib.get_close_matches(re.sub(r"[^\w/]+", "_", name.lower()), there, 1, cutoff=0.5)
                own = (
                    "" if extra else f" Of a folder of your own: --config-dir DIR, with DIR/{group}/{name}.yaml in it."
                )
                hint = f"did you mean {group}={near[0]}?" if near else f"there are {', '.join(there)}.{own}"
                raise OffrlError(f"{group}={name} is unknown; {hint}")
            if extra and (file := extra / group / f"{name}.yaml").exists():
                _check_file(file)
    if "suite" in named and "experiment" in named and _own_datasets(named["experiment"], extra):
        raise OffrlError(
            f"experiment={named['experiment']} brings datasets of its own, which suite= can't replace; give dataset=ID,..."
        )


def _check_file(path: Path) -> None:
    """Raise OffrlError for a user's file of settings that Hydra could not read; its own errors name no file."""
    repair = "repair it"
    try:
        text = read_bytes(path, repair, MOST_BYTES).decode()
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except OffrlError:
        raise
    except Exception as error:  # of YAML, of OmegaConf, of endless nesting
        raise OffrlError(f"{path} is no YAML of settings ({one_line(error, 200)}); {repair}.") from error
    if not isinstance(content, dict) or not _has_names(content):
        raise OffrlError(f"{path} should hold settings, a name and a value each; {repair}.")
    for line in text.splitlines():
        if line.startswith("#") and "@package" in line and not re.fullmatch(r"#\s*@package\s+[\w.]+\s*", line):
            raise OffrlError(f"{path}: {one_line(line, 60)} should be `# @package NAME`; {repair}.")


def _has_names(content: Any) -> bool:
    """Whether every key in nested tables is a text."""
    if isinstance(content, list):
        return all(map(_has_names, content))
    return not isinstance(content, dict) or all(isinstance(k, str) and _has_names(v) for k, v in content.items())


def _own_datasets(experiment: str, extra: Path | None) -> bool:
    """Whether a recipe's own file lists datasets, instead of choosing a suite."""
    paths = [folder / "experiment" / f"{experiment}.yaml" for folder in (conf_dir(), extra) if folder]
    recipes = [OmegaConf.load(path) for path in paths if path.is_file()]
    return any(OmegaConf.select(recipe, "hydra.sweeper.params.dataset") is not None for recipe in recipes)


def compose(options: Mapping[str, Any], config_dir: str | Path | None = None) -> dict[str, Any]:
    """The configuration that `offrl train key=value ...` would have, from `{key: value}`; values may be nested tables.

    Args:
        config_dir: a folder with further agents, samplers, presets, as `--config-dir` names it.

    Raises:
        OffrlError: an unknown choice, or a recipe or suite that sweeps over a key which `options` gives no value.
    """
    extra = use_config_dir(config_dir) if config_dir else None
    known, flat = groups(extra), dotted(options)
    words = [f"{key}={value if key in known else _literal(value)}" for key, value in flat.items()]
    values, swept = _composed(words, extra)
    if missing := [key for key in swept if key not in options]:
        raise OffrlError(
            f"this recipe sweeps over {' and '.join(swept)}, and a single run needs one value of each; give "
            f"{' and '.join(f'{key}=...' for key in missing)} too, or sweep with `offrl train`."
        )
    return values


def dotted(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys: `{"eval": {"every": 0}}` as `{"eval.every": 0}`."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def compose_words(arguments: Sequence[str]) -> dict[str, Any]:
    """The same from the words of a command line, whatever its recipe sweeps over; a `--config-dir DIR` may be among them."""
    return _composed(without_config_dir(arguments), config_dir_of(arguments))[0]


def _composed(words: Sequence[str], extra: Path | None = None) -> tuple[dict[str, Any], list[str]]:
    """The configuration, and the keys over which its recipe or suite sweeps."""
    overrides = to_hydra_overrides(words, extra)
    if extra:
        overrides.append(f"hydra.searchpath=[{_literal('file://' + str(extra))}]")
    register()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = hydra_compose("train", overrides=overrides, return_hydra_config=True)
    except Exception as error:
        if from_hydra(error):
            raise sentence(error) from error
        raise
    ours = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    values = named(plain(ours), cfg.hydra.runtime.choices, overrides)
    return values, list(cfg.hydra.sweeper.get("params") or {})


def named(values: dict[str, Any], choices: Mapping[str, str], overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration with `agent_name`: the choice `agent=NAME`, unless a `_target_` of its own replaced what it names."""
    if any(word.lstrip("+").startswith("agent._target_=") for word in overrides):
        return values
    return values | {"agent_name": str(choices["agent"]).replace("/", "_")}


def plain(cfg: Any) -> dict[str, Any]:
    """Dictionaries, lists and numbers; attribute access on Hydra's own objects costs microseconds."""
    try:
        values = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise OffrlError(
            f"the configuration can't be resolved ({one_line(error)}); give the key its own value."
        ) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _literal(value: Any) -> str:
    if hasattr(value, "tolist"):  # arrays, tensors and their numbers
        value = value.tolist()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple, range)):
        return "[" + ",".join(_literal(v) for v in value) + "]"
    if isinstance(value, Mapping):  # in a list: others are dotted keys
        return "{" + ",".join(f"{key}:{_literal(v)}" for key, v in value.items()) + "}"
    if isinstance(value, (str, Path)):
        # In Hydra's quotes a quote, and backslashes in front of one, are escaped; everything else stands for itself.
        escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), str(value))
        return f"'{escaped}'"
    return str(value)
