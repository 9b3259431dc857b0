"""Rows that survive kills, full disks and repeats."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import offrl
from offrl import results
from offrl.utils.errors import OffrlError
from offrl.utils.paths import PACKAGE
from offrl.utils.provenance import environment

RUN = {"run_id": "r1", "method": "bc", "dataset": "hopper-medium-v2", "env_id": "Hopper-v4", "updates": 30}


def write_steps(writer: results.RunWriter, steps, lanes=2, episodes=3, offset=0.0):
    """Evaluations whose returns tell lane, step and episode."""
    for step in steps:
        returns = offset + step + np.arange(lanes)[:, None] / 10 + np.arange(episodes) / 100
        seeds = list(range(5, 5 + lanes))
        lengths = np.full((lanes, episodes), step)
        writer.episodes(step, seeds, returns, lengths, returns / 7, list(range(1000, 1000 + episodes)))
        writer.metrics(step, seeds, {"loss": returns[:, 0], "q": returns[:, 1]}, updates_per_second=50.0)


def test_rows_come_back_exactly(tmp_path):
    with results.RunWriter(tmp_path / "run", RUN) as writer:
        write_steps(writer, [10, 30])
    frame = results.read([tmp_path])
    assert frame.columns == [*results.EPISODE_COLUMNS, "folder"]
    assert len(frame) == 2 * 2 * 3
    row = frame.filter(pl.col("step") == 30, pl.col("seed") == 6, pl.col("episode") == 2).to_dicts()[0]
    assert row["return_raw"] == 30 + 1 / 10 + 2 / 100  # bit for bit
    assert row["normalized"] == (30 + 1 / 10 + 2 / 100) / 7
    expected = {"run_id": "r1", "method": "bc", "env_id": "Hopper-v4", "lane": 1, "eval_seed": 1002, "length": 30}
    assert expected.items() <= row.items()
    assert row["checkpoint"] == "last"
    assert row["policy_mode"] == "deterministic"
    assert abs(row["wall_clock"] - time.time()) < 60
    assert set(frame.filter(pl.col("step") == 10)["checkpoint"]) == {"10"}


def test_metrics_are_one_row_per_name_lane_and_step(tmp_path):
    with results.RunWriter(tmp_path / "run", RUN) as writer:
        writer.metrics(5, [3, 4], {"loss": [0.1, math.nan], "q": np.float32([1, 2])}, updates_per_second=12.5)
    frame = results.read_metrics([tmp_path])
    values = {(r["metric"], r["lane"], r["seed"]): r["value"] for r in frame.to_dicts()}
    assert values.pop(("updates_per_second", None, None)) == 12.5
    assert math.isnan(values.pop(("loss", 1, 4)))
    assert values == {("loss", 0, 3): 0.1, ("q", 0, 3): 1.0, ("q", 1, 4): 2.0}


def test_no_references_and_not_a_number_stay_apart(tmp_path):
    with results.RunWriter(tmp_path / "run", RUN) as writer:
        writer.episodes(1, [0], [[math.nan, 2.0]], [[3, 4]], None, [8, 9])
    for frame in (results.read([tmp_path]), pl.read_parquet(tmp_path / "run" / "episodes.parquet")):
        assert frame["normalized"].is_null().all()
        assert math.isnan(frame["return_raw"][0])
        assert frame["return_raw"][1] == 2.0


def test_wrong_shapes_are_refused(tmp_path):
    writer = results.RunWriter(tmp_path, RUN)
    with pytest.raises(ValueError, match="lengths has shape"):
        writer.episodes(1, [0], [[1.0, 2.0]], [[1]], None, [8, 9])
    with pytest.raises(ValueError, match="shorter"):
        writer.metrics(1, [0, 1], {"loss": [1.0]})
    writer.close()
    assert results.read([tmp_path]).is_empty()


# ---- kills ---------------------------------------------------------------------------------------------------

ENDLESS = """
import sys, numpy as np
from offrl import results
writer = results.RunWriter(sys.argv[1], {"run_id": "r1", "method": "bc", "dataset": "d"})
for step in range(1, 10**9):
    writer.episodes(step, [0, 1], np.full((2, 50), step), np.full((2, 50), 1000), None, range(50))
    writer.metrics(step, [0, 1], {"loss": [step, step]})
