"""Options as the user has to type them: `data.action_bound=5` for `offrl train`, `--action-bound 5` for other commands, and
arguments of functions in Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

# train: words of `offrl train` and `finetune`; flags: other commands; fit: tables of `offrl.fit`; python: other functions.
Form = Literal["train", "flags", "fit", "python"]
_FORM: ContextVar[Form] = ContextVar("form", default="python")


@contextmanager
def advising(form: Form) -> Iterator[None]:
    """Within it, messages name options in this form."""
    token = _FORM.set(form)
    try:
        yield
    finally:
        _FORM.reset(token)


def option(key: str, value: Any) -> str:
    """How to give an option of a run: `option("data.action_bound", 5)`; a placeholder such as `ID` is a value, too."""
    table, _, name = key.rpartition(".")
    form = _FORM.get()
    if form == "train":
        return f"{key}={str(value).lower() if isinstance(value, bool) else value}"
    if form == "flags":
        flag = f"--{name.replace('_', '-')}"
        return flag if value is True else f"{flag} {value}"
    if form == "fit" and table:
        return f'{table}={{"{name}": {value}}}'
    return f"{name}={value}"
