"""Mutated inputs of every kind, from seeds: `python tests/fuzz/fuzz.py 2000 [--seed S] [--keep DIR]`.

Every input is made from `seed:kind:number` alone, so a bad one is repeated by `1 --kind KIND --number NUMBER`. Counts by kind
and verdict come at the end; the exit status is 1 if any input is bad. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hydra.core.plugins import Plugins

sys.path.insert(0, str(Path(__file__).resolve().parent))
import data_inputs
import format_inputs
import material as materials
import run_inputs
import server_inputs
import state_inputs
import word_inputs
from judge import Case, Judge, Verdict

Kind = Callable[[materials.Material, Path, random.Random], Case]
KINDS: dict[str, Kind] = {
    "hdf5": data_inputs.hdf5,
    "npz": data_inputs.npz,
    "minari": data_inputs.minari,
    "flat": data_inputs.flat,
    "checkpoint": run_inputs.checkpoint,
    "run": run_inputs.run,
    "train": word_inputs.train,
    "others": word_inputs.others,
    "yaml": word_inputs.yaml,
    "d3rlpy": format_inputs.d3rlpy,
    "ogbench": format_inputs.ogbench,
    "unusual": format_inputs.unusual,
    "online": state_inputs.online,
    "history": state_inputs.history,
    "home": state_inputs.home,
    "sweep": state_inputs.sweep,
    "surroundings": state_inputs.surroundings,
    "server": server_inputs.server,
}
# What a child of the harness would otherwise import anew for each input.
SHARED = ("data", "train", "evaluate", "report", "status", "select", "probe", "agents", "finetune", "augment", "export")
LIBRARIES = (
    *(
        "torch._dynamo",
        "gymnasium.envs.classic_control.pendulum",
        "polars",
        "rich.table",
        "hydra",
        "hydra._internal.hydra",
    ),
    *("hydra.core.plugins", "matplotlib.pyplot", "matplotlib.backends.backend_agg"),
)


@dataclass(frozen=True)
class Outcome:
    """An input by its kind and number, its command and the verdict; `kept`: the folder to repeat it in."""

    kind: str
    number: int
    case: Case
    verdict: Verdict
    kept: Path | None = None


def fuzz(
    place: Path, counts: dict[str, int], seed: int = 0, first: int = 0, keep: Path | None = None
) -> Iterator[Outcome]:
    """Judge so many inputs of each kind, the kinds in turn.

    Args:
        place: an empty folder for everything that is made. first: number of each kind's first input.
        keep: folder for bad inputs.
    """
    os.environ.update(
        OFFRL_HOME=str(place / "home"), MINARI_DATASETS_PATH=str(place / "home/minari"), HYDRA_FULL_ERROR=""
    )
    for name in ("D4RL_DATASET_DIR", "OFFRL_D4RL_URL"):
        os.environ.pop(name, None)
    for name in SHARED:
        importlib.import_module(f"offrl.cli.{name}")
    for name in LIBRARIES:
        importlib.import_module(name)
    Plugins.instance()
    canaries = materials.outside(place)
    judge = Judge(place)
    gc.freeze()  # a collection in a child would copy all pages
    material = materials.make(place, judge, canaries)
    for number, kind in sorted((first + i, kind) for kind, count in counts.items() for i in range(count)):
        folder = place / "input"
        folder.mkdir()
        case = KINDS[kind](material, folder, random.Random(f"{seed}:{kind}:{number}"))
        kept = keep / f"{seed}-{kind}-{number}" if keep else None
        if kept:  # before the command changes it
            shutil.rmtree(kept, ignore_errors=True)
            _copy(folder, kept)
        verdict = judge.judge(case, folder)
        if kept and verdict.bad:
            (kept / "VERDICT").write_text(f"{verdict}\n{case.what}\noffrl {' '.join(map(ascii, case.words))}\n")
        elif kept:
            shutil.rmtree(kept, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        yield Outcome(kind, number, case, verdict, kept)


def _copy(folder: Path, target: Path) -> None:
    """Files as they are: links stay links, holes and pipes are left out."""

    def odd(directory: str, names: list[str]) -> list[str]:
        paths = [(name, Path(directory) / name) for name in names]
        return [
            n for n, p in paths if not p.is_symlink() and (p.is_fifo() or (p.is_file() and p.stat().st_size > 1 << 30))
        ]

    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, target, symlinks=True, ignore=odd)


def _print(o: Outcome) -> None:
    words = [word for word in o.case.words if word not in materials.TRAIN[1:]]
    shown = " ".join(ascii(word) if len(word) < 80 else ascii(word[:77]) + "..." for word in words)
    print(
        f"{o.kind} {o.number}: {o.verdict.name}: {o.verdict.detail}\n    {o.case.what[:300]}\n    {shown}", flush=True
    )


def main() -> int:
    """Print bad inputs as they come, then counts; 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("all", metavar="N", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this kind; may be repeated")
    parser.add_argument(
        "--count", dest="counts", metavar="KIND=N", action="append", help="so many of a kind, and so on"
    )
    parser.add_argument("--number", type=int, default=0, help="of the first input of each kind")
    parser.add_argument("--keep", type=Path, help="folder for the files of bad inputs")
    parser.add_argument("--verbose", action="store_true", help="print good inputs, too")
    arguments = parser.parse_args()
    kinds = arguments.kind or list(KINDS)
    wanted = {kind: len(range(k, arguments.all, len(kinds))) for k, kind in enumerate(kinds)}
    if arguments.counts:
        wanted = {kind: int(count) for kind, count in (word.split("=") for word in arguments.counts)}
    counts: Counter[tuple[str, str]] = Counter()
    try:
        with tempfile.TemporaryDirectory(prefix="offrl-fuzz-") as place:
            for o in fuzz(Path(place), wanted, arguments.seed, arguments.number, arguments.keep):
                counts[o.kind, o.verdict.name] += 1
                counts["all", "bad"] += o.verdict.bad
                if o.verdict.bad or arguments.verbose:
                    _print(o)
    except KeyboardInterrupt:
        pass  # the counts so far
    finally:
        bad = counts.pop(("all", "bad"), 0)
        for kind in sorted({kind for kind, _ in counts}):
            found = {name: n for (k, name), n in sorted(counts.items()) if k == kind}
            print(f"{kind:12} " + ", ".join(f"{name} {n}" for name, n in found.items()))
        print(f"{sum(counts.values())} inputs, {bad} bad (seed {arguments.seed})", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
