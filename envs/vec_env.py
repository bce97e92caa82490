"""Stable-Baselines3's VecEnv over environments that step together, as arrays."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array
from numpy.typing import NDArray
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from envs.batch import NativeVectorEnv
from envs.checks import check_exact
from envs.hybrid import is_hybrid
from envs.seeding import IndependentSeeds

__all__ = ["ArrayVecEnv", "Float32Observations", "GymnasiumVecEnv", "Transition", "VectorEnvAdapter", "float32_space"]

Observations = NDArray[Any] | dict[str, NDArray[Any]]


class GymnasiumVecEnv(IndependentSeeds, DummyVecEnv):
    """Gymnasium's environments, one after the other.

    Raises:
        ValueError: from `reset` and `step`, if an observation, or a part of a Dict, has another shape than its space,
            to which NumPy would stretch it, or values that a space of whole numbers does not hold.
    """

    @cached_property
    def _arrays(self) -> list[tuple[str | None, tuple[int, ...] | None, np.dtype[Any] | None]]:
        """Shapes of observations that are arrays, and types of what is whole: by name, if they have names."""
        space: Any = self.observation_space
        parts = space.spaces if isinstance(space, spaces.Dict) else {None: space}
        arrays = spaces.Box | spaces.Discrete | spaces.MultiBinary | spaces.MultiDiscrete
        return [
            (
                name,
                None if isinstance(part, spaces.Discrete) else part.shape,
                part.dtype if part.dtype.kind in "iub" else None,
            )
            for name, part in parts.items()
            if isinstance(part, arrays)
        ]

    def _save_obs(self, env_idx: int, obs: Any) -> None:
        for name, shape, whole in self._arrays:
            given = obs if name is None else obs[name]
            part = "" if name is None else f" {name!r}"
            if shape is not None and np.shape(given) != shape:
                raise ValueError(
                    f"environment {env_idx} gave an observation{part} of shape {np.shape(given)}, and its space has "
                    f"{shape}: correct its observation_space, or what it returns"
                )
            if whole is not None:
                check_exact(given, whole, f"the observation{part} of environment {env_idx}")
        super()._save_obs(env_idx, obs)


def float32_space(space: gym.Space[Any]) -> gym.Space[Any]:
    """The same space with float32 in the place of float64; images, Discrete and the like stay as they are."""
    if isinstance(space, spaces.Box) and space.dtype == np.float64:
        return spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)
    return space


class Float32Observations(gym.ObservationWrapper[NDArray[np.float32], Any, NDArray[Any]]):
    """An environment with observations of float64, as float32."""

    def __init__(self, env: gym.Env[NDArray[Any], Any]) -> None:
        super().__init__(env)
        self.observation_space = float32_space(env.observation_space)

    def observation(self, observation: NDArray[Any]) -> NDArray[np.float32]:
        """The same numbers, rounded."""
        return observation.astype(np.float32)


class Transition(NamedTuple):
    """One step of n environments, those that finished already restarted."""

    observations: Observations
    """(n, …), or a dictionary of such arrays: what the policy sees next, which is the first observation of the next
    episode where one finished."""
    rewards: NDArray[Any]
    """(n,): what the learner sees."""
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    last: Mapping[int, Observations] | None
    """The last observation of each finished episode, by index; None if none finished."""
    scores: NDArray[Any]
    """(n,): what the statistics count; differs from `rewards` where those are clipped."""
    over: NDArray[np.bool_]
    """(n,): where the statistics end; differs from terminated | truncated where a life is an episode to the learner."""
    costs: NDArray[np.float64] | None = None
    """(n,): ``info["cost"]``, of tasks that have one."""


class ArrayVecEnv(IndependentSeeds):
    """n environments that step as one batch of arrays, with the semantics of Stable-Baselines3's DummyVecEnv.

    In the step that finishes an episode the observation is the next episode's first, and the info holds

    - ``terminal_observation``: the true last observation of the finished episode;
    - ``TimeLimit.truncated``: truncated and not terminated;
    - ``episode``: return ``r``, length ``l`` in steps and seconds ``t`` since construction, as Monitor writes them.

    The infos of all other environments are empty, but for the ``cost`` of a task that has one. `step_async` starts the
    step and returns, `step_wait` waits for it: what lies between the two runs beside the environments.
    """

    def __init__(self, num_envs: int, observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> None:
        super().__init__(num_envs, float32_space(observation_space), float32_space(action_space))
        self._returns = np.zeros(num_envs)
        self._lengths = np.zeros(num_envs, dtype=np.int64)
        self._waiting = False
        self._start = time.time()

    # What a subclass says -------------------------------------------------------------------------------------------

    spec: gym.envs.registration.EnvSpec | None = None

    @abstractmethod
    def _reset(self, seeds: list[int] | None) -> Observations:
        """Start an episode everywhere; environment i draws from the stream of seeds[i], or goes on with its own."""

    @abstractmethod
    def _send(self, actions: NDArray[Any]) -> None:
        """Start a step. `_lengths` already counts it."""

    @abstractmethod
    def _receive(self) -> Transition:
        """Finish the step, and restart the environments that need it."""

    # What Stable-Baselines3 calls -----------------------------------------------------------------------------------

    def reset(self) -> Observations:
        """Start an episode everywhere and return the first observations; a step under way is thrown away."""
        if self._waiting:
            self._waiting = False
            self._receive()
        observations = self._reset(None if self._seeds[0] is None else cast(list[int], self._seeds))
        self._reset_seeds()
        self._returns[:] = 0.0
        self._lengths[:] = 0
        self.reset_infos = [{} for _ in range(self.num_envs)]
        return observations

    def step_async(self, actions: NDArray[Any]) -> None:
        """Start a step with actions (n, …) and return at once."""
        if self._waiting:
            raise RuntimeError("step_async() while a step is under way: call step_wait() first")
        self._send(actions)
        self._lengths += 1
        self._waiting = True

    def step_wait(self) -> tuple[Observations, NDArray[Any], NDArray[np.bool_], list[dict[str, Any]]]:
        """Finish the step: observations (n, …), rewards (n,), dones (n,), infos."""
        if not self._waiting:
            raise RuntimeError("step_wait() without a step under way: call step_async() first")
        self._waiting = False
        observations, rewards, terminated, truncated, last, scores, over, costs = self._receive()
        self._returns += scores
        dones = terminated | truncated
        # New dictionaries, because wrappers and callbacks write into them; 16 of them cost less than a microsecond.
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if costs is not None:
            infos = [{"cost": cost} for cost in costs.tolist()]
        if last is not None:
            seconds = round(time.time() - self._start, 6)
            for i in np.flatnonzero(dones).tolist():
                infos[i]["terminal_observation"] = last[i]
                infos[i]["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
                if over[i]:
                    infos[i]["episode"] = {
                        "r": round(float(self._returns[i]), 6),
                        "l": int(self._lengths[i]),
                        "t": seconds,
                    }
            self._returns[over] = 0.0
            self._lengths[over] = 0
        return observations, rewards, dones, infos

    def set_options(self, options: Sequence[dict[str, Any]] | dict[str, Any] | None = None) -> None:
        """Accept no options, because the environments take none."""
        if options and (isinstance(options, dict) or any(options)):
            raise ValueError(f"options={options!r}: these environments take none. Use backend='gymnasium'.")

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """``spec``, ``render_mode`` and the spaces, once for each index; there is no Python object per environment."""
        if attr_name not in ("spec", "render_mode", "observation_space", "action_space"):
            raise AttributeError(self._no_object(f"attribute {attr_name!r}"))
        return [getattr(self, attr_name, None) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Raise AttributeError."""
        raise AttributeError(self._no_object(f"attribute {attr_name!r}"))

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Raise AttributeError."""
        raise AttributeError(self._no_object(f"method {method_name!r}"))

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None) -> list[bool]:
        """True for Monitor, whose statistics the infos carry; there are no other wrappers."""
        return [issubclass(Monitor, wrapper_class) for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[NDArray[np.uint8] | None]:
        """Raise RuntimeError."""
        raise RuntimeError(
            "These environments do not render. Make the environment with backend='gymnasium' and "
            "env_kwargs={'render_mode': 'rgb_array'}."
        )

    def render(self, mode: str | None = None) -> NDArray[np.uint8] | None:
        """Raise RuntimeError."""
        self.get_images()
        return None

    def _no_object(self, what: str) -> str:
        return f"{type(self).__name__} has no Python object per environment and so no {what}. Use backend='gymnasium'."


_ARRAYS = spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary


class VectorEnvAdapter(ArrayVecEnv):
    """A `gymnasium.vector.VectorEnv` with same-step autoreset as a VecEnv.

    A vector environment of this package or of Gymnasium's gets one seed per environment; any other gets one integer,
    which is all that Gymnasium promises.

    Raises:
        ValueError: if the vector environment resets in another way, which would add or lose transitions, or its
            observations are neither one array nor a Dict of arrays.
        RuntimeError: in a step that ends an episode, if the vector environment does not give its last observation.
    """

    def __init__(self, vector_env: VectorEnv[Any, Any, Any]) -> None:
        mode = vector_env.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise ValueError(f"vector_env must have metadata['autoreset_mode'] = AutoresetMode.SAME_STEP, not {mode}.")
        space = vector_env.single_observation_space
        parts = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
        if not all(isinstance(part, _ARRAYS) for part in parts):
            raise ValueError(
                f"vector_env has the observation space {space}, but must have one array (Box, Discrete, MultiDiscrete "
                "or MultiBinary) or a Dict of arrays. Use gymnasium.spaces.utils.flatten_space for others."
            )
        self.vector_env = vector_env
        self.spec = vector_env.spec
        self._one_seed_each = isinstance(vector_env.unwrapped, NativeVectorEnv | SyncVectorEnv | AsyncVectorEnv)
        super().__init__(vector_env.num_envs, space, vector_env.single_action_space)

    def _reset(self, seeds: list[int] | None) -> Observations:
        seed = seeds if seeds is None or self._one_seed_each else seeds[0]
        return self._cast(self.vector_env.reset(seed=seed)[0])  # type: ignore[arg-type]

    def _send(self, actions: Any) -> None:
        self._actions: Any = actions
        if is_hybrid(space := self.action_space):  # a list of n actions, which the vector environment takes as arrays
            out: Any = create_empty_array(space, self.num_envs)
            self._actions = concatenate(space, actions, out)

    def _receive(self) -> Transition:
        observations, rewards, terminated, truncated, infos = self.vector_env.step(self._actions)
        rewards = np.asarray(rewards)
        terminated, truncated = np.asarray(terminated, dtype=np.bool_), np.asarray(truncated, dtype=np.bool_)
        dones = terminated | truncated
        last = self._last(infos, np.flatnonzero(dones).tolist()) if dones.any() else None
        return Transition(
            self._cast(observations), rewards.astype(np.float32), terminated, truncated, last, rewards, dones
        )

    def _last(self, infos: dict[str, Any], ended: list[int]) -> dict[int, Observations]:
        """The last observation of each episode that has ended."""
        final = infos.get("final_obs")
        there = infos.get("_final_obs", np.ones(self.num_envs, dtype=np.bool_))
        last = {}
        for i in ended:
            observation = None
            if final is not None and there[i]:
                observation = {key: final[key][i] for key in final} if isinstance(final, Mapping) else final[i]
            if observation is None:
                raise RuntimeError(
                    f"{type(self.vector_env.unwrapped).__name__} ended the episode of environment {i} without its last "
                    f"observation in infos['final_obs'][{i}], which AutoresetMode.SAME_STEP must give: the infos have "
                    f"{sorted(infos)}. Without it the value of a truncated episode is not known. Add it there, with "
                    f"the mask infos['_final_obs']."
                )
            last[i] = self._cast(observation)
        return last

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """As of every `ArrayVecEnv`; and ``action_masks``, where the vector environment has them."""
        if attr_name == "action_masks" and hasattr(self.vector_env, attr_name):
            return [partial(self._mask, i) for i in self._get_indices(indices)]
        return super().get_attr(attr_name, indices)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """``action_masks``, which sb3-contrib's MaskablePPO asks for, where the vector environment has them."""
        if method_name == "action_masks" and hasattr(self.vector_env, method_name):
            masks = self._masks()
            return [masks[i] for i in self._get_indices(indices)]
        return super().env_method(method_name, *method_args, indices=indices, **method_kwargs)

    def _mask(self, index: int) -> NDArray[np.bool_]:
        return self._masks()[index]

    def _masks(self) -> NDArray[np.bool_]:
        vector_env: Any = self.vector_env
        return vector_env.action_masks()

    def _cast(self, observations: Any) -> Observations:
        # A copy: the vector environment may reuse its memory in the next step, and a rollout keeps what it was given.
        space: Any = self.observation_space
        if isinstance(space, spaces.Dict):
            return {key: self._cast_to(part, observations[key], f" {key!r}") for key, part in space.spaces.items()}
        return self._cast_to(space, observations, "")

    def _cast_to(self, space: Any, values: Any, name: str) -> NDArray[Any]:
        check_exact(values, space.dtype, f"an observation{name} of {type(self.vector_env.unwrapped).__name__}")
        return np.array(values, dtype=space.dtype)

    def close(self) -> None:
        """Close the vector environment."""
        self.vector_env.close()
