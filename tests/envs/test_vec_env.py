"""ArrayVecEnv against Stable-Baselines3's DummyVecEnv, which defines what a VecEnv returns."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from envs.vec_env import GymnasiumVecEnv, VectorEnvAdapter, float32_space

N = 4


def cartpole() -> gym.Env:
    return gym.make("CartPole-v1", max_episode_steps=25)


@pytest.fixture
def adapter() -> VectorEnvAdapter:
    return VectorEnvAdapter(SyncVectorEnv([cartpole] * N, autoreset_mode=AutoresetMode.SAME_STEP))


def test_returns_what_dummy_vec_env_returns(adapter):
    reference = GymnasiumVecEnv([lambda: Monitor(cartpole())] * N)
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


class Pair(gym.Env):
    """A Dict of two arrays; the episode is truncated after `length` steps."""

    observation_space = gym.spaces.Dict({"x": gym.spaces.Box(-9, 9, (2,), np.float32), "n": gym.spaces.Discrete(9)})
    action_space = gym.spaces.Discrete(2)

    def __init__(self, length: int = 3) -> None:
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n = 0
        return self._see(), {}

    def step(self, action):
        self.n += 1
        return self._see(), 1.0, False, self.n == self.length, {}

    def _see(self):
        return {"x": self.np_random.random(2, dtype=np.float32), "n": self.n}


def pairs(kind, **options):
    return kind([lambda i=i: Pair(3 + i % 2) for i in range(N)], **options)


@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
def test_dict_observations_are_those_of_dummy_vec_env(kind):
    adapter = VectorEnvAdapter(pairs(kind, autoreset_mode=AutoresetMode.SAME_STEP))
    reference = GymnasiumVecEnv([lambda i=i: Monitor(Pair(3 + i % 2)) for i in range(N)])
    assert adapter.observation_space == reference.observation_space
    adapter.seed(0)
    reference.seed(0)

    def assert_same(a, b):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
            assert np.asarray(a[key]).dtype == np.asarray(b[key]).dtype

    assert_same(adapter.reset(), reference.reset())
    ended = 0
    for _ in range(8):
        ours, theirs = adapter.step(np.zeros(N, int)), reference.step(np.zeros(N, int))
        assert_same(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[2], theirs[2])
        for i in np.flatnonzero(ours[2]):
            assert_same(ours[3][i]["terminal_observation"], theirs[3][i]["terminal_observation"])
            assert ours[3][i]["TimeLimit.truncated"] is True
            ended += 1
    assert ended == 8
    adapter.close()


def test_an_agent_learns_on_dict_observations():
    env = VecNormalize(VectorEnvAdapter(pairs(SyncVectorEnv, autoreset_mode=AutoresetMode.SAME_STEP)), norm_obs=False)
    model = PPO("MultiInputPolicy", env, n_steps=8, batch_size=16, seed=0, device="cpu").learn(64)
    assert len(model.ep_info_buffer) > 0


def test_observations_that_are_no_arrays_are_refused():
    class Tuples(Pair):
        observation_space = gym.spaces.Tuple([gym.spaces.Discrete(3), gym.spaces.Discrete(3)])

    class Nested(Pair):
        observation_space = gym.spaces.Dict({"a": Pair.observation_space})

    for env in (Tuples, Nested):
        with pytest.raises(ValueError, match=r"observation space .*one array .*or a Dict of arrays.*flatten_space"):
            VectorEnvAdapter(SyncVectorEnv([env], autoreset_mode=AutoresetMode.SAME_STEP))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda infos: infos.pop("final_obs"),
        lambda infos: infos.update(final_observation=infos.pop("final_obs")),  # Gymnasium's name before 1.0
        lambda infos: infos.update(final_obs=np.full(N, None, dtype=object)),
        lambda infos: infos.update(_final_obs=np.zeros(N, dtype=bool)),
    ],
)
def test_an_episode_without_its_last_observation_is_an_error(adapter, spoil):
    step = adapter.vector_env.step

    def spoilt(actions):
        *transition, infos = step(actions)
        if "final_obs" in infos:
            spoil(infos)
        return *transition, infos

    adapter.vector_env.step = spoilt
    adapter.reset()

    def play():
        for _ in range(60):
            adapter.step(np.zeros(N, dtype=int))

    with pytest.raises(RuntimeError, match=r"SyncVectorEnv ended the episode of environment \d without .*final_obs"):
        play()


@pytest.mark.parametrize("batched", [lambda x: np.stack(list(x)), list])
def test_last_observations_may_be_any_sequence(adapter, batched):
    """An object array is what Gymnasium gives; an array of all, or a list, says the same."""
    step, expected = adapter.vector_env.step, []

    def other(actions):
        observations, *transition, infos = step(actions)
        if "final_obs" in infos:
            expected.extend(infos["final_obs"][infos["_final_obs"]])
            infos["final_obs"] = batched([x if x is not None else observations[0] for x in infos["final_obs"]])
        return observations, *transition, infos

    adapter.vector_env.step = other
    adapter.reset()
    seen = [i["terminal_observation"] for _ in range(60) for i in adapter.step(np.zeros(N, dtype=int))[3] if i]
    assert len(seen) > N
    np.testing.assert_array_equal(seen, expected)
