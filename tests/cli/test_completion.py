"""Completion: Bash and Zsh themselves complete words by the script."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from offrl.cli.main import COMMANDS, GROUPS, main


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", "bash"]) == 0
    return capsys.readouterr().out


LINES = {
    "offrl ev": "offrl evaluate",
    "offrl train agent=td": "offrl train agent=td3_bc",
    "offrl train eval.ev": "offrl train eval.every=",
    "offrl evaluate --vi": "offrl evaluate --video",
    "offrl data bu": "offrl data build",
    "offrl export --form": "offrl export --format",
    "offrl train dataset=my": "offrl train dataset=mydata.npz",
    "offrl report my": "offrl report mydata.npz",
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs Bash")
def test_bash_completes(script: str, tmp_path: Path) -> None:
    """As Readline calls it: COMP_WORDS are split at `=`, and only the part behind it is replaced."""
    (tmp_path / "mydata.npz").touch()
    for line, wanted in LINES.items():
        words = line.replace("=", " = ")
        code = (
            f'{script}\nCOMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=({words}); '
            'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMP_WORDBREAKS="=: "; _offrl; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(
            ["bash", "--norc", "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=True
        )
        stem = line[: 1 + max(line.rfind("="), line.rfind(" "))]
        assert [stem + reply for reply in done.stdout.split()] == [wanted], (line, done.stderr)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs Zsh")
def test_zsh_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Zsh in a terminal of its own: the line after the tab key, which a key of ours prints."""
    assert main(["completion", "zsh"]) == 0
    shows = "show() { print -r -- \"<$BUFFER>\" }; zle -N show; bindkey '^P' show; print '<ready>'\n"
    (tmp_path / "offrl.zsh").write_text(capsys.readouterr().out + shows)
    (tmp_path / "mydata.npz").touch()
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execvpe("zsh", ["zsh", "-f", "-i"], {**os.environ, "TERM": "dumb"})

    def answer(keys: str) -> str:
        os.write(terminal, keys.encode())
        read, end = "", time.monotonic() + 60
        while not (found := re.search(r"<(.*)>", read)) and time.monotonic() < end:
            if select.select([terminal], [], [], 1)[0]:
                read += os.read(terminal, 65536).decode(errors="replace")
        assert found, read
        return found[1]

    try:
        assert answer("source ./offrl.zsh\n") == "ready"
        for line, wanted in LINES.items():
            assert answer(f"{line}\t\x10").rstrip() == wanted
            os.write(terminal, b"\x15")  # empties the line
    finally:
        os.write(terminal, b"\x15exit\n")
        os.close(terminal)
        os.waitpid(child, 0)


def test_every_command_has_a_line_in_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n{title}:\n" in text for title in GROUPS)
    for usage, description in COMMANDS.values():
        (line,) = [line for line in text.splitlines() if f"offrl {usage} " in line + " "]
        assert line.endswith(description)
