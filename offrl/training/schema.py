"""From a composed Hydra configuration to plain dataclasses, checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class DataConfig:
    semantics: Literal["exact", "d4rl"] = "exact"  # rows of D4RL files; d4rl: those of its qlearning_dataset
    clip_actions: bool = False  # clip actions that lie outside their bounds instead of refusing the file
    action_bound: float | None = None  # the bounds are +- this; None: what the dataset's family has
    action_low: float | list[float] | None = None  # any other box, one number or one a dimension
    action_high: float | list[float] | None = None  # its upper end
    family: str | None = None  # a renamed copy is read by this family's rules, such as antmaze
    unfinished: bool = False  # accept a file that marks no episode's end, as one episode
    goals: bool = False  # keep a maze's goal in the observation (Minari)
    cache: bool = True  # keep a flat copy that loads in a fraction of a second
    task: int | None = None  # single task of an OGBench set, 0 the default one; None: as the id says
    tasks: list[int] | None = None  # the same with a task for each lane, over one copy of the data
    success_timing: Literal["pre", "post"] = "pre"  # OGBench's environment looks for success before a step or behind it
    size: int | None = None  # transitions of a forge dataset that has to be built; None: its default
    seed: int = 0  # of a forge dataset that has to be built, and of flicker
    mask: str | list[int] | None = None  # dimensions left out of all observations, or velocity
    flicker: float = 0.0  # probability that an observation is lost, which makes it zeros
    reward_scale: float = 1.0  # r <- scale * r + shift
    reward_shift: float = 0.0  # of the same formula
    reward_normalize: bool = False  # first r <- 1000 r / (largest - smallest episode return), as IQL does


@dataclass
class EvalConfig:
    every: int = 5000  # updates between evaluations; 0: only at the end
    episodes: int = 10  # per lane, at each of them
    final_episodes: int = 100  # per lane, after the last update
    seed: int = 1_000_000  # environment seed of the first episode, apart from training's seeds
    workers: int | None = None  # processes that step environments; None: one per usable core
    slots: int | None = None  # environments at once; None: 100, or 1000 where one call steps them all
    asynchronous: bool = False  # evaluate in a process of its own while training goes on; the last one follows in turn
    env: str | None = None  # environment to evaluate in, ID or MODULE:ID; None: the one that the dataset names
    env_kwargs: dict[str, Any] | None = None  # its arguments, eval.env_kwargs.KEY=VALUE
    max_episode_steps: int | None = None  # time limit of an episode; None: the environment's own, or the dataset's
    ref_min: float | None = None  # return that scores 0; None: what the dataset says
    ref_max: float | None = None  # return that scores 100


@dataclass
class OnlineConfig:
    steps: int = 0  # environment steps of every lane after the offline updates; 0: none
    updates_per_step: int = 1  # updates that follow each environment step (the update-to-data ratio)
    burst: int = 1  # environment steps in a row under one policy, before the updates that they are due
    offline_share: float | None = 0.5  # dataset's share of every batch; 0: online rows alone; null: the union of both
    random_steps: int = 0  # first environment steps, with uniform actions and without updates
    noise: float | None = (
        None  # std of a deterministic policy's exploration noise, in units of half the box; null: the agent's
    )
    recompute_every: int = 0  # environment steps between recomputations of observation statistics; 0: frozen
    reset_optimizers: bool = False  # start the online phase with fresh moments of Adam
    eval_every: int = 5000  # environment steps between evaluations; 0: only at both ends
    agent: dict[str, Any] = field(default_factory=dict)  # settings of the agent that change at the switch
    anneal: dict[str, float] = field(
        default_factory=dict
    )  # weights of the agent that change linearly: their factor at the end


TABLED = ("batch_size",)  # options of training, besides those of `data`, that a method's table may set for a dataset


@dataclass
class TrainConfig:
    dataset: str = ""  # an id, a file or a folder; `offrl data list` names the known ones
    seed: int = 0  # lane l has seed + l
    lanes: int = 1  # seeds that train side by side
    seeds: list[int] | None = None  # the lanes' seeds, when they are not seed, seed + 1, ...
    updates: int = 1_000_000  # gradient steps of every lane
    batch_size: int = 256  # rows per lane and update
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    engine: Literal["auto", "eager", "taped", "native", "compile", "cudagraph"] = (
        "auto"  # auto, eager, taped, native, compile, cudagraph
    )
    updates_per_launch: int = 16  # updates in one captured graph
    precision: Literal["float32", "bfloat16"] = "float32"  # of matrix products: float32 or bfloat16
    threads: int = 1  # of this process
    log_every: int = 1000  # updates between rows of metrics
    checkpoint_every: int = 10_000  # updates between checkpoints
    keep_checkpoints: bool = False  # keep each one under checkpoints/ for later selection
    out: str = "runs"  # folder of all runs
    name: str | None = None  # folder of this run below `out`; None: method, dataset and settings make it
    label: str | None = None  # the method's name in reports
    fresh: bool = False  # start over where a run of the same settings stands
    progress: bool = True  # a bar with rate and time left, or a line now and then where nobody watches
    tracker: str | list[str] | None = None  # tensorboard, wandb, or [tensorboard,wandb]
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)

    @property
    def total_updates(self) -> int:
        """Gradient steps of every lane, those of an online phase included."""
        return self.updates + self.updates_after(self.online.steps)

    def updates_after(self, steps: int) -> int:
        """Gradient steps that belong to the first `steps` environment steps of the online phase."""
        return self.online.updates_per_step * max(0, steps - self.online.random_steps)

    def lane_seeds(self) -> list[int]:
        return list(self.seeds) if self.seeds else [self.seed + lane for lane in range(self.lanes)]
