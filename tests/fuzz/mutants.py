"""Mutations of the code against its own tests: `python tests/fuzz/mutants.py 20 [--seed S] [--only NAME]`.

Of each module, N places in functions are drawn and changed one at a time: operators, comparisons, constants, `min` for
`max`, a missing `detach()`. A mutant is killed when a related test fails. A survivor is printed with its line; whether it
changes numbers has to be judged by a reader. Modules and tests are imported once, and every mutant is a forked process in
which one function has another code object, so it costs only its tests. Defaults of dataclasses have a test of their own
(`tests/contract/test_defaults.py`). Linux only.
"""

from __future__ import annotations

import argparse
import ast
import gc
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
AGENTS = sorted(file.stem.removeprefix("test_") for file in (ROOT / "tests/steps").glob("test_*.py"))
OF_EVERY_AGENT = ("metrics_do_not_grow_with_the_batch", "a_temperature_starts_at_one", "entropy_is_that_of_the_policy")
OF_ALL_STEPS = ("steps/test_clamps", "steps/test_tails", "contract/test_defaults")
CONTRACT = " ".join(f"contract/test_agents.py::test_{test}[{{0}}]" for test in OF_EVERY_AGENT)
TESTS: dict[str, list[str]] = {
    "sampling/alias": ["test_sampling"],
    "sampling/samplers": ["test_sampling", "test_trajectory_weighting"],
    "sampling/weights": ["test_trajectory_weighting", "test_sampling"],
    "sampling/mixture": ["test_sampling", "test_sampler_runs"],
    "sampling/batches": ["test_sampling", "steps/test_td3_bc"],
    "sampling/replay": ["online/test_online"],
    "sampling/density": ["test_density"],
    "evaluation/fqe": ["test_ope"],
    "evaluation/selection": ["cli/test_select"],
    "evaluation/evaluator": ["test_evaluate"],
    "evaluation/environments": ["test_evaluate"],
    "data/ends": ["data/test_ends", "data/test_d4rl", "data/test_arrays"],
    "data/dataset": ["data/test_store", "steps/test_tails"],
    "data/episodes": ["data/test_store", "data/test_arrays", "data/test_ends"],
    "data/statistics": ["data/test_info", "test_trajectory_weighting", "data/test_mixtures"],
    "results/stats": ["stats/test_stats", "test_ogbench_runs"],
    "nets/box": ["test_nets", "contract/test_action_bounds"],
    "nets/bisimulation": ["histories/test_bisimulation"],
    "nets/program": ["test_program", "test_kernels"],
    "nets/tape": ["test_program", "test_engine"],
    "augment/world_model": ["augment/test_world_model", "augment/test_model_based"],
    "augment/edm": ["augment/test_edm"],
    "augment/trajectories": ["augment/test_trajectories"],
    "agents/history": ["histories/test_history", "histories/test_bisimulation"],
    "agents/squashed": ["steps/test_cql", "steps/test_sac_n", "online/test_online", "augment/test_world_model"],
    "agents/vae_bc": ["steps/test_doc", "steps/test_clamps", "steps/test_tails"],
    "agents/flow_bc": ["steps/test_fql"],
} | {
    f"agents/{name}": [f"steps/test_{name}", *OF_ALL_STEPS, *CONTRACT.format(name).split()]
    for name in AGENTS
    if (ROOT / f"offrl/agents/{name}.py").exists()
}
OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
PAIRS = ("min max", "sum mean", "argmin argmax", "minimum maximum", "amin amax", "floor ceil", "any all", "zeros ones")
PAIRS = (*PAIRS, "zeros_like ones_like", "left right", "cumsum cumprod")
NAMES = {a: b for pair in PAIRS for a, b in (pair.split(), pair.split()[::-1])}
SILENT = (ast.Raise, ast.JoinedStr, ast.Assert)  # what a message says is no number


@dataclass(frozen=True)
class Mutant:
    """A change: the module's tree, the place in it (a number), what it becomes, and the outermost function around it."""

    path: Path
    place: int
    line: int
    column: int
    what: str
    function: tuple[str, int]


def changes(node: ast.AST) -> tuple[str, Callable[[ast.AST], None]] | None:
    """What can be changed at a node, in words, and how."""
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in OPERATORS:
        new = OPERATORS[type(node.op)]
        return f"{type(node.op).__name__} -> {new.__name__}", lambda n: setattr(n, "op", new())
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        new = OPERATORS[type(node.ops[0])]
        return f"{type(node.ops[0]).__name__} -> {new.__name__}", lambda n: n.ops.__setitem__(0, new())  # type: ignore[attr-defined]
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        value = node.value
        other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 1.5 or 1.0
        return f"{value} -> {other}", lambda n: setattr(n, "value", other)
    # The sign of an axis -1 stays: of two axes, 1 is the same. The number itself becomes 2 by the line above.
    axis = isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant) and node.operand.value == 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)) and not axis:
        return f"no {type(node.op).__name__}", lambda n: setattr(
            n, "op", ast.UAdd() if isinstance(n.op, ast.USub) else n.op
        )  # type: ignore[attr-defined]
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        return f".{node.attr} -> .{NAMES[node.attr]}", lambda n: setattr(n, "attr", NAMES[n.attr])  # type: ignore[attr-defined]
    if isinstance(node, ast.Name) and node.id in ("min", "max"):
        return f"{node.id} -> {NAMES[node.id]}", lambda n: setattr(n, "id", NAMES[n.id])  # type: ignore[attr-defined]
    return None


