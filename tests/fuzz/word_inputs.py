"""Odd words of every command, and YAML files of a `--config-dir`."""

from __future__ import annotations

import re
from pathlib import Path

from judge import CANARY, Case
from material import MODEL, TRAIN, TUNE, Material
from mutate import Rng, bytes_of, copied

from offrl.utils.paths import conf_dir

VALUES = [
    "", "0", "-1", "1e30", "1e400", "nan", "inf", "9" * 400, "٣", "1_0", "0x10", "true", "null", "[]", "[0]", "[-1]",
    "[[1]]", "[100000000]",
    "{}", "{a: 1}", "${nope}", "${oc.env:HOME}", "${oc.env:NOPE_X}", "choice(1,2)", "range(1,3)", "1,2", "'", '"',
    "a b", "../../x", "/", "/dev/zero",
    "x" * 400, "é", "[red]x[/red]", "two\nlines", "\x1b[31m", "\ud800", "nope", f"{CANARY}.Thing",
    f"{CANARY}:Thing-v0", "os.system", "~", "=", "*",
    "@x", "\\", "(", "]", "!!python/object:os.system", "hopper-medium-v2", "forge/hopper/nope-v0", "D4RL/../x",
    "cuda:99", "meta", "bfloat16",
]  # fmt: skip
TRAIN_KEYS = [
    "dataset", "seed", "lanes", "seeds", "updates", "batch_size", "device", "engine", "updates_per_launch",
    "precision", "threads", "log_every",
    "checkpoint_every", "keep_checkpoints", "out", "name", "label", "fresh", "progress", "tracker", "data.semantics",
    "data.action_bound",
    "data.reward_scale", "data.reward_normalize", "data.size", "data.seed", "data.nope", "data", "eval", "eval.every",
    "eval.episodes",
    "eval.final_episodes", "eval.seed", "eval.workers", "eval.slots", "agent", "agent.hidden", "agent.lr",
    "agent._target_", "agent.nope", "sampler",
    "sampler.temperature", "augment", "preset", "experiment", "suite", "hydra/launcher", "hydra.run.dir",
    "hydra.sweep.dir", "resume", "nope", "",
    "hydra.searchpath", "hydra.mode", "hydra",
    "online.steps", "online.burst", "online.updates_per_step", "online.offline_share", "online.random_steps",
    "online.noise", "online.recompute_every", "online.eval_every", "online.agent.lr", "online.anneal.alpha", "online",
    "history", "history.encoder", "history.context", "history.nope", "data.mask", "data.flicker", "data.tasks", "data.family",
    "eval.env_kwargs.g", "eval.max_episode_steps", "eval.ref_min", "eval.ref_max",
]  # fmt: skip
FLAGS = [
    "--cfg", "--cfg=job", "--cfg=all", "-m", "--multirun", "--config-name=zz", "--config-path=/", "--info", "--help",
    "-h", "--resolve", "--package", "--hydra-help", "-cd", "--config-dir", "--config-dir=nope", "--trust",
    "--version", "-c", "--", "-", "---", "--nope", "-x",
]  # fmt: skip
# Not --env and eval.env: whoever names a module there has it imported.
OPTIONS = {
    "data": [
        "--action-bound",
        "--action-low",
        "--action-high",
        "--as-family",
        "--semantics",
        "--plot",
        "--json",
        "--family",
        "--size",
    ],
    "report": ["--last-k", "--metric", "--out"],
    "status": ["--json"],
    "evaluate": [
        "--episodes",
        "--seed",
        "--workers",
        "--lane",
        "--video",
        "--record",
        "--env-kwargs",
        "--max-episode-steps",
        "--ref-min",
        "--no-save",
    ],
    "export": ["--format", "--lane", "--out"],
    "select": [
        "--updates",
        "--batch-size",
        "--lr",
        "--discount",
        "--target-every",
        "--hidden",
        "--device",
        "--seed",
        "--out",
    ],
    "probe": ["--episodes", "--updates", "--plot"],
    "augment": ["--policy", "--lane", "--seed", "--out", "--coefficients", "--transitions", "--behaviour-std"],
}
AGENTS = sorted(path.stem for path in (conf_dir() / "agent").glob("*.yaml"))


