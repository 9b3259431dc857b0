"""Mutated files that offrl keeps for itself: online phases and their replay, runs on histories, caches, sweeps and studies."""

from __future__ import annotations

import json
import resource
from pathlib import Path

from data_inputs import safetensors
from judge import Case
from material import MODEL, TRAIN, TUNE, Material
from mutate import Rng, as_file, bytes_of, copied, json_file, json_lines

BIG = 1 << 20  # bytes; larger files are left as they are


def damaged(path: Path, rng: Rng, outside: tuple[Path, ...]) -> str:
    """One change of a file, of the kind that its suffix asks for; in words."""
    if path.stat().st_size > BIG or rng.random() < 0.15:
        return as_file(path, rng, outside)
    content = path.read_bytes()
    if path.suffix == ".safetensors" and rng.random() < 0.7:
        changed, what = safetensors(content, rng, owner(content))
    elif path.suffix == ".json" and content:
        return json_file(path, rng)
    elif path.suffix in (".jsonl", ".log") and content:
        return json_lines(path, rng)
    else:
        changed, what = bytes_of(content, rng)
    path.write_bytes(changed)
    return f"{path.name}: {what}"


def owner(content: bytes) -> str:
    """The key under which a safetensors file's header holds our JSON; empty where it holds none."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return "offrl" if "offrl" in header.get("__metadata__", {}) else ""


def _files(folder: Path, *patterns: str) -> list[Path]:
    found = {f for pattern in patterns for f in folder.rglob(pattern) if f.is_file() and not f.is_symlink()}
    return sorted(f for f in found if not f.name.startswith(".") or f.name == "failed.json")


# ---- runs with more than the plain ones ------------------------------------------------------------------------------


def online(material: Material, folder: Path, rng: Rng) -> Case:
    """A run that stands in its online phase, or has finished it: replay, rows of episodes, the phase's place, litter."""
    words = ["agent=iql", f"dataset={material.npz}", "out=runs", "name=run", "online.steps=12", "online.eval_every=4"]
    made = material.made("online", [*TRAIN, *words, "keep_checkpoints=true"])
    target = copied(made / "runs/run", folder, "run")
    stopped = rng.random() < 0.7
    if stopped:
        (target / "result.json").unlink()
        kept = sorted((target / "checkpoints").iterdir())
        (target / "checkpoint.safetensors").write_bytes(rng.choice(kept).read_bytes())
    kind = rng.choice(["replay", "replay", "replay", "litter", "rows", "checkpoint", "json"])
    if kind == "replay":
        what = damaged(rng.choice(_files(target / "replay", "*")), rng, material.outside)
    elif kind == "litter":
        what = rng.choice(
            ["x.safetensors", "1-2-3.safetensors", "00000000-00000099.safetensors", "00000000-00000002.safetensors"]
        )
        path = target / "replay" / what
        path.mkdir() if rng.random() < 0.3 and not path.exists() else path.write_bytes(
            rng.choice(_files(target / "replay", "*")).read_bytes()
        )
    else:
        pattern = {"rows": "*.jsonl", "checkpoint": "checkpoint.safetensors", "json": "*.json"}[kind]
        what = damaged(rng.choice([f for f in _files(target, pattern) if f.parent == target]), rng, material.outside)
    name = str(target)
    commands = [["train", f"resume={name}", "progress=false"]] * 6 + [
        ["status", name],
        ["report", name, "--out", "report"],
    ]
    commands += [
        ["finetune", name, *TUNE],
        ["evaluate", name, "--episodes", "1", "--workers", "1"],
        ["select", name, "--updates", "3"],
    ]
    return Case(rng.choice(commands), f"{kind} ({'stopped' if stopped else 'finished'}): {what}", target)


def history(material: Material, folder: Path, rng: Rng) -> Case:
    """A run on encodings of histories: its checkpoint and configuration; evaluated, exported, resumed, continued."""
    encoder = rng.choice(["gru", "window"])
    words = [
        "agent=td3_bc",
        f"dataset={material.npz}",
        "out=runs",
        "name=run",
        f"history={encoder}",
        "history.context=3",
    ]
    made = material.made(encoder, [*TRAIN, *words, "keep_checkpoints=true"])
    target = copied(made / "runs/run", folder, "run")
    if rng.random() < 0.5:
        (target / "result.json").unlink()
        (target / "checkpoint.safetensors").write_bytes(sorted((target / "checkpoints").iterdir())[0].read_bytes())
    path = target / rng.choice(["checkpoint.safetensors", "checkpoint.safetensors", "config.json"])
    what, name = damaged(path, rng, material.outside), str(target)
    commands = [["train", f"resume={name}", "progress=false"], ["evaluate", name, "--episodes", "1", "--workers", "1"]]
    commands += [
        ["export", name, "--format", "torchscript", "--out", "policy.pt"],
        ["finetune", name, *TUNE],
        ["probe", name],
    ]
    return Case(rng.choice(commands), f"{encoder}: {what}", target)


# ---- caches ----------------------------------------------------------------------------------------------------------


