"""Which environments a run and its evaluations draw; runs of policies with another structure."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agents import hybrid, masks
from agents.callbacks import Stop, evaluation_seed
from agents.config import resolve
from agents.evaluation import evaluate_saved
from agents.state import begin_episodes
from agents.training import resume, start
from envs.seeding import Purpose, environment_seeds, purpose_seed
from npg.parallel import World
from npg.runs.signals import StopRequest

SETTINGS = {"n_steps": 16, "n_critic_updates": 1, "policy_kwargs.net_arch": [8], "normalize": True}
OPTIONS = {"timesteps": 64, "n_envs": 4, "eval_episodes": 1, "backend": "gymnasium", "device": "cpu"}
OPTIONS |= {"exact_resume": "restart"}


@pytest.fixture(autouse=True)
def one_final_episode(monkeypatch):
    monkeypatch.setattr("agents.training.FINAL_EPISODES", 1)


@pytest.mark.parametrize(
    ("seconds", "looks"),  # of a step
    [(0.001, [1, 33, 65]), (1.3, [1, 4, 7, 10]), (0.5, [1, 10, 19]), (20.0, list(range(1, 11)))],
)
def test_processes_look_often_enough_to_stop_before_torchrun_kills_them(seconds, looks, monkeypatch):
    now, asked = [0.0], []
    monkeypatch.setattr("agents.callbacks.time.monotonic", lambda: now[0])
    request = StopRequest(replace(World(torch.device("cpu"), size=2), group=object()))

    def agree(since):
        asked.append(stop.n_calls)
        # the other process is slower, and is told to stop before the last look
        return asked == looks, 1.0001 * since

    monkeypatch.setattr(request, "agree", agree)
    stop = Stop(request)
    stop.model = SimpleNamespace(num_timesteps=0)
    for _ in range(99):
        now[0] += seconds
        if not stop.on_step():
            break
    assert asked == looks
    assert request.requested


def begin(seed, path):
    return start(resolve("trpo", "CartPole-v1", settings=SETTINGS, seed=seed, **OPTIONS), path)


def test_runs_processes_and_continuations_draw_apart(tmp_path):
    first, second = begin(0, tmp_path / "0"), begin(1, tmp_path / "1")
    seeds = [run.model.get_env().unwrapped._seeds for run in (first, second)]
    assert seeds == [environment_seeds(seed, 4) for seed in (0, 1)]

    begin_episodes(second.model, second.config, World(torch.device("cpu"), rank=1, size=2))
    assert second.model.get_env().unwrapped._seeds == environment_seeds(1, 8)[4:]

    first.train(progress=False)
    continued = resume(tmp_path / "0", timesteps=128)
    key = purpose_seed(0, Purpose.RESUMED_TRAINING, 64)
    assert continued.model.get_env().unwrapped._seeds == environment_seeds(key, 4)
    begin_episodes(continued.model, continued.config, World(torch.device("cpu"), rank=1, size=2))
    assert continued.model.get_env().unwrapped._seeds == environment_seeds(key, 8)[4:]


def test_evaluations_are_apart_from_training_and_from_each_other():
    configs = [resolve("trpo", "CartPole-v1", seed=seed) for seed in range(10)]
    keys = [key for c in configs for key in (c.seed, evaluation_seed(c), evaluation_seed(c, final=True))]
    streams = [seed for key in keys for seed in environment_seeds(key, 64)]
    assert len(set(streams)) == len(streams) == 10 * 3 * 64


@pytest.mark.parametrize("kind", ["norm_obs", "norm_reward"])
def test_a_run_may_normalise_one_kind_alone(kind, tmp_path):
    settings = SETTINGS | {"normalize": {"norm_obs": False, "norm_reward": False, kind: True}}
    run = start(resolve("trpo", "CartPole-v1", settings=settings, **OPTIONS), tmp_path / "run")
    assert run.train(progress=False).timesteps == 64
    assert list(run.folder.evaluations()["timesteps"]) == [64]
    assert evaluate_saved(run.folder.best, run.config, 1, seed=5).timesteps == 64


@pytest.mark.parametrize(
    ("env", "policy"),
    [
        ("npg/ConnectFour-v0", masks.MaskableActorCriticPolicy),
        ("npg/Platform-v0", hybrid.HybridActorCriticPolicy),
    ],
)
def test_a_run_with_another_structure_is_trained_evaluated_and_resumed(env, policy, tmp_path):
    settings = {"n_steps": 32, "batch_size": 64, "normalize": {"norm_obs": True, "norm_reward": True}}
    config = resolve("trpo", env, settings=settings, timesteps=128, n_envs=2, eval_episodes=2, device="cpu")
    run = start(config, tmp_path / "run")
    assert type(run.model.policy) is policy
    assert run.config.exact_resume == "state"
    run.train(progress=False)
    assert evaluate_saved(run.folder.last, run.config, 2, seed=5).timesteps == 128
    further = resume(tmp_path / "run", timesteps=256)
    assert further.train(progress=False).timesteps == 256
    whole = start(replace(config, timesteps=256, save_freq=10**6, eval_freq=128), tmp_path / "whole")
    whole.train(progress=False)
    for a, b in zip(further.model.policy.parameters(), whole.model.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_with_a_limit_is_resumed_with_its_costs(tmp_path):
    pytest.importorskip("mujoco")
    settings = {"env_kwargs": {"limit": 0.1, "max_episode_steps": 25}, "n_steps": 40, "batch_size": 80, "cost_limit": 2}
    options = {"timesteps": 160, "n_envs": 2, "eval_episodes": 1, "device": "cpu", "backend": "gymnasium"}
    config = resolve("cpo", "npg/HalfCheetahVelocity-v5", settings=settings, **options)
    start(config, tmp_path / "run").train(progress=False)
    further = resume(tmp_path / "run", timesteps=320)
    assert further.model.episode_cost > 0
    assert further.model.cost_error != 0
    further.train(progress=False)
    whole = start(replace(config, timesteps=320, save_freq=10**6, eval_freq=160), tmp_path / "whole")
    whole.train(progress=False)
    for name in ("policy", "cost_policy"):
        pairs = zip(*(getattr(run.model, name).parameters() for run in (further, whole)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    for name in ("episode_cost", "episode_length", "cost_error", "_expected_cost", "_running"):
        assert np.array_equal(*(getattr(run.model, name) for run in (further, whole)))
