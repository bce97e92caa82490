"""Environments that write into the arrays that they gave before, or whose numbers are not what their spaces say."""

from collections.abc import Callable
from copy import copy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from agents import CPO, NPG, TRPO
from envs import VecNormalize, make_vec_env

pytestmark = pytest.mark.usefixtures("untraced")


class Walk(gym.Env[Any, Any]):
    """Counts to 5 and is truncated; ``reuse``: its state is the array, or list, that it shows, written in place."""

    action_space: gym.Space[Any] = spaces.Discrete(2)

    def __init__(self, reuse: bool, several: bool = False, dtype: Any = np.float32, kind: Any = np.asarray) -> None:
        self.reuse, self.several, self.x = reuse, several, kind(np.zeros(2, dtype))
        box = spaces.Box(-100, 100, (2,), dtype)
        self.observation_space = spaces.Dict({"a": box}) if several else box

    def see(self) -> Any:
        shown = self.x if self.reuse else copy(self.x)
        return {"a": shown} if self.several else shown

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.x[0] = self.x[1] = 0
        return self.see(), {}

    def step(self, action: Any) -> Any:
        self.x[0] += 1
        self.x[1] += 0.5
        return self.see(), 1.0, False, bool(self.x[0] == 5), {}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("vec_env_cls", [None, SubprocVecEnv])
def test_the_last_observation_is_that_of_the_episode_that_ended(
    several: bool, dtype: Any, vec_env_cls: type[VecEnv] | None
) -> None:
    env_kwargs = {"reuse": True, "several": several, "dtype": dtype}
    processes = {} if vec_env_cls is None else {"vec_env_cls": vec_env_cls, "vec_env_kwargs": {"start_method": "fork"}}
    env = make_vec_env(Walk, 2, seed=0, env_kwargs=env_kwargs, **processes)
    env.reset()
    for _ in range(5):
        observations, _, dones, infos = env.step(np.zeros(2, int))
    env.close()
    assert dones.all()
    for info in infos:
        last: Any = info["terminal_observation"]
        np.testing.assert_array_equal(last["a"] if several else last, [5, 2.5])
    np.testing.assert_array_equal(observations["a"] if several else observations, np.zeros((2, 2)))


def listed(values: np.ndarray) -> list[float]:
    return values.tolist()


@pytest.mark.parametrize("kind", [np.asarray, listed])
@pytest.mark.parametrize("give", [lambda e: e, lambda e: Monitor(e), lambda e: make_vec_env(lambda: e)])
def test_so_it_is_however_the_environment_is_given(give: Callable[[Any], Any], kind: Any) -> None:
    agent = NPG("MlpPolicy", give(Walk(True, kind=kind)), n_steps=8)
    for later in (False, True):
        if later:
            agent.set_env(give(Walk(True, kind=kind)))
        agent.env.reset()
        for _ in range(5):
            infos = agent.env.step(np.zeros(1, int))[3]
        np.testing.assert_array_equal(infos[0]["terminal_observation"], [5, 2.5])


def test_the_environments_are_monitors_still() -> None:
    env: Any = make_vec_env(Walk, 2, env_kwargs={"reuse": True})
    env.reset()
    for _ in range(5):
        env.step(np.zeros(2, int))
    assert [monitor.get_episode_rewards() for monitor in env.envs] == [[5.0], [5.0]]


@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
def test_returns_do_not_depend_on_whose_memory_an_observation_is_in(policy: str) -> None:
    returns = []
    for reuse in (False, True):
        env = make_vec_env(Walk, 2, seed=0, env_kwargs={"reuse": reuse})
        agent = NPG(policy, env, n_steps=64, seed=0, gamma=0.9).learn(256)
        agent.collect()
        returns.append(agent.rollout_buffer.returns.copy())
    np.testing.assert_array_equal(*returns)


