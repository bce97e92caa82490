"""NPG and TRPO: the life cycle, every space, what sb3-contrib gets wrong, and equality with it where it is right."""

from __future__ import annotations

import copy
import inspect
import re
import sys
import types
from contextlib import nullcontext
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecNormalize
from torch import nn

from agents import MDPO, NPG, TRPO
from agents.update import batch_of, critic_of
from envs import make_vec_env
from npg import Fisher, families
from npg.transport import wasserstein
from tests.agents.models import ALGORITHMS, Noise, agent, vec

torch.set_num_threads(1)


class Toy(gym.Env):
    """A task of any spaces: episodes of random length, some terminated and some truncated, reward from the action."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space = observation_space
        self.action_space = action_space

    def _observe(self):
        return self.observation_space.sample()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        terminated = bool(self.np_random.random() < 0.05)
        reward = -float(np.square(np.asarray(action, dtype=np.float64) - 0.5).mean())
        return self._observe(), reward, terminated, not terminated and self.steps >= 15, {}


BOX = spaces.Box(-2.0, 2.0, (5,), np.float32)
ACTIONS = {
    "Box": spaces.Box(-1.0, 1.0, (3,), np.float32),
    "Discrete": spaces.Discrete(4),
    "MultiDiscrete": spaces.MultiDiscrete([3, 2, 4]),
    "MultiBinary": spaces.MultiBinary(4),
}
OBSERVATIONS = {
    "vector": ("MlpPolicy", BOX),
    "discrete": ("MlpPolicy", spaces.Discrete(6)),
    "image": ("CnnPolicy", spaces.Box(0, 255, (1, 36, 36), np.uint8)),
    "dict": ("MultiInputPolicy", spaces.Dict({"a": BOX, "b": spaces.Discrete(3)})),
}


def toy(observation: spaces.Space = BOX, action: spaces.Space = ACTIONS["Box"], n_envs: int = 2) -> DummyVecEnv:
    env = DummyVecEnv([lambda: Toy(copy.deepcopy(observation), copy.deepcopy(action)) for _ in range(n_envs)])
    env.seed(0)
    return env


def small(cls=TRPO, env=None, policy="MlpPolicy", **kwargs):
    options = {"n_steps": 64, "batch_size": 32, "n_critic_updates": 2, "seed": 0, "device": "cpu"}
    return cls(policy, env or toy(), **{**options, **kwargs})


def parameters_of(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.policy.parameters()])


def filled(model):
    """The model with one rollout in its buffer, not yet trained on."""
    _, callback = model._setup_learn(10**6, None)
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


@pytest.mark.parametrize("algorithm", [TRPO, *(pytest.param(x, marks=pytest.mark.slow) for x in (NPG, MDPO))])
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_every_space_learns_saves_and_loads(algorithm, observation, action, tmp_path):
    policy, space = OBSERVATIONS[observation]
    env = toy(space, ACTIONS[action])
    model = small(algorithm, env, policy)
    before = parameters_of(model)
    model.learn(2 * 128)
    after = parameters_of(model)
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)
    # every parameter is the policy's own still, and the actor's all moved
    own = {id(p) for p in model.policy.parameters()}
    assert all(id(p) in own for p in model.networks.actor_parameters.values())
    initial = dict(zip(model.policy.state_dict(), small(algorithm, env, policy).policy.state_dict().values()))
    for name in model.networks.actor_parameters:
        name = name.removeprefix("policy.")
        assert not torch.equal(model.policy.state_dict()[name], initial[name]), name
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=env)
    assert torch.equal(parameters_of(loaded), after)
    sample = env.observation_space.sample()
    assert np.array_equal(model.predict(sample, deterministic=True)[0], loaded.predict(sample, deterministic=True)[0])
    loaded.learn(128, reset_num_timesteps=False)
    assert loaded.num_timesteps == 3 * 128


# ------------------------------------------------------------------------------------------------- against the peer


def both_after_one_update(action: str, **kwargs):
    contrib = pytest.importorskip("sb3_contrib")
    env = toy(action=ACTIONS[action])
    options = {"n_steps": 256, "n_critic_updates": 0, "seed": 0, "device": "cpu", **kwargs}
    theirs = contrib.TRPO("MlpPolicy", env, **options)
    ours = TRPO("MlpPolicy", env, kl_direction="new_old", kl_reduction="mean", **options)
    # a policy that has left its initialisation, where gradients are no longer tiny
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for p in theirs.policy.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    ours.policy.load_state_dict(theirs.policy.state_dict())
    before = {n: p.detach().clone() for n, p in ours.policy.named_parameters()}
    filled(theirs)
    ours.rollout_buffer = copy.deepcopy(theirs.rollout_buffer)
    logger = theirs.logger
    ours.set_logger(logger)
    moved = []
    for model in (theirs, ours):
        np.random.seed(0)  # noqa: NPY002  # the buffer shuffles by it
        torch.manual_seed(0)
        model.train()
        moved.append(torch.cat([(p.detach() - before[n]).flatten() for n, p in model.policy.named_parameters()]))
    return ours, moved


@pytest.mark.parametrize("action", ACTIONS)
def test_step_equals_that_of_sb3_contrib(action):
    ours, (theirs_moved, ours_moved) = both_after_one_update(action)
    assert theirs_moved.norm() > 0
    assert (ours_moved - theirs_moved).norm() <= 1e-4 * theirs_moved.norm()
    n = {"Box": 3, "MultiBinary": 4}.get(action, 1)
    assert 0 < ours.logger.name_to_value["train/kl"] <= n * ours.target_kl


def test_default_arguments_are_those_of_sb3_contrib():
    contrib = pytest.importorskip("sb3_contrib")
    theirs = inspect.signature(contrib.TRPO.__init__).parameters
    ours = inspect.signature(TRPO.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert {n: p.default for n, p in theirs.items()} == {n: ours[n].default for n in theirs}


def test_models_saved_by_sb3_contrib_load(tmp_path):
    contrib = pytest.importorskip("sb3_contrib")
    theirs = contrib.TRPO("MlpPolicy", toy(), n_steps=64, device="cpu")
    theirs.save(tmp_path / "theirs")
    ours = TRPO.load(tmp_path / "theirs", env=toy())
    assert torch.equal(parameters_of(ours), parameters_of(theirs))
    ours.learn(128)
    ours.save(tmp_path / "ours")
    assert TRPO.load(tmp_path / "ours").kl_reduction == "mean"
    assert TRPO.load(tmp_path / "theirs", kl_reduction="sum").kl_reduction == "sum"
    small().save(tmp_path / "own")
    assert (small().kl_direction, TRPO.load(tmp_path / "own").kl_direction) == ("old_new", "old_new")


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("use_sde", [False, True])
def test_a_model_saved_by_sb3_contrib_goes_on_as_it_would_there(action, use_sde, tmp_path):
    """The next update on the same rollout: the actor's step, its KL in their units, and the critic with its Adam."""
    contrib = pytest.importorskip("sb3_contrib")
    if use_sde and action != "Box":
        pytest.skip("gSDE is for Box alone")
    # Full batches: then the order of the rows, which both draw from generators of their own, is of no account.
    options = {"n_steps": 256, "batch_size": 512, "n_critic_updates": 3, "target_kl": 0.02, "cg_damping": 0.05}
    theirs = contrib.TRPO("MlpPolicy", toy(action=ACTIONS[action]), seed=0, device="cpu", use_sde=use_sde, **options)
    theirs.learn(2 * 512)
    theirs.save(tmp_path / "theirs")
    ours = TRPO.load(tmp_path / "theirs", env=theirs.env, device="cpu")
    before = {name: p.detach().clone() for name, p in theirs.policy.named_parameters()}
    _, callback = theirs._setup_learn(10**6, None)
    assert theirs.collect_rollouts(theirs.env, callback, theirs.rollout_buffer, theirs.n_steps)
    ours.rollout_buffer = copy.deepcopy(theirs.rollout_buffer)
    ours.set_logger(Logger(None, []))
    moved = []
    for model in (theirs, ours):
        model.train()
        moved.append({name: p.detach() - before[name] for name, p in model.policy.named_parameters()})
    for names in (ours.networks.actor_parameters, ours.networks.critic_parameters):
        a, b = (torch.cat([m[name.removeprefix("policy.")].flatten() for name in names]) for m in moved)
        assert a.norm() > 1e-3
        assert (b - a).norm() <= 1e-3 * a.norm()
    n = {"Box": 3, "MultiBinary": 4}.get(action, 1)
    kl, theirs_kl = ours.logger.name_to_value["train/kl"] / n, theirs.logger.name_to_value["train/kl_divergence_loss"]
    assert 0.3 * options["target_kl"] < theirs_kl <= options["target_kl"]
    assert kl == pytest.approx(theirs_kl, rel=0.05)  # KL(old ‖ new) is logged, and KL(new ‖ old) is bounded


