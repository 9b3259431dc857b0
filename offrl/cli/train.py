"""`offrl train`: one run, or a sweep by Hydra."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from offrl.cli.agents import field_comments
from offrl.cli.finetune import value_of
from offrl.training.compose import (
    choices,
    compose_words,
    from_hydra,
    groups,
    named,
    plain,
    quoted,
    register,
    sentence,
    to_hydra_overrides,
)
from offrl.training.run_config import resolve_config
from offrl.training.runs import print_result
from offrl.training.schema import DataConfig, EvalConfig, OnlineConfig, TrainConfig
from offrl.training.sweep import Sweep, import_path, run_job
from offrl.training.trainer import resume, train
from offrl.utils.errors import OffrlError
from offrl.utils.locks import check_system
from offrl.utils.paths import conf_dir, config_dir_of, without_config_dir


def run(words: list[str]) -> int:
    """Train as the words say; the exit status."""
    extra = config_dir_of(words)
    if any(word in ("-h", "--help") for word in words):
        print(_help(extra))
        return 0
    folders = [w.split("=", 1)[1] for w in words if w.startswith("resume=")]
    if len(folders) > 1:
        raise OffrlError(f"resume={folders[1]} is one run too many; continue one after the other.")
    if folders:
        words = without_config_dir(words)
        if odd := [w for w in words if not re.match(r"[a-z]", w) or "=" not in w]:
            raise OffrlError(f"{odd[0]} can't stand beside resume=RUN; only key=value can.")
        changes = dict(w.split("=", 1) for w in words if not w.startswith("resume="))
        return print_result(resume(folders[0], {key: value_of(text) for key, text in changes.items()}))
    if several := next((word for word in words if re.match(r"\+?(experiment|suite)=.*[,([]", word)), None):
        key = several.split("=")[0]
        raise OffrlError(f"{key}= takes one name: each brings a sweep of its own, so give each its own command.")
    if shown := _shown_config(words):
        print(shown)
        return 0
    check_system()
    if not {"-m", "--multirun"} & set(words):
        _check_single(words)
    return _hydra(to_hydra_overrides(words, extra))


def _check_single(words: list[str]) -> None:
    """Refuse several values where no sweep was asked for; a recipe or suite brings one of its own."""
    if any(re.match(r"\+?(experiment|suite|hydra\.mode)=", word) for word in words):
        return
    for word in map(quoted, words):
        key, equals, text = word.partition("=")
        if equals and not word.startswith("-") and _sweeps(word):
            numbers = key in ("seed", "seeds") and re.fullmatch(r"[\d,\s-]+", text)
            listed = f", or give lanes: seeds=[{text}]" if numbers else ""
            raise OffrlError(f"{word} has several values; sweep over them with -m{listed}.")


def _sweeps(word: str) -> bool:
    try:
        return bool(OverridesParser.create().parse_override(word).is_sweep_override())
    except Exception:  # not readable at all, which is said elsewhere
        return False


def _shown_config(words: list[str]) -> str:
    """What `--cfg job` prints: every setting with its value; empty where Hydra should answer."""
    pairs = list(zip(words, [*words[1:], ""]))
    if (not {("--cfg", "job"), ("-c", "job")} & set(pairs) and "--cfg=job" not in words) or "--package" in words:
        return ""
    ours = [
        word
        for before, word in zip(["", *words], words)
        if before not in ("--cfg", "-c") and word not in ("--cfg", "-c", "--cfg=job", "--resolve", "-m", "--multirun")
    ]
    config = resolve_config(compose_words(ours))
    lines = [f"# agent.settings, row {pattern}: {json.dumps(row)}" for pattern, row in config.table_rows.items()]
    return "\n".join([*lines, OmegaConf.to_yaml(OmegaConf.create(json.loads(json.dumps(config.to_dict())))).rstrip()])


def _hydra(words: list[str]) -> int:
    status, notes, env = 0, "", {"PYTHONPATH": import_path()}
    failure: Exception | None = None
    register()

    @hydra.main(config_path=str(conf_dir()), config_name="train", version_base="1.3")
    def task(cfg: DictConfig) -> None:
        """A single run, or a job of a sweep; of that a launcher sends a copy of this function to its processes."""
        nonlocal status, failure
        hydra_cfg = HydraConfig.get()
        if hydra_cfg.mode == RunMode.MULTIRUN:
            values = named(plain(cfg), hydra_cfg.runtime.choices, hydra_cfg.overrides.task)
            if run_job(values, Path(notes) / f"{hydra_cfg.job.num}.json", env) == 130:
                raise KeyboardInterrupt  # no further job
            return
        try:
            values = named(plain(cfg), hydra_cfg.runtime.choices, hydra_cfg.overrides.task)
            status = print_result(train(values))
        except Exception as error:  # Hydra would print a line of its own
            failure = error

    def begun(folder: Path) -> None:
        nonlocal notes
        notes = str(folder)

    before, sys.argv = sys.argv, ["offrl train", *words]
    sweep = Sweep(begun)
    try:
        with sweep, _raising():
            task()
    except KeyboardInterrupt:
        if sweep.refused:
            raise OffrlError(sweep.refused) from None
        raise
    except Exception as error:
        if from_hydra(error):
            raise sentence(error) from error
        raise
    finally:
        sys.argv = before
        for line in sweep.summary():
            print(line, file=sys.stderr)
    if failure:
        raise failure
    return sweep.status() or status


@contextmanager
def _raising() -> Iterator[None]:
    """Let Hydra raise its errors instead of printing them and leaving."""
    name = "HYDRA_FULL_ERROR"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _help(extra: Path | None) -> str:
    lines = ["offrl train [key=value ...] [-m] [--config-dir DIR] [--cfg job]", "", "Options:"]
    rows = [
        (f"{prefix}{name}={default}", comment)
        for prefix, cls in (("", TrainConfig), ("data.", DataConfig), ("eval.", EvalConfig), ("online.", OnlineConfig))
        for name, default, comment in field_comments(cls)
    ]
    rows.append(("agent.KEY=VALUE", "a setting of the method; a list gives one value per lane (offrl agents NAME)"))
    rows.append(("sampler.KEY=VALUE", "a setting of the sampler; the same (docs/trajectory_weighting.md)"))
    rows.append(("history.KEY=VALUE", "a setting of the encoder of histories (docs/observation_histories.md)"))
    rows.append(("augment.KEY=VALUE", "a setting of the augmentation (docs/policy_guided_diffusion.md)"))
    lines += [f"  {option:30} {comment}".rstrip() for option, comment in rows] + [""]
    lines += [f"{group}=  {', '.join(names)}" for group in sorted(groups(extra)) if (names := choices(group, extra))]
    return "\n".join(lines)
