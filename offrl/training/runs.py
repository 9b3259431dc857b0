"""Opening a finished or interrupted run: its configuration, agent, data and result."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offrl.agents.base import Agent, Spec
from offrl.agents.history import HistoryAgent
from offrl.data.dataset import Bound, DatasetInfo, OfflineDataset
from offrl.data.lane_tasks import with_tasks
from offrl.data.partial import partially_observed
from offrl.datasets import load
from offrl.envs.chosen import with_environment
from offrl.training.answered import check_task, is_answered
from offrl.training.compose import choice_file, choices
from offrl.training.records import ManifestRecord, ResultRecord, RunRecord, SpecRecord, score_name
from offrl.training.run_config import RARE, RunConfig, agent_config, history_config
from offrl.training.schema import DataConfig, EvalConfig, TrainConfig
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError
from offrl.utils.files import read_json
from offrl.utils.memory import counting_parameters, require_bytes
from offrl.utils.paths import write_json
from offrl.utils.process import pick_device
from offrl.utils.settings import FREE, NAMES, canonical, class_in, lane_lists, training_environment, trusting

# Options that change no number of a training either. They are part of a run's hash, so that runs of before keep theirs.
UNCOMPARED = ("data.cache", "online.eval_every")
RECORDED_IN = "recorded_in"  # key of a dataset's provenance: its own environment, where `eval` gives another one


@dataclass
class Result:
    """What a finished run says.

    Attributes:
        folder: the run's folder.
        step: updates made.
        returns: `[lanes]` mean return of the last evaluation's episodes; empty when nothing was evaluated.
        scores: `[lanes]` the same as normalised scores; None without references.
        status: `finished`, `interrupted` (saved, can be resumed) or `already finished`.
        success: whether the scores are success rates in percent.
    """

    folder: Path
    step: int
    returns: list[float]
    scores: list[float] | None
    status: str
    success: bool = False


def read_config(folder: Path, option: str = "") -> dict[str, Any]:
    """The configuration of the run in a folder, which was named by `option`."""
    try:
        return read_json(folder / "config.json", dict[str, Any], "repeat the command that started the run")
    except FileNotFoundError as error:
        raise OffrlError(f"{option}{folder}: there is no config.json; name the folder of a run.") from error


def _check_same(job: RunConfig, folder: Path) -> None:
    """Refuse to continue a run, or to take it for done, under settings that make other numbers than it has."""
    path = folder / checkpoint.NAME
    if not path.exists():
        return
    kept: RunRecord = checkpoint.metadata(path, RunRecord)
    now = json.loads(json.dumps(job.to_dict()))
    before, after = (_flat(values, job.ends_rollouts and not _names_environment(kept)) for values in (kept.config, now))
    before["seeds"], after["seeds"] = kept.spec.seeds, job.train.lane_seeds()
    for flat in (before, after):  # what is written down only where it is set has its default elsewhere
        for name in RARE:
            flat.setdefault(f"data.{name}", getattr(DataConfig(), name))
        for key in UNCOMPARED:
            flat.pop(key, None)
    for key in sorted(before.keys() & after.keys()):
        if before[key] != after[key]:
            raise OffrlError(
                f"{folder}: the run was made with other settings ({key} {before[key]}, now {after[key]}); choose another "
                "name=, or start over with fresh=true."
            )
    if kept.step < job.train.total_updates:
        check_task(folder, kept.config.get("eval") or {}, job.train.eval)
    if kept.step < job.train.updates:
        _warn_of_decay(job, folder)
    if lacking := sorted(after.keys() - before.keys()):
        values = ", ".join(f"{key}={after[key]}" for key in lacking)
        warnings.warn(
            f"{folder}: an earlier version made the run and did not write down {len(lacking)} of its settings; it goes on with "
            f"{values}.",
            stacklevel=2,
        )


def _warn_of_decay(job: RunConfig, folder: Path) -> None:
    """Warn where a run goes on behind the end of its policy's schedule, in updates that leave the policy as it is."""
    decay = job.agent.get("actor_decay")
    if isinstance(decay, int) and 0 < decay < job.train.updates:
        warnings.warn(
            f"{folder}: the policy's learning rate is 0 from update {decay:,} on (agent.actor_decay), so that the updates up "
            f"to {job.train.updates:,} train the critics alone; a run of another schedule has another name=.",
            stacklevel=2,
        )


