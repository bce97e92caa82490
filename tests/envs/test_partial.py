"""Classic control without velocities."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from envs import make_vec_env
from envs.partial import VELOCITIES, HideComponents, without_velocities
from envs.state import restore_state, state_of
from npg.runs.plain import from_text, to_text


@pytest.mark.parametrize("env_id", list(VELOCITIES))
def test_it_is_the_task_without_its_velocities(env_id):
    plain, hidden = gym.make(env_id), gym.make("npg/{}NoVel-{}".format(*env_id.split("-")))
    shown = [i for i in range(plain.observation_space.shape[0]) if i not in VELOCITIES[env_id]]
    assert hidden.observation_space.shape == (2,)
    assert np.array_equal(hidden.observation_space.high, plain.observation_space.high[shown])
    a, b = plain.reset(seed=3)[0], hidden.reset(seed=3)[0]
    plain.action_space.seed(0)
    for _ in range(500):
        assert np.array_equal(a[shown], b)
        assert hidden.observation_space.contains(b)
        action = plain.action_space.sample()
        (a, *rest, _), (b, *mine, _) = plain.step(action), hidden.step(action)
        assert rest == mine
        if any(rest[1:]):
            break
    else:
        pytest.fail("the episode did not end")


def test_vector_environments_have_it_with_its_limit_and_its_state():
    env = make_vec_env("npg/PendulumNoVel-v1", 2, seed=0)
    env.reset()
    actions = np.zeros((2, 1), np.float32)
    for _ in range(100):
        env.step(actions)
    state = to_text(state_of(env))
    first = [env.step(actions) for _ in range(100)]
    assert first[-1][2].all()
    assert first[-1][3][0]["TimeLimit.truncated"]
    assert first[-1][3][0]["terminal_observation"].shape == (2,)
    restore_state(env, from_text(state))
    for observations, rewards, dones, _ in first:
        again = env.step(actions)
        assert np.array_equal(again[0], observations)
        assert np.array_equal(again[1], rewards)
        assert np.array_equal(again[2], dones)


def test_what_cannot_be_hidden_is_refused():
    with pytest.raises(ValueError, match=r"env_id='Acrobot-v1' must be one of CartPole-v1, Pendulum-v1"):
        without_velocities("Acrobot-v1")
    env = gym.make("CartPole-v1")
    for hidden in ((4,), (-1,), (0, 0), (0, 1, 2, 3)):
        with pytest.raises(ValueError, match="hidden must be some of the components 0 to 3"):
            HideComponents(env, hidden)
    with pytest.raises(ValueError, match="only components of a vector"):
        HideComponents(gym.wrappers.TransformObservation(env, lambda x: 0, spaces.Discrete(2)), (0,))
