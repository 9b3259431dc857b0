"""`offrl augment train|sample|metrics`: fit a model of trajectories, write samples, measure them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from offrl.agents.base import Agent
from offrl.augment import metrics
from offrl.augment.base import make_augmentation
from offrl.data.dataset import OfflineDataset
from offrl.data.writers import writer
from offrl.results import style
from offrl.results.tables import Table
from offrl.training.compose import compose_words
from offrl.training.run_config import RunConfig, resolve_config
from offrl.training.runs import as_recorded, load_agent, read_config, read_data
from offrl.training.scoring import with_task_of
from offrl.utils.errors import OffrlError
from offrl.utils.paths import replacing, write_json
from offrl.utils.process import pick_device, tune_process

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WORDS = "options as for `offrl train`: dataset=ID, augment=NAME, augment.KEY=VALUE, data.KEY=VALUE"
COLUMNS = {  # measure: heading in the table
    "dynamics_error": "dynamics error",
    "dynamics_error_median": "median",
    "reward_error": "reward error",
    "termination_agrees": "flags agree",
    "log_likelihood_policy": "log pi(a|s)",
    "log_likelihood_behaviour": "log behaviour",
    "coverage": "coverage",
    "novelty": "novelty",
    "terminated": "terminated",
    "return_per_transition": "reward",
}


def add_parser(subparsers: Any) -> None:
    """Add `offrl augment`; the parsed arguments carry `run`, which returns the exit status."""
    parser = subparsers.add_parser("augment", help="synthetic trajectories: fit a model, write samples, measure them")

    def usage(_: argparse.Namespace) -> int:
        parser.print_usage()
        return 2

    parser.set_defaults(run=usage)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    train = commands.add_parser("train", help="train the model of a dataset, unless it is cached")
    train.set_defaults(run=run_train)

    sample = commands.add_parser("sample", help="write synthetic trajectories as a dataset")
    sample.add_argument("dest", type=Path, metavar="DEST", help="file, as for `offrl data convert`")
    sample.add_argument(
        "--policy", type=Path, metavar="RUN", help="run whose policy guides the samples (default: none)"
    )
    sample.add_argument("--seed", type=int, default=0, help="seed of the samples")
    sample.set_defaults(run=run_sample)

    measure = commands.add_parser(
        "metrics", help="dynamics error, likelihood and coverage of synthetic trajectories, beside real ones"
    )
    measure.add_argument("policy", type=Path, metavar="RUN", help="run whose policy guides and is evaluated")
    measure.add_argument(
        "--coefficients", default="0,1", help="guidance coefficients, separated by commas (default %(default)s)"
    )
    measure.add_argument(
        "--transitions", type=int, default=16_384, help="transitions of each kind (default %(default)s)"
    )
    measure.add_argument(
        "--behaviour", type=Path, metavar="RUN", help="run of a second policy for the likelihood, such as one of bc"
    )
    measure.add_argument("--behaviour-std", type=float, default=0.3, help="std of that policy (default %(default)s)")
    measure.add_argument("--no-world-model", action="store_true", help="leave the world model out")
    measure.add_argument("--seed", type=int, default=0, help="seed of the samples")
    measure.add_argument("--out", type=Path, help="folder to write to (default: `augment` in the run's)")
    measure.set_defaults(run=run_metrics)

    for command in (sample, measure):
        command.add_argument("--lane", type=int, default=0, help="lane of the run (default 0)")
    for command, more in ((train, ""), (sample, ""), (measure, "; world_model.KEY=VALUE sets the world model")):
        command.add_argument("--config-dir", metavar="DIR", help="folder of your own configuration, with agent/ in it")
        command.add_argument("words", nargs="*", metavar="KEY=VALUE", help=WORDS + more)


def run_train(arguments: argparse.Namespace) -> int:
    """Train the model of the options, unless it is cached."""
    job = _job(arguments.words, config_dir=arguments.config_dir)
    augmentation = make_augmentation(job.augment, as_recorded(_recorded(job)), (0,))
    augmentation.prepare(progress=True)
    print(json.dumps(augmentation.metadata(), indent=1))
    return 0


def run_sample(arguments: argparse.Namespace) -> int:
    """Write trajectories, guided by a run's policy or unguided, as a dataset."""
    write = writer(arguments.dest)
    job = _job(arguments.words, arguments.policy, arguments.config_dir)
    real = _recorded(job)
    augmentation = make_augmentation(_of_lane(job.augment, arguments.lane), as_recorded(real), (arguments.seed,))
    policy = _policy(arguments.policy, arguments.lane, real) if arguments.policy else None
    augmentation.prepare(progress=True)
    made = augmentation.generate(policy, 1)
    write(made)
    print(f"{arguments.dest}: {made.episodes} trajectories, {len(made)} transitions")
    return 0


