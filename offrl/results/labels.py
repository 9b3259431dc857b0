"""Names of methods in a report: the method, and the settings in which its runs differ."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from offrl import results
from offrl.utils.dataset_names import D4RL_MIXTURE, FORGE_OGBENCH, OGBENCH
from offrl.utils.paths import PACKAGE
from offrl.utils.settings import FREE, NAMES, TASK, canonical

if TYPE_CHECKING:
    import polars as pl


SUCCESS = "success rate, %"
OWN = "normalised score"  # by references of one's own: two datasets may have nothing in common


def scale_of(dataset: str) -> str:
    """Whose reference returns: scores of different collections are not comparable.

    D4RL's and Minari's are those of the catalogue's ids, and of D4RL's mixtures; a name of that form alone is somebody's own.
    """
    task = OGBENCH.fullmatch(dataset.removeprefix(FORGE_OGBENCH))
    if task and task["task"]:
        return SUCCESS
    if dataset.startswith("forge/"):
        return "forge-normalised score"
    mixture = D4RL_MIXTURE.fullmatch(dataset)  # scored as the better source
    if (f"{mixture[1]}-{mixture[2]}-v2" if mixture else dataset) in _ids("d4rl"):
        return "D4RL-normalised score"
    return "Minari-normalised score" if dataset in _ids("minari") else OWN


@cache
def _ids(collection: str) -> frozenset[str]:
    """The ids in the catalogue's table of a collection, `d4rl` or `minari`."""
    with open(PACKAGE / "data" / "tables" / f"{collection}.csv", newline="", encoding="utf-8") as file:
        return frozenset(row["id"] for row in csv.DictReader(file))


DEFAULT = "default"  # stands for what a run of an earlier version did not write down
ONLINE = "+online"  # of the method's name where a run has an online phase
# Options that do not change what is learned, that a cell averages over, or that the dataset's name tells.
NOT_SETTINGS = FREE - {"updates"} | NAMES
_NOT_SETTINGS_IN = {"data": {"cache", "task", "tasks"}, "online": {"eval_every"}}
_GIVEN_DATA = ("data.seed", "data.size")  # which numbers a dataset built here has: nothing that one would tune
# A run that lacks one of these had no such thing; other gaps may be those of an earlier version.
_CHOICES = ("augment._target_", "history.encoder")
# How options begin that change a setting at the switch: a run has what was changed.
_CHANGES = ("online.agent.", "online.anneal.")
# Defaults of other options that an earlier version may not have written down; where there is none here, it is null, false or 0.
_USUAL = {
    **{"precision": "float32", "batch_size": 256, "data.cache": True, "data.reward_scale": 1.0},
    **{"data.semantics": "exact", "data.success_timing": "pre"},
}


def is_usual(key: str, value: Any) -> bool:
    """Whether an option of training or of `data`, by its dotted key, has its default."""
    return bool(value == _USUAL[key]) if key in _USUAL else not value


def _method(run: results.Run) -> str | None:
    """The agent's name, with sampler and augmentation where there are some: what a published number has to match."""
    return run.manifest.get("method")


def _given_label(run: results.Run) -> str | None:
    """The `label` of a run, which tells a fine-tuned run from its offline half as the method's name does."""
    label = run.config.get("label")
    return f"{str(label).removesuffix(ONLINE)}{ONLINE}" if label and run.config.get("online") else label


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by dotted key. Only whole options are left out: `seed` is the lanes', `data.seed` is a setting."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key not in NOT_SETTINGS:
            flat |= dict(_leaves(key, value, _NOT_SETTINGS_IN.get(key, set())))
    return flat


def _leaves(key: str, value: Any, without: Sequence[str] | set[str] = ()) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield key, canonical(str(value)) if key.endswith("_target_") else value
        return
    for name, inner in value.items():
        if name not in without:
            yield from _leaves(f"{key}.{name}", inner)


def given_task(run: results.Run) -> dict[str, Any]:
    """The options of a run's `eval` that name another task than its dataset does."""
    options = run.config.get("eval")
    return {key: v for key in TASK if isinstance(options, Mapping) and (v := options.get(key)) is not None}