def train(material: Material, folder: Path, rng: Rng) -> Case:
    """`offrl train` with one or two odd words."""
    words = [*TRAIN, "agent=bc", f"dataset={material.npz}", "out=runs"]
    odd = []
    for _ in range(rng.choice([1, 1, 2])):
        kind = rng.choice(["set"] * 6 + ["prefix", "flag", "raw", "without"])
        key, value = rng.choice(TRAIN_KEYS), rng.choice(VALUES)
        if kind == "set":
            words = [w for w in words if not w.startswith(f"{key}=")]
            odd.append(f"{key}={value}")
        elif kind == "prefix":
            odd.append(
                rng.choice(["+", "++", "~", "~+", " ", "-"]) + key + rng.choice(["", "=", f"={value}", f"=={value}"])
            )
        elif kind == "flag":
            odd.append(rng.choice(FLAGS))
        elif kind == "raw":
            odd.append(value)
        else:
            # Their defaults are a million updates and a dataset that is built first.
            gone = rng.choice([w for w in words[1:] if not w.startswith(("updates=", "dataset="))])
            words.remove(gone)
            odd.append(f"without {gone}")
    added = [w for w in odd if not w.startswith("without ")]
    return Case(
        [*words, *added],
        " ".join(odd),
        sweep=bool({"-m", "--multirun"} & set(words + added)) or "suite" in " ".join(added),
    )


def others(material: Material, folder: Path, rng: Rng) -> Case:
    """The other commands: honest words with one or two of them replaced, removed or added."""
    run = copied(rng.choice([material.finished, material.stopped]), folder, "run")
    model = ["augment", "train", f"dataset={material.npz}", *MODEL]
    bases = [
        ["data", "info", str(material.npz)], ["data", "info", str(material.npz), "--action-bound", "2"],
        ["data", "list"],
        ["data", "list", "--family", "kitchen"], ["data", "convert", str(material.npz), "out.npz"],
        ["data", "build", "forge/chain/v0"],
        ["report", str(run), "--last-k", "3", "--out", "report"],
        ["report", str(run), "--metric", "score", "--out", "report"],
        ["status", str(run)], ["status", str(folder)], ["evaluate", str(run), "--episodes", "1", "--workers", "1"],
        ["evaluate", str(run), "--episodes", "1", "--seed", "3"], ["agents"], ["agents", "bc"],
        ["agents", rng.choice(AGENTS)],
        ["select", str(run), "--updates", "3", "--hidden", "8", "--out", "select"], ["probe", str(run)], [],
        ["evaluate", str(run), "--episodes", "1", "--workers", "1", "--record", "recorded-v0"],
        ["evaluate", str(run), "--episodes", "1", "--workers", "1", "--video", "x.gif"], ["completion", "bash"],
        ["export", str(run), "--format", "torchscript"], ["export", str(run), "--lane", "0", "--out", "x.onnx"],
        ["data", "fetch", "hopper-medium-v2", "--base-url", "http://127.0.0.1:9/"],
        ["augment", "metrics", str(run), "--transitions", "64", "--coefficients", "0", *MODEL],
        ["finetune", str(run), *TUNE], ["finetune", str(run), *TUNE], model, ["augment", "sample", "made.npz", *model[2:]],
    ]  # fmt: skip
    words = list(rng.choice(bases))
    done = []
    for _ in range(rng.choice([1, 1, 2])):
        kind = rng.choice(["replace", "replace", "replace", "remove", "add", "option", "option", "option"])
        # Without its small sizes a command would honestly take hours.
        at = rng.choice([i for i, word in enumerate(words) if i and not SIZE.match(word)] or [0])
        value = rng.choice(VALUES)
        if kind == "replace" and len(words) > 1:
            words[at] = value
        elif kind == "remove" and words:
            del words[at]
        elif kind == "option" and words[:1] == ["finetune"]:
            words.append(f"{rng.choice(TRAIN_KEYS)}={value}")
        elif kind == "option":
            words += [rng.choice(OPTIONS.get(words[0] if words else "", ["--config-dir"])), value]
        else:
            words.insert(at + 1, rng.choice([value, rng.choice(FLAGS)]))
        done.append(kind)
    return Case(words, ", ".join(done))


