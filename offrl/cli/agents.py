"""`offrl agents`: the methods and their settings."""

from __future__ import annotations

import argparse
import inspect
import re
from dataclasses import fields
from typing import Any

from hydra.utils import get_class
from omegaconf import OmegaConf

from offrl.utils.errors import OffrlError
from offrl.utils.paths import conf_dir


def add_parser(subparsers: Any) -> None:
    """Add `offrl agents`; the parsed arguments carry `run`, which returns the exit status."""
    parser = subparsers.add_parser("agents", help="the methods and their settings")
    parser.add_argument("name", nargs="?")
    parser.set_defaults(run=_command)


def field_comments(cls: type[Any]) -> list[tuple[str, str, str]]:
    """(name, default, comment) of a dataclass's plain fields, the comment being the one behind the field."""
    rows = []
    names = {f.name for f in fields(cls)}
    for line in inspect.getsource(cls).splitlines():
        match = re.match(r"\s+(\w+): [^=]+ = (.*?)(?:  # (.*))?$", line)
        if match and match[1] in names and not match[2].startswith("field("):
            rows.append((match[1], match[2].strip("\"'"), match[3] or ""))
    return rows


def _command(arguments: argparse.Namespace) -> int:
    files = {path.stem: path for path in sorted((conf_dir() / "agent").glob("*.yaml"))}
    if arguments.name and arguments.name not in files:
        raise OffrlError(f"agent {arguments.name} is unknown; there are {', '.join(files)}.")
    for name, path in files.items():
        cls: Any = get_class(OmegaConf.load(path)._target_)
        documentation = inspect.getdoc(inspect.getmodule(cls)) or ""
        if not arguments.name:
            print(f"{name:12} {documentation.splitlines()[0]}")
        elif name == arguments.name:
            print(documentation, "\n\nSettings:")
            for key, default, comment in field_comments(cls.Config):
                print(f"  agent.{key}={default}  {comment}".rstrip())
    return 0