def _task(run: results.Run, env_id: str | None) -> dict[str, Any]:
    """What a run's episodes and scores were, as far as it is known: as the options say, else as its dataset does.

    Args:
        env_id: the environment that the rows name.
    """
    task = {**(run.manifest.get("dataset_info") or {}), **given_task(run)}
    known = {key: task[key] for key in TASK if key in task}
    if env_id is not None:
        known["env"] = env_id
    if isinstance(known.get("env_kwargs"), Mapping):
        known["env_kwargs"] = json.dumps(known["env_kwargs"], sort_keys=True)
    for key in ("ref_min", "ref_max"):  # a builder's machine rounds them
        if isinstance(known.get(key), int | float):
            known[key] = float(f"{known[key]:.6g}")
    return {f"eval.{key}": value for key, value in known.items()}


def _varies_by_lane(key: str, value: Any, lanes: int, named: list[str] | None) -> bool:
    """Whether a setting is a list with one coefficient per lane (and not, say, the sizes of layers).

    Args:
        named: the settings that are, as the run's manifest says; None: an earlier version made it, and names have to tell.
    """
    if not isinstance(value, list) or len(value) != lanes:
        return False
    if named is not None:
        return key in named
    if re.search("hidden|dims|sizes|layers|betas|shares", key):
        return False
    settings = ("agent.", "sampler.", "augment.", "history.", *_CHANGES)
    return key.startswith(settings) and all(isinstance(v, int | float) for v in value)


@dataclass(frozen=True)
class _Entry:
    """A lane on a dataset: its method's name, its settings by dotted key, and its run."""

    folder: str
    lane: int
    dataset: str
    base: str
    settings: dict[str, Any]
    run: results.Run


def label_lanes(rows: pl.DataFrame, runs: list[results.Run]) -> pl.DataFrame:
    """`folder`, `lane`, `dataset`, `base`, `label`: the method, and with the settings in which its runs on a dataset differ.

    One row a lane and dataset, also where a run went on under another name: rows that are joined with it stay as many. `base`
    tells runs apart that were given other data or another task: none of that is tuned.
    """
    import polars as pl

    entries = _entries(rows, runs)
    differing, tasks = _differing(entries), _differing_tasks(entries)
    found = []
    for entry in entries:
        keys = [*differing[entry.base], *tasks.get(entry.dataset, [])]
        apart = [key for key in keys if key in _GIVEN_DATA or key.startswith("eval.")]
        names = [_label(entry.base, entry.settings, shown) for shown in (apart, keys)]
        found.append((entry.folder, entry.lane, entry.dataset, *names))
    columns = {"folder": pl.String, "lane": pl.Int64, "dataset": pl.String, "base": pl.String, "label": pl.String}
    return pl.DataFrame(found, schema=columns, orient="row")


def _entries(rows: pl.DataFrame, runs: list[results.Run]) -> list[_Entry]:
    import polars as pl

    by_folder = {str(run.folder): run for run in runs}
    lanes = rows.group_by("folder", "lane", "dataset", maintain_order=True).agg(
        pl.col("method", "env_id").last(), pl.col("policy_mode").unique().sort()
    )
    lanes = lanes.sort("folder", "lane", "dataset")
    counts = dict(lanes.group_by("folder").agg(pl.col("lane").n_unique()).iter_rows())
    flat = {folder: _flatten(by_folder[folder].config) for folder in counts}
    entries = []
    for folder, lane, dataset, method, env_id, modes in lanes.iter_rows():
        named = by_folder[folder].manifest.get("lane_lists")
        settings = flat[folder] | {
            key: value[lane]
            for key, value in flat[folder].items()
            if _varies_by_lane(key, value, counts[folder], named)
        }
        if modes != ["deterministic"]:
            settings["policy"] = "+".join(modes)
        settings |= _task(by_folder[folder], env_id)
        if "dataset" in settings:  # the row's own says which task of OGBench's file it is
            settings["dataset"] = re.sub(r"-singletask(-task\d+)?(?=-v0)", "", str(settings["dataset"]))
        base = _given_label(by_folder[folder]) or _method(by_folder[folder]) or method
        entries.append(_Entry(folder, lane, dataset, str(base), settings, by_folder[folder]))
    _as_one_type(entries)
    _shorten_classes(entries)
    return entries


