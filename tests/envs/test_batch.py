"""What holds for every task of this package because of `envs.batch`."""

import gymnasium as gym
import numpy as np
import pytest

import envs  # noqa: F401

TASKS = {
    "npg/LQR-v0": {},
    "npg/TwoStateMDP-v0": {},
    "npg/Tetris-v0": {"height": 6, "features": "bertsekas"},
    "npg/ConnectFour-v0": {},
}


def actions(task, observations, rng):
    if task == "npg/LQR-v0":
        return rng.normal(size=(len(observations), 1)).astype(np.float32)
    if task == "npg/TwoStateMDP-v0":
        return rng.integers(2, size=len(observations))
    if task == "npg/ConnectFour-v0":
        return np.array([rng.choice(np.flatnonzero(o[:, -1].sum(0) == 0)) for o in observations])
    return np.array([rng.choice(np.flatnonzero(o[:, 0])) for o in observations])


@pytest.mark.parametrize("task", TASKS)
def test_a_vector_is_its_single_environments_step_for_step(task):
    n, rng = 3, np.random.default_rng(0)
    vector = gym.make_vec(task, n, **TASKS[task])
    singles = [gym.make(task, **TASKS[task]) for _ in range(n)]
    observations, _ = vector.reset(seed=7)
    for i, env in enumerate(singles):
        np.testing.assert_array_equal(env.reset(seed=7 + i)[0], observations[i])
    ended = 0
    for _ in range(150):
        action = actions(task, observations, rng)
        observations, rewards, terminated, truncated, infos = vector.step(action)
        for i, env in enumerate(singles):
            observation, reward, term, trunc, _ = env.step(action[i])
            assert (reward, term, trunc) == (rewards[i], terminated[i], truncated[i])
            if term or trunc:
                ended += 1
                np.testing.assert_array_equal(observation, infos["final_obs"][i])
                assert infos["_final_obs"][i]
                observation, _ = env.reset()
            np.testing.assert_array_equal(observation, observations[i])
    assert ended >= n


@pytest.mark.parametrize("task", TASKS)
def test_observations_belong_to_their_space_and_are_not_overwritten(task):
    rng = np.random.default_rng(1)
    env = gym.make_vec(task, 2, **TASKS[task])
    observations, _ = env.reset(seed=0)
    kept, copies = [], []
    for _ in range(30):
        assert all(env.single_observation_space.contains(o) for o in observations)
        kept.append(observations)
        copies.append(np.array(observations))
        observations = env.step(actions(task, observations, rng))[0]
    for a, b in zip(kept, copies):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_run_other_seed_other_run(task):
    def run(seed):
        env = gym.make_vec(task, 4, **TASKS[task])
        observations, _ = env.reset(seed=seed)
        rng, seen = np.random.default_rng(5), []
        for _ in range(10):
            observations, rewards, *_ = env.step(actions(task, observations, rng))
            seen.append((observations, rewards))
        return seen

    first, again, other = run(1), run(1), run(2)
    assert all((a == b).all() for x, y in zip(first, again) for a, b in zip(x, y))
    assert not all((a == b).all() for x, y in zip(first, other) for a, b in zip(x, y))


def test_misuse_is_named():
    with pytest.raises(ValueError, match="render_mode"):
        gym.make("npg/LQR-v0", render_mode="ascii")
    with pytest.raises(ValueError, match="max_episode_steps"):
        gym.make_vec("npg/TwoStateMDP-v0", 2, max_episode_steps=0)
    env = gym.make_vec("npg/LQR-v0", 2)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros((2, 1)))
    with pytest.raises(gym.error.ResetNeeded):
        gym.make("npg/LQR-v0").unwrapped.step(np.zeros(1))
    with pytest.raises(ValueError, match="seed"):
        env.reset(seed=[1, 2, 3])
    env.reset(seed=0)
    with pytest.raises(ValueError, match="shape"):
        env.step(np.zeros(2))
