"""Sweeps: each job is a process of its own, and how it ended is noted, shown and summed up.

Launchers (Hydra's basic one, submitit, and those of `hydra_plugins/offrl_launchers.py`) schedule jobs; this module defines what
one does. A run that is finished is seen by its `result.json` and skipped. Any other is trained in a fresh interpreter whose
output goes to `log.txt` in the run's folder, so a job that is killed, or takes its process down, is a failed job and not a
failed sweep.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import HydraException
from hydra.experimental.callback import Callback

from offrl.results.rows import FAILURE, LOG, progress
from offrl.training.child import REFUSED, SENTENCE
from offrl.training.compose import let_recipes_add
from offrl.training.failed_jobs import keep_failures
from offrl.training.one_folder import clash
from offrl.training.run_config import resolve_config
from offrl.training.runs import done_before, finished, summary
from offrl.utils.errors import OffrlError
from offrl.utils.files import read_json
from offrl.utils.locks import lock
from offrl.utils.paths import replacing

if TYPE_CHECKING:
    from rich.console import Console, Group

STOP = "stop"  # among the notes: no further job is to start
CHILD = "offrl.training.child"  # the module that a job's process runs
LOCK = "lock"  # among the notes: held by the sweep's own process while it lives

# ---- one job, wherever the launcher runs it ------------------------------------------------------------------


def run_job(values: Mapping[str, Any], note: Path, env: Mapping[str, str] | None = None) -> int:
    """Train as a composed configuration says, in a process of its own.

    Args:
        note: JSON file that tells the sweep's own process how the job stands.
        env: environment variables for the training process, besides this one's; `import_path()` of the sweep's own process
            as PYTHONPATH, since a launcher's processes may find other modules.

    Returns the exit status: 0, 130 when it was stopped and saved, 1 when it failed. Nothing is raised, lest a launcher
    gives up the other jobs.
    """
    folder = None
    try:
        job = resolve_config(values)
        folder = job.folder()
        if done := done_before(job):
            _note(note, "finished", folder, summary(done))
            return 0
        if (note.parent / STOP).exists():
            return 130
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FAILURE).unlink(missing_ok=True)
        status = _train_in_child(values, folder / LOG, lambda pid: _note(note, "running", folder, pid=pid), env or {})
        done = finished(folder, job.train.total_updates) if status == 0 else None
    except (OffrlError, OSError) as error:
        fail(note, folder, str(error))
        return 1
    except Exception as error:
        fail(note, folder, f"{type(error).__name__}: {error}")
        return 1
    if done:
        _note(note, "finished", folder, summary(done).replace("already finished", "finished", 1))
    elif status == 130:
        _note(note, "stopped", folder, f"saved; the same command goes on; {folder}")
        return 130
    elif status < 0 and (note.parent / STOP).exists():
        _note(note, "stopped", folder, f"before its first update; the same command goes on; {folder}")
        return 130
    else:
        fail(note, folder, _reason(status, folder / LOG))
        return 1
    return 0


def _train_in_child(
    values: Mapping[str, Any], log: Path, started: Callable[[int], None], env: Mapping[str, str]
) -> int:
    """The exit status of a training process, negative for the signal that ended it; `started` gets its number.

    -P keeps Python from putting the current folder, where a user may have a `random.py`, in front of its own modules.
    """
    with open(log, "ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", CHILD, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": import_path(), **env},
        )
        started(child.pid)
        try:
            child.communicate(json.dumps(values).encode())
        except KeyboardInterrupt:  # let it save
            child.terminate()
            return child.wait() or 130
    return child.returncode


def import_path() -> str:
    """The folders from which this process imports, in its order, as PYTHONPATH has them."""
    return os.pathsep.join(os.path.abspath(entry) for entry in sys.path)


def _reason(status: int, log: Path) -> str:
    """Why a job failed, in a line."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"its process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = _tail(log, 1000)
    if status == REFUSED:  # its own sentence: another process may have written to the log since
        lines = [line for line in lines if line.startswith(SENTENCE)] or lines
    return lines[-1].removeprefix(SENTENCE) if lines else f"exit status {status}"


def _tail(log: Path, lines: int = 9) -> list[str]:
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 20_000))
        return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()][-lines:]
    return []


def fail(note: Path, folder: Path | None, message: str) -> None:
    """Tell the sweep's own process, and `offrl status` where there is a run's folder, why a job failed."""
    if folder and folder.is_dir():
        with contextlib.suppress(OSError):
            _write(folder / FAILURE, {"message": message, "log": LOG, "time": time.time()})
    _note(note, "failed", folder, message)


