import inspect
from importlib import resources

import pytest
from stable_baselines3.common.vec_env import VecNormalize

import agents
from agents.config import ALGORITHMS, RunConfig, agent_of, hyperparameters_of, load_preset, resolve
from envs import make_vec_env
from npg.runs.presets import parse_settings, read_yaml


def preset_names(algo):
    return read_yaml(resources.files("agents") / "presets" / f"{algo}.yaml")


def test_every_exported_algorithm_is_on_the_command_line():
    assert ALGORITHMS["trpo"] is agents.TRPO
    assert ALGORITHMS["npg"] is agents.NPG


@pytest.mark.parametrize("algo", ["trpo", "npg"])
def test_every_preset_is_of_arguments_that_exist(algo):
    names = preset_names(algo)
    assert {"CartPole-v1", "HalfCheetah-v5", "Humanoid-v5", "LunarLander-v3", "Atari"} <= set(names)
    for name in names:
        config = resolve(algo, "CartPole-v1", preset=name)
        assert set(config.hyperparameters) == set(hyperparameters_of(algo))
        assert set(config.hyperparameters) < set(inspect.signature(ALGORITHMS[algo]).parameters)


def test_the_environment_s_preset_lies_over_the_default(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("default: {gamma: 0.5, n_envs: 3}\nA: {gamma: 0.6}\n")
    assert load_preset("trpo", "A", str(path)) == {"gamma": 0.6, "n_envs": 3}
    assert load_preset("trpo", "B", str(path)) == {"gamma": 0.5, "n_envs": 3}


def test_settings_override_the_preset_and_options_override_settings():
    config = resolve("trpo", "HalfCheetah-v5", settings={"target_kl": 0.02, "n_envs": 3}, n_envs=5, seed=None)
    assert config.hyperparameters["target_kl"] == 0.02
    assert (config.n_envs, config.seed) == (5, 0)


def test_a_dotted_setting_reaches_into_a_mapping_and_leaves_the_rest():
    config = resolve("trpo", "HalfCheetah-v5", settings={"normalize.clip_obs": 5.0})
    defaults = inspect.signature(VecNormalize.__init__).parameters
    assert config.normalize["clip_obs"] == 5.0
    assert config.normalize["clip_reward"] == defaults["clip_reward"].default
    assert preset_names("trpo")["HalfCheetah-v5"]["normalize"] is True


def test_rewards_are_scaled_with_the_discount_of_the_algorithm():
    assert resolve("trpo", "X", settings={"normalize": True, "gamma": 0.9}).normalize["gamma"] == 0.9
    assert resolve("trpo", "X", settings={"normalize": {"gamma": 0.5}, "gamma": 0.9}).normalize["gamma"] == 0.5
    assert resolve("trpo", "HalfCheetah-v5", settings={"normalize": False}).normalize is None


@pytest.mark.parametrize(
    ("algo", "settings", "message"),
    [
        ("tpro", {}, "unknown algorithm 'tpro': did you mean trpo"),
        ("trpo", {"taget_kl": 1}, "unknown setting 'taget_kl' for trpo: did you mean target_kl"),
        ("trpo", {"normalize.clip": 1}, "unknown argument 'clip' of VecNormalize"),
        ("trpo", {"target_kl": "much"}, "target_kl must be a number; got 'much'"),
        ("trpo", {"n_steps": 1.5}, "n_steps must be a whole number; got 1.5"),
        ("trpo", {"use_sde": 1}, "use_sde must be true or false; got 1"),
        ("trpo", {"env_kwargs": 3}, "env_kwargs must be a mapping; got 3"),
        ("trpo", {"timesteps": 0}, "timesteps must be at least 1; got 0"),
        ("trpo", {"normalize.clip_obs": -5}, "normalize.clip_obs must be a number above 0, got -5"),
        ("trpo", {"normalize.gamma": 2}, r"normalize.gamma must be a number in \[0, 1\], got 2"),
        (
            "trpo",
            {"n_steps": "0100"},
            "n_steps must be a whole number; got '0100'|n_steps must be a number; got '0100'",
        ),
    ],
)
def test_what_is_not_known_is_named_with_the_nearest(algo, settings, message):
    with pytest.raises(ValueError, match=message):
        resolve(algo, "CartPole-v1", settings=settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed must be at least 0 and less than 2\\*\\*28; got -1"),
        ({"n_envs": 0}, "n_envs must be at least 1; got 0"),
        ({"eval_freq": 0}, "eval_freq must be at least 1; got 0"),
        ({"threads": 0}, "threads must be at least 1; got 0"),
        ({"timesteps": 1e5}, "timesteps must be a whole number; got 100000.0"),
        ({"n_envs": True}, "n_envs must be a whole number; got True"),
        ({"normalize": True}, "normalize must be a mapping; got True"),
        ({"device": "gpu"}, "device must be auto, cpu, cuda or cuda:<number>, got 'gpu'"),
    ],
)
def test_values_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RunConfig("trpo", "CartPole-v1", **options)


