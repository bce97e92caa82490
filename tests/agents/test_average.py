"""The average of the weights: its value, what acts by it, and that learning knows nothing of it."""

from __future__ import annotations

import copy
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy

import envs
from agents import CPO, MDPO, NPG, TRPO
from agents.evaluation import evaluate
from agents.export import DeployedPolicy

torch.set_num_threads(1)

SMALL: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_critic_updates": 1, "seed": 0, "device": "cpu"}


def made(cls: Any = TRPO, policy: str = "MlpPolicy", env: str = "CartPole-v1", **kwargs: Any) -> Any:
    return cls(policy, make_vec_env(env, 2, seed=0), **{**SMALL, **kwargs})


def weights(policy: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.parameters()]


@pytest.mark.parametrize("cls", [TRPO, NPG, MDPO, CPO])
def test_it_is_the_average_of_the_policies_after_each_update(cls):
    model = made(cls, ema=0.75, **({"cost_limit": inf} if cls is CPO else {}))
    assert model.deployed_policy is model.policy
    model.set_logger(Logger(None, []))
    _, callback = model._setup_learn(10**6)
    means: list[torch.Tensor] = []
    for _ in range(4):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
        model.train()
        now = [w.double() for w in weights(model.policy)]
        means = [0.75 * m + 0.25 * w for m, w in zip(means, now)] if means else now
    for mean, averaged in zip(means, weights(model.deployed_policy), strict=True):
        torch.testing.assert_close(averaged.double(), mean, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(a, b) for a, b in zip(weights(model.deployed_policy), weights(model.policy)))


@pytest.mark.parametrize(
    ("policy", "env", "changes"),
    [
        ("MlpPolicy", "CartPole-v1", {}),
        ("MlpLstmPolicy", "CartPole-v1", {}),
        ("MlpPolicy", "Pendulum-v1", {"use_sde": True}),
    ],
)
def test_learning_knows_nothing_of_it(policy, env, changes):
    plain, averaged = (made(policy=policy, env=env, ema=ema, **changes).learn(96) for ema in (0.0, 0.9))
    for a, b in zip(weights(plain.policy), weights(averaged.policy), strict=True):
        assert torch.equal(a, b)
    for name, value in plain.policy.optimizer.state_dict()["state"].items():
        for key in value:
            assert torch.equal(value[key], averaged.policy.optimizer.state_dict()["state"][name][key])


@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
def test_predictions_evaluations_and_saved_models_are_of_it(tmp_path, policy):
    model = made(policy=policy, ema=0.9, policy_kwargs={"net_arch": [8]}).learn(320)
    observations = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    twin = made(policy=policy, policy_kwargs={"net_arch": [8]})
    twin.policy.load_state_dict(model.average.policy.state_dict())
    expected, _ = twin.predict(observations, deterministic=True)
    np.testing.assert_array_equal(model.predict(observations, deterministic=True)[0], expected)
    assert not np.array_equal(model.policy.predict(observations, deterministic=True)[0], expected)
    found, theirs = (evaluate(m, make_vec_env("CartPole-v1", 2, seed=1), 4, seed=1) for m in (model, twin))
    assert found.returns == theirs.returns

    model.save(tmp_path / "model.zip")
    loaded = TRPO.load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    np.testing.assert_array_equal(loaded.predict(observations, deterministic=True)[0], expected)
    for one in (model, loaded):  # and both go on alike
        one.set_random_seed(3)
        one.learn(64, reset_num_timesteps=True)
    for a, b in zip(weights(model.average), weights(loaded.average), strict=True):
        assert torch.equal(a, b)


def test_an_exported_policy_is_it():
    model = made(env="Pendulum-v1", ema=0.9, n_steps=64).learn(640)
    exported = DeployedPolicy(model).policy
    for a, b in zip(weights(exported), weights(model.average.policy), strict=True):
        assert torch.equal(a, b)


def test_masked_policies_act_by_it():
    def masked(**kwargs: Any) -> Any:
        env = envs.make_vec_env("npg/ConnectFour-v0", 2, seed=0)
        return TRPO("MlpPolicy", env, **{**SMALL, **kwargs})

    model, twin = masked(ema=0.9).learn(320), masked()
    twin.policy.load_state_dict(model.average.policy.state_dict())
    observation = model.get_env().reset()
    expected = twin.deployed_policy.get_distribution(twin.policy.obs_to_tensor(observation)[0]).distribution.logits
    found = model.deployed_policy.get_distribution(model.policy.obs_to_tensor(observation)[0]).distribution.logits
    assert torch.equal(found, expected)
    assert type(model.deployed_policy) is type(model.policy)
    actions, _ = model.predict(observation, deterministic=True)
    np.testing.assert_array_equal(actions, twin.predict(observation, deterministic=True)[0])


def test_hybrid_actions_come_from_it():
    def hybrid(**kwargs: Any) -> Any:
        return TRPO("MlpPolicy", envs.make_vec_env("npg/Platform-v0", 2, seed=0), **{**SMALL, **kwargs})

    model, twin = hybrid(ema=0.9).learn(320), hybrid()
    twin.policy.load_state_dict(model.average.policy.state_dict())
    observation = np.stack([model.observation_space.sample() for _ in range(20)])
    assert repr(model.predict(observation, deterministic=True)) == repr(twin.predict(observation, deterministic=True))
    assert repr(model.predict(observation, deterministic=True)) != repr(
        model.policy.predict(observation, deterministic=True)
    )