def _note(path: Path, state: str, folder: Path | None, message: str = "", pid: int = 0) -> None:
    if path.parent.is_dir():  # else nobody watches any more
        note = {"state": state, "folder": str(folder or ""), "message": message, "pid": pid, "host": platform.node()}
        with contextlib.suppress(OSError):  # a full disk shows in the run itself
            _write(path, note)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value) + "\n")


@dataclass(frozen=True)
class _Note:
    """How a job stands, as its process tells the sweep's own."""

    state: str
    folder: str
    message: str
    pid: int
    host: str


# ---- the sweep's own process ---------------------------------------------------------------------------------


@dataclass
class Job:
    """A job as the sweep's own process sees it."""

    name: str
    words: str = ""
    state: str = "waiting"
    folder: Path = field(default_factory=Path)
    message: str = ""
    pid: int = 0  # of its training process, where that runs on this machine
    shown: str = "running"  # state that was shown last

    @property
    def is_homeless(self) -> bool:
        """Whether it failed before it had a folder, where `offrl status` would see it."""
        return self.state == "failed" and not (self.folder / FAILURE).is_file()


class Sweep:
    """The jobs of a sweep; as a context manager it shows them while the launcher runs them and sums up at the end.

    Args:
        begun: called with the folder for the jobs' notes (`0.json`, ...), before the first job is launched.
    """

    current: Sweep | None = None

    def __init__(self, begun: Callable[[Path], None]) -> None:
        self.begun = begun
        self.notes = Path()
        self.jobs: list[Job] = []
        self.refused = ""  # why the sweep could not begin
        self._seen: dict[int, int] = {}
        self._before: dict[int, Any] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Sweep:
        Sweep.current = self
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _stop(self, *_: object) -> None:
        """On SIGINT or SIGTERM: no further job begins, and those that run save. Only then launchers hear of it: some kill."""
        for number in self._before:
            signal.signal(number, signal.default_int_handler)  # the second time is meant
        if self.notes != Path():
            with contextlib.suppress(OSError):
                (self.notes / STOP).touch()
            asked: set[int] = set()
            began = training = time.monotonic()
            while (now := time.monotonic()) < training + 5 and now < began + 60:
                running = {job.pid for job in self.jobs if job.state == "running" and job.pid}
                for pid in running - asked:
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGTERM)
                asked |= running
                training = now if any(map(_trains, asked)) else training
                if now > began + 1 and not running:  # a job may just have been announced
                    break
                time.sleep(0.1)
        raise KeyboardInterrupt

    def begin(self, out: Path, jobs: Sequence[Sequence[str]]) -> None:
        """Hydra is about to launch these jobs, given by their words."""
        self.notes = out.absolute() / ".sweep" / f"{time.time_ns():x}"
        with _alone(out):
            _clear(self.notes.parent)
            self.notes.mkdir(parents=True)
            self._lock = open(self.notes / LOCK, "w")  # noqa: SIM115 - held until the sweep ends
            with contextlib.suppress(OSError):  # a file system without locks: then nobody clears
                lock(self._lock)
        self.out = out
        self.add(jobs)
        self.begun(self.notes)
        self._thread.start()

    def add(self, jobs: Sequence[Sequence[str]]) -> None:
        """Further jobs, which a sweeper has just thought of."""
        shared = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
        for words in jobs:
            name = " ".join(w.lstrip("+") for w in words if w not in shared) or "the job"
            self.jobs.append(Job(name, " ".join(w.lstrip("+") for w in words)))

    def look(self, numbers: Iterable[int]) -> list[Job]:
        """How jobs stand that a launcher has run; what the display has not seen yet is still shown."""
        for number in numbers:
            self._take(number)
        return [self.jobs[number] for number in numbers]

    def __exit__(self, *_: object) -> None:
        Sweep.current = None
        self._over.set()
        if self._thread.ident:
            self._thread.join()
            keep_failures(self.out, {job.words: job.message for job in self.jobs if job.is_homeless}, self._tried())
            self._lock.close()
            shutil.rmtree(self.notes, ignore_errors=True)
            with contextlib.suppress(OSError):  # another sweep's notes may be there
                self.notes.parent.rmdir()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def status(self) -> int:
        """0 when all jobs are finished, 130 when one was stopped, else 1."""
        states = {job.state for job in self.jobs}
        return 0 if states <= {"finished"} else 130 if "stopped" in states else 1

    def summary(self) -> list[str]:
        """How the sweep ended: a line, and for each failure its reason, log and the log's last lines."""
        lines = [f"{len(self.jobs)} jobs: {_counts(self.jobs)}"] if self.jobs else []
        for number, job in enumerate(self.jobs):
            if job.state == "failed":
                lines.append(f"job {number} failed: {job.name}: {job.message}")
                if (log := job.folder / LOG).is_file() and job.folder != Path():
                    lines.append(f"  log: {log}")
                    lines += [f"  | {line}" for line in _tail(log)[:-1]]
        if any(job.state != "finished" for job in self.jobs):
            lines.append("the same command goes on with what is not finished")
        return lines

    # ---- what is shown ----------------------------------------------------------------------------------------

    def _read(self) -> list[int]:
        """Take in the notes; the numbers of the jobs that have ended and were not shown yet."""
        for path in self.notes.glob("*.json"):  # of a sweeper that tells of no jobs beforehand
            while path.stem.isdecimal() and int(path.stem) >= len(self.jobs):
                self.jobs.append(Job(f"job {len(self.jobs)}"))
        ended = []
        for number, job in enumerate(list(self.jobs)):
            self._take(number)
            if job.state not in ("waiting", "running", job.shown):
                ended.append(number)
                job.shown = job.state
        return ended

    def _take(self, number: int) -> None:
        """Take in a job's note, if it has changed."""
        job, path = self.jobs[number], self.notes / f"{number}.json"
        with contextlib.suppress(OSError, OffrlError):  # a job may be writing it
            stamp = path.stat().st_mtime_ns
            if self._seen.get(number) == stamp:
                return
            note = read_json(path, _Note, "it is written again")
            self._seen[number] = stamp
            job.state, job.folder, job.message = note.state, Path(note.folder), note.message
            job.pid = note.pid if note.host == platform.node() else 0

    def _tried(self) -> set[str]:
        """The words of the jobs that have begun."""
        return {job.words for job in self.jobs if job.state != "waiting"}

    def _watch(self) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(soft_wrap=True, highlight=False, markup=False)
        live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
        printed = time.monotonic()
        with live or contextlib.nullcontext():
            while True:
                over = self._over.wait(0.5)
                for number in self._read():
                    job = self.jobs[number]
                    text = job.message if job.state == "finished" else f"{job.state}: {job.message}"
                    console.print(f"[{number}] {job.name}: {text}", style="red" if job.state == "failed" else None)
                if over:
                    break
                if live:
                    live.update(self._running(console))
                elif time.monotonic() - printed > 60:
                    printed = time.monotonic()
                    console.print("\n".join([_counts(self.jobs), *map("  ".join, self._rows())]))

    def _rows(self) -> list[tuple[str, str]]:
        """(name, progress) of the jobs that run."""
        running = [job for job in self.jobs if job.state == "running"]
        return [(job.name, str(progress(job.folder))) for job in running]

    def _running(self, console: Console) -> Group:
        from rich.console import Group
        from rich.table import Table

        table = Table(box=None, show_header=False, pad_edge=False)
        for row in self._rows()[: max(1, console.height - 4)]:
            table.add_row(*row)
        return Group(table, _counts(self.jobs))


