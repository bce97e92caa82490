"""EnvPool's native environments as a Stable-Baselines3 VecEnv."""

from __future__ import annotations

import copy
import warnings
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from envs.seeding import environment_seeds
from envs.vec_env import ArrayVecEnv, Transition
from envs.velocity import LIMITS, PLANAR, checked_limit
from npg.runs.jobs import threads_for

__all__ = [
    "DIFFERENCES",
    "SAME_AS_GYMNASIUM",
    "EnvPoolVecEnv",
    "EnvPoolVelocityVecEnv",
    "import_envpool",
    "options",
]

SAME_AS_GYMNASIUM = frozenset(
    {
        "Acrobot-v1",
        "CartPole-v1",
        "MountainCar-v0",
        "MountainCarContinuous-v0",
        "Ant-v5",
        "HalfCheetah-v5",
        "Hopper-v5",
        "Humanoid-v5",
        "HumanoidStandup-v5",
        "InvertedDoublePendulum-v5",
        "InvertedPendulum-v5",
        "Pusher-v5",
        "Reacher-v5",
        "Swimmer-v5",
        "Walker2d-v5",
    }
)
"""Ids whose spaces, dynamics, rewards and endings the tests compare with Gymnasium's, step by step.

Pendulum-v1 is not among them: EnvPool turns the pendulum with its speed before that is clipped, Gymnasium after.
"""

DIFFERENCES = {
    "LunarLander": "its ground is 1 % higher, there is no wind, and contacts are those of Box2D 2.4 instead of 2.3",
    "BipedalWalker": "contacts are those of Box2D 2.4 instead of 2.3, which changes a step by about 1e-5",
}
"""What EnvPool's task does otherwise than Gymnasium's, by the beginning of its id, where that was looked into."""

# Made for several players, whatever they say: EnvPool's VizDoom ends the whole process when one of them is reset.
_ENDS_THE_PROCESS = {"Cig-v1", "MultiDuel-v1"}

# What is ours to set, or means something else than Gymnasium's argument of that name.
_RESERVED = {
    "base_path",
    "batch_size",
    "env_seed",
    "gym_reset_return_info",
    "max_num_players",
    "num_envs",
    "num_threads",
    "reward_threshold",
    "seed",
    "thread_affinity_offset",
    "xml_file",
}


def import_envpool() -> ModuleType | None:
    """EnvPool, or None where it is not installed. It is imported when first needed, and without its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import envpool
    except ImportError:
        return None
    return envpool


def options(task: str) -> set[str]:
    """The options that EnvPool's `task` takes."""
    return set(_spec(task)._config_keys) - _RESERVED


def _spec(task: str, **config: Any) -> Any:
    envpool = import_envpool()
    if envpool is None:
        raise ImportError(f"EnvPool is not installed, and {task!r} needs it: pip install envpool.")
    return envpool.make_spec(task, **config)


