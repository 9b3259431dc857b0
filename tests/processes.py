"""Processes of their own: a fresh interpreter, or, at a fraction of the cost, a fork of one that has imported offrl.

A fork is a process like any other to whoever signals or kills it, and to the files that it writes. What a test says of the
start or the end of an interpreter needs a fresh one.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import offrl
from offrl.cli.main import main

SERVER = multiprocessing.get_context("forkserver")
IMPORTED = ["offrl.cli.train", "gymnasium.envs.mujoco"]


def start(*arguments: str, **streams: Any) -> subprocess.Popen[str]:
    """`offrl ARGUMENTS` in a fresh interpreter, which also finds modules in the working directory."""
    path = os.pathsep.join([str(Path(offrl.__file__).parents[1]), str(Path.cwd())])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "offrl", *arguments], env=env, text=True, **streams)


class Fork:
    """A call in a process of its own, with the part of `Popen` that tests use."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        SERVER.set_forkserver_preload(IMPORTED)
        self.output, self.errors = (Path(tempfile.mkstemp(suffix=suffix)[1]) for suffix in (".out", ".err"))
        place = dict(os.environ), Path.cwd(), (self.output, self.errors)
        self.process = SERVER.Process(target=_call, args=(place, function, arguments))
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int | None:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("offrl", timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Output and errors, once it has ended."""
        self.wait(timeout)
        return self.output.read_text(), self.errors.read_text()


def fork(*arguments: str) -> Fork:
    """`offrl ARGUMENTS` in a fork, which also finds modules in the working directory."""
    return Fork(main, list(arguments))


def _call(place: tuple[dict[str, str], Path, tuple[Path, Path]], function: Callable[..., Any], arguments: Any) -> None:
    """What a fork does: it takes environment, folder, streams and customisation of a new interpreter, then calls."""
    env, folder, streams = place
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    if (folder / "sitecustomize.py").exists():
        runpy.run_path("sitecustomize.py", run_name="sitecustomize")
    status = function(*arguments)
    sys.exit(status if isinstance(status, int) else 0)
