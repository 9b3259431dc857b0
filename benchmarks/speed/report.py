"""How long `offrl report` takes on thousands of runs: rows, statistics, and the files of figures.

    python benchmarks/speed/report.py [--runs 2000]

Makes runs of 20 methods on 20 datasets, one seed each, 20 evaluations of 10 episodes, in a temporary folder; times are
processor seconds and wall-clock seconds of this process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from offrl import results
from offrl.results import report

METHODS, DATASETS = 20, 20


def make(top: Path, runs: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(runs):
        method, dataset, seed = f"m{i % METHODS}", f"set{i // METHODS % DATASETS}-v2", i // (METHODS * DATASETS)
        folder = top / method / dataset / f"seed{seed}"
        folder.mkdir(parents=True)
        agent = {"_target_": f"offrl.agents.{method}.Agent"}
        config = {"method": method, "agent": agent, "dataset": dataset, "seed": seed, "updates": 20_000}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "manifest.json").write_text(json.dumps({"dataset_info": {"family": f"family{i // METHODS % 4}"}}))
        with results.RunWriter(folder, config) as writer:
            for step in range(1000, 20_001, 1000):
                scores = rng.normal(40 + i % METHODS, 10, (1, 10))
                writer.episodes(step, [seed], scores, np.full((1, 10), 1000), scores, range(10))


def timed(name: str, function: object, *arguments: object) -> object:
    wall, cpu = time.perf_counter(), time.process_time()
    value = function(*arguments)  # type: ignore[operator]
    print(f"{name:24} {time.process_time() - cpu:6.2f} s processor {time.perf_counter() - wall:6.2f} s", flush=True)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs, out = Path(folder) / "runs", Path(folder) / "out"
        timed("make the runs", make, runs, arguments.runs)
        rows = timed("read rows", results.read, [runs])
        print(f"{len(rows):,} rows of {arguments.runs:,} runs")  # type: ignore[arg-type]
        write, report._write = report._write, lambda *_: None
        timed("rows to tables", report.report, [runs], out, 10, "score", False)
        report._write = write
        timed("the whole report", report.report, [runs], out, 10, "score", False)
        for path in sorted(out.iterdir()):
            print(f"  {path.name:20} {path.stat().st_size / 1e6:6.2f} MB")


if __name__ == "__main__":
    main()
