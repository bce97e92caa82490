"""What an exact continuation of a run needs beside its model, taken at a checkpoint and put back.

The model's own attributes, weights and optimiser are Stable-Baselines3's to save. Here are the random generators, the
statistics of VecNormalize, the environments, and the log's values that wait for their row. All of it is plain data.
"""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from agents.base import NaturalPolicyAlgorithm
from agents.config import RunConfig
from agents.saved import Record
from envs.seeding import IndependentSeeds, Purpose, purpose_seed
from envs.state import restore_state
from envs.state import state_of as environments_of
from npg.parallel import World
from npg.runs.plain import is_plain

__all__ = [
    "begin_episodes",
    "restore",
    "restore_log",
    "set_statistics",
    "state_of",
    "training_seed",
]


def state_of(model: BaseAlgorithm, *, episodes: bool) -> dict[str, Any]:
    """What a checkpoint has beside the model.

    Args:
        model: between two updates, if its episodes are to go on.
        episodes: whether to save the environments, in which episodes are under way.
    """
    env = cast(VecEnv, model.get_env())
    log = model.logger
    names = [name for name, value in log.name_to_value.items() if is_plain(value)]
    return {
        "generators": {
            "python": random.getstate(),
            "numpy": np.random.get_state(),  # noqa: NPY002  what Stable-Baselines3 draws from
            "torch": torch.get_rng_state().numpy(),
            "cuda": [state.numpy() for state in (torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])],
            "actions": env.action_space._np_random,
        },
        "statistics": _statistics(model.get_vec_normalize_env()),
        "environments": environments_of(env) if episodes else None,
        "observations": model._last_obs if episodes else None,
        "starts": model._last_episode_starts if episodes else None,
        "memory": getattr(model, "_last_states", None) if episodes else None,
        "log": [(name, log.name_to_value[name], log.name_to_count[name], log.name_to_excluded[name]) for name in names],
    }


def restore(model: NaturalPolicyAlgorithm, state: dict[str, Any]) -> bool:
    """Put back the environments and the generators; returns whether the episodes go on.

    Raises:
        ValueError: if the state is of other environments, or damaged.
    """
    goes_on = state["environments"] is not None
    if goes_on:
        restore_state(cast(VecEnv, model.get_env()), state["environments"])
        model._last_obs, model._last_episode_starts = state["observations"], state["starts"]
        if state.get("memory") is not None:
            model._last_states = state["memory"]
    _restore_generators(state["generators"])
    if (actions := state["generators"].get("actions")) is not None:
        for space in (model.action_space, cast(VecEnv, model.get_env()).action_space):
            space.np_random.bit_generator.state = actions.bit_generator.state
    return goes_on


def _restore_generators(states: dict[str, Any]) -> None:
    """Set the generators of Python, NumPy and PyTorch to their saved states."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(torch.as_tensor(states["torch"], device="cpu"))
    cuda = [torch.as_tensor(state, device="cpu") for state in states["cuda"]]
    if len(cuda) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(cuda)


def restore_log(model: NaturalPolicyAlgorithm, state: dict[str, Any]) -> None:
    """Give the log the values that waited for their row."""
    log = model.logger
    for name, value, count, excluded in state["log"]:
        log.name_to_value[name], log.name_to_count[name], log.name_to_excluded[name] = value, count, excluded


def begin_episodes(model: NaturalPolicyAlgorithm, config: RunConfig, world: World) -> None:
    """Seed the environments by the number of steps, for new episodes; in processes beside the main one all else too.

    A run that goes on from its checkpoint does the same, and so draws the same.
    """
    seed = training_seed(config, model)
    if not world.is_main:
        set_random_seed(world.own_seed(seed), using_cuda=world.device.type == "cuda")
    env = cast(VecEnv, model.get_env())
    cast(IndependentSeeds, env.unwrapped).seed(seed, first=world.rank * model.n_envs)


def training_seed(config: RunConfig, model: NaturalPolicyAlgorithm) -> int:
    """The seed of the training environments, another one where training goes on."""
    steps = model.num_timesteps
    return purpose_seed(config.seed, Purpose.RESUMED_TRAINING, steps) if steps else config.seed


def _statistics(env: VecNormalize | None) -> dict[str, Any] | None:
    if env is None:
        return None
    observations = getattr(env, "obs_rms", None) if env.norm_obs else None
    several = observations if isinstance(observations, dict) else {"": observations} if observations else {}
    kept = {"observations": several, "rewards": {"": env.ret_rms}}
    moments = {
        kind: {name: {"mean": rms.mean, "var": rms.var, "count": rms.count} for name, rms in of.items()}
        for kind, of in kept.items()
    }
    return {**moments, "returns": getattr(env, "returns", None)}


def set_statistics(env: VecNormalize, saved: dict[str, Any] | Record) -> None:
    """Give `env` statistics, as `state_of` took them or as a pickle of VecNormalize has them.

    Raises:
        ValueError: if they are of other observations.
    """
    if isinstance(saved, Record):
        saved = _statistics(cast(VecNormalize, saved)) or {}
    pairs = [(env.ret_rms, saved["rewards"][""])]
    if env.norm_obs:
        own = env.obs_rms if isinstance(env.obs_rms, dict) else {"": env.obs_rms}
        if own.keys() != saved["observations"].keys():
            raise ValueError(f"the statistics are of {list(saved['observations'])}, not of {list(own)}")
        pairs += [(own[name], saved["observations"][name]) for name in own]
    for rms, moments in pairs:
        _set_moments(rms, **moments)
    if np.shape(saved["returns"]) == env.returns.shape:  # else a number of environments that differs
        env.returns = np.array(saved["returns"])


def _set_moments(rms: RunningMeanStd, mean: Any, var: Any, count: float) -> None:
    if np.shape(mean) != np.shape(rms.mean):
        raise ValueError(f"the statistics have the shape {np.shape(mean)}, and the environment {np.shape(rms.mean)}")
    rms.mean, rms.var, rms.count = mean, var, count
