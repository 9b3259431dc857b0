"""The comparisons of docs/claims.md from the committed rows: difference, interval, verdict.

    python benchmarks/tables/verdicts.py                  # rows in results/claims beside this file
    python benchmarks/tables/verdicts.py --rows DIR       # folder of run_claims.sh, for all but D: finished runs so far

What each comparison takes to be shown was written down in docs/claims.md before any run; it is repeated here as code.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from offrl.results.finetuning import FineTuning
from offrl.results.labels import ONLINE
from offrl.results.report import summary

sys.path.append(str(Path(__file__).parent))
from comparisons import NOT_YET, Line, Rows, Scores, compared, counted, difference, equality, is_shown, paired
from histories import METHODS

HERE = Path(__file__).parent / "results"

HALFCHEETAH, HOPPER = "forge/halfcheetah/medium-replay-v0", "forge/hopper/medium-replay-v1"
MAZE = "forge/pointmaze/medium-v0"
CUBE_TASKS = [f"forge/ogbench/cube-single-play-singletask-task{i}-v0" for i in range(1, 6)]
MAZE_TASKS = [f"forge/ogbench/pointmaze-medium-navigate-singletask-task{i}-v0" for i in range(1, 6)]
MIXTURES = ("forge/hopper/random-expert-0.05-v0", "forge/halfcheetah/random-expert-0.1-v0")
ROBOTS = ("forge/hopper/medium-replay-v0", HALFCHEETAH)
HISTORIES = tuple(METHODS)
DEPTH = "td3_bc (A2PR's depth, alpha and discount)"
WITHIN = 0.05  # nats per action: as near counts as the same on-policyness


# ---- claims ----------------------------------------------------------------------------------------------------------------


def claim_a(rows: Path) -> list[Line]:
    short, long = Rows(rows / "a"), Rows(rows / "long")
    td3_bc = short.scores("td3_bc", HALFCHEETAH)
    gate, curve = Line("A0", "the pipeline is sound"), short.means("td3_bc", HALFCHEETAH)
    if len(td3_bc) and 50_000 in curve:
        final = float(td3_bc.mean())
        sound = 35 <= final <= 50 and curve[50_000] >= 0.9 * final
        gate.found, gate.verdict = f"{curve[50_000]:.1f} at 50,000, {final:.1f} at the end", "yes" if sound else "no"
    lines = [gate]
    for name, other in (("A1", "td3_bc"), ("A2", "td3_bc (alpha 40)")):
        for source, suffix, seeds in ((short, "", 5), (long, ", 500,000 updates", 5)):
            ours, theirs = source.scores("prdc", HALFCHEETAH), source.scores(other, HALFCHEETAH)
            if source is short or len(ours):
                lines.append(compared(name, f"prdc - {other}{suffix}", ours, theirs, 3, seeds))
    rising = short.means("prdc", HALFCHEETAH)
    if 200_000 in rising:
        late, before = (
            np.mean([v for step, v in rising.items() if a < step <= a + 50_000]) for a in (150_000, 100_000)
        )
        lines.append(Line("", "PRDC's last 50,000 updates less the 50,000 before", f"{late - before:.1f}", ""))
    a2pr = short.scores("a2pr", HALFCHEETAH)
    lines.append(compared("A3", "a2pr - td3_bc", a2pr, td3_bc, 3, 3))
    lines.append(compared("A4", f"a2pr - {DEPTH}", a2pr, short.scores(DEPTH, HALFCHEETAH), 3, 3))
    for line in lines[1:]:
        if gate.verdict == "no" and line.found and line.verdict:
            line.verdict = f"none, since A0 fails (by itself: {line.verdict})"
    return lines


def claim_b(rows: Path) -> list[Line]:
    b = Rows(rows / "b")
    pairs = (("B1", "prdc", "td3_bc", 10.0), ("B2", "td3_bc+AW", "td3_bc", 10.0), ("B3", "iql+AW", "iql", 5.0))
    return [compared(n, f"{x} - {y}", b.scores(x, HOPPER), b.scores(y, HOPPER), m, 5) for n, x, y, m in pairs]


def expert_score(mixture: str) -> float:
    """Mean normalised return of the expert in a mixture, from the table of the forge's returns."""
    returns = dict(pl.read_csv(HERE / "forge_returns.csv").select("dataset", "forge_mean_normalised").iter_rows())
    return float(returns[f"{mixture.rsplit('/', 1)[0]}/expert-v0"])


