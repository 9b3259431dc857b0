"""`offrl agents`: the methods and their settings."""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import io
import textwrap
import tokenize
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from offrl.agents.base import Agent
from offrl.training.compose import choice_file, choices
from offrl.utils.errors import OffrlError
from offrl.utils.paths import use_config_dir
from offrl.utils.settings import class_in


def add_parser(subparsers: Any) -> None:
    """Add `offrl agents`; the parsed arguments carry `run`, which returns the exit status."""
    parser = subparsers.add_parser("agents", help="the methods and their settings")
    parser.add_argument("name", nargs="?")
    parser.add_argument("--config-dir", metavar="DIR", help="folder of your own configuration, with agent/ in it")
    parser.set_defaults(run=_command)


def field_comments(cls: type[Any]) -> list[tuple[str, str, str]]:
    """(name, default, comment behind the field) of a dataclass's plain fields, inherited ones included."""
    comments: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if is_dataclass(base)]):
        comments |= _comments(base)
    defaults = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(cls)}
    plain = {name: value for name, value in defaults.items() if value is not MISSING and not is_dataclass(value)}
    return [(name, _shown(value), comments.get(name, "")) for name, value in plain.items()]


def _comments(cls: type[Any]) -> dict[str, str]:
    """Field -> comment, as they stand in a class's own source; a formatter may have spread a field over several lines."""
    source = textwrap.dedent(inspect.getsource(cls))
    behind = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found[node.target.id] = " ".join(behind[line] for line in lines if line in behind)
    return found


def _shown(value: Any) -> str:
    """A default as one would type it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)).replace(" ", "") if isinstance(value, tuple) else str(value)


def _command(arguments: argparse.Namespace) -> int:
    extra = use_config_dir(arguments.config_dir) if arguments.config_dir else None
    names = choices("agent", extra)
    if arguments.name and arguments.name not in names:
        near = difflib.get_close_matches(arguments.name, names, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}."
        raise OffrlError(f"agent {arguments.name} is unknown; {hint}")
    for name in [arguments.name] if arguments.name else names:
        file = choice_file("agent", name, extra)
        cls = class_in(file, Agent)
        if cls is None:
            raise OffrlError(f"{file}: it names no class; write `_target_: MODULE.Class`.")
        documentation = inspect.getdoc(inspect.getmodule(cls)) or inspect.getdoc(cls) or ""
        if not arguments.name:
            print(f"{name:12} {documentation.partition(chr(10))[0]}")
            continue
        print(documentation, "\n\nSettings:")
        for key, default, comment in field_comments(cls.Config):
            print(f"  agent.{key}={default}  {comment}".rstrip())
    return 0