def places(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Nodes that can be changed, each with its outermost function, in a fixed order; no messages, no annotations."""

    def inside(node: ast.AST, function: ast.AST | None) -> Iterator[tuple[ast.AST, ast.AST]]:
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list") or (
                name == "args" and isinstance(value, ast.arguments)
            ):
                continue
            for child in value if isinstance(value, list) else [value]:
                if not isinstance(child, ast.AST) or isinstance(child, SILENT):
                    continue
                if function is not None and changes(child) and not isinstance(getattr(child, "op", 0), ast.Not):
                    yield child, function
                outermost = isinstance(child, ast.FunctionDef) and function is None
                yield from inside(child, child if outermost else function)

    yield from inside(tree, None)


def mutants(path: Path) -> list[Mutant]:
    tree, text = ast.parse(path.read_text()), path.read_text().splitlines()
    found = []
    for place, (node, function) in enumerate(places(tree)):
        told = changes(node)
        assert told is not None
        assert isinstance(function, ast.FunctionDef)
        assert isinstance(node, ast.expr | ast.stmt)
        first = min([function.lineno, *(d.lineno for d in function.decorator_list)])
        line = text[node.lineno - 1].strip()
        found.append(
            Mutant(path, place, node.lineno, node.col_offset + 1, f"{told[0]}: {line}", (function.name, first))
        )
    return found


def code_of(mutant: Mutant | None, path: Path) -> dict[tuple[str, int], types.CodeType]:
    """Code objects of a module's functions by name and first line, with the mutation."""
    tree = ast.parse(path.read_text())
    if mutant:
        node, _ = next(pair for i, pair in enumerate(places(tree)) if i == mutant.place)
        told = changes(node)
        assert told is not None
        told[1](node)
    future = compile(ast.fix_missing_locations(tree), str(path), "exec", dont_inherit=True)
    found, rest = {}, [future]
    while rest:
        code = rest.pop()
        found[code.co_name, code.co_firstlineno] = code
        rest += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return found


def apply(mutant: Mutant) -> int:
    """Give the functions of the running program the mutant's code; how many there are."""
    code = code_of(mutant, mutant.path)[mutant.function]
    found = [
        f
        for f in gc.get_objects()
        if isinstance(f, types.FunctionType)
        and f.__code__.co_filename == str(mutant.path)
        and (f.__code__.co_name, f.__code__.co_firstlineno) == mutant.function
    ]
    for function in found:
        function.__code__ = code
    return len(found)


def judged(mutant: Mutant | None, tests: list[str], seconds: float) -> tuple[str, float]:
    """`killed`, `survived`, `not found` or `too long`, and seconds of CPU."""

    def run() -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        spent = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (spent + int(seconds), spent + int(seconds) + 1))
        if mutant and not apply(mutant):
            os._exit(99)
        os._exit(int(pytest.main([*options(place), "-x", *tests])))

    place = tempfile.mkdtemp(prefix="offrl-mutant-")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = get_context("fork").Process(target=run)
    process.start()
    process.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(place, ignore_errors=True)
    verdict = {0: "survived", 1: "killed", 99: "not found"}.get(process.exitcode or 0, "killed")
    return verdict, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def options(place: str) -> list[str]:
    return [
        "-q",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-m",
        "not slow and not cuda",
        f"--basetemp={place}/t",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=10, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TESTS, action="append", help="this module; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the mutants without a test")
    arguments = parser.parse_args()
    names = arguments.only or list(TESTS)
    os.chdir(ROOT)
    tests = {name: [f"tests/{test}" + ".py" * ("::" not in test) for test in TESTS[name]] for name in names}
    with tempfile.TemporaryDirectory() as place:  # imports modules and tests, once
        pytest.main([*options(place), "--collect-only", "-qq", *sorted({t for ts in tests.values() for t in ts})])
    counts: Counter[str] = Counter()
    for name in names:
        found = mutants(ROOT / f"offrl/{name}.py")
        drawn = random.Random(f"{arguments.seed}:{name}").sample(found, min(arguments.count, len(found)))
        if arguments.list:
            print(*(f"{name}:{m.line}:{m.column}: {m.what}" for m in drawn), sep="\n")
            continue
        verdict, seconds = judged(None, tests[name], 600)
        if verdict != "survived":
            print(f"{name}: the tests fail without a mutation", flush=True)
            continue
        mine: Counter[str] = Counter()
        for mutant in sorted(drawn, key=lambda m: m.place):
            verdict, _ = judged(mutant, tests[name], 3 * seconds + 10)
            mine[verdict] += 1
            if verdict != "killed":
                print(f"{verdict}: {name}:{mutant.line}:{mutant.column}: {mutant.what}", flush=True)
        counts += mine
        told = ", ".join(f"{n} {verdict}" for verdict, n in sorted(mine.items()))
        print(f"{name} ({len(found)} places, tests of {seconds:.1f} s): {told}", flush=True)
    print(", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items())), f"(seed {arguments.seed})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