# -------------------------------------------------------------------------------------------- the actor and the critic


@pytest.mark.parametrize("action", ACTIONS)
def test_kl_stays_within_the_radius_and_the_surrogate_gains(action):
    model = small(env=toy(action=ACTIONS[action]), target_kl=0.005, n_steps=128)

    class Watch(BaseCallback):
        rows: list = []  # noqa: RUF012

        def _on_rollout_start(self):
            values = self.logger.name_to_value
            if "train/kl" in values:
                self.rows.append(dict(values))

        def _on_step(self):
            return True

    watch = Watch()
    watch.rows = []
    model.learn(12 * 256, callback=watch, log_interval=10**6)
    assert len(watch.rows) == 11
    assert any(row["train/accepted"] for row in watch.rows)
    for row in watch.rows:
        assert row["train/kl"] <= model.target_kl
        assert row["train/actual_gain"] > 0 or not row["train/accepted"]
        assert row["train/predicted_kl"] <= model.target_kl * (1 + 1e-4)


class Distances(BaseCallback):
    """Of every update, the mean half squared distance between the old and the new outputs, and what was logged."""

    def __init__(self, metric):
        super().__init__()
        self.metric, self.rows, self.old = metric, [], None

    def _on_rollout_start(self):
        if self.old is not None:
            inputs, outputs = self.old
            with torch.no_grad():
                moved = float(self.metric.divergence(outputs, self.model.networks.actor(inputs)).mean())
            self.rows.append(dict(self.logger.name_to_value) | {"moved": moved})

    def _on_rollout_end(self):
        with torch.no_grad():
            observations = torch.as_tensor(self.model.rollout_buffer.observations).flatten(0, 1)
            inputs = self.model.networks.actor.prepare(observations)
            self.old = inputs, self.model.networks.actor(inputs)

    def _on_step(self):
        return True


GRAPH = torch.diag(torch.ones(3), 1) + torch.diag(torch.ones(3), -1)


@pytest.mark.parametrize("action", [*ACTIONS, "path"])
def test_transport_distance_stays_within_the_radius_and_the_surrogate_gains(action, tmp_path):
    env = toy(action=ACTIONS.get(action, ACTIONS["Discrete"]))
    metric = wasserstein(families.Categorical(), GRAPH) if action == "path" else "wasserstein"
    model = small(env=env, metric=metric, target_kl=0.002, cg_damping=1e-3, n_steps=128)
    own = wasserstein(model.networks.actor.family, GRAPH if action == "path" else None)
    watch = Distances(own)
    model.learn(9 * 256, callback=watch, log_interval=10**6)
    assert len(watch.rows) == 8
    assert sum(row["train/accepted"] for row in watch.rows) >= 6
    for row in watch.rows:
        assert row["moved"] <= model.target_kl
        assert row["train/distance"] == pytest.approx(row["moved"], rel=1e-3, abs=1e-9)
        assert row["train/actual_gain"] > 0 or not row["train/accepted"]
        assert "train/kl" not in row
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", env=env, device="cpu")
    _, outputs = watch.old
    torch.testing.assert_close(
        own.divergence(outputs, outputs + 1), loaded.networks.geometry.divergence(outputs, outputs + 1)
    )
    loaded.learn(256)
    assert loaded.logger.name_to_value["train/distance"] <= model.target_kl


@pytest.mark.parametrize("preconditioner", [None, "diagonal", "kfac"])
@pytest.mark.parametrize("metric", ["wasserstein", "euclidean"])
@pytest.mark.parametrize("algorithm", [TRPO, NPG])
def test_a_step_in_another_metric_equals_the_dense_twin(algorithm, metric, preconditioner):
    """One update of a Gaussian policy in float64: d ∝ (mean JᵀMJ + λI)⁻¹g, M = diag(1, σ²) or I written out."""
    options = {"target_kl": 1e-3, "cg_damping": 1e-2, "cg_max_steps": 1000, "policy_kwargs": {"net_arch": [8]}}
    model = small(algorithm, metric=metric, preconditioner=preconditioner, **options)
    with torch.no_grad():
        model.policy.log_std.copy_(torch.tensor([-1.0, 0.0, 0.5]))
    _, callback = model._setup_learn(10**6)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    model.policy.double()
    batch = batch_of(model, next(model.rollout_buffer.get(None)))
    batch = batch._replace(
        **{name: getattr(batch, name).double() for name in ("inputs", "actions", "old_log_likelihood", "advantages")}
    )
    actor, parameters = model.networks.actor, list(model.networks.actor_parameters.values())
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(actor, p, (batch.inputs,)))
    J = torch.cat([j.flatten(2) for j in jacobian(model.networks.actor_parameters).values()], -1).detach()
    sigma = model.policy.log_std.detach().exp()
    M = torch.diag(torch.cat([torch.ones_like(sigma), sigma**2 if metric == "wasserstein" else torch.ones_like(sigma)]))
    G = torch.einsum("ndp,de,neq->pq", J, M, J) / len(J) + 1e-2 * torch.eye(J.shape[-1], dtype=torch.float64)
    surrogate = model.surrogate(batch)(actor(batch.inputs))
    g = torch.cat([x.flatten() for x in torch.autograd.grad(surrogate, parameters)])
    s = torch.linalg.solve(G, g)
    report = model.actor_step(batch)
    want = (2e-3 / float(s @ G @ s)) ** 0.5 * 0.8**report.backtracks * s
    torch.testing.assert_close(report.step, want, rtol=0, atol=1e-4 * float(want.abs().max()))
    assert report.accepted
    if metric == "euclidean" and algorithm is TRPO:
        assert report.kl <= 1e-3


def test_metrics_that_cannot_be_are_refused_by_name():
    for algorithm in (TRPO, NPG):
        with pytest.raises(ValueError, match=r"metric must be 'fisher', 'euclidean', .* or a geometry .*'euclid'"):
            small(algorithm, metric="euclid")


@pytest.mark.parametrize(("env", "radius", "updates"), [("CartPole-v1", 0.005, 12), ("Pendulum-v1", 0.05, 4)])
@pytest.mark.slow
def test_transport_on_control_tasks(env, radius, updates):
    from stable_baselines3.common.env_util import make_vec_env

    options = {"n_steps": 128, "gae_lambda": 0.95, "cg_damping": 1e-2, "critic": "natural", "metric": "wasserstein"}
    model = TRPO("MlpPolicy", make_vec_env(env, 8, seed=0), target_kl=radius, seed=0, device="cpu", **options)
    watch = Distances(wasserstein(model.networks.actor.family))
    model.learn(updates * 8 * 128, callback=watch, log_interval=10**6)
    moved = [row["moved"] for row in watch.rows]
    assert len(moved) == updates - 1
    assert max(moved) <= radius
    assert np.mean(moved) > 0.3 * radius
    if env == "CartPole-v1":
        assert np.mean([e["r"] for e in list(model.ep_info_buffer)[-20:]]) > 80  # from 20 of a random policy