def check_data(folder: Path, kept: RunRecord, fingerprint: str, spec: Spec, dataset: str) -> None:
    """Raise OffrlError where a run was made on other data than there is now: other numbers, or numbers of other actions.

    Args:
        kept: what the run's checkpoint says; `fingerprint`, `spec`: of the data now; `dataset`: its name.
    """
    before, now = kept.spec.model_dump(exclude={"seeds"}), _spec_to(spec)
    if spec.discrete and kept.spec.discrete:  # which have no bounds
        before |= {name: now[name] for name in ("action_low", "action_high")}
    # One bound stands for as many equal ones.
    spread = {
        key: (np.resize(before[key], before["action_dim"]), np.resize(now[key], spec.action_dim)) for key in before
    }
    other = [key for key, (mine, theirs) in spread.items() if not np.array_equal(mine, theirs)]
    if kept.fingerprint == fingerprint and not other:
        return
    what = f" ({other[0]} {before[other[0]]}, now {now[other[0]]})" if other else ""
    raise OffrlError(
        f"{folder}: the run was made on other data than {dataset} holds now{what}; restore the dataset, or start over with "
        "fresh=true."
    )


def _names_environment(kept: RunRecord) -> bool:
    """Whether a run's dataset is known to name an environment of its own, whatever `eval.env` says."""
    options = kept.config.get("eval")
    given = isinstance(options, Mapping) and options.get("env")
    return RECORDED_IN in kept.info.provenance or (kept.info.env_id is not None and not given)


def _flat(config: Mapping[str, Any], ends_rollouts: bool) -> dict[str, Any]:
    """Settings that change a training's numbers, seeds apart, by dotted key.

    `augment`, `history` and `online` say whether there is one; the environment counts where an online phase learns in it, or a
    model's rollouts end as in it.
    """
    flat: dict[str, Any] = {name: bool(config.get(name)) for name in ("augment", "history", "online")}
    flat |= training_environment(config, ends_rollouts)
    for key, value in config.items():
        if key == "updates" and config.get("online"):  # they say where the online phase begins
            flat[key] = value
        if key in FREE | NAMES or (key in ("augment", "history", "online") and not value):
            continue
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": canonical(str(v)) if name == "_target_" else v for name, v in value.items()}
        else:
            flat[key] = value
    return flat


def done_before(job: RunConfig) -> Result | None:
    """The result of a run that has nothing left to do; None otherwise, or when it is to start over.

    A new `label` is written into the finished run's `config.json`, and more updates than are asked for are warned of.

    Raises:
        OffrlError: a run of other settings stands in the job's folder.
    """
    if job.train.fresh:
        return None
    folder, updates = job.folder(), job.train.total_updates
    _check_same(job, folder)
    done = finished(folder, updates)
    if done is None:
        return None
    if done.step > updates:
        warnings.warn(
            f"{folder}: the finished run has {done.step:,} updates, more than the {updates:,} that are asked for, and its "
            "result is of them all; name=NAME trains a run of fewer.",
            stacklevel=2,
        )
    elif not is_answered(folder, updates, job.train.eval):
        return None
    _keep_label(job, folder)
    return done


def _keep_label(job: RunConfig, folder: Path) -> None:
    """Write the label that is given, if it is another, into the configuration of a finished run, where reports read it."""
    if job.train.label is None:
        return
    config, now = read_config(folder), job.to_dict()
    if config.get("label") != now["label"]:
        write_json(folder / "config.json", config | {key: now[key] for key in ("label", "method")})


def finished(folder: Path, updates: int) -> Result | None:
    """The result of a run that has made its updates and has all its files; None otherwise.

    Raises:
        OffrlError: the result is damaged, or the rows that it sums up are gone.
    """
    path = folder / "result.json"
    try:
        kept = read_json(path, ResultRecord, "remove it, and the same command makes it again")
    except FileNotFoundError:
        return None
    if kept.step < updates or not all((folder / name).is_file() for name in ("config.json", "manifest.json")):
        return None  # the latter are written anew by a run that goes on
    for kind in ("episodes", "metrics"):
        if not (folder / f"{kind}.jsonl").is_file():
            raise OffrlError(f"{folder}: {kind}.jsonl is missing; restore it, or start over with fresh=true.")
    scores = None if kept.scores is None else _lanes(kept.scores)
    return Result(folder, kept.step, _lanes(kept.returns), scores, "already finished", kept.success)


def _lanes(values: Sequence[float | None]) -> list[float]:
    """JSON of other writers has null for NaN."""
    return [math.nan if value is None else value for value in values]


def summary(result: Result) -> str:
    """A run's result in a line."""
    if result.status == "interrupted":
        return f"stopped at update {result.step}; go on with: offrl train resume={result.folder}"
    scores = result.scores if result.scores is not None else result.returns
    name = score_name(result.success) if result.scores is not None else "return"
    text = "not evaluated"
    if scores:
        spread = f" +- {np.std(scores, ddof=1):.1f} (std over {len(scores)} lanes)" if len(scores) > 1 else ""
        text = f"{name} {np.mean(scores):.1f}{spread}"
    return f"{result.status}: {text} after {result.step} updates; {result.folder}"


