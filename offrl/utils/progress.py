"""One progress bar for everything that takes long: rate and time left, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 15.0  # where standard error is no terminal: in a notebook, a log
SECONDS_TO_FIRST_LINE = 3.0
SECONDS_BETWEEN_REDRAWS = 0.1


class Bar:
    """A progress bar in a terminal, a line every 15 seconds elsewhere (notebooks, logs); silent if not wanted.

    Args:
        title: name of the work.
        step: number of steps already done; total: number of steps in the end, None while unknown.
        unit: name of a step; "bytes" are shown as megabytes.

    Use it as a context manager; `update` is cheap enough to be called at every step.
    """

    def __init__(
        self, wanted: bool, title: str, step: int = 0, total: int | None = None, unit: str = "updates"
    ) -> None:
        self.wanted, self.title, self.start, self.total, self.unit = wanted, title, step, total, unit
        self.progress: Any = None

    def __enter__(self) -> Bar:
        if self.wanted and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[done]}"),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.progress = Progress(*columns, console=Console(stderr=True))
            self.progress.start()
            fields = {"done": "", "rate": "", "note": ""}
            self.task = self.progress.add_task(self.title, total=self.total, completed=self.start, **fields)
        self.began = time.perf_counter()
        early = max(0.0, SECONDS_BETWEEN_LINES - SECONDS_TO_FIRST_LINE)
        self.shown = self.began - early if self.progress is None else 0.0
        return self

    def update(self, step: int, total: int | None = None) -> None:
        """Show that `step` steps are done, of `total` if that has become known."""
        self.total = total or self.total
        now = time.perf_counter()
        interval = SECONDS_BETWEEN_REDRAWS if self.progress else SECONDS_BETWEEN_LINES
        last = self.progress and step == self.total
        if not self.wanted or (now - self.shown < interval and not last):
            return
        per_second = max(0, step - self.start) / max(1e-9, now - self.began)
        if self.progress:
            done = f"{self._amount(step)}/{self._amount(self.total) if self.total else '?'}"
            done += "" if self.unit == "bytes" else f" {self.unit}"
            shown = {"done": done, "rate": f"{self._amount(per_second)}/s"}
            self.progress.update(self.task, completed=step, total=self.total, **shown)
        else:
            end = f"{self.total:,}" if self.total else "?"
            left = f", {(self.total - step) / per_second:.0f} s left" if self.total and per_second else ""
            line = f"{self.title}: {step:,}/{end} {self.unit}, {self._amount(per_second)}/s{left}"
            print(line, file=sys.stderr, flush=True)
        self.shown = now

    def track(self, steps: Iterable[T]) -> Iterator[T]:
        """The items of `steps`, each shown as done when the next one is asked for."""
        for step, item in enumerate(steps, start=self.start + 1):
            yield item
            self.update(step)

    def note(self, text: str) -> None:
        """Show a text behind the bar."""
        if self.progress:
            self.progress.update(self.task, note=text)

    def say(self, step: int, text: str) -> None:
        """Show a result that belongs to a step: behind the bar, and as a line of its own where there is none."""
        self.note(text)
        if self.wanted and not self.progress:
            end = f" of {self.total:,}" if self.total else ""
            print(f"{self.title}: {step:,}{end} {self.unit}: {text}", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()

    def _amount(self, number: float) -> str:
        return f"{number / 1e6:.1f} MB" if self.unit == "bytes" else f"{number:,.0f}"