def test_actor_parameters_are_found_without_names():
    class OddlyNamed(BaseFeaturesExtractor):
        def __init__(self, observation_space):
            super().__init__(observation_space, 8)
            self.value_like_name = nn.Linear(5, 8)  # a filter on "value" would lose this one

        def forward(self, x):
            return torch.tanh(self.value_like_name(x))

    model = small(policy_kwargs={"features_extractor_class": OddlyNamed})
    actor = {id(p) for p in model.networks.actor_parameters.values()}
    critic = {id(p) for p in model.networks.critic_parameters.values()}
    extractor = {id(p) for p in model.policy.features_extractor.parameters()}
    assert extractor <= actor
    assert not actor & critic
    assert actor | critic == {id(p) for p in model.policy.parameters()}
    both = small(policy_kwargs={"features_extractor_class": OddlyNamed}, train_shared_features=True)
    assert {id(p) for p in both.policy.features_extractor.parameters()} <= {
        id(p) for p in both.networks.critic_parameters.values()
    }


@pytest.mark.parametrize("critic", ["adam", "natural"])
def test_critic_leaves_the_policy_alone_and_learns(critic):
    model = filled(small(env=toy(n_envs=4), n_steps=128, critic=critic, n_critic_updates=10, learning_rate=3e-3))
    actor = [p.detach().clone() for p in model.networks.actor_parameters.values()]
    buffer = model.rollout_buffer
    observations = torch.as_tensor(buffer.observations.reshape(-1, 5))
    # returns that a network can learn
    returns = 3.0 + torch.sin(observations[:, 0]) * 2.0
    fit = critic_of(model).fit
    with torch.no_grad():
        before = (model.policy.predict_values(observations).flatten() - returns).square().mean()
    for _ in range(3):
        loss = fit(observations, returns)
    with torch.no_grad():
        after = (model.policy.predict_values(observations).flatten() - returns).square().mean()
    assert after < 0.2 * before
    assert loss == pytest.approx(float(after), rel=0.5)
    assert all(torch.equal(a, b) for a, b in zip(actor, model.networks.actor_parameters.values()))


def test_natural_critic_solves_linear_least_squares_in_one_step():
    model = filled(
        small(
            critic="natural",
            n_critic_updates=30,
            cg_max_steps=50,
            policy_kwargs={"net_arch": [], "features_extractor_kwargs": {}},
        )
    )
    observations = torch.as_tensor(model.rollout_buffer.observations.reshape(-1, 5))
    returns = observations @ torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0]) + 0.7
    assert critic_of(model).fit(observations, returns) < 1e-4 * float(returns.var())


def test_dictionary_observations_with_a_sub_sampled_batch():
    policy, space = OBSERVATIONS["dict"]
    model = small(env=toy(space), policy=policy, sub_sampling_factor=2, fisher_fraction=0.5)
    before = parameters_of(model)
    model.learn(128)
    assert not torch.equal(before, parameters_of(model))


def test_values_and_log_likelihoods_are_those_of_the_policy_that_acted():
    model = filled(small())
    buffer = model.rollout_buffer
    for step in (0, 17, 63):
        with torch.no_grad():
            values, log_prob, _ = model.policy.evaluate_actions(
                torch.as_tensor(buffer.observations[step]), torch.as_tensor(buffer.actions[step])
            )
        assert np.allclose(values.flatten().numpy(), buffer.values[step], atol=1e-5)
        assert np.allclose(log_prob.numpy(), buffer.log_probs[step], atol=1e-4)


@pytest.mark.parametrize("action", ["Box", "Discrete"])
def test_rollout_equals_that_of_stable_baselines3(action):
    """Same seeds, same actions: rewards (with the bootstrap of truncated episodes), returns and advantages agree."""
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

    buffers = []
    for collect in (OnPolicyAlgorithm.collect_rollouts, TRPO.collect_rollouts):
        model = small(env=toy(action=ACTIONS[action]))
        _, callback = model._setup_learn(10**6, None)
        model.set_random_seed(3)
        model._last_obs = model.env.reset()
        assert collect(model, model.env, callback, model.rollout_buffer, model.n_steps)
        buffers.append(model.rollout_buffer)
    a, b = buffers
    assert a.episode_starts.sum() > 2
    for name in (
        "observations",
        "actions",
        "rewards",
        "episode_starts",
        "values",
        "log_probs",
        "returns",
        "advantages",
    ):
        assert np.allclose(getattr(a, name), getattr(b, name), atol=1e-4), name


def test_non_finite_gradient_leaves_the_policy_as_it_was():
    model = filled(small())
    actor = [p.detach().clone() for p in model.networks.actor_parameters.values()]
    model.rollout_buffer.advantages[3, 0] = np.nan
    model.n_critic_updates = 0
    model.train()
    assert model.logger.name_to_value["train/accepted"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(actor, model.networks.actor_parameters.values()))


def test_refused_search_restores_the_policy_bit_for_bit():
    model = filled(small())
    model.n_critic_updates = 0

    def deceptive(batch):
        with torch.no_grad():
            old = model.networks.actor(batch.inputs)
        # uphill at the old policy, downhill wherever one goes
        return lambda outputs: (outputs - old - 1e6 * (outputs - old) ** 2).mean()

    model.surrogate = deceptive
    actor = [p.detach().clone() for p in model.networks.actor_parameters.values()]
    model.train()
    values = model.logger.name_to_value
    assert (values["train/accepted"], values["train/kl"], values["train/backtracks"]) == (0.0, 0.0, 9)
    assert all(torch.equal(a, b) for a, b in zip(actor, model.networks.actor_parameters.values()))


def test_npg_steps_have_the_length_they_promise():
    model = filled(small(NPG, target_kl=0.004))
    model.train()
    assert model.logger.name_to_value["train/predicted_kl"] <= 0.004
    assert model.logger.name_to_value["train/predicted_kl"] > 0.0005
    fixed = filled(small(NPG, step_size=0.05, cg_max_steps=100))
    fixed.n_critic_updates = 0
    rollout = copy.deepcopy(fixed.rollout_buffer)
    before = {n: p.detach().clone() for n, p in fixed.networks.actor_parameters.items()}
    batch = batch_of(fixed, next(rollout.get(None)))
    fisher = Fisher(
        fixed.networks.actor, batch.inputs, fixed.networks.actor.family, parameters=fixed.networks.actor_parameters
    )
    matrix = fisher.dense().double()
    outputs = fisher.outputs.clone().requires_grad_()
    (slope,) = torch.autograd.grad(fixed.surrogate(batch)(outputs), outputs)
    gradient = fisher.linearization.pull_back(slope).double()
    expected = 0.05 * torch.linalg.solve(matrix + 0.1 * torch.eye(len(matrix), dtype=torch.float64), gradient)
    fixed.train()
    moved = torch.cat([(p.detach() - before[n]).flatten() for n, p in fixed.networks.actor_parameters.items()])
    assert (moved.double() - expected).norm() <= 1e-3 * expected.norm()


