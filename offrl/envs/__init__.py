"""Environments: those that score a dataset's policies, and the stochastic benchmarks, as Gymnasium ids.

`make_env(info)` gives the environment that a dataset's policies are scored in. Importing this package registers
`offrl/BernoulliBandit-v0`, `offrl/SlipperyLake-v0` and the others of docs/stochastic_benchmarks.md:

import offrl.envs
env = gymnasium.make("offrl/SlipperyLake-v0", no_slip_prob=0.7)
envs = gymnasium.make_vec("offrl/SlipperyLake-v0", 1000, no_slip_prob=0.7)
robot = gymnasium.make("offrl/NoisyHopper-v0", sigma=0.2)
"""

import gymnasium

from offrl.envs.adapters import make_env, make_vector_env
from offrl.envs.noisy import ROBOTS
from offrl.envs.registered import make_gymnasium
from offrl.envs.tabular_tasks import TASKS

__all__ = ["NOISY_IDS", "TABULAR_IDS", "make_env", "make_gymnasium", "make_vector_env"]

TABULAR_IDS = {
    "bandit": "offrl/BernoulliBandit-v0",
    "lake": "offrl/SlipperyLake-v0",
    "cliff": "offrl/CliffWalk-v0",
    "gambling": "offrl/Gambling-v0",
    "toy": "offrl/Toy-v0",
    "mstoy": "offrl/MSToy-v0",
    "grid": "offrl/HiddenGrid-v0",
}
NOISY_IDS = {robot: f"offrl/Noisy{robot}-v0" for robot in ROBOTS}

for _name, _id in TABULAR_IDS.items():
    gymnasium.register(
        _id,
        entry_point="offrl.envs.tabular_env:TabularEnv",
        vector_entry_point="offrl.envs.tabular_env:TabularVectorEnv",
        max_episode_steps=TASKS[_name]().limit,
        kwargs={"task": _name},
    )
for _name, _id in NOISY_IDS.items():
    gymnasium.register(
        _id,
        entry_point="offrl.envs.noisy:make_noisy",
        max_episode_steps=50 if _name == "Reacher" else 1000,
        kwargs={"robot": ROBOTS[_name]},
    )
