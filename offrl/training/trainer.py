"""Training: the order of things, their cadence, what is logged and what is saved. No agent is known here by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offrl import results
from offrl.agents.base import Agent, Spec
from offrl.augment.base import Synthetic, check_agent, make_augmentation
from offrl.data.dataset import OfflineDataset, concatenate
from offrl.data.lane_tasks import lane_infos
from offrl.data.partial import title
from offrl.data.statistics import return_spread
from offrl.evaluation.evaluator import Episodes
from offrl.nets import Critics
from offrl.results.writer import check_rows
from offrl.sampling import BatchLoader, further_datasets, make_sampler
from offrl.training.checks import check_environment
from offrl.training.engine import in_one_stage, make_engine, noted_engine
from offrl.training.evaluations import Evaluations
from offrl.training.hooks import Evaluation, Hooks
from offrl.training.online import EnvironmentFailure, OnlinePhase
from offrl.training.records import OnlineRecord, RunRecord
from offrl.training.run_config import RunConfig, resolve_config
from offrl.training.runs import (
    Result,
    _spec_to,
    as_recorded,
    check_data,
    done_before,
    located,
    make_agent,
    read_config,
    read_data,
    restore_agent,
    reward_transform,
    transform_rewards,
)
from offrl.training.scoring import lane_means
from offrl.training.trackers import by_lane, check_tracker, make_tracker
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError
from offrl.utils.memory import require_bytes
from offrl.utils.paths import remove_torn, write_json
from offrl.utils.process import _locked, _no_collector, _stopping, pick_device, tune_process
from offrl.utils.progress import Bar
from offrl.utils.provenance import environment
from offrl.utils.settings import FREE, set_dotted


def train(values: Mapping[str, Any], hooks: Hooks | None = None) -> Result:
    """Train, evaluate and save as a composed configuration says; a run that was cut short goes on where it stopped.

    A finished run whose last evaluation has fewer episodes than are asked for plays them.

    Raises:
        OffrlError: bad input, an unwritable folder, a full disk.
    """
    job = resolve_config(values)
    folder = job.folder()
    with _locked(folder):
        return done_before(job) or Trainer(job, folder, hooks).run()


def resume(folder: Path | str, changes: Mapping[str, Any] | None = None) -> Result:
    """Continue a run in its folder; `changes` may name options that leave the training's numbers alone.

    Raises:
        OffrlError: no run stands there, or a change would alter the training.
    """
    folder = Path(folder)
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    values = resolve_config(read_config(folder, "resume="), trusted=False).to_dict()  # whole, whatever the file has
    for key, value in (changes or {}).items():
        top = key.split(".")[0]
        if top not in FREE - {"out", "name", "fresh", "lanes", "seed", "seeds"}:
            raise OffrlError(f"{key} can't be changed when a run is resumed; start another run for it.")
        set_dotted(values, key, value)
    job = resolve_config({**values, "out": str(folder.parent), "name": folder.name, "fresh": False}, trusted=False)
    if (changes or {}).get("eval.env"):  # typed, and from no file
        check_environment(job.train)
    with _locked(folder):
        return done_before(job) or Trainer(job, folder).run()


class Trainer:
    """One run, from its last checkpoint (if there is one) to its last update; `source`: of the run that it goes on from."""

    def __init__(self, job: RunConfig, folder: Path, hooks: Hooks | None = None, source: Path | None = None) -> None:
        self.job, self.cfg, self.folder, self.hooks = job, job.train, folder, hooks or Hooks()
        tune_process(self.cfg.threads)
        self.device = pick_device(self.cfg.device)
        names = [self.cfg.dataset, *further_datasets(job.sampler)]
        found = [located(located(name, folder), source or folder) for name in names]
        self.files = {name: str(Path(path).absolute()) for name, path in zip(names, found) if Path(path).exists()}
        parts = [read_data(replace(self.cfg, dataset=path), self.device) for path in found]
        recorded = parts[0] if len(parts) == 1 else concatenate(parts)
        self.spread = None if self.cfg.data.tasks else return_spread(recorded)
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
        self.agent = make_agent(job.agent, self.spec, job.history)
        if self.cfg.updates <= self.agent.pretrain_updates and (self.cfg.updates or self.agent.pretrain_updates):
            raise OffrlError(
                f"updates={self.cfg.updates}: {job.agent_name} prepares for {self.agent.pretrain_updates} updates before its "
                "policy learns anything; make more, or shorten its first stages (`offrl agents` names them)."
            )
        self._check_window()
        self.agent.setup(self.store)
        self.sampler = make_sampler(job.sampler, parts, self.seeds)  # by the rewards as recorded
        self.synthetic = self._synthetic(recorded)
        sources = self.synthetic.sources if self.synthetic else [(self.store, self.sampler, 1.0)]
        shape = self.agent.window, self.agent.batch_fields, self.agent.window_before
        self.loader = BatchLoader(sources, self.cfg.batch_size, *shape)
        self.engine = make_engine(
            self.cfg.engine, self.agent, self.loader, self.cfg.precision, self.cfg.updates_per_launch
        )
        self.online = self._online_phase(recorded)
        self.step, self.stop = 0, False
        self.kept_online: OnlineRecord | None = None  # where the checkpoint's online phase stands
        self.unplayed = False  # whether the checkpoint's own evaluation is still to be played

    def _check_window(self) -> None:
        """Raise OffrlError where an update's windows won't fit into the memory."""
        if length := self.agent.window:
            numbers = len(self.seeds) * self.cfg.batch_size * length * (2 * self.store.obs_dim + self.store.action_dim)
            require_bytes(4 * numbers, f"batch_size={self.cfg.batch_size} windows of {length} timesteps", self.device)

    def _synthetic(self, recorded: OfflineDataset) -> Synthetic | None:
        if not self.job.augment:
            return None
        augmentation = make_augmentation(self.job.augment, as_recorded(recorded), self.seeds)
        check_agent(self.agent, type(augmentation), augmentation.cfg.length)
        rewards = reward_transform(recorded, self.cfg.data)
        return Synthetic(augmentation, (self.store, self.sampler), rewards, self.folder)

    def _online_phase(self, recorded: OfflineDataset) -> OnlinePhase | None:
        if not self.cfg.online.steps:
            return None
        rewards = reward_transform(recorded, self.cfg.data)
        source = (self.store, self.sampler)
        return OnlinePhase(self.cfg, self.job.agent, self.agent, source, rewards, self.folder)

    # ---- the run ----------------------------------------------------------------------------------------------

    def run(self, take_over: tuple[Path, Callable[[], None]] | None = None) -> Result:
        """The result; `take_over`: the folder whose checkpoint it begins with, and what copies it here once all is checked."""
        # A missing simulator shows before the first update.
        self.evaluations = Evaluations(self.cfg, self.store.info, self.spec, self._keep_evaluation)
        check_tracker(self.cfg.tracker)
        resumed = self._restore(take_over[0] if take_over else self.folder)
        if take_over:
            take_over[1]()
            self._describe()  # at once, so that whatever fails from here on leaves a run that can be resumed
        if resumed:
            check_rows(self.folder, self.step, needed=True)
            if self.online and self.kept_online:
                self.online.load(self.kept_online)
        else:  # nothing in the folder is touched before this line
            self._clear()
            self.sampler.start()
        remove_torn(self.folder, deep=True)
        if self.synthetic:
            self.synthetic.begin(self.loader, self.agent, self.step, self.cfg.progress, self.cfg.total_updates)
        if resumed:
            (self.folder / "result.json").unlink(missing_ok=True)  # it may sum up an evaluation that is made again
        self.tracker = make_tracker(
            self.cfg.tracker, self.folder, self.job.to_dict(), self.folder.name, self.step if resumed else None
        )
        self.writer = self._open_rows(resumed)
        self._describe()
        with self.evaluations, _stopping(self._request_stop), _no_collector():
            try:
                if self.kept_online is None:
                    self._loop()
                if self.online and self.step >= self.cfg.updates and not self.stop:
                    self._fine_tune(self.online)
            finally:
                if self.online:
                    self.online.close()
                self.tracker.close()
                self.writer.close()
        return self._finish()

    def _open_rows(self, resumed: bool) -> results.RunWriter:
        """Continue the rows at the checkpoint; an evaluation that comes behind its checkpoint is repeated, as the last one."""
        last = self.cfg.total_updates if self.kept_online else self.cfg.updates
        played = self.cfg.eval.final_episodes if self.step >= last else self.cfg.eval.episodes if self.unplayed else 0
        again = range(self.cfg.eval.seed, self.cfg.eval.seed + played)
        return results.RunWriter(self.folder, self._row_metadata(), self.step if resumed else -1, again)

    def _loop(self) -> None:
        cfg = self.cfg
        with Bar(cfg.progress, "/".join(self.folder.parts[-3:-1]), self.step, cfg.updates) as bar:
            self.bar = bar
            if self.unplayed:
                self._evaluate()
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
                self.evaluations.collect()
                if self.evaluations.is_due(self.step):
                    paused = time.perf_counter()
                    self._evaluate()
                    mark += time.perf_counter() - paused
                if self.sampler.refresh_every and self.step % self.sampler.refresh_every == 0:
                    paused = time.perf_counter()
                    self.sampler.refresh()
                    mark += time.perf_counter() - paused
                if self.synthetic and self.synthetic.due(self.step) and self.step < cfg.updates:
                    paused = time.perf_counter()
                    bar.note("generating")
                    self.synthetic.refresh(self.agent, self.step)
                    self.engine.invalidate()
                    mark += time.perf_counter() - paused
                if self.step % cfg.checkpoint_every == 0 and self.step < cfg.updates:
                    paused = time.perf_counter()
                    self._save()
                    mark += time.perf_counter() - paused
            self._save()
            if self.step >= cfg.updates:
                self._evaluate(last=True)

    def _fine_tune(self, phase: OnlinePhase) -> None:
        """The online phase: bursts of environment steps, each followed by the updates that it is due."""
        cfg, kept = self.cfg, self.kept_online
        self.agent = phase.begin(self.agent, kept)
        launch = min(cfg.updates_per_launch, cfg.online.burst * cfg.online.updates_per_step)
        self.engine = make_engine(cfg.engine, self.agent, phase.loader, cfg.precision, launch)
        self.metrics = {name: torch.tensor(lanes) for name, lanes in (kept.metrics if kept else {}).items()}
        rows = results.OnlineRows(self.folder, self.seeds, self.store.info.normalized, phase.step)
        title = "/".join(self.folder.parts[-3:-1])
        with rows, Bar(cfg.progress, title, phase.step, cfg.online.steps, "environment steps") as bar:
            self.bar = bar
            since, mark = self.step, time.perf_counter()
            while phase.step < cfg.online.steps and not self.stop:
                made, step = phase.step, self.step
                if updates := self._collect(phase):
                    self.metrics |= self.engine.run(self.step, updates)
                    self.step += updates
                rows.add(phase.ended)
                ends = phase.step >= cfg.online.steps
                if ends or self.step // cfg.log_every > step // cfg.log_every:
                    values = {name: value.tolist() for name, value in self.metrics.items()}
                    self._log(values, (self.step - since) / (time.perf_counter() - mark))
                    since, mark = self.step, time.perf_counter()
                bar.update(phase.step)
                paused = time.perf_counter()
                if phase.crossed(made, cfg.online.eval_every) and self.step > cfg.updates and not ends:
                    self._evaluate()
                if self.step // cfg.checkpoint_every > step // cfg.checkpoint_every and not ends:
                    rows.flush()
                    self._save()
                mark += time.perf_counter() - paused
            rows.flush()
            self._save()
            if phase.step >= cfg.online.steps:
                self._evaluate(last=True)

    def _collect(self, phase: OnlinePhase) -> int:
        """Environment steps; where an environment fails, the run is saved as it was before them."""
        try:
            return phase.collect()
        except EnvironmentFailure as failure:
            self._save()
            raise OffrlError(
                f"{self.folder}: the environment failed at step {phase.step} of the online phase ({failure}); everything up to "
                f"there is saved, and goes on with: offrl train resume={self.folder}"
            ) from failure

    def _next_burst(self, wanted: int) -> int:
        """About `wanted` updates, but none past the next event, and whole periods where that is possible.

        So the metrics at hand when a burst ends depend on the update's number, and neither on how fast the machine is
        nor on where the run was resumed.
        """
        period, until = self.agent.period, self._to_next_event()
        if inside := self.step % period:
            return min(until, period - inside)
        return in_one_stage(self.agent, self.step, min(until, max(wanted, period)) // period * period or until)

    def _to_next_event(self) -> int:
        """Updates until something happens besides training."""
        cadences = [self.cfg.log_every, self.cfg.checkpoint_every, self.cfg.eval.every or self.cfg.updates]
        cadences.append(self.sampler.refresh_every or self.cfg.updates)
        cadences.append((self.synthetic and self.synthetic.every) or self.cfg.updates)
        return min(self.cfg.updates - self.step, *(c - self.step % c for c in cadences))

    def _evaluate(self, last: bool = False) -> None:
        self.bar.note("evaluating")
        (self.evaluations.play_last if last else self.evaluations.play)(self.agent, self.step)

    def _keep_evaluation(self, step: int, played: Episodes, agent: Agent[Any]) -> None:
        self.writer.episodes(step, self.seeds, played.returns, played.lengths, played.normalized, played.seeds)
        name, values = ("score", played.normalized) if played.normalized is not None else ("return", played.returns)
        self.tracker.log(step, by_lane("eval", {name: values.mean(1).tolist()}, self.seeds))
        self.bar.say(self.online.step if self.online and self.online.begun else step, f"{name} {values.mean():.1f}")
        self.hooks.evaluated(Evaluation(step, played.returns, played.lengths, played.normalized, agent))

    def _log(self, values: dict[str, list[float]], rate: float) -> None:
        self.writer.metrics(self.step, self.seeds, values, updates_per_second=rate)
        self._check_finite({name: bool(np.isfinite(lanes).all()) for name, lanes in values.items()})
        self.tracker.log(self.step, by_lane("train", values, self.seeds) | {"train/updates_per_second": rate})

    def _check_finite(self, finite: Mapping[str, bool]) -> None:
        if broken := [name for name, good in finite.items() if not good]:
            raise OffrlError(
                f"{self.folder}: {broken[0]} is no longer finite at update {self.step}; lower the learning rates or look "
                "at the data. The last checkpoint is kept."
            )

    # ---- saving and restoring ---------------------------------------------------------------------------------

    def _save(self) -> None:
        if broken := checkpoint.first_not_finite(self.agent.state_dict()):
            self._check_finite({broken: False})
        self.evaluations.collect(wait=self.evaluations.under_way != self.step)
        self.writer.flush()
        metadata = {
            "step": self.step,
            "fingerprint": self.store.fingerprint,
            "config": self.job.to_dict(),
            "spec": _spec_to(self.spec),
            "info": asdict(self.store.info),
            "unplayed": self.evaluations.under_way is not None,
        }
        learnt = self.sampler.tensors()
        if self.online and self.online.begun:
            metadata["online"] = self.online.record(self.metrics)
            self.online.files.save(self.online.replay)
        if self.synthetic:
            self.synthetic.save()
        if self.cfg.keep_checkpoints:  # first: a kill between the two then repeats these updates, and loses no copy
            checkpoint.save(self.folder / "checkpoints" / f"{self.step:08d}.safetensors", self.agent, metadata, learnt)
        checkpoint.save(self.folder / checkpoint.NAME, self.agent, metadata, learnt)
        if self.synthetic:
            self.synthetic.sweep()
        self.hooks.saved(self.step, self.folder / checkpoint.NAME)

    def _restore(self, folder: Path) -> bool:
        """Take up a folder's last checkpoint; False when there is none, or the run is to start over.

        Raises:
            OffrlError: the checkpoint is damaged, or of other data or another agent; nothing has been written then.
        """
        path = folder / checkpoint.NAME
        if self.cfg.fresh or not path.exists():
            return False
        tensors, kept = checkpoint.load(path, RunRecord)
        check_data(folder, kept, self.store.fingerprint, self.spec, self.cfg.dataset)
        learnt = checkpoint.of_sampler(tensors)
        checkpoint.check_fits(self.sampler.tensors(), learnt, path, "sampler")
        restore_agent(self.agent, tensors, path)
        if learnt:
            self.sampler.restore(learnt)
        self.step, self.kept_online = kept.step, kept.online
        self.unplayed = kept.unplayed and self.evaluations.is_due(self.step)
        return True

    def _clear(self) -> None:
        """Remove what an earlier run left: a kill before the first checkpoint must not bring it back."""
        if self.cfg.fresh:
            for old in (self.folder / checkpoint.NAME, *(self.folder / "checkpoints").glob("*.safetensors")):
                old.unlink(missing_ok=True)
        if self.synthetic:
            self.synthetic.clear()
        if self.online:
            self.online.files.clear()
        (self.folder / "result.json").unlink(missing_ok=True)

    def _describe(self) -> None:
        """Everything that a reader of the numbers may ask for later, beside them."""
        manifest = {
            "run_id": self.folder.name,
            "method": self.job.method,
            "sampler": {**self.sampler.metadata(), "positive_sided_variance": self.spread},
            **({"augment": self.synthetic.augmentation.metadata()} if self.synthetic else {}),
            **self.job.facts(),
            "fingerprint": self.store.fingerprint,
            "files": self.files,  # where the data lay, for commands from other folders
            "dataset_info": asdict(self.store.info),
            "transitions": len(self.store),
            "episodes": self.store.episodes,
            "environment": environment(),
            "device": str(self.device),
            "engine": noted_engine(self.engine, self.folder / "manifest.json"),
            "critic": any(isinstance(module, Critics) for module in self.agent.modules()),
            "parameters_per_lane": sum(p.numel() for p in self.agent.parameters() if p.requires_grad)
            // len(self.seeds),
        }
        write_json(self.folder / "config.json", self.job.to_dict())
        write_json(self.folder / "manifest.json", manifest)

    def _row_metadata(self) -> dict[str, Any]:
        info, lanes = self.store.info, lane_infos(self.store.info, len(self.seeds))
        return {
            "run_id": self.folder.name,
            "method": self.job.to_dict()["method"],
            "dataset": title(info),
            "env_id": info.env_id,
            "by_lane": [{"dataset": title(lane), "env_id": lane.env_id} for lane in lanes],
            "updates": self.cfg.total_updates,
        }

    def _finish(self) -> Result:
        last = self.evaluations.last
        returns, scores = ([], None) if last is None else last.lane_means()
        done, success = self.step >= self.cfg.total_updates, self.store.info.scored_by_success
        if done:
            returns, scores = lane_means(self.folder, self.step, len(self.seeds)) or (returns, scores)
            if not all((self.folder / name).is_file() for name in ("config.json", "manifest.json")):
                self._describe()  # somebody removed them
            record = {"step": self.step, "returns": returns, "scores": scores, "success": success}
            write_json(self.folder / "result.json", record)
        status = "finished" if done else "interrupted"
        return Result(self.folder, self.step, returns, scores, status, success)

    def _request_stop(self) -> None:
        self.stop = True