def test_mdpo_climbs_its_proximal_objective_and_resumes_its_optimizer(tmp_path):
    model = filled(small(MDPO, n_actor_updates=20, actor_learning_rate=1e-3))
    model.n_critic_updates = 0
    model.train()
    values = model.logger.name_to_value
    assert values["train/actual_gain"] - values["train/kl"] / model.step_size > 0
    assert 0.2 < values["train/kl"] / values["train/predicted_kl"] < 5
    model.save(tmp_path / "model")
    loaded = MDPO.load(tmp_path / "model", env=model.env)
    a, b = model.actor_optimizer.state_dict()["state"], loaded.actor_optimizer.state_dict()["state"]
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k]["exp_avg"], b[k]["exp_avg"]) for k in a)
    for name in ("step_size", "actor_learning_rate", "n_actor_updates"):
        with pytest.raises(ValueError, match=name):
            small(MDPO, **{name: 0})


@pytest.mark.parametrize("squash", [False, True])
def test_gsde(squash):
    model = small(use_sde=True, sde_sample_freq=4, policy_kwargs={"squash_output": squash, "use_expln": squash})
    before = parameters_of(model)
    model.learn(256)
    after = parameters_of(model)
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)
    filled(model)
    batch = batch_of(model, next(model.rollout_buffer.get(None)))
    with torch.no_grad():
        surrogate = model.surrogate(batch)(model.networks.actor(batch.inputs))
    assert float(surrogate) == pytest.approx(float(batch.advantages.mean()), abs=1e-3)  # all ratios are one


def test_custom_policy_is_honoured():
    class Doubled(ActorCriticPolicy):
        def get_distribution(self, obs):
            return super().get_distribution(2 * obs)

        def predict_values(self, obs):
            return super().predict_values(2 * obs)

        def forward(self, obs, deterministic=False):
            return super().forward(2 * obs, deterministic)

    model = filled(small(policy=Doubled))
    buffer = model.rollout_buffer
    observations = torch.as_tensor(buffer.observations[5])
    with torch.no_grad():
        log_prob = model.policy.get_distribution(observations).log_prob(torch.as_tensor(buffer.actions[5]))
    assert np.allclose(log_prob.numpy(), buffer.log_probs[5], atol=1e-4)
    model.train()
    assert model.logger.name_to_value["train/accepted"] == 1.0


@pytest.mark.parametrize(
    "options",
    [{"preconditioner": "diagonal"}, {"preconditioner": "kfac"}, {"fisher_fraction": 0.25}, {"critic": "natural"}],
)
def test_own_options_train(options):
    model = small(**options)
    model.learn(256)
    assert torch.isfinite(parameters_of(model)).all()


def test_kfac_gains_more_within_the_radius_for_as_many_products():
    gains = {}
    for preconditioner in (None, "kfac"):
        model = filled(small(env=toy(), preconditioner=preconditioner, cg_max_steps=2, cg_damping=1e-3, seed=3))
        report = model.actor_step(batch_of(model, next(model.rollout_buffer.get(None))))
        assert report.accepted
        assert report.iterations == 2
        gains[preconditioner] = report.predicted_gain / report.predicted_kl**0.5
    assert gains["kfac"] > 1.2 * gains[None]


def test_same_seed_same_run():
    runs = []
    for _ in range(2):
        model = small(env=toy(), seed=5)
        model.learn(3 * 128)
        runs.append(parameters_of(model))
    assert torch.equal(*runs)


# ------------------------------------------------------------------------------------------------------ the life cycle


def test_callbacks_vecnormalize_set_env_and_evaluation(tmp_path):
    env = VecNormalize(toy(), gamma=0.99)
    model = small(env=env)
    evaluation = VecNormalize(toy(), training=False, norm_reward=False)
    callbacks = [
        EvalCallback(evaluation, eval_freq=32, n_eval_episodes=2, log_path=str(tmp_path), verbose=0),
        CheckpointCallback(50, str(tmp_path), save_vecnormalize=True),
    ]
    model.learn(256, callback=callbacks)
    assert (tmp_path / "evaluations.npz").exists()
    assert list(tmp_path.glob("rl_model_*_steps.zip"))
    other = VecNormalize(toy(n_envs=2))
    model.set_env(other)
    model.learn(128, reset_num_timesteps=False)
    mean, _ = evaluate_policy(model, evaluation, n_eval_episodes=3, warn=False)
    assert np.isfinite(mean)


def test_callback_can_stop_training():
    class Stop(BaseCallback):
        def _on_step(self):
            return self.n_calls < 10

    model = small()
    model.learn(1000, callback=Stop())
    assert model.num_timesteps == 20


@pytest.mark.parametrize("steps", [32, 128])
@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
def test_another_number_of_steps_is_refused_before_a_rollout_and_taken_by_load(policy, steps, tmp_path):
    model = small(policy=policy)
    model.learn(1)
    with pytest.raises(ValueError, match=rf"n_steps is .* has 64, got {steps}: .*TRPO\.load\(path, env, n_steps=…\)"):
        model.n_steps = steps
    assert model.n_steps == 64
    model.save(tmp_path / "agent")
    TRPO.load(tmp_path / "agent", toy(), n_steps=steps).learn(1)


class Newest(VecEnvWrapper):
    """Keeps the last observations, and whose episodes ended before them."""

    def reset(self):
        self.newest = self.venv.reset(), np.ones(self.num_envs, bool)
        return self.newest[0]

    def step_wait(self):
        observations, rewards, dones, infos = self.venv.step_wait()
        self.newest = observations.copy(), dones.copy()
        return observations, rewards, dones, infos


class OwnForward(ActorCriticPolicy):
    def forward(self, obs, deterministic=False):
        return super().forward(obs, deterministic)


@pytest.mark.parametrize("policy", ["MlpPolicy", OwnForward, "MlpLstmPolicy"])
@pytest.mark.parametrize("ends", [False, True])
def test_training_goes_on_where_a_callback_stopped_it(policy, ends):
    class Stop(BaseCallback):
        def _on_step(self):
            return not (self.n_calls > 4 and self.locals["dones"].any() == ends)

    env = Newest(DummyVecEnv([lambda: Toy(BOX, ACTIONS["Box"])] * 2))
    env.seed(0)
    model = small(env=env, policy=policy)
    model.learn(10**6, callback=Stop())
    assert model.num_timesteps < 2 * model.n_steps
    observations, dones = env.newest
    assert dones.any() == ends
    np.testing.assert_array_equal(model._last_obs, observations)
    np.testing.assert_array_equal(model._last_episode_starts, dones)
    model.learn(2 * model.n_steps, reset_num_timesteps=False)
    np.testing.assert_array_equal(model.rollout_buffer.observations[0], observations)
    np.testing.assert_array_equal(model.rollout_buffer.episode_starts[0], dones)


def test_custom_rollout_buffer_is_used():
    class Counting(RolloutBuffer):
        added = 0

        def add(self, *args, **kwargs):
            type(self).added += 1
            super().add(*args, **kwargs)

    small(rollout_buffer_class=Counting).learn(128)
    assert Counting.added == 64
    assert isinstance(
        small(env=toy(OBSERVATIONS["dict"][1]), policy="MultiInputPolicy").rollout_buffer, DictRolloutBuffer
    )


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("target_kl", 0.0),
        ("target_kl", -1.0),
        ("target_kl", float("nan")),
        ("cg_damping", -0.1),
        ("cg_max_steps", 0),
        ("line_search_shrinking_factor", 1.0),
        ("line_search_max_iter", 0),
        ("fisher_fraction", 0.0),
        ("fisher_fraction", 1.5),
        ("sub_sampling_factor", 0),
        ("gamma", 1.1),
        ("gae_lambda", -0.1),
        ("n_steps", 0),
        ("batch_size", 0),
        ("n_critic_updates", -1),
        ("critic", "sgd"),
        ("preconditioner", "jacobi"),
        ("kl_direction", "sideways"),
    ],
)
def test_arguments_out_of_range_are_named(option, value):
    with pytest.raises(ValueError, match=option):
        small(**{option: value})


