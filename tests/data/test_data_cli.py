"""`offrl data ...`: what the commands print and write, and that every bad input is one sentence."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from offrl.cli.data import add_parser
from offrl.cli.main import main
from offrl.datasets import load
from offrl.utils.errors import OffrlError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    return tmp_path / "home"


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["data", *words])
    status: int = arguments.run(arguments)
    return status


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "hopper-medium-v2.npz"
    np.savez(
        path,
        observations=rng.standard_normal((200, 3)),
        actions=rng.uniform(-1, 1, (200, 2)),
        rewards=rng.standard_normal(200),
        terminals=np.arange(200) % 20 == 19,
        timeouts=np.arange(200) % 50 == 30,
    )
    return path


def test_bounds_and_family_may_be_given(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy.npz"
    run("convert", str(source), str(copy), "--action-low=-1,-2", "--action-high=2,1", "--as-family", "antmaze")
    info = load(copy).info
    assert (info.action_low, info.action_high, info.family) == ((-1.0, -2.0), (2.0, 1.0), "antmaze")
    with pytest.raises(SystemExit):
        run("convert", str(source), str(copy), "--action-low=a")
    assert "--action-low: a should be a number, or numbers separated by commas" in capsys.readouterr().err


def test_list_by_family_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--family", "kitchen") == 0
    shown = capsys.readouterr().out
    assert "kitchen-mixed-v0" in shown
    assert "D4RL/kitchen/mixed-v2" in shown
    assert "hopper" not in shown
    run("list", "--source", "d4rl")
    shown = capsys.readouterr().out
    assert "183 datasets" in shown
    assert "D4RL/kitchen" not in shown
    with pytest.raises(OffrlError, match="no dataset of that family"):
        run("list", "--family", "chess")


def test_list_local_shows_what_is_here(source: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("list", "--source", "local")
    assert "0 datasets" in capsys.readouterr().out
    run("convert", str(source), str(home / "d4rl/hopper-medium-v2.hdf5"))
    run("list", "--source", "local")
    shown = capsys.readouterr().out
    assert "1 datasets" in shown
    assert "hopper-medium-v2" in shown


def test_info_prints_tables_or_json_and_draws(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", str(source), "--plot", str(tmp_path / "p.png")) == 0
    shown = capsys.readouterr().out
    assert "hopper-medium-v2" in shown
    assert "behaviour's score" in shown
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert run("info", str(source), "--json", "--semantics", "d4rl") == 0
    description = json.loads(capsys.readouterr().out)
    assert description["provenance"]["semantics"] == "d4rl"
    assert description["fingerprint"] == load(source, semantics="d4rl").fingerprint


@pytest.mark.parametrize("suffix", [".npz", ".hdf5", ".h5", ".safetensors"])
def test_convert_writes_the_same_dataset(source: Path, tmp_path: Path, suffix: str) -> None:
    dest = tmp_path / f"out/copy{suffix}"
    assert run("convert", str(source), str(dest)) == 0
    copy = load(dest)
    assert copy.fingerprint == load(source).fingerprint
    assert (copy.info.id, copy.info.env_id) == ("hopper-medium-v2", "Hopper-v4")


def test_convert_to_a_minari_folder(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("minari")
    assert run("convert", str(source), str(tmp_path / "minari/copy-v0")) == 0
    lost = int(load(source).has_tail.sum())
    assert (f"no room for the last steps of {lost} episodes" in capsys.readouterr().err) is (lost > 0)
    copy, original = load("copy-v0"), load(source)
    np.testing.assert_array_equal(copy.observations, original.observations)
    np.testing.assert_array_equal(copy.actions, original.actions)
    np.testing.assert_array_equal(copy.terminations, original.terminations)
    np.testing.assert_array_equal(copy.offsets, original.offsets)
    # Only a last step whose successor nobody knows stays behind.
    np.testing.assert_allclose(copy.returns, original.returns - original.tail_rewards, rtol=0, atol=1e-5)
    assert (copy.info.env_id, copy.info.ref_max) == ("Hopper-v4", 3234.3)
    with pytest.raises(OffrlError, match="exists already"):
        run("convert", str(source), str(tmp_path / "minari/copy-v0"))
    with pytest.raises(OffrlError, match="must end in -v0"):
        run("convert", str(source), str(tmp_path / "minari/copy"))


def test_convert_repairs_actions(tmp_path: Path) -> None:
    path = tmp_path / "wide.npz"
    flags = np.arange(40) % 10 == 9
    np.savez(path, observations=np.zeros((40, 2)), actions=np.full((40, 1), 1.5), rewards=np.zeros(40), terminals=flags)
    with pytest.raises(OffrlError, match="clip_actions=True"):
        run("info", str(path))
    assert run("convert", str(path), str(tmp_path / "good.npz"), "--clip-actions") == 0
    assert float(load(tmp_path / "good.npz").actions.max()) == 1.0
    assert run("convert", str(path), str(tmp_path / "bounded.hdf5"), "--action-bound", "2") == 0
    assert load(tmp_path / "bounded.hdf5").info.action_high == 2.0  # the file carries its bounds


def test_build_calls_the_forge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(
        "offrl.forge.registry.ensure", lambda name, **options: asked.append((name, options)) or tmp_path
    )
    assert run("build", "forge/hopper/medium-v0", "--size", "500", "--seed", "3", "--force") == 0
    assert asked == [("forge/hopper/medium-v0", {"size": 500, "seed": 3, "force": True})]
    assert str(tmp_path) in capsys.readouterr().out
    with pytest.raises(OffrlError, match="--size 0"):
        run("build", "forge/hopper/medium-v0", "--size", "0")


def test_bad_inputs_are_one_sentence(source: Path, tmp_path: Path) -> None:
    (tmp_path / "data.pkl").write_bytes(pickle.dumps({}))
    (tmp_path / "folder").mkdir()
    cases = [
        (("info", "hopper-medium-v3"), "did you mean"),
        (("info", "hopper-medium-v2"), "offrl data fetch hopper-medium-v2"),
        (("info", str(tmp_path / "data.pkl")), "pickle"),
        (("info", str(tmp_path / "folder")), "no dataset"),
        (("info", str(tmp_path / "none.hdf5")), "no such file"),
        (("fetch", "nothing-v0"), "no such dataset"),
        (("convert", str(source), str(tmp_path / "out.csv")), "unknown format"),
        (("convert", str(source), str(source / "out.npz")), "cannot be written"),
        (("info", str(source), "--plot", str(source / "p.png")), "cannot be written"),
    ]
    for words, message in cases:
        with pytest.raises(OffrlError, match=message) as caught:
            run(*words)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.npz", "x.hdf5", "x.safetensors", "x"])
def test_pipes_and_devices_are_no_datasets(name: str, tmp_path: Path) -> None:
    """Nobody writes to the pipe: opening it must not wait."""
    os.mkfifo(tmp_path / name)
    for path in (str(tmp_path / name), "/dev/zero"):
        with pytest.raises(OffrlError, match="a pipe, a device or a folder; give a file"):
            run("info", path)


def test_the_command_line_leaves_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "info", str(tmp_path / "none.hdf5")]) == 2
    shown = capsys.readouterr()
    assert "no such file" in shown.err
    assert "Traceback" not in shown.err
