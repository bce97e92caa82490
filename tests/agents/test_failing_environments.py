"""A run whose environments raise, exit or never end: it ends with its traceback, the agent saved, and goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from gymnasium.envs.classic_control import CartPoleEnv

from agents import TRPO
from agents.config import resolve
from agents.evaluation import evaluate_saved
from agents.runs import RunFolder, read_state
from agents.training import resume, start

ROOT = Path(__file__).parents[2]


class Failing(CartPoleEnv):
    """CartPole that fails, once, in the step of all its objects together that it is told."""

    how, at, steps = "", 0, 0

    def step(self, action):
        Failing.steps += 1
        if Failing.steps == Failing.at:
            if Failing.how == "raises":
                raise LookupError("the pole broke")
            if Failing.how == "exits":
                sys.exit(0)
            while True:
                time.sleep(0.01)
        return super().step(action)


@pytest.fixture
def fail(monkeypatch):
    """Say how environments fail, and when."""
    monkeypatch.setattr("agents.training.FINAL_EPISODES", 1)
    monkeypatch.setitem(gym.registry, "Failing-v0", gym.envs.registration.EnvSpec("Failing-v0", Failing, 50))

    def say(how, at):
        Failing.how, Failing.at, Failing.steps = how, at, 0

    return say


def begin(path, **options):
    settings = {"n_steps": 32, "n_critic_updates": 1, "policy_kwargs.net_arch": [8], "normalize": True}
    options = {"timesteps": 256, "n_envs": 2, "eval_episodes": 1, "eval_freq": 64, "save_freq": 128} | options
    return start(resolve("trpo", "Failing-v0", settings=settings, device="cpu", env_timeout=0.5, **options), path)


ENDS = {
    "raises": (LookupError, "the pole broke"),
    "exits": (RuntimeError, r"Failing-v0, in step .* called sys.exit\(0\)"),
    "hangs": (TimeoutError, "Failing-v0, in step .* took longer than 0.5 s"),
}


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize(("where", "at", "saved"), [("training", 50, 48), ("evaluation", 66, 64)])
@pytest.mark.parametrize("exact", ["restart", "off"])
@pytest.mark.slow
def test_the_agent_is_saved_as_it_was_and_goes_on(how, where, at, saved, exact, fail, tmp_path):
    run = begin(tmp_path / "run", exact_resume=exact)
    fail(how, at)
    error, message = ENDS[how]
    with pytest.raises(error, match=message) as caught:
        run.train(progress=False)
    notes = "\n".join(caught.value.__notes__)
    assert f"the agent of step {saved} is saved, and goes on with new episodes" in notes
    assert "Failing-v0, in step" in f"{caught.value}{notes}"

    folder = RunFolder(tmp_path / "run")
    loaded = TRPO.load(folder.last.model)
    assert loaded.num_timesteps == run.model.num_timesteps == saved
    for name, value in run.model.policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], value), name
    state = read_state(folder.last)
    assert state["environments"] is None  # the episodes are lost, and this is not the undisturbed run
    assert state["statistics"]["observations"][""]["count"] == pytest.approx(saved + 4, abs=2.1)  # two resets at most
    assert len(evaluate_saved(folder.last, folder.config, 2, seed=0).returns) == 2

    fail("", 0)
    outcome = resume(tmp_path / "run").train(progress=False)
    assert outcome.timesteps >= 256
    assert not outcome.interrupted
    assert folder.final_timesteps == outcome.timesteps


def test_what_fails_at_the_end_leaves_the_agent_that_was_saved_there(fail, tmp_path):
    run = begin(tmp_path / "run", eval_freq=1000)
    fail("raises", 258)  # in the evaluation after the last step
    with pytest.raises(LookupError):
        run.train(progress=False)
    folder = RunFolder(tmp_path / "run")
    whole = folder.last.model.read_bytes()
    fail("exits", 3)
    with pytest.raises(RuntimeError, match=r"called sys\.exit"):
        evaluate_saved(folder.last, folder.config, 1, seed=0)
    assert folder.last.model.read_bytes() == whole
    fail("", 0)
    assert resume(tmp_path / "run").train(progress=False).timesteps == 256


def test_an_environment_that_exits_while_it_is_made_ends_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setitem(
        gym.registry, "Failing-v0", gym.envs.registration.EnvSpec("Failing-v0", lambda **_: sys.exit(0), 50)
    )
    with pytest.raises(RuntimeError, match=r"Failing-v0 called sys.exit\(0\) while it was made"):
        begin(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("how", "last"), [("raises", "LookupError: the pole broke"), ("hangs", "TimeoutError: ")])
@pytest.mark.slow
def test_the_script_shows_the_traceback_and_how_to_go_on(how, last, tmp_path):
    (tmp_path / "failing.py").write_text(
        "import gymnasium, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_failing_environments import Failing\n"
        f"Failing.how, Failing.at = {how!r}, 100\n"
        'gymnasium.register("Failing-v0", entry_point=Failing, max_episode_steps=50)\n'
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    options = "--n-envs 2 --timesteps 256 --eval-freq 1000 --env-timeout 1 --no-progress --device cpu --set n_steps=32"
    arguments = ["trpo", "failing:Failing-v0", *options.split(" "), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train_agent.py"), *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert f"failing:Failing-v0 --resume {tmp_path / 'run'}" in done.stderr
    assert "Traceback" in done.stderr
    assert "test_failing_environments.py" in done.stderr  # the place in the environment
    assert done.stderr.splitlines()[-1].startswith(last)
    assert "failing:Failing-v0, in step 50 of its 2 environments together" in done.stderr
    assert "the agent of step 98 is saved" in done.stderr
    assert TRPO.load(RunFolder(tmp_path / "run").last.model).num_timesteps == 98