class Arrays(VecEnv):
    """A simulator of n tasks in Stable-Baselines3's interface, whose arrays are the same in every step."""

    def __init__(self, reuse: bool, n: int = 3) -> None:
        super().__init__(n, spaces.Box(-1e3, 1e3, (2,), np.float32), spaces.Discrete(2))
        self.reuse, self.t, self.clock = reuse, np.zeros(n, int), 0
        self.shown, self.last = np.zeros((2, n, 2), np.float32)
        self.rewards, self.dones = np.zeros(n, np.float32), np.zeros(n, bool)

    def given(self, array: np.ndarray, values: np.ndarray) -> np.ndarray:
        array[:] = values
        return array if self.reuse else array.copy()

    def see(self) -> np.ndarray:
        self.clock += 1
        return np.stack([self.t, np.full(self.num_envs, self.clock / 100)], 1)

    def reset(self) -> np.ndarray:
        self.t[:] = 0
        return self.given(self.shown, self.see())

    def step_async(self, actions: np.ndarray) -> None:
        self.t += 1

    def step_wait(self) -> Any:
        done = self.t >= 2 + np.arange(self.num_envs)
        last = self.given(self.last, self.see())
        cut = {i: {"terminal_observation": last[i], "TimeLimit.truncated": True} for i in np.flatnonzero(done)}
        infos = [cut.get(i, {}) for i in range(self.num_envs)]
        self.t[done] = 0
        rewards = self.given(self.rewards, 1.0 + self.t)
        return self.given(self.shown, self.see()), rewards, self.given(self.dones, done), infos

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name == "render_mode":
            return [None] * self.num_envs
        raise AttributeError(attr_name)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError(attr_name)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        raise AttributeError(method_name)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


class OwnForward(ActorCriticPolicy):
    """Acts by its own forward pass, step by step."""

    def forward(self, obs: torch.Tensor, deterministic: bool = False) -> Any:
        return super().forward(obs, deterministic)


@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy", OwnForward])
def test_a_rollout_keeps_what_it_was_given(policy: Any) -> None:
    rollouts = []
    for reuse in (False, True):
        agent = TRPO(policy, Arrays(reuse), n_steps=16, seed=0, gamma=0.9)
        agent._setup_learn(1, None)
        with torch.no_grad():
            for parameter in agent.policy.value_net.parameters():
                parameter.mul_(30)
        agent.collect()
        buffer = agent.rollout_buffer
        rollouts.append((buffer.observations, buffer.rewards, buffer.episode_starts, buffer.advantages))
    for separate, reused in zip(*rollouts, strict=True):
        np.testing.assert_array_equal(separate, reused)
    assert rollouts[0][0][:, 0, 0].tolist() == [0, 1] * 8  # the times of the first task, whose episodes have two steps


# ----------------------------------------------------------------------------------- numbers that a space does not hold


