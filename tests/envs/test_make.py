import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.wrappers import TimeLimit, TransformReward
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from envs import UnknownEnvironment, make_vec_env
from envs.envpool_vec_env import EnvPoolVecEnv, import_envpool
from envs.vec_env import GymnasiumVecEnv, VectorEnvAdapter

needs_envpool = pytest.mark.skipif(import_envpool() is None, reason="needs EnvPool")
BACKENDS = [pytest.param("envpool", marks=needs_envpool), "gymnasium"]


@pytest.fixture
def without(monkeypatch):
    """Makes packages look as if they were not installed."""

    def remove(*packages):
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)

    return remove


# ------------------------------------------------------------------------------------------------------- choice


@needs_envpool
@pytest.mark.parametrize(
    ("env_id", "kwargs", "kind"),
    [
        ("CartPole-v1", {}, EnvPoolVecEnv),
        ("CartPole-v1", {"max_episode_steps": 7}, EnvPoolVecEnv),
        ("CartPole-v1", {"render_mode": "rgb_array"}, GymnasiumVecEnv),
        ("CartPole-v1", {"sutton_barto_reward": True}, GymnasiumVecEnv),  # EnvPool does not have it
        ("Pendulum-v1", {}, GymnasiumVecEnv),  # EnvPool's is another
        ("FrozenLake-v1", {}, GymnasiumVecEnv),
        ("Catch-v0", {}, EnvPoolVecEnv),  # Gymnasium has none
        ("CartPole-v1", {"max_episode_steps": None}, EnvPoolVecEnv),
        ("npg/LQR-v0", {}, VectorEnvAdapter),
        ("npg/LQR-v0", {"render_mode": "rgb_array"}, GymnasiumVecEnv),
    ],
)
def test_auto_takes_the_fastest_that_means_the_same(env_id, kwargs, kind):
    assert type(make_vec_env(env_id, env_kwargs=kwargs)) is kind


def test_gymnasium_alone_is_enough(without):
    without("envpool")
    env = make_vec_env("CartPole-v1", 2, seed=0)
    assert type(env) is GymnasiumVecEnv
    assert env.reset().shape == (2, 4)


def test_gymnasium_gives_float32_and_the_true_last_observation():
    pytest.importorskip("mujoco")
    env = make_vec_env("HalfCheetah-v5", 2, 0, "gymnasium", env_kwargs={"max_episode_steps": 3})
    assert env.observation_space.dtype == env.reset().dtype == np.float32
    for _ in range(3):
        _, _, dones, infos = env.step(np.zeros((2, 6)))
    assert dones.all()
    assert infos[0]["terminal_observation"].dtype == np.float32
    assert infos[0]["TimeLimit.truncated"]
    assert infos[0]["episode"]["l"] == 3


@pytest.mark.parametrize("steps", [150, 250])
@pytest.mark.parametrize(
    "env_id", ["Pendulum-v1", "npg/PendulumNoVel-v1", "npg/SwimmerVelocity-v5", "npg/TwoStateMDP-v0"]
)
def test_an_episode_is_as_long_as_it_is_told_to_be(env_id, steps):
    """Also longer than the task's own 200, 1,000 or 100 steps."""
    if "Swimmer" in env_id:
        pytest.importorskip("mujoco")
        steps += 800
    env = make_vec_env(env_id, 1, 0, env_kwargs={"max_episode_steps": steps})
    env.reset()
    actions = np.stack([env.action_space.sample()])
    assert env.get_attr("spec")[0].max_episode_steps == steps
    for step in range(1, steps + 1):
        *_, dones, infos = env.step(actions)
        assert dones[0] == (step == steps)
    assert infos[0]["episode"]["l"] == steps


@pytest.mark.parametrize("env_id", ["npg/Platform-v0", "npg/TwoStateMDP-v0", "npg/ConnectFour-v0"])
def test_the_spec_of_a_vector_form_tells_the_limit_in_use(env_id):
    registered = gym.spec(env_id).max_episode_steps
    assert make_vec_env(env_id, 2).get_attr("spec")[1].max_episode_steps == registered
    assert make_vec_env(env_id, 2, env_kwargs={"max_episode_steps": 3}).get_attr("spec")[1].max_episode_steps == 3
    assert gym.spec(env_id).max_episode_steps == registered


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_seed_determines_first_observations_and_sampled_actions(backend):
    def draw(seed):
        env = make_vec_env("CartPole-v1", 3, seed, backend)
        return env.reset().tolist(), [env.action_space.sample() for _ in range(20)]

    assert draw(1) == draw(1)
    assert draw(1)[0] != draw(2)[0]
    assert draw(1)[1] != draw(2)[1]


