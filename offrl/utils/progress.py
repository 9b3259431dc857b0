"""Progress with rate and time left."""

from __future__ import annotations

import sys
import time
from typing import Any

SECONDS_BETWEEN_LINES = 15.0


class Bar:
    """A bar, or a line now and then where nobody watches; silent when not wanted.

    Args:
        title: what is under way.
        step, total: where it starts and ends; `update` may tell the end later.
        unit: what is counted; "bytes" are shown as megabytes.
    """

    def __init__(self, wanted: bool, title: str, step: int, total: int | None, unit: str = "updates") -> None:
        self.wanted, self.title, self.start, self.total, self.unit = wanted, title, step, total, unit
        self.progress: Any = None

    def __enter__(self) -> Bar:
        if self.wanted and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                DownloadColumn() if self.unit == "bytes" else MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.progress = Progress(*columns, console=Console(stderr=True))
            self.progress.start()
            fields = {"rate": "", "note": ""}
            self.task = self.progress.add_task(self.title, total=self.total, completed=self.start, **fields)
        self.began, self.printed = time.perf_counter(), 0.0
        return self

    def update(self, step: int, total: int | None = None) -> None:
        self.total = total or self.total
        per_second = max(0, step - self.start) / max(1e-9, time.perf_counter() - self.began)
        rate = f"{per_second / 1e6:.1f} MB/s" if self.unit == "bytes" else f"{per_second:.0f} {self.unit}/s"
        if self.progress:
            self.progress.update(self.task, completed=step, total=self.total, rate=rate)
        elif self.wanted and time.perf_counter() - self.began - self.printed > SECONDS_BETWEEN_LINES:
            self.printed = time.perf_counter() - self.began
            end, left = "?", "?"
            if self.total:
                end, left = f"{self.total:,}", f"{(self.total - step) / max(per_second, 1e-9):.0f}"
            print(f"{self.title}: {step:,}/{end} {self.unit}, {rate}, {left} s left", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        if self.progress:
            self.progress.update(self.task, note=text)

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()
