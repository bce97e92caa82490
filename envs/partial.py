"""Classic control with part of the state hidden, so that a policy has to remember."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

__all__ = ["VELOCITIES", "HideComponents", "without_velocities"]

#: The components of an observation that are velocities.
VELOCITIES = {"CartPole-v1": (1, 3), "Pendulum-v1": (2,)}


class HideComponents(gym.ObservationWrapper[NDArray[Any], Any, NDArray[Any]], gym.utils.RecordConstructorArgs):
    """An environment whose observations, vectors, lack some components.

    Args:
        env: with observations of a Box of one axis.
        hidden: the components, each once.

    Raises:
        ValueError: if the observations are no vectors, or there is no such component, or none would be left.
    """

    def __init__(self, env: gym.Env[NDArray[Any], Any], hidden: Sequence[int]) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, hidden=tuple(hidden))
        gym.ObservationWrapper.__init__(self, env)
        space = env.observation_space
        if not (isinstance(space, spaces.Box) and len(space.shape) == 1):
            raise ValueError(f"env has observations of {space}: only components of a vector can be hidden")
        size = space.shape[0]
        if len(set(hidden)) != len(hidden) or not all(0 <= i < size for i in hidden) or len(hidden) == size:
            raise ValueError(f"hidden must be some of the components 0 to {size - 1}, each once, got {tuple(hidden)}")
        self._shown = np.setdiff1d(np.arange(size), hidden)
        self.observation_space = spaces.Box(space.low[self._shown], space.high[self._shown], dtype=space.dtype.type)

    def observation(self, observation: NDArray[Any]) -> NDArray[Any]:
        """What is shown of it."""
        return observation[self._shown]


def without_velocities(env_id: str, **kwargs: Any) -> gym.Env[NDArray[Any], Any]:
    """CartPole-v1 or Pendulum-v1 without the velocities in the observation: ``npg/CartPoleNoVel-v1`` and so on.

    Args:
        env_id: one of `VELOCITIES`.
        kwargs: of the environment.

    Raises:
        ValueError: for another environment, whose velocities are not known.
    """
    if env_id not in VELOCITIES:
        raise ValueError(f"env_id={env_id!r} must be one of {', '.join(VELOCITIES)}: for others, take HideComponents")
    return HideComponents(gym.make(env_id, disable_env_checker=True, **kwargs), VELOCITIES[env_id])