def _as_one_type(entries: Sequence[_Entry]) -> None:
    """Write 1 as 1.0 where another run has 1.0: they are one setting, and one label."""
    numbers = {(key, value) for entry in entries for key, value in entry.settings.items() if isinstance(value, float)}
    for entry in entries:
        whole = {key: float(v) for key, v in entry.settings.items() if type(v) is int and (key, float(v)) in numbers}
        entry.settings.update(whole)


def _shorten_classes(entries: Sequence[_Entry]) -> None:
    """Name classes without their modules, where that tells those of a method apart."""
    found: dict[tuple[str, str], set[str]] = {}
    for entry in entries:
        for key in (key for key in entry.settings if key.endswith("_target_")):
            found.setdefault((entry.base, key), set()).add(entry.settings[key])
    plain = {at for at, classes in found.items() if len({c.rpartition(".")[2] for c in classes}) == len(classes)}
    for entry in entries:
        keys = [key for key in entry.settings if (entry.base, key) in plain]
        entry.settings.update({key: entry.settings[key].rpartition(".")[2] for key in keys})


def _differing(entries: Sequence[_Entry]) -> dict[str, list[str]]:
    """Of each method the settings in which its lanes differ on some dataset.

    The same setting may well depend on the dataset (a table per family): only a choice on one dataset is a variant. Two names
    of a dataset are one setting where both stood for the same numbers.
    """
    groups: dict[tuple[str, str], list[_Entry]] = {}
    for entry in sorted(entries, key=lambda entry: (entry.base, entry.dataset)):
        groups.setdefault((entry.base, entry.dataset), []).append(entry)
    differing: dict[str, list[str]] = {method: [] for method, _ in groups}
    for (method, _), group in groups.items():
        fingerprints = {entry.run.manifest.get("fingerprint") for entry in group}
        same = {"dataset"} if len(fingerprints) == 1 and None not in fingerprints else set()
        for key in sorted({key for entry in group for key in entry.settings} - same):
            if key.startswith("eval.") or key in ("agent", "sampler", "augment", "history"):
                continue
            if key not in differing[method] and _differs(key, group):
                differing[method].append(key)
    return differing


def _differing_tasks(entries: Sequence[_Entry]) -> dict[str, list[str]]:
    """Of each dataset the options of `eval` by which its runs, of all methods, were scored differently."""
    groups: dict[str, list[_Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.dataset, []).append(entry)
    keys = [f"eval.{key}" for key in TASK]
    return {dataset: [key for key in keys if _differs(key, group)] for dataset, group in groups.items()}


def _differs(key: str, group: Sequence[_Entry]) -> bool:
    """Whether a setting has several values.

    Runs of earlier versions wrote down only what differed from the method's defaults: what such a run lacks had its default,
    and is the same as a setting that a later run counts among its defaults.
    """
    # Of these a run's configuration says that it had no such thing, by leaving it out.
    complete = key in _CHOICES or key.startswith(("eval.", *_CHANGES))
    known = [entry for entry in group if entry.run.config] if complete else group
    lacks = any(key not in entry.settings for entry in known)
    return len({DEFAULT if lacks and _may_be_default(key, e) else repr(e.settings[key]) for e in known}) > 1


def _may_be_default(key: str, entry: _Entry) -> bool:
    """Whether a lane has the value of a setting that another one lacks."""
    if key not in entry.settings:
        return True
    if key.startswith("eval."):
        return key.removeprefix("eval.") not in given_task(entry.run)
    if (named := entry.run.manifest.get("non_default")) is None:
        return False
    if key in _CHOICES or key.startswith(_CHANGES):
        return False
    if key in _USUAL or key.startswith("data."):
        return is_usual(key, entry.settings[key])
    return key not in named


def _label(method: str, settings: Mapping[str, Any], differing: Sequence[str]) -> str:
    if not differing:
        return method
    short = [key.rpartition(".")[2] for key in differing]
    plain = [short.count(name) == 1 and name not in NOT_SETTINGS for name in short]  # `seed` would be the lane's
    names = [name if alone else key for name, key, alone in zip(short, differing, plain)]
    shown = [f"{name}={_setting(settings, key)}" for name, key in zip(names, differing)]
    return f"{method} ({', '.join(shown)})"


def _setting(settings: Mapping[str, Any], key: str) -> str:
    value = settings.get(key, DEFAULT)
    return value if isinstance(value, str) else json.dumps(value)