def load_agent(folder: Path | str, device: str = "cpu", trust: bool = False) -> Agent:
    """The agent of a run, as its last checkpoint has it; `agent.predict(obs)` acts on raw observations.

    Args:
        folder: of the run, or a checkpoint's file.
        trust: import the module of an agent that is not offrl's; only for folders whose origin you know.
    """
    if not isinstance(folder, (str, Path)):
        raise OffrlError(
            f"load_agent takes the folder of a run, such as result.folder of fit's result, and not {type(folder).__name__}."
        )
    path, place = Path(folder), str(pick_device(device))
    path = path if path.is_file() else path / checkpoint.NAME
    kept: RunRecord
    tensors, kept = checkpoint.load(path, RunRecord)
    with trusting(trust):
        agent = make_agent(kept.config["agent"], _spec_from(kept.spec, place), kept.config.get("history"))
    restore_agent(agent, tensors, path)
    agent.random.step.fill_(kept.step)
    agent.lane_scores = _lane_scores(path.parent, kept.step, agent.spec.lanes)
    return agent.eval()


def _lane_scores(folder: Path, step: int, lanes: int) -> list[float] | None:
    """Each lane's score in the folder's result, if it is of update `step`: a run that goes on has an older one."""
    try:
        result = read_json(folder / "result.json", ResultRecord, "remove it, and the same command makes it again")
    except FileNotFoundError:
        return None
    scores = _lanes(result.returns if result.scores is None else result.scores)
    return scores if result.step == step and len(scores) == lanes else None


