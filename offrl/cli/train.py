"""`offrl train`: one run, or a sweep by Hydra."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from offrl.cli.agents import field_comments
from offrl.training.compose import plain, register, to_hydra_overrides
from offrl.training.runs import print_result
from offrl.training.schema import DataConfig, EvalConfig, TrainConfig
from offrl.training.sweep import Sweep, run_job
from offrl.training.trainer import resume, train
from offrl.utils.errors import OffrlError
from offrl.utils.paths import conf_dir


def run(words: list[str]) -> int:
    """Train as the words say; the exit status."""
    if any(word in ("-h", "--help") for word in words):
        print(_help())
        return 0
    folder = next((w.split("=", 1)[1] for w in words if w.startswith("resume=")), None)
    if folder is not None:
        if odd := [w for w in words if not re.match(r"[a-z]", w) or "=" not in w]:
            raise OffrlError(f"{odd[0]} can't stand beside resume=RUN; only key=value can.")
        changes = dict(w.split("=", 1) for w in words if not w.startswith("resume="))
        return print_result(resume(folder, {key: _value(text) for key, text in changes.items()}))
    if any(re.match(r"experiment=.*[,(]", word) for word in words):
        raise OffrlError("experiment= takes one recipe: each brings a sweep of its own, so give each its own command.")
    return _hydra(to_hydra_overrides(words))


def _hydra(words: list[str]) -> int:
    status, notes = 0, ""
    register()

    @hydra.main(config_path=str(conf_dir()), config_name="train", version_base="1.3")
    def task(cfg: DictConfig) -> None:
        """A single run, or a job of a sweep; of that a launcher sends a copy of this function to its processes."""
        nonlocal status
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            if run_job(plain(cfg), Path(notes) / f"{HydraConfig.get().job.num}.json") == 130:
                raise KeyboardInterrupt  # no further job
            return
        try:
            status = print_result(train(plain(cfg)))
        except OffrlError as error:
            print(f"offrl: error: {error}", file=sys.stderr)
            status = 2

    def begun(folder: Path) -> None:
        nonlocal notes
        notes = str(folder)

    before, sys.argv = sys.argv, ["offrl train", *words]
    sweep = Sweep(begun)
    try:
        with sweep:
            task()
    finally:
        sys.argv = before
        for line in sweep.summary():
            print(line, file=sys.stderr)
    return sweep.status() or status


def _help() -> str:
    lines = ["offrl train [key=value ...] [-m] [--config-dir DIR] [--cfg job]", "", "Options:"]
    rows = [
        (f"{prefix}{name}={default}", comment)
        for prefix, cls in (("", TrainConfig), ("data.", DataConfig), ("eval.", EvalConfig))
        for name, default, comment in field_comments(cls)
    ]
    rows.append(("agent.KEY=VALUE", "a setting of the method; a list gives one value per lane (offrl agents NAME)"))
    rows.append(("sampler.KEY=VALUE", "a setting of the sampler; the same (docs/trajectory_weighting.md)"))
    rows.append(("augment.KEY=VALUE", "a setting of the augmentation (docs/policy_guided_diffusion.md)"))
    lines += [f"  {option:30} {comment}".rstrip() for option, comment in rows] + [""]
    for group in sorted(p for p in conf_dir().iterdir() if p.is_dir()):
        names = sorted(str(f.relative_to(group).with_suffix("")) for f in group.rglob("*.yaml"))
        if names:
            lines.append(f"{group.name}=  {', '.join(names)}")
    return "\n".join(lines)


def _value(text: str) -> Any:
    """What Hydra reads behind `key=`."""
    try:
        return OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException as error:
        raise OffrlError(f"{text} can't be read as a value: {error}") from error
