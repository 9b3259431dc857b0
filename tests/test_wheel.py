"""What the wheel holds: the package with its data, our launchers, the configuration; and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel(tmp_path: Path) -> None:
    pytest.importorskip("build")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        (about,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(wheel.read(about).decode())
        entry_points = wheel.read(about.replace("METADATA", "entry_points.txt")).decode()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    wanted = {name for name in tracked if name.startswith(("offrl/", "hydra_plugins/"))}
    wanted |= {f"offrl/{name}" for name in tracked if name.startswith("conf/")}
    folder = about.removesuffix("METADATA")
    assert {name for name in names if not name.startswith(folder)} == wanted
    assert {"offrl/py.typed", "offrl/conf/train.yaml", "hydra_plugins/offrl_launchers.py"} <= names
    assert f"{folder}licenses/LICENSE" in names
    assert "offrl = offrl.cli.main:main" in entry_points
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert {"video", "export", "docs"} <= set(metadata.get_all("Provides-Extra", []))
