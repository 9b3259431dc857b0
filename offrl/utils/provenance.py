"""Where numbers come from: versions, git state, machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from functools import cache
from typing import Any

from offrl.utils.paths import PACKAGE


def environment() -> dict[str, Any]:
    """What a run depends on besides its configuration: versions, git state and machine, fit for JSON.

    `git` is None unless offrl runs from a checkout of its own repository; a missing package has version None.
    """
    import torch

    cuda = torch.cuda.is_available()
    return {
        "versions": {
            "python": platform.python_version(),
            "offrl": version_of("offrl"),
            **{
                name: version_of(name)
                for name in ("torch", "numpy", "gymnasium", "mujoco", "gymnasium-robotics", "minari")
            },
            "cuda": torch.version.cuda if cuda else None,
        },
        "git": _git_state(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }


@cache
def version_of(package: str) -> str | None:
    """The version of an installed package; None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    # An installed copy may lie inside a checkout of something else: only a tracked package counts.
    if not _git("ls-files", "__init__.py"):
        return None
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    if sys.platform.startswith("linux"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
