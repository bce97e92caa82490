"""ArrayVecEnv against Stable-Baselines3's DummyVecEnv, which defines what a VecEnv returns."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from envs.vec_env import VectorEnvAdapter, float32_space

N = 4


def cartpole() -> gym.Env:
    return gym.make("CartPole-v1", max_episode_steps=25)


@pytest.fixture
def adapter() -> VectorEnvAdapter:
    return VectorEnvAdapter(SyncVectorEnv([cartpole] * N, autoreset_mode=AutoresetMode.SAME_STEP))


def test_returns_what_dummy_vec_env_returns(adapter):
    reference = DummyVecEnv([lambda: Monitor(cartpole())] * N)
    adapter.seed(3)
    reference.seed(3)
    np.testing.assert_array_equal(adapter.reset(), reference.reset())
    rng = np.random.default_rng(0)
    endings = {True: 0, False: 0}
    for _ in range(300):
        actions = rng.integers(0, 2, N)
        ours, theirs = adapter.step(actions), reference.step(actions)
        for a, b in zip(ours[:3], theirs[:3]):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
        for done, a, b in zip(ours[2], ours[3], theirs[3]):
            if not done:
                assert a == {}
                continue
            np.testing.assert_array_equal(a["terminal_observation"], b["terminal_observation"])
            assert a["TimeLimit.truncated"] is bool(b["TimeLimit.truncated"])
            assert (a["episode"]["r"], a["episode"]["l"]) == (b["episode"]["r"], b["episode"]["l"])
            assert a["episode"]["t"] >= 0
            endings[a["TimeLimit.truncated"]] += 1
    assert min(endings.values()) > 0  # both kinds of ending were compared


def test_failing_in_the_very_last_step_is_not_a_truncation(adapter):
    """Where a termination and the time limit coincide there is nothing to bootstrap from."""
    env = adapter.vector_env
    step = env.step

    def both(actions):
        observations, rewards, terminated, truncated, infos = step(actions)
        return observations, rewards, terminated | truncated, truncated, infos

    env.step = both
    adapter.reset()
    seen = [info["TimeLimit.truncated"] for _ in range(60) for info in adapter.step(np.tile([0, 1], N // 2))[3] if info]
    assert seen
    assert not any(seen)


def test_infos_are_not_shared_between_steps(adapter):
    adapter.reset()
    infos = adapter.step(np.zeros(N, dtype=int))[3]
    for info in infos:
        info["mine"] = 1
    assert adapter.step(np.zeros(N, dtype=int))[3] == [{}] * N


def test_reset_in_the_middle_begins_new_statistics(adapter):
    adapter.seed(0)
    adapter.reset()
    for _ in range(3):
        adapter.step(np.zeros(N, dtype=int))
    adapter.step_async(np.zeros(N, dtype=int))  # a step that nobody waits for
    adapter.reset()
    steps, dones = 0, np.zeros(N, dtype=bool)
    while not dones.any():
        _, _, dones, infos = adapter.step(np.zeros(N, dtype=int))
        steps += 1
    assert {info["episode"]["l"] for info in infos if info} == {steps}


def test_steps_and_waits_alternate(adapter):
    adapter.reset()
    with pytest.raises(RuntimeError, match="step_async"):
        adapter.step_wait()
    adapter.step_async(np.zeros(N, dtype=int))
    with pytest.raises(RuntimeError, match="step_wait"):
        adapter.step_async(np.zeros(N, dtype=int))


def test_what_the_environments_cannot_do_is_said(adapter):
    assert adapter.get_attr("render_mode") == [None] * N
    assert adapter.get_attr("action_space", indices=[0]) == [adapter.action_space]
    for call in (
        lambda: adapter.get_attr("state"),
        lambda: adapter.set_attr("state", 0),
        lambda: adapter.env_method("close"),
    ):
        with pytest.raises(AttributeError, match="backend='gymnasium'"):
            call()
    with pytest.raises(RuntimeError, match="backend='gymnasium'"):
        adapter.render()
    with pytest.raises(ValueError, match="backend='gymnasium'"):
        adapter.set_options({"low": 0.0})
    adapter.set_options({})


def test_counts_as_monitored_and_as_nothing_else(adapter):
    assert adapter.env_is_wrapped(Monitor) == [True] * N
    assert adapter.env_is_wrapped(gym.wrappers.TimeLimit, indices=[1]) == [False]
    assert not isinstance(adapter, VecMonitor)


def test_memory_that_is_used_again_is_copied():
    env = VectorEnvAdapter(SyncVectorEnv([cartpole] * N, autoreset_mode=AutoresetMode.SAME_STEP, copy=False))
    env.seed(0)
    first = env.reset()
    kept = first.copy()
    env.step(np.zeros(N, int))
    np.testing.assert_array_equal(first, kept)


def test_other_ways_to_reset_are_refused():
    with pytest.raises(ValueError, match="SAME_STEP"):
        VectorEnvAdapter(SyncVectorEnv([cartpole], autoreset_mode=AutoresetMode.NEXT_STEP))


def test_float32_space():
    box = gym.spaces.Box(-np.inf, 0.1, (3,), np.float64)
    assert float32_space(box) == gym.spaces.Box(-np.inf, 0.1, (3,), np.float32)
    for space in (gym.spaces.Box(0, 255, (2, 2), np.uint8), gym.spaces.Discrete(3)):
        assert float32_space(space) is space