def test_a_module_is_imported_for_its_ids(tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('mine/Pole-v0', 'gymnasium.envs.classic_control:CartPoleEnv', max_episode_steps=9)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert make_vec_env("my_tasks:mine/Pole-v0", 2).reset().shape == (2, 4)
    finally:
        gym.registry.pop("mine/Pole-v0", None)
    with pytest.raises(ValueError, match=r"'nowhere:CartPole-v1'.*imported"):
        make_vec_env("nowhere:CartPole-v1")


@needs_envpool
def test_nothing_is_printed():
    code = "from envs import make_vec_env; make_vec_env('CartPole-v1', 2).reset(); make_vec_env('Catch-v0').reset()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout + result.stderr == ""


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("env_id", "nearest"),
    [("CartPol-v1", "CartPole-v1"), ("halfcheetah-v5", "HalfCheetah-v5"), ("Hopper-v9", "Hopper-v5")],
)
def test_an_unknown_id_names_the_nearest(env_id, nearest):
    with pytest.raises(UnknownEnvironment, match=f"env_id='{env_id}'.*{nearest}") as error:
        make_vec_env(env_id)
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, gym.error.NameNotFound)


@needs_envpool
def test_nearest_ids_include_envpools_and_games():
    with pytest.raises(UnknownEnvironment, match="CheetahRun-v1"):
        make_vec_env("CheetaRun-v1")
    with pytest.raises(UnknownEnvironment, match="ALE/Pong-v5"):
        make_vec_env("ALE/Pnog-v5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_envs": 0}, "n_envs=0 must be an integer of at least 1"),
        ({"n_envs": 2.0}, "n_envs=2.0"),
        ({"n_envs": True}, "n_envs=True"),
        ({"n_threads": -1}, "n_threads=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": "0"}, "seed='0'"),
        ({"backend": "subproc"}, "backend='subproc' must be one of 'auto', 'envpool', 'gymnasium'"),
        ({"env_id": None}, "env_id=None"),
        ({"env_kwargs": {"max_episode_steps": 0}}, "max_episode_steps'.*=0"),
        ({"env_kwargs": {"gravity": 3}}, "env_kwargs=.*gravity"),
        ({"env_kwargs": {"gravity": 3}, "env_id": "npg/LQR-v0"}, "env_kwargs=.*gravity"),
        ({"env_kwargs": {"gravity": 3}, "backend": "envpool"}, "EnvPool|gravity"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_vec_env(**{"env_id": "CartPole-v1", **arguments})


@needs_envpool
def test_the_other_backend_is_the_remedy():
    gym.register("only/Gymnasium-v0", "gymnasium.envs.classic_control:CartPoleEnv")
    try:
        with pytest.raises(ValueError, match=r"backend='envpool' has no .*only/Gymnasium-v0.*'gymnasium'"):
            make_vec_env("only/Gymnasium-v0", backend="envpool")
    finally:
        gym.registry.pop("only/Gymnasium-v0")
    with pytest.raises(ValueError, match=r"backend='gymnasium' has no .*Catch-v0.*'envpool'"):
        make_vec_env("Catch-v0", backend="gymnasium")
    with pytest.raises(ValueError, match="render_mode='human'; only backend='gymnasium' renders"):
        make_vec_env("CartPole-v1", backend="envpool", env_kwargs={"render_mode": "human"})


def test_missing_packages_are_named(without, monkeypatch):
    without("envpool", "ale_py")
    monkeypatch.delitem(gym.registry, "ALE/Pong-v5", raising=False)
    with pytest.raises(ImportError, match="pip install envpool"):
        make_vec_env("CartPole-v1", backend="envpool")
    with pytest.raises(UnknownEnvironment, match=r"pip install envpool.*pip install ale-py"):
        make_vec_env("ALE/Pong-v5")

    def absent(*args, **kwargs):
        raise gym.error.DependencyNotInstalled("MuJoCo is not installed")

    monkeypatch.setattr(gym, "make", absent)
    for env_id in ("HalfCheetah-v5", "npg/HalfCheetahVelocity-v5"):
        with pytest.raises(ImportError, match=r"gymnasium\[mujoco\].*pip install envpool"):
            make_vec_env(env_id)


BOX2D = ["LunarLander-v3", "LunarLanderContinuous-v3", "BipedalWalker-v3", "BipedalWalkerHardcore-v3", "CarRacing-v3"]


@needs_envpool
@pytest.mark.parametrize("env_id", BOX2D)
def test_envpool_stands_in_where_gymnasiums_package_is_missing(env_id, without, monkeypatch):
    without("Box2D")
    for module in [name for name in sys.modules if name.startswith("gymnasium.envs.box2d")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.warns(UserWarning, match=rf"EnvPool's {env_id} is used, .*Box2D.*gymnasium\[box2d\]"):
        env = make_vec_env(env_id, 2, seed=0)
    assert type(env) is EnvPoolVecEnv
    env.reset()
    env.step(np.array([env.action_space.sample() for _ in range(2)]))
    with pytest.raises(ImportError, match=r"gymnasium\[box2d\]"):  # EnvPool does not render
        make_vec_env(env_id, env_kwargs={"render_mode": "rgb_array"})
    without("envpool")
    with pytest.raises(ImportError, match=r"gymnasium\[box2d\]"):
        make_vec_env(env_id)


@needs_envpool
def test_what_renders_is_not_sent_to_envpool(without, monkeypatch):
    without("ale_py")
    monkeypatch.setattr("envs.make.ale_games", dict)
    for env_id, told in (
        ("ALE/Pong-v5", r"needs the Arcade Learning Environment \(pip install ale-py opencv-python-headless\)\.$"),
        ("WalkerWalk-v1", r"has no environment 'WalkerWalk-v1'\. EnvPool's does not render: leave render_mode out\.$"),
    ):
        with pytest.raises((ImportError, ValueError), match=told):
            make_vec_env(env_id, env_kwargs={"render_mode": "rgb_array"})
        with pytest.raises((ImportError, ValueError), match=r"backend='envpool'( does not)?\.$"):
            make_vec_env(env_id, backend="gymnasium")


@needs_envpool
def test_the_warning_tells_what_differs(without, monkeypatch):
    without("Box2D")
    for module in [name for name in sys.modules if name.startswith("gymnasium.envs.box2d")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.warns(UserWarning, match="EnvPool's differs: its ground is 1 % higher, there is no wind"):
        make_vec_env("LunarLander-v3")
    with pytest.raises(ImportError, match="Box2D") as error:  # so that wind is Gymnasium's
        make_vec_env("LunarLander-v3", env_kwargs={"enable_wind": True})
    assert "backend='envpool'" not in str(error.value)


def test_the_box2d_extra_is_gymnasiums():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert any(requirement.startswith("gymnasium[box2d]") for requirement in project["optional-dependencies"]["box2d"])


def _sample() -> list[str]:
    """All of Gymnasium's own ids but most of MuJoCo's, and one of each family of EnvPool's."""
    families: dict[str, list[str]] = {}
    if envpool := import_envpool():
        for env_id, (family, *_) in envpool.registration.registry.specs.items():
            families.setdefault(family, []).append(env_id)
    registered = [i for i, spec in gym.registry.items() if ".envs.mujoco" not in str(spec.entry_point)]
    heavy = ("envpool.mujoco.myosuite", "envpool.gfootball", "envpool.vizdoom", "envpool.mujoco.playground")
    few = [i for family, ids in families.items() for i in ids[:1] if family not in heavy]
    return [i for i in dict.fromkeys([*registered, "Ant-v3", "Ant-v2", *few]) if i.count("-v")]


@pytest.mark.parametrize("env_id", _sample())
def test_every_id_starts_or_says_what_to_do(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            env, refusal = make_vec_env(env_id, 2, seed=0, n_threads=1), None
        except (ImportError, ValueError) as error:
            refusal = str(error)
    if refusal is not None:
        assert re.search(r"pip install|Install|Remedy|cannot be used.*Choose another", refusal)
        return
    observations = env.reset()
    parts = observations.values() if isinstance(observations, dict) else [observations]
    assert isinstance(observations, tuple) or all(len(part) == 2 for part in parts)
    assert env.get_attr("spec")[0].id
    env.close()


@needs_envpool
def test_games_on_gymnasium_need_ale(without):
    without("ale_py")
    with pytest.raises(ImportError, match=r"pip install ale-py.*backend='envpool'"):
        make_vec_env("PongNoFrameskip-v4", backend="gymnasium")


# --------------------------------------------------------------------------------------------- Stable-Baselines3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ["PPO", "TRPO"])
def test_stable_baselines3_learns_on_it(backend, algorithm):
    if algorithm == "TRPO":
        algorithm = pytest.importorskip("sb3_contrib").TRPO
    else:
        algorithm = PPO
    env = VecNormalize(make_vec_env("CartPole-v1", 4, backend=backend))
    model = algorithm("MlpPolicy", env, n_steps=64, batch_size=64, seed=1, device="cpu")
    model.learn(512)
    assert model.num_timesteps == 512
    assert len(model.ep_info_buffer) > 0
    assert env.obs_rms.count == pytest.approx(512 + 4, abs=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_trusts_the_statistics(backend):
    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", backend="gymnasium"), n_steps=16, batch_size=16, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as of an environment without Monitor
        mean, _ = evaluate_policy(model, make_vec_env("CartPole-v1", 2, 0, backend), n_eval_episodes=4)
    assert mean >= 8


@needs_envpool
def test_stable_baselines3_seeds_it():
    def rewards():
        env = make_vec_env("Hopper-v5", 2)
        model = PPO("MlpPolicy", env, n_steps=32, batch_size=32, seed=5, device="cpu").learn(128)
        return [episode["r"] for episode in model.ep_info_buffer]

    first = rewards()
    assert first
    assert first == rewards()


# ------------------------------------------------------------------------------------- as Stable-Baselines3's


class Scaled(gym.Wrapper):
    """Rewards times a factor, and observations in float64."""

    def __init__(self, env, factor=1.0):
        super().__init__(env)
        self.factor = factor
        self.observation_space = gym.spaces.Box(-9.0, 9.0, env.observation_space.shape, np.float64)

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        return observation.astype(np.float64), info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation.astype(np.float64), self.factor * reward, terminated, truncated, info


class Short(CartPoleEnv):
    """Ends after three steps."""

    def reset(self, **kwargs):
        self.steps = 0
        return super().reset(**kwargs)

    def step(self, action):
        self.steps += 1
        observation, reward, _, _, info = super().step(action)
        return observation, reward, self.steps >= 3, False, info


def test_a_wrapper_is_put_around_each_environment():
    env = make_vec_env("CartPole-v1", 2, wrapper_class=Scaled, wrapper_kwargs={"factor": 3.0})
    assert type(env) is GymnasiumVecEnv
    assert env.env_is_wrapped(Scaled) == env.env_is_wrapped(Monitor) == [True, True]
    assert env.observation_space.dtype == env.reset().dtype == np.float32  # after the wrapper
    assert env.step(np.array([0, 1]))[1].tolist() == [3.0, 3.0]
    assert make_vec_env("CartPole-v1", wrapper_class=lambda e: Scaled(e, 2.0)).get_attr("factor") == [2.0]


def test_an_evaluation_ends_where_a_wrapper_ends_the_episodes():
    env = make_vec_env("Pendulum-v1", 2, seed=0, wrapper_class=TimeLimit, wrapper_kwargs={"max_episode_steps": 5})
    model = PPO("MlpPolicy", env, n_steps=8, batch_size=16, seed=0)
    _, lengths = evaluate_policy(model, env, 4, return_episode_rewards=True)
    assert lengths == [5] * 4


@pytest.mark.parametrize("vec_env_cls", [None, SubprocVecEnv])
def test_episodes_that_a_wrapper_ends_are_seen_with_the_environments_own_rewards(vec_env_cls):
    def wrap(env):  # nothing of this module: processes of their own may not find it
        return TransformReward(TimeLimit(env, 5), lambda reward: 3.0 * reward)

    env = make_vec_env("Pendulum-v1", 2, seed=0, wrapper_class=wrap, vec_env_cls=vec_env_cls)
    env.reset()
    returns, found = np.zeros(2), []
    for step in range(1, 13):
        _, rewards, dones, infos = env.step(np.ones((2, 1)))
        returns += rewards / 3.0
        assert dones.tolist() == [step % 5 == 0] * 2
        for info, total in zip(infos, returns, strict=True):
            assert ("episode" in info) == (step % 5 == 0)
            if "episode" in info:
                found.append(info["episode"]["l"])
                assert info["episode"]["r"] == pytest.approx(total, abs=1e-4)
        returns[dones] = 0.0
    env.close()
    assert found == [5] * 4


class Lives(gym.Wrapper):
    """Every second step ends a life; the environment begins anew after its own end alone."""

    def __init__(self, env):
        super().__init__(env)
        self.over, self.steps = True, 0

    def reset(self, **kwargs):
        if self.over:
            self.last, _ = self.env.reset(**kwargs)
            self.over = False
        return self.last, {}

    def step(self, action):
        self.steps += 1
        self.last, reward, self.over, truncated, info = self.env.step(action)
        return self.last, reward, self.over or self.steps % 2 == 0, truncated, info


def test_the_end_of_a_life_is_not_that_of_an_episode():
    env = make_vec_env(Short, 1, seed=0, wrapper_class=Lives)
    env.reset()
    steps = [env.step(np.array([0]))[2:] for _ in range(12)]
    assert [i + 1 for i, (dones, _) in enumerate(steps) if dones[0]] == [2, 3, 4, 6, 8, 9, 10, 12]
    assert {i + 1: infos[0]["episode"]["l"] for i, (_, infos) in enumerate(steps) if "episode" in infos[0]} == {
        3: 3,
        6: 3,
        9: 3,
        12: 3,
    }


@pytest.mark.parametrize("make", [Short, lambda **kwargs: Short(**kwargs)])
def test_a_class_or_a_function_makes_the_environments(make):
    env = make_vec_env(make, 2, seed=0, env_kwargs={"render_mode": "rgb_array"})
    assert env.get_attr("render_mode") == ["rgb_array"] * 2
    first = env.reset()
    assert not (first[0] == first[1]).all()
    for _ in range(3):
        _, _, dones, infos = env.step(np.array([0, 1]))
    assert dones.all()
    assert [info["episode"]["l"] for info in infos] == [3, 3]
    assert (make_vec_env(make, 2, seed=0).reset() == first).all()


def test_processes_have_the_seeds_of_one_process():
    spread = make_vec_env("CartPole-v1", 2, seed=4, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"})
    try:
        assert isinstance(spread, SubprocVecEnv)
        alone = make_vec_env("CartPole-v1", 2, seed=4, backend="gymnasium")
        assert (spread.reset() == alone.reset()).all()
        for action in ([0, 1], [1, 1]):
            for a, b in zip(spread.step(np.array(action))[:3], alone.step(np.array(action))[:3], strict=True):
                np.testing.assert_array_equal(a, b)
    finally:
        spread.close()


def test_a_monitor_folder_is_made_and_read_by_stable_baselines3(tmp_path):
    pytest.importorskip("pandas")
    folder = tmp_path / "a" / "b"
    env = make_vec_env(Short, 2, monitor_dir=folder)
    env.reset()
    for _ in range(6):
        env.step(np.array([0, 1]))
    env.close()
    assert list(load_results(str(folder))["l"]) == [3] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"wrapper_class": Scaled, "backend": "envpool"},
            "backend='envpool' .*which wrapper_class needs: leave it out",
        ),
        ({"vec_env_cls": SubprocVecEnv, "backend": "envpool"}, "which vec_env_cls needs.*backend='gymnasium'"),
        ({"env_id": Short, "backend": "envpool"}, "which env_id=Short needs"),
        ({"wrapper_kwargs": {"factor": 2}}, "wrapper_kwargs=.* needs wrapper_class"),
        ({"vec_env_kwargs": {"start_method": "fork"}}, "vec_env_kwargs=.* needs vec_env_cls"),
        ({"wrapper_class": "Scaled"}, "wrapper_class='Scaled' must be a class or a function"),
        ({"vec_env_cls": "subproc"}, "vec_env_cls='subproc' must be a class of VecEnvs"),
        ({"vec_env_cls": Scaled}, "vec_env_cls=.*Scaled.* must be a class of VecEnvs"),
        ({"monitor_dir": "x", "monitor_path": "x"}, "monitor_dir and monitor_path are two names"),
        ({"env_id": Short, "env_kwargs": {"gravity": 3}}, "env_kwargs=.*do not fit Short.*gravity"),
    ],
)
def test_what_a_backend_cannot_do_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_vec_env(**{"env_id": "CartPole-v1", **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"env_id": lambda: None}, "env_id must make a Gymnasium environment, but made None"),
        ({"env_id": lambda factor: factor, "env_kwargs": {"factor": 2}}, "env_id must make .*made 2"),
        ({"wrapper_class": lambda env: 3}, "wrapper_class must make a Gymnasium environment, but made 3"),
    ],
)
def test_what_makes_no_environment_is_named(arguments, message):
    with pytest.raises(TypeError, match=message):
        make_vec_env(**{"env_id": "CartPole-v1", **arguments})