def claim_c(rows: Path) -> list[Line]:
    c = Rows(rows / "c")
    lines, better, fully = [], [], []
    for dataset in MIXTURES:
        goal = expert_score(dataset)
        for agent in ("td3_bc", "iql", "cql"):
            weighted, uniform = c.scores(f"{agent}+AW", dataset), c.scores(agent, dataset)
            lines.append(compared("", f"{agent}+AW - {agent}, {dataset}", weighted, uniform, 10, 3))
            better.append(is_shown(weighted, uniform, 10, 3))
            fully.append(bool(weighted.mean() >= 0.9 * goal) if len(weighted) >= 3 else None)
    lines.append(counted("C1", "AW - uniform", better, 5))
    lines.append(counted("C2", "AW reaches 90 % of the expert", fully, 5))
    return lines


def claim_d(rows: Path) -> list[Line]:
    """From `probes.json`, seeds 5 to 19: those whose results were not known when the claims were written."""
    names = (
        "DoC's gap is at most 0.1",
        "DT's gap is above 0.1",
        "DoC - DT, bandits and gamble",
        "DoC - DT, lakes with luck",
    )
    path = rows / "d" / "probes.json"
    if not path.exists():
        return [Line(f"D{i}", name) for i, name in enumerate(names, 1)]
    gaps: dict[tuple[str, str], list[float]] = {}
    returns: dict[tuple[str, str], list[float]] = {}
    for folder, told in json.loads(path.read_text()).items():
        method, dataset, run = folder.split("/")
        if method in ("doc", "dt") and not run.startswith("seed0-"):
            spread = 20.0 if "gambling" in dataset else 1.0
            achieved, predicted = (np.array(told["sampled"][key]) / spread for key in ("achieved", "predicted"))
            gaps.setdefault((method, dataset), []).extend(np.abs(predicted - achieved).tolist())
            returns.setdefault((method, dataset), []).extend(achieved.tolist())
    tasks = sorted({task for _, task in gaps if {("doc", task), ("dt", task)} <= gaps.keys()})
    luck = [task for task in tasks if "lake_p1-" not in task]
    gap = {key: float(np.mean(values)) for key, values in gaps.items()}

    def above(task: str) -> bool | str | None:
        ours, other = (np.array(returns.get((method, task), [])) for method in ("doc", "dt"))
        return is_shown(ours, other, 0.1, 15)

    lines = []
    for task in tasks:
        apart = difference(np.array(returns[("doc", task)]), np.array(returns[("dt", task)]))
        told = "" if apart is None else f"; DoC - DT {apart.mean:.3f} [{apart.low:.3f}, {apart.high:.3f}]"
        lines.append(Line("", task, f"gaps: DoC {gap[('doc', task)]:.3f}, DT {gap[('dt', task)]:.3f}{told}", ""))
    lines.append(counted("D1", names[0], [gap[("doc", task)] <= 0.1 for task in tasks], 10))
    lines.append(counted("D2", names[1], [gap[("dt", task)] > 0.1 for task in luck], 8))
    lines.append(counted("D3", names[2], [above(task) for task in luck if "lake" not in task], 5))
    lines.append(counted("D4", names[3], [above(task) for task in luck if "lake" in task], 3))
    return lines


