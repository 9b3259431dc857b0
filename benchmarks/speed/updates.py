"""Seed-updates per second of an agent, the share of the machine's matrix-multiply rate, and a peer side by side.

    python benchmarks/speed/updates.py                          # offrl alone
    python benchmarks/speed/updates.py --corl PATH              # PATH: a checkout of corl-team/CORL
    python benchmarks/speed/updates.py --corl PATH --jax PATH --jax-python PYTHON      # a checkout of nissymori/JAX-CORL
    python benchmarks/speed/updates.py --agent cql --corl PATH
    python benchmarks/speed/updates.py --agent rebrac --corl PATH --jax-python PYTHON  # CORL's ReBRAC is in JAX
    python benchmarks/speed/updates.py --agent dt --corl PATH --lanes 1
    python benchmarks/speed/updates.py --agent a2pr --official PATH --lanes 2     # PATH: a checkout of ltlhuuu/A2PR
    python benchmarks/speed/updates.py --device cuda --lanes 1,10 --engines eager,cudagraph

Everything runs in rounds: in each, every contestant runs for the same few seconds, so that a noisy machine is noisy for
all, and ratios are taken within one run. Arrays are random with HalfCheetah's sizes. The number that counts is
seed-updates per second of the whole machine, with any number of lanes, threads and processes. The limit is the cores'
multiply-add rate, measured in the same rounds (`peak.c`, which needs a C compiler).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import platform
import queue
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

OBS, ACTION, BATCH, HIDDEN, ROWS = 17, 6, 256, 256, 200_000
BATCHES = {"dt": 64}  # of agents whose papers have another one
CORES = len(os.sched_getaffinity(0))
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
PEERS = ("official", "corl", "jax")
IN_JAX = ("td3_bc", "iql", "cql")  # agents of JAX-CORL
CORL_IN_JAX = ("rebrac",)  # agents that corl-team/CORL too has in JAX


@dataclass(frozen=True)
class Contestant:
    """`processes` processes of `lanes` lanes with `threads` threads each."""

    kind: str  # offrl, official, corl, jax, matmul or peak
    lanes: int = 1
    threads: int = 1
    processes: int = 1
    engine: str = "eager"
    precision: str = "float32"
    device: str = "cpu"
    agent: str = "td3_bc"

    def __str__(self) -> str:
        engine = "" if self.kind != "offrl" else f" {self.engine} {self.precision}"
        return f"{self.kind}{engine}: {self.lanes} lanes, {self.threads} threads, {self.processes} processes"


def arrays() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(ROWS + 1, OBS, generator=generator)
    action = torch.rand(ROWS, ACTION, generator=generator) * 2 - 1
    return obs[:-1].contiguous(), action, torch.randn(ROWS, generator=generator), obs[1:].contiguous()


def offrl_engine(who: Contestant) -> tuple[Any, int]:
    """The engine that trains the agent, with its default settings, as `offrl train` does; and the period of its updates."""
    from omegaconf import OmegaConf

    from offrl.agents.base import Spec
    from offrl.data.dataset import OfflineDataset
    from offrl.sampling import BatchLoader, Uniform
    from offrl.training.engine import make_engine
    from offrl.training.runs import make_agent
    from offrl.utils.paths import conf_dir
    from offrl.utils.process import tune_process

    tune_process(who.threads)
    obs, action, reward, next_obs = arrays()
    store = OfflineDataset(obs, action, reward, next_obs, torch.zeros(ROWS), torch.arange(0, ROWS + 1, 1000)).to(
        who.device
    )
    spec = Spec(OBS, ACTION, tuple(range(who.lanes)), *store.observation_statistics(), device=who.device)
    agent = make_agent({"_target_": OmegaConf.load(conf_dir() / "agent" / f"{who.agent}.yaml")._target_}, spec)
    agent.setup(store)
    batch = BATCHES.get(who.agent, BATCH)
    loader = BatchLoader([(store, Uniform(store), 1.0)], batch, agent.window, agent.batch_fields, agent.window_before)
    return make_engine(who.engine, agent, loader, who.precision), agent.period


def offrl_burst(who: Contestant) -> Callable[[int], None]:
    """`burst(n)` makes n updates of the agent."""
    engine, period = offrl_engine(who)
    step = 0

    def burst(updates: int) -> None:
        nonlocal step
        engine.run(step, updates)
        step += updates
        if who.device != "cpu":
            torch.cuda.synchronize()

    burst(3 * period)  # as many as a tape of each phase takes
    gc.collect()  # as `offrl train` does: what stays is not walked again
    gc.freeze()
    return burst


def official_burst(who: Contestant, checkout: Path) -> Callable[[int], None]:
    """The same with the authors' class and replay buffer, read from the user's checkout."""
    sys.path.insert(0, str(checkout))
    torch.set_num_threads(who.threads)
    obs, action, reward, next_obs = (x.numpy() for x in arrays())
    names = ("observations", "actions", "rewards", "next_observations", "terminals")
    rows = dict(zip(names, (obs, action, reward, next_obs, torch.zeros(ROWS).numpy())))
    if who.agent != "a2pr":
        raise SystemExit(f"{who.agent}: this benchmark doesn't know how to run the authors' code.")
    agent = importlib.import_module("A2PR").A2PR(OBS, ACTION, 1.0, who.device)
    buffer = importlib.import_module("utils.buffer").ReplayBuffer(OBS, ACTION, who.device, "", 1, 0, max_size=1)
    buffer.D4RL_convert(rows)

    def burst(updates: int) -> None:
        for _ in range(updates):
            agent.train(buffer, BATCH)

    return burst


def corl_burst(who: Contestant, checkout: Path) -> Callable[[int], None]:
    """The same with the classes of CORL's file of that name, read from the user's checkout."""
    sys.path.append(str(Path(__file__).parents[1]))
    import corl

    module = corl.load(checkout, who.agent)
    torch.set_num_threads(who.threads)
    if who.agent == "dt":
        return corl_transformer(module, who.device)
    step = corl_step(who.agent, module, who.device)
    buffer = module.ReplayBuffer(OBS, ACTION, ROWS, who.device)
    obs, action, reward, next_obs = (x.numpy() for x in arrays())
    names = ("observations", "actions", "rewards", "next_observations", "terminals")
    buffer.load_d4rl_dataset(dict(zip(names, (obs, action, reward, next_obs, torch.zeros(ROWS).numpy()))))

    def burst(updates: int) -> None:
        for _ in range(updates):
            step([t.to(who.device) for t in buffer.sample(BATCH)])

    return burst


def corl_step(name: str, module: Any, device: str) -> Callable[[list[torch.Tensor]], Any]:
    """One update by CORL's trainer of that name, with the settings that CORL has for HalfCheetah."""

    def with_adam(*networks: Any, lr: float = 3e-4) -> list[Any]:
        return [x for net in networks for x in (net, torch.optim.Adam(net.to(device).parameters(), lr=lr))]

    sizes = (OBS, ACTION)
    if name == "td3_bc":
        parts = with_adam(module.Actor(*sizes, 1.0), module.Critic(*sizes), module.Critic(*sizes))
        return module.TD3_BC(1.0, *parts, device=device).train
    if name == "iql":
        parts = with_adam(module.GaussianPolicy(*sizes, 1.0), module.TwinQ(*sizes), module.ValueFunction(OBS))
        return module.ImplicitQLearning(1.0, *parts, device=device).train
    if name == "cql":
        critics = with_adam(*(module.FullyConnectedQFunction(*sizes, orthogonal_init=True) for _ in range(2)))
        actor = with_adam(module.TanhGaussianPolicy(*sizes, 1.0), lr=3e-5)
        settings = {"target_entropy": -ACTION, "policy_lr": 3e-5, "bc_steps": 0, "cql_alpha": 10.0}
        return module.ContinuousCQL(*critics, *actor, **settings, device=device).train
    if name in ("sac_n", "edac"):
        parts = with_adam(module.Actor(*sizes, HIDDEN), module.VectorizedCritic(*sizes, HIDDEN, 10))
        trainer = module.SACN if name == "sac_n" else module.EDAC
        return trainer(*parts, alpha_learning_rate=3e-4, device=device).update
    raise SystemExit(f"{name}: this benchmark doesn't know how to run CORL's code.")


