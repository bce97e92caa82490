"""Robots with a limit on their speed."""

from __future__ import annotations

from math import hypot, inf, nan

import gymnasium as gym
import numpy as np
import pytest

from envs import make_vec_env, velocity_limited
from envs.state import has_state, restore_state, state_of
from envs.velocity import LIMITS, VelocityCost

mujoco = pytest.importorskip("mujoco")


@pytest.mark.parametrize("name", LIMITS)
def test_the_cost_is_one_above_the_limit(name):
    """The steps are the robot's own, at a limit that one of them passes."""
    plain = gym.make(f"{name}-v5")
    plain.reset(seed=0)
    plain.action_space.seed(0)
    actions = [plain.action_space.sample() for _ in range(60)]
    steps = [plain.step(action) for action in actions]
    speeds = [info["x_velocity"] for *_, info in steps]
    if name in ("Ant", "Humanoid"):
        speeds = [hypot(info["x_velocity"], info["y_velocity"]) for *_, info in steps]
    limit = float(np.mean(sorted(speeds)[-2:]))
    limited = velocity_limited(f"{name}-v5", limit=limit)
    limited.reset(seed=0)
    for action, speed, (*expected, info) in zip(actions, speeds, steps, strict=True):
        *found, own = limited.step(action)
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_array_equal(a, b)
        assert own.pop("cost") == float(speed == max(speeds))
        assert own.keys() == info.keys()
    assert velocity_limited(f"{name}-v5").limit == LIMITS[name]


@pytest.mark.parametrize("name", LIMITS)
def test_every_robot_has_an_id(name):
    env = make_vec_env(f"npg/{name}Velocity-v5", 2, seed=0, backend="gymnasium")
    env.reset()
    *_, infos = env.step(np.stack([env.action_space.sample()] * 2))
    assert [set(info) >= {"cost", "x_velocity"} for info in infos] == [True, True]
    assert env.get_attr("limit") == [LIMITS[name]] * 2
    env.close()


@pytest.mark.parametrize("backend", ["gymnasium", "auto"])
def test_an_episode_lasts_as_long_as_the_robot_s_own_and_has_its_statistics(backend):
    env = make_vec_env("npg/HalfCheetahVelocity-v5", 1, seed=0, backend=backend, env_kwargs={"limit": 0.05})
    env.reset()
    for step in range(1, 1001):
        _, _, dones, infos = env.step(env.action_space.sample()[None])
        assert dones[0] == (step == 1000)
    assert infos[0]["episode"]["l"] == 1000
    assert infos[0]["TimeLimit.truncated"]
    assert "cost" in infos[0]
    env.close()


def test_its_state_can_be_saved():
    a, b = (make_vec_env("npg/HopperVelocity-v5", 2, seed, "gymnasium") for seed in (0, 1))
    a.reset()
    actions = np.stack([a.action_space.sample() for _ in range(2)])
    a.step(actions)
    assert has_state(a)
    restore_state(b, state_of(a))
    for x, y in zip(a.step(actions)[:3], b.step(actions)[:3], strict=True):
        np.testing.assert_array_equal(x, y)


def test_what_has_no_limit_or_no_velocity_is_refused():
    with pytest.raises(ValueError, match="env_id='Reacher-v5' has no limit of its own: there are limits for Ant, "):
        velocity_limited("Reacher-v5")
    for limit in (0.0, -1.0, nan, inf, True, "fast"):
        with pytest.raises(ValueError, match="must be a positive number of metres per second"):
            velocity_limited("Hopper-v5", limit=limit)
    env = VelocityCost(gym.make("CartPole-v1"), 1.0)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"x_velocity.*only robots whose velocity it tells can be limited"):
        env.step(0)
