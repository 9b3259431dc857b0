"""Completion: Bash itself completes words by the script."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from offrl.cli.main import COMMANDS, GROUPS, main


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", "bash"]) == 0
    return capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs Bash")
def test_bash_completes(script: str) -> None:
    """As Readline calls it: COMP_WORDS are split at `=`, and only the part behind it is replaced."""
    lines = {
        "offrl ev": ("(offrl ev)", ["evaluate"]),
        "offrl train agent=td": ("(offrl train agent = td)", ["td3_bc"]),
        "offrl train eval.ev": ("(offrl train eval.ev)", ["eval.every="]),
        "offrl evaluate --vi": ("(offrl evaluate --vi)", ["--video"]),
        "offrl data bu": ("(offrl data bu)", ["build"]),
        "offrl export --form": ("(offrl export --form)", ["--format"]),
    }
    for line, (words, wanted) in lines.items():
        code = (
            f'{script}\nCOMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS={words}; '
            'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMP_WORDBREAKS="=: "; cd /; _offrl; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, timeout=60)
        assert done.stdout.split() == wanted, (line, done.stderr)


def test_every_command_has_a_line_in_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n{title}:\n" in text for title in GROUPS)
    for usage, description in COMMANDS.values():
        (line,) = [line for line in text.splitlines() if f"offrl {usage} " in line + " "]
        assert line.endswith(description)
