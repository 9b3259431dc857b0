"""One command line in a process of its own, within limits, and a verdict on what it did.

Good is success, or one sentence on standard error with exit status 2. Bad is a traceback, another exit status, several
sentences, a death by signal, too much time or memory, the import of a canary module, the opening of a canary file, a
refused command that changed the run folder it was given, and a success whose result is wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import resource
import select
import signal
import stat
import struct
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

CANARY = "offrl_fuzz_canary"  # a module that nothing may import, and the stem of files that nothing may open
CPU_SECONDS, WALL_SECONDS = 30, 300  # of one input; an honest one takes less than 5 CPU seconds, a busy machine longer
MEMORY = 3 << 30  # bytes that an input may add to what the libraries take
MOST_LETTERS = 1500  # of a sentence
_WENT_ON = "is no longer finite at update"  # of a training that began
_IN_OPEN, _IN_NONBLOCK = 0x20, 0x800


@dataclass(frozen=True)
class Case:
    """A command with its input.

    Attributes:
        words: what follows `offrl`.
        what: what was done to an honest input, for the reader of a bad one.
        guarded: a run folder that a refused command leaves as it is.
        sweep: whether status 1 is an answer, too.
        limits: of `resource`, such as RLIMIT_FSIZE: what stands for a full disk. stdout: where standard output goes.
        wrong: called after a success; says in words what is not as it should be.
    """

    words: list[str]
    what: str
    guarded: Path | None = None
    sweep: bool = False
    env: dict[str, str] = field(default_factory=dict)
    limits: dict[int, int] = field(default_factory=dict)
    stdout: str | None = None
    wrong: Callable[[], str] = str


@dataclass(frozen=True)
class Verdict:
    """`success`, `refused` or `usage` (argparse's own answer) are good, everything else is bad."""

    name: str
    detail: str

    @property
    def bad(self) -> bool:
        return self.name not in ("success", "refused", "usage")


class Watch:
    """Sees whether any process opens one of some files, by whatever library (Linux's inotify)."""

    def __init__(self, files: list[Path]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = libc.inotify_init1(_IN_NONBLOCK)
        if self.descriptor < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self.names = {libc.inotify_add_watch(self.descriptor, os.fsencode(f), _IN_OPEN): f.name for f in files}

    def opened(self) -> str | None:
        """The name of a watched file that was opened since the last call."""
        try:
            events = os.read(self.descriptor, 1 << 16)
        except BlockingIOError:
            return None
        return self.names.get(struct.unpack_from("i", events)[0], "?")


class Judge:
    """Runs cases, one after another.

    Args:
        place: folder for the output of the cases, with `CANARY.py` and files that nothing may open.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.mark = place, place / "imported"
        canaries = place / "canaries"
        canaries.mkdir(parents=True, exist_ok=True)
        module = canaries / f"{CANARY}.py"
        module.write_text(f"open({str(self.mark)!r}, 'w').close()\nclass Thing:\n    pass\n")
        sys.path.append(str(canaries))
        self.watch = Watch([file for file in canaries.iterdir() if file.is_file() and file != module])

    def judge(self, case: Case, folder: Path) -> Verdict:
        """The verdict on a case whose current folder is `folder`."""
        before = _content(case.guarded)
        self.watch.opened()
        status, out, err = self._run(case, folder)
        if self.mark.exists():
            self.mark.unlink()
            return Verdict("imported", "a module that the input names was imported")
        if name := self.watch.opened():
            return Verdict("read outside", f"{name} was opened")
        verdict = _of_output(status, out, err, case.sweep)
        if verdict.name == "success" and (wrong := case.wrong()):
            return Verdict("wrong", wrong)
        trained = _WENT_ON in verdict.detail  # it was taken, and its numbers led nowhere
        if verdict.name != "success" and not trained and (changed := _difference(before, _content(case.guarded))):
            return Verdict("changed", f"{changed} is another after: {verdict.detail}")
        return verdict

    def _run(self, case: Case, folder: Path) -> tuple[int | str, str, str]:
        """Exit status (in words: why there is none), standard output and standard error."""
        outputs = [self.place / "out.txt", self.place / "err.txt"]
        process = os.fork()
        if not process:
            _child(case, folder, outputs)
        deadline, status = time.monotonic() + WALL_SECONDS, None
        descriptor = os.pidfd_open(process)
        try:
            while status is None and (left := deadline - time.monotonic()) > 0:
                if select.select([descriptor], [], [], left)[0]:
                    status = os.waitpid(process, 0)[1]
        finally:
            os.close(descriptor)
            _end_group(process)
        if status is None:
            os.waitpid(process, 0)
        out, err = (path.read_text(errors="replace") for path in outputs)
        if status is None:
            return "hang", out, err
        code = os.waitstatus_to_exitcode(status)
        return (code if code >= 0 else f"signal {signal.Signals(-code).name}"), out, err


def _child(case: Case, folder: Path, outputs: list[Path]) -> NoReturn:
    """The process of a case: everything that a user's process has, but limits."""
    status = 70
    try:
        os.setsid()
        for descriptor, path in zip((1, 2), outputs):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        if case.stdout:
            os.dup2(os.open(case.stdout, os.O_WRONLY), 1)
        sys.stdin = open(os.devnull)  # noqa: SIM115 - until the process ends
        sys.stdout, sys.stderr = (open(d, "w", closefd=False) for d in (1, 2))  # noqa: SIM115
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        spent = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (spent + CPU_SECONDS, spent + CPU_SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        os.environ.update(case.env)
        for limit, value in case.limits.items():
            resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
        warnings.simplefilter("ignore")
        from offrl.cli.main import main
        from offrl.utils import progress

        # No lines that a slow machine alone would show.
        progress.SECONDS_TO_FIRST_LINE = progress.SECONDS_BETWEEN_LINES = 1e9
        status = main(case.words)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _end_group(leader: int) -> None:
    """End a case's process and those it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _of_output(status: int | str, out: str, err: str, sweep: bool) -> Verdict:
    lines = [line for line in err.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if isinstance(status, str):
        return Verdict("hang" if status in ("hang", "signal SIGXCPU") else "died", f"{status}: {last}")
    if "Traceback (most recent call last)" in err + out:
        place = re.findall(r'File ".*?/((?:offrl|hydra|site-packages)/[^"]*)", line (\d+)', err)
        where = ":".join(place[-1]) if place else "?"
        ours = [":".join(p) for p in place if p[0].startswith("offrl/")]
        return Verdict("traceback", f"{last[:300]} ({ours[-1] if ours else where})")
    if status == 0:
        return Verdict("success", last[:300])
    sentences = [line for line in lines if line.startswith("offrl: error: ")]
    if status == 1 and sweep:
        return Verdict("refused", last[:300])
    if status != 2:
        return Verdict("status", f"exit status {status}: {last[:300]}")
    if (lines and lines[0].startswith("usage: ") and ": error: " in last) or (not lines and out.startswith("usage: ")):
        return Verdict("usage", last[:300])
    if len(sentences) != 1 or len(lines) != 1:
        return Verdict("not one sentence", " | ".join(lines)[:400])
    if len(last) > MOST_LETTERS or not last.rstrip().endswith((".", "?", ")")):
        return Verdict("not one sentence", f"{len(last)} letters: {last[:300]}")
    return Verdict("refused", last[:300])


def _content(folder: Path | None) -> dict[str, str]:
    """Digests of a folder's files but for locks; links, pipes and very large files count by their name."""
    if folder is None:
        return {}
    files = (f for f in sorted(folder.rglob("*")) if f.name != ".lock" and not f.is_dir())
    return {str(f.relative_to(folder)): _digest(f) for f in files}


def _digest(file: Path) -> str:
    kind = file.lstat()
    plain = stat.S_ISREG(kind.st_mode) and kind.st_size < 1 << 28
    return hashlib.md5(file.read_bytes()).hexdigest() if plain else ""


def _difference(before: dict[str, str], after: dict[str, str]) -> str | None:
    return next((name for name in sorted(before | after) if before.get(name) != after.get(name)), None)