"""


def test_killed_run_resumes_without_losing_or_repeating_a_row(tmp_path):
    variables = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    child = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)], env=variables)
    rows, deadline = tmp_path / "episodes.jsonl", time.monotonic() + 60
    while not (rows.exists() and rows.stat().st_size > 200_000) and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()

    reached = results.read([tmp_path])["step"].max()
    assert reached > 5
    resumed = reached - 3
    with results.RunWriter(tmp_path, RUN, resume_step=resumed) as writer:
        for step in range(resumed + 1, resumed + 6):
            writer.episodes(step, [0, 1], np.full((2, 50), step), np.full((2, 50), 1000), None, range(50))
            writer.metrics(step, [0, 1], {"loss": [step, step]})
    lines = [json.loads(line) for line in rows.read_bytes().splitlines()]
    found = sorted((row["step"], row["lane"], row["episode"]) for row in lines)
    assert found == [(s, lane, e) for s in range(1, resumed + 6) for lane in (0, 1) for e in range(50)]
    losses = results.read_metrics([tmp_path])
    assert losses["value"].to_list() == [float(s) for s in range(1, resumed + 6) for _ in (0, 1)]


def test_line_torn_at_any_byte_is_dropped(tmp_path):
    with results.RunWriter(tmp_path / "whole", RUN) as writer:
        write_steps(writer, [1], lanes=1, episodes=3)
    data = (tmp_path / "whole" / "episodes.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    torn = tmp_path / "torn"
    torn.mkdir()
    for cut in range(ends[1], ends[2]):
        (torn / "episodes.jsonl").write_bytes(data[:cut])
        assert results.read([torn])["episode"].to_list() == [0, 1]
        results.RunWriter(torn, RUN, resume_step=1).flush()  # not closed: a hundred copies to Parquet take long
        assert (torn / "episodes.jsonl").read_bytes() == data[: ends[1]]


def test_last_line_of_zeros_after_a_power_failure_is_dropped(tmp_path):
    with results.RunWriter(tmp_path, RUN) as writer:
        write_steps(writer, [1, 2])
    with open(tmp_path / "episodes.jsonl", "ab") as file:
        file.write(b"\0" * 100 + b"\n")
    with results.RunWriter(tmp_path, RUN, resume_step=2) as writer:
        write_steps(writer, [3])
    assert results.read([tmp_path])["step"].unique().sort().to_list() == [1, 2, 3]


def test_damage_in_the_middle_is_named_and_nothing_is_touched(tmp_path):
    with results.RunWriter(tmp_path, RUN) as writer:
        write_steps(writer, [1, 2])
    rows = tmp_path / "episodes.jsonl"
    lines = rows.read_bytes().splitlines(keepends=True)
    lines[3] = b'{"step": 1, "sc\n'
    rows.write_bytes(b"".join(lines))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for action in (
        lambda: results.RunWriter(tmp_path, RUN, resume_step=2),
        lambda: results.read([tmp_path]),
    ):
        with pytest.raises(OffrlError, match=r"episodes\.jsonl: line 4 is no row"):
            action()
        assert rows.read_bytes() == before["episodes.jsonl"]


# ---- full disk -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"step": None}, {"step": "30"}, {"lane": 1.5}, {"return_raw": "high"}, {"method": None}, {"dataset": None}],
)
def test_rows_of_other_types_are_refused_by_line_before_anything_is_written(tmp_path, change):
    folder = tmp_path / "run"
    with results.RunWriter(folder, RUN) as writer:
        write_steps(writer, [10, 20])
    path = folder / "episodes.jsonl"
    lines = path.read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | change)
    path.write_text("\n".join(lines) + "\n")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for attempt in (lambda: results.read([folder]), lambda: results.RunWriter(folder, RUN, resume_step=20)):
        with pytest.raises(OffrlError, match="line 4 is no row of results"):
            attempt()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("text", ["", "[]", '{"updates": "many"}', '{"updates": -1}', "[" * 100_000, None])
def test_progress_is_never_an_error(tmp_path, text):
    """`None` is a named pipe, which nobody writes to."""
    for name in ("config.json", "metrics.jsonl"):
        if text is None:
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / name).write_text(text + "\n")
    assert results.progress(tmp_path) == results.Progress(0, 0, None)


def test_full_disk_is_one_clear_sentence_and_leaves_whole_evaluations(tmp_path):
    writer = results.RunWriter(tmp_path, RUN)
    write_steps(writer, [1, 2])
    before = (tmp_path / "episodes.jsonl").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 300, hard))  # room for a line and a half
    try:
        with pytest.raises(OffrlError, match=r"episodes\.jsonl could not be written .*free space"):
            write_steps(writer, [3])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "episodes.jsonl").read_bytes() == before
    write_steps(writer, [3])  # space was made: it goes on
    writer.close()
    assert results.read([tmp_path]).group_by("step").len().sort("step").rows() == [(1, 6), (2, 6), (3, 6)]


def test_failed_copy_to_parquet_only_warns(tmp_path):
    writer = results.RunWriter(tmp_path, RUN)
    write_steps(writer, [1])
    (tmp_path / "episodes.parquet").mkdir()  # cannot be replaced by a file
    with pytest.warns(UserWarning, match=r"episodes\.jsonl is complete"):
        writer.close()
    (tmp_path / "episodes.parquet").rmdir()
    assert results.read([tmp_path])["step"].to_list() == [1] * 6


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OffrlError, match="could not be written"):
        results.RunWriter(tmp_path / "file" / "run", RUN)


# ---- new, resumed, repeated ----------------------------------------------------------------------------------


def test_closed_run_is_not_overwritten_but_a_killed_one_starts_over(tmp_path):
    writer = results.RunWriter(tmp_path, RUN)
    write_steps(writer, [1])
    writer.flush()  # killed here: never closed
    with results.RunWriter(tmp_path, RUN) as writer:
        write_steps(writer, [2])
    assert results.read([tmp_path])["step"].unique().to_list() == [2]
    with pytest.raises(OffrlError, match="already holds"):
        results.RunWriter(tmp_path, RUN)
    results.RunWriter(tmp_path, RUN, resume_step=-1).close()
    assert results.read([tmp_path]).is_empty()


def test_resuming_does_not_lose_rows_that_only_parquet_has(tmp_path):
    with results.RunWriter(tmp_path, RUN) as writer:
        write_steps(writer, [1])
    copy = (tmp_path / "episodes.parquet").read_bytes()
    (tmp_path / "episodes.jsonl").unlink()
    with pytest.raises(OffrlError, match=r"episodes\.jsonl is missing"):
        results.RunWriter(tmp_path, RUN, resume_step=1)
    assert (tmp_path / "episodes.parquet").read_bytes() == copy


def test_repeated_evaluation_counts_once_and_the_later_one_wins(tmp_path):
    with results.RunWriter(tmp_path, RUN) as writer:
        write_steps(writer, [1])
        write_steps(writer, [1], episodes=5, offset=100.0)
    frame = results.read([tmp_path])
    assert len(frame) == 2 * 5
    assert (frame["return_raw"] > 100).all()


def test_lanes_with_the_same_seed_stay_apart(tmp_path):
    with results.RunWriter(tmp_path, RUN) as writer:
        writer.episodes(1, [0, 0], [[1.0], [2.0]], [[1], [1]], None, [9])
    assert results.read([tmp_path]).sort("lane")["return_raw"].to_list() == [1.0, 2.0]


# ---- reading many --------------------------------------------------------------------------------------------


def test_sweep_is_read_recursively_with_any_folder_name(tmp_path):
    names = ["agent=bc,seed=[0,1]", "glob*?", "nested/deeper/run", "open"]
    for i, name in enumerate(names):
        writer = results.RunWriter(tmp_path / name, {**RUN, "run_id": f"r{i}"})
        write_steps(writer, [i + 1])
        writer.flush() if name == "open" else writer.close()
    (tmp_path / "nested" / "deeper" / "run" / "checkpoints").mkdir()
    frame = results.read([tmp_path, tmp_path / "open"])  # the same run by two paths
    steps = dict(frame.group_by("folder").agg(pl.col("step").unique().first()).rows())
    assert steps == {str((tmp_path / name).resolve()): i + 1 for i, name in enumerate(names)}
    assert frame.group_by("folder").len()["len"].to_list() == [6] * 4
    found = [run.folder for run in results.runs([tmp_path])]
    assert found == sorted((tmp_path / name).resolve() for name in names)


def test_folder_names_of_a_sweep_are_no_columns(tmp_path):
    for seed in (7, 8):
        with results.RunWriter(tmp_path / f"seed={seed}", RUN) as writer:
            write_steps(writer, [1])
    assert set(results.read([tmp_path])["seed"]) == {5, 6}


def test_the_parquet_copies_are_never_read(tmp_path):
    """Whatever stands in them: of a damaged one polars may end the process (`memory allocation of 2^61 bytes failed`)."""
    with results.RunWriter(tmp_path, RUN) as writer:
        write_steps(writer, [1])
    parquet, lines = tmp_path / "episodes.parquet", tmp_path / "episodes.jsonl"
    whole = results.read([tmp_path])
    assert pl.read_parquet(parquet).equals(whole.drop("folder"))
    os.utime(parquet, (time.time() + 20,) * 2)
    parquet.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    assert results.read([tmp_path]).equals(whole)
    (tmp_path / "manifest.json").write_text("{}")
    lines.unlink()
    with pytest.raises(OffrlError, match=r"episodes\.jsonl is missing .* restore it or leave the run out"):
        results.read([tmp_path])


def test_reading_nothing(tmp_path):
    assert results.read([tmp_path]).columns == [*results.EPISODE_COLUMNS, "folder"]
    assert results.read_metrics([]).is_empty()
    with pytest.raises(OffrlError, match="is no folder"):
        results.read([tmp_path / "absent"])


def test_config_and_manifest_are_read_with_the_run(tmp_path):
    (tmp_path / "manifest.json").write_text('{"run_id": "x"}')
    (tmp_path / "config.json").write_text('{"seed": 3}')
    (run,) = results.runs([tmp_path])
    assert (run.config, run.manifest) == ({"seed": 3}, {"run_id": "x"})
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(OffrlError, match=r"config\.json: it is damaged"):
        results.runs([tmp_path])


# ---- environment ---------------------------------------------------------------------------------------------


def test_environment_states_what_is_installed():
    import torch

    found = json.loads(json.dumps(environment()))
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["numpy"] == np.__version__
    assert found["versions"]["offrl"] == offrl.__version__
    assert found["versions"]["python"] == sys.version.split()[0]
    assert found["cpu"]


def test_git_state_follows_the_checkout(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    package = tmp_path / "offrl"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    monkeypatch.setattr("offrl.utils.provenance.PACKAGE", Path(package))
    git("init")
    assert environment()["git"] is None  # inside a repository that does not track the package
    git("add", ".")
    git("commit", "-m", "first")
    assert environment()["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (package / "__init__.py").write_text("a = 2\n")
    assert environment()["git"]["dirty"] is True


def test_a_panic_of_polars_is_an_error_of_the_system(tmp_path, monkeypatch):
    """Where its threads get no file: an OSError, for which the command line has a sentence. Other panics are polars' own."""
    with results.RunWriter(tmp_path, RUN) as writer:
        write_steps(writer, [10])

    def panics(message):
        def fail(*_, **__):
            raise pl.exceptions.PanicException(message)

        monkeypatch.setattr(pl, "read_ndjson", fail)

    panics('called `Result::unwrap()` on an `Err` value: Os { code: 24, kind: TooManyOpenFiles, message: "Too many" }')
    with pytest.raises(OSError, match=r"episodes\.jsonl") as caught:
        results.read([tmp_path])
    assert caught.value.errno == errno.EMFILE
    panics("index out of bounds: the len is 1 but the index is 24")
    with pytest.raises(pl.exceptions.PanicException, match="out of bounds"):
        results.read([tmp_path])


@pytest.mark.slow
def test_rows_without_a_free_file_descriptor(tmp_path):
    """In a fresh interpreter, whose polars has not yet started its threads."""
    with results.RunWriter(tmp_path, RUN) as writer:
        write_steps(writer, [10])
    code = f"""
import os, resource
from pathlib import Path
import polars
from offrl.results import rows
path = Path({str(tmp_path / "episodes.jsonl")!r})
data = path.read_bytes()
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    while True:
        os.open(os.devnull, os.O_RDONLY)
except OSError:
    pass
try:
    rows.rows_of(data, rows.EPISODE_COLUMNS, path)
except OSError as error:
    print(error)
"""
    process = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=300, check=False)
    assert process.stdout == f"[Errno 24] Too many open files: '{tmp_path / 'episodes.jsonl'}'\n", process.stderr