def corl_transformer(module: Any, device: str, context: int = 20) -> Callable[[int], None]:
    """CORL's decision transformer with its loop's step; batches are drawn beforehand, so its data loader costs nothing here."""
    parts = {"attention_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1}
    shape = {"seq_len": context, "embedding_dim": 128, "num_layers": 3, "num_heads": 1}
    model = module.DecisionTransformer(OBS, ACTION, **shape, **parts).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4)
    obs, action, reward, _ = (x[: BATCHES["dt"] * context] for x in arrays())
    windows = [x.unflatten(0, (-1, context)).to(device) for x in (obs, action, reward)]
    times = torch.arange(context, device=device).expand(BATCHES["dt"], context)
    mask = torch.ones(BATCHES["dt"], context, device=device)

    def burst(updates: int) -> None:
        for _ in range(updates):
            predicted = model(*windows, times, ~mask.bool())
            loss = (torch.nn.functional.mse_loss(predicted, windows[1], reduction="none") * mask.unsqueeze(-1)).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()
            loss.item()

    return burst


def matmul_burst(who: Contestant) -> Callable[[int], None]:
    """Nothing but hidden layers: products of [256, 256] matrices, one per lane, counted as one "update"."""
    torch.set_num_threads(who.threads)
    a, b = (torch.randn(who.lanes, HIDDEN, HIDDEN, device=who.device) for _ in range(2))
    out = torch.empty_like(a)

    def burst(updates: int) -> None:
        for _ in range(updates):
            torch.bmm(a, b, out=out)
        if who.device != "cpu":
            torch.cuda.synchronize()

    return burst


