"""Stable-Baselines3's VecNormalize in a third of its time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from math import sqrt
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common import vec_env
from stable_baselines3.common.running_mean_std import RunningMeanStd

from envs.checks import check_last, check_values
from envs.masks import ACTION_MASK

__all__ = ["VecNormalize", "check_ranges"]

_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "clip_obs": ("above 0", lambda x: x > 0),
    "clip_reward": ("above 0", lambda x: x > 0),
    "gamma": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "epsilon": ("above 0", lambda x: x > 0),
}


def check_ranges(arguments: Mapping[str, Any], owner: str = "") -> None:
    """Refuse numbers with which VecNormalize would hide or turn round what it normalises.

    Args:
        arguments: of VecNormalize, by name.
        owner: what stands before their names in the message.

    Raises:
        ValueError: for one out of its range.
    """
    for name, (wanted, fits) in _RANGES.items():
        if name in arguments and not fits(arguments[name]):
            raise ValueError(f"{owner}{name} must be a number {wanted}, got {arguments[name]!r}")


class VecNormalize(vec_env.VecNormalize):
    """Stable-Baselines3's VecNormalize: the same arguments, files and, up to rounding, the same numbers.

    Small environments wait for its step. So nothing is computed twice, and only what somebody writes to is copied:
    moments are taken about the present mean, in one pass, and the difference from that mean serves the normalised
    observation too.

    Raises:
        ValueError: for ``clip_obs``, ``clip_reward`` or ``epsilon`` ≤ 0, or ``gamma`` outside of [0, 1].
        FloatingPointError: from `step_wait`, before the statistics take it in, for an observation or a reward that is
            not finite or beyond `envs.checks.LARGEST`.
    """

    steps = 0
    """Of this object's life."""

    @wraps(vec_env.VecNormalize.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_ranges(vars(self))

    def _sanity_checks(self) -> None:
        space, keys = self.observation_space, self.norm_obs_keys
        if isinstance(space, spaces.Dict) and ACTION_MASK in space.spaces:
            if keys is not None and ACTION_MASK in keys:
                raise ValueError(
                    f"norm_obs_keys={keys} has the {ACTION_MASK}, which says what is allowed by 0 and 1: leave it out"
                )
            if keys is None:
                self.norm_obs_keys = [name for name in space.spaces if name != ACTION_MASK]
        super()._sanity_checks()

    def reset(self) -> Any:
        """Begin episodes: the first observations, normalised."""
        observations = super().reset()
        if self.training:
            check_values(self.old_obs, None, "under VecNormalize", self.steps)
        return observations

    def step_wait(self) -> tuple[Any, NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Finish the step: observations, rewards, dones and infos, normalised; terminal observations too."""
        self.steps += 1
        raw: Any
        raw, rewards, dones, infos = self.venv.step_wait()
        self._check(raw, rewards)
        self.old_obs, self.old_reward = raw, rewards
        observations = raw
        if self.norm_obs and isinstance(self.obs_rms, dict):
            observations = {**raw, **{name: self._taken_in(raw[name], of) for name, of in self.obs_rms.items()}}
        elif self.norm_obs:
            observations = self._taken_in(raw, self.obs_rms)
        if self.training:
            self.returns = self.returns * self.gamma + rewards
            _update(self.ret_rms, self.returns - self.ret_rms.mean)
        if self.norm_reward:
            rewards = _clip(rewards / sqrt(self.ret_rms.var + self.epsilon), self.clip_reward)
        if dones.any():
            for i in np.flatnonzero(dones).tolist():
                if "terminal_observation" in infos[i]:
                    last = infos[i]["terminal_observation"]
                    if self.training and infos[i].get("TimeLimit.truncated"):  # whose value is asked for
                        check_last(last, i, "under VecNormalize", self.steps)
                    infos[i]["terminal_observation"] = self.normalize_obs(last)
            self.returns[dones] = 0
        return observations, rewards.astype(np.float32), dones, infos

    def _taken_in(self, rows: NDArray[Any], statistics: RunningMeanStd) -> NDArray[np.float32]:
        """The rows (n, …), normalised by statistics that have taken them in, in training."""
        difference = rows - statistics.mean
        if self.training:
            difference -= _update(statistics, difference)
        difference /= np.sqrt(statistics.var + self.epsilon)
        return _clip(difference, self.clip_obs).astype(np.float32)

    def _check(self, observations: Any, rewards: NDArray[Any]) -> None:
        if self.training:
            check_values(observations, rewards, "under VecNormalize", self.steps)


def _update(statistics: RunningMeanStd, difference: NDArray[Any]) -> NDArray[np.float64]:
    """Take in the rows x, given as x − mean, and return by how much the mean moved."""
    n = len(difference)
    before, total = statistics.count, statistics.count + n
    shift = np.add.reduce(difference, 0, dtype=np.float64) / total
    squares = np.add.reduce(difference * difference, 0, dtype=np.float64)
    statistics.mean = statistics.mean + shift
    statistics.var = (statistics.var * before + squares) / total - shift * shift
    statistics.count = total
    return shift


def _clip(x: NDArray[Any], bound: float) -> NDArray[Any]:
    return np.minimum(np.maximum(x, -bound, out=x), bound, out=x)