class Shows(gym.Env[Any, Any]):
    """Shows one value, and has ended after 5 steps; ``last`` is what it shows then."""

    action_space: gym.Space[Any] = spaces.Discrete(2)

    def __init__(self, space: gym.Space[Any], value: Any, last: Any = None, info: Any = None) -> None:
        self.observation_space, self.value, self.t = space, value, 0
        self.last, self.info = value if last is None else last, info or {}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self.value, {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return self.last if self.t == 5 else self.value, 1.0, False, self.t == 5, {"cost": 1.0, **self.info}


@pytest.mark.parametrize(
    ("space", "value", "told"),
    [
        (spaces.Box(0, 1, (2,), np.int64), np.array([0.5, 1.0]), r"holds 0\.5.*type int64.*make it 0"),
        (spaces.Box(0, 255, (2,), np.uint8), np.array([7, 300]), r"holds 300.*type uint8.*make it 44"),
        (spaces.MultiBinary(2), np.array([2, 0.25]), r"holds 0\.25.*type int8"),
        (spaces.MultiDiscrete([3, 3]), np.array([1.0, np.nan]), "holds nan.*type int64"),
        (spaces.Discrete(3), 1.5, r"holds 1\.5.*type int64"),
        (spaces.Dict({"a": spaces.Box(0, 9, (1,), np.int32)}), {"a": np.array([0.1])}, r"observation 'a'.*holds 0\.1"),
    ],
)
def test_values_that_whole_numbers_would_change_are_refused(space: Any, value: Any, told: str) -> None:
    env = make_vec_env(lambda: Shows(space, value), 2, seed=0)
    with pytest.raises(ValueError, match=told + ".*correct the observation space"):
        env.reset()


@pytest.mark.parametrize(
    ("space", "value"),
    [
        (spaces.Box(0, 9, (2,), np.int64), np.array([3.0, 4.0])),
        (spaces.Box(0, 255, (2,), np.uint8), np.array([7, 200])),
        (spaces.MultiBinary(2), [True, False]),
        (spaces.Discrete(3), np.array(2)),
    ],
)
def test_values_that_fit_are_taken_whatever_their_type(space: Any, value: Any) -> None:
    seen = make_vec_env(lambda: Shows(space, value), 2, seed=0).reset()
    np.testing.assert_array_equal(seen, np.broadcast_to(np.ravel(value), (2, np.size(value))).reshape(seen.shape))


BOX = spaces.Box(-9, 9, (2,), np.float32)


@pytest.mark.parametrize(
    ("algorithm", "policy"), [(TRPO, "MlpPolicy"), (CPO, "MlpPolicy"), (TRPO, "MlpLstmPolicy"), (TRPO, OwnForward)]
)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_last_observation_that_is_not_finite_is_named(
    algorithm: type, policy: Any, normalize: bool, bad: float
) -> None:
    env: VecEnv = make_vec_env(lambda: Shows(BOX, np.ones(2, np.float32), np.array([1, bad], np.float32)), 2, seed=0)
    agent = algorithm(policy, VecNormalize(env) if normalize else env, n_steps=32, seed=0)
    before = [p.detach().clone() for p in agent.policy.parameters()]
    where = "5 under VecNormalize" if normalize else "4 of the rollout"
    what = r"is 1\.0e\+30 in size" if bad == 1e30 else "is not finite"
    told = f"the last observation of environment 0, whose episode ended in step {where}, {what}: correct"
    with pytest.raises(FloatingPointError, match=told):
        agent.learn(64)
    assert all(torch.equal(p, q) for p, q in zip(before, agent.policy.parameters(), strict=True))


@pytest.mark.parametrize("normalize", [False, True])
def test_an_episode_may_end_because_of_what_is_not_finite(normalize: bool) -> None:
    """As MuJoCo's tasks end: nobody asks for the value of that observation."""

    class Ends(Shows):
        def step(self, action: Any) -> Any:
            observation, reward, _, ended, info = super().step(action)
            return observation, reward, ended, False, info

    env: VecEnv = make_vec_env(lambda: Ends(BOX, np.ones(2, np.float32), np.array([1, np.nan], np.float32)), 2, seed=0)
    agent = TRPO("MlpPolicy", VecNormalize(env) if normalize else env, n_steps=32, seed=0).learn(128)
    assert all(torch.isfinite(p).all() for p in agent.policy.parameters())
    assert agent.n_updates == 2


def test_cpo_names_the_observation_and_not_the_costs() -> None:
    env = make_vec_env(lambda: Shows(BOX, np.ones(2, np.float32)), 2, seed=0)
    agent = CPO("MlpPolicy", env, n_steps=32, seed=0)
    step_wait, count = env.step_wait, iter(range(1, 99))

    def last_one_bad() -> Any:
        observations, *rest = step_wait()
        return np.full_like(observations, np.nan) if next(count) == 32 else observations, *rest

    env.step_wait = last_one_bad  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="observation of environment 0, 1 is not finite in step 32"):
        agent.learn(64)


# ------------------------------------------------------------------------------------------------ what is given instead


@pytest.mark.parametrize("episode", [3, np.arange(2), {"r": 1.0}, None, "first"])
@pytest.mark.parametrize("make", [make_vec_env, lambda make, n: DummyVecEnv([make] * n)])
def test_another_thing_that_is_called_episode_is_none(episode: Any, make: Callable[..., VecEnv]) -> None:
    env = make(lambda: Shows(BOX, np.ones(2, np.float32), info={"episode": episode}), 2)
    agent = TRPO("MlpPolicy", env, n_steps=32, seed=0).learn(64)
    told = [tuple(known[key] for key in ("r", "l")) for known in agent.ep_info_buffer or ()]
    assert told == ([(5.0, 5)] * 12 if make is make_vec_env else [])


def test_a_vector_environment_of_gymnasium_is_refused_with_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"env is a vector environment of Gymnasium .*make_vec_env"):
        TRPO("MlpPolicy", gym.make_vec("CartPole-v1", 2))  # type: ignore[arg-type]
