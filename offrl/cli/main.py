"""The command `offrl`: one module of `offrl.cli` for each subcommand, imported when it is called.

So `offrl --help` stays fast, and every module imports what it needs at its top.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import importlib
import io
import os
import re
import sys

import offrl
from offrl.utils.advice import advising
from offrl.utils.errors import OffrlError, one_line
from offrl.utils.paths import config_dir_of, without_config_dir
from offrl.utils.settings import trusting

# Subcommands by purpose: (usage, what it does). `offrl.cli.NAME` has `add_parser(subparsers)`.
GROUPS = {
    "Train": {
        "train": (
            "train [key=value ...]",
            "train and score a policy; -m sweeps comma-separated values (Hydra's multirun)",
        ),
        "finetune": ("finetune RUN [key=value ...]", "continue a finished offline run with environment steps"),
        "status": ("status RUNS...", "how far runs are, and what failed"),
    },
    "Data": {
        "data": ("data list|info|build|fetch|convert", "datasets: which there are, what is in them, how to get them"),
        "augment": ("augment train|sample|metrics", "synthetic trajectories: fit a model, write them, measure them"),
    },
    "Results": {
        "report": ("report RUNS...", "tables, statistics and curves of runs"),
        "select": ("select RUNS...", "rank policies without the environment"),
        "probe": ("probe RUN...", "predicted against achieved return, and label leakage"),
    },
    "Policies": {
        "evaluate": ("evaluate RUN", "play episodes with a run's policy; --video films, --record keeps them"),
        "export": ("export RUN", "a policy as an ONNX or TorchScript file"),
    },
    "Help": {
        "agents": ("agents [NAME]", "the methods and their settings"),
        "completion": ("completion bash|zsh", "completion of commands, options and keys in a shell"),
    },
}
COMMANDS = {name: line for group in GROUPS.values() for name, line in group.items()}


MOST_LETTERS = 1400  # of a sentence about bad input
NEW_OBJECTS = 100_000  # between two searches for garbage: libraries make as many at every start, and all of them stay


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status is 2 for bad input, 130 when stopped from the keyboard."""
    gc.set_threshold(NEW_OBJECTS)
    words = list(sys.argv[1:] if argv is None else argv)
    named = any(word.partition("=")[0] in ("--trust", "--config-dir", "-cd") for word in words)
    words = [word for word in words if word != "--trust"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack letters, such as in a Latin-1 locale
    try:
        with trusting(named), advising("train" if words[:1] in (["train"], ["finetune"]) else "flags"):
            status = _run(words)
        if sys.stdout is not None:  # closed before we began
            sys.stdout.flush()
        return status
    except OffrlError as error:
        return _refused(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        _drop_output()
        return 0
    except (OSError, MemoryError) as error:
        _drop_output()
        return _refused(_of_the_system(error))
    except Exception as error:
        if isinstance(error, RuntimeError) and re.search("can't allocate memory|out of memory", str(error)):  # torch's
            return _refused(_of_the_system(MemoryError(str(error).split(". ")[0].rpartition("] ")[2])))
        if type(error).__module__.partition(".")[0] == "mujoco":  # its FatalError: no memory for the simulator
            return _refused(f"the simulator failed ({one_line(error)}); try eval.workers=1 or smaller eval.slots.")
        raise


def _refused(sentence: str) -> int:
    # What a user or a file wrote may hold line breaks and control letters.
    print(f"offrl: error: {one_line(sentence, MOST_LETTERS)}", file=sys.stderr)
    return 2


def _of_the_system(error: OSError | MemoryError) -> str:
    """What the machine has run out of, and what to do; every file is written whole or not at all, so nothing is lost."""
    if isinstance(error, MemoryError):
        return f"the memory is not enough ({one_line(error)}); use smaller sizes or fewer lanes."
    remedy = {
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some space",
        errno.EMFILE: "allow more open files (ulimit -n) or lower eval.workers",
        errno.ENFILE: "close other programs",
        errno.EAGAIN: "allow more processes (ulimit -u) or lower eval.workers",
        errno.ENOMEM: "use smaller sizes or lower eval.workers",
    }.get(error.errno or 0, "choose another place")
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or one_line(error)}; {remedy}, then repeat the command."


def _drop_output() -> None:
    """Nobody can be written to any more: what is left in the buffer must not fail when Python ends."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(words: list[str]) -> int:
    if words[:1] == ["train"]:  # Hydra reads the rest
        status: int = importlib.import_module("offrl.cli.train").run(words[1:])
        return status
    if words[:1] not in (["agents"], ["augment"], ["finetune"]):  # for the others it is a place of modules
        config_dir_of(words)
        words = without_config_dir(words)
    arguments = _parse(words)
    status = arguments.run(arguments)
    return status


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("offrl", usage=_usage(), description="An offline reinforcement learning zoo.")
    parser.add_argument("--version", action="version", version=f"offrl {offrl.__version__}")

    def usage(_: argparse.Namespace) -> int:
        parser.print_usage()
        return 2

    parser.set_defaults(run=usage)
    subparsers = parser.add_subparsers(help=argparse.SUPPRESS, metavar="COMMAND", prog="offrl")
    everything = words[:1] == ["completion"]
    for name in COMMANDS:
        if name != "train" and (name in words or everything):
            importlib.import_module(f"offrl.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name)
    arguments, rest = parser.parse_known_args(words)
    if everything:
        arguments.words_of = {name: _words_of(subparsers.choices[name]) for name in COMMANDS if name != "train"}
    if rest and not hasattr(arguments, "words"):
        parser.error(f"unrecognized arguments: {one_line(' '.join(rest))}")
    if rest:  # key=value words, which may stand behind options
        arguments.words = [*arguments.words, *rest]
    return arguments


def _words_of(parser: argparse.ArgumentParser) -> list[str]:
    """Options of a command and its subcommands, and the choices of its arguments."""
    found: list[str] = []
    for action in parser._actions:
        found += action.option_strings
        if isinstance(action.choices, dict):
            found += [word for name, sub in action.choices.items() for word in (name, *_words_of(sub))]
        elif not action.option_strings:
            found += map(str, action.choices or ())
    return sorted(set(found))


def _usage() -> str:
    lines = ["offrl COMMAND ...   (offrl COMMAND --help says more)"]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  offrl {usage:34} {description}" for usage, description in commands.values()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
