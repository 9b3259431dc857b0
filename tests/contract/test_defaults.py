"""Defaults of every method against what its authors published: a changed default is another method under the same name.

`PUBLISHED` holds each field of each `Config`. Where nobody published a value, or ours differs, the comment says so.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from offrl.agents.base import Spec
from offrl.augment.world_model import EnsembleConfig
from offrl.evaluation.fqe import FQEConfig
from offrl.utils.paths import conf_dir
from offrl.utils.settings import chosen_settings

AGENTS = {path.stem: OmegaConf.load(path) for path in sorted((conf_dir() / "agent").glob("*.yaml"))}

ADAM = {"actor_lr": 3e-4, "critic_lr": 3e-4}
BACKUP = {"discount": 0.99, "tau": 0.005}
SMOOTHING = {"policy_noise": 0.2, "noise_clip": 0.5}
TWO, THREE = (256, 256), (256, 256, 256)
NOT_SAMPLED = {"sample_actions": False}  # ours: the authors have continuous actions

# sfujim/TD3_BC `main.py`.
TD3_BC = {"alpha": 2.5, **BACKUP, **SMOOTHING, **ADAM, "hidden": TWO, "normalize_obs": True}
# corl-team/CORL `sac_n.py`; N as on HalfCheetah. The target entropy is minus the number of actions.
SAC_N = {"members": 10, "target_entropy": None, **BACKUP, **ADAM, "alpha_lr": 3e-4, "hidden": THREE}
SAC_N |= {"normalize_obs": False}
# kzl/decision-transformer `gym/experiment.py`; the return's scale is 1000 for its robots, which the tables of `conf` say.
DT = {"context": 20, "target_return": None, "return_scale": 1.0, "embed": 128, "layers": 3, "heads": 1, "dropout": 0.1}
DT |= {"lr": 1e-4, "warmup": 10_000, "weight_decay": 1e-4, "grad_clip": 0.25, "max_length": 1000}
DT |= {"count_padding": False, **NOT_SAMPLED, "normalize_obs": True}
# google-research/dice_rl (Yang et al. 2023): AdamW's decay, the clip, N and the prior's weight. Ours: latents of 16 kinds,
# futures of 64 steps, the networks and their rate, the least mass.
VAE_BC = {"latent": "categorical", "latent_size": 16, "suffix": 64, "candidates": 100, "least_mass": 0.01, "hold": None}
VAE_BC |= {"kl_weight": 1.0, "lr": 3e-4, "weight_decay": 1e-4, "grad_clip": 0.25, "hidden": TWO, **NOT_SAMPLED}
VAE_BC |= {"normalize_obs": True}

# seohongpark/fql. Ours: a normalised Q with alpha 1, which the authors advise for new tasks; lcb and its weight are those of
# ColinQiyangLi/qam.
FOUR, SAMPLED = (512, 512, 512, 512), {"sample_actions": True, "normalize_obs": False}
FLOW_BC = {"flow_steps": 10, "lr": 3e-4, "hidden": FOUR, **SAMPLED}
FQL = {**FLOW_BC, "alpha": 1.0, "normalize_q": True, "target": "mean", "pessimism": 0.5, "members": 2, **BACKUP}
FQL |= {"critic_norm": True, "action_chunk": 1}
IFQL = {"policy": "flow", "candidates": 32, "expectile": 0.9, "denoising_steps": 5, **BACKUP, "norm": True, **FLOW_BC}

# yihaosun1124/OfflineRL-Kit, `run_example/run_mopo.py`, and `run_mobile.py` with the clamp of `mobile.py`; its c is one set's.
MOPO = {"members": 2, "alpha": None, "target_entropy": None, **BACKUP, "actor_lr": 1e-4, "critic_lr": 3e-4}
MOPO |= {"actor_decay": 0, "alpha_lr": 1e-4, "hidden": TWO, "normalize_obs": False}

PUBLISHED: dict[str, dict[str, Any]] = {
    "mopo": MOPO,
    "mobile": {**MOPO, "penalty": 0.5, "draws": 10, "target_min": 0.0, "backup_entropy": False},
    "flow_bc": {**FLOW_BC, "action_chunk": 1},
    "fql": FQL,
    "ifql": IFQL,
    # philippe-eecs/IDQL sweeps N over 16, 64 and 256; the networks and rates are those of IFQL.
    "idql": {**IFQL, "policy": "denoising", "candidates": 64},
    # Zhendong-Wang/Diffusion-Policies-for-Offline-RL: the class's defaults, T and eta of main.py for locomotion, and its
    # schedule of 2,000 epochs, stepped once in 50,000 updates.
    "dql": {
        "eta": 1.0,
        "denoising_steps": 5,
        "candidates": 50,
        "max_backup": False,
        "backup_actions": 10,
        "ema_tau": 0.005,
        "ema_every": 5,
        "ema_start": 1000,
        **BACKUP,
        **ADAM,
        "lr_decay": 2000 * 50_000,
        "grad_clip": 1.0,
        "hidden": THREE,
        **SAMPLED,
    },
    # corl-team/CORL `any_percent_bc.py`.
    "bc": {"lr": 3e-4, "hidden": TWO, **NOT_SAMPLED, "normalize_obs": True},
    "td3_bc": TD3_BC,
    # LAMDA-RL/PRDC, the README's commands for Hopper and Walker2d (its argparse has beta 1).
    "prdc": {**TD3_BC, "beta": 2.0, "k": 1},
    # ltlhuuu/A2PR: the class's defaults and, for the mask, the README's on two of three sets (its argparse: 0.5).
    "a2pr": {
        **TD3_BC,
        "bc_weight": 1.0,
        "vae_weight": 1.0,
        "vae_adv_eps": 0.0,
        "detach_reference": False,
        "value_lr": 3e-4,
        "vae_lr": 1e-3,
        "hidden": THREE,
        "vae_hidden": (750, 750),
    },
    # corl-team/CORL `awac.py` and its locomotion configurations.
    "awac": {"temperature": 0.3333, "max_weight": 100.0, **BACKUP, **ADAM, "hidden": THREE, "normalize_obs": True},
    # corl-team/CORL `finetune/spot.py` and its configurations; lambda is that of the hands.
    "spot": {
        "weight": 1.0,
        "kl_weight": 0.5,
        "vae_updates": 100_000,
        **BACKUP,
        **SMOOTHING,
        "actor_lr": 1e-4,
        "critic_lr": 3e-4,
        "vae_lr": 1e-3,
        "hidden": TWO,
        "vae_hidden": (750, 750),
        "normalize_obs": False,
    },
    # ikostrikov/rlpd, `configs/rlpd_config.py` and the commands of its README for locomotion; the target entropy is minus half
    # the number of actions.
    "rlpd": {
        "members": 10,
        "subset": 2,
        "critic_updates": 20,
        "backup_entropy": True,
        "target_entropy": None,
        **BACKUP,
        **ADAM,
        "alpha_lr": 3e-4,
        "hidden": TWO,
        "critic_norm": True,
        "normalize_obs": False,
    },
    # corl-team/CORL `finetune/cal_ql.py`, whose settings for AntMaze the table has.
    "cal_ql": {
        "cql_alpha": 10.0,
        "actions": 10,
        "temperature": 1.0,
        "diff_min": -math.inf,
        "lagrange": False,
        "gap": 5.0,
        "max_backup": False,
        "backup_entropy": False,
        "bc_steps": 0,
        **BACKUP,
        "actor_lr": 3e-5,
        "critic_lr": 3e-4,
        "hidden": THREE,
        "critic_hidden": None,
        "normalize_obs": True,
        "calibrate": True,
        "sparse_rewards": False,
    },
    # corl-team/CORL `cql.py` and its locomotion configurations; the gap is that of its Maze2D ones, where alone it is used.
    "cql": {
        "cql_alpha": 10.0,
        "actions": 10,
        "temperature": 1.0,
        "diff_min": -math.inf,
        "lagrange": False,
        "gap": 5.0,
        "max_backup": False,
        "backup_entropy": False,
        "bc_steps": 0,
        **BACKUP,
        "actor_lr": 3e-5,
        "critic_lr": 3e-4,
        "hidden": THREE,
        "critic_hidden": None,
        "normalize_obs": True,
    },
    # The weight is that of the paper for 20 % of Atari's online data; the rest is ours.
    "discrete_cql": {"cql_alpha": 1.0, **BACKUP, "critic_lr": 3e-4, "hidden": TWO, "normalize_obs": True},
    # corl-team/CORL `iql.py`; the rate falls over its 1M updates.
    "iql": {
        "expectile": 0.7,
        "beta": 3.0,
        "max_weight": 100.0,
        **BACKUP,
        "value_fit": "expectile",
        "regularization": 1.0,  # of ryanxhr/IVR, SQL on locomotion
        "deterministic": False,
        "dropout": 0.0,
        **ADAM,
        "value_lr": 3e-4,
        "actor_decay": 1_000_000,
        "hidden": TWO,
        "normalize_obs": True,
    },
    # tinkoff-ai/ReBRAC; its two weights differ between all sets: ours is the pair of hopper-medium.
    "rebrac": {
        "actor_bc": 0.01,
        "critic_bc": 0.01,
        **BACKUP,
        **SMOOTHING,
        **ADAM,
        "hidden": THREE,
        "critic_norm": True,
        "normalize_obs": False,
        # Off: ColinQiyangLi/qam's ensembles, seohongpark/fql's networks, EmptyJackson/unifloral's TD3-AWR.
        "members": 2,
        "pooling": "min",
        "pessimism": 0.5,
        "activation": "relu",
        "actor_norm": False,
        "awr": False,
        "awr_beta": 3.0,
        "expectile": 0.7,
    },
    # `run_combo.py` of the same, whose log-sum-exp is not pooled; ours: w, that of three sets (its argparse: 5).
    "combo": {
        "cql_alpha": 0.5,
        "lowered": "mix",
        "pooled": True,
        "actions": 10,
        "temperature": 1.0,
        "diff_min": -math.inf,
        "lagrange": False,
        "gap": 5.0,
        "max_backup": False,
        "backup_entropy": False,
        "bc_steps": 0,
        **BACKUP,
        "actor_lr": 1e-4,
        "actor_decay": 0,
        "critic_lr": 3e-4,
        "hidden": THREE,
        "critic_hidden": None,
        "normalize_obs": False,
    },
    "sac_n": SAC_N,
    # corl-team/CORL `edac.py`: N and eta of most locomotion sets.
    "edac": {**SAC_N, "eta": 1.0},
    "dt": DT,
    # keirp/return_transforms, connect four: 5 epochs of 100,000 trajectories in batches of 100, and as its other tasks
    # have it one for returns; four groups of 32 kinds. Futures of 64 steps are ours.
    "esper": {
        **DT,
        "cluster_updates": 5000,
        "return_updates": 1000,
        "suffix": 64,
        "groups": 4,
        "kinds": 32,
        "action_weight": 0.05,
        "adversary_weight": 1.0,
        "label_step": 0.1,
        "cluster_lr": 1e-4,
        "adversary_lr": 5e-4,
        "label_hidden": (512, 512),
        "label_decay": 0.01,
    },
    # scottemmons/rvs, configuration `gym_rvs_r`: the average return, nothing standardised. The return to ask for is ours.
    "rvs": {
        "target_return": None,
        "average": True,
        "return_scale": 1.0,
        "lr": 1e-3,
        "hidden": (1024, 1024),
        "orthogonal_init": False,
        **NOT_SAMPLED,
        "normalize_obs": False,
    },
    "vae_bc": VAE_BC,
    # The energy takes one step of its own; its weight, warm-up and networks are ours, and so is `squeeze`.
    "doc": {
        **VAE_BC,
        "beta": 2.0,
        "beta_warmup": 1000,
        "posterior_kl_weight": 0.0,
        "energy_steps": 1,
        "energy_lr": 3e-4,
        "energy_size": 64,
    },
}


def agent_class(name: str) -> Any:
    return get_class(AGENTS[name]._target_)


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_are_the_published_ones(name: str) -> None:
    """All of them: a field that is not in the table is missing there."""
    assert asdict(agent_class(name).Config()) == PUBLISHED[name]


def test_what_no_setting_says() -> None:
    """The actor's delay of TD3, and what is added to the observations' deviation before dividing by it."""
    delayed = {name for name in PUBLISHED if agent_class(name).period == 2}
    assert delayed == {"td3_bc", "prdc", "a2pr", "rebrac", "spot"}
    assert all(agent_class(name).period == 1 for name in PUBLISHED if name not in delayed)
    eps = {name: agent_class(name).obs_eps for name in PUBLISHED}
    assert {name for name, value in eps.items() if value == 1e-6} == {"dt", "esper"}  # kzl/decision-transformer
    assert {value for name, value in eps.items() if name not in ("dt", "esper")} == {1e-3}  # sfujim/TD3_BC, CORL


def test_fitted_q_evaluation_and_the_world_model() -> None:
    # takuseno/d3rlpy `FQEConfig`: rate, discount, copies of the target. The rest is ours.
    fqe = {"lr": 1e-4, "discount": 0.99, "target_every": 100}
    fqe |= {"updates": 100_000, "batch_size": 256, "hidden": TWO, "held_out": 0.1, "seed": 0}
    assert asdict(FQEConfig()) == fqe
    # EmptyJackson/unifloral `dynamics.py`; ours: updates, which stand for its 400 passes.
    world = {"members": 7, "elites": 5, "hidden": (200, 200, 200, 200), "batch_size": 256, "lr": 1e-3}
    world |= {"weight_decay": 2.5e-5, "bound_weight": 0.01, "holdout": 0.2, "updates": 20_000, "seed": 0}
    assert asdict(EnsembleConfig()) == world


# ---- settings that differ between datasets --------------------------------------------------------------------

GYM = [f"{robot}-{level}-v2" for robot in ("halfcheetah", "hopper", "walker2d") for level in
       ("medium", "medium-replay", "medium-expert")]  # fmt: skip
ANTMAZE = [f"antmaze-{maze}-v2" for maze in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play",
                                             "large-diverse")]  # fmt: skip
MAZE2D = [f"maze2d-{maze}-v1" for maze in ("umaze", "medium", "large")]
HANDS = [f"{hand}-{kind}-v1" for hand in ("pen", "door", "hammer", "relocate") for kind in
         ("human", "cloned", "expert")]  # fmt: skip
CORL = [*GYM, *ANTMAZE, *MAZE2D, *HANDS]


def tabled(names: list[str], settings: list[str], rows: list[Any]) -> dict[str, dict[str, Any]]:
    """Values by dataset; a row is one number, or one for every setting."""
    assert len(names) == len(rows)
    return {
        name: dict(zip(settings, row if isinstance(row, tuple) else (row,), strict=True))
        for name, row in zip(names, rows)
    }


# corl-team/CORL, `configs/offline/{sac_n,edac,rebrac}`, in the order of `CORL`.
N = [10, 10, 10, 500, 200, 200, 20, 20, 20, *[25] * 9, *[100] * 12]
ETA = [
    (10, 1),
    (10, 1),
    (10, 5),
    (50, 1),
    (50, 1),
    (50, 1),
    (10, 1),
    (10, 1),
    (10, 5),
    *[(10, 1)] * 6,
    *[(10, 0.1)] * 3,
]
ETA += [(20, 1000), (20, 10), (20, 10), *[(50, 200)] * 9]
BETAS = [(0.001, 0.01), (0.01, 0.001), (0.01, 0.1), (0.01, 0.01), (0.05, 0.5), (0.1, 0.01), (0.05, 0.1), (0.05, 0.01)]
BETAS += [(0.01, 0.01), (0.003, 0.002), (0.003, 0.001), (0.001, 0.0005), (0.001, 0), (0.002, 0.001), (0.002, 0.002)]
BETAS += [*[(0.003, 0.001)] * 3, (0.1, 0.5), (0.05, 0.5), (0.01, 0.01), (0.1, 0.1), (0.01, 0.1), (0.05, 0.01)]
BETAS += [(0.01, 0.5), (0.1, 0.5), (0.01, 0.01), (0.1, 0.01), (0.1, 0.01), (0.05, 0.01)]
# corl-team/CORL `iql`: expectile, beta, tau, deterministic, dropout.
USUAL = (0.7, 3.0, 0.005, False, 0.0)
IQL = [*[USUAL] * 3, *[(0.7, 3.0, 0.001, True, 0.0)] * 2, (0.5, 6.0, 0.005, False, 0.0), *[USUAL] * 3]
IQL += [*[(0.9, 10.0, 0.005, False, 0.0)] * 6, *[USUAL] * 3, *[(0.8, 3.0, 0.005, False, 0.1)] * 12]
# corl-team/CORL `cql`: the policy's rate, weight, Lagrange, gap where there is one, best of several next actions, clip.
CQL = [*[(3e-5, 10.0, False, 5.0, False, -math.inf)] * 9, *[(1e-4, 5.0, True, 0.8, True, -200.0)] * 6]
CQL += [*[(3e-5, 10.0, True, 5.0, False, -math.inf)] * 3, *[(1e-4, 1.0, False, 5.0, False, -math.inf)] * 12]
# kzl/decision-transformer's first returns and scale, and CORL's.
RETURNS = [*[(12000, 1e-3)] * 3, *[(3600, 1e-3)] * 3, *[(5000, 1e-3)] * 3, *[(1, 1)] * 6, *[(280, 1)] * 3]
RETURNS += [*[(3100, 1)] * 3, *[(2900, 1)] * 3, *[(12800, 1)] * 3, *[(4300, 1)] * 3]
# corl-team/CORL `awac`.
LAMBDA = [*[0.3333] * 9, *[0.1] * 21]
# LAMDA-RL/PRDC's README: HalfCheetah, Hopper, Walker2d, AntMaze.
PRDC = [*[(40.0, 2.0)] * 3, *[(2.5, 2.0)] * 6, *[(7.5, 7.5)] * 6]
# The same runs' rollouts and penalties, in the order of `GYM`.
LENGTHS = [5, 5, 5, 5, 5, 5, 5, 1, 1]
MOPO_ROWS = list(zip(LENGTHS, [0.5, 0.5, 2.5, 5.0, 2.5, 5.0, 0.5, 2.5, 2.5]))
# yihaosun1124/mobile `configs`: h, c, real share, alpha.
MOBILE_ROWS = list(zip(LENGTHS, [0.5, 0.1, 1.0, 1.5, 0.1, 1.5, 0.5, 0.5, 1.5], [0.95, 0.95, 0.5, *[0.95] * 6],
                       [*[None] * 3, 0.2, 0.2, *[None] * 4]))  # fmt: skip
COMBO_ROWS = list(zip([*[5] * 6, 1, 1, 1], [0.5, 0.5, 5.0, 5.0, 0.5, 5.0, 5.0, 0.5, 5.0]))

# corl-team/CORL `configs/finetune/cal_ql`, for the sets that it has, and `algorithms/finetune/cal_ql.py`, whose policy has
# three layers; the gap counts with Lagrange alone.
CAL_QL = ["actor_lr", "cql_alpha", "lagrange", "gap", "max_backup", "diff_min", "sparse_rewards", "normalize_obs"]
CAL_QL += ["hidden", "critic_hidden", "data.reward_scale", "data.reward_shift"]
CLONED = [f"{hand}-cloned-v1" for hand in ("pen", "door", "hammer", "relocate")]
CAL_QL_ROWS = [*[(1e-4, 5.0, True, 0.8, True, -200.0, True, False, THREE, [256] * 5, 10.0, -5.0)] * 6]
CAL_QL_ROWS += [*[(1e-4, 1.0, False, 5.0, True, -200.0, False, False, THREE, None, 1.0, 0.0)] * 4]
# corl-team/CORL `configs/finetune/spot`: lambda, its last share, the discount online; the shift is that of `spot.py`.
# thuml/SPOT `configs/offline` and `main.py` on locomotion.
SPOT = ["weight", "online.anneal.weight", "online.agent.discount", "data.reward_shift"]
SPOT_GYM = [(w, 3e-4, True) for w in (0.05, 0.05, 1.0, 0.1, 0.1, 0.2, 0.2, 0.2, 0.5)]
SPOT_ROWS = [*[(w, 0.2, 0.995, -1.0) for w in (0.25, 0.25, 0.05, 0.025, 0.025, 0.025)], *[(1.0, 0.5, 0.99, 0.0)] * 4]
# ikostrikov/rlpd, commands of its README: locomotion, AntMaze, Adroit (its sparse sets).
RLPD_ROWS = [*[(TWO, 2, True)] * 9, *[([256] * 3, 1, False)] * 6, *[(TWO, 2, True)] * 3, *[([256] * 3, 2, False)] * 12]
# ltlhuuu/A2PR, commands of its README's versions: alpha, mask, weight of the autoencoder, discount.
A2PR_ROWS = [(40.0, 1.0, 1.0, 0.99), (40.0, 0.8, 1.5, 0.995), (40.0, 15.0, 1.0, 0.99), (2.5, 0.4, 1.0, 0.995)]
A2PR_ROWS += [(2.5, 0.5, 1.5, 0.99), (2.5, 4.0, 1.0, 0.99), (2.5, 1.0, 1.5, 0.99), (2.5, 1.2, 1.5, 0.995)]
A2PR_ROWS += [(2.5, 0.8, 1.0, 0.99)]

# Park, Li & Levine 2025 (table of tuned baselines, and seohongpark/fql): IQL's beta, ReBRAC's two weights, N of IDQL and of
# IFQL, FQL's alpha; the discount is the same for all.
OGBENCH = [
    f"{environment}-singletask-v0"
    for environment in (
        "antmaze-large-navigate",
        "antmaze-giant-navigate",
        "humanoidmaze-medium-navigate",
        "humanoidmaze-large-navigate",
        "antsoccer-arena-navigate",
        "cube-single-play",
        "cube-double-play",
        "scene-play",
        "puzzle-3x3-play",
        "puzzle-4x4-play",
    )
]
FAR = [0.99, *[0.995] * 4, *[0.99] * 5]
ON_OGBENCH: dict[str, list[Any]] = {
    "beta": [10.0, 10.0, 10.0, 10.0, 1.0, 1.0, 0.3, 10.0, 10.0, 3.0],
    "actor_bc": [0.003, 0.003, 0.01, 0.01, 0.01, 1.0, 0.1, 0.1, 0.3, 0.3],
    "critic_bc": [0.01, 0.01, 0.01, 0.01, 0.01, 0.0, 0.0, 0.01, 0.01, 0.01],
    "alpha": [10.0, 10.0, 30.0, 30.0, 10.0, 300.0, 300.0, 300.0, 1000.0, 1000.0],
    "candidates": [32, 32, 32, 32, 64, 32, 32, 32, 32, 32],  # IDQL's fifth is not known; that of IFQL, its default
    "discount": FAR,
    "hidden": [*[[512] * 4] * 5, *[[256] * 4] * 5],  # IQL's
    "expectile": [0.9] * 10,
    "deterministic": [True] * 10,  # a std of 1
    "normalize_obs": [False] * 10,
}


def on_ogbench(*settings: str) -> dict[str, dict[str, Any]]:
    return tabled(OGBENCH, list(settings), list(zip(*(ON_OGBENCH[name] for name in settings))))


TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "fql": on_ogbench("alpha", "discount"),
    "ifql": on_ogbench("candidates", "discount", "expectile"),
    "idql": on_ogbench("candidates", "discount", "expectile"),
    "cal_ql": tabled([*ANTMAZE, *CLONED], CAL_QL, CAL_QL_ROWS),
    "spot": tabled([*ANTMAZE, *CLONED], SPOT, SPOT_ROWS)
    | tabled(GYM, ["weight", "actor_lr", "normalize_obs"], SPOT_GYM),
    "rlpd": tabled(CORL, ["hidden", "subset", "backup_entropy"], RLPD_ROWS),
    "a2pr": tabled(GYM, ["alpha", "bc_weight", "vae_weight", "discount"], A2PR_ROWS),
    "awac": tabled(CORL, ["temperature"], LAMBDA),
    "sac_n": tabled(CORL, ["members"], N),
    "edac": tabled(CORL, ["members", "eta"], ETA),
    "rebrac": tabled(CORL, ["actor_bc", "critic_bc"], BETAS) | on_ogbench("actor_bc", "critic_bc", "discount"),
    "iql": tabled(CORL, ["expectile", "beta", "tau", "deterministic", "dropout"], IQL)
    | on_ogbench("expectile", "beta", "discount", "hidden", "deterministic", "normalize_obs"),
    "cql": tabled(CORL, ["actor_lr", "cql_alpha", "lagrange", "gap", "max_backup", "diff_min"], CQL),
    "dt": tabled(CORL, ["target_return", "return_scale"], RETURNS),
    "mopo": tabled(GYM, ["augment.length", "augment.penalty"], MOPO_ROWS),
    "mobile": tabled(GYM, ["augment.length", "penalty", "augment.share", "alpha"], MOBILE_ROWS),
    "combo": tabled(GYM, ["augment.length", "cql_alpha"], COMBO_ROWS),
    "prdc": tabled([*GYM, *ANTMAZE], ["alpha", "beta"], PRDC),
}


@pytest.mark.parametrize("name", TABLES)
def test_datasets_have_the_published_values(name: str) -> None:
    tables: Any = OmegaConf.to_container(AGENTS[name])
    for dataset, expected in TABLES[name].items():
        of_model = {f"augment.{key}": value for key, value in tables.get("augment", {}).items()}
        online = tables.get("online", {})
        online = {f"online.{part}.{k}": v for part in ("agent", "anneal") for k, v in online.get(part, {}).items()}
        common = {"data.reward_scale": 1.0, "data.reward_shift": 0.0}
        common |= {f"online.agent.{key}": value for key, value in PUBLISHED[name].items()}
        settings = PUBLISHED[name] | common | of_model | online | chosen_settings(tables["settings"], dataset)
        assert {key: settings[key] for key in expected} == expected, dataset


# Bounds of uniform initial output layers that are not PyTorch's 1 / sqrt(fan_in): SAC-N's, EDAC's and SPOT's as in
# corl-team/CORL; RLPD's is ours (see its docstring).
OUTPUTS = {
    "sac_n": {"actor": 1e-3, "critics": 3e-3},
    "edac": {"actor": 1e-3, "critics": 3e-3},
    "spot": {"actor": 1e-3, "critics": 3e-3},
    "rlpd": {"actor": 1e-3},
}


@pytest.mark.parametrize("name", ["td3_bc", "iql", "awac", "prdc", *OUTPUTS])
def test_output_layers_start_within_their_bounds(name: str) -> None:
    cls = get_class(AGENTS[name]._target_)
    agent = cls(Spec(3, 2), cls.Config(hidden=(64, 64)))
    for network in ("actor", "critics"):
        largest = getattr(agent, network).mlp.weights[-1].abs().max().item()
        bound = OUTPUTS.get(name, {}).get(network, 1 / 8)
        assert 0.8 * bound < largest <= bound, network  # of 64 numbers at least
