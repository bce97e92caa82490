"""The state of environments as plain data: what they need to go on in another process as if nothing had happened.

That is known of the environments of this package, and of Gymnasium's classic control and MuJoCo tasks, in one process.
Of any other environment, and of one that is wrapped in what is not listed here, nothing is claimed: what it hides is
not known, and to go on without that would be another episode in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from envs.batch import NativeVectorEnv, SingleEnv
from envs.partial import HideComponents
from envs.vec_env import Float32Observations, GymnasiumVecEnv, VectorEnvAdapter
from envs.velocity import VelocityCost
from npg.runs.plain import is_plain

__all__ = ["has_state", "is_known", "restore_state", "state_of"]

#: What changes in the wrappers that are known, by their exact types; not of those with a function, which may remember.
_WRAPPERS: dict[type, tuple[str, ...]] = {
    Monitor: ("rewards", "needs_reset", "total_steps"),
    TimeLimit: ("_elapsed_steps",),
    OrderEnforcing: ("_has_reset",),
    PassiveEnvChecker: (),
    Float32Observations: (),
    VelocityCost: (),
    HideComponents: (),
}
_OURS = ("envs.connect_four", "envs.lqr", "envs.platform", "envs.tetris", "envs.two_state_mdp")
_GYMNASIUMS = ("gymnasium.envs.classic_control.", "gymnasium.envs.mujoco.")
#: The arrays of MuJoCo's data, by the beginnings of their names, that a step or an observation reads; their sizes are
#: the model's. Those of constraints and contacts are made anew in every step.
_MUJOCO = (
    *("q", "x", "act", "ctrl", "mocap", "eq_active", "userdata", "history", "cinert", "cvel", "cacc", "cfrc", "cdof"),
    *("crb", "geom_x", "site_x", "cam_x", "light_x", "subtree", "sensordata", "energy", "ten_length", "ten_velocity"),
)


def has_state(venv: VecEnv) -> bool:
    """Whether `state_of` can save the state of these environments."""
    venv = venv.unwrapped
    if type(venv) is VectorEnvAdapter:
        inner = venv.vector_env
        return isinstance(inner, NativeVectorEnv) and type(inner).__module__ in _OURS
    return type(venv) is GymnasiumVecEnv and all(map(is_known, venv.envs))


def is_known(env: gym.Env[Any, Any]) -> bool:
    """Whether an environment is of this package or Gymnasium's, in wrappers that are known."""
    return all(type(layer) in _WRAPPERS or _is_whole(layer) for layer in _layers(env))


def state_of(venv: VecEnv) -> Any:
    """The state of the environments under all wrappers of `venv`, as `npg.runs.plain` writes it.

    Raises:
        TypeError: it is not known how to save it, see `has_state`.
    """
    if not has_state(venv):
        raise TypeError(f"the state of {type(venv.unwrapped).__name__} cannot be saved")
    return [_values(owner, names) for owner, names in _owners(venv.unwrapped)]


def restore_state(venv: VecEnv, state: Any) -> None:
    """Put environments made alike where `state_of` found others; the observation that comes next is not told again.

    Raises:
        ValueError: if the state is of other environments.
    """
    venv.unwrapped.reset()  # after which everything is there that the state is put into
    owners = list(_owners(venv.unwrapped))
    if not isinstance(state, list) or len(state) != len(owners):
        raise ValueError("the saved state is of other environments")
    for (owner, _), values in zip(owners, state):
        for name, value in values.items():
            _put(owner, name, value)


def _layers(env: Any) -> Iterator[Any]:
    while True:
        yield env
        if "env" not in vars(env):
            return
        env = env.env


def _is_whole(env: Any) -> bool:
    """Whether this is an environment whose attributes are all there is to it."""
    module, spec = type(env).__module__, getattr(env, "spec", None)
    wrapped = spec is not None and spec.additional_wrappers
    return (module in _OURS or module.startswith(_GYMNASIUMS)) and not wrapped


def _owners(venv: Any) -> Iterator[tuple[Any, tuple[str, ...] | None]]:
    """The objects that have state, and which of their attributes; None for all that are plain."""
    if isinstance(venv, VectorEnvAdapter):
        yield venv, ("_returns", "_lengths")
        yield venv.vector_env, ("_elapsed", "_seeded")
        yield venv.vector_env.batch, None  # type: ignore[attr-defined]
        return
    for env in venv.envs:
        for layer in _layers(env):
            yield layer, _WRAPPERS.get(type(layer))
            if isinstance(layer, SingleEnv):
                yield layer.batch, None
            if type(layer).__module__.startswith("gymnasium.envs.mujoco."):
                data = layer.data
                arrays = [name for name in dir(data) if name.startswith(_MUJOCO)]
                yield data, ("time", *(name for name in arrays if isinstance(getattr(data, name), np.ndarray)))


def _values(owner: Any, names: tuple[str, ...] | None) -> dict[str, Any]:
    if names is None:
        return {name: value for name, value in vars(owner).items() if is_plain(value)}
    return {name: getattr(owner, name) for name in names}


def _put(owner: Any, name: str, value: Any) -> None:
    if not hasattr(owner, name):
        raise ValueError(f"the saved state is of another environment than {type(owner).__name__}: it has a {name}")
    present = getattr(owner, name)
    if isinstance(present, np.random.Generator) and isinstance(value, np.random.Generator):
        present.bit_generator.state = value.bit_generator.state  # others may hold it too
    elif isinstance(present, np.ndarray) and (present.shape, present.dtype) == (
        np.shape(value),
        np.asarray(value).dtype,
    ):
        present[...] = value  # likewise; a float32 would not hold the bits of a float64
    else:
        setattr(owner, name, value)
