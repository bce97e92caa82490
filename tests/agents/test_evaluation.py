"""Evaluations: what is not finite is named, with its place."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from agents import NPG, TRPO
from agents.callbacks import Evaluator
from agents.config import RunConfig, resolve
from agents.evaluation import Stopped, _rendering_env, check_video, evaluate, evaluate_saved, film
from agents.training import start
from npg.runs.signals import StopRequest


def poisoned(env: str, what: str, at: int) -> Any:
    """Two environments, of which the second has one NaN."""
    venv = make_vec_env(env, 2, seed=0)
    step, reset, steps = venv.step_wait, venv.reset, iter(range(1, 1000))

    def step_wait() -> Any:
        observations, rewards, dones, infos = step()
        if next(steps) == at:
            {"observation": observations, "reward": rewards}[what][1] = np.nan
        return observations, rewards, dones, infos

    def first() -> Any:
        observations = reset()
        if at == 0:
            observations[1] = np.nan
        return observations

    venv.step_wait, venv.reset = step_wait, first
    return venv


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize(("what", "at"), [("observation", 0), ("observation", 3), ("reward", 3)])
@pytest.mark.parametrize("deterministic", [True, False])
def test_what_is_not_finite_is_named(env, what, at, deterministic):
    model = NPG("MlpPolicy", env, seed=0, device="cpu")
    with pytest.raises(
        FloatingPointError, match=f"{what} of environment 1 is not finite in step {at} of an evaluation"
    ):
        evaluate(model, poisoned(env, what, at), 2, seed=0, deterministic=deterministic)


def test_parameters_and_statistics_that_are_not_finite_are_named():
    model = TRPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu")
    env = VecNormalize(make_vec_env("CartPole-v1", 2, seed=0), training=False, norm_reward=False)
    assert len(evaluate(model, env, 2, seed=0).returns) == 2
    env.obs_rms.mean[2] = np.nan
    with pytest.raises(FloatingPointError, match=r"observation of environment 0, 1 .*step 0 .*take an earlier agent"):
        evaluate(model, env, 2, seed=0)
    with torch.no_grad():
        model.policy.action_net.bias[0] = np.inf
    with pytest.raises(FloatingPointError, match=r"policy's action_net.bias is not finite: take an earlier agent"):
        evaluate(model, env, 2, seed=0)


@pytest.mark.parametrize(
    ("env", "given", "fixed"),
    [
        ("Hopper-v5", {}, True),
        ("Reacher-v5", {}, False),
        ("Hopper-v5", {"camera_id": -1}, False),
        ("npg/HopperVelocity-v5", {}, True),
    ],
)
def test_the_camera_follows_runners(env, given, fixed):
    pytest.importorskip("mujoco")
    venv = _rendering_env(RunConfig("trpo", env, env_kwargs=given), seed=0)
    renderer = venv.envs[0].unwrapped.mujoco_renderer
    assert (renderer.camera_id >= 0) == fixed
    venv.close()


def test_a_film_shows_the_part_that_is_asked_for(tmp_path):
    pytest.importorskip("pygame")
    config = resolve("trpo", "CartPole-v1", timesteps=64, n_envs=2, settings={"n_steps": 32}, device="cpu")
    run = start(config, tmp_path / "run")
    run.train(progress=False)
    every, fps, episode = film(run.folder.last, run.config, seed=1)
    (length,) = episode.lengths
    assert (len(every), fps) == (length, 50)
    some, fps, again = film(run.folder.last, run.config, seed=1, begin=0.1, end=0.3, fps=20)
    assert (fps, again.returns) == (25, episode.returns)
    expected = every[6:15:2] if length >= 15 else every[6::2]
    assert len(some) == len(expected) > 0
    assert all(np.array_equal(a, b) for a, b in zip(some, expected))


@pytest.mark.parametrize("use_sde", [False, True])
def test_a_film_of_sampled_actions_is_the_evaluation_s_of_its_seed(tmp_path, use_sde):
    pytest.importorskip("pygame")
    settings = {"n_steps": 32, "use_sde": use_sde}
    config = resolve("trpo", "Pendulum-v1", timesteps=64, n_envs=2, settings=settings, device="cpu")
    run = start(config, tmp_path / "run")
    run.train(progress=False)
    returns = {}
    for seed in (1, 2):
        *_, episode = film(run.folder.last, run.config, seed=seed, deterministic=False)
        told = evaluate_saved(run.folder.last, run.config, 1, seed=seed, deterministic=False)
        assert episode.returns == pytest.approx(told.returns)
        returns[seed] = episode.returns
    assert returns[1] != returns[2]


class Endless(gym.Env):
    """Ends where action 1 is taken; the mode of a new policy never takes it."""

    observation_space, action_space = gym.spaces.Box(0, 1, (1,), np.float32), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1, np.float32), 1.0, bool(action), False, {}


def stuck() -> TRPO:
    model = TRPO("MlpPolicy", make_vec_env(Endless, 2), seed=0, device="cpu")
    with torch.no_grad():
        model.policy.action_net.bias.copy_(torch.tensor([9.0, -9.0]))
    return model


def test_an_episode_without_an_end_is_told_once_for_each_environment(monkeypatch):
    monkeypatch.setattr("agents.evaluation.LONG", 20)
    model = stuck()
    asked = iter([False] * 100 + [True])
    with pytest.warns(UserWarning, match="has 20 steps and no end.*max_episode_steps") as told, pytest.raises(Stopped):
        evaluate(model, model.get_env(), 2, seed=0, stop=lambda: next(asked))
    assert len(told) == 2


def test_the_seconds_of_an_evaluation_that_was_stopped_are_not_those_of_training(tmp_path):
    settings = {"n_steps": 8, "policy_kwargs.net_arch": [8]}
    config = resolve("trpo", "CartPole-v1", settings=settings, timesteps=16, n_envs=1, device="cpu")
    run = start(config, tmp_path / "run")
    stop = StopRequest(run.world)
    evaluator = Evaluator(config, run.folder, stuck().get_env(), stop)
    evaluator.init_callback(stuck())
    stop.number = 2
    with pytest.raises(Stopped):
        evaluator.evaluate()
    assert evaluator.seconds > 0


class Costly(gym.Wrapper):
    def step(self, action: Any) -> Any:
        *rest, info = super().step(action)
        return *rest, {**info, "cost": 1.0}


@pytest.mark.parametrize("monitored", [True, False])
def test_costs_are_told_with_and_without_a_monitor(monitored):
    model = TRPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu")
    env = DummyVecEnv([lambda: (Monitor if monitored else lambda env: env)(Costly(gym.make("CartPole-v1")))] * 2)
    evaluation = evaluate(model, env, 4, seed=0)
    assert evaluation.costs == evaluation.returns  # both are 1 in each step


class Blind(gym.Env):
    """It has nothing to show, and takes no argument."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(2, np.float32), 0.0, False, True, {}


