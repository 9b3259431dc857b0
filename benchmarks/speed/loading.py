"""How long a D4RL-style HDF5 file takes to load, and how much memory, against h5py alone.

    python benchmarks/speed/loading.py [--rows 1000000] [--repeats 3]

Every measurement runs in a process of its own: the best time of the repeats, and the growth of the process's
memory at its peak over the tensors' size. The file's pages are in memory (it has just been written), so that the
times are those of unpacking and copying.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch

OBSERVATION, ACTION = 17, 6
JOBS = {
    "h5py into numpy": "h5py",
    "load, no cache": "read",
    "load, writes the cache": "first",
    "load from the cache": "cached",
}


def write_file(path: Path, rows: int, with_next: bool) -> None:
    """A file like halfcheetah's: float32, gzip, 1000 steps an episode."""
    rng = np.random.default_rng(0)
    columns = {"observations": (rows, OBSERVATION), "actions": (rows, ACTION), "rewards": (rows,)}
    if with_next:
        columns["next_observations"] = (rows, OBSERVATION)
    with h5py.File(path, "w") as file:
        for key, shape in columns.items():
            data = rng.uniform(-1, 1, shape).astype(np.float32)
            file.create_dataset(key, data=data, compression="gzip")
        file.create_dataset("terminals", data=np.zeros(rows, bool), compression="gzip")
        file.create_dataset("timeouts", data=np.arange(rows) % 1000 == 999, compression="gzip")


def high_water_mark() -> int:
    """Bytes of memory that this process held at its peak (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def job(kind: str, path: Path) -> None:
    """Run one measurement in this process and print seconds, bytes at the peak and bytes of the tensors."""
    from offrl.datasets import load

    torch.set_num_threads(1)
    torch.aminmax(torch.ones(9))  # the libraries' own first-use memory is no part of the measurement
    before, start = high_water_mark(), time.perf_counter()
    if kind == "h5py":
        with h5py.File(path) as file:
            arrays = [file[key][:] for key in file]
        size = sum(array.nbytes for array in arrays)
    else:
        size = load(path, cache=kind != "read").nbytes
    print(time.perf_counter() - start, high_water_mark() - before, size)


def measure(kind: str, path: Path, repeats: int, home: Path) -> tuple[float, float]:
    """Best seconds, and largest peak over the tensors' size."""
    times, peaks = [], []
    for _ in range(repeats):
        if kind == "first":
            for file in home.glob("flat/*"):
                file.unlink()
        command = [sys.executable, __file__, "--job", kind, str(path)]
        environment = {**os.environ, "OFFRL_HOME": str(home), "OMP_NUM_THREADS": "1"}
        output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        seconds, peak, size = (float(word) for word in output.split())
        times.append(seconds)
        peaks.append(peak / size)
    return min(times), max(peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--job", nargs=2, metavar=("KIND", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job(arguments.job[0], Path(arguments.job[1]))
        return
    from rich.console import Console
    from rich.table import Table

    for with_next in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            path, home = Path(folder) / "set.hdf5", Path(folder) / "home"
            write_file(path, arguments.rows, with_next)
            results = {label: measure(kind, path, arguments.repeats, home) for label, kind in JOBS.items()}
            title = f"{arguments.rows:,} x {OBSERVATION}/{ACTION}, {path.stat().st_size / 1e6:.0f} MB gzip, "
            table = Table("", "seconds", "of h5py's time", "peak / tensors", title_justify="left")
            table.title = title + ("next_observations stored" if with_next else "without next_observations")
            for label, (seconds, peak) in results.items():
                ratio = seconds / results["h5py into numpy"][0]
                table.add_row(label, f"{seconds:.2f}", f"{ratio:.2f}", f"{peak:.2f}")
            Console().print(table)


if __name__ == "__main__":
    main()