MISTAKES = [
    ("target_kl", None),
    ("target_kl", "0.01"),
    ("target_kl", np.array([0.01])),
    ("target_kl", float("inf")),
    ("cg_damping", float("nan")),
    ("cg_damping", float("inf")),
    ("cg_max_steps", 2.5),
    ("line_search_shrinking_factor", None),
    ("line_search_shrinking_factor", 1),
    ("metric", "nonsense"),
    ("metric", None),
    ("line_search_max_iter", 3.0),
    ("fisher_fraction", "0.5"),
    ("step_size", "large"),
    ("step_size", float("nan")),
    ("actor_learning_rate", None),
    ("n_actor_updates", 2.0),
    ("gamma", "0.9"),
    ("gamma", float("nan")),
    ("gae_lambda", None),
    ("n_steps", 64.0),
    ("n_steps", True),
    ("batch_size", None),
    ("n_critic_updates", 1.5),
    ("sub_sampling_factor", "2"),
    ("sub_sampling_factor", 128),
    ("stats_window_size", 0),
    ("learning_rate", -1e-3),
    ("learning_rate", float("nan")),
    ("learning_rate", None),
    ("learning_rate", lambda remaining: -remaining),
    ("sde_sample_freq", 4.0),
    ("seed", -1),
    ("seed", "0"),
    ("verbose", None),
    ("use_sde", None),
    ("normalize_advantage", "false"),
    ("train_shared_features", 1),
    ("policy", 7),
    ("policy_kwargs", [64, 64]),
    ("rollout_buffer_kwargs", "none"),
    ("rollout_buffer_class", "RolloutBuffer"),
    ("tensorboard_log", 1),
]


@pytest.mark.parametrize("algorithm", [TRPO, NPG, MDPO])
def test_mistakes_are_named_before_anything_is_built(algorithm):
    known = inspect.signature(algorithm.__init__).parameters
    env = toy()
    for option, value in MISTAKES:
        if option not in known:
            continue
        before = torch.get_rng_state()
        with pytest.raises((TypeError, ValueError), match=rf"^{option}\b|^n_steps \* n_envs must.*{option}") as caught:
            small(algorithm, env, **{option: value})
        text = str(caught.value)
        shown = -1.0 if callable(value) else value  # the rate that a schedule begins with
        assert "must" in text
        assert repr(shown) in text or f"got {shown}" in text or option == "sub_sampling_factor", text
        assert torch.equal(torch.get_rng_state(), before), option


@pytest.mark.parametrize("cls", ALGORITHMS)
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int8, np.bool_])
def test_actions_of_whole_numbers_are_no_box(cls, dtype):
    space = spaces.Box(0, 1, (2,), dtype)
    with pytest.raises(ValueError, match=rf"actions {re.escape(str(space))}, whole numbers, .*: take MultiDiscrete"):
        small(cls, toy(action=space))


@pytest.mark.parametrize("algorithm", [TRPO, NPG, MDPO])
def test_mistakes_are_named_where_an_attribute_is_written(algorithm):
    model = small(algorithm)
    kept = dict(vars(model))
    more = [("critic", "foo"), ("kl_reduction", "foo"), ("fisher_fraction", 5), ("max_refusals", -1), ("ema", 1.0)]
    more += [("metric", abs), ("preconditioner", "foo"), ("cg_damping", -1.0), ("step_size", -1.0), ("target_kl", 0.0)]
    for option, value in [*MISTAKES, *more]:
        if option in algorithm.options and (option, value) not in [("policy", 7), ("sub_sampling_factor", 128)]:
            with pytest.raises((TypeError, ValueError), match=rf"^{option} must"):
                setattr(model, option, value)
    assert vars(model) == kept


@pytest.mark.parametrize("ours", [True, False])
def test_discounts_that_are_written_later_are_those_of_rewards_and_of_time_limits(ours):
    options = {} if ours else {"rollout_buffer_class": RolloutBuffer}  # Stable-Baselines3's
    late, early = small(**options), small(gamma=0.5, gae_lambda=0.25, **options)
    late.gamma, late.gae_lambda = 0.5, 0.25
    for model in (late, early):
        model.set_random_seed(0)
        filled(model)
    assert np.array_equal(late.rollout_buffer.returns, early.rollout_buffer.returns)


@pytest.mark.parametrize(
    ("policy", "name", "value", "message"),
    [
        ("MlpPolicy", "sub_sampling_factor", 32, "must be larger than sub_sampling_factor to normalise advantages"),
        ("MlpLstmPolicy", "sub_sampling_factor", 3, "sub_sampling_factor must be at most the 2 environments"),
        ("MlpLstmPolicy", "preconditioner", "kfac", "preconditioner='kfac' has no factors of the memory"),
    ],
)
def test_options_that_do_not_go_together_are_refused_when_they_are_written_later(policy, name, value, message):
    agent = TRPO(policy, make_vec_env("CartPole-v1", 2, seed=0), n_steps=16, seed=0, device="cpu")
    agent.learn(32)
    before = copy.deepcopy(agent.policy.state_dict())
    setattr(agent, name, value)
    with pytest.raises(ValueError, match=message):
        agent.learn(32)
    assert all(torch.equal(p, before[key]) for key, p in agent.policy.state_dict().items())


def test_options_that_are_written_later_are_obeyed():
    model = small(learning_rate=1e-3, target_kl=0.01)
    model.learning_rate, model.target_kl, model.stats_window_size = "linear_0.5", "linear_0.02", 7
    model.train_shared_features = True
    assert [model.lr_schedule(p) for p in (1.0, 0.5)] == [0.5, 0.25]
    assert model.radius(model.target_kl) == 0.02
    model.learn(1)
    assert model.ep_info_buffer.maxlen == 7
    assert model.policy.optimizer.param_groups[0]["lr"] == 0.0  # of the last update


def test_an_average_may_begin_change_and_end_later():
    model = small()
    model.ema = 0.5
    model.learn(1)
    average, first = model.average, parameters_of(model)
    model.ema = 0.75
    model.learn(1)
    expected = torch.lerp(first, parameters_of(model), 0.25)
    assert torch.allclose(torch.cat([p.flatten() for p in average.policy.parameters()]), expected, atol=1e-7)
    model.ema = 0
    assert model.deployed_policy is model.policy


def test_features_that_are_shared_may_be_trained_by_the_critic_later():
    options = {"env": toy(OBSERVATIONS["image"][1]), "policy": "CnnPolicy"}
    late, early = small(**options), small(**options, train_shared_features=True)
    before = [*late.networks.critic_parameters]
    late.train_shared_features = True
    assert [*late.networks.critic_parameters] == [*early.networks.critic_parameters] != before


def test_a_policy_by_its_name_is_known_or_the_nearest_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown policy 'MlpLSTMPolicy': did you mean MlpLstmPolicy"):
        small(policy="MlpLSTMPolicy")
    model = small()
    model.save(tmp_path / "m")
    loaded = TRPO.load(tmp_path / "m", custom_objects={"policy_class": "MlpPolicy"})
    assert type(loaded.policy) is type(model.policy)
    with pytest.raises(ValueError, match="unknown policy 'Mlpolicy': did you mean MlpPolicy"):
        TRPO.load(tmp_path / "m", custom_objects={"policy_class": "Mlpolicy"})


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("seed", 5, "call set_random_seed"),
        ("device", "meta", r"TRPO\.load\(path, env, device=…\)"),
        ("use_sde", True, "make a new agent"),
        ("policy_kwargs", {"net_arch": [8]}, "make a new agent"),
        ("rollout_buffer_kwargs", {"n": 1}, r"TRPO\.load\(path, env, rollout_buffer_kwargs=…\)"),
        ("rollout_buffer_class", RolloutBuffer, r"TRPO\.load\(path, env, rollout_buffer_class=…\)"),
    ],
)
def test_what_is_built_in_cannot_be_written_but_as_it_is(option, value, remedy):
    model = small()
    present = getattr(model, option)
    with pytest.raises(ValueError, match=rf"^{option} is built into the agent, which has .*, got .*: .*{remedy}"):
        setattr(model, option, value)
    setattr(model, option, present)
    model._setup_model()  # as Stable-Baselines3's `load` does
    assert getattr(model, option) is present


