"""VecNormalize against Stable-Baselines3's: the same steps, statistics and files."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.common.vec_env import VecNormalize as Original

from envs import VecNormalize


class Walk(gym.Env):
    """A random walk far from zero with short episodes; any observation space."""

    def __init__(self, space: spaces.Space) -> None:
        self.observation_space, self.action_space = space, spaces.Discrete(2)

    def _observe(self):
        x = (self.x + 500.0).astype(np.float32)
        return {"a": x, "b": x[:1]} if isinstance(self.observation_space, spaces.Dict) else x

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.steps = self.np_random.normal(size=3), 0
        return self._observe(), {}

    def step(self, action):
        self.x = self.x + self.np_random.normal(size=3) * [1.0, 1e-3, 30.0]
        self.steps += 1
        return self._observe(), float(self.np_random.normal(3.0, 10.0)), False, self.steps >= 7, {}


VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float32)
DICT = spaces.Dict({"a": VECTOR, "b": spaces.Box(-np.inf, np.inf, (1,), np.float32)})


def walks(space: spaces.Space) -> DummyVecEnv:
    env = DummyVecEnv([lambda: Walk(space)] * 4)
    env.seed(0)
    return env


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_obs": False},
        {"norm_reward": False},
        {"training": False},
        {"clip_obs": 0.5, "clip_reward": 0.3, "gamma": 0.9, "epsilon": 1e-2},
    ],
    ids=str,
)
@pytest.mark.parametrize("space", [VECTOR, DICT], ids=["vector", "dict"])
def test_steps_and_statistics_equal_those_of_stable_baselines3(space, options):
    ours, theirs = VecNormalize(walks(space), **options), Original(walks(space), **options)
    seen = [(ours.reset(), theirs.reset())]
    ended = 0
    for _ in range(40):
        (a, reward_a, done_a, infos_a), (b, reward_b, done_b, infos_b) = (
            env.step(np.zeros(4, dtype=np.int64)) for env in (ours, theirs)
        )
        seen.append((a, b))
        assert reward_a.dtype == reward_b.dtype
        np.testing.assert_allclose(reward_a, reward_b, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(done_a, done_b)
        for info_a, info_b in zip(infos_a, infos_b):
            assert info_a.keys() == info_b.keys()
            if "terminal_observation" in info_a:
                ended += 1
                seen.append((info_a["terminal_observation"], info_b["terminal_observation"]))
        np.testing.assert_allclose(ours.get_original_reward(), theirs.get_original_reward())
    assert ended == 20
    for a, b in seen:
        parts = [(a[key], b[key]) for key in a] if isinstance(a, dict) else [(a, b)]
        for x, y in parts:
            assert x.dtype == y.dtype
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.ret_rms.var, theirs.ret_rms.var, rtol=1e-9)
    np.testing.assert_allclose(ours.returns, theirs.returns)
    if options.get("norm_obs", True):
        of = (lambda env: env.obs_rms.values()) if space is DICT else (lambda env: [env.obs_rms])
        for a, b in zip(of(ours), of(theirs), strict=True):
            for name in ("mean", "var", "count"):
                # theirs are moments of float32 numbers in float32
                np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-5)


def test_parts_of_a_dict_that_are_not_named_stay_as_they_are():
    env, original = (cls(walks(DICT), norm_obs_keys=["b"]) for cls in (VecNormalize, Original))
    for one in (env, original):
        one.reset()
    (seen, *_), (theirs, *_) = (one.step(np.zeros(4, dtype=np.int64)) for one in (env, original))
    np.testing.assert_array_equal(seen["a"], env.get_original_obs()["a"])
    np.testing.assert_array_equal(seen["a"], theirs["a"])
    np.testing.assert_allclose(seen["b"], theirs["b"], rtol=1e-4, atol=1e-5)
    assert list(env.obs_rms) == ["b"]


class Broken(Walk):
    """The same walk; its last observation is infinite, and the episode was cut off there."""

    def step(self, action):
        x, reward, _, ended, info = super().step(action)
        for part in x.values() if ended and isinstance(x, dict) else [x] if ended else []:
            part[0] = np.inf
        return x, reward, False, ended, info


@pytest.mark.parametrize("space", [VECTOR, DICT], ids=["vector", "dict"])
def test_an_infinite_last_observation_is_named_and_not_cut_off(space):
    env = VecNormalize(DummyVecEnv([lambda: Broken(space)]))
    env.reset()
    for _ in range(6):
        env.step(np.zeros(1, dtype=np.int64))
    with pytest.raises(FloatingPointError, match=r"last observation.* of environment 0, .* step 7 under"):
        env.step(np.zeros(1, dtype=np.int64))


class Wild(Walk):
    def step(self, action):
        x, *rest = super().step(action)
        return {name: np.full_like(part, np.nan) for name, part in x.items()}, *rest


def test_statistics_of_a_dict_stay_as_they_were_where_an_observation_is_refused():
    env = VecNormalize(DummyVecEnv([lambda: Wild(DICT)]))
    env.reset()
    before = {name: (of.mean.copy(), of.var.copy(), of.count) for name, of in env.obs_rms.items()}
    with pytest.raises(FloatingPointError, match="a of environment 0 is not finite in step 1 under VecNormalize"):
        env.step(np.zeros(1, dtype=np.int64))
    for name, of in env.obs_rms.items():
        for was, now in zip(before[name], (of.mean, of.var, of.count), strict=True):
            np.testing.assert_array_equal(was, now)


def test_observations_of_the_environment_are_not_written_to():
    env = VecNormalize(walks(VECTOR))
    env.reset()
    env.step(np.zeros(4, dtype=np.int64))
    assert np.all(env.get_original_obs()[:, 1] > 400.0)


def test_saved_statistics_go_on_in_either_class(tmp_path):
    env = VecNormalize(walks(VECTOR))
    env.reset()
    for _ in range(5):
        env.step(np.zeros(4, dtype=np.int64))
    env.save(str(tmp_path / "statistics.pkl"))
    for cls in (VecNormalize, Original):
        loaded = cls.load(str(tmp_path / "statistics.pkl"), walks(VECTOR))
        assert isinstance(loaded, VecNormalize)
        np.testing.assert_array_equal(loaded.obs_rms.mean, env.obs_rms.mean)
        assert loaded.ret_rms.var == env.ret_rms.var


@pytest.mark.parametrize(
    ("argument", "value", "wanted"),
    [
        ("clip_obs", -5.0, "above 0"),
        ("clip_obs", 0.0, "above 0"),
        ("clip_obs", np.nan, "above 0"),
        ("clip_reward", -1.0, "above 0"),
        ("epsilon", -1.0, "above 0"),
        ("epsilon", 0.0, "above 0"),
        ("gamma", 2.0, r"in \[0, 1\]"),
        ("gamma", -0.1, r"in \[0, 1\]"),
        ("gamma", np.nan, r"in \[0, 1\]"),
    ],
)
def test_arguments_out_of_their_range_are_refused(argument, value, wanted):
    with pytest.raises(ValueError, match=f"^{argument} must be a number {wanted}, got {value}"):
        VecNormalize(walks(VECTOR), **{argument: value})


def test_no_bound_and_the_ends_of_the_discount_are_taken():
    for options in ({"clip_obs": np.inf, "clip_reward": np.inf}, {"gamma": 0.0}, {"gamma": 1.0}):
        assert np.isfinite(VecNormalize(walks(VECTOR), **options).reset()).all()
