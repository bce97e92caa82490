"""What an exported file does, against `predict` of the agent in its environments."""

from __future__ import annotations

import errno
import random
from functools import cache
from importlib.util import find_spec

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecMonitor, VecTransposeImage
from stable_baselines3.common.vec_env import VecNormalize as TheirVecNormalize

from agents import MDPO, NPG, TRPO, export
from agents.export import DeployedPolicy, ExportError, description, export_agent, load_exported
from envs import VecNormalize, make_vec_env
from npg import acceleration

torch.set_num_threads(1)

needs_onnx = pytest.mark.skipif(
    any(find_spec(package) is None for package in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra export",
)

once = pytest.mark.skipif(acceleration.mode.now == "off", reason="long, and the same without acceleration")

IMAGE = spaces.Box(0, 255, (36, 36, 3), np.uint8)
OBSERVATIONS = {
    "box": spaces.Box(-np.inf, np.inf, (5,), np.float32),
    "discrete": spaces.Discrete(6),
    "multidiscrete": spaces.MultiDiscrete([3, 2]),
    "multibinary": spaces.MultiBinary(4),
    "dict": spaces.Dict({"speed": spaces.Box(-2.0, 2.0, (3,), np.float32), "gear": spaces.Discrete(4)}),
    "image": IMAGE,
}
ACTIONS = {
    "box": spaces.Box(np.float32([-0.1, -2.0]), np.float32([0.2, 3.0])),
    "discrete": spaces.Discrete(4),
    "multidiscrete": spaces.MultiDiscrete([2, 4]),
    "multibinary": spaces.MultiBinary(3),
}
POLICIES = {"dict": "MultiInputPolicy", "image": "CnnPolicy"}


@pytest.fixture(autouse=True, scope="module")
def one_table_of_operators():
    """PyTorch builds it anew for each ONNX file, which takes as long as the rest."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        yield


class Noise(gym.Env):
    """Observations out of the space, about 3 wide of the origin where it has no bounds."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), float(self.np_random.random()), False, False, {}


def bare(observation, action="box"):
    space = observation if isinstance(observation, spaces.Space) else OBSERVATIONS[observation]
    env = DummyVecEnv([lambda: Noise(space, ACTIONS[action])] * 2)
    env.seed(0)
    return env


def trained(env, observation="box", cls=TRPO, **options):
    """After a short update, and then moved further, so that actions reach the bounds and tell observations apart."""
    policy = options.pop("policy", POLICIES.get(observation, "MlpPolicy"))
    defaults = {"n_steps": 8, "batch_size": 16, "n_critic_updates": 1, "seed": 0, "device": "cpu"}
    defaults |= {"n_actor_updates": 1} if cls is MDPO else {"cg_max_steps": 2}
    with acceleration.mode("off"):  # a trace takes longer than this update
        agent = cls(policy, env, **{**defaults, **options}).learn(16)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in agent.policy.named_parameters():
            if name.startswith(("action_net", "mlp_extractor.policy_net")):
                p += 0.5 * torch.randn(p.shape, generator=generator) * (p.ndim > 1)
    return agent


def drawn(space, n=16, seed=3):
    """Observations of a space, as the environment gives them, and as an exported file takes them."""
    space.seed(seed)
    rows = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        parts = {key: np.stack([row[key] for row in rows]) for key in space.spaces}
        return parts, list(parts.values())
    rows = np.stack(rows)
    if space is IMAGE:  # which one colour, and one half of it, tells from each other
        mask = np.zeros_like(rows)
        for i in range(n):
            mask[i, 18 * (i % 2) : 18 * (i % 2) + 18, :, i % 3] = 1
        rows *= mask
    return rows, [rows]


def onnx_actions(path, *arrays):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["action"], {i.name: x for i, x in zip(session.get_inputs(), arrays, strict=True)})[0]


def agree(actions, expected):
    assert actions.shape == expected.shape
    assert actions.dtype == expected.dtype
    np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-5)
    assert len(np.unique(expected, axis=0)) > 1  # the observations make a difference


