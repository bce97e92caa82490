"""Vector environments for Stable-Baselines3, and the tasks of the natural policy gradient paper."""

from envs import registration  # noqa: F401
from envs.make import UnknownEnvironment, make_vec_env

__all__ = ["UnknownEnvironment", "make_vec_env"]
