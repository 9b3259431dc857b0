"""`offrl finetune`: continue a finished offline run with environment steps."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from offrl.training.finetune import STEPS, finetune
from offrl.training.runs import print_result
from offrl.utils.errors import OffrlError, one_line
from offrl.utils.paths import use_config_dir


def add_parser(subparsers: Any) -> None:
    """Add `offrl finetune`; the parsed arguments carry `run`, which returns the exit status."""
    parser = subparsers.add_parser("finetune", help="continue a finished offline run with environment steps")
    parser.add_argument(
        "run_folder", metavar="RUN", type=Path, help="folder of a finished offline run, which stays as it is"
    )
    more = f"online.steps=N (default {STEPS:,}) and other online.* options (docs/online.md); eval.*, out, device and the like"
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help=more)
    parser.add_argument("--config-dir", metavar="DIR", help="folder of your own configuration, with agent/ in it")
    parser.set_defaults(run=_command)


def _command(arguments: argparse.Namespace) -> int:
    if odd := [word for word in arguments.words if "=" not in word or word.startswith("-")]:
        raise OffrlError(f"{odd[0]} is no option; give key=value.")
    changes = dict(word.split("=", 1) for word in arguments.words)
    extra = use_config_dir(arguments.config_dir) if arguments.config_dir else None
    return print_result(finetune(arguments.run_folder, {k: value_of(text) for k, text in changes.items()}, extra))


def value_of(text: str) -> Any:
    """What Hydra reads behind `key=`."""
    try:
        return OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException as error:
        raise OffrlError(f"{text} can't be read as a value ({one_line(error)}); put it into quotes.") from error