def learnt(means: dict[int, float], bar: float = 20.0, row: int = 3) -> int | None:
    """The first update of `row` evaluations in a row that reach `bar`."""
    steps = sorted(means)
    for i in range(len(steps) - row + 1):
        if all(means[step] >= bar for step in steps[i : i + row]):
            return steps[i]
    return None


def error_at(kinds: dict[str, Any]) -> tuple[float, float] | None:
    """Dynamics error of guided trajectories at the world model's log pi(a|s), and the world model's; None out of reach."""
    world = kinds["world model"]
    guided = sorted(
        (kind["log_likelihood_policy"], math.log(kind["dynamics_error"]))
        for name, kind in kinds.items()
        if name not in ("real", "world model")
    )
    likelihood, error = map(np.array, zip(*guided))
    if not likelihood[0] - WITHIN <= world["log_likelihood_policy"] <= likelihood[-1] + WITHIN:
        return None
    return math.exp(np.interp(world["log_likelihood_policy"], likelihood, error)), world["dynamics_error"]


def claim_e(rows: Path) -> list[Line]:
    e, b = Rows(rows / "e"), Rows(rows / "b")
    lines, helps, guidance = [], [], []
    for agent in ("td3_bc", "iql"):
        means = e.means(agent, MAZE)
        when = learnt(means)
        told = "" if not means else f"from {when:,} updates on" if when else f"not in {max(means):,} updates"
        lines.append(Line("E1", f"{agent} learns the maze", told, "" if means else NOT_YET))
    for source, dataset in ((e, MAZE), (b, HOPPER)):
        for agent in ("td3_bc", "iql"):
            measured = []
            for run in source.runs:
                path = run.folder / "augment" / "metrics.json"
                if source.labels[str(run.folder)] == agent and path.exists():
                    measured.append(error_at(json.loads(path.read_text())["kinds"]))
            line = Line("E2", f"{agent}, {dataset}")
            if measured:
                pairs = [pair for pair in measured if pair is not None]
                line.found = "; ".join(f"{ours:.2g} and {theirs:.2g}" for ours, theirs in pairs) or "out of reach"
                better = {ours < theirs for ours, theirs in pairs}
                same = len(pairs) == len(measured) and len(better) == 1
                line.verdict = (
                    "no verdict" if not same else "shown" if better == {True} else "the world model is better"
                )
            lines.append(line)
    for dataset, alone in ((MAZE, e), (HOPPER, b)):
        for agent in ("td3_bc", "iql"):
            nothing = alone.scores(agent, dataset, seeds=(0, 1, 2))
            guided = e.scores(f"{agent}+PGD", dataset)
            for other, into in (("nothing", helps), ("diffusion", guidance)):
                seen = nothing if other == "nothing" else e.scores(f"{agent}+diffusion", dataset)
                lines.append(compared("", f"{agent}+PGD - {other}, {dataset}", guided, seen, 3, 3))
                into.append(is_shown(guided, seen, 3, 3))
    for name, what, found in (("E3", "PGD - nothing", helps), ("E4", "PGD - unguided diffusion", guidance)):
        maze = any(value is not None for value in found[:2])
        lines.append(counted(name, what, found if maze else found[2:], 3 if maze else 2))
    return lines


def claim_f(rows: Path) -> list[Line]:
    lines = []
    for name, method in (("F1", "td3_bc"), ("F2", "iql")):
        sides: dict[str, list[float]] = {"offrl": [], "corl": []}
        for path in sorted(rows.glob(f"f/peers_{method}_seed*.json")):
            for record in json.loads(path.read_text())["rows"]:
                sides[record["side"]] += record["scores"][max(record["scores"], key=int)]
        ours, theirs = (np.array(sides[side]) for side in ("offrl", "corl"))
        wide, narrow = difference(ours, theirs), difference(ours, theirs, 0.9)
        line = Line(name, f"{method}: ours - CORL's")
        if wide and narrow:
            line.found, line.verdict = f"{wide}; {len(ours)} seeds", equality(wide, narrow, 3)
        lines.append(line)
    return lines