@needs_envpool
def test_what_only_envpool_has_cannot_be_wrapped():
    with pytest.raises(
        ValueError, match="wrapper_class needs a Gymnasium environment, and 'Catch-v0' is only in EnvPool"
    ):
        make_vec_env("Catch-v0", wrapper_class=Scaled)
    with pytest.raises(ValueError, match=r"wrapper_class=.*cannot be put around ALE/Pong-v5"):
        make_vec_env("ALE/Pong-v5", wrapper_class=Scaled)


SEEN = np.zeros(3, np.float32)


class Answers(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, first=(SEEN, {}), step=(SEEN, 0.0, False, False, {})):
        self.answers = first, step

    def reset(self, *, seed=None, options=None):
        return self.answers[0]

    def step(self, action):
        return self.answers[1]


class Seedless(Answers):
    def reset(self):
        return self.answers[0]


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        (Answers, {"first": SEEN}, r"reset\(\) must return \(observation, info\) .*got ndarray"),
        (Answers, {"first": (SEEN, None)}, r"reset\(\) must return .*got \(ndarray, NoneType\)"),
        (Seedless, {}, r"reset\(\) must take seed and options"),
        (Answers, {"step": (SEEN, 0.0, False, {})}, r"step\(\) must .*got \(ndarray, float, bool, dict\)\. Gym before"),
        (
            Answers,
            {"step": (SEEN, 0.0, False, False, None)},
            r"step\(\) must return .*a dict as info, got .*NoneType",
        ),
        (Answers, {"step": (SEEN, None, False, False, {})}, r"step\(\) must return a number as reward, got None"),
        (Answers, {"step": (SEEN, SEEN, False, False, {})}, r"step\(\) must return a number as reward, got array"),
        (Answers, {"step": (SEEN, "1", False, False, {})}, r"step\(\) must return a number as reward, got '1'"),
    ],
)
def test_an_environment_that_answers_otherwise_than_gymnasium_s_is_named(cls, kwargs, message):
    env = make_vec_env(cls, 1, seed=0, env_kwargs=kwargs)

    def begin() -> None:
        env.reset()
        env.step(np.zeros(1, dtype=np.int64))

    with pytest.raises(TypeError, match=rf"^{cls.__name__}\.{message}"):
        begin()


def test_an_error_within_reset_is_left_as_it_is():
    class Careless(Answers):
        def reset(self, *, seed=None, options=None):
            return np.zeros(3, colour=3)

    with pytest.raises(TypeError, match="colour") as raised:
        make_vec_env(Careless, 1, seed=0).reset()
    assert "must take seed and options" not in str(raised.value)


@pytest.mark.parametrize("reward", [1, 1.0, True, np.float32(1), np.int64(1), np.array(1.0)])
def test_any_number_is_a_reward(reward):
    env = make_vec_env(Answers, 1, seed=0, env_kwargs={"step": (SEEN, reward, False, False, {})})
    env.reset()
    for _ in range(2):
        assert env.step(np.zeros(1, dtype=np.int64))[1] == [1.0]