def test_an_update_that_fails_leaves_it_as_it_was(monkeypatch):
    model = made(ema=0.9).learn(64)
    model.set_logger(Logger(None, []))
    before = copy.deepcopy(model.average.state_dict())
    model.rollout_buffer.returns[:] = np.nan
    with pytest.raises(FloatingPointError):
        model.train()
    for name, value in model.average.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.deployed_policy is model.average.policy


def test_saved_models_with_and_without_it_load_either_way(tmp_path):
    with_it, without = made(ema=0.9).learn(64), made().learn(64)
    with_it.save(tmp_path / "with")
    without.save(tmp_path / "without")
    dropped = TRPO.load(tmp_path / "with", device="cpu", ema=0.0)
    assert dropped.average is None
    begun = TRPO.load(tmp_path / "without", device="cpu", ema=0.5)
    assert begun.average.count == 0
    assert begun.deployed_policy is begun.policy
    for a, b in zip(weights(dropped.policy), weights(with_it.policy), strict=True):
        assert torch.equal(a, b)


def test_parameters_of_elsewhere_begin_a_new_one(tmp_path):
    """Given by set_parameters, from a dict or a file, or written to the policy: nothing of the former ones acts."""
    other = made(seed=1).learn(64)
    other.save(tmp_path / "other")
    ways = [
        lambda m: m.set_parameters(other.get_parameters()),
        lambda m: m.set_parameters(tmp_path / "other"),
        lambda m: m.policy.load_state_dict(other.policy.state_dict()),
    ]
    for way in ways:
        model = made(ema=0.9).learn(96)
        assert model.deployed_policy is not model.policy
        way(model)
        assert model.deployed_policy is model.policy
        for a, b in zip(weights(model.policy), weights(other.policy), strict=True):
            assert torch.equal(a, b)
        model.learn(32)
        for a, b in zip(weights(model.deployed_policy), weights(model.policy), strict=True):
            assert torch.equal(a, b)


def by_data(policy: Any) -> None:
    for p in policy.parameters():
        p.data.mul_(-1)


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda policy: torch.nn.init.ones_(policy.action_net.bias), id="in_place"),
        pytest.param(by_data, id="by_data"),
        pytest.param(lambda policy: policy.mlp_extractor.policy_net[0].reset_parameters(), id="reset"),
    ],
)
def test_an_average_of_other_weights_neither_acts_nor_goes_into_files(tmp_path, write):
    model = made(env="Pendulum-v1", ema=0.9, n_steps=64).learn(320)
    write(model.policy)
    assert model.deployed_policy is model.policy
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", device="cpu")
    again = made(env="Pendulum-v1", ema=0.9)
    again.set_parameters(model.get_parameters())
    for policy in (loaded.deployed_policy, again.deployed_policy, DeployedPolicy(model).policy):
        for a, b in zip(weights(policy), weights(model.policy), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "moved",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda model: (model.policy.double(), model)[1], id="another_type"),
        pytest.param(lambda model: (model.policy.double().float(), model)[1], id="there_and_back"),
    ],
)
def test_the_same_weights_at_other_places_keep_it(moved):
    model = made(ema=0.9).learn(96)
    average = [w.double() for w in weights(model.average.policy)]
    found = moved(model)
    assert found.deployed_policy is found.average.policy
    for a, b in zip(weights(found.deployed_policy), average, strict=True):
        assert torch.equal(a.double(), b)
    assert all(a.dtype == b.dtype for a, b in zip(weights(found.deployed_policy), weights(found.policy)))


def test_another_policy_gets_an_average_of_its_own():
    model = made(ema=0.9).learn(64)
    model.policy = copy.deepcopy(model.policy)
    assert model.deployed_policy is model.policy  # nothing of the former one acts
    model.learn(32)
    for a, b in zip(weights(model.deployed_policy), weights(model.policy), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("ema", "message"), [(1.0, r"ema must lie in \[0, 1\), got 1.0"), (-0.1, "ema must lie in")])
def test_a_decay_out_of_range_is_refused(ema, message):
    with pytest.raises(ValueError, match=message):
        made(ema=ema)


def test_a_policy_that_cannot_be_copied_is_refused():
    class Bound(ActorCriticPolicy):
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise TypeError("it holds a lock")

    with pytest.raises(TypeError, match=r"ema=0.9 needs a copy .* Bound cannot be copied .it holds a lock.: set ema=0"):
        made(policy=Bound, ema=0.9)


class Scaled(ActorCriticPolicy):
    gain = 0.0

    def _get_action_dist_from_latent(self, latent_pi):
        return self.action_dist.proba_distribution(self.gain * self.action_net(latent_pi), self.log_std)


def test_what_is_no_tensor_is_that_of_the_policy_at_its_last_update():
    class Anneal(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            self.model.policy.gain = 1.0

    observations = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    model = made(policy=Scaled, env="Pendulum-v1", ema=0.9).learn(32, Anneal())  # after one update it is the policy
    expected, _ = model.policy.predict(observations, deterministic=True)
    assert expected.any()
    np.testing.assert_array_equal(model.predict(observations, deterministic=True)[0], expected)
    assert not model.deployed_policy.training

    model = made(env="Pendulum-v1", ema=0.9)
    model.policy.mlp_extractor.policy_net[1] = torch.nn.ReLU()
    model.policy.action_net.register_forward_hook(lambda module, inputs, outputs: outputs + 1)
    model.learn(32)
    expected, _ = model.policy.predict(observations, deterministic=True)
    np.testing.assert_array_equal(model.predict(observations, deterministic=True)[0], expected)
