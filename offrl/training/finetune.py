"""Continuing a finished offline run with environment steps, in a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from offrl.results.rows import MOST_BYTES
from offrl.results.writer import _rows_until, check_rows
from offrl.training.compose import choice_file, choices
from offrl.training.records import RunRecord
from offrl.training.run_config import RunConfig, resolve_config
from offrl.training.runs import Result, done_before, read_config
from offrl.training.trainer import Trainer
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError
from offrl.utils.files import read_bytes
from offrl.utils.paths import replacing
from offrl.utils.process import _locked
from offrl.utils.settings import FREE

STEPS = 250_000  # environment steps where none are given


def finetune(folder: Path | str, changes: Mapping[str, Any] | None = None, config_dir: Path | None = None) -> Result:
    """Continue a finished offline run with environment steps; a fine-tuning that was cut short goes on where it stopped.

    The run in `folder` stays as it is. The new run is the one that `offrl train ... online.steps=N` makes with the same
    settings: it takes over the offline half's checkpoint and rows.

    Args:
        changes: `online.*` options, and options that leave the offline half's numbers alone, by dotted key.
        config_dir: a user's own folder with agents.

    Raises:
        OffrlError: no finished offline run stands there, or a change would alter its offline half.
    """
    folder = Path(folder)
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    values = resolve_config(read_config(folder), trusted=False).to_dict()  # whole, whatever the file has
    job = _job(folder, values, dict(changes or {}), config_dir)
    new = job.folder()
    if new.resolve() == folder.resolve():
        raise OffrlError(f"{folder}: fine-tuning needs a folder of its own; choose another name=.")
    with _locked(new):
        if done := done_before(job):
            return done
        if job.train.fresh or not (new / checkpoint.NAME).exists():
            _take_over(folder, new, job)
            job.train.fresh = False
        return Trainer(job, new).run()


def _job(folder: Path, values: dict[str, Any], changes: dict[str, Any], config_dir: Path | None) -> RunConfig:
    if values.get("online"):
        raise OffrlError(f"{folder} has been fine-tuned already; name the offline run, or continue it with resume=.")
    values |= {"fresh": False, "name": values.get("name") and f"{values['name']}-online"}
    values["out"] = str(folder.parent if values["name"] else folder.parent.parent.parent)
    online: dict[str, Any] = {"steps": STEPS}
    for key, value in changes.items():
        top, _, rest = key.partition(".")
        if top == "online" and rest:
            group, _, name = rest.partition(".")
            if name:
                online.setdefault(group, {})[name] = value
            else:
                online[group] = value
        elif top == "agent" and rest:
            raise OffrlError(f"{key} belongs to the offline half; online.{key}={value} changes it at the switch.")
        elif top not in FREE - {"lanes", "seed", "seeds", "updates"}:
            raise OffrlError(f"{key} can't be changed when a run is fine-tuned; start another run for it.")
        elif rest:
            values[top] = {**values[top], rest: value}
        else:
            values[top] = value
    if not online["steps"]:
        raise OffrlError("online.steps=0 leaves nothing to fine-tune; give the number of environment steps.")
    agent, choice = dict(values["agent"]), str(values.get("agent_name"))
    if choice in choices("agent", config_dir):  # what the method's table says of the online phase
        loaded = OmegaConf.load(choice_file("agent", choice, config_dir))
        table: Any = OmegaConf.to_container(loaded, resolve=False)
        agent |= {key: table.get(key) for key in ("settings", "online")}  # other keys may refer to the command's
    return resolve_config({**values, "agent": agent, "online": online}, trusted=False)


def _take_over(folder: Path, new: Path, job: RunConfig) -> None:
    """Copy rows and checkpoint of the offline half, the checkpoint last: without it the copy begins again."""
    tensors, _ = checkpoint.load(folder / checkpoint.NAME)
    kept: RunRecord = checkpoint.metadata(folder / checkpoint.NAME, RunRecord)
    if kept.step != job.train.updates:
        raise OffrlError(
            f"{folder}: {kept.step} of {job.train.updates} offline updates are made; finish them first (offrl train "
            f"resume={folder})."
        )
    check_rows(folder, kept.step, needed=True)
    names = {"run_id": new.name, "method": job.to_dict()["method"]}
    for kind in ("episodes", "metrics"):
        path = folder / f"{kind}.jsonl"
        (new / f"{kind}.parquet").unlink(missing_ok=True)
        data = _rows_until(read_bytes(path, "restore it", MOST_BYTES), kept.step, path)
        with replacing(new / path.name) as temporary:
            temporary.write_bytes(_renamed(data, names))
    metadata = {**kept.model_dump(mode="json", exclude={"online"}), "config": job.to_dict()}
    checkpoint.write(new / checkpoint.NAME, tensors, json.loads(json.dumps(metadata)))


def _renamed(data: bytes, names: Mapping[str, str]) -> bytes:
    """Rows under the new run's names."""
    lines = []
    for line in data.split(b"\n")[:-1]:
        row = json.loads(line)
        row |= {key: value for key, value in names.items() if key in row}
        lines.append(json.dumps(row, separators=(",", ":")))
    return "".join(f"{line}\n" for line in lines).encode()
