"""Environments go on from their saved state as if nothing had happened."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.classic_control import CartPoleEnv
from stable_baselines3.common.vec_env import VecEnv

from envs import VecNormalize, make_vec_env
from envs.state import has_state, restore_state, state_of
from npg.runs.plain import from_text, to_text

KNOWN = [
    *[(env, "gymnasium") for env in ("CartPole-v1", "Pendulum-v1", "MountainCar-v0", "MountainCarContinuous-v0")],
    *[("Acrobot-v1", "gymnasium"), ("npg/LQR-v0", "auto"), ("npg/LQR-v0", "gymnasium")],
    *[("npg/TwoStateMDP-v0", "auto"), ("npg/Tetris-v0", "auto"), ("npg/Tetris-v0", "gymnasium")],
    *[("npg/ConnectFour-v0", "auto"), ("npg/ConnectFour-v0", "gymnasium")],
    *[(f"{env}-v5", "gymnasium") for env in ("HalfCheetah", "Ant", "Humanoid", "Hopper", "Reacher", "Pusher")],
]


def actions(venv: VecEnv, observations: Any, rng: np.random.Generator) -> np.ndarray:
    space = venv.action_space
    if isinstance(space, gym.spaces.Box):
        return rng.uniform(-1, 1, (venv.num_envs, *space.shape)).astype(space.dtype) * np.minimum(space.high, 1)
    if observations.ndim == 3:  # of Tetris: the first legal placement, or one after it
        legal = [np.flatnonzero(rows[:, 0]) for rows in observations]
        return np.array([slots[rng.integers(len(slots))] for slots in legal])
    if observations.ndim == 4:  # of Connect Four: a column that is not full
        return np.array([rng.choice(np.flatnonzero(o[:, -1].sum(0) == 0)) for o in observations])
    return rng.integers(space.n, size=venv.num_envs)


def played(venv: VecEnv, observations: Any, steps: int, seed: int) -> list[Any]:
    rng, seen = np.random.default_rng(seed), []
    for _ in range(steps):
        observations, rewards, dones, infos = venv.step(actions(venv, observations, rng))
        told = [{k: v for k, v in (info.get("episode") or {}).items() if k != "t"} for info in infos]
        cut = [info.get("TimeLimit.truncated", False) for info in infos]
        last = [info.get("terminal_observation") for info in infos]
        seen.append((observations.copy(), rewards.copy(), dones.copy(), told, cut, last))
    return seen


def assert_alike(a: list[Any], b: list[Any]) -> None:
    for (xa, ra, da, ta, ca, la), (xb, rb, db, tb, cb, lb) in zip(a, b, strict=True):
        np.testing.assert_array_equal(xa, xb)
        np.testing.assert_array_equal(ra, rb)
        np.testing.assert_array_equal(da, db)
        assert (ta, ca) == (tb, cb)
        for one, other in zip(la, lb):
            np.testing.assert_array_equal(np.asarray(one, dtype=float), np.asarray(other, dtype=float))


@pytest.mark.parametrize(("env", "backend"), KNOWN)
@pytest.mark.parametrize("steps", [0, 37])
def test_environments_go_on_bit_for_bit(env, backend, steps):
    a, b = (make_vec_env(env, 3, seed, backend=backend) for seed in (0, 1))
    observations = a.reset()
    for before in played(a, observations, steps, 0):
        observations = before[0]
    assert has_state(a)
    state = to_text(state_of(a))
    restore_state(b, from_text(state))
    going_on = played(a, observations, 260, 1)
    assert_alike(played(b, observations, 260, 1), going_on)
    if env not in ("HalfCheetah-v5", "Acrobot-v1", "MountainCarContinuous-v0"):  # their episodes are longer
        assert any(dones.any() for _, _, dones, *_ in going_on[:220])  # new episodes are alike too
    a.close()
    b.close()


class Hidden(CartPoleEnv):
    """An environment of a user: what it hides is not known."""


def delayed(**kwargs):
    """CartPole with the observation of the step before, which a function remembers."""
    seen = [np.zeros(4, np.float32)]

    def before(observation):
        seen.append(observation)
        return seen.pop(0)

    env = gym.make("CartPole-v1", **kwargs)
    return gym.wrappers.TransformObservation(env, before, env.observation_space)


def test_nothing_is_claimed_of_other_environments():
    gym.register("Hidden-v0", entry_point=Hidden)
    gym.register("Delayed-v0", entry_point=delayed)
    for env, backend in [("CartPole-v1", "envpool"), ("Hidden-v0", "gymnasium"), ("Delayed-v0", "gymnasium")]:
        venv = make_vec_env(env, 2, 0, backend=backend)
        assert not has_state(venv)
        with pytest.raises(TypeError, match="cannot be saved"):
            state_of(venv)
        venv.close()
    assert has_state(VecNormalize(make_vec_env("CartPole-v1", 2, 0, backend="gymnasium")))


def test_the_state_of_other_environments_is_refused():
    pole, two, pendulum = (
        make_vec_env(env, n, 0, backend="gymnasium")
        for env, n in (("CartPole-v1", 2), ("CartPole-v1", 1), ("Pendulum-v1", 2))
    )
    pole.reset()
    for other in (two, pendulum):
        with pytest.raises(ValueError, match="the saved state is of"):
            restore_state(other, state_of(pole))
