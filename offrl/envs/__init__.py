"""Evaluation environments: `make_env(info)` gives the one that a dataset's policies are scored in."""

from offrl.envs.adapters import make_env, make_gymnasium

__all__ = ["make_env", "make_gymnasium"]