def peak_burst(who: Contestant) -> Callable[[int], None]:
    """Nothing but multiply-adds in registers; an "update" is 10^9 operations."""
    from offrl.nets import kernels

    with tempfile.TemporaryDirectory() as folder:
        compiler, own = kernels.compiler()
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", *own]
        source, library = str(Path(__file__).with_name("peak.c")), f"{folder}/peak.so"
        subprocess.run([compiler, *flags, source, "-o", library], check=True)
        loop = ctypes.CDLL(library).multiply_add
    loop.argtypes, loop.restype = [ctypes.c_long, ctypes.POINTER(ctypes.c_float)], ctypes.c_long
    total = ctypes.c_float()
    rounds = 10**9 // loop(1, ctypes.byref(total))

    def burst(updates: int) -> None:
        loop(updates * rounds, ctypes.byref(total))

    return burst


def compete(who: Contestant, checkout: Path, seconds: float, clock: str, gate: Any, answers: Any) -> None:
    """One process: warm up, wait for the others, run for `seconds`, answer with seed-updates per second."""
    now = CLOCKS[clock]
    own: dict[str, Callable[[Contestant], Callable[[int], None]]] = {
        "offrl": offrl_burst,
        "matmul": matmul_burst,
        "peak": peak_burst,
    }
    peers = {"official": official_burst, "corl": corl_burst}
    burst = own[who.kind](who) if who.kind in own else peers[who.kind](who, checkout)
    size = 4 if who.agent == "dt" else 16
    burst(size)
    burst(size)
    gate.wait()
    done, began = 0, now()
    while now() - began < seconds:
        burst(size)
        done += size
    answers.put(who.lanes * done / (now() - began))


def run(who: Contestant, checkout: Path, arguments: argparse.Namespace) -> float:
    """Seed-updates per second of the machine; `checkout` is that of the peer's code."""
    if who.kind == "jax" or (who.kind == "corl" and who.agent in CORL_IN_JAX):
        return run_jax(who, checkout, arguments)
    context = multiprocessing.get_context("spawn")
    gate, answers = context.Barrier(who.processes), context.Queue()
    shared = (who, checkout, arguments.seconds, arguments.clock, gate, answers)
    processes = [context.Process(target=compete, args=shared) for _ in range(who.processes)]
    for process in processes:
        process.start()
    total = sum(answer_of(processes, answers) for _ in processes)
    for process in processes:
        process.join()
    return total


def answer_of(processes: list[Any], answers: Any) -> float:
    """The next process's rate; a failed one, whose partner would wait for it, ends them all."""
    while True:
        try:
            answer: float = answers.get(timeout=1)
            return answer
        except queue.Empty:
            if any(process.exitcode for process in processes):
                for process in processes:
                    process.kill()
                raise SystemExit("a contestant failed; see above what it says.") from None