def restore_agent(agent: Agent, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy a checkpoint's tensors into an agent made from the same configuration.

    Raises:
        OffrlError: names, shapes or types are others than the agent's, or a number is not finite.
    """
    if "obs_mean" in tensors and tensors["obs_mean"].ndim > agent.obs_mean.ndim:
        spread_statistics(agent)
    checkpoint.restore(agent, tensors, path)


def spread_statistics(agent: Agent) -> None:
    """Give every lane observation statistics of its own, `[lanes, 1, O]` in place of `[O]`."""
    if agent.obs_mean.ndim == 1:
        agent.obs_mean, agent.obs_scale = (
            buffer.expand(agent.spec.lanes, 1, -1).clone() for buffer in (agent.obs_mean, agent.obs_scale)
        )


def make_agent(settings: Mapping[str, Any], spec: Spec, history: Mapping[str, Any] | None = None) -> Agent:
    """An agent from its `_target_` and the settings that differ from its dataclass.

    Args:
        history: settings of an encoder of histories, whose encodings the agent sees; empty: it sees observations.
    """
    if history:
        return HistoryAgent(spec, history_config(history, spec.lanes), partial(make_agent, settings))
    cls, cfg = agent_config(settings)
    if spec.discrete and not cls.takes_discrete:
        raise OffrlError(
            f"{cls.__name__} needs continuous actions; for integer ones choose agent={', '.join(discrete_agents())}."
        )
    if not spec.discrete and not cls.takes_continuous:
        raise OffrlError(
            f"{cls.__name__} needs integer actions; for continuous ones choose agent=cql, iql, td3_bc or another."
        )
    _check_size(cls, cfg, spec)
    try:
        agent: Agent = cls(spec, cfg)
    except ValueError as error:
        raise OffrlError(f"agent.{error}") from error
    return agent


def discrete_agents() -> list[str]:
    """Names of our agents that take discrete actions."""
    return [name for name in choices("agent") if class_in(choice_file("agent", name), Agent).takes_discrete]


def _check_size(cls: type[Agent], cfg: Any, spec: Spec) -> None:
    """Raise OffrlError where an agent's numbers won't fit into the memory; one lane of it is made without memory."""
    one_lane = dataclasses.replace(cfg, **{name: values[0] for name, values in lane_lists(cfg).items()})
    shape_only = dataclasses.replace(spec, seeds=(0,), obs_mean=None, obs_std=None, device="meta")
    name = f"the agent with {spec.lanes} lanes" + (f" and hidden={list(cfg.hidden)}" if hasattr(cfg, "hidden") else "")
    try:
        with torch.device("meta"), counting_parameters("the agent"):
            tensors = cls(shape_only, one_lane).state_dict().values()
    except OffrlError:
        raise
    except RuntimeError as error:
        if "overflow" in str(error) or "numel" in str(error):
            raise OffrlError(f"{name} needs more memory than any machine has; make it smaller.") from error
        return  # a user's agent may look at its numbers; what is really wrong shows when it is made
    except Exception:
        return
    needed = spec.lanes * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    require_bytes(needed, name, spec.device)


def located(dataset: str, folder: Path) -> str:
    """Where a run's data lies: a relative path that leads nowhere from here is where it was when the run was made."""
    path = Path(dataset).expanduser()
    if path.is_absolute() or path.exists():
        return dataset
    try:
        there = read_json(folder / "manifest.json", ManifestRecord, "restore it").files.get(dataset)
    except (FileNotFoundError, OffrlError):
        return dataset
    return there if there and Path(there).exists() else dataset


def load_data(job: TrainConfig, device: torch.device | str, folder: Path | None = None) -> OfflineDataset:
    """The dataset to train on, with its rewards transformed as the configuration says; `folder`: of the run."""
    return transform_rewards(read_data(job, device, folder), job.data)


def read_data(job: TrainConfig, device: torch.device | str, folder: Path | None = None) -> OfflineDataset:
    """The dataset as it was recorded, with the environment and the references that `eval` gives; `folder`: of its run."""
    options = job.data
    read = partial(
        load,
        located(job.dataset, folder) if folder else job.dataset,
        semantics=options.semantics,
        cache=options.cache,
        clip_actions=options.clip_actions,
        action_bound=options.action_bound,
        action_low=_bound(options.action_low),
        action_high=_bound(options.action_high),
        family=options.family,
        unfinished=options.unfinished,
        goals=options.goals,
        success_timing=options.success_timing,
        size=options.size,
        seed=options.seed,
        progress=job.progress,
    )
    if options.tasks:
        shown = partial(partially_observed, mask=options.mask, flicker=options.flicker, seed=options.seed)
        return with_tasks(lambda task: shown(read(task=task)), options.tasks).to(device)
    store = read(task=options.task, device=device)
    if (info := evaluation_info(store.info, job.eval)) is not store.info:
        own = {RECORDED_IN: store.info.env_id} if store.info.env_id not in (None, info.env_id) else {}
        store = store.with_info(**vars(info) | {"provenance": info.provenance | own})
    return partially_observed(store, options.mask, options.flicker, options.seed)


def as_recorded(store: OfflineDataset) -> OfflineDataset:
    """The dataset with the environment that it was recorded in, where `eval` gives another one."""
    own = store.info.provenance.get(RECORDED_IN)
    return store.with_info(env_id=own) if own else store


def _bound(value: float | list[float] | None) -> Bound | None:
    return tuple(value) if isinstance(value, list) else value


def evaluation_info(info: DatasetInfo, options: EvalConfig) -> DatasetInfo:
    """`info` with what the options of evaluation replace; itself where they replace nothing."""
    references = options.ref_min, options.ref_max
    return with_environment(info, options.env, options.env_kwargs, options.max_episode_steps, references)


def transform_rewards(store: OfflineDataset, options: DataConfig) -> OfflineDataset:
    """r <- scale r + shift, as the configuration says."""
    scale, shift = reward_transform(store, options)
    return store if (scale, shift) == (1.0, 0.0) else store.with_rewards(scale, shift)


def reward_transform(store: OfflineDataset, options: DataConfig) -> tuple[float, float]:
    """Scale and shift of a dataset's rewards."""
    scale = options.reward_scale
    if options.reward_normalize:
        spread = float(store.returns.max() - store.returns.min())
        if spread <= 0:
            raise OffrlError("data.reward_normalize=true needs episodes of different return; set it to false.")
        scale *= 1000.0 / spread
    return scale, options.reward_shift


def _spec_to(spec: Spec) -> dict[str, Any]:
    """The Spec as JSON; the statistics travel as tensors of the agent."""
    kept = ("obs_dim", "action_dim", "seeds", "action_low", "action_high", "discrete")
    return {name: getattr(spec, name) for name in kept}


def _spec_from(kept: SpecRecord, device: str) -> Spec:
    zeros: Tensor = torch.zeros(kept.obs_dim)
    values = kept.model_dump()
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Spec(**values, obs_mean=zeros, obs_std=zeros + 1, device=device)


def dataset_info(folder: Path | str) -> DatasetInfo:
    """The dataset of a run or checkpoint, as it was when the run was made."""
    path = Path(folder)
    record: RunRecord = checkpoint.metadata(path if path.is_file() else path / checkpoint.NAME, RunRecord)
    return record.info


def print_result(result: Any) -> int:
    """Print a run's result; 0, or 130 when it was interrupted."""
    print(summary(result))
    return 130 if result.status == "interrupted" else 0