# The cells of claim G under TD3+BC: sampler and augmentation are in the method's name, these in its configuration.
AS_IT_IS = {"agent.alpha": 2.5, "augment.refresh_every": 5000, "augment.penalty": 0.0}


def claim_g(rows: Path) -> list[Line]:
    g = Rows(rows / "g")

    def alone(alpha: float) -> Scores:
        return g.scores("td3_bc", HALFCHEETAH, settings={"agent.alpha": alpha})

    def in_model(key: str = "agent.alpha", value: float = 2.5) -> Scores:
        return g.scores("td3_bc+WM", HALFCHEETAH, settings=AS_IT_IS | {key: value})

    model, restored = in_model(), in_model("agent.alpha", 1.25)
    published = {"augment.share": 0.95}  # not the control that takes half of a batch from the data
    pessimists = {agent.upper(): g.scores(agent, HALFCHEETAH, settings=published) for agent in ("mopo", "mobile")}
    complete = all(len(scores) >= 5 for scores in pessimists.values())
    who, better = max(pessimists.items(), key=lambda item: float(item[1].mean())) if complete else ("", np.array([]))
    pairs = (
        ("G1", "model - nothing", model, alone(2.5)),
        ("G2", "model - alpha 5 alone", model, alone(5.0)),
        ("G3", "model, alpha 1.25 - nothing", restored, alone(2.5)),
        ("G4", "model, alpha 1.25 - model of recorded actions alone", restored, in_model("augment.refresh_every", 0)),
        ("G5", f"the better of MOPO and MOBILE{f', {who},' if complete else ''} - model", better, model),
    )
    lines = [compared(name, what, ours, other, 5, 5) for name, what, ours, other in pairs]
    for penalty in (0.5, 2.5):
        line = compared("", f"model, penalty {penalty} - model", in_model("augment.penalty", penalty), model, 5, 5)
        lines.append(replace(line, verdict=""))
    return lines


def claim_h(rows: Path) -> list[Line]:
    """Success of a method on each task, paired by task."""
    h = Rows(rows / "h")

    def against(
        ours: str, other: str, tasks: Sequence[str], name: str, margin: float
    ) -> tuple[Line, bool | str | None]:
        pairs = [(h.scores(ours, task), h.scores(other, task)) for task in tasks]
        line = Line(name, f"{ours} - {other}, {tasks[0].split('/')[2].split('-singletask')[0]}")
        complete = [(a.mean(), b.mean()) for a, b in pairs if len(a) and len(b)]
        found = paired(*map(np.array, zip(*complete))) if len(complete) == len(tasks) else None
        if found is None:
            return line, None
        line.found, line.verdict = str(found), found.verdict(margin)
        return line, found.shown(margin)

    lines = []
    for name, tasks in (("H1", CUBE_TASKS), ("H2", MAZE_TASKS)):
        told = [against(agent, "flow_bc", tasks, "", 20) for agent in ("iql", "rebrac", "fql")]
        lines += [line for line, _ in told]
        lines.append(counted(name, "values lift cloning", [shown for _, shown in told], 3))
    lines.append(against("fql", "iql", CUBE_TASKS, "H3", 5)[0])
    lines.append(against("fql", "rebrac", CUBE_TASKS, "H4", 3)[0])
    return lines


