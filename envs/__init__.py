"""Vector environments for Stable-Baselines3, and the tasks of the natural policy gradient paper."""

from envs import registration  # noqa: F401
from envs.make import UnknownEnvironment, make_vec_env
from envs.normalize import VecNormalize

__all__ = ["UnknownEnvironment", "VecNormalize", "make_vec_env"]