@pytest.mark.parametrize("text", ["{", "- 1", "default: 3", "CartPole-v1: {taget_kl: 1}"])
def test_a_damaged_preset_file_is_refused(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml|taget_kl"):
        resolve("trpo", "CartPole-v1", preset=str(path))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("net_arch=[64,-3]", r"^policy_kwargs=.*\[64, -3\].*: no MlpPolicy can be made of them"),
        ("net_arch=256", "^policy_kwargs=.*256.*: no MlpPolicy can be made of them"),
        ("net_arch={pi: [8], vff: [8]}", "^unknown network 'vff' in policy_kwargs.net_arch: did you mean vf"),
        ("optimizer_class=RMSprop", "^policy_kwargs.optimizer_class must be a class: give it in Python; got 'RMSprop'"),
        ("features_extractor_class=NatureCNN", "^policy_kwargs.features_extractor_class must be a class"),
        ("log_std_init=abc", "^policy_kwargs.log_std_init must be a number; got 'abc'"),
        ("ortho_init=no way", "^policy_kwargs.ortho_init must be true or false; got 'no way'"),
        ("optimizer_kwargs.epz=1", "^policy_kwargs=.*epz.*: no MlpPolicy can be made of them"),
    ],
)
def test_arguments_of_the_policy_are_named(setting, message):
    config = resolve("trpo", "CartPole-v1", settings=parse_settings([f"policy_kwargs.{setting}"]))
    env = make_vec_env("CartPole-v1", 2, seed=0)
    with pytest.raises(ValueError, match=message):
        agent_of(config, "MlpPolicy", env)
    env.close()


@pytest.mark.parametrize(
    "setting", ["net_arch=[]", "net_arch={pi: [8], vf: []}", "activation_fn=ReLU", "log_std_init=-1"]
)
def test_arguments_of_the_policy_are_taken(setting):
    config = resolve("trpo", "CartPole-v1", settings=parse_settings([f"policy_kwargs.{setting}"]))
    model = agent_of(config, "MlpPolicy", make_vec_env("CartPole-v1", 2, seed=0))
    assert model.policy is not None
    model.env.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"normalize.clip_obs": 5.0, "normalize": True},
        {"policy_kwargs.net_arch": [8], "policy_kwargs": {"activation_fn": "ReLU"}},
    ],
)
def test_a_setting_that_would_write_over_another_one_is_refused(settings):
    inner, outer = settings
    with pytest.raises(ValueError, match=f"^{outer}=.* would write over {inner}, .*: give {outer} first"):
        resolve("trpo", "CartPole-v1", settings=settings)
    both = resolve("trpo", "CartPole-v1", settings={name: settings[name] for name in (outer, inner)})
    assert (
        both.normalize["clip_obs"] == 5.0 if outer == "normalize" else len(both.hyperparameters["policy_kwargs"]) == 2
    )
