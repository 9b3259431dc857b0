"""Jobs of a sweep that failed before they had a folder, for `offrl status`: wrong settings, a dataset with an odd name."""

from __future__ import annotations

import contextlib
from collections.abc import Set
from pathlib import Path

from offrl.utils.errors import OffrlError
from offrl.utils.files import read_json
from offrl.utils.paths import write_json

NAME = ".sweep/failed.json"  # below the sweep's folder: words of a job -> why it failed
MOST = 10_000


def read_failures(out: Path) -> dict[str, str]:
    """The words of each such job of the sweeps into a folder, and its reason; jobs that were tried again are out.

    Raises:
        OffrlError: the file is damaged.
    """
    try:
        return read_json(out / NAME, dict[str, str], "remove it")
    except (FileNotFoundError, NotADirectoryError):
        return {}


def keep_failures(out: Path, failed: dict[str, str], tried: Set[str]) -> None:
    """Write down the jobs that have just failed, and forget earlier failures of those that were tried again."""
    with contextlib.suppress(OffrlError, OSError):  # a sweep's own summary has said it
        before = read_failures(out)
        now = {words: message for words, message in before.items() if words not in tried} | dict(failed)
        if now:
            write_json(out / NAME, dict(list(now.items())[-MOST:]))
        else:
            (out / NAME).unlink(missing_ok=True)
