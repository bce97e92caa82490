"""One task, many copies: a `Batch` holds the mathematics, and two thin faces show it to Gymnasium.

A task of this package is written once, as a `Batch`: n independent copies stepped as arrays. `SingleEnv` is the batch
of one as a `gymnasium.Env`, `NativeVectorEnv` the batch of n as a `gymnasium.vector.VectorEnv`. Copy i of a vector
reset with the seeds [s₀, s₁, …] is therefore the single environment reset with seed sᵢ, step for step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

__all__ = ["Batch", "NativeVectorEnv", "SingleEnv"]

RENDER_MODES = ["human", "ansi", "rgb_array"]


class Batch(ABC):
    """n independent copies of one task, without time limits and without automatic resets.

    `observation_space` and `action_space` are those of one copy.
    """

    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    _generators: list[Any]  # one for each copy; a subclass makes the list, or has a `seed` of its own

    def seed(self, index: int, generator: np.random.Generator) -> None:
        """Give copy `index` its source of randomness."""
        self._generators[index] = generator

    @abstractmethod
    def restart(self, which: NDArray[np.intp]) -> None:
        """Put the copies with the indices `which` into an initial state."""

    @abstractmethod
    def step(self, actions: Any) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Act once in every copy → rewards (n,), terminated (n,). A bad action raises before any copy has moved.

        Actions are an array (n, …), or where they are a Tuple a tuple of such arrays.
        """

    @abstractmethod
    def observe(self) -> NDArray[Any]:
        """Observations (n, …), in memory that no later step writes to."""

    @abstractmethod
    def text(self, index: int) -> str:
        """Copy `index` drawn in characters."""

    @abstractmethod
    def picture(self, index: int) -> NDArray[np.uint8]:
        """Copy `index` drawn as an RGB image (height, width, 3)."""


def _of_one(action: Any) -> Any:
    """The action of one copy as those of a batch."""
    return tuple(_of_one(part) for part in action) if isinstance(action, tuple) else np.asarray(action)[None]


class SingleEnv(gym.Env[Any, Any]):
    """A batch of one as a `gymnasium.Env`.

    Render modes: ``human`` prints the text after every reset and step, ``ansi`` returns it, ``rgb_array`` returns the
    picture.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": RENDER_MODES, "render_fps": 4}  # type: ignore[misc]

    def __init__(self, batch: Batch, render_mode: str | None = None) -> None:
        if render_mode is not None and render_mode not in RENDER_MODES:
            raise ValueError(f"render_mode must be None or one of {RENDER_MODES}, got {render_mode!r}")
        self.batch = batch
        self.render_mode = render_mode
        self.observation_space = batch.observation_space
        self.action_space = batch.action_space
        self._seeded = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode → (observation, {}); with a seed, from the beginning of its stream."""
        super().reset(seed=seed)
        if seed is not None or not self._seeded:
            self.batch.seed(0, self.np_random)
            self._seeded = True
        self.batch.restart(np.zeros(1, dtype=np.intp))
        return self._show(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Act → (observation, reward, terminated, False, {})."""
        if not self._seeded:
            raise gym.error.ResetNeeded("step() before the first reset(): call reset() to begin an episode")
        rewards, terminated = self.batch.step(_of_one(action))
        return self._show(), float(rewards[0]), bool(terminated[0]), False, {}

    def _show(self) -> Any:
        if self.render_mode == "human":
            self.render()
        return self.batch.observe()[0]

    def render(self) -> Any:
        """The text or the picture, as the render mode says; printed for ``human``."""
        if self.render_mode == "rgb_array":
            return self.batch.picture(0)
        if self.render_mode == "ansi":
            return self.batch.text(0)
        if self.render_mode == "human":
            print(self.batch.text(0))
        return None


class NativeVectorEnv(VectorEnv[Any, Any, Any]):
    """A batch of n as a `gymnasium.vector.VectorEnv` with same-step autoreset.

    In the step that ends an episode the returned observation is the next episode's first; the last one of the old
    episode is in ``infos["final_obs"]`` (an object array, None where no episode ended, with the mask
    ``infos["_final_obs"]``), as in Gymnasium's own vector environments.

    `max_episode_steps` truncates as Gymnasium's TimeLimit does; None means never.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]  # Gymnasium leaves ClassVar out
        "render_modes": ["ansi", "rgb_array"],
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self, batch: Batch, num_envs: int, max_episode_steps: int | None = None, render_mode: str | None = None
    ) -> None:
        if render_mode not in (None, "ansi", "rgb_array"):
            raise ValueError(f"render_mode of a vector must be None, 'ansi' or 'rgb_array', got {render_mode!r}")
        if max_episode_steps is not None and max_episode_steps < 1:
            raise ValueError(f"max_episode_steps must be positive or None, got {max_episode_steps}")
        self.batch = batch
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.single_observation_space = batch.observation_space
        self.single_action_space = batch.action_space
        self.observation_space = batch_space(batch.observation_space, num_envs)
        self.action_space = batch_space(batch.action_space, num_envs)
        self.max_episode_steps = max_episode_steps
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        self._seeded = False

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Begin an episode in every copy → (observations, {}); seeds for each, or as Gymnasium's seed, seed + 1, …."""
        if seed is None or isinstance(seed, int | np.integer):
            seeds = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        elif len(seed) == self.num_envs:
            seeds = list(seed)
        else:
            raise ValueError(f"seed must be an int or {self.num_envs} of them, one per copy; got {len(seed)}")
        for i, s in enumerate(seeds):
            if s is not None or not self._seeded:
                self.batch.seed(i, seeding.np_random(s)[0])
        self._seeded = True
        self.batch.restart(np.arange(self.num_envs))
        self._elapsed[:] = 0
        return self.batch.observe(), {}

    def step(
        self, actions: Any
    ) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Act in every copy → (observations, rewards, terminated, truncated, infos)."""
        if not self._seeded:
            raise gym.error.ResetNeeded("step() before the first reset(): call reset() to begin the episodes")
        if self.action_space.shape is not None:  # what has several parts is for the batch to check
            actions = np.asarray(actions)
            if actions.shape != self.action_space.shape:
                raise ValueError(f"actions must have the shape {self.action_space.shape}, got {actions.shape}")
        rewards, terminated = self.batch.step(actions)
        self._elapsed += 1
        truncated = np.zeros(self.num_envs, dtype=np.bool_)
        if self.max_episode_steps is not None:
            truncated = self._elapsed >= self.max_episode_steps
        observations = self.batch.observe()
        ended = np.flatnonzero(terminated | truncated)
        if not len(ended):
            return observations, rewards, terminated, truncated, {}
        last = np.full(self.num_envs, None, dtype=object)
        for i in ended:
            last[i] = observations[i]
        self.batch.restart(ended)
        self._elapsed[ended] = 0
        return (
            self.batch.observe(),
            rewards,
            terminated,
            truncated,
            {"final_obs": last, "_final_obs": terminated | truncated},
        )

    def render(self) -> tuple[Any, ...] | None:
        """One text or picture per copy."""
        if self.render_mode is None:
            return None
        draw = self.batch.picture if self.render_mode == "rgb_array" else self.batch.text
        return tuple(draw(i) for i in range(self.num_envs))
