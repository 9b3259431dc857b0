"""One progress bar for everything that takes long: rate and time left, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
LINE_EVERY = 15.0  # seconds between lines where standard error is no terminal
REDRAW_EVERY = 0.1  # seconds between updates of the bar


class Bar:
    """A progress bar in a terminal, a line every 15 seconds elsewhere; silent if not wanted.

    Args:
        title: name of the work.
        step: number of steps already done; total: number of steps in the end, None while unknown.
        unit: name of a step; "B" shows bytes as kB, MB, GB.

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
        self.shown = self.began if self.progress is None else 0.0
        return self

    def update(self, step: int, total: int | None = None) -> None:
        """Show that `step` steps are done, of `total` if that has become known."""
        self.total = total or self.total
        now = time.perf_counter()
        if not self.wanted or (now - self.shown < self._interval and step != self.total):
            return
        rate = (step - self.start) / max(1e-9, now - self.began)
        speed = f"{self._amount(rate)}/s"
        done = f"{self._amount(step)}/{self._amount(self.total) if self.total else '?'}"
        done += "" if self.unit == "B" else f" {self.unit}"
        if self.progress:
            self.progress.update(self.task, completed=step, total=self.total, done=done, rate=speed)
        elif now - self.shown >= LINE_EVERY:
            left = f", {(self.total - step) / max(rate, 1e-9):.0f} s left" if self.total else ""
            print(f"{self.title}: {done}, {speed}{left}", file=sys.stderr, flush=True)
        else:
            return
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

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()

    @property
    def _interval(self) -> float:
        return REDRAW_EVERY if self.progress else LINE_EVERY

    def _amount(self, number: float) -> str:
        if self.unit != "B":
            return f"{number:,.0f}"
        for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
            if number >= size:
                return f"{number / size:.1f} {name}"
        return f"{number:.0f} B"
