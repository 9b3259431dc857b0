"""The kernels as processors with narrower vectors get them: their tests, with vectors of eight and of four numbers."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import KERNELS_CC
from torch.backends import cpu

FILES = (
    "test_kernels.py",
    "test_program.py",
    "test_neighbor_codes.py",
    "histories/test_recurrent.py",
    "augment/test_convolution.py",
)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the names of these processors are Intel's and AMD's"
)
@pytest.mark.parametrize("processor", ["x86-64-v3", "x86-64"])
def test_the_kernels_tests_with_narrower_vectors(compiled: None, processor: str) -> None:
    if processor == "x86-64-v3" and cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has no vectors of eight numbers")
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *FILES]
    env = {**os.environ, "KERNELS_CC": f"{KERNELS_CC} -march={processor}"}
    done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed, skipped = (int((re.findall(rf"(\d+) {what}", done.stdout) or [0])[-1]) for what in ("passed", "skipped"))
    assert passed > 150
    assert skipped <= 1, done.stdout  # were there no kernels of this kind, their tests would skip themselves
