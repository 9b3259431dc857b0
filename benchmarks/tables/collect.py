"""Copy what finished runs say into the repository: a table's rows without its checkpoints.

    python benchmarks/tables/collect.py DIR                                   # into results/claims beside this file
    python benchmarks/tables/collect.py DIR --into results/mine
    offrl report benchmarks/tables/results/claims/a --out /tmp/a              # the table of claim A

Of each finished run below DIR, at the same path, it copies `episodes.jsonl`, `online.jsonl`, `config.json`, `manifest.json` and
`result.json`; a run that is not finished is left out and named. Of paths of the machine in them only the last part is kept.
The measures of synthetic trajectories (`augment/metrics.json`), CORL's numbers (`peers_*.json`) and those of
`histories.py` and `exact_distances.py` (`histories_*.json`, `exact_distances.json`) come along. Of the finite tasks, whose
runs are many and short, one file `probes.json` holds what `doc_curves.py` measured. Nothing is deleted.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from offrl import results
from offrl.utils.paths import replacing

ROWS, ONLINE = "episodes.jsonl", "online.jsonl"
FACTS = ("config.json", "manifest.json", "result.json", "augment/metrics.json")
PROBES = "probe-*.json"


def finished(run: results.Run) -> bool:
    """Whether the run has made all its updates and its last evaluation."""
    path = run.folder / "result.json"
    made = json.loads(path.read_text())["step"] if path.exists() else 0
    return bool(made and made >= run.config.get("updates", 0))


def collect(source: Path, into: Path) -> tuple[list[Path], list[Path]]:
    """Copy the finished runs below `source`; returns the folders of those copied and of those that are not finished."""
    copied, unfinished = [], []
    probes: dict[Path, dict[str, Any]] = {}
    for run in results.runs([source]):
        inner = run.folder.relative_to(source.resolve())
        if not finished(run):
            unfinished.append(inner)
            continue
        if found := sorted(run.folder.glob(PROBES), key=size_of):
            probe = json.loads(found[-1].read_text())
            probes.setdefault(into / inner.parts[0], {})[str(Path(*inner.parts[1:]))] = without_paths(probe)
        else:
            copy_run(run, into / inner)
        copied.append(inner)
    for folder, of_runs in probes.items():
        path = folder / "probes.json"
        write_json(path, dict(sorted((kept_in(path) | of_runs).items())))
    for path in sorted(source.rglob("peers_*.json")):
        write_json(into / path.relative_to(source), without_paths(json.loads(path.read_text())))
    for path in sorted([*source.rglob("histories_*.json"), *source.rglob("exact_distances.json")]):
        target = into / path.relative_to(source)
        write_json(target, kept_in(target) | without_paths(json.loads(path.read_text())))
    return copied, unfinished


def size_of(probe: Path) -> tuple[int, int]:
    """Updates and episodes of `probe-EPISODES-UPDATES.json`."""
    _, episodes, updates = probe.stem.split("-")
    return int(updates), int(episodes)


def kept_in(path: Path) -> dict[str, Any]:
    """What an earlier call wrote; nothing, if there was none."""
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return kept


def copy_run(run: results.Run, target: Path) -> None:
    """Copy one run's files."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (ROWS, ONLINE):
        if (run.folder / name).exists():
            shutil.copyfile(run.folder / name, target / name)
    for name in FACTS:
        if (run.folder / name).exists():
            write_json(target / name, without_paths(json.loads((run.folder / name).read_text())))


def without_paths(value: Any) -> Any:
    """The same JSON value, with the last part alone of each absolute path in it."""
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="DIR", help="folder of run_claims.sh, or another with runs")
    parser.add_argument("--into", type=Path, default=Path(__file__).parent / "results" / "claims")
    arguments = parser.parse_args()
    copied, unfinished = collect(arguments.source, arguments.into)
    print(f"{len(copied)} runs copied to {arguments.into}")
    for folder in unfinished:
        print(f"not finished: {folder}")


if __name__ == "__main__":
    main()
