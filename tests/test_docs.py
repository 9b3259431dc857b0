"""The code blocks of the documentation: commands compose, and blocks that can run do run, as a reader would run them.

A comment directly above a block says what holds for it:

    <!-- test: skip (reason) -->   neither checked nor run
    <!-- test: compose -->         its `offrl` commands are read and their configurations resolved, and nothing is run

Other bash and python blocks of a page run in order in one temporary folder. A block whose first line is a comment with a
path, such as `# my_agents/xql.py`, is written to that file first.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from offrl.cli import main as cli
from offrl.training.compose import compose_words
from offrl.training.run_config import resolve_config

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- test: (\w+)[^\n]*-->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w.-]+(?:/[\w.-]+)+)\n")
LINK = re.compile(r"\]\(([^)#\s]+)?(?:#([\w-]+))?\)")
NAMED_FILE = re.compile(r"`((?:offrl|tests|benchmarks)/[a-z0-9_/]+\.(?:py|sh))`")
PLACEHOLDER = re.compile(r"\.\.\.|\b(RUN|RUNS|PATH)\b")


class Block(NamedTuple):
    mark: str  # "skip", "compose" or empty
    language: str
    code: str

    @property
    def file(self) -> str | None:
        named = FILE.match(self.code)
        return named[1] if named else None


def blocks(page: Path) -> list[Block]:
    return [Block(*(part or "" for part in found)) for found in BLOCK.findall(page.read_text())]


def commands(code: str) -> Iterator[list[str]]:
    """The words behind `offrl` of each command without a placeholder, each list of values reduced to its first."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["offrl"] and not any(map(PLACEHOLDER.search, words)):
            yield [first_value(word) for word in words[1:] if not re.match("(-m|--cfg|job|hydra/launcher=.*)$", word)]


def first_value(word: str) -> str:
    key, separator, value = word.partition("=")
    return word if not separator or value[:1] in ("[", "'", "{") else f"{key}={value.split(',')[0]}"


def write(block: Block, folder: Path) -> None:
    path = folder / str(block.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.code)


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of somebody who follows a page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_blocks_are_found() -> None:
    """A block that the pattern misses would count as checked."""
    for page in PAGES:
        fences = re.findall(r"^```(?:bash|python|yaml)", page.read_text(), re.MULTILINE)
        found = [block for block in blocks(page) if block.language in ("bash", "python", "yaml")]
        assert len(found) == len(fences), page


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_compose(page: Path, folder: Path) -> None:
    for block in blocks(page):
        if block.file:
            write(block, folder)
        if block.mark == "compose":
            for words in commands(block.code):
                if words[0] != "train":
                    cli._parse(words)
                elif "--help" not in words:
                    run = resolve_config(compose_words(words[1:])).train
                    assert run.updates + run.online.steps > 0, words


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text()):
        if path.startswith("http"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {path}"
        if anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{page.name}: {path}#{anchor}"
    missing = [file for file in NAMED_FILE.findall(page.read_text()) if not (ROOT / file).exists()]
    assert not missing, f"{page.name} names {missing}"


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks(page) if not block.mark and (block.file or block.language in ("bash", "python"))]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=named)
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    offrl = tmp_path / "bin" / "offrl"  # like the installed command, and unlike `python -m`, without the current folder
    offrl.parent.mkdir()
    offrl.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m offrl "$@"\n')
    offrl.chmod(0o755)
    env = {**os.environ, "PATH": f"{offrl.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    folder = tmp_path / "project"
    folder.mkdir()
    for block in runnable(page):
        if block.file:
            write(block, folder)
            continue
        run = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
        process = subprocess.run([*run, block.code], cwd=folder, env=env, capture_output=True, text=True)
        assert process.returncode == 0, f"{block.code}\n{process.stdout}\n{process.stderr}"
