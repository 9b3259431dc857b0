"""`offrl completion`: a shell script that completes commands, options, `key=value` words and paths.

The words are written into the script when it is made, so that a completion starts no Python. A folder of one's own
(`--config-dir`) is not in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from offrl.training.compose import choices, groups
from offrl.training.schema import DataConfig, EvalConfig, OnlineConfig, TrainConfig

SECTIONS = {"": TrainConfig, "data.": DataConfig, "eval.": EvalConfig, "online.": OnlineConfig}
# Bash's own functions only: `:` and `=` break words, so the word under the cursor is put together again.
BASH = """\
_offrl() {{
  local line=${{COMP_LINE:0:COMP_POINT}} word
  word=${{line##* }}
  local command=""
  local each
  for each in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case " {commands} " in *" $each "*) command=$each; break;; esac
  done
  local words=""
  case "$command" in
    "") words="{commands} --help --version";;
{cases}
  esac
  local prefix=${{word%"${{word##*[=:]}}"}}
  COMPREPLY=($(compgen -W "$words" -- "$word") $(compgen -P "$prefix" -f -- "${{word#"$prefix"}}"))
  if [[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[0]}} == *= ]]; then compopt -o nospace 2>/dev/null; fi
  case "$COMP_WORDBREAKS" in *=*) COMPREPLY=("${{COMPREPLY[@]#"$prefix"}}");; esac
}}
complete -o filenames -F _offrl offrl
"""
ZSH = """\
_offrl() {{
  local command="" each
  for each in ${{words[2,CURRENT-1]}}; do
    case " {commands} " in (*" $each "*) command=$each; break;; esac
  done
  local -a found keys
  case "$command" in
    "") found=({commands} --help --version);;
{cases}
  esac
  keys=(${{(M)found:#*=}})
  found=(${{found:#*=}})
  compadd -a found && return
  compadd -S "" -a keys && return
  compset -P "*="
  _files
}}
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit; }}
compdef _offrl offrl
"""
FORMS = {"bash": (BASH, 'words="{}"'), "zsh": (ZSH, "found=({})")}  # script, and how it takes the words of a command


def add_parser(subparsers: Any) -> None:
    """Add `offrl completion`; the parsed arguments carry `run`, which returns the exit status."""
    parser = subparsers.add_parser(
        "completion", help='completion for a shell: eval "$(offrl completion bash)" in ~/.bashrc, zsh likewise'
    )
    parser.add_argument("shell", choices=["bash", "zsh"])
    parser.set_defaults(run=_command)


def _command(arguments: argparse.Namespace) -> int:
    print(script(arguments.shell, arguments.words_of), end="")
    return 0


def script(shell: str, words_of: Mapping[str, list[str]]) -> str:
    """The script for Bash or Zsh.

    Args:
        words_of: options and names of each command, without those of `train`.
    """
    form, assignment = FORMS[shell]
    words = {**words_of, "train": [*_train_words()], "finetune": [*words_of.get("finetune", []), *_keys()]}
    cases = "\n".join(f"    {name}) {assignment.format(' '.join(found))};;" for name, found in words.items())
    return form.format(commands=" ".join(words), cases=cases)


def _train_words() -> Iterator[str]:
    yield from ("-m", "--multirun", "--config-dir", "--cfg", "--help", "resume=", "hydra/launcher=local")
    for group in sorted(groups()):
        yield from (f"{group}={name}" for name in choices(group))
    yield from _keys()


def _keys() -> Iterator[str]:
    """`key=` of every option of a run."""
    for prefix, section in SECTIONS.items():
        yield from (f"{prefix}{field.name}=" for field in fields(section))
