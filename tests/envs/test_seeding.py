"""Independent runs draw from independent streams, on every backend."""

from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3 import PPO

from envs import VecNormalize, make_vec_env
from envs.envpool_vec_env import import_envpool
from envs.seeding import RUN_SEEDS, Purpose, environment_seeds, purpose_seed, stream_seed
from envs.vec_env import VectorEnvAdapter

N = 64
needs_envpool = pytest.mark.skipif(import_envpool() is None, reason="needs EnvPool")
BACKENDS = [pytest.param("envpool", marks=needs_envpool), "gymnasium"]


def keys(seeds):
    """The seeds of all that runs with these seeds do: training, the evaluations, and training that goes on."""
    for seed in seeds:
        yield seed
        yield from (purpose_seed(seed, purpose) for purpose in Purpose)
        yield from (purpose_seed(seed, Purpose.RESUMED_TRAINING, steps) for steps in (2048, 4096, 10**6))


def test_no_two_seeds_are_equal():
    seeds = [s for key in keys(range(128)) for s in environment_seeds(key, N)]
    assert len(set(seeds)) == len(seeds) == 128 * 8 * N
    assert 0 <= min(seeds) <= max(seeds) < 2**31


def test_no_two_parts_of_runs_draw_the_same():
    seeds = [stream_seed(seed, index) for seed in range(64) for index in range(64)]
    assert len({*range(128), *seeds}) == 128 + 64 * 64
    assert 0 <= min(seeds) <= max(seeds) < 2**63


def test_a_seed_depends_on_run_and_index_only():
    assert environment_seeds(3, 8)[4:] == environment_seeds(3, 4, first=4)
    assert environment_seeds(3, 8) != environment_seeds(4, 8)


def test_purposes_lie_apart_for_all_runs():
    largest = RUN_SEEDS - 1
    ranges = [(purpose_seed(0, p, t), purpose_seed(largest, p, t)) for p, t in [*((p, 0) for p in Purpose), (4, 1)]]
    assert largest < ranges[0][0]
    assert all(a[1] < b[0] for a, b in pairwise(ranges))
    for seed in (-1, RUN_SEEDS):
        with pytest.raises(ValueError, match=f"seed={seed} must be"):
            purpose_seed(seed, Purpose.EVALUATION)


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_observations_of_all_runs_and_purposes_differ(backend):
    env = make_vec_env("CartPole-v1", N, backend=backend)
    first = []
    for key in keys(range(10)):
        env.seed(key)
        first.append(env.reset())
    first = np.concatenate(first)
    assert len(np.unique(first, axis=0)) == len(first) == 10 * 8 * N


def test_the_generators_of_all_runs_and_purposes_differ():
    env, task = make_vec_env("CartPole-v1", N, backend="gymnasium"), make_vec_env("npg/Tetris-v0", N)
    states, streams = set(), set()
    for key in keys(range(10)):
        for venv in (env, task):
            venv.seed(key)
            venv.reset()
        states |= {inner.unwrapped.np_random.bit_generator.state["state"]["state"] for inner in env.envs}
        streams |= set(task.vector_env.unwrapped.batch._streams[:, 0].tolist())
    assert len(states) == len(streams) == 10 * 8 * N


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "npg/Tetris-v0", "npg/LQR-v0"])
def test_neighbouring_runs_share_nothing_and_equal_runs_everything(env_id, backend):
    if env_id.startswith("npg/"):
        backend = "auto"

    def begin(seed):
        env = make_vec_env(env_id, 32, seed, backend)
        observations = [env.reset()]
        if env_id == "npg/LQR-v0":  # begins in 0
            observations = [env.step(np.zeros((32, 1)))[0]]
        elif env_id == "npg/Tetris-v0":  # of 7 pieces; the streams themselves are compared above
            return env.vector_env.unwrapped.batch._streams.copy()
        return np.concatenate(observations)

    both = np.concatenate([begin(0), begin(1)])
    assert len(np.unique(both, axis=0)) == 64
    np.testing.assert_array_equal(begin(0), both[:32])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_of_the_environments_are_those_of_the_whole(backend):
    whole = make_vec_env("CartPole-v1", 8, 5, backend).reset()
    env = VecNormalize(make_vec_env("CartPole-v1", 4, backend=backend), norm_obs=False)
    env.unwrapped.seed(5, first=4)
    np.testing.assert_array_equal(env.reset(), whole[4:])


def test_gymnasiums_own_environment_is_the_same_with_the_same_seed():
    env = make_vec_env("CartPole-v1", 2, backend="gymnasium")
    seeds = env.seed(7)
    first = env.reset()
    for i in range(2):
        np.testing.assert_array_equal(gym.make("CartPole-v1").reset(seed=seeds[i])[0], first[i])


@pytest.mark.parametrize("backend", BACKENDS)
def test_agents_seed_environments_so_too(backend):
    """Stable-Baselines3's constructor seeds them once more."""
    env = make_vec_env("CartPole-v1", 4, 0, backend)
    PPO("MlpPolicy", VecNormalize(env), seed=1, n_steps=16, batch_size=16, device="cpu")
    assert env._seeds == environment_seeds(1, 4)


class OneSeed(VectorEnv):
    """Takes an integer, as Gymnasium's base class does, and seeds its environments with seed + i."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012
    num_envs = 32
    single_observation_space = gym.spaces.Box(0, 1, (2,), np.float64)
    single_action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.stack([np.random.default_rng(seed + i).random(2) for i in range(32)]), {}


def test_a_vector_form_that_takes_one_integer_is_served():
    def begin(seed):
        env = VectorEnvAdapter(OneSeed())
        env.seed(seed)
        return env.reset()

    assert len(np.unique(np.concatenate([begin(seed) for seed in range(10)]), axis=0)) == 320