def _counts(jobs: Sequence[Job]) -> str:
    states = ("finished", "running", "waiting", "stopped", "failed")
    counts = {state: sum(job.state == state for job in jobs) for state in states}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)


def _trains(pid: int) -> bool:
    """Whether a training process is still at it; one that has ended and was not waited for is not."""
    with contextlib.suppress(OSError):
        return CHILD.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make the folder; no other process is in here with the same one."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            lock(handle)
        yield
    finally:
        os.close(handle)


def _clear(folder: Path) -> None:
    """Remove the notes of sweeps that were killed: their locks are free."""
    for notes in folder.glob("*"):
        with contextlib.suppress(OSError), open(notes / LOCK, "w") as file:
            lock(file, wait=False)
            shutil.rmtree(notes)


class SweepCallback(Callback):
    """Hydra's callback that tells a `Sweep` which jobs are to come."""

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        let_recipes_add(config)
        if Sweep.current is None:
            return
        jobs = _jobs_of(config)
        refused = clash(config, jobs)
        try:
            if not refused:
                Sweep.current.begin(Path(config.out), jobs)
        except OSError as error:
            refused = f"out={config.out} can't be written ({error.strerror}); choose another with out=DIR."
        if refused:
            Sweep.current.refused = refused
            raise KeyboardInterrupt  # Hydra makes a warning of whatever else a callback raises


def _jobs_of(config: Any) -> list[list[str]]:
    """The words of each job; none where the sweeper is not Hydra's own, which alone knows its jobs beforehand."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    if not str(config.hydra.sweeper._target_).endswith(".BasicSweeper"):
        return []
    words = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    task: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)  # each job resolves its own
    try:
        return BasicSweeper.split_arguments(parser.parse_overrides([*words, *task]), None)[0]
    except HydraException:  # an interval: the sweeper says so itself
        return []