@pytest.mark.parametrize("algorithm", [TRPO, NPG, MDPO])
@pytest.mark.parametrize("way", ["kwargs", "custom_objects"])
def test_load_refuses_what_the_constructor_does(algorithm, way, tmp_path):
    env = toy()
    small(algorithm, env).save(tmp_path / "model")
    for option, value in [*MISTAKES, ("critic", "natual"), ("advantage_deviation", "runing"), ("ema", 1.5)]:
        if option not in algorithm.options or option == "policy":  # which is not saved, and so not looked at
            continue
        given = {option: value} if way == "kwargs" else {"custom_objects": {option: value}}
        with pytest.raises((TypeError, ValueError), match=rf"^{option}\b|^n_steps \* n_envs must.*{option}"):
            algorithm.load(tmp_path / "model", env, **given)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'n_stps': did you mean n_steps"):
        algorithm.load(tmp_path / "model", env, n_stps=4)


def test_custom_objects_are_a_dict_of_known_names(tmp_path):
    small().save(tmp_path / "model")
    with pytest.raises(TypeError, match=r"^custom_objects must be a dict .*, got \[1\]"):
        TRPO.load(tmp_path / "model", custom_objects=[1])
    with pytest.raises(TypeError, match=r"^custom_objects has the unknown name 'targt_kl': did you mean .*target_kl"):
        TRPO.load(tmp_path / "model", custom_objects={"targt_kl": 0.5})
    with pytest.raises(TypeError, match=r"^custom_objects has the unknown name 1: known are: policy, env, .*"):
        TRPO.load(tmp_path / "model", custom_objects={1: 0.5})
    with pytest.raises(ValueError, match=r"^target_kl must lie in"):
        TRPO.load(tmp_path / "model", custom_objects={"target_kl": -1})
    of_stable_baselines3 = {"clip_range": lambda remaining: 0.2, "lr_schedule": lambda remaining: 1.0}
    of_stable_baselines3 |= {"policy_class": ActorCriticPolicy, "observation_space": BOX, "n_envs": 3}
    model = TRPO.load(tmp_path / "model", custom_objects=of_stable_baselines3 | {"target_kl": 0.5})
    assert (model.target_kl, model.n_envs) == (0.5, 3)


def test_custom_objects_are_taken_where_the_file_lacks_an_option(tmp_path):
    contrib = pytest.importorskip("sb3_contrib")
    contrib.TRPO("MlpPolicy", toy(), n_steps=64, device="cpu").save(tmp_path / "model")
    assert TRPO.load(tmp_path / "model").kl_direction == "new_old"
    assert TRPO.load(tmp_path / "model", custom_objects={"kl_direction": "old_new"}).kl_direction == "old_new"
    with pytest.raises(ValueError, match=r"^kl_direction must be"):
        TRPO.load(tmp_path / "model", custom_objects={"kl_direction": "new"})


def test_a_folder_is_no_model_and_those_in_it_are_named(tmp_path):
    with pytest.raises(IsADirectoryError, match=rf"^path='{tmp_path}' is a folder: give the file .*last_model\.zip"):
        TRPO.load(tmp_path)
    small().save(tmp_path / "last_model")
    with pytest.raises(IsADirectoryError, match=rf"is a folder: give {tmp_path}/last_model\.zip$"):
        TRPO.load(str(tmp_path))
    small().save(tmp_path / "best_model")
    with pytest.raises(IsADirectoryError, match=r"give .*/last_model\.zip or .*/best_model\.zip$"):
        TRPO.load(tmp_path)


@pytest.mark.parametrize(
    ("env", "told"),
    [
        (Toy, r"Toy.* \(type\): give an object of the class, Toy\(…\), or envs\.make_vec_env\(Toy, n_envs\)$"),
        (lambda: toy(), r"\(function\): give what it makes, or envs\.make_vec_env with it and n_envs$"),
        (
            [1],
            r"\[1\] \(list\): for several take envs\.make_vec_env\(env_id, n_envs\), for one leave the brackets",
        ),
        (5, r"5 \(int\): take envs\.make_vec_env\(env_id, n_envs\)$"),
        (None, r"None"),
    ],
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_no_environment_is_refused_by_name(algorithm, env, told, tmp_path):
    with pytest.raises(TypeError, match=rf"^env must be an environment.*, got .*{told}"):
        algorithm("MlpPolicy", env)
    if env is None:
        return
    model = small(algorithm)
    model.save(tmp_path / "model")
    for taken in (model.set_env, lambda env: algorithm.load(tmp_path / "model", env)):
        with pytest.raises(TypeError, match=rf"^env must be an environment.*, got .*{told}"):
            taken(env)


def test_environments_are_taken_by_their_id_wherever_they_are_given(tmp_path):
    model = TRPO("MlpPolicy", "CartPole-v1", n_steps=16, device="cpu")
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", env="CartPole-v1")
    model.set_env("CartPole-v1")
    for agent_ in (model, loaded):
        assert agent_.learn(16).get_env().num_envs == 1
    with pytest.raises(gym.error.NameNotFound, match="CartPol"):
        model.set_env("CartPol-v1")


@pytest.mark.parametrize("algorithm", [TRPO, NPG, MDPO])
def test_an_agent_without_environments_says_how_it_gets_them(algorithm, tmp_path):
    small(algorithm).save(tmp_path / "model")
    model = algorithm.load(tmp_path / "model")
    told = rf"^env is None, .*: give it 2 with set_env\(env\), or load it with {algorithm.__name__}\.load\(path, env\)"
    for learning in (partial(model.learn, 10), model.collect):
        with pytest.raises(ValueError, match=told):
            learning()
    model.set_env(toy())
    assert model.learn(10).num_timesteps == 128


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ("10", r"a whole number, got '10' \(str\): give an int"),
        (None, "a whole number, got None"),
        (True, "a whole number, got True"),
        (-1, "at least 0, got -1"),
        (-2.0, "at least 0, got -2"),
        (1.5, "a whole number, got 1.5: give one, such as 100_000 or 1e5"),
        (float("nan"), "a whole number, got nan: give one, such as"),
        (np.float32("inf"), r"a whole number, got inf: give a large one, such as 10\*\*12, that a callback ends"),
    ],
)
def test_steps_that_cannot_be_learned_are_refused(steps, told):
    model = small()
    with pytest.raises((TypeError, ValueError), match=f"^total_timesteps must be {told}"):
        model.learn(steps)
    assert model.num_timesteps == 0


@pytest.mark.parametrize("steps", [1e2, np.int32(100), np.float64(100), np.array(100), torch.tensor(100)])
def test_steps_are_whole_numbers_however_they_are_written(steps):
    assert small().learn(steps).num_timesteps == 128


def test_no_steps_set_up_all_and_learn_nothing():
    model = small()
    before = parameters_of(model)
    assert model.learn(0).num_timesteps == 0
    assert torch.equal(parameters_of(model), before)
    assert model.logger is not None


def test_load_refuses_options_out_of_their_range(tmp_path):
    small().save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"^line_search_shrinking_factor must lie in \(0, 1\), got 1"):
        TRPO.load(tmp_path / "model", line_search_shrinking_factor=1)


