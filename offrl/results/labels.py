"""Names of methods in a report: the method, and the settings in which its runs differ."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from offrl import results
from offrl.utils.settings import FREE, NAMES, canonical

if TYPE_CHECKING:
    import polars as pl


SUCCESS = "success rate, %"


def scale_of(dataset: str) -> str:
    """Whose reference returns: scores of different collections are not comparable."""
    if re.search(r"-singletask-task\d+-v0", dataset):
        return SUCCESS
    if dataset.startswith("forge/"):
        return "forge-normalised score"
    if not re.search(r"-v\d+$", dataset):
        return "normalised score"  # by references of one's own
    return "Minari-normalised score" if "/" in dataset else "D4RL-normalised score"


# Parts of a configuration that do not change what is learned, or that a cell averages over.
DEFAULT = "default"  # stands for what a run of an earlier version did not write down
ONLINE = "+online"  # of the method's name where a run has an online phase
NOT_SETTINGS = FREE - {"updates"} | NAMES | {"cache", "task", "tasks"}  # a task is part of the dataset's id


def _method(run: results.Run) -> str | None:
    """The agent's name, with sampler and augmentation where there are some: what a published number has to match."""
    return run.manifest.get("method")


def _given_label(run: results.Run) -> str | None:
    """The `label` of a run, which tells a fine-tuned run from its offline half as the method's name does."""
    label = run.config.get("label")
    return f"{str(label).removesuffix(ONLINE)}{ONLINE}" if label and run.config.get("online") else label


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key in NOT_SETTINGS:
            continue
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = canonical(str(value)) if key == "_target_" else value
    return flat


def _varies_by_lane(key: str, value: Any, lanes: int) -> bool:
    """Whether a setting is a list with one coefficient per lane (and not, say, the sizes of layers)."""
    if not isinstance(value, list) or len(value) != lanes or re.search("hidden|dims|sizes|layers|betas|shares", key):
        return False
    return key.startswith(("agent.", "sampler.", "augment.", "history.")) and all(
        isinstance(v, int | float) for v in value
    )


def label_lanes(rows: pl.DataFrame, runs: list[results.Run]) -> pl.DataFrame:
    """`folder`, `lane`, `dataset`, `base`, `label`: the method, and with the settings in which its runs on a dataset differ.

    One row a lane and dataset, also where a run went on under another name: rows that are joined with it stay as many.
    """
    import polars as pl

    by_folder = {str(run.folder): run for run in runs}
    lanes = rows.group_by("folder", "lane", "dataset", maintain_order=True).agg(
        pl.col("method").last(), pl.col("policy_mode").unique().sort()
    )
    lanes = lanes.sort("folder", "lane", "dataset")
    counts = dict(lanes.group_by("folder").agg(pl.col("lane").n_unique()).iter_rows())
    flat = {folder: _flatten(by_folder[folder].config) for folder in counts}
    entries = []
    for folder, lane, dataset, method, modes in lanes.iter_rows():
        settings = flat[folder] | {
            key: value[lane] for key, value in flat[folder].items() if _varies_by_lane(key, value, counts[folder])
        }
        if modes != ["deterministic"]:
            settings["policy"] = "+".join(modes)
        base = _given_label(by_folder[folder]) or _method(by_folder[folder]) or method
        entries.append((folder, lane, dataset, str(base), settings))
    differing = _differing([(method, dataset, settings, by_folder[f]) for f, _, dataset, method, settings in entries])
    labels = [_label(method, settings, differing[method]) for _, _, _, method, settings in entries]
    columns = {"folder": pl.String, "lane": pl.Int64, "dataset": pl.String, "base": pl.String, "label": pl.String}
    found = [(folder, lane, dataset, base, label) for (folder, lane, dataset, base, _), label in zip(entries, labels)]
    return pl.DataFrame(found, schema=columns, orient="row")


def _differing(entries: Sequence[tuple[str, str, Mapping[str, Any], results.Run]]) -> dict[str, list[str]]:
    """Of each method the settings in which its lanes differ on some dataset.

    The same setting may well depend on the dataset (a table per family): only a choice on one dataset is a variant. Runs of
    earlier versions wrote down only what differed from the method's defaults: what such a run lacks had its default, and is the
    same as a setting that a later run counts among its defaults.
    """
    keys: dict[str, set[str]] = {}
    for method, _, settings, _ in entries:
        keys.setdefault(method, set()).update(settings)
    values: dict[tuple[str, str, str], list[tuple[str, bool]]] = {}
    for method, dataset, settings, run in entries:
        changed = set(settings if (named := run.manifest.get("non_default")) is None else named)
        for key in keys[method]:
            value = repr(settings[key]) if key in settings else DEFAULT
            values.setdefault((method, dataset, key), []).append((value, key not in changed))
    differing: dict[str, list[str]] = {method: [] for method in keys}
    for (method, _, key), found in sorted(values.items()):
        lacks = any(value == DEFAULT for value, _ in found)
        distinct = {DEFAULT if lacks and is_default else value for value, is_default in found}
        if len(distinct) > 1 and key not in differing[method] and key not in ("agent", "sampler", "augment", "history"):
            differing[method].append(key)
    return differing


def _label(method: str, settings: Mapping[str, Any], differing: Sequence[str]) -> str:
    if not differing:
        return method
    short = [key.rpartition(".")[2] for key in differing]
    names = [name if short.count(name) == 1 else key for name, key in zip(short, differing)]
    shown = [f"{name}={_setting(settings, key)}" for name, key in zip(names, differing)]
    return f"{method} ({', '.join(shown)})"


def _setting(settings: Mapping[str, Any], key: str) -> str:
    value = settings.get(key, DEFAULT)
    if key.endswith("_target_"):
        return str(value).rpartition(".")[2]
    return value if isinstance(value, str) else json.dumps(value)