class Takes(Blind):
    """It takes a render_mode, and shows nothing."""

    def __init__(self, render_mode: str | None = None) -> None:
        pass


@pytest.mark.parametrize(
    ("env", "given", "told"),
    [
        (Blind, {}, r"Blind-v0 does not render, .*\(Blind\(\) takes no arguments\): leave out --video$"),
        (Takes, {}, r"Takes-v0 does not render as rgb_array: leave out --video$"),
        ("CartPole-v1", {"foo": 1}, r"env_kwargs=\{'foo': 1\} do not fit CartPole-v1: .*'foo'"),  # what is wrong anyway
        ("CartPol-v1", {}, r"env_id='CartPol-v1' is not known\. Did you mean CartPole-v1"),
    ],
)
def test_what_cannot_be_filmed_is_told_before_a_run(env, given, told, recwarn):
    pytest.importorskip("moviepy")
    name = env
    if isinstance(env, type):
        name = f"{env.__name__}-v0"
        gym.register(name, entry_point=env)
    try:
        with pytest.raises(ValueError, match=told):
            check_video(RunConfig("trpo", name, env_kwargs=given))
    finally:
        if isinstance(env, type):
            gym.registry.pop(name)
    assert not [str(w.message) for w in recwarn if "render" in str(w.message)]
