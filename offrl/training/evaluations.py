"""A run's evaluations: in turn with training, or beside it (`eval.asynchronous`)."""

from __future__ import annotations

import copy
from collections.abc import Callable

from offrl.agents.base import Agent, Spec
from offrl.data.dataset import DatasetInfo
from offrl.evaluation.beside import EvaluationProcess
from offrl.evaluation.environments import start_method
from offrl.evaluation.evaluator import MOST_WORKERS, Episodes, Evaluator, usable_cores
from offrl.training.schema import TrainConfig


class Evaluations:
    """Plays the evaluations of a run, and hands over each one once; a context manager.

    Beside training at most one evaluation is under way. Its episodes are handed over by the next call of `collect` after
    they have been played: between bursts of updates, before the next evaluation, and before a checkpoint of a later update.
    So a checkpoint lacks at most the evaluation of its own weights, which a resumed run plays again.

    Args:
        keep: takes the update, the episodes, and the agent that played them.

    Attributes:
        under_way: update of the evaluation that is played beside training; None: none is.
        last: episodes of the latest evaluation that was handed over; None: there was none.

    Raises:
        OffrlError: there is no fitting environment.
    """

    def __init__(
        self, cfg: TrainConfig, info: DatasetInfo, spec: Spec, keep: Callable[[int, Episodes, Agent], None]
    ) -> None:
        self.cfg, self.keep = cfg.eval, keep
        self.updates, self.threads = cfg.updates, cfg.threads
        self.evaluator: Evaluator | None = None
        online = cfg.online.steps and cfg.online.eval_every
        if self.cfg.final_episodes or (self.cfg.episodes and (self.cfg.every or online)):
            self.evaluator = Evaluator(info, spec.lanes, self.cfg.workers, self.cfg.slots)
            self.evaluator.check(spec)
            if self.cfg.asynchronous or self.evaluator.workers > 1:
                self.evaluator.given_to(start_method())  # it fails now rather than at the first evaluation
        self.process: EvaluationProcess | None = None
        self.under_way: int | None = None
        self.last: Episodes | None = None

    def __enter__(self) -> Evaluations:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process:
            self.process.close()
        if self.evaluator:
            self.evaluator.close()

    def is_due(self, step: int) -> bool:
        """Whether the policies of update `step` are evaluated before the last one."""
        every = self.cfg.every if self.evaluator and self.cfg.episodes else 0
        return every > 0 and step % every == 0 and 0 < step < self.updates

    def play(self, agent: Agent, step: int) -> None:
        """Evaluate the policies of update `step`, or begin to."""
        if not self.cfg.asynchronous:
            self._in_turn(agent, step, self.cfg.episodes)
            return
        self.collect(wait=True)
        assert self.evaluator is not None
        if self.process is None:
            evaluator = copy.copy(self.evaluator)  # without environments yet
            evaluator.workers = self.cfg.workers or max(1, min(MOST_WORKERS, usable_cores() - self.threads))
            self.process = EvaluationProcess(evaluator, agent)
        self.under_way, self.agent = step, copy.deepcopy(agent)
        self.process.start(agent, step, self.cfg.episodes, self.cfg.seed)

    def play_last(self, agent: Agent, step: int) -> None:
        """Evaluate the policies of the last update."""
        self.collect(wait=True)
        self._in_turn(agent, step, self.cfg.final_episodes)

    def collect(self, wait: bool = False) -> None:
        """Hand over the evaluation under way, if it is done; or wait for it.

        Raises:
            OffrlError: it failed.
        """
        if self.under_way is None or self.process is None or not (wait or self.process.is_done()):
            return
        step, self.under_way = self.under_way, None
        self._hand_over(step, self.process.result(), self.agent)

    def _in_turn(self, agent: Agent, step: int, episodes: int) -> None:
        if self.evaluator is None or episodes < 1:
            return
        # A policy that samples its actions draws them by this number, also right after a restart without another update.
        agent.random.step.fill_(step)
        self._hand_over(step, self.evaluator.run(agent, episodes, self.cfg.seed), agent)

    def _hand_over(self, step: int, played: Episodes, agent: Agent) -> None:
        self.last = played
        self.keep(step, played, agent)
