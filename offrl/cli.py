"""The command `offrl`."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import offrl
from offrl.errors import OffrlError
from offrl.paths import conf_dir

USAGE = """\
offrl train [key=value ...]      train and score a policy; -m sweeps comma-separated values (Hydra's multirun)
offrl train resume=RUN           go on with a run that was stopped
offrl evaluate RUN               play episodes with a run's policy
offrl data list|info|build|fetch|convert
offrl status RUNS...             how far runs are, and what failed
offrl augment train|sample|metrics   synthetic trajectories: their model, a file of them, what they are worth
offrl report RUNS...             tables and curves of runs
offrl select RUNS...             rank policies without the environment
offrl probe RUN...               promised against obtained return, and luck in what a policy is told
offrl agents [NAME]              the methods and their settings
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status is 2 for bad input, 130 when stopped from the keyboard."""
    words = sys.argv[1:] if argv is None else argv
    try:
        if words[:1] == ["train"]:
            return _train(words[1:])
        arguments = _parse(words)
        status: int = arguments.run(arguments)
        return status
    except OffrlError as error:
        print(f"offrl: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        sys.stderr.close()
        return 0


def _parse(words: list[str]) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(words)
    if rest and not hasattr(arguments, "words"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # key=value words, which may stand behind options
        arguments.words = [*arguments.words, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    from offrl import report, select, status
    from offrl.augment import commands as augment
    from offrl.data import commands

    parser = argparse.ArgumentParser("offrl", usage=USAGE, description=offrl.__doc__)
    parser.add_argument("--version", action="version", version=f"offrl {offrl.__version__}")

    def usage(_: argparse.Namespace) -> int:
        parser.print_usage()
        return 2

    parser.set_defaults(run=usage)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", prog="offrl")
    subparsers.add_parser("train", help="train and score a policy")  # handled above: Hydra reads its words
    evaluate = subparsers.add_parser("evaluate", help="play episodes with a run's policy")
    evaluate.add_argument("run_folder", metavar="RUN", type=Path, help="folder of a run, or a checkpoint")
    evaluate.add_argument("--episodes", type=int, default=10, help="per lane (default 10)")
    evaluate.add_argument("--seed", type=int, default=1_000_000, help="environment seed of the first episode")
    evaluate.add_argument("--workers", type=int, help="processes that step environments (default: one per core)")
    evaluate.add_argument("--json", action="store_true", help="print JSON with every episode")
    evaluate.set_defaults(run=_evaluate)
    probe = subparsers.add_parser("probe", help="promised against obtained return, and luck in what a policy is told")
    probe.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run")
    probe.add_argument("--episodes", type=int, default=100, help="per lane (default 100; 0: play none)")
    probe.add_argument("--updates", type=int, default=1000, help="of the probing networks (default 1000; 0: no leak)")
    probe.add_argument("--sampled", action="store_true", help="draw discrete actions instead of taking the likeliest")
    probe.add_argument("--plot", type=Path, metavar="FILE", help="obtained against promised returns as PNG")
    probe.add_argument("--json", action="store_true", help="print JSON with every lane")
    probe.set_defaults(run=_probe)
    agents = subparsers.add_parser("agents", help="the methods and their settings")
    agents.add_argument("name", nargs="?")
    agents.set_defaults(run=_agents)
    commands.add_parser(subparsers)
    status.add_parser(subparsers)
    augment.add_parser(subparsers)
    report.add_parser(subparsers)
    select.add_parser(subparsers)
    return parser


# ---- train ---------------------------------------------------------------------------------------------------


def _train(words: list[str]) -> int:
    from offrl.compose import tolerant
    from offrl.train import resume

    if any(word in ("-h", "--help") for word in words):
        print(_train_help())
        return 0
    folder = next((w.split("=", 1)[1] for w in words if w.startswith("resume=")), None)
    if folder is not None:
        if odd := [w for w in words if not re.match(r"[a-z]", w) or "=" not in w]:
            raise OffrlError(f"{odd[0]} can't stand beside resume=RUN; only key=value can.")
        changes = dict(w.split("=", 1) for w in words if not w.startswith("resume="))
        return show(resume(folder, {key: _value(text) for key, text in changes.items()}))
    if any(re.match(r"experiment=.*[,(]", word) for word in words):
        raise OffrlError("experiment= takes one recipe: each brings a sweep of its own, so give each its own command.")
    return _hydra(tolerant(words))


def _hydra(words: list[str]) -> int:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig

    from offrl.compose import plain, register
    from offrl.sweep import Sweep, import_path, run_job
    from offrl.train import train

    status, notes, env = 0, "", {"PYTHONPATH": import_path()}
    register()

    @hydra.main(config_path=str(conf_dir()), config_name="train", version_base="1.3")
    def task(cfg: DictConfig) -> None:
        """A single run, or a job of a sweep; of that a launcher sends a copy of this function to its processes."""
        nonlocal status
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            if run_job(plain(cfg), Path(notes) / f"{HydraConfig.get().job.num}.json", env) == 130:
                raise KeyboardInterrupt  # no further job
            return
        try:
            status = show(train(plain(cfg)))
        except OffrlError as error:
            print(f"offrl: error: {error}", file=sys.stderr)
            status = 2

    def begun(folder: Path) -> None:
        nonlocal notes
        notes = str(folder)

    before, sys.argv = sys.argv, ["offrl train", *words]
    sweep = Sweep(begun)
    try:
        with sweep:
            task()
    finally:
        sys.argv = before
        for line in sweep.summary():
            print(line, file=sys.stderr)
    return sweep.status() or status


def show(result: Any) -> int:
    """Print a run's result; 0, or 130 when it was interrupted."""
    from offrl.train import summary

    print(summary(result))
    return 130 if result.status == "interrupted" else 0


def _train_help() -> str:
    from offrl.config import DataConfig, EvalConfig, TrainConfig

    lines = ["offrl train [key=value ...] [-m] [--config-dir DIR] [--cfg job]", "", "Options:"]
    rows = [
        (f"{prefix}{name}={default}", comment)
        for prefix, cls in (("", TrainConfig), ("data.", DataConfig), ("eval.", EvalConfig))
        for name, default, comment in field_comments(cls)
    ]
    rows.append(("agent.KEY=VALUE", "a setting of the method; a list gives one value per lane (offrl agents NAME)"))
    rows.append(("sampler.KEY=VALUE", "a setting of the sampler; the same (docs/trajectory_weighting.md)"))
    rows.append(("augment.KEY=VALUE", "a setting of the augmentation (docs/policy_guided_diffusion.md)"))
    lines += [f"  {option:30} {comment}".rstrip() for option, comment in rows] + [""]
    for group in sorted(p for p in conf_dir().iterdir() if p.is_dir()):
        names = sorted(str(f.relative_to(group).with_suffix("")) for f in group.rglob("*.yaml"))
        if names:
            lines.append(f"{group.name}=  {', '.join(names)}")
    return "\n".join(lines)


def field_comments(cls: type[Any]) -> list[tuple[str, str, str]]:
    """(name, default, comment) of a dataclass's plain fields, the comment being the one behind the field."""
    rows = []
    names = {f.name for f in fields(cls)}
    for line in inspect.getsource(cls).splitlines():
        match = re.match(r"\s+(\w+): [^=]+ = (.*?)(?:  # (.*))?$", line)
        if match and match[1] in names and not match[2].startswith("field("):
            rows.append((match[1], match[2].strip("\"'"), match[3] or ""))
    return rows


def _value(text: str) -> Any:
    """What Hydra reads behind `key=`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException as error:
        raise OffrlError(f"{text} can't be read as a value: {error}") from error


# ---- evaluate, agents ----------------------------------------------------------------------------------------


def _evaluate(arguments: argparse.Namespace) -> int:
    from offrl.evaluate import Evaluator
    from offrl.train import dataset_info, load_agent, tune_process

    if arguments.episodes < 1:
        raise OffrlError(f"--episodes {arguments.episodes} should be at least 1.")
    tune_process(1)
    agent, info = load_agent(arguments.run_folder), dataset_info(arguments.run_folder)
    with Evaluator(info, agent.spec.lanes, arguments.workers) as evaluator:
        played = evaluator.run(agent, arguments.episodes, arguments.seed)
    scores = played.returns if played.normalized is None else played.normalized
    if arguments.json:
        print(
            json.dumps(
                {
                    "dataset": info.id,
                    "env_id": info.env_id,
                    "lane_seeds": list(agent.spec.seeds),
                    "episode_seeds": played.seeds,
                    "returns": played.returns.tolist(),
                    "lengths": played.lengths.tolist(),
                    "normalized": None if played.normalized is None else played.normalized.tolist(),
                }
            )
        )
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{arguments.run_folder} on {info.env_id}, {arguments.episodes} episodes a lane")
    for heading in (
        "lane seed",
        "score" if played.normalized is not None else "return",
        "std of episodes",
        "return",
        "length",
    ):
        table.add_column(heading, justify="right")
    for lane, seed in enumerate(agent.spec.seeds):
        numbers = (scores[lane].mean(), scores[lane].std(), played.returns[lane].mean(), played.lengths[lane].mean())
        table.add_row(str(seed), *(f"{number:.1f}" for number in numbers))
    Console().print(table)
    return 0


def _probe(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from offrl import probes
    from offrl.paths import replacing

    if min(arguments.episodes, arguments.updates) < 0:
        raise OffrlError("--episodes and --updates should be at least 0.")
    found = [probes.probe(run, arguments.episodes, arguments.updates, arguments.sampled) for run in arguments.runs]
    if arguments.plot:
        try:
            with replacing(arguments.plot) as path:
                probes.draw(found).savefig(path, format="png", dpi=200, bbox_inches="tight")
        except OSError as error:
            raise OffrlError(f"{arguments.plot} could not be written ({error.strerror or error}).") from error
    if arguments.json:
        print(json.dumps([asdict(one) for one in found]))
    else:
        probes.show(found)
    return 0


def _agents(arguments: argparse.Namespace) -> int:
    from hydra.utils import get_class
    from omegaconf import OmegaConf

    files = {path.stem: path for path in sorted((conf_dir() / "agent").glob("*.yaml"))}
    if arguments.name and arguments.name not in files:
        raise OffrlError(f"agent {arguments.name} is unknown; there are {', '.join(files)}.")
    for name, path in files.items():
        cls: Any = get_class(OmegaConf.load(path)._target_)
        documentation = inspect.getdoc(inspect.getmodule(cls)) or ""
        if not arguments.name:
            print(f"{name:12} {documentation.splitlines()[0]}")
        elif name == arguments.name:
            print(documentation, "\n\nSettings:")
            for key, default, comment in field_comments(cls.Config):
                print(f"  agent.{key}={default}  {comment}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