def claim_i(rows: Path) -> list[Line]:
    """From `histories_*.json`, one file for each agent and dataset."""
    planned = [("grid_cue", "discrete_cql"), ("grid_cue", "iql"), ("grid_place", "discrete_cql"), ("grid_place", "iql")]
    planned.append(("hopper", "iql"))
    lines, either, stitched, remembered, balanced = [], [], [], [], []
    for task, agent in planned:
        found = sorted((rows / "i").glob(f"histories_{agent}_forge_{task}*.json"))
        cell = json.loads(found[0].read_text()) if found else {}
        score = {method: np.array(cell[method]["scores"]) if method in cell else np.array([]) for method in HISTORIES}
        memoryless, plain, loss, small_weight = score.values()
        line = compared("", f"GRU and loss - GRU, {agent}, {task}", loss, plain, 5, 5)
        helps, small = is_shown(loss, plain, 5, 5), None
        if helps is not None:
            by_itself, minimised = (float(np.mean(cell[method]["last"])) for method in HISTORIES[1:3])
            small = by_itself <= 2 * minimised
            line.found += f"; J {by_itself:.3g} and {minimised:.3g}"
        lines.append(line)
        either.append(True if small else helps)
        if task != "hopper":
            stitched.append(helps)
            lines.append(compared("", f"GRU and loss 0.001 - GRU, {agent}, {task}", small_weight, plain, 5, 5))
            balanced.append(is_shown(small_weight, plain, 5, 5))
        remembered.append(is_shown(plain, memoryless, 5, 5))
    lines.append(counted("I1", "the loss helps, or is small by itself", either, 5))
    lines.append(counted("I2", "GRU and loss - GRU, on the grid", stitched, 2))
    lines.append(counted("I3", "GRU - k = 1", remembered, 2))
    lines.append(counted("I4", "GRU and loss 0.001 - GRU, on the grid", balanced, 2))
    return lines


def claim_j(rows: Path) -> list[Line]:
    methods = ("iql", "td3_bc", "rebrac", "cal_ql")
    finished = [run.folder for run in Rows(rows / "j").runs]
    made = summary(finished, rows)[0].fine_tunings if finished else []
    by_cell: dict[tuple[str, str], FineTuning] = {}
    for tuned in made:
        key = (tuned.cell.base.removesuffix(ONLINE), tuned.dataset)
        if key in by_cell:
            raise SystemExit(
                f"claim J has one setting of a method: {by_cell[key].method} and {tuned.method} on {key[1]}."
            )
        by_cell[key] = tuned
    cells = [(method, robot, by_cell.get((method, robot))) for method in methods for robot in ROBOTS]
    lines = [Line("", f"{method}, {robot}", gain_of(tuned), "") for method, robot, tuned in cells if tuned]
    keeps = [None if tuned is None else bool(tuned.after.mean() >= tuned.before.mean()) for *_, tuned in cells]
    lines.append(counted("J1", "nobody loses by going on", keeps, len(cells)))
    pays = []
    for robot in ROBOTS:
        offline, scratch = by_cell.get(("cal_ql", robot)), by_cell.get(("rlpd", robot))
        pays.append(None if not offline or not scratch else bool(offline.regret.mean() < scratch.regret.mean()))
    lines.append(counted("J2", "Cal-QL's regret is below RLPD's", pays, len(ROBOTS)))
    stays = [
        None if tuned is None else bool((tuned.after > tuned.before - 10).all())
        for method, _, tuned in cells
        if method in ("iql", "cal_ql")
    ]
    lines.append(counted("J3", "no seed of IQL or Cal-QL ends 10 below its start", stays, len(stays)))
    return lines


def gain_of(tuned: FineTuning) -> str:
    """A cell of the table: scores before and after, and the regret."""
    (before, after), regret = ((x.mean(), x.std(ddof=1)) for x in (tuned.before, tuned.after)), tuned.regret.mean()
    return f"{before[0]:.1f} ± {before[1]:.1f} → {after[0]:.1f} ± {after[1]:.1f}, regret {regret:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=HERE / "claims")
    rows = parser.parse_args().rows
    print("| | comparison | D [95 % interval], or what was found | verdict |")
    print("|---|---|---|---|")
    for claim in (claim_a, claim_b, claim_c, claim_d, claim_e, claim_f, claim_g, claim_h, claim_i, claim_j):
        for line in claim(rows):
            print(line)


if __name__ == "__main__":
    main()