def home(material: Material, folder: Path, rng: Rng) -> Case:
    """What lies in OFFRL_HOME: flat caches, built datasets, fitted models, downloads and their sums."""
    place = material.place / "made/home"
    env = {"OFFRL_HOME": str(place / "kept")}
    train = [*TRAIN, "out=runs", "eval.every=0", "eval.final_episodes=0"]
    chain = "forge/bandit/p0.4-v0"
    plain = [*train, "agent=bc", f"dataset={material.npz}"]
    model = ["augment", "train", f"dataset={material.npz}", *MODEL]
    fetched, built = ["data", "info", "hopper-medium-v2", "--json"], ["data", "info", chain, "--json"]
    material.made("home", plain, model, ["data", "build", chain, "--size", "300"], env=env)
    kept = place / "kept"
    if not (kept / "d4rl").exists():
        (kept / "d4rl").mkdir()
        (kept / "d4rl/hopper-medium-v2.hdf5").write_bytes(material.hdf5.read_bytes())
        (kept / "d4rl/hopper-medium-v2.hdf5.sha256").write_text("0" * 64 + "  hopper-medium-v2.hdf5\n")
    target = copied(kept, folder, "kept")
    commands = {
        "flat": plain, "forge": rng.choice([built, [*built[:-1], "--plot", "x.png"]]), "d4rl": fetched,
        "augment": rng.choice([model, ["augment", "sample", "x.npz", *model[2:]]]),
    }  # fmt: skip
    parts = {p.name: _files(p, "*") for p in sorted(target.iterdir()) if p.is_dir() and p.name in commands}
    part = rng.choice([name for name, files in parts.items() if files])
    what = damaged(rng.choice(parts[part]), rng, material.outside)
    words = commands[part]
    if part == "d4rl" and rng.random() < 0.5:
        words = ["data", "fetch", "hopper-medium-v2", "--base-url", "http://127.0.0.1:9/"]
    return Case(words, f"{part}: {what}", env={"OFFRL_HOME": str(target)})


# ---- sweeps ----------------------------------------------------------------------------------------------------------


def sweep(material: Material, folder: Path, rng: Rng) -> Case:
    """The folder of a finished study: Optuna's journal, notes of failed jobs, the sweep's configuration; asked again."""
    base = ["hydra/sweeper=optuna", "agent=td3_bc", "agent.alpha=interval(1,5)", f"dataset={material.npz}"]
    words = [*TRAIN, "-m", *base, "out=search", "hydra.sweeper.n_trials=2", "eval.every=0"]
    made = material.made("study", words)
    target = copied(made / "search", folder, "search")
    (target / ".sweep").mkdir(exist_ok=True)
    (target / ".sweep/failed.json").write_text(json.dumps({"agent=nope": "there is no such agent"}))
    files = (
        [target / "optuna.log"] * 4 + [target / ".sweep/failed.json"] * 2 + _files(target, "multirun.yaml", "*.json")
    )
    path = rng.choice(files)
    what = damaged(path, rng, material.outside)
    asked = ["status", "search"] if path.name == "failed.json" else words
    return Case(rng.choice([asked, asked, ["status", "search"]]), what, sweep=True)


# ---- surroundings ----------------------------------------------------------------------------------------------------

ODD_PLACES = ["", "/dev/null", "/dev/null/x", "/proc/x", "x" * 300, "~nobody_at_all/x", "a\nb", "."]


def surroundings(material: Material, folder: Path, rng: Rng) -> Case:
    """Honest commands with a full disk, few descriptors, a full standard output, odd environment variables."""
    run = copied(rng.choice([material.finished, material.stopped]), folder, "run")
    name, data = str(run), str(material.npz)
    trained = [*TRAIN, "agent=td3_bc", f"dataset={data}", "out=runs"]
    commands = [
        ["data", "info", data], ["data", "info", data, "--json"], ["data", "convert", data, "x.npz"], ["data", "list"],
        ["data", "convert", data, "x.hdf5"], ["data", "convert", data, "x-v0"], ["data", "convert", data, "x.safetensors"],
        ["data", "build", "forge/bandit/p0.4-v0", "--size", "300"], ["report", name], ["status", name],
        ["agents"], ["agents", "iql"],
        ["evaluate", name, "--episodes", "1", "--workers", "1"], ["evaluate", name, "--episodes", "1", "--workers", "2"],
        ["evaluate", name, "--episodes", "1", "--workers", "1", "--record", "recorded-v0"],
        ["export", name, "--format", "torchscript"],
        trained, trained, [*trained, "eval.workers=2"], ["train", f"resume={name}", "progress=false"],
        ["finetune", name, *TUNE],
        ["augment", "train", f"dataset={data}", *MODEL], ["augment", "sample", "x.npz", f"dataset={data}", *MODEL],
        ["select", name, "--updates", "3", "--hidden", "8"], ["probe", name, "--updates", "3", "--episodes", "1", "--json"],
    ]  # fmt: skip
    words = rng.choice(commands)
    kind = rng.choice(["disk", "disk", "disk", "descriptors", "output", "variable", "variable"])
    limits: dict[int, int] = {}
    env = {"OFFRL_HOME": str(folder / "home")}
    if kind == "disk":
        what = rng.choice([4096, 8192, 20_000, 100_000])  # the sentence itself goes to a file
        limits[resource.RLIMIT_FSIZE] = what
    elif kind == "descriptors":
        what = rng.choice([16, 24, 40])
        limits[resource.RLIMIT_NOFILE] = what
    elif kind == "variable":
        key = rng.choice(
            [
                "OFFRL_HOME",
                "HOME",
                "XDG_CACHE_HOME",
                "D4RL_DATASET_DIR",
                "MINARI_DATASETS_PATH",
                "TMPDIR",
                "COLUMNS",
                "TERM",
            ]
        )
        value = rng.choice(ODD_PLACES)
        env, what = env | {key: value}, f"{key}={value[:20]!r}"
        if key in ("HOME", "XDG_CACHE_HOME"):
            env["OFFRL_HOME"] = ""
    else:
        what = "/dev/full"
    told = f"{kind}: {what}"
    return Case(words, told, env=env, limits=limits, stdout="/dev/full" if kind == "output" else None)
