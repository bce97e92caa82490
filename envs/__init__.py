"""Vector environments for Stable-Baselines3, and the tasks of the natural policy gradient paper."""

from envs import registration  # noqa: F401
from envs.hybrid import HybridActions
from envs.make import UnknownEnvironment, make_vec_env
from envs.masks import ActionMasks
from envs.normalize import VecNormalize
from envs.velocity import velocity_limited
from envs.watchdog import Watchdog

__all__ = [
    "ActionMasks",
    "HybridActions",
    "UnknownEnvironment",
    "VecNormalize",
    "Watchdog",
    "make_vec_env",
    "velocity_limited",
]
