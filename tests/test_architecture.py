"""The package keeps to its plan: rooms in a known order, few modules at the top, files of a readable length, a light start.

Which room may import which is in pyproject.toml ([tool.importlinter]) and checked by `make lint`.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Fork

from offrl.agents.base import Agent, Spec
from offrl.training.compose import choice_file, choices
from offrl.training.runs import make_agent
from offrl.utils.paths import PACKAGE
from offrl.utils.settings import class_in

# Files that may import offrl's own modules inside functions, and why.
LATE_IMPORTS = {
    "__init__.py": "`import offrl` takes no second and no torch",
    "training/child.py": "a child of a sweep must watch its parent before anything heavy is imported",
    "cli/main.py": "a subcommand's module is imported when it is called, so that `offrl --help` is fast",
    "nets/neighbors.py": "Numba compiles the kernels of neighbors_cpu.py for seconds; only PRDC on a CPU needs them",
}
LONGEST = 450
# Files that are longer: the length that they must not pass, and why they are one file.
LONGER: dict[str, tuple[int, str]] = {}
AT_THE_TOP = 4

FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}


def late_imports(tree: ast.Module) -> Iterator[str]:
    """Modules of offrl that functions import, by a statement or by `import_module`."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in (node for function in functions for node in ast.walk(function)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["offrl." * (node.level > 0) + (node.module or "")]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [ast.unparse(node.args[0]).lstrip("f").strip("'\"")]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] == "offrl")


def test_own_modules_are_imported_at_the_top_of_a_file() -> None:
    found = {name: list(late_imports(ast.parse(path.read_text()))) for name, path in FILES.items()}
    found = {name: modules for name, modules in found.items() if modules}
    assert set(found) <= set(LATE_IMPORTS), found


@pytest.mark.parametrize(
    "statement", ["import offrl.nets", "from offrl.nets import MLP", "from . import x", "import_module(f'offrl.{x}')"]
)
def test_a_late_import_is_seen(statement: str) -> None:
    assert list(late_imports(ast.parse(f"def outer():\n    def inner():\n        {statement}")))
    assert not list(late_imports(ast.parse(statement)))


def test_files_have_a_readable_length() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    limits = {name: limit for name, (limit, _) in LONGER.items()}
    assert not {name: n for name, n in lengths.items() if n > limits.get(name, LONGEST)}
    short = [name for name in LONGER if lengths.get(name, 0) <= LONGEST]
    assert not short, f"{short} need no exception any more"


def test_few_modules_stand_outside_the_rooms() -> None:
    loose = [name for name in FILES if "/" not in name and name not in ("__init__.py", "__main__.py")]
    assert len(loose) <= AT_THE_TOP, loose


def test_every_room_has_its_place_in_the_contracts() -> None:
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers, *others = settings["contracts"]
    placed = {name.strip() for layer in layers["layers"] for name in layer.split("|")}
    placed |= {name for contract in others for name in contract["source_modules"]}
    rooms = {f"offrl.{name.partition('/')[0]}" for name in FILES if name.endswith("/__init__.py")}
    assert rooms <= placed


def test_the_page_of_the_architecture_names_files_that_exist() -> None:
    root = PACKAGE.parent
    named = set(
        re.findall(r"`?([a-z_]+/[a-z_/]*[a-z_]+\.(?:py|yaml|md))\b", (root / "docs/architecture.md").read_text())
    )
    assert len(named) > 20
    assert not [name for name in named if not (root / name).exists() and not (PACKAGE / name).exists()]


HEAVY = ("torch", "gymnasium", "mujoco", "hydra", "omegaconf", "matplotlib", "polars", "scipy", "h5py", "asyncio")


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import offrl", (*HEAVY, "numpy", "pydantic")),
        ("from offrl.cli.main import main; main(['--help'])", (*HEAVY, "numpy", "pydantic")),
        ("from offrl.cli.main import main; main(['status', 'RUNS'])", HEAVY),
    ],
)
def test_the_start_is_light(code: str, heavy: tuple[str, ...], tmp_path: Path) -> None:
    """Neither `import offrl` nor `offrl --help` nor `offrl status` takes the seconds that PyTorch's import does."""
    (tmp_path / "config.json").write_text('{"method": "bc", "dataset": "d", "updates": 10}')
    for name in ("manifest.json", "episodes.jsonl", "metrics.jsonl"):
        (tmp_path / name).write_text("{}" if name.endswith("json") else "")
    (tmp_path / "result.json").write_text('{"step": 10, "returns": [1.5], "scores": [25.0]}')
    code = code.replace("RUNS", str(tmp_path))
    script = f"""
import json, sys
try:
    {code}
except SystemExit:
    pass
print(json.dumps([name for name in {heavy!r} if name in sys.modules]), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == []
    assert ("1 runs: 1 finished" in done.stdout) == ("status" in code)


def test_an_agent_is_made_without_the_compiler() -> None:
    """Its size is checked on the `meta` device, where many a function of PyTorch's imports the compiler first: two seconds."""
    agents = [class_in(choice_file("agent", name), Agent) for name in choices("agent")]
    names = [f"{agent.__module__}.{agent.__name__}" for agent in agents if agent.takes_continuous]
    output, errors = Fork(_make_agents, names).communicate(timeout=120)
    assert output.split() == [f"{name}:" for name in names], errors


def _make_agents(names: list[str]) -> None:
    """Print each name, and behind it what it imported of the compiler."""
    for name in names:
        make_agent({"_target_": name}, Spec(obs_dim=3, action_dim=2, seeds=(0, 1)))
        print(f"{name}:", *{"torch._dynamo", "sympy"}.intersection(sys.modules))