def test_load_takes_options_attributes_and_arguments_of_stable_baselines3(tmp_path):
    small().save(tmp_path / "model")
    given = {"target_kl": 0.5, "critic_damping": 2.0, "num_timesteps": 7, "force_reset": False, "device": "cpu"}
    given["stats_window_size"] = 5
    model = TRPO.load(tmp_path / "model", **given, custom_objects={"learning_rate": "linear_0.25"})
    assert (model.target_kl, model.critic_damping, model.num_timesteps) == (0.5, 2.0, 7)
    assert [model.lr_schedule(p) for p in (1.0, 0.5)] == [0.25, 0.125]
    model.set_env(toy())
    assert model.learn(1).ep_info_buffer.maxlen == 5


def test_numbers_of_numpy_and_schedules_are_numbers():
    options = {"n_steps": np.int64(64), "gamma": np.float32(0.5), "target_kl": np.float64(0.02), "seed": np.int32(3)}
    model = small(learning_rate=lambda remaining: torch.tensor(1e-3) * remaining, **options)
    model.learn(128)
    assert model.logger.name_to_value["train/kl"] <= 0.02


def test_npg_arguments_out_of_range_are_named():
    with pytest.raises(ValueError, match="step_size"):
        small(NPG, step_size=0.0)
    with pytest.raises(ValueError, match="target_kl"):
        small(NPG, target_kl=0.0)


def test_one_step_cannot_be_normalised():
    with pytest.raises(ValueError, match="n_steps"):
        small(env=toy(n_envs=1), n_steps=1)


def test_unsupported_action_space():
    with pytest.raises((AssertionError, ValueError), match="action"):
        small(env=toy(action=spaces.Dict({"a": spaces.Text(2)})))


class Still(Noise):
    def __init__(self, action_space: spaces.Space | None = None, space: spaces.Space = BOX) -> None:
        super().__init__(action_space or spaces.Discrete(2), space)

    def _reward(self, action: Any) -> float:
        return 0.0


@pytest.mark.parametrize("cls", [TRPO, MDPO])
@pytest.mark.parametrize("low", [-np.inf, np.array([0, -np.inf], np.float32)], ids=["unbounded", "half"])
def test_actions_without_bounds_are_for_a_tuple(cls, low):
    space = spaces.Box(low, np.inf, (2,), np.float32)
    with pytest.raises(ValueError, match=rf"actions {re.escape(str(space))}, which are not bounded: .*Tuple"):
        agent(vec(Still, space), cls)
    agent(vec(Still, spaces.Tuple((space,))), cls).learn(1)


@pytest.mark.parametrize("space", [spaces.Text(5), spaces.Sequence(BOX), spaces.Graph(BOX, None)], ids=str)
def test_observations_that_are_no_arrays_are_named(space):
    for whole, named in ((space, ""), (spaces.Dict({"a": BOX, "b": space}), " for 'b'")):
        what = rf"have the observations {re.escape(str(space))}{named}, which are no arrays .*: give a Box"
        with pytest.raises(ValueError, match=f"^the environments {what}"):
            small(env=Still(space=whole))
        with pytest.raises(ValueError, match=f"^environments of Still {what}"):
            make_vec_env(lambda whole=whole: Still(space=whole), 2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"optimizer_class": torch.optim.LBFGS}, "policy_kwargs has optimizer_class=LBFGS, .* closure: take Adam"),
        ({"optimizer_kwargs": {"lr": 5}}, "policy_kwargs has an lr .* set by learning_rate: give it there"),
    ],
)
def test_optimizers_that_cannot_be_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        small(policy_kwargs=kwargs)


ODD = [spaces.Discrete(3, start=1), spaces.MultiDiscrete([3, 3], start=[1, 0]), spaces.MultiDiscrete([[2], [3]])]


@pytest.mark.parametrize(
    ("space", "reason"),
    [
        *((space, "from 0 along") for space in ODD),
        (spaces.Box(-1, 1, ()), r"without an axis.*shape \(1,\)"),
        (spaces.Box(-1, 1, (0,)), r"which hold no numbers: (give one number at least|leave this part out)"),
        (spaces.Box(-1, 1, (2, 0)), r"which hold no numbers: (give one number at least|leave this part out)"),
    ],
    ids=str,
)
def test_observations_that_policies_do_not_take_are_refused_before_a_rollout(space, reason):
    for whole, named in ((space, ""), (spaces.Dict({"a": BOX, "b": space}), " for 'b'")):
        policy = "MultiInputPolicy" if named else "MlpPolicy"
        with pytest.raises(ValueError, match=rf"have the observations {re.escape(str(space))}{named}, .*{reason}"):
            agent(vec(Still, space=whole), policy=policy)


def test_observations_of_several_parts_without_names_are_refused_with_the_remedy():
    both = spaces.Tuple((BOX, BOX))
    for env in (Still(space=both), vec(Still, space=both)):
        with pytest.raises(ValueError, match=r"take no Tuple: make it a Dict, for .*wrappers\.FlattenObservation$"):
            agent(env)
    for within in (both, spaces.Dict({"b": BOX})):
        space = spaces.Dict({"a": within})
        told = rf"have the observations {re.escape(str(within))} for 'a', .*within a Dict: .*FlattenObservation$"
        with pytest.raises(ValueError, match=f"^the environments {told}"):
            agent(Still(space=space), policy="MultiInputPolicy")
        with pytest.raises(ValueError, match=f"^environments of Still {told}"):
            make_vec_env(lambda space=space: Still(space=space))
    agent(gym.wrappers.FlattenObservation(Still(space=both))).learn(1)  # the remedy


@pytest.mark.parametrize(("bound", "fits"), [(1e38, True), (3e38, False)])
def test_squashed_actions_have_a_finite_width(bound, fits):
    env = vec(Still, spaces.Box(-bound, bound, (2,), np.float32))
    with (
        nullcontext()
        if fits
        else pytest.raises(ValueError, match=r"^squash_output scales .* the width of Box.*narrower")
    ):
        model = agent(env, use_sde=True, policy_kwargs={"squash_output": True})
        assert np.isfinite(model.predict(env.reset())[0]).all()


def test_checkpoint_of_another_algorithm_or_a_truncated_one(tmp_path):
    from stable_baselines3 import PPO

    model = small(NPG)
    model.save(tmp_path / "npg.zip")
    with pytest.raises(ValueError, match=r"saved by NPG.*TRPO"):
        TRPO.load(tmp_path / "npg.zip")
    PPO("MlpPolicy", toy(), n_steps=64, device="cpu").save(tmp_path / "ppo.zip")
    with pytest.raises(ValueError, match="another algorithm"):
        TRPO.load(tmp_path / "ppo.zip")
    content = (tmp_path / "npg.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated"):
        NPG.load(tmp_path / "cut.zip")


def test_subclasses_load_what_their_class_saved(tmp_path):
    class Own(TRPO):
        pass

    small().save(tmp_path / "trpo")
    assert type(Own.load(tmp_path / "trpo")) is Own
    small(Own).save(tmp_path / "own")
    assert type(TRPO.load(tmp_path / "own")) is TRPO
    with pytest.raises(ValueError, match=r"saved by TRPO.*NPG"):
        NPG.load(tmp_path / "own")


def test_what_cannot_be_unpickled_any_more_is_replaced(tmp_path, monkeypatch):
    module = types.ModuleType("gone")
    exec("class Rate:\n    def __call__(self, remaining):\n        return 1e-3\n", module.__dict__)
    monkeypatch.setitem(sys.modules, "gone", module)
    small(learning_rate=module.Rate()).save(tmp_path / "model")
    monkeypatch.delitem(sys.modules, "gone")
    constant = {"learning_rate": 2e-3, "lr_schedule": lambda remaining: 2e-3}
    model = TRPO.load(tmp_path / "model", custom_objects=constant)
    assert model.lr_schedule(1.0) == 2e-3


