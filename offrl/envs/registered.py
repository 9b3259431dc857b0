"""`gymnasium.make` for every environment that is registered, or that a known package registers."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium

from offrl.data.ogbench_names import KINDS as OGBENCH
from offrl.envs.chosen import PYTHON
from offrl.utils.advice import option
from offrl.utils.errors import OffrlError, one_line

ROBOTICS = ("PointMaze", "AntMaze", "Adroit", "FrankaKitchen", "Fetch", "HandManipulate", "HandReach")


def make_gymnasium(env_id: str, entry_point: str | None = None, **kwargs: Any) -> gymnasium.Env:
    """`gymnasium.make` with the packages registered that an id needs, and errors that say what to install.

    Args:
        entry_point: what a dataset says of the environment's class; it is named in messages and never imported.
    """
    module, _, plain = env_id.rpartition(":")
    robotics, ogbench = plain.startswith(ROBOTICS), plain.startswith(tuple(OGBENCH))
    extra = "robotics" if robotics else "ogbench" if ogbench else "mujoco"
    try:
        # v4 is announced as out of date and Adroit v1 as changed; both are known here and used with a purpose.
        with warnings.catch_warnings(), _own_temporary_folder():
            warnings.simplefilter("ignore")
            if robotics:
                with contextlib.redirect_stderr(io.StringIO()):  # a notice on Adroit's reward, see AdroitReward
                    import gymnasium_robotics

                gymnasium.register_envs(gymnasium_robotics)
            if ogbench:
                import ogbench as registers

                gymnasium.register_envs(registers)
            if module and plain not in gymnasium.registry:
                raise _not_imported(env_id, module)
            return _with_spaces(env_id, gymnasium.make(plain, disable_env_checker=True, **kwargs))
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        raise OffrlError(
            f'{env_id} needs a package ({error}); install it with `pip install ".[{extra}]"` in the checkout of offrl.'
        ) from error
    except gymnasium.error.UnregisteredEnv as error:
        if env_id.startswith(PYTHON):
            raise OffrlError(
                f"{env_id}: this environment was made by a function in Python; name one with {option('eval.env', 'MODULE:ID')}."
            ) from error
        if entry_point and (home := one_line(entry_point.partition(":")[0], 80)):
            raise _not_imported(f"{home}:{env_id}", home) from error
        raise OffrlError(
            f"{env_id}: Gymnasium doesn't know this environment ({error}); name the module that registers it: "
            f"{option('eval.env', f'MODULE:{env_id}')}."
        ) from error
    except (OffrlError, MemoryError):
        raise
    except Exception as error:  # whatever the environment raises at arguments that it does not like
        raise _not_made(env_id, kwargs, error) from error


def make_vector(env_id: str, count: int, **kwargs: Any) -> gymnasium.vector.VectorEnv:
    """`gymnasium.make_vec` of an id that is registered; arguments that it does not like are an OffrlError."""
    try:
        return gymnasium.make_vec(env_id, count, **kwargs)
    except (OffrlError, MemoryError):
        raise
    except Exception as error:
        raise _not_made(env_id, kwargs, error) from error


def _not_made(env_id: str, kwargs: dict[str, Any], error: Exception) -> OffrlError:
    reason = one_line(f"{type(error).__name__}: {error}")
    return OffrlError(f"{env_id} cannot be made ({reason}); check env_kwargs={one_line(kwargs)}.")


def _with_spaces(env_id: str, env: gymnasium.Env) -> gymnasium.Env:
    """The environment, if it has its two spaces; raises OffrlError otherwise."""
    for name in ("observation_space", "action_space"):
        if not isinstance(getattr(env, name, None), gymnasium.Space):
            raise OffrlError(f"{env_id}: it has no {name}; set one of gymnasium.spaces in its class or its __init__.")
    return env


def _not_imported(env_id: str, module: str) -> OffrlError:
    """What to type where a file alone names a module."""
    return OffrlError(
        f"{env_id}: only a file asks to import {module} for its environment, and modules that files name are never imported; "
        f"name it yourself: {option('eval.env', env_id)}, or import {module} before."
    )


@contextlib.contextmanager
def _own_temporary_folder() -> Iterator[None]:
    """The mazes write their XML to the temporary folder under a name made of the time, and leave it there."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before
