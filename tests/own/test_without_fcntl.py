"""A system without fcntl, as Windows is: training says what to do, and reading data and acting work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

import offrl
from offrl.data import from_arrays
from offrl.data.arrays import write_npz

SCRIPT = """
import sys
sys.modules["fcntl"] = None  # importing it raises ModuleNotFoundError, as on Windows
import torch
import offrl
from offrl.cli import main as cli

print(len(offrl.load_data("mine.npz")))
agent = offrl.load_agent(sys.argv[1])
print(tuple(agent.select_action(torch.zeros(1, 3, 2)).shape))
print(cli.main(["train", "dataset=mine.npz", "agent=bc"]), cli.main(["status", "runs"]))
try:
    offrl.fit(dataset="mine.npz", agent="bc")
except offrl.utils.errors.OffrlError as error:
    print(str(error))
"""


def test_without_fcntl_data_is_read_and_agents_act(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {"observations": rng.random((8, 2)), "actions": rng.random((8, 1)), "rewards": np.ones(8)}
    write_npz(from_arrays(arrays | {"terminals": np.arange(8) % 4 == 3}), tmp_path / "mine.npz")
    unseen = {"every": 0, "final_episodes": 0}
    run = offrl.fit(
        dataset=str(tmp_path / "mine.npz"),
        agent="bc",
        updates=1,
        out=str(tmp_path / "runs"),
        eval=unseen,
        progress=False,
        **{"agent.hidden": [4]},
    )
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(run.folder)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    rows, shape, status, refusal = (
        line for line in done.stdout.splitlines() if "mine" not in line and "runs:" not in line
    )
    assert (rows, shape, status) == ("8", "(1, 3, 1)", "2 0")
    assert refusal.startswith("training needs Linux or macOS")
    assert "on Windows use WSL" in done.stderr
    assert "ModuleNotFoundError" not in done.stderr
