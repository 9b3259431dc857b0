"""Training: the order of things, their cadence, what is logged and what is saved. No agent is known here by name."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import hashlib
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offrl import checkpoint, config, results
from offrl.agent import Agent, Spec
from offrl.augment.base import Synthetic, augmentation_config, check_agent, make_augmentation
from offrl.config import FREE, DataConfig, TrainConfig
from offrl.data.catalogue import namesake
from offrl.data.info import return_spread
from offrl.data.store import DatasetInfo, Store, concatenate
from offrl.engine import make_engine
from offrl.errors import OffrlError
from offrl.evaluate import Episodes, Evaluator
from offrl.paths import replacing
from offrl.progress import Bar
from offrl.sampling import Replay, further_datasets, make_sampler, sampler_config
from offrl.trackers import make_tracker


@dataclass
class Result:
    """What a finished run says.

    Attributes:
        folder: the run's folder.
        step: updates made.
        returns: `[lanes]` mean return of the last evaluation's episodes; empty when nothing was evaluated.
        scores: `[lanes]` the same as normalised scores; None without references.
        status: `finished`, `interrupted` (saved, can be resumed) or `already finished`.
    """

    folder: Path
    step: int
    returns: list[float]
    scores: list[float] | None
    status: str


@dataclass
class Plan:
    """A checked configuration: what to run, before any data is loaded."""

    train: TrainConfig
    agent: dict[str, Any]  # `_target_` and the settings that differ from the dataclass
    sampler: dict[str, Any]
    augment: dict[str, Any] = field(default_factory=dict)  # empty: no augmentation

    @property
    def agent_name(self) -> str:
        return self.agent["_target_"].split(".")[-2]

    @property
    def method(self) -> str:
        """The agent's name, the sampler's where it is not the uniform one, the augmentation's: `td3_bc+AW+PGD`."""
        lanes = len(self.train.lane_seeds())
        cls, cfg = sampler_config(self.sampler, lanes)
        augmentation = augmentation_config(self.augment, lanes)[0].name if self.augment else ""
        return "+".join(filter(None, (self.agent_name, cls.label(cfg), augmentation)))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is kept with the run; `plan` reads it back."""
        train = asdict(self.train)
        augment = {"augment": self.augment} if self.augment else {}
        method = self.train.label or self.method
        return {"method": method, "agent": self.agent, "sampler": self.sampler, **augment, **train}

    def identity(self) -> str:
        """8 hex digits of everything that changes the training's numbers, seeds apart."""
        what = {k: v for k, v in self.to_dict().items() if k not in FREE | {"method"}}
        return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=4).hexdigest()

    def folder(self) -> Path:
        if self.train.name:
            return Path(self.train.out) / self.train.name
        seeds = self.train.lane_seeds()
        run = seeds == list(range(seeds[0], seeds[0] + len(seeds))) and len(seeds) > 1
        text = f"{seeds[0]}-{seeds[-1]}" if run else "_".join(map(str, seeds))
        if len(text) > 40:
            text = f"{text[:30]}...{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"
        dataset = re.sub(r"[^\w.-]+", "_", self.train.dataset).strip("._")
        method = re.sub(r"[^\w.+-]+", "", self.method)
        return Path(self.train.out) / method / dataset / f"seed{text}-{self.identity()}"


def plan(values: Mapping[str, Any]) -> Plan:
    """Check a composed configuration.

    The settings that a method's table has for the dataset are filled in where nothing was given.

    Raises:
        OffrlError: an unknown key or a wrong value.
    """
    values = {k: v for k, v in values.items() if k not in ("method", "hydra")}
    names = ("agent", "sampler", "augment", "data", "sizes")
    agent, sampler, augment, given_data, sizes = (_table(values, name) for name in names)
    if "_target_" not in agent:
        raise OffrlError("agent needs a _target_; choose one with agent=NAME, `offrl agents` lists them.")
    tables, dataset = agent.pop("settings", None), str(values.get("dataset", ""))
    cls, _ = agent_config(agent)  # a typing error should not wait for the data
    config.check_tables(tables, cls.Config)
    chosen = config.chosen_settings(tables, dataset, namesake(dataset))
    for key, value in chosen.items():
        if key.startswith("data."):
            given_data.setdefault(key.removeprefix("data."), value)
        elif key in config.TABLED:
            values.setdefault(key, value)
        else:
            agent.setdefault(key, value)
    groups = ("agent", "sampler", "augment", "preset", "suite", "experiment")
    train = config.build(TrainConfig, {**values, "data": given_data}, others=groups)
    if not train.dataset:
        raise OffrlError("dataset is empty; name one with dataset=ID, `offrl data list` shows the known ones.")
    _check_ranges(train)
    if train.seeds and len(train.seeds) != train.lanes:
        if train.lanes != 1:
            raise OffrlError(f"seeds has {len(train.seeds)} values for lanes={train.lanes}; give one per lane.")
        train.lanes = len(train.seeds)
    _take_sizes(agent, cls.Config, sizes)
    sampler.setdefault("_target_", "offrl.sampling.Uniform")
    sampler_config(sampler, len(train.lane_seeds()))
    if augment and "_target_" not in augment:
        raise OffrlError(
            f"augment.{next(iter(augment))}: there is no augmentation to set; choose one with augment=NAME."
        )
    if augment:
        augmentation, _ = augmentation_config(augment, len(train.lane_seeds()))
        _take_sizes(augment, augmentation.Config, sizes)
    return Plan(train, agent, sampler, augment)


