"""MuJoCo's robots with a limit on their speed: the cost of a step is 1 above it, else 0."""

from __future__ import annotations

from math import hypot, inf
from numbers import Real
from typing import Any

import gymnasium as gym

__all__ = ["LIMITS", "PLANAR", "ROBOTS", "VelocityCost", "checked_limit", "velocity_limited"]

#: In metres per second, as Safety-Gymnasium sets them (its SafetyAntVelocity-v1 and so on).
LIMITS = {
    "Ant": 2.6222,
    "HalfCheetah": 3.2096,
    "Hopper": 0.7402,
    "Humanoid": 1.4149,
    "Swimmer": 0.2282,
    "Walker2d": 2.3415,
}
#: Robots that run in the plane: their speed is √(x² + y²), and that of all others the one along x.
PLANAR = ("Ant", "Humanoid")
#: The robot's id, by that of its task with a limit.
ROBOTS = {f"npg/{name}Velocity-v5": f"{name}-v5" for name in LIMITS}


class VelocityCost(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """An environment with ``info["cost"]``: 1 in steps whose speed is above a limit, else 0.

    Args:
        env: with ``info["x_velocity"]``, in metres per second.
        limit: in metres per second.
        planar: take √(x² + y²), with ``info["y_velocity"]``, in place of the velocity along x.

    Raises:
        ValueError: if the limit is not a positive number; from `step`, if the environment does not tell a velocity.
    """

    def __init__(self, env: gym.Env[Any, Any], limit: float, planar: bool = False) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, limit=limit, planar=planar)
        gym.Wrapper.__init__(self, env)
        self.limit, self.planar = checked_limit(limit), planar

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """The environment's step, with its cost."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        try:
            velocity = info["x_velocity"]
            if self.planar:
                velocity = hypot(velocity, info["y_velocity"])
        except KeyError as error:
            raise ValueError(
                f"{self.env.unwrapped!r} gives no info[{error}]: only robots whose velocity it tells can be limited."
            ) from error
        return observation, reward, terminated, truncated, {**info, "cost": float(velocity > self.limit)}


def checked_limit(limit: Any) -> float:
    """A limit in metres per second, or ValueError if it is not a positive number."""
    if isinstance(limit, bool) or not isinstance(limit, Real) or not 0 < (speed := float(limit)) < inf:
        raise ValueError(f"limit={limit!r} must be a positive number of metres per second.")
    return speed


def velocity_limited(env_id: str, limit: float | None = None, **kwargs: Any) -> gym.Env[Any, Any]:
    """A robot of MuJoCo whose steps cost 1 above a limit of its speed: ``info["cost"]``, for `agents.CPO`.

    The limits are those of Safety-Gymnasium: Ant 2.6222, HalfCheetah 3.2096, Hopper 0.7402, Humanoid 1.4149, Swimmer
    0.2282 and Walker2d 2.3415 m/s, of the velocity along x, and for Ant and Humanoid of √(x² + y²). The same tasks are
    registered as ``npg/HalfCheetahVelocity-v5`` and so on, for `make_vec_env` and ``train_agent.py``.

    Args:
        env_id: such as ``HalfCheetah-v5``.
        limit: another one, in metres per second; for a robot that is not in the list it must be given.
        kwargs: of the environment.

    Raises:
        ValueError: if there is no limit for the robot, or it is no positive number.
    """
    name = env_id.rpartition("-")[0].rpartition("/")[2] or env_id
    if limit is None and name not in LIMITS:
        raise ValueError(
            f"env_id={env_id!r} has no limit of its own: there are limits for {', '.join(LIMITS)}. Give limit=…, in "
            "metres per second."
        )
    env = gym.make(env_id, disable_env_checker=True, **kwargs)
    return VelocityCost(env, LIMITS[name] if limit is None else limit, planar=name in PLANAR)
