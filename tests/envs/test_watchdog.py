"""Environments that raise, exit or never end, in this process and in processes of their own."""

from __future__ import annotations

import subprocess
import sys
import time

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from agents import TRPO
from envs import Watchdog, make_vec_env

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # other processes need not find this file


class Failing(gym.Env):
    """Fails in its third step, or in its reset, as it is told; and else is no environment worth a name."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, how="", where="step"):
        self.how, self.where, self.time = how, where, 0

    def fail(self, where):
        if where != self.where:
            return
        if self.how == "raises":
            raise LookupError("the pole broke")
        if self.how == "exits":
            sys.exit(0)
        if self.how == "hangs":
            while True:
                time.sleep(0.01)

    def reset(self, **kwargs):
        self.fail("reset")
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.time += 1
        if self.time == 3:
            self.fail("step")
        return np.zeros(2, np.float32), 1.0, False, False, {}


def failing(how, where="step", processes=None, seconds=0.5):
    makers = [lambda: Failing(), lambda: Failing(how, where)]
    venv = SubprocVecEnv(makers, start_method=processes) if processes else DummyVecEnv(makers)
    return Watchdog(venv, seconds, "Failing-v0")


@pytest.mark.parametrize(
    ("seconds", "error", "message"),
    [
        (-1, ValueError, r"seconds must lie in \[0, inf\], got -1: 0 sets no limit"),
        (float("nan"), ValueError, r"seconds must lie in \[0, inf\], got nan"),
        ("60", TypeError, r"seconds must be a number, got '60' \(str\)"),
        (None, TypeError, "seconds must be a number, got None"),
        (True, TypeError, "seconds must be a number, got True"),
    ],
)
def test_a_limit_that_is_none_is_refused(seconds, error, message):
    with pytest.raises(error, match=f"^{message}"):
        failing("", seconds=seconds)


@pytest.mark.parametrize("seconds", [0, float("inf"), 1e300, np.float32(60), np.int64(60)])
def test_limits_that_no_call_reaches(seconds, capfd):
    env = failing("", seconds=seconds)
    stepped(env)
    assert env._thread is None or env._thread.is_alive()
    env.close()
    assert not capfd.readouterr().err


def stepped(env):
    env.reset()
    for _ in range(5):
        env.step(np.zeros(2, int))


@pytest.mark.parametrize(("where", "place"), [("step", "step 3"), ("reset", "reset")])
@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("raises", LookupError, "the pole broke"),
        ("exits", RuntimeError, r"called sys.exit\(0\)"),
        ("hangs", TimeoutError, r"longer than 0.5 s, .* Correct the environment; .* --env-timeout"),
    ],
)
def test_what_fails_in_this_process_is_named(how, error, message, where, place):
    env = failing(how, where)
    with pytest.raises(error, match=message) as caught:
        stepped(env)
    told = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert told.count(f"Failing-v0, in {place} of its 2 environments together") == 1
    assert env.failed
    if how != "exits":
        assert "fail" in [entry.name for entry in caught.traceback][-2:]  # the very place
    env.close()


@pytest.mark.parametrize(
    ("how", "start", "error", "message"),
    [
        (
            "raises",
            "spawn",
            RuntimeError,
            "Failing-v0, in step 3 .*: the process of environment 1 with 1 ended. Its traceback",
        ),
        ("exits", "fork", RuntimeError, "Failing-v0, in step 3 .*: the process of environment 1 with 0 ended"),
        ("hangs", "fork", TimeoutError, "Failing-v0, in step 3 .*: took longer than 0.5 s"),
    ],
)
def test_what_fails_in_a_process_of_its_own_is_named_and_ended(how, start, error, message, capfd):
    # The pipe of a fork that has ended stays open in the others: it is found by the second look.
    env = failing(how, processes=start, seconds={"raises": 600, "exits": 5, "hangs": 0.5}[how])
    with pytest.raises(error, match=message):
        TRPO("MlpPolicy", env, n_steps=8, device="cpu").learn(16)
    processes = env.unwrapped.processes
    env.close()  # which would wait for ever, if it asked
    assert not any(process.is_alive() for process in processes)
    if how == "raises":
        assert "LookupError: the pole broke" in capfd.readouterr().err


def test_a_healthy_environment_is_as_it_was_and_may_take_its_time_between_steps():
    bare, watched = (make_vec_env("CartPole-v1", 3, seed=4) for _ in range(2))
    watched = Watchdog(watched, 0.3, "CartPole-v1")
    for env in (bare, watched):
        env.action_space.seed(1)
    assert np.array_equal(bare.reset(), watched.reset())
    for i in range(30):
        if i == 10:
            time.sleep(0.6)  # an update
        actions = np.full(3, i % 2)
        for a, b in zip(bare.step(actions)[:3], watched.step(actions)[:3]):
            assert np.array_equal(a, b)
    assert not watched.failed
    watched.close()


def test_a_second_call_that_hangs_is_ended_too():
    env = failing("hangs", "reset")
    for _ in range(2):
        with pytest.raises(TimeoutError):
            env.reset()


def test_what_cannot_be_interrupted_ends_the_process():
    code = """
import threading, sys
import envs.watchdog as w
from test_watchdog import Failing, failing

class Deaf(Failing):
    def fail(self, where):
        while where == "step":
            try:
                threading.Event().wait(0.01)
            except TimeoutError:
                pass

w.GRACE = 0.3
env = w.Watchdog(failing("").venv, 0.2, "Deaf-v0")
env.venv.envs[1] = Deaf()
try:
    for _ in (env.reset(), *range(5)):
        env.step([0, 0])
finally:
    print("never")
"""
    folder = __file__.rpartition("/")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "error: Deaf-v0, in step 3 of its 2 environments together: took longer than 0.2 s" in done.stderr
    assert "goes on with --resume" in done.stderr
    assert "never" not in done.stdout
