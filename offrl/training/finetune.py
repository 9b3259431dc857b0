"""Continuing a finished offline run with environment steps, in a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from offrl.data.replay import ReplayFiles
from offrl.envs.chosen import import_environment
from offrl.results import online
from offrl.results.rows import MOST_BYTES
from offrl.results.writer import _rows_until, check_rows
from offrl.training.compose import choice_file, choices
from offrl.training.online import FOLDER
from offrl.training.records import RunRecord
from offrl.training.run_config import RunConfig, resolve_config
from offrl.training.runs import Result, done_before, read_config
from offrl.training.trainer import Trainer
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError
from offrl.utils.files import read_bytes
from offrl.utils.paths import replacing
from offrl.utils.process import _locked
from offrl.utils.settings import FREE, TASK, set_dotted

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
    if _is_fine_tuned(folder, values):
        raise OffrlError(f"{folder} has been fine-tuned already; name the offline run, or continue it with resume=.")
    job = _job(folder, values, dict(changes or {}), config_dir)
    if (changes or {}).get("eval.env"):  # typed, and from no file
        import_environment(str(job.train.eval.env))
    new = job.folder()
    if new.resolve() == folder.resolve():
        raise OffrlError(f"{folder}: fine-tuning needs a folder of its own; choose another name=.")
    with _locked(new):
        if done := done_before(job):
            return done
        fresh, begins = job.train.fresh, job.train.fresh or not (new / checkpoint.NAME).exists()
        job.train.fresh = False
        evaluation = {key.split(".")[1] for key in changes or {} if key.startswith("eval.")}
        take_over = folder, partial(_take_over, folder, new, job, fresh, not evaluation.isdisjoint(TASK))
        return Trainer(job, new, source=folder).run(take_over if begins else None)


def _is_fine_tuned(folder: Path, values: Mapping[str, Any]) -> bool:
    """Whether a run's agent has begun to learn online: a run of both halves has not until its checkpoint says so."""
    path = folder / checkpoint.NAME
    if not path.exists():
        return bool(values.get("online"))
    kept: RunRecord = checkpoint.metadata(path, RunRecord)
    return kept.online is not None


def _job(folder: Path, values: dict[str, Any], changes: dict[str, Any], config_dir: Path | None) -> RunConfig:
    """The fine-tuning's configuration; `values`: the offline run's, which is changed on the way."""
    values |= {"fresh": False, "name": values.get("name") and f"{values['name']}-online"}
    values["out"] = str(folder.parent if values["name"] else folder.parent.parent.parent)
    values["online"] = {"steps": STEPS}
    for key, value in changes.items():
        top, _, rest = key.partition(".")
        if top == "agent" and rest:
            raise OffrlError(f"{key} belongs to the offline half; online.{key}={value} changes it at the switch.")
        if top not in FREE - {"lanes", "seed", "seeds", "updates"} and not (top == "online" and rest):
            raise OffrlError(f"{key} can't be changed when a run is fine-tuned; start another run for it.")
        set_dotted(values, key, value)
    if not values["online"]["steps"]:
        raise OffrlError("online.steps=0 leaves nothing to fine-tune; give the number of environment steps.")
    agent, choice = dict(values["agent"]), str(values.get("agent_name"))
    if choice in choices("agent", config_dir):  # what the method's table says of the online phase
        loaded = OmegaConf.load(choice_file("agent", choice, config_dir))
        table: Any = OmegaConf.to_container(loaded, resolve=False)
        agent |= {key: table.get(key) for key in ("settings", "online")}  # other keys may refer to the command's
    return resolve_config({**values, "agent": agent}, trusted=False)


def _take_over(folder: Path, new: Path, job: RunConfig, fresh: bool, other_task: bool) -> None:
    """Copy rows and checkpoint of the offline half, the checkpoint last: without it the copy begins again.

    Evaluations stay behind where they were of another task than those to come: one curve has scores of one scale. What an
    earlier fine-tuning left in the folder is removed before, its checkpoint ahead of the rows that this needs.
    """
    tensors, _ = checkpoint.load(folder / checkpoint.NAME)
    kept: RunRecord = checkpoint.metadata(folder / checkpoint.NAME, RunRecord)
    if kept.step != job.train.updates:
        raise OffrlError(
            f"{folder}: {kept.step} of {job.train.updates} offline updates are made; finish them first (offrl train "
            f"resume={folder})."
        )
    check_rows(folder, kept.step, needed=True)
    names = {"run_id": new.name, "method": job.to_dict()["method"]}
    until = {"episodes.jsonl": -1 if other_task else kept.step, "metrics.jsonl": kept.step}
    copies = {
        name: _renamed(_rows_until(read_bytes(folder / name, "restore it", MOST_BYTES), step, folder / name), names)
        for name, step in until.items()
    }
    _clear(new, fresh)
    for name, data in copies.items():
        (new / name).with_suffix(".parquet").unlink(missing_ok=True)
        with replacing(new / name) as temporary:
            temporary.write_bytes(data)
    metadata = {**kept.model_dump(mode="json", exclude={"online"}), "config": job.to_dict()}
    checkpoint.write(new / checkpoint.NAME, tensors, json.loads(json.dumps(metadata)))


def _clear(new: Path, fresh: bool) -> None:
    """Remove an earlier fine-tuning's results, checkpoints and online rows; the kept checkpoints only to start over."""
    old = [new / "result.json", *(sorted((new / "checkpoints").glob("*.safetensors")) if fresh else ())]
    for path in (*old, new / checkpoint.NAME, new / online.NAME):
        path.unlink(missing_ok=True)
    ReplayFiles(new / FOLDER).clear()


def _renamed(data: bytes, names: Mapping[str, str]) -> bytes:
    """Rows under the new run's names."""
    lines = []
    for line in data.split(b"\n")[:-1]:
        row = json.loads(line)
        row |= {key: value for key, value in names.items() if key in row}
        lines.append(json.dumps(row, separators=(",", ":")))
    return "".join(f"{line}\n" for line in lines).encode()