def _take_sizes(settings: dict[str, Any], cls: type[Any], sizes: Mapping[str, Any]) -> None:
    """A preset's sizes, where a method has them and nothing else was given."""
    for f in fields(cls):
        if f.name in sizes:
            settings.setdefault(f.name, sizes[f.name])


def _table(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings under a name, taken out of `values`."""
    settings = values.pop(name, None)
    if not isinstance(settings, Mapping | None):
        raise OffrlError(f"{name}={settings} should be a table of settings, not a single value.")
    return dict(settings or {})


def _check_ranges(train: TrainConfig) -> None:
    positive = ("updates", "batch_size", "lanes", "updates_per_launch", "log_every", "checkpoint_every", "threads")
    least = dict.fromkeys(positive, 1) | {"eval.workers": 1, "eval.slots": 1}
    least |= dict.fromkeys(("eval.every", "eval.episodes", "eval.final_episodes", "eval.seed"), 0)
    for key, smallest in least.items():
        value = attrgetter(key)(train)
        if value is not None and value < smallest:
            raise OffrlError(f"{key}={value} should be at least {smallest}.")
    if any(not -(2**63) <= seed < 2**63 for seed in train.lane_seeds()):
        raise OffrlError("a seed should be a number of at most 63 bits.")


def train(values: Mapping[str, Any]) -> Result:
    """Train, evaluate and save as a composed configuration says; a run that was cut short goes on where it stopped.

    Raises:
        OffrlError: bad input, an unwritable folder, a full disk.
    """
    job = plan(values)
    folder = job.folder()
    with _locked(folder):
        return done_before(job) or Trainer(job, folder).run()


def resume(folder: Path | str, changes: Mapping[str, Any] | None = None) -> Result:
    """Continue a run in its folder; `changes` may name options that leave the training's numbers alone.

    Raises:
        OffrlError: no run stands there, or a change would alter the training.
    """
    folder = Path(folder)
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    values = read_config(folder, "resume=")
    for key, value in (changes or {}).items():
        top = key.split(".")[0]
        if top not in FREE - {"out", "name", "fresh", "lanes", "seed", "seeds"}:
            raise OffrlError(f"{key} can't be changed when a run is resumed; start another run for it.")
        if "." in key:
            values[top] = {**values[top], key.split(".", 1)[1]: value}
        else:
            values[key] = value
    job = plan({**values, "out": str(folder.parent), "name": folder.name, "fresh": False})
    with _locked(folder):
        _check_same(job, folder)
        return finished(folder, job.train.updates) or Trainer(job, folder).run()


def read_config(folder: Path, option: str = "") -> dict[str, Any]:
    """The configuration of the run in a folder, which was named by `option`."""
    path = folder / "config.json"
    if not path.is_file():
        raise OffrlError(f"{option}{folder}: there is no config.json; name the folder of a run.")
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise OffrlError(f"{path} is damaged ({error}); repeat the command that started the run.") from error


def _check_same(job: Plan, folder: Path) -> None:
    """Refuse to continue a run, or to take it for done, under settings that make other numbers than it has."""
    path = folder / checkpoint.NAME
    if not path.exists():
        return
    kept = checkpoint.facts(path)
    now = json.loads(json.dumps(job.to_dict()))
    pairs = {key: (kept["config"].get(key), now.get(key)) for key in now.keys() - FREE - {"method"} | {"augment"}}
    pairs["seeds"] = (list(kept["spec"]["seeds"]), job.train.lane_seeds())
    for key, (before, after) in sorted(pairs.items()):
        if before != after:
            raise OffrlError(
                f"{folder}: the run was made with other settings ({key} {before}, now {after}); choose another name=, or "
                "start over with fresh=true."
            )


def done_before(job: Plan) -> Result | None:
    """The result of a run that has nothing left to do; None otherwise, or when it is to start over.

    Raises:
        OffrlError: a run of other settings stands in the job's folder.
    """
    if job.train.fresh:
        return None
    _check_same(job, job.folder())
    return finished(job.folder(), job.train.updates)


def finished(folder: Path, updates: int) -> Result | None:
    """The result of a run that has made its updates; None otherwise."""
    try:
        kept = json.loads((folder / "result.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    if kept["step"] < updates:
        return None
    return Result(folder, kept["step"], kept["returns"], kept["scores"], "already finished")


def summary(result: Result) -> str:
    """A run's result in a line."""
    if result.status == "interrupted":
        return f"stopped at update {result.step}; go on with: offrl train resume={result.folder}"
    scores = result.scores if result.scores is not None else result.returns
    name = "normalised score" if result.scores is not None else "return"
    text = "not evaluated"
    if scores:
        spread = f" +- {np.std(scores, ddof=1):.1f} (std over {len(scores)} lanes)" if len(scores) > 1 else ""
        text = f"{name} {np.mean(scores):.1f}{spread}"
    return f"{result.status}: {text} after {result.step} updates; {result.folder}"


def load_agent(folder: Path | str, device: str = "cpu") -> Agent:
    """The agent of a run, as its last checkpoint has it; `agent.select_action(obs)` acts on raw observations.

    Args:
        folder: of the run, or a checkpoint's file.
    """
    path = Path(folder)
    path = path if path.is_file() else path / checkpoint.NAME
    tensors, facts = checkpoint.load(path)
    agent = make_agent(facts["config"]["agent"], _spec_from(facts["spec"], device))
    checkpoint.restore(agent, tensors, path)
    agent.random.step.fill_(facts["step"])
    return agent.eval()


def agent_config(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class that `_target_` names and its configuration with the given settings, both checked."""
    return config.from_target(settings, Agent, "agent")


def make_agent(settings: Mapping[str, Any], spec: Spec) -> Agent:
    """An agent from its `_target_` and the settings that differ from its dataclass."""
    cls, cfg = agent_config(settings)
    try:
        agent: Agent = cls(spec, cfg)
    except ValueError as error:
        raise OffrlError(f"agent.{error}") from error
    return agent


def load_data(job: TrainConfig, device: torch.device | str) -> Store:
    """The Store to train on, with its rewards transformed as the configuration says."""
    return transform_rewards(read_data(job, device), job.data)


def read_data(job: TrainConfig, device: torch.device | str) -> Store:
    """The Store as it was recorded."""
    from offrl import data
    from offrl.data import forge

    options = job.data
    name: str | Path = job.dataset
    if job.dataset.startswith("forge/"):
        name = forge.ensure(job.dataset, size=options.size, seed=options.seed, progress=job.progress)
    return data.load(
        name,
        device=device,
        semantics=options.semantics,
        cache=options.cache,
        clip_actions=options.clip_actions,
        action_bound=options.action_bound,
        unfinished=options.unfinished,
        goals=options.goals,
    )


def transform_rewards(store: Store, options: DataConfig) -> Store:
    """r <- scale r + shift, as the configuration says."""
    scale, shift = reward_transform(store, options)
    return store if (scale, shift) == (1.0, 0.0) else store.with_rewards(scale, shift)


def reward_transform(store: Store, options: DataConfig) -> tuple[float, float]:
    """Scale and shift of a dataset's rewards."""
    scale = options.reward_scale
    if options.reward_normalize:
        spread = float(store.returns.max() - store.returns.min())
        if spread <= 0:
            raise OffrlError("data.reward_normalize=true needs episodes of different return; set it to false.")
        scale *= 1000.0 / spread
    return scale, options.reward_shift


class Trainer:
    """One run, from its last checkpoint (if there is one) to its last update."""

    def __init__(self, job: Plan, folder: Path) -> None:
        self.job, self.cfg, self.folder = job, job.train, folder
        tune_process(self.cfg.threads)
        self.device = pick_device(self.cfg.device)
        names = [self.cfg.dataset, *further_datasets(job.sampler)]
        parts = [read_data(replace(self.cfg, dataset=name), self.device) for name in names]
        recorded = parts[0] if len(parts) == 1 else concatenate(parts)
        self.spread = return_spread(recorded)
        self.store = transform_rewards(recorded, self.cfg.data)
        self.seeds = self.cfg.lane_seeds()
        mean, std = self.store.observation_statistics()
        info = self.store.info
        self.spec = Spec(
            obs_dim=self.store.obs_dim,
            action_dim=self.store.action_dim,
            seeds=tuple(self.seeds),
            obs_mean=mean,
            obs_std=std,
            action_low=info.action_low,
            action_high=info.action_high,
            discrete=info.discrete is not None,
            device=self.device,
        )
        self.agent = make_agent(job.agent, self.spec)
        if self.cfg.updates <= self.agent.starts_after:
            raise OffrlError(
                f"updates={self.cfg.updates}: {job.agent_name} prepares for {self.agent.starts_after} updates before its "
                "policy learns anything; make more, or shorten its first stages (`offrl agents` names them)."
            )
        self.agent.attach(self.store)
        self.sampler = make_sampler(job.sampler, parts, self.seeds)  # by the rewards as recorded
        self.synthetic = self._synthetic(recorded)
        sources = self.synthetic.sources if self.synthetic else [(self.store, self.sampler, 1.0)]
        self.replay = Replay(sources, self.cfg.batch_size, self.agent.window, self.agent.extra)
        self.engine = make_engine(
            self.cfg.engine, self.agent, self.replay, self.cfg.precision, self.cfg.updates_per_launch
        )
        self.step, self.stop = 0, False
        self.last: Episodes | None = None

    def _synthetic(self, recorded: Store) -> Synthetic | None:
        if not self.job.augment:
            return None
        check_agent(self.agent)
        augmentation = make_augmentation(self.job.augment, recorded, self.seeds)
        rewards = reward_transform(recorded, self.cfg.data)
        return Synthetic(augmentation, (self.store, self.sampler), rewards, self.folder)

    # ---- the run ----------------------------------------------------------------------------------------------

    def run(self) -> Result:
        for torn in self.folder.glob(".*.part"):  # of a process that was killed while it wrote
            torn.unlink(missing_ok=True)
        playing = self._evaluator()  # a missing simulator shows before the first update
        resumed = self._restore()
        if not resumed:
            self.sampler.start()
        if self.synthetic:
            self.synthetic.begin(self.replay, self.agent, self.step, self.cfg.progress)
        self._describe()
        self.writer = results.RunWriter(self.folder, self._row_facts(), resume_step=self.step if resumed else -1)
        self.tracker = make_tracker(
            self.cfg.tracker.split(",") if isinstance(self.cfg.tracker, str) else self.cfg.tracker,
            self.folder,
            self.job.to_dict(),
            self.folder.name,
            self.step if resumed else None,
        )
        with playing as evaluator, _stopping(self._request_stop), _no_collector():
            try:
                self._loop(evaluator)
            finally:
                self.tracker.close()
                self.writer.close()
        return self._finish()

    def _loop(self, evaluator: Evaluator | None) -> None:
        cfg = self.cfg
        with Bar(cfg.progress, "/".join(self.folder.parts[-3:-1]), self.step, cfg.updates) as bar:
            burst, since, mark = 1, self.step, time.perf_counter()
            while self.step < cfg.updates and not self.stop:
                updates = self._next_burst(burst)
                began = time.perf_counter()
                metrics = self.engine.run(self.step, updates)
                self.step += updates
                if self.step % cfg.log_every == 0 or self.step == cfg.updates:
                    values = {name: value.tolist() for name, value in metrics.items()}
                    rate = (self.step - since) / (time.perf_counter() - mark)
                    self._log(values, rate)
                    since, mark = self.step, time.perf_counter()
                # About a quarter of a second a burst: quick to stop, and rare enough to cost nothing.
                burst = max(1, min(10_000, int(updates * 0.25 / (time.perf_counter() - began + 1e-9))))
                bar.update(self.step)
                if evaluator and cfg.eval.every and self.step % cfg.eval.every == 0 and self.step < cfg.updates:
                    paused = time.perf_counter()
                    self._evaluate(evaluator, cfg.eval.episodes, bar)
                    mark += time.perf_counter() - paused
                if self.sampler.refresh_every and self.step % self.sampler.refresh_every == 0:
                    paused = time.perf_counter()
                    self.sampler.refresh()
                    mark += time.perf_counter() - paused
                if self.synthetic and self.synthetic.due(self.step) and self.step < cfg.updates:
                    paused = time.perf_counter()
                    bar.note("generating")
                    self.synthetic.refresh(self.agent, self.step)
                    self.engine.renew()
                    mark += time.perf_counter() - paused
                if self.step % cfg.checkpoint_every == 0 and self.step < cfg.updates:
                    paused = time.perf_counter()
                    self._save()
                    mark += time.perf_counter() - paused
            self._save()
            if self.step >= cfg.updates and evaluator:
                self._evaluate(evaluator, cfg.eval.final_episodes, bar)

    def _next_burst(self, wanted: int) -> int:
        """About `wanted` updates, but none past the next event, and whole periods where that is possible.

        So the metrics at hand when a burst ends depend on the update's number, and neither on how fast the machine is
        nor on where the run was resumed.
        """
        period, until = self.agent.period, self._to_next_event()
        if inside := self.step % period:
            return min(until, period - inside)
        return min(until, max(wanted, period)) // period * period or until

    def _to_next_event(self) -> int:
        """Updates until something happens besides training."""
        cadences = [self.cfg.log_every, self.cfg.checkpoint_every, self.cfg.eval.every or self.cfg.updates]
        cadences.append(self.sampler.refresh_every or self.cfg.updates)
        cadences.append((self.synthetic and self.synthetic.every) or self.cfg.updates)
        return min(self.cfg.updates - self.step, *(c - self.step % c for c in cadences))

    def _evaluate(self, evaluator: Evaluator, episodes: int, bar: Bar) -> None:
        if episodes < 1:
            return
        bar.note("evaluating")
        self.last = played = evaluator.run(self.agent, episodes, self.cfg.eval.seed)
        self.writer.episodes(self.step, self.seeds, played.returns, played.lengths, played.normalized, played.seeds)
        name, values = ("score", played.normalized) if played.normalized is not None else ("return", played.returns)
        self.tracker.log(self.step, {f"eval/{name}": float(values.mean())})
        bar.note(f"{name} {values.mean():.1f}")

    def _log(self, values: dict[str, list[float]], rate: float) -> None:
        self.writer.metrics(self.step, self.seeds, values, updates_per_second=rate)
        self._check_finite({name: bool(np.isfinite(lanes).all()) for name, lanes in values.items()})
        means = {f"train/{name}": float(np.mean(lanes)) for name, lanes in values.items()}
        self.tracker.log(self.step, {**means, "train/updates_per_second": rate})

    def _check_finite(self, finite: Mapping[str, bool]) -> None:
        if broken := [name for name, good in finite.items() if not good]:
            raise OffrlError(
                f"{self.folder}: {broken[0]} is no longer finite at update {self.step}; lower the learning rates or look "
                "at the data. The last checkpoint is kept."
            )

    # ---- saving and restoring ---------------------------------------------------------------------------------

    def _save(self) -> None:
        self._check_finite({name: bool(value.isfinite().all()) for name, value in self.agent.named_parameters()})
        self.writer.flush()
        facts = {
            "step": self.step,
            "fingerprint": self.store.fingerprint,
            "config": self.job.to_dict(),
            "spec": _spec_to(self.spec),
            "info": asdict(self.store.info),
        }
        learnt = self.sampler.tensors()
        if self.synthetic:
            self.synthetic.save()
        checkpoint.save(self.folder / checkpoint.NAME, self.agent, facts, learnt)
        if self.cfg.keep_checkpoints:
            checkpoint.save(self.folder / "checkpoints" / f"{self.step:08d}.safetensors", self.agent, facts, learnt)
        if self.synthetic:
            self.synthetic.sweep()

    def _restore(self) -> bool:
        """Take up the last checkpoint; False when there is none (or the run is to start over)."""
        path = self.folder / checkpoint.NAME
        if self.cfg.fresh:  # a kill before the first checkpoint must not bring back the old run
            for old in (path, *(self.folder / "checkpoints").glob("*.safetensors")):
                old.unlink(missing_ok=True)
        if not path.exists():
            if self.synthetic:
                self.synthetic.clear()
            (self.folder / "result.json").unlink(missing_ok=True)
            return False
        tensors, facts = checkpoint.load(path)
        if facts["fingerprint"] != self.store.fingerprint:
            raise OffrlError(
                f"{self.folder}: the run was made on other data than {self.cfg.dataset} holds now; restore the dataset, "
                "or start over with fresh=true."
            )
        checkpoint.restore(self.agent, tensors, path)
        if learnt := checkpoint.of_sampler(tensors):
            self.sampler.restore(learnt)
        self.step = facts["step"]
        return True

    def _describe(self) -> None:
        """Everything that a reader of the numbers may ask for later, beside them."""
        manifest = {
            "run_id": self.folder.name,
            "method": self.job.method,
            "sampler": {**self.sampler.facts(), "positive_sided_variance": self.spread},
            **({"augment": self.synthetic.augmentation.facts()} if self.synthetic else {}),
            "fingerprint": self.store.fingerprint,
            "dataset_info": asdict(self.store.info),
            "transitions": len(self.store),
            "episodes": self.store.episodes,
            "environment": results.environment(),
            "device": str(self.device),
            "parameters_per_lane": sum(p.numel() for p in self.agent.parameters() if p.requires_grad)
            // len(self.seeds),
        }
        write_json(self.folder / "config.json", self.job.to_dict())
        write_json(self.folder / "manifest.json", manifest)

    def _row_facts(self) -> dict[str, Any]:
        return {
            "run_id": self.folder.name,
            "method": self.job.to_dict()["method"],
            "dataset": self.store.info.id,
            "env_id": self.store.info.env_id,
            "updates": self.cfg.updates,
        }

    def _finish(self) -> Result:
        returns = [] if self.last is None else self.last.returns.mean(-1).tolist()
        normalized = None if self.last is None else self.last.normalized
        scores = None if normalized is None else normalized.mean(-1).tolist()
        if self.step >= self.cfg.updates:
            write_json(self.folder / "result.json", {"step": self.step, "returns": returns, "scores": scores})
        status = "finished" if self.step >= self.cfg.updates else "interrupted"
        return Result(self.folder, self.step, returns, scores, status)

    def _evaluator(self) -> Any:
        cfg = self.cfg.eval
        if cfg.final_episodes < 1 and (cfg.every < 1 or cfg.episodes < 1):
            return _Nothing()
        return Evaluator(self.store.info, len(self.seeds), cfg.workers, cfg.slots)

    def _request_stop(self) -> None:
        self.stop = True


# ---- process -------------------------------------------------------------------------------------------------


def tune_process(threads: int) -> None:
    """Threads, and an allocator that keeps what it freed.

    Networks of these sizes free and claim the same half megabytes thousands of times a second; glibc by default gives
    them back to the kernel each time, and the page faults cost several percent of an update.
    """
    torch.set_num_threads(threads)
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        except (OSError, AttributeError):
            return  # another C library: nothing to tune


@contextmanager
def _no_collector() -> Iterator[None]:
    """Keep the cycle collector from walking millions of objects that stay; it still sees what is made from here on."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _stopping(request: Callable[[], None]) -> Iterator[None]:
    """On SIGINT or SIGTERM ask for a stop after the current burst; a second SIGINT ends at once."""

    def handle(number: int, frame: Any) -> None:
        request()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs it decides when to stop
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process a run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115 - held until the run ends
    except OSError as error:
        raise OffrlError(
            f"{folder} can't be written ({error.strerror}); choose another folder with out=DIR."
        ) from error
    with file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # `offrl status` may be looking
                time.sleep(0.2)
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OffrlError(f"{folder}: another process is training this run; wait for it or choose name=.") from error
        yield


class _Nothing:
    """Stands where an Evaluator would when nothing is evaluated."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


# ---- small things --------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(value, indent=1, default=str) + "\n")
    except OSError as error:
        raise OffrlError(f"{path} can't be written ({error.strerror}); choose another folder with out=DIR.") from error


def pick_device(name: str) -> torch.device:
    """The device that `device=` names; `auto` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OffrlError(f"device={name} is unknown; choose auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OffrlError(f"device={name}: this PyTorch sees no GPU; use device=cpu.")
    return device


def _spec_to(spec: Spec) -> dict[str, Any]:
    """The Spec as JSON; the statistics travel as tensors of the agent."""
    kept = ("obs_dim", "action_dim", "seeds", "action_low", "action_high", "discrete")
    return {name: getattr(spec, name) for name in kept}


def _spec_from(values: Mapping[str, Any], device: str) -> Spec:
    zeros: Tensor = torch.zeros(values["obs_dim"])
    return Spec(**{**values, "seeds": tuple(values["seeds"])}, obs_mean=zeros, obs_std=zeros + 1, device=device)


def dataset_info(folder: Path | str) -> DatasetInfo:
    """The dataset of a run or checkpoint, as it was when the run was made."""
    path = Path(folder)
    return DatasetInfo(**checkpoint.facts(path if path.is_file() else path / checkpoint.NAME)["info"])
