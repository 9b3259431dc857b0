"""Progress with rate and time left."""

from __future__ import annotations

import sys
import time
from typing import Any


class Bar:
    """A bar, or a line now and then where nobody watches; silent when not wanted.

    Args:
        title: what is under way.
        step, updates: where it starts and ends.
    """

    def __init__(self, wanted: bool, title: str, step: int, updates: int) -> None:
        self.wanted, self.title, self.start, self.updates = wanted, title, step, updates
        self.progress: Any = None

    def __enter__(self) -> Bar:
        if self.wanted and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.progress = Progress(*columns, console=Console(stderr=True))
            self.progress.start()
            fields = {"rate": "", "note": ""}
            self.task = self.progress.add_task(self.title, total=self.updates, completed=self.start, **fields)
        self.began, self.printed = time.perf_counter(), 0.0
        return self

    def update(self, step: int) -> None:
        rate = (step - self.start) / max(1e-9, time.perf_counter() - self.began)
        if self.progress:
            self.progress.update(self.task, completed=step, rate=f"{rate:.0f} updates/s")
        elif self.wanted and time.perf_counter() - self.began - self.printed > 15:
            self.printed = time.perf_counter() - self.began
            left = (self.updates - step) / max(rate, 1e-9)
            line = f"{self.title}: {step}/{self.updates} updates, {rate:.0f}/s, {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        if self.progress:
            self.progress.update(self.task, note=text)

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()
