"""Hydra sweeper `hydra/sweeper=optuna`: Optuna proposes the settings of the next runs from the scores of those before.

Written on Optuna's own interface (`Study.ask` and `tell`), since the plugin hydra-optuna-sweeper pins Optuna below 3. As in
offrl_launchers.py nothing heavy is imported at the top; `offrl.training.launchers` makes the sweeper selectable.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.errors import CompactHydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

JOURNAL = "optuna.log"  # the study, in the sweep's folder; Optuna's journal, which its dashboard reads, too


class OptunaSweeper(Sweeper):
    """Asks Optuna for settings, launches runs, and tells it what they scored."""

    def __init__(
        self,
        n_trials: int,
        n_jobs: int,
        objective: str,
        fqe_updates: int,
        seed: int,
        study: str,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        if objective not in ("score", "fqe"):
            raise CompactHydraException(f"hydra.sweeper.objective={objective} should be score or fqe.")
        if n_trials < 1 or n_jobs < 1:
            raise CompactHydraException("hydra.sweeper.n_trials and n_jobs should be at least 1.")
        self.n_trials, self.n_jobs, self.objective, self.fqe_updates = n_trials, n_jobs, objective, fqe_updates
        self.seed, self.name, self.params = seed, study, dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context: Any = hydra_context
        self.config: Any = config
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until the study has as many as are wanted; failed ones count, so that it ends."""
        study = self.study()
        parser = OverridesParser.create(config_loader=self.context.config_loader)
        words = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        overrides = {override.get_key_element(): override for override in parser.parse_overrides(words)}
        space = {key: _distribution(override) for key, override in overrides.items() if override.is_sweep_override()}
        if not space:
            raise CompactHydraException(
                "hydra/sweeper=optuna needs something to vary, such as 'agent.alpha=interval(1,5)', 'lanes=choice(1,2)'."
            )
        fixed = [
            f"{key}={override.get_value_element_as_str()}" for key, override in overrides.items() if key not in space
        ]
        done = self.finished(study)
        first = 0
        while done < self.n_trials:
            trials = [study.ask(space) for _ in range(min(self.n_jobs, self.n_trials - done))]
            jobs = [[*fixed, *_words(trial.params, overrides)] for trial in trials]
            for trial, value in zip(trials, self.launch(jobs, first), strict=True):
                state = "COMPLETE" if value is not None else "FAIL"
                study.tell(trial, value, state=self.optuna.trial.TrialState[state])
            done, first = done + len(trials), first + len(trials)
        self.show_best(study)

    def study(self) -> Any:
        """The study in the sweep's folder; trials that a killed sweep left open are tried again."""
        try:
            import optuna
        except ImportError as error:
            raise CompactHydraException("hydra/sweeper=optuna needs Optuna: pip install 'offrl[optuna]'.") from error
        from offrl.utils.paths import replacing

        self.optuna: Any = optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        assert self.config is not None
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "multirun.yaml") as temporary:
            OmegaConf.save(self.config, temporary)
        if (folder / JOURNAL).exists() and not (folder / JOURNAL).is_file():
            raise CompactHydraException(f"{folder / JOURNAL} is no regular file; remove it.")
        try:
            backend = self.optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL))
            study = optuna.create_study(
                storage=optuna.storages.JournalStorage(backend),
                study_name=self.name,
                direction="maximize",
                load_if_exists=True,
            )
        except Exception as error:  # whatever Optuna's reader of a damaged journal raises
            raise CompactHydraException(
                f"{folder / JOURNAL}: the study can't be read ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
                "remove the file, or choose another folder with out=DIR."
            ) from error
        study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(study.trials), constant_liar=self.n_jobs > 1)
        for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params)
        return study

    def finished(self, study: Any) -> int:
        return len(study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.COMPLETE,)))

    def launch(self, jobs: Sequence[Sequence[str]], first: int) -> list[float | None]:
        """Run jobs; what is maximised of each, None where it failed.

        Raises:
            KeyboardInterrupt: a job was stopped, which ends the sweep.
        """
        from offrl.training.objective import value_of_run
        from offrl.training.sweep import Sweep

        sweep = Sweep.current
        assert self.launcher is not None
        assert sweep is not None, "this sweeper is for `offrl train -m`"
        sweep.add(jobs)
        self.launcher.launch(jobs, initial_job_idx=first)
        ended = sweep.look(range(first, first + len(jobs)))
        if any(job.state == "stopped" for job in ended):
            raise KeyboardInterrupt
        return [
            value_of_run(job.folder, self.objective, self.fqe_updates) if job.state == "finished" else None
            for job in ended
        ]

    def show_best(self, study: Any) -> None:
        complete = self.finished(study)
        if complete:
            best = study.best_trial
            settings = " ".join(f"{key.lstrip('+')}={value}" for key, value in best.params.items())
            print(f"best of {complete} trials: {self.objective} {best.value:.4g} with {settings}")


def _distribution(override: Override) -> Any:
    """Optuna's distribution of a swept word."""
    from optuna import distributions

    sweep = override.value()
    if not isinstance(sweep, IntervalSweep):  # a list, choice(...) or range(...): each value as the word has it
        return distributions.CategoricalDistribution([str(text) for text in override.sweep_string_iterator()])
    low, high, log = sweep.start, sweep.end, "log" in sweep.tags
    if isinstance(low, int) and isinstance(high, int) and "float" not in sweep.tags:
        return distributions.IntDistribution(low, high, log=log)
    assert low is not None
    assert high is not None
    return distributions.FloatDistribution(float(low), float(high), log=log)


def _words(params: Mapping[str, Any], overrides: Mapping[str, Override]) -> list[str]:
    """A trial's settings as words."""
    return [f"{key}={value}" for key, value in params.items() if key in overrides]