def run_metrics(arguments: argparse.Namespace) -> int:
    """Measure real pieces, guided samples at each coefficient, and the world model's rollouts; write table and figure."""
    try:
        coefficients = [float(word) for word in arguments.coefficients.split(",")]
    except ValueError as error:
        raise OffrlError(f"--coefficients {arguments.coefficients} should be numbers separated by commas.") from error
    out = arguments.out or arguments.policy / "augment"
    world_words = [word.removeprefix("world_model.") for word in arguments.words if word.startswith("world_model.")]
    words = [word for word in arguments.words if not word.startswith("world_model.")]
    count = f"augment.transitions={arguments.transitions}"
    job = _job([*words, count], arguments.policy, arguments.config_dir)
    tune_process(job.train.threads)
    real, seeds = _recorded(job), (arguments.seed,)
    augment = _of_lane(job.augment, arguments.lane)
    shape = make_augmentation(augment, real, seeds).cfg
    policies = {"policy": (_policy(arguments.policy, arguments.lane, real), augment.get("policy_std", 1.0))}
    if arguments.behaviour:
        policies["behaviour"] = (_policy(arguments.behaviour, 0, real), arguments.behaviour_std)

    kinds: dict[str, dict[str, Any]] = {}
    for coefficient in coefficients:
        name = f"guided, {coefficient:g}" if coefficient else "unguided"
        kinds[name] = {**augment, "coefficient": coefficient}
    if not arguments.no_world_model:
        settings = [f"augment.{word}" for word in world_words]
        rest = [word for word in words if not word.startswith("augment")]
        named = ["augment=world_model", *rest, *settings, count, f"augment.length={shape.length}"]
        kinds["world model"] = _of_lane(_job(named, arguments.policy, arguments.config_dir).augment, arguments.lane)

    simulator = metrics.Simulator(real.info)
    found = {}
    try:
        pieces = metrics.real_pieces(real, shape.trajectories, shape.length, arguments.seed)
        found["real"] = metrics.evaluate(pieces, real, simulator, policies)
        for name, settings_of in kinds.items():
            augmentation = make_augmentation(settings_of, as_recorded(real), seeds)
            augmentation.prepare(progress=True)
            made = augmentation.generate(policies["policy"][0], 1)
            found[name] = metrics.evaluate(made, real, simulator, policies)
    finally:
        simulator.close()
    metadata = {
        "dataset": real.info.id,
        "policy": str(arguments.policy),
        "lane": arguments.lane,
        "augment": job.augment,
    }
    write_json(out / "metrics.json", {**metadata, "kinds": found})
    text = table(found).markdown()
    with replacing(out / "metrics.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    style.save(draw(found), out / "metrics.png", dpi=160)
    print(f"{text}\n{out / 'metrics.md'}, metrics.json and metrics.png")
    return 0


def _job(words: Sequence[str], run: Path | None = None, config_dir: str | None = None) -> RunConfig:
    """The checked configuration of `key=value` words; a run gives `dataset`, `data` and its task where the words do not."""
    if odd := [word for word in words if "=" not in word or word.startswith("-")]:
        raise OffrlError(f"{odd[0]} is no option; {WORDS}.")
    kept = read_config(run) if run else {}
    given = {word.split("=", 1)[0] for word in words}
    first = [] if "augment" in given else ["augment=policy_guided_diffusion"]
    if kept and "dataset" not in given:
        first.append(f"dataset='{kept['dataset']}'")
    place = ["--config-dir", config_dir] if config_dir else []
    values = compose_words([*place, *first, *words])
    if kept:
        values["data"] = {**kept["data"], **(values.get("data") or {})}
    job = resolve_config(values)
    if not job.augment:
        raise OffrlError("augment=none makes no trajectories; choose another, `offrl train --help` lists them.")
    if run:
        job.train.eval = with_task_of(run, job.train.eval)  # rollouts terminate as in the run's environment
    return job


def _of_lane(augment: dict[str, Any], lane: int) -> dict[str, Any]:
    """An augmentation's settings with the values of one lane where there is a list of them; of one value, that.

    Raises:
        OffrlError: the list has none for this lane.
    """
    lists = {key: value for key, value in augment.items() if isinstance(value, list)}
    for key, value in lists.items():
        if len(value) > 1 and not 0 <= lane < len(value):
            raise OffrlError(
                f"augment.{key}={value} has no value for lane {lane}; give one per lane, or a single number."
            )
    return augment | {key: value[lane if len(value) > 1 else 0] for key, value in lists.items()}


def _recorded(job: RunConfig) -> OfflineDataset:
    """The dataset with rewards as recorded."""
    return read_data(job.train, pick_device(job.train.device))


def _policy(run: Path, lane: int, store: OfflineDataset) -> Agent:
    """The policy of one lane of a run, on the device of the dataset that it is asked about.

    Raises:
        OffrlError: there is no such lane, or the policy is of other observations or actions, or of whole episodes.
    """
    policy = load_agent(run, str(store.device)).lane(lane)
    spec = policy.spec
    theirs, ours = (spec.obs_dim, spec.action_dim, spec.discrete), (store.obs_dim, store.action_dim, False)
    if theirs != ours:
        kind = "choices of action" if spec.discrete else "action numbers"
        raise OffrlError(
            f"{run}: its policy has {spec.obs_dim} observation numbers and {spec.action_dim} {kind}, {store.info.id} has "
            f"{store.obs_dim} and {store.action_dim} action numbers; name a run on this dataset."
        )
    if getattr(policy, "uses_history", False):
        name = type(policy).__name__
        raise OffrlError(
            f"{run}: {name} acts on the episode so far, which synthetic states don't have; name another run."
        )
    return policy


# ---- table and figure ----------------------------------------------------------------------------------------------------


def table(found: dict[str, dict[str, Any]]) -> Table:
    """One row per kind of trajectories."""
    columns = [name for name in COLUMNS if any(name in kind for kind in found.values())]
    rows = [[kind, *(_number(values.get(name)) for name in columns)] for kind, values in found.items()]
    return Table("Trajectories", ["trajectories", *(COLUMNS[name] for name in columns)], rows)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"


def draw(found: dict[str, dict[str, Any]]) -> Figure:
    """Dynamics error and likelihood over timesteps, and one against the other."""
    looks = style.looks_of(list(found))
    with style.sheet(1, 3, (9.3, 2.9)) as (figure, panels):
        errors, likelihoods, both = panels[0]
        handles = []
        for kind, values in found.items():
            colour, line = looks[kind]
            for panel, name in ((errors, "dynamics_error"), (likelihoods, "log_likelihood_policy")):
                curve = np.array(values["curves"][name], dtype=float)
                (handle,) = panel.plot(np.arange(1, len(curve) + 1), curve, color=colour, linestyle=line, linewidth=1.4)
            handles.append(handle)
            point = values["log_likelihood_policy"], values["dynamics_error"]
            both.plot(*point, style.MARKS[line], color=colour, markersize=5)
        error, likelihood = "dynamics error (dataset's variance)", "log-likelihood under the policy"
        errors.set(yscale="log", xlabel="step of the trajectory", ylabel=error)
        likelihoods.set(xlabel="step of the trajectory", ylabel=likelihood)
        both.set(yscale="log", xlabel=likelihood, ylabel=error)
        _clip_rounding(errors, both, found, looks["real"][0])
        for panel in panels[0]:
            style.tidy(panel)
        style.legend_above(figure, handles, list(found), 2)
    return figure


def _clip_rounding(errors: Axes, both: Axes, found: dict[str, dict[str, Any]], colour: str) -> None:
    """End the axes below the synthetic errors; a real error below them (rounding) is a text and an arrow."""
    curves = [values["curves"]["dynamics_error"] for kind, values in found.items() if kind != "real"]
    synthetic = [error for curve in curves for error in curve if error]
    real, bottom = found["real"]["dynamics_error"], min(synthetic, default=0.0) / 3
    if real is None or real >= bottom:
        return
    for panel in (errors, both):
        panel.set_ylim(bottom=bottom)
    errors.annotate(f"real: {real:.0e}", (0.02, 0.03), xycoords="axes fraction", color=colour)
    both.plot(found["real"]["log_likelihood_policy"], bottom, "v", color=colour, markersize=6, clip_on=False)
