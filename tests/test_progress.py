"""The progress bar: what a line and a terminal show, and that an unwanted one shows nothing."""

from __future__ import annotations

import io

import pytest

from offrl.utils import progress
from offrl.utils.progress import Bar


class Clock:
    """A clock that tests set."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_lines_come_every_15_seconds_with_rate_and_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """The first line comes after 3 s. From step 1,000 on: 700 steps in 20 s are 35/s, so the other 1,300 take 37 s."""
    with Bar(True, "job", 1000, 3000) as bar:
        for seconds, step in ((1, 1040), (4, 1160), (16, 1600), (20, 1700), (36, 2000)):
            clock.now = 100 + seconds
            bar.update(step)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "job: 1,160/3,000 updates, 40/s, 46 s left",
        "job: 1,700/3,000 updates, 35/s, 37 s left",
        "job: 2,000/3,000 updates, 28/s, 36 s left",
    ]


def test_bytes_of_an_unknown_total(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Bar(True, "file", unit="bytes") as bar:
        clock.now = 120
        bar.update(30_000_000)
        clock.now = 140
        bar.update(60_000_000, total=90_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "file: 30,000,000/? bytes, 1.5 MB/s",
        "file: 60,000,000/90,000,000 bytes, 1.5 MB/s, 20 s left",
    ]


def test_no_time_is_left_to_tell_before_anything_is_done(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Bar(True, "job", 0, 3000) as bar:
        clock.now = 120
        bar.update(0)
    assert capsys.readouterr().err.splitlines() == ["job: 0/3,000 updates, 0/s"]


def test_a_terminal_has_a_bar_and_an_unwanted_one_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    for wanted in (True, False):
        screen = Terminal()
        monkeypatch.setattr("sys.stderr", screen)
        with Bar(wanted, "job", 0, 3, unit="steps") as bar:
            assert list(bar.track("abc")) == ["a", "b", "c"]
            bar.note("finished")
        shown = screen.getvalue()
        assert ("job" in shown and "3/3 steps" in shown and "finished" in shown) is wanted
        assert bool(shown) is wanted
