"""Values that no environment means are named before they do harm."""

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv

from agents import TRPO
from envs import VecNormalize
from envs.checks import LARGEST, check_values, unusable
from envs.vec_env import GymnasiumVecEnv


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_usable_and_what_is_not(dtype):
    rows = np.ones((3, 5), dtype)
    assert unusable(rows) is None
    assert unusable(np.full((3, 100), LARGEST / 2, dtype)) is None
    for value, what in ((np.nan, "is not finite"), (-np.inf, "is not finite"), (-1e30, "is 1.0e+30 in size")):
        bad = rows.copy()
        bad[1, 3] = value
        assert unusable(bad) == f"of environment 1 {what}"
    assert unusable(np.array([1e25, 0, np.nan], dtype)) == "of environment 2 is not finite"
    assert unusable(np.array([[255]], np.uint8)) is None
    with pytest.raises(FloatingPointError, match=r"pixels of environment 0 is not finite in step 3 of it: correct"):
        check_values({"vector": rows, "pixels": np.full((1, 2, 2), np.nan)}, None, "of it", 3)
    with pytest.raises(FloatingPointError, match=r"reward of environment 1 is 1.0e\+19 in size in step 4 of it"):
        check_values(rows, np.array([0.0, 1e19]), "of it", 4)


class Spoiled(gym.Env):
    """Gives `value` in its fifth step, in place of one number."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, what, value, of):
        self.what, self.value = what, value
        box = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.observation_space = gym.spaces.Dict({"a": box, "observation": box}) if of == "dict" else box

    def give(self, x):
        x = np.asarray(x, np.float32)
        return (
            {"a": np.zeros(3, np.float32), "observation": x}
            if isinstance(self.observation_space, gym.spaces.Dict)
            else x
        )

    def reset(self, **kwargs):
        self.time = 0
        return self.give(np.zeros(3)), {}

    def step(self, action):
        self.time += 1
        values = {"observation": self.time / 10, "reward": 1.0}
        if self.time == 5:
            values[self.what] = self.value
        return self.give([0, values["observation"], 0]), values["reward"], False, self.time == 20, {}


@pytest.mark.parametrize("what", ["observation", "reward"])
@pytest.mark.parametrize("value", [1e30, np.nan, -np.inf])
@pytest.mark.parametrize("of", ["array", "dict"])
def test_an_absurd_value_ends_before_it_is_in_the_statistics(what, value, of):
    envs = DummyVecEnv([lambda: Spoiled("reward", 1.0, of), lambda: Spoiled(what, value, of)])
    env = VecNormalize(envs)
    env.reset()
    for _ in range(4):
        env.step(np.zeros(2, int))
    before = env.ret_rms.var if of == "array" else None
    with pytest.raises(
        FloatingPointError, match=f"{what} of environment 1 is .* in step 5 under VecNormalize: correct"
    ):
        env.step(np.zeros(2, int))
    if of == "array":
        assert env.ret_rms.var == before
        assert env.obs_rms.var.max() < 10


@pytest.mark.parametrize("value", [1e30, np.nan])
def test_an_absurd_reward_is_named_without_normalisation_too(value):
    agent = TRPO("MlpPolicy", DummyVecEnv([lambda: Spoiled("reward", value, "array")]), n_steps=10, device="cpu")
    with pytest.raises(FloatingPointError, match=r"reward of environment 0 is .* in step 4 of the rollout"):
        agent.learn(20)


ARRAYS = [
    gym.spaces.Box(-1, 1, (3,), np.float32),
    gym.spaces.MultiBinary(3),
    gym.spaces.MultiDiscrete([2, 2, 2]),
]


class Stretched(gym.Env):
    action_space = gym.spaces.Discrete(2)

    def __init__(self, space, inside):
        self.part, self.inside = space, inside
        self.observation_space = gym.spaces.Dict({"a": ARRAYS[0], "b": space}) if inside else space

    def _observe(self, size):
        x = np.zeros(size, self.part.dtype)
        return {"a": np.zeros(3, np.float32), "b": x} if self.inside else x

    def reset(self, **kwargs):
        return self._observe(3), {}

    def step(self, action):
        return self._observe(1), 0.0, False, False, {}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("space", ARRAYS, ids=str)
def test_an_observation_of_another_shape_is_not_stretched(space, inside):
    env = GymnasiumVecEnv([lambda: Stretched(space, inside)])
    env.reset()
    part = " 'b'" if inside else ""
    with pytest.raises(
        ValueError, match=rf"environment 0 gave an observation{part} of shape \(1,\), and its space has \(3,\)"
    ):
        env.step([0])