class EnvPoolVecEnv(ArrayVecEnv):
    """EnvPool's environments `task` as a VecEnv.

    EnvPool by itself restarts a finished environment in the step after, whose action and reward mean nothing. Here the
    finished ones alone are restarted at once, so that no transition is added or lost. The time limit of a task shared
    with Gymnasium is kept here as well, because EnvPool calls an episode that fails in its very last step truncated.
    Several arrays as observation become a Dict, those of a Dict in it with names such as ``items/mask``.

    Args:
        task: EnvPool's own id.
        num_envs: how many environments.
        n_threads: EnvPool's threads; by default one for each environment, at most one for each processor.
        config: options of the task, such as ``reset_noise_scale``.
        env_id: the id that its ``spec`` has, where that is not EnvPool's.

    Attributes:
        task: EnvPool's own id.
        config: all that ``envpool.make_gymnasium`` is given for it but the seed.

    Raises:
        ImportError: if EnvPool is not installed.
        ValueError: for an option that the task does not have, for several players, and for several arrays as action.
    """

    def __init__(
        self,
        task: str,
        num_envs: int = 1,
        n_threads: int | None = None,
        config: dict[str, Any] | None = None,
        env_id: str | None = None,
    ) -> None:
        config = dict(config or {})
        if task in _ENDS_THE_PROCESS:
            raise ValueError(
                f"env_id={task!r} cannot be used: it is made for several players, and EnvPool's VizDoom would end this "
                "process. Choose a task of one player, such as Basic-v1."
            )
        if unknown := set(config) - options(task):
            raise ValueError(
                f"env_kwargs has {sorted(unknown)}, but EnvPool's {task} takes only {sorted(options(task))}. Use "
                "these, or backend='gymnasium'."
            )
        pool_spec = _spec(task, **config)
        if (
            list(pool_spec._action_keys) != ["env_id", "players.env_id", "action"]
            or any(key.startswith("obs:players.") for key in pool_spec._state_keys)
            or pool_spec.config.max_num_players > 1
        ):
            raise ValueError(
                f"env_id={task!r} cannot be used: it has several players, or several arrays as action "
                f"({', '.join(pool_spec._action_keys[2:])}), and Stable-Baselines3 takes one of each. Choose another."
            )
        with warnings.catch_warnings():  # float64 bounds become float32
            warnings.simplefilter("ignore")
            observation_space, action_space = _flat(pool_spec.observation_space), pool_spec.action_space
        self.spec = _gymnasium_spec(env_id or task, pool_spec.config, config)
        self._time_limit: int | None = None
        if task in SAME_AS_GYMNASIUM or task.startswith(tuple(DIFFERENCES)):
            self._time_limit = pool_spec.config.max_episode_steps
            config["max_episode_steps"] = self._time_limit + 1

        self.task = task
        self.config = config | {"num_envs": num_envs, "num_threads": n_threads or min(num_envs, threads_for(1))}
        self._pool: Any = None
        self._indices = np.arange(num_envs, dtype=np.int32)
        self._row = {key: i for i, key in enumerate(pool_spec._state_keys)}
        # Where the arrays are of which an observation is made, and where it is, if it is one.
        self._parts = {
            key.removeprefix("obs:").replace(".", "/"): row for key, row in self._row.items() if key.startswith("obs")
        }
        self._obs = None if isinstance(observation_space, spaces.Dict) else next(iter(self._parts.values()))
        self._action_dtype = pool_spec.action_array_spec["action"].dtype
        self._n_actions = int(action_space.n) if isinstance(action_space, spaces.Discrete) else None
        super().__init__(num_envs, observation_space, action_space)
        self._action_shape = (num_envs, *action_space.shape)

    # EnvPool's public step() and reset() convert and nest their arrays, for a third of a vector step of CartPole; the
    # three calls beneath them take and give flat lists, in the order of the spec's keys.

    def _reset(self, seeds: list[int] | None) -> Any:
        if self._pool is None or seeds is not None:
            if seeds is None:
                entropy: Any = np.random.SeedSequence().entropy  # a number, where none was given
                seeds = environment_seeds(int(entropy), self.num_envs)
            envpool = import_envpool()
            assert envpool is not None
            self._pool = None  # two at a time would leave holes in the memory that nothing fills
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    self._pool = envpool.make_gymnasium(self.task, seed=seeds, **self.config)
                except RuntimeError as error:
                    raise RuntimeError(
                        f"EnvPool cannot start {self.task}: {error}. Its packages lack a file or are damaged: install "
                        "EnvPool again, or choose another task."
                    ) from error
        self._pool._reset(self._indices)
        return self._observations(self._pool._recv())

    def _send(self, actions: NDArray[Any]) -> None:
        if self._pool is None:
            raise RuntimeError("step() before the first reset(): call reset() first.")
        actions = np.array(actions, dtype=self._action_dtype, order="C")  # the caller may reuse the memory at once
        if actions.shape != self._action_shape:
            raise ValueError(f"actions must have the shape {self._action_shape}, got {actions.shape}.")
        # EnvPool looks an action up unchecked. As unsigned numbers, negative ones are too large.
        if self._n_actions is not None and actions.view(np.uint32).max() >= self._n_actions:
            raise ValueError(f"actions must lie in 0, …, {self._n_actions - 1}, got {actions}.")
        self._pool._send([self._indices, self._indices, actions])

    def _receive(self) -> Transition:
        try:
            state = self._pool._recv()
        except BaseException:  # an interrupt: which step the next answer would belong to is not known
            self._pool = None
            raise
        observations = self._observations(state)
        rewards = state[self._row["reward"]]
        if self._time_limit is None:
            truncated = state[self._row["trunc"]]
            terminated = state[self._row["done"]] & ~truncated
        else:
            truncated = self._lengths >= self._time_limit
            terminated = state[self._row["done"]]
        dones = terminated | truncated
        last = None
        if dones.any():
            finished = np.flatnonzero(dones)
            first = self._restart(self._indices[finished])
            if self._obs is not None:
                last = dict(zip(finished.tolist(), observations[finished]))
                observations[finished] = first
            else:
                last = {i: {key: part[i].copy() for key, part in observations.items()} for i in finished.tolist()}
                for key, part in observations.items():
                    part[finished] = first[key]
        scores, over = self._score(state, rewards, dones)
        return Transition(observations, rewards, terminated, truncated, last, scores, over, self._costs(state))

    def _restart(self, indices: NDArray[np.int32]) -> Any:
        self._pool._reset(indices)
        return self._observations(self._pool._recv())

    def _score(
        self, state: list[NDArray[Any]], rewards: NDArray[Any], dones: NDArray[np.bool_]
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Rewards as the statistics count them, and where the statistics end."""
        return rewards, dones

    def _costs(self, state: list[NDArray[Any]]) -> NDArray[np.float64] | None:
        """The costs of the steps, in a task that has some."""
        return None

    def _observations(self, state: list[NDArray[Any]]) -> Any:
        # The memory is new in every step, so that there is nothing to copy.
        if self._obs is not None:
            return state[self._obs].astype(self.observation_space.dtype, copy=False)
        return {key: state[row] for key, row in self._parts.items()}

    def close(self) -> None:
        """Stop EnvPool's threads."""
        self._pool = None


class EnvPoolVelocityVecEnv(EnvPoolVecEnv):
    """EnvPool's robots with the cost of `velocity_limited`: 1 in steps whose speed is above a limit, else 0.

    Args:
        task: a robot of `envs.velocity.LIMITS`, such as ``HalfCheetah-v5``.
        num_envs: how many environments.
        n_threads: as of `EnvPoolVecEnv`.
        config: options of the task; and ``limit``, in metres per second; None for the robot's own.
        env_id: the id that its ``spec`` has.

    Raises:
        ValueError: as of `EnvPoolVecEnv`, and if the limit is not a positive number.
    """

    def __init__(
        self,
        task: str,
        num_envs: int = 1,
        n_threads: int | None = None,
        config: dict[str, Any] | None = None,
        env_id: str | None = None,
    ) -> None:
        config, name = dict(config or {}), task.rpartition("-")[0]
        limit = config.pop("limit", None)
        self.limit, self.planar = LIMITS[name] if limit is None else checked_limit(limit), name in PLANAR
        super().__init__(task, num_envs, n_threads, config, env_id)
        assert self.spec is not None
        self.spec.kwargs["limit"] = self.limit

    def _costs(self, state: list[NDArray[Any]]) -> NDArray[np.float64]:
        speed = state[self._row["info:x_velocity"]]
        if self.planar:
            speed = np.hypot(speed, state[self._row["info:y_velocity"]])
        return (speed > self.limit).astype(np.float64)


def _flat(space: gym.Space[Any]) -> gym.Space[Any]:
    """EnvPool's space with one level of names, and with the bounds that are meant.

    Where EnvPool's C++ asks for the least number of a type, it gets the least *positive* one: "from 1e-38 to 3e38"
    stands for no bound at all.
    """
    if isinstance(space, spaces.Dict):
        flat: dict[str, gym.Space[Any]] = {}
        for name, part in space.spaces.items():
            part = _flat(part)
            if isinstance(part, spaces.Dict):
                flat |= {f"{name}/{inner}": value for inner, value in part.spaces.items()}
            else:
                flat[name] = part
        return spaces.Dict(flat)
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        limits = np.finfo(space.dtype)
        free = (space.low == limits.tiny) & (space.high == limits.max)
        if free.any():
            low, high = np.where(free, -np.inf, space.low), np.where(free, np.inf, space.high)
            return spaces.Box(low.astype(space.dtype), high.astype(space.dtype), dtype=space.dtype.type)
    return space


def _gymnasium_spec(env_id: str, pool_config: Any, config: dict[str, Any]) -> gym.envs.registration.EnvSpec:
    """What ``get_attr("spec")`` tells of a task: Gymnasium's spec where it has one, with the options in use."""
    registered = gym.registry.get(env_id)
    spec = copy.deepcopy(registered) if registered else gym.envs.registration.EnvSpec(env_id)
    if registered is None:
        spec.reward_threshold = getattr(pool_config, "reward_threshold", None)
    spec.max_episode_steps = pool_config.max_episode_steps or None  # 0 is no limit there
    spec.kwargs = spec.kwargs | {key: value for key, value in config.items() if key != "max_episode_steps"}
    return spec
