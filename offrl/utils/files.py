"""JSON of files that anybody may have edited, copied or damaged: read within limits, checked against a schema."""

from __future__ import annotations

import os
import stat
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from offrl.utils.errors import OffrlError, one_line
from offrl.utils.locks import READ_ONLY

T = TypeVar("T")


@cache  # making one costs a millisecond
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


MOST_BYTES = 16 << 20  # of a JSON file; the largest honest ones, manifests of mixtures, have some megabytes


def read_json(path: Path, schema: type[T], remedy: str, most_bytes: int = MOST_BYTES) -> T:
    """The JSON of a file, as an instance of `schema`.

    Args:
        schema: a pydantic model, a dataclass, or a type such as `dict[str, Any]`. Nothing is converted: a number in quotes
            is no number.
        remedy: what to do about a damaged file, the end of the sentence.

    Raises:
        FileNotFoundError: there is no such file.
        OffrlError: it can't be read, is too large or too deep, or does not fit the schema.
    """
    return parse_json(read_bytes(path, remedy, most_bytes), schema, str(path), remedy)


def read_bytes(path: Path, remedy: str, most_bytes: int) -> bytes:
    """What is in a regular file.

    Raises:
        FileNotFoundError: there is no such file.
        OffrlError: it is a folder, a pipe or a device, can't be read, or is too large.
    """
    try:
        with open(os.open(path, READ_ONLY), "rb") as file:
            kind = os.fstat(file.fileno())
            if not stat.S_ISREG(kind.st_mode):
                raise OffrlError(f"{path} is no regular file; {remedy}.")
            if kind.st_size > most_bytes:
                raise OffrlError(f"{path} has {kind.st_size:,} bytes, more than {most_bytes:,}; {remedy}.")
            return file.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OffrlError(f"{path} can't be read ({error.strerror}); {remedy}.") from error


def parse_json(data: bytes | str, schema: type[T], where: str, remedy: str) -> T:
    """The same of a text; `where` names it in the sentence."""
    try:
        value: T = _adapter(schema).validate_json(data, strict=True)  # type: ignore[arg-type]
    except ValidationError as error:
        raise OffrlError(f"{where}: {_reason(error)}; {remedy}.") from error
    return value


def _reason(error: ValidationError) -> str:
    """The first thing that is wrong: which key, and what should stand there."""
    first = error.errors(include_url=False)[0]
    key = one_line(".".join(map(str, first["loc"])), 80)
    if first["type"] == "json_invalid":
        return "it is damaged (" + one_line(first["msg"]).removeprefix("Invalid JSON: ") + ")"
    if first["type"] == "missing":
        return f"the key {key} is missing"
    wanted = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    shown = one_line(repr(first["input"]), 40)
    return f"{key + '=' if key else ''}{shown} {wanted}"