@once
@needs_onnx
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize("cls", [TRPO, *(pytest.param(cls, marks=pytest.mark.slow) for cls in (NPG, MDPO))])
def test_onnx_runtime_gives_the_actions_of_predict(cls, observation, action, tmp_path):
    env = bare(observation, action)
    if observation in ("box", "dict"):
        keys = {"norm_obs_keys": ["speed"]} if observation == "dict" else {}
        env = VecNormalize(env, **keys)
    agent = trained(env, observation, cls)
    path = export_agent(agent, tmp_path / "policy.onnx")
    raw, arrays = drawn(OBSERVATIONS[observation])
    seen = env.normalize_obs(raw) if isinstance(env, VecNormalize) else raw
    expected, _ = agent.predict(seen, deterministic=True)
    agree(onnx_actions(path, *arrays), expected)
    np.testing.assert_allclose(onnx_actions(path, *(x[:1] for x in arrays)), expected[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("format", ["torchscript", "torch-export"])
def test_the_other_formats_do_too(format, action, tmp_path):
    env = VecNormalize(bare("dict", action), norm_obs_keys=["speed"])
    agent = trained(env, "dict")
    path = export_agent(agent, tmp_path / "policy", format)
    raw, arrays = drawn(OBSERVATIONS["dict"])
    expected, _ = agent.predict(env.normalize_obs(raw), deterministic=True)
    agree(load_exported(path, format)(*arrays), expected)


FORMATS = [pytest.param("onnx", marks=needs_onnx), "torchscript", "torch-export"]


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_gsde_squashed_or_not(format, squash, tmp_path):
    agent = trained(VecNormalize(bare("box")), use_sde=True, policy_kwargs={"squash_output": squash})
    path = export_agent(agent, tmp_path / "policy", format)
    raw, arrays = drawn(OBSERVATIONS["box"])
    expected, _ = agent.predict(agent.get_vec_normalize_env().normalize_obs(raw), deterministic=True)
    agree(load_exported(path, format)(*arrays), expected)
    assert agent.policy.squash_output is squash


@pytest.mark.parametrize("wrapper", [VecNormalize, TheirVecNormalize])
@pytest.mark.parametrize("format", FORMATS)
def test_a_mean_that_is_large_against_the_deviation_loses_no_digits(format, wrapper, tmp_path):
    env = wrapper(bare("box"))
    agent = trained(env)
    env.obs_rms.mean = 1000.1 + np.arange(5.0)
    env.obs_rms.var = np.full(5, 1e-6)
    raw = (env.obs_rms.mean + 1e-3 * np.random.default_rng(0).normal(size=(64, 5))).astype(np.float32)
    expected, _ = agent.predict(env.normalize_obs(raw), deterministic=True)
    path = export_agent(agent, tmp_path / "policy", format)
    agree(load_exported(path, format)(raw), expected)


def test_statistics_that_are_off_stay_off(tmp_path):
    env = VecNormalize(bare("box"), norm_obs=False)
    agent = trained(env)
    raw, arrays = drawn(OBSERVATIONS["box"])
    act = load_exported(export_agent(agent, tmp_path / "p.pt2", "torch-export"))
    agree(act(*arrays), agent.predict(raw, deterministic=True)[0])


def test_images_are_taken_as_the_environment_gives_them(tmp_path):
    env = bare("image", "discrete")
    agent = trained(env, "image")
    assert type(agent.get_env()) is VecTransposeImage
    raw, arrays = drawn(IMAGE)
    expected, _ = agent.predict(raw, deterministic=True)
    act = load_exported(export_agent(agent, tmp_path / "p.pt2", "torch-export"))
    agree(act(*arrays), expected)
    # and with `env`, as that one gives them
    act = load_exported(export_agent(agent, tmp_path / "p.pt2", "torch-export", env=agent.get_env()))
    agree(act(raw.transpose(0, 3, 1, 2)), expected)


# Samples --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("action", ["discrete", "multidiscrete", "multibinary"])
@pytest.mark.slow
def test_samples_have_the_probabilities_of_the_policy(format, action, tmp_path):
    agent = trained(bare("box", action))
    path = export_agent(agent, tmp_path / "policy", format, deterministic=False)
    n = 20_000
    (row,) = drawn(OBSERVATIONS["box"], 1)[1]
    actions = load_exported(path, format)(row.repeat(n, 0)).reshape(n, -1)
    distribution = agent.policy.get_distribution(torch.as_tensor(row)).distribution
    several = distribution if isinstance(distribution, list) else [distribution]
    if action == "multibinary":
        p = several[0].probs.detach().numpy()[0]
        assert set(np.unique(actions)) <= {0.0, 1.0}
        assert (np.abs(actions.mean(0) - p) <= 5 * np.sqrt(p * (1 - p) / n) + 1e-9).all()
        return
    for part, column in zip(several, actions.T, strict=True):
        p = part.probs.detach().numpy()[0]
        counted = np.bincount(column, minlength=len(p)) / n
        assert (np.abs(counted - p) <= 5 * np.sqrt(p * (1 - p) / n) + 1e-9).all()


@pytest.mark.parametrize("use_sde", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.slow
def test_samples_have_the_mean_and_deviation_of_the_policy(format, use_sde, tmp_path):
    agent = trained(bare(spaces.Box(-1, 1, (5,)), "box"), use_sde=use_sde)
    agent.policy.action_space = agent.action_space = spaces.Box(-1e3, 1e3, (2,))  # nothing is clipped
    path = export_agent(agent, tmp_path / "policy", format, deterministic=False)
    n = 20_000
    row = np.full((1, 5), 0.3, np.float32)
    actions = load_exported(path, format)(row.repeat(n, 0))
    normal = agent.policy.get_distribution(torch.as_tensor(row)).distribution
    mean, deviation = (x.detach().numpy()[0] for x in (normal.mean, normal.stddev))
    assert (np.abs(actions.mean(0) - mean) <= 5 * deviation / np.sqrt(n)).all()
    assert (np.abs(actions.std(0) / deviation - 1) <= 5 / np.sqrt(2 * n)).all()


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("bound", [0.1, 0.3, 0.5, 1e-50, 1e30])
def test_actions_stay_within_bounds_that_float32_lacks(bound, squash):
    space = spaces.Box(-bound, 3 * bound, (2,), np.float64)
    env = DummyVecEnv([lambda: Noise(OBSERVATIONS["box"], space)] * 2)
    agent = trained(env, **({"use_sde": True, "policy_kwargs": {"squash_output": True}} if squash else {}))
    with torch.no_grad():
        agent.policy.action_net.weight.mul_(1e35)
    actions = DeployedPolicy(agent)(torch.as_tensor(drawn(OBSERVATIONS["box"], 64)[0])).numpy().astype(np.float64)
    assert all(space.contains(action) for action in actions)
    if bound > 1e-40:  # what is smaller is 0
        np.testing.assert_allclose([actions.min(), actions.max()], [-bound, 3 * bound], rtol=1e-6)


def test_squashed_samples_fill_the_action_space(tmp_path):
    agent = trained(bare("box"), use_sde=True, policy_kwargs={"squash_output": True, "log_std_init": 1.0})
    act = load_exported(export_agent(agent, tmp_path / "p.pt", "torchscript", deterministic=False))
    actions = act(drawn(OBSERVATIONS["box"], 2000)[0])
    low, high = ACTIONS["box"].low, ACTIONS["box"].high
    assert ((actions >= low) & (actions <= high)).all()
    assert np.allclose(actions.min(0), low, atol=0.05)
    assert np.allclose(actions.max(0), high, atol=0.05)


@pytest.mark.parametrize("format", FORMATS)
def test_actions_that_are_not_legal_are_never_taken(format, tmp_path):
    pytest.importorskip("numba")
    env = make_vec_env("npg/Tetris-v0", 64, seed=0, env_kwargs={"height": 10})
    agent = TRPO("AfterstatePolicy", env, n_steps=4, device="cpu", seed=0)
    with torch.no_grad():
        agent.policy.theta.normal_(generator=torch.Generator().manual_seed(0))
    observations = env.reset()
    legal = observations[..., 0] != 0
    assert not legal.all()
    mode = load_exported(export_agent(agent, tmp_path / "mode", format), format)
    agree(mode(observations), agent.predict(observations, deterministic=True)[0])
    act = load_exported(export_agent(agent, tmp_path / "sample", format, deterministic=False), format)
    draws = np.stack([act(observations) for _ in range(50)])
    assert legal[np.arange(64), draws].all()
    assert len(np.unique(draws[:, 0])) > 1


# Policies of one's own, and what is refused --------------------------------------------------------------------------


class Doubled(ActorCriticPolicy):
    """Acts by half of its mean."""

    def _get_action_dist_from_latent(self, latent_pi):
        return self.action_dist.proba_distribution(self.action_net(latent_pi) / 2, self.log_std)


class Moody(ActorCriticPolicy):
    """Acts another way where the first observation is positive."""

    def _predict(self, observation, deterministic=False):
        actions = super()._predict(observation, deterministic)
        return -actions if float(observation[0, 0]) > 0 else actions


class Counting(ActorCriticPolicy):
    """Acts another way each time."""

    calls = 0

    def _predict(self, observation, deterministic=False):
        type(self).calls += 1
        return super()._predict(observation, deterministic) * 0 + 0.01 * type(self).calls


class Gain(ActorCriticPolicy):
    gain = 1.0

    def _predict(self, observation, deterministic=False):
        return self.gain * super()._predict(observation, deterministic)


def test_a_policy_of_ones_own_acts_by_what_it_does(tmp_path):
    agent = trained(VecNormalize(bare("box")), policy=Doubled)
    raw, arrays = drawn(OBSERVATIONS["box"])
    act = load_exported(export_agent(agent, tmp_path / "p.pt2", "torch-export"))
    agree(act(*arrays), agent.predict(agent.get_env().normalize_obs(raw), deterministic=True)[0])


@pytest.mark.parametrize("format", FORMATS)
def test_an_observation_of_several_parts_may_be_a_dict(format, tmp_path):
    agent = trained(bare("dict"), "dict")
    raw, arrays = drawn(OBSERVATIONS["dict"])
    act = load_exported(export_agent(agent, tmp_path / f"p{export.FORMATS[format]}", format))
    agree(act(dict(reversed(raw.items()))), act(*arrays))
    name = next(iter(raw))
    with pytest.raises(ValueError, match=r"the observation must have the parts \["):
        act({name: raw[name]})


def test_an_error_of_the_file_system_is_no_fault_of_the_policy(tmp_path, monkeypatch):
    agent = trained(bare("box"))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(export._WRITERS, "torchscript", full)
    with pytest.raises(OSError, match="No space left on device"):
        export_agent(agent, tmp_path / "p.pt", "torchscript")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["torchscript", "torch-export"])
def test_a_policy_that_branches_on_values_is_refused(format, tmp_path):
    agent = trained(bare("box"), policy=Moody)
    with pytest.raises(ExportError, match=rf"Moody cannot be exported as {format}: .*branch on the values of tensors"):
        export_agent(agent, tmp_path / "policy", format)
    assert list(tmp_path.iterdir()) == []


def test_a_policy_that_depends_on_more_is_refused(tmp_path):
    agent = trained(bare("box"), policy=Counting)
    with pytest.raises(ExportError, match="exported Counting does not act as the agent"):
        export_agent(agent, tmp_path / "policy", "torchscript")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changed", ["activation", "attribute"])
def test_what_a_saved_model_does_not_have_is_refused(changed, tmp_path):
    """A file is made of what the agent would be saved as, and compared with the agent itself."""
    agent = trained(bare("box"), policy=Gain)
    export_agent(agent, tmp_path / "policy", "torchscript")
    if changed == "activation":
        agent.policy.mlp_extractor.policy_net[1] = torch.nn.ReLU()
    else:
        agent.policy.gain = 3.0
    mode = agent.policy.training
    with pytest.raises(ExportError, match=r"exported Gain does not act as the agent: .* all that a saved model has"):
        export_agent(agent, tmp_path / "other", "torchscript")
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    assert agent.policy.training == mode


def test_samples_of_a_policy_with_a_predict_of_its_own_are_refused(tmp_path):
    agent = trained(bare("box"), policy=Counting)
    with pytest.raises(ExportError, match=r"samples of .*Counting cannot be exported.*deterministic"):
        export_agent(agent, tmp_path / "policy", "torchscript", deterministic=False)


def test_a_wrapper_between_statistics_and_agent_is_refused():
    agent = trained(VecFrameStack(VecNormalize(bare("box")), 2))
    with pytest.raises(ExportError, match=r"VecFrameStack cannot be exported: .* not inside of it. Put it inside"):
        DeployedPolicy(agent)
    with pytest.raises(ExportError, match="VecFrameStack cannot be exported"):
        DeployedPolicy(agent, agent.get_env().venv.venv)


def test_environments_of_something_else_are_refused():
    with pytest.raises(ExportError, match="is not one that the agent's environments are made of"):
        DeployedPolicy(trained(VecNormalize(bare("box"))), bare("box"))


def test_statistics_of_ones_own_are_refused():
    class Halved(VecNormalize):
        """Not what VecNormalize does."""

        def normalize_obs(self, obs):
            return super().normalize_obs(obs) / 2

    with pytest.raises(ExportError, match="Halved cannot be exported: it is not VecNormalize itself"):
        DeployedPolicy(trained(Halved(bare("box"))))


def test_images_that_are_transposed_inside_are_the_environment():
    agent = trained(VecMonitor(VecFrameStack(VecTransposeImage(bare("image", "discrete")), 2)), "image")
    assert DeployedPolicy(agent).observation_space.shape == (6, 36, 36)


def test_a_wrapper_inside_the_statistics_is_the_environment():
    agent = trained(VecMonitor(VecNormalize(VecFrameStack(bare("box"), 2))))
    assert DeployedPolicy(agent).observation_space.shape == (10,)


def test_other_policies_are_refused():
    with pytest.raises(ExportError, match="only actor-critic policies can be exported, got DQNPolicy"):
        DeployedPolicy(DQN("MlpPolicy", "CartPole-v1"))


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="format must be 'onnx', 'torchscript' or 'torch-export', got 'tflite'"):
        export_agent(trained(bare("box")), tmp_path / "p", "tflite")
    with pytest.raises(ValueError, match="end of path must be"):
        load_exported(tmp_path / "p.tflite")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("agents.export.find_spec", lambda name: None if name == "onnxruntime" else True)
    with pytest.raises(ImportError, match=r"needs onnxruntime: pip install onnxruntime$"):
        export_agent(trained(bare("box")), tmp_path / "p.onnx")


# The rest -------------------------------------------------------------------------------------------------------------


def generators():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


def test_the_agent_and_the_random_numbers_stay_as_they_were(tmp_path):
    agent = trained(VecNormalize(bare("box")), use_sde=True)
    agent.policy.set_training_mode(True)
    before = {name: x.clone() for name, x in agent.policy.state_dict().items()}
    before_numbers = generators()
    export_agent(agent, tmp_path / "p.pt2", "torch-export", deterministic=False)
    assert generators() == before_numbers
    assert all(torch.equal(x, before[name]) for name, x in agent.policy.state_dict().items())
    assert agent.policy.training
    assert all(p.requires_grad for p in agent.policy.parameters())


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_says_what_it_is(format, tmp_path):
    agent = trained(VecNormalize(bare("dict"), norm_obs_keys=["speed"]), "dict")
    end = {"onnx": ".onnx", "torchscript": ".pt", "torch-export": ".pt2"}[format]
    about = description(export_agent(agent, tmp_path / f"policy{end}", format))
    assert about["algorithm"] == "TRPO"
    assert about["timesteps"] == 16
    assert about["inputs"] == {
        "gear": {"shape": [], "dtype": "int64"},
        "speed": {"shape": [3], "dtype": "float32"},
    }


def test_an_agent_without_its_environments_is_exported_with_a_warning(tmp_path):
    env = VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")]))
    TRPO("MlpPolicy", env, n_steps=16, seed=0).learn(32).save(tmp_path / "agent")
    loaded = TRPO.load(tmp_path / "agent")
    with pytest.warns(UserWarning, match=r"this TRPO has no environments.* give them with set_env first"):
        path = export_agent(loaded, tmp_path / "p.pt", "torchscript")
    raw = np.float32([[0.1, -0.2, 0.03, 0.4]])
    np.testing.assert_array_equal(load_exported(path)(raw), loaded.predict(raw, deterministic=True)[0])