def run_jax(who: Contestant, checkout: Path, arguments: argparse.Namespace) -> float:
    """The same for `jax_corl.py`, which runs in an interpreter of its own."""
    script, cores = Path(__file__).with_name("jax_corl.py"), sorted(os.sched_getaffinity(0))
    command = [arguments.jax_python, str(script), who.agent, str(checkout.resolve()), str(who.threads)]
    processes = [
        subprocess.Popen([*command, str(core)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for core in cores[: who.processes]
    ]
    for process in processes:
        if not process.stdout or process.stdout.readline() != "ready\n":
            raise SystemExit(f"{arguments.jax_python} could not run the code in JAX; see above what it says.")
    answers = []
    for process in processes:
        assert process.stdin
        process.stdin.write(f"{arguments.seconds} {arguments.clock}\n")
        process.stdin.flush()
    for process in processes:
        answers.append(float(process.communicate()[0]))
    return sum(answers)


def flop_per_update(agent: str) -> float:
    """Floating-point operations of one seed's update in matrix products, counted by PyTorch over one period."""
    engine, period = offrl_engine(Contestant("offrl", agent=agent))
    engine.run(0, period)
    with FlopCounterMode(display=False) as counter:
        engine.run(period, period)
    return counter.get_total_flops() / period


def peaks(processes: Iterable[int]) -> list[Contestant]:
    """The multiply-add peak of that many cores; it is not measured without a C compiler."""
    from offrl.nets import kernels

    try:
        kernels.compiler()
    except OSError:
        return []
    return [Contestant("peak", processes=n) for n in dict.fromkeys(processes)]


def contestants(arguments: argparse.Namespace) -> list[Contestant]:
    cores, device, agent = CORES, arguments.device, arguments.agent
    peers = [kind for kind in PEERS if getattr(arguments, kind)]
    engines = arguments.engines.split(",")
    if device != "cpu" or arguments.alone:
        lanes = [int(n) for n in arguments.lanes.split(",")]
        every = [
            Contestant("offrl", n, 1, 1, e, p, device, agent)
            for n in lanes
            for e in engines
            for p in arguments.precisions.split(",")
        ]
        return (
            (peaks([1]) if device == "cpu" else [])
            + every
            + [Contestant("matmul", n, 1, 1, device=device) for n in lanes]
            + [Contestant(kind, device=device, agent=agent) for kind in peers]
        )
    many = int(arguments.lanes.split(",")[-1])
    shapes = [(1, 1, 1), (1, 1, cores), (1, cores, 1), (many, 1, 1), (many, 1, cores), (many, cores, 1)]
    shapes = shapes[:1] if arguments.clock == "processor" else shapes
    kinds = ["offrl", *peers, "matmul"]
    every = peaks(s[2] for s in shapes)
    for kind in kinds:
        for lanes, threads, processes in dict.fromkeys(shapes):
            if kind in PEERS and lanes > 1:
                continue
            if kind == "jax" and agent not in IN_JAX:
                continue
            for engine in engines if kind == "offrl" else ["eager"]:
                if engine == "native" and threads > 1:
                    continue
                for precision in arguments.precisions.split(",") if kind == "offrl" else ["float32"]:
                    every.append(Contestant(kind, lanes, threads, processes, engine, precision, agent=agent))
    return every


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agent", default="td3_bc", help="name of a file in conf/agent")
    parser.add_argument("--official", type=Path, help="checkout of the authors' code of the agent: a2pr")
    parser.add_argument(
        "--corl", type=Path, help="checkout of corl-team/CORL: td3_bc, iql, cql, sac_n, edac, dt, rebrac"
    )
    parser.add_argument("--jax", type=Path, help="checkout of nissymori/JAX-CORL: td3_bc, iql, cql")
    parser.add_argument("--jax-python", default=sys.executable, help="interpreter that has jax, flax, optax, distrax")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lanes", default="10", help="lanes to try, with commas")
    parser.add_argument("--alone", action="store_true", help="one process and one thread alone, as always on a GPU")
    parser.add_argument("--engines", default="auto", help="engines to try, with commas")
    parser.add_argument("--precisions", default="float32", help="float32 and, or, bfloat16")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each contestant in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="processor: one lane on one thread, by processor time, where others use the machine too",
    )
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args()
    everyone = contestants(arguments)
    rates: dict[Contestant, list[float]] = {who: [] for who in everyone}
    for _ in range(arguments.rounds):
        for who in everyone:
            checkout = getattr(arguments, who.kind, None) or Path()
            rates[who].append(run(who, checkout, arguments))
    flop = flop_per_update(arguments.agent)
    middle = {who: statistics.median(values) for who, values in rates.items()}
    best = {kind: max((middle[w], w) for w in everyone if w.kind == kind)[0] for kind in {w.kind for w in everyone}}
    products = best["matmul"] * 2 * HIDDEN**3
    peak = best["peak"] * 1e9 if "peak" in best else None
    print(f"{platform.processor() or platform.machine()}, {CORES} cores, torch {torch.__version__}")
    print(f"an update of one seed: {flop / 1e6:.0f} MFLOP; 256 x 256 products of PyTorch: {products / 1e9:.0f} GFLOP/s")
    print(f"multiply-add peak: {peak / 1e9:.0f} GFLOP/s\n" if peak else "multiply-add peak: not measured\n")
    ceiling, name = (peak, "share of the peak") if peak else (products, "by the products")
    print(f"{'contestant':64} {'seed-updates/s':>14} {'low':>7} {'high':>7} {name:>18}")
    for who in everyone:
        if who.kind in ("matmul", "peak"):
            continue
        share = middle[who] * flop / ceiling
        print(f"{who!s:64} {middle[who]:14.1f} {min(rates[who]):7.1f} {max(rates[who]):7.1f} {share:18.0%}")
    for kind in PEERS:
        if kind in best:
            print(f"\nbest of offrl / best of {kind}: {best['offrl'] / best[kind]:.2f}")
    if arguments.out:
        rows = [{**asdict(who), "seed_updates_per_second": values} for who, values in rates.items()]
        metadata = {
            "flop_per_update": flop,
            "matmul_flop_per_second": products,
            "peak_flop_per_second": peak,
            "torch": torch.__version__,
        }
        arguments.out.write_text(
            json.dumps({**metadata, "machine": platform.platform(), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
