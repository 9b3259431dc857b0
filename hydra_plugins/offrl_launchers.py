"""Hydra launchers that run the jobs of a sweep side by side: `local` on this machine, `ray` where Ray schedules them.

Hydra takes launchers only from the namespace package `hydra_plugins`. It imports this module in every Hydra application of the
environment, so nothing heavy is imported at the top; `offrl.training.launchers` makes the launchers selectable in ours.

Hydra composes each job's configuration (its own `run_job`) in the sweep's process, since it keeps the current job in global
state. What remains, `offrl.training.sweep.run_job`, waits for a training process: a thread is enough for that.
"""

import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core import utils
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


class Job(NamedTuple):
    """Arguments of `offrl.training.sweep.run_job`."""

    values: dict[str, Any]  # the composed configuration
    note: Path  # file in which the job tells how it stands
    env: dict[str, str]  # environment of its training process: import path, and what `hydra.job.env_set` asks for


class SweepLauncher(Launcher):
    """Composes the jobs; a subclass runs them."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run every job, whatever becomes of the others.

        Raises:
            KeyboardInterrupt: a job was stopped, which ends the sweep.
        """
        from offrl.training.sweep import Sweep

        assert Sweep.current is not None, "these launchers are for `offrl train -m`"
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        self.sweep = Sweep.current
        self.returns: dict[int, JobReturn] = {}
        if 130 in self.run(dict(enumerate(job_overrides, initial_job_idx))):
            raise KeyboardInterrupt
        return [self.returns[number] for number in sorted(self.returns)]

    def run(self, jobs: Mapping[int, Sequence[str]]) -> list[int]:
        """Compose and run the jobs, given by their numbers and overrides; their exit statuses."""
        raise NotImplementedError

    def compose(self, number: int, overrides: Sequence[str]) -> Job | None:
        """A job's configuration, not thread-safe; None when it can't be composed, which is a failed job."""
        from offrl.training.compose import plain
        from offrl.training.sweep import fail, import_path

        def configured(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, str]]:
            env = HydraConfig.get().job.env_set.items()
            return plain(cfg), {"PYTHONPATH": import_path(), **{str(key): str(value) for key, value in env}}

        note = self.sweep.notes / f"{number}.json"
        self.returns[number] = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)  # how it ended is in its note
        try:
            config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = f"{config.hydra.job.name}_{number}"
                config.hydra.job.num = number
            result = utils.run_job(
                hydra_context=self.context,
                task_function=configured,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
            values, env = result.return_value
        except Exception as error:
            fail(note, None, " ".join(str(error).split()))
            return None
        return Job(values, note, env)


class LocalLauncher(SweepLauncher):
    """Some jobs at once on this machine, each waited for by a thread.

    Nothing outlives a sweep that is killed: the threads end with it, and a training process saves and stops
    when its thread ends (`offrl.training.child.stop_with`).
    """

    def __init__(self, n_jobs: int) -> None:
        self.n_jobs = n_jobs

    def run(self, jobs: Mapping[int, Sequence[str]]) -> list[int]:
        waiting = deque(jobs.items())
        statuses: list[int] = []
        lock = threading.Lock()  # Hydra keeps the current job in global state

        def work() -> None:
            from offrl.training.sweep import run_job

            while True:
                with lock:
                    if not waiting or 130 in statuses:
                        return
                    job = self.compose(*waiting.popleft())
                statuses.append(run_job(*job) if job else 1)

        # Threads of a pool would keep a sweep that is interrupted twice from ending.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(self.at_once(len(jobs)))]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        finally:
            waiting.clear()  # no job begins after an interrupt
        return statuses

    def at_once(self, jobs: int) -> int:
        """Jobs that run at the same time."""
        from offrl.evaluation.evaluator import usable_cores

        count = self.n_jobs if self.n_jobs >= 0 else usable_cores() + 1 + self.n_jobs
        return max(1, min(count, jobs))


class RayLauncher(SweepLauncher):
    """As many jobs at once as Ray finds room for."""

    def __init__(self, ray: DictConfig) -> None:
        self.options: Any = OmegaConf.to_container(ray, resolve=True)

    def run(self, jobs: Mapping[int, Sequence[str]]) -> list[int]:
        try:
            import ray
        except ImportError as error:
            raise CompactHydraException("hydra/launcher=ray needs Ray: pip install 'offrl[ray]'.") from error
        from offrl.training.sweep import STOP, fail, run_job

        ray.init(**self.init_options())
        try:
            remote = ray.remote(run_job).options(**self.options["remote"])
            composed = [job for number, overrides in jobs.items() if (job := self.compose(number, overrides))]
            notes = {remote.remote(*job): job.note for job in composed}
            statuses: list[int] = []
            while notes:
                (ended,), _ = ray.wait(list(notes))
                note = notes.pop(ended)
                try:
                    statuses.append(ray.get(ended))
                except ray.exceptions.RayError as error:  # its worker or its machine is gone
                    fail(note, None, " ".join(str(error).split()))
                if 130 in statuses:
                    (self.sweep.notes / STOP).touch()
        finally:
            ray.shutdown()
        return statuses

    def init_options(self) -> dict[str, Any]:
        """Arguments of `ray.init`; a Ray started here gets no dashboard and Ray's smallest object store: jobs share files."""
        given: dict[str, Any] = self.options["init"]
        if given.get("address") or os.environ.get("RAY_ADDRESS"):
            return given
        return {"include_dashboard": False, "object_store_memory": 75 << 20, **given}
