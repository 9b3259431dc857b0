"""`offrl data list|info|fetch|convert|build`: each command takes its parsed arguments and returns an exit status."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from offrl.cli.dataset_info import describe, plot, print_info
from offrl.data import catalogue, ogbench_names
from offrl.data.dataset import OfflineDataset
from offrl.data.fetch import fetch
from offrl.data.minari import data_folder, local_datasets, local_folder
from offrl.data.writers import writer
from offrl.datasets import load
from offrl.forge import registry
from offrl.utils.errors import OffrlError
from offrl.utils.paths import cache_dir

SOURCES = ("d4rl", "minari", "ogbench", "forge", "local")


def add_parser(subparsers: Any) -> None:
    """Add `data` and its commands to the parser of `offrl`; each sets `run`, a function of the parsed arguments."""
    data = subparsers.add_parser("data", help="list, inspect, fetch, convert and build datasets")
    commands = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="known datasets and those on this machine")
    listing.add_argument("--family", help="only this family, e.g. gym-mujoco, antmaze, maze2d, adroit, kitchen")
    listing.add_argument("--source", choices=SOURCES, help="only this source; local: what is on this machine")
    listing.set_defaults(run=run_list)

    info = commands.add_parser("info", help="counts, returns, ranges and score of a dataset")
    info.add_argument("dataset", help="id, file or folder")
    info.add_argument("--plot", type=Path, metavar="FILE", help="also write a PNG")
    info.add_argument("--json", action="store_true", help="print JSON instead of tables")
    _add_reading(info)
    info.set_defaults(run=run_info)

    fetching = commands.add_parser("fetch", help="download a D4RL, Minari or OGBench dataset")
    fetching.add_argument("dataset", help="id, e.g. hopper-medium-v2 or D4RL/pen/human-v2")
    fetching.add_argument("--dest", type=Path, metavar="FILE", help="where to put it (default: the cache folder)")
    fetching.add_argument(
        "--base-url",
        metavar="URL",
        help="mirror of D4RL's or OGBench's files (default: OFFRL_D4RL_URL, OFFRL_OGBENCH_URL)",
    )
    fetching.add_argument("--force", action="store_true", help="download again even if it is there")
    fetching.set_defaults(run=run_fetch)

    converting = commands.add_parser("convert", help="write a dataset in another format")
    converting.add_argument("dataset", help="id, file or folder")
    converting.add_argument(
        "dest", type=Path, help=".hdf5 (D4RL's layout), .npz, .safetensors, or a folder NAME-v0 (Minari)"
    )
    _add_reading(converting)
    converting.set_defaults(run=run_convert)

    building = commands.add_parser("build", help="build a forge/... dataset from shipped behaviour policies")
    building.add_argument("dataset", help="id, e.g. forge/hopper/medium-replay-v0")
    building.add_argument("--size", type=int, help="transitions (default: the dataset's own)")
    building.add_argument("--seed", type=int, default=0)
    building.add_argument("--force", action="store_true", help="build again even if it is there")
    building.set_defaults(run=run_build)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--semantics", choices=("exact", "d4rl"), default="exact", help="d4rl: rows of qlearning_dataset"
    )
    parser.add_argument("--clip-actions", action="store_true", help="clip actions that leave their bounds")
    parser.add_argument("--action-bound", type=float, metavar="B", help="actions live in [-B, B]")
    parser.add_argument(
        "--action-low", type=_numbers, metavar="A[,B...]", help="any other box: one number or one a dimension"
    )
    parser.add_argument("--action-high", type=_numbers, metavar="A[,B...]", help="likewise")
    parser.add_argument(
        "--as-family", metavar="FAMILY", help="read by the rules of antmaze, kitchen, ... (a renamed copy)"
    )
    parser.add_argument("--unfinished", action="store_true", help="accept one trajectory without any episode end")
    parser.add_argument("--goals", action="store_true", help="keep a maze's goal in the observation")
    parser.add_argument("--task", type=int, metavar="N", help="single task of an OGBench set; 0: the default one")
    parser.add_argument("--no-cache", action="store_true", help="neither use nor write the flat cache")


def _load(arguments: argparse.Namespace) -> OfflineDataset:
    return load(
        arguments.dataset,
        semantics=arguments.semantics,
        cache=not arguments.no_cache,
        clip_actions=arguments.clip_actions,
        action_bound=arguments.action_bound,
        unfinished=arguments.unfinished,
        goals=arguments.goals,
        action_low=arguments.action_low,
        action_high=arguments.action_high,
        family=arguments.as_family,
        task=arguments.task,
    )


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers between commas."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} should be a number, or numbers separated by commas") from error


# ---- list --------------------------------------------------------------------------------------------------------


def run_list(arguments: argparse.Namespace) -> int:
    """Print a table of datasets; those on this machine are marked."""
    from rich.console import Console
    from rich.table import Table

    rows = [
        row
        for source, rows_of in SOURCE_ROWS.items()
        if arguments.source in (None, "local", source)
        for row in rows_of()
    ]
    if arguments.source == "local":
        rows = [row for row in rows if row[-1]]
    if arguments.family:
        families = sorted({row[2] for row in rows})
        rows = [row for row in rows if row[2] == arguments.family]
        if not rows and arguments.family not in families:
            raise OffrlError(
                f"--family {arguments.family}: no dataset of that family; there are {', '.join(families)}."
            )
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)  # ids stay whole for grep and the like
    table = Table(box=None, pad_edge=False)
    table.add_column("id", overflow="fold", min_width=min(46, max((len(row[0]) for row in rows), default=0)))
    for column in ("here", "source", "family", "evaluated in"):
        table.add_column(column)
    for name, source, family, environment, here in rows:
        table.add_row(name, here, source, family, environment)
    console.print(table)
    console.print(f"{len(rows):,} datasets; cache folder {cache_dir()}", highlight=False)
    return 0


def _forge_rows() -> list[tuple[str, ...]]:
    folders = {cache_dir() / name: name for name in local_datasets(cache_dir()) if name.startswith("forge/")}
    here = {
        name: folders.pop(folder := registry.folder_of(name), None) is not None or folder.is_file()
        for name in registry.names()
    }
    here |= dict.fromkeys(folders.values(), True)  # of another size or seed
    return [(name, "forge", registry.family(name), "", "yes" if built else "") for name, built in here.items()]


def _d4rl_rows() -> list[tuple[str, ...]]:
    return [
        (entry.id, "d4rl", entry.family, entry.env_id or "", "yes" if any(f.is_file() for f in entry.files()) else "")
        for entry in catalogue.d4rl().values()
    ]


def _minari_rows() -> list[tuple[str, ...]]:
    known = catalogue.minari()
    rows: list[tuple[str, ...]] = [
        (
            entry.id,
            "minari",
            catalogue.family_of(entry.env_id),
            entry.env_id or "",
            "yes" if data_folder(local_folder(entry.id)) else "",
        )
        for entry in known.values()
    ]
    names = {local_folder(name) for name in known}
    return rows + [(name, "minari", "", "", "yes") for name in local_datasets() if local_folder(name) not in names]


def _ogbench_rows() -> list[tuple[str, ...]]:
    parsed = [(text, name) for text in ogbench_names.names() if (name := ogbench_names.parse(text))]
    return [
        (text, "ogbench", ogbench_names.FAMILY, name.env_id, "yes" if any(f.is_file() for f in name.files()) else "")
        for text, name in parsed
    ]


SOURCE_ROWS = {"forge": _forge_rows, "d4rl": _d4rl_rows, "minari": _minari_rows, "ogbench": _ogbench_rows}


# ---- info, fetch, build ------------------------------------------------------------------------------------------


def run_info(arguments: argparse.Namespace) -> int:
    """Print what is in a dataset, as tables or JSON, and write the picture if asked for."""
    store = _load(arguments)
    description = describe(store)
    if arguments.json:
        print(json.dumps(description, indent=2, default=str))
    else:
        print_info(description)
    if arguments.plot is not None:
        try:
            plot(store, arguments.plot)
        except OSError as error:
            raise OffrlError(f"--plot {arguments.plot}: cannot be written ({error.strerror}).") from error
        if not arguments.json:
            print(f"picture: {arguments.plot}")
    return 0


def run_fetch(arguments: argparse.Namespace) -> int:
    """Download a dataset and say where it lies."""
    path = fetch(arguments.dataset, arguments.dest, arguments.base_url, progress=True, force=arguments.force)
    print(path)
    return 0


def run_build(arguments: argparse.Namespace) -> int:
    """Build a forge dataset and say where it lies."""
    if arguments.size is not None and arguments.size < 1:
        raise OffrlError(f"--size {arguments.size}: give a positive number of transitions.")
    force = {"force": True} if arguments.force else {}
    print(registry.ensure(arguments.dataset, size=arguments.size, seed=arguments.seed, **force))
    return 0


# ---- convert -----------------------------------------------------------------------------------------------------


def run_convert(arguments: argparse.Namespace) -> int:
    """Write any dataset in the format that the destination's suffix names."""
    write, dataset = writer(arguments.dest), _load(arguments)
    write(dataset)
    again = load(arguments.dest, cache=False, unfinished=arguments.unfinished)
    if lost := int(dataset.has_tail.sum()) - int(again.has_tail.sum()):
        print(
            f"{arguments.dest}: this layout has no room for the last steps of {lost:,} episodes, whose successors are unknown, "
            "so returns differ by their rewards; .safetensors keeps them.",
            file=sys.stderr,
        )
    print(arguments.dest)
    return 0