SIZE = re.compile(r"(online\.steps|augment\..*)=")
YAMLS = [
    "", "text", "- a\n- b\n", "[", "{a: ", "a: 1\na: 2\n", "\tx: 1\n", "a: *b\n", "a: &a [*a]\n", "? {a: 1}\n: 2\n",
    "1: 2\n", "null: 1\n", "\0", "\ufeffa: 1\n",
    "!!python/object/apply:os.system ['true']\n", f"!!python/name:{CANARY}.Thing\n", "a: !x 1\n", "--- 1\n--- 2\n",
    "updates: text\n", "updates: [1, 2]\n",
    "defaults:\n  - nope\n", "defaults: nope\n", "defaults:\n  - _self_\n  - agent: nope\n",
    "defaults:\n  - override /agent: nope\n", "# @package _global_\nupdates: -1\n",
    "# @package _global_\nnope: 1\n", "# @package _global_\nagent: 5\n",
    "# @package _global_\nagent: {_target_: " + CANARY + ".Thing}\n", "_target_: os.system\ncommand: true\n",
    f"_target_: {CANARY}.Thing\n", "_target_: [1]\n", "_target_: 5\n", "_target_: ''\n", "hidden: [8]\n",
    "_target_: offrl.agents.bc.BC\nnope: 1\n", "x: ${nope}\n",
    "# @package _global_\nhydra: {run: {dir: 5}}\n", "# @package _global_\ndataset: ${oc.env:NOPE_X}\n",
    "# @package _global_\nupdates: ${updates}\n", "a: " + "[" * 3000 + "\n",
    "".join(f"{b}: &{b} [{','.join(['*' + a if a != '-' else 'x'] * 9)}]\n" for a, b in ("-a", "ab", "bc", "cd")),
    "# @package ]\nx: 1\n",
    "\ud800", "updates: 1e400\n", "updates: 2001-01-01\n", "updates: 0o17\n", "updates: .nan\n", "é: 1\n",
    "? [a]\n: 1\n", "# @package _global_\neval: 3\n", "# @package _global_\ndata: null\n",
]  # fmt: skip


def yaml(material: Material, folder: Path, rng: Rng) -> Case:
    """A file of a user's configuration folder, chosen by name; without trust, since `--config-dir` gives it, names run nothing.

    Naming a folder is the user's trust in the code that its files name, so these don't name the canary as a `_target_`.
    """
    group = rng.choice(["preset", "agent", "sampler", "experiment", "suite", "augment"])
    (folder / "mine" / group).mkdir(parents=True)
    path = folder / "mine" / group / "x.yaml"
    texts = [text for text in YAMLS if "_target_: " + CANARY not in text]
    honest = "# @package _global_\nupdates: 6\nagent: {hidden: [8]}\n"
    kind = rng.choice(["text", "text", "text", "bytes", "file"])
    if kind == "bytes":
        data, what = bytes_of(honest.encode(), rng)
        path.write_bytes(data)
    elif kind == "file":
        what = rng.choice(["folder", "loop", "unreadable name"])
        path = path.with_name("x\n.yaml") if what == "unreadable name" else path
        path.mkdir() if what == "folder" else path.symlink_to("x.yaml") if what == "loop" else path.write_text("a: 1")
    else:
        text = rng.choice(texts)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        what = repr(text[:60])
    words = [*TRAIN, f"dataset={material.npz}", "out=runs", "--config-dir", str(folder / "mine"), f"{group}=x"]
    return Case(
        words if group == "agent" else [*words, "agent=bc"],
        f"{group}/x.yaml: {what}",
        sweep=group in ("suite", "experiment"),
    )