@pytest.mark.parametrize(
    ("saved", "other"),
    [
        ({}, {"activation_fn": nn.ReLU}),
        ({}, {"net_arch": [8]}),
        ({"net_arch": [8]}, {}),
        ({"net_arch": [8], "optimizer_kwargs": {"betas": (0.8, 0.9)}}, {"net_arch": [8]}),
        ({"activation_fn": nn.ReLU}, {"activation_fn": nn.Tanh}),
    ],
)
def test_a_model_is_not_loaded_into_another_network(saved, other, tmp_path):
    model = small(policy_kwargs=copy.deepcopy(saved))
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"^policy_kwargs=.* are not those that path=.* was saved with, .*: leave"):
        TRPO.load(tmp_path / "model", policy_kwargs=other)
    for kwargs in ({"policy_kwargs": saved}, {"custom_objects": {"policy_kwargs": saved}, "policy_kwargs": saved}):
        assert torch.equal(parameters_of(TRPO.load(tmp_path / "model", **kwargs)), parameters_of(model))


@pytest.mark.parametrize("algorithm", [TRPO, NPG, MDPO])
def test_frozen_layers_stay_and_the_others_move(algorithm):
    model = small(algorithm)
    model.learn(128)
    frozen = [*model.policy.mlp_extractor.policy_net[0].parameters(), *model.policy.value_net.parameters()]
    for p in frozen:
        p.requires_grad = False
    before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
    model.learn(128, reset_num_timesteps=False)
    for name, p in model.policy.named_parameters():
        assert torch.equal(p, before[name]) == any(p is f for f in frozen), name


def test_a_critic_that_is_frozen_stays():
    model = small()
    for p in (*model.policy.mlp_extractor.value_net.parameters(), *model.policy.value_net.parameters()):
        p.requires_grad = False
    before = model.policy.value_net.weight.clone()
    actor = model.policy.action_net.weight.clone()
    model.learn(128)
    assert torch.equal(model.policy.value_net.weight, before)
    assert not torch.equal(model.policy.action_net.weight, actor)


@pytest.mark.parametrize("algorithm", [TRPO, NPG, MDPO])
def test_modules_that_were_replaced_are_trained(algorithm):
    model, other = small(algorithm), small(algorithm, seed=1)
    model.learn(128)
    model.policy.action_net, model.policy.value_net = nn.Linear(64, 3), nn.Linear(64, 1)
    before = model.policy.action_net.weight.clone(), model.policy.value_net.weight.clone()
    model.learn(128, reset_num_timesteps=False)
    assert not torch.equal(model.policy.action_net.weight, before[0])
    assert not torch.equal(model.policy.value_net.weight, before[1])
    model.policy = other.policy
    before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
    model.learn(128, reset_num_timesteps=False)
    for name, p in model.policy.named_parameters():
        assert not torch.equal(p, before[name]), name


def test_mdpo_keeps_its_moments_where_its_parameters_stay():
    model = small(MDPO)
    model.learn(128)
    optimizer = model.actor_optimizer
    model.policy.value_net.bias.requires_grad = False
    model.learn(128, reset_num_timesteps=False)
    assert model.actor_optimizer is optimizer


def test_callbacks_may_differentiate():
    class Learned(BaseCallback):
        def _on_step(self) -> bool:
            weight = torch.ones(3, requires_grad=True)
            weight.square().sum().backward()
            self.slope = weight.grad
            return True

    callback = Learned()
    small(env=toy()).learn(128, callback=callback)
    assert torch.equal(callback.slope, torch.full((3,), 2.0))


def test_actions_are_those_of_a_forward_pass_of_ones_own():
    class Still(ActorCriticPolicy):
        def forward(self, obs, deterministic=False):
            actions, values, log_prob = super().forward(obs, deterministic)
            return torch.zeros_like(actions), values, log_prob

    assert not filled(small(policy=Still)).rollout_buffer.actions.any()


def test_truncated_episodes_without_a_last_observation_are_not_bootstrapped():
    class Forgetful(VecEnvWrapper):
        def reset(self):
            return self.venv.reset()

        def step_wait(self):
            observations, rewards, dones, infos = self.venv.step_wait()
            for info in infos:
                info.pop("terminal_observation", None)
            return observations, rewards, dones, infos

    with_last, without = (filled(small(env=env, n_steps=128)).rollout_buffer for env in (toy(), Forgetful(toy())))
    raw = np.square(without.actions.clip(-1, 1) - 0.5).mean(-1)
    np.testing.assert_allclose(without.rewards, -raw, atol=1e-6)
    assert not np.allclose(with_last.rewards, without.rewards)


def test_tensorboard_runs_have_the_name_of_the_algorithm(tmp_path):
    small(NPG, tensorboard_log=str(tmp_path)).learn(128)
    small(tensorboard_log=str(tmp_path)).learn(128, tb_log_name="mine")
    assert {path.name for path in tmp_path.iterdir()} == {"NPG_1", "mine_1"}


def test_adam_is_fused_unless_told_otherwise():
    assert small().policy.optimizer.param_groups[0]["fused"] is True
    optimizer_kwargs = {"optimizer_kwargs": {"fused": False}}
    assert small(policy_kwargs=optimizer_kwargs).policy.optimizer.param_groups[0]["fused"] is False


def test_vectors_are_acted_on_by_one_thread_which_is_given_back():
    class Watched(ActorCriticPolicy):
        def forward(self, obs, deterministic=False):
            acting.add(torch.get_num_threads())
            return super().forward(obs, deterministic)

    class WatchedCnn(ActorCriticCnnPolicy, Watched):
        pass

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            outside.add(torch.get_num_threads())
            return True

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for observations, policy, threads in (("vector", Watched, 1), ("image", WatchedCnn, 2)):
            acting: set[int] = set()
            outside: set[int] = set()
            small(env=toy(OBSERVATIONS[observations][1]), policy=policy).learn(64, callback=Watch())
            assert acting == {threads}
            assert outside == {2}
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("algorithm", [TRPO, NPG, MDPO])
def test_incomplete_parameters_are_refused_by_name(algorithm):
    model = algorithm("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu")
    cut = {name: dict(list(state.items())[:-1]) for name, state in model.get_parameters().items()}
    with pytest.raises(RuntimeError, match=r"Missing key.*value_net\.bias"):
        model.set_parameters(cut)


def test_mdpo_takes_an_optimizer_that_was_saved_of_the_actor_alone():
    """As versions before 0.2 saved it."""
    model = MDPO("MlpPolicy", "Pendulum-v1", n_steps=64, seed=0, device="cpu")
    model.learn(64)
    saved, owned = model.get_parameters(), list(model.networks.actor_parameters.values())
    former = torch.optim.Adam(owned)
    former.load_state_dict(
        {
            "state": {i: copy.deepcopy(model.actor_optimizer.state[p]) for i, p in enumerate(owned)},
            "param_groups": [{**saved["actor_optimizer"]["param_groups"][0], "params": list(range(len(owned)))}],
        }
    )
    fresh = MDPO("MlpPolicy", "Pendulum-v1", n_steps=64, seed=1, device="cpu")
    fresh.set_parameters({**saved, "actor_optimizer": former.state_dict()})
    for p, q in zip(owned, fresh.networks.actor_parameters.values(), strict=True):
        assert torch.equal(model.actor_optimizer.state[p]["exp_avg"], fresh.actor_optimizer.state[q]["exp_avg"])
    assert len(fresh.actor_optimizer.state) == len(owned)
    fresh.learn(64)
