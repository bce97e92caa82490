"""Policies of a user's own, and policies that change while they act: against Stable-Baselines3's way of collecting."""

from __future__ import annotations

import csv
from functools import partial
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common import distributions
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnvWrapper
from torch import nn

from agents import CPO, MDPO, NPG, TRPO, buffer
from agents.callbacks import EpisodeRecorder
from agents.update import batch_of
from envs.episodes import EpisodeFile
from npg import Fisher, acceleration, families
from npg.parallel import World

torch.set_num_threads(1)

BOX = spaces.Box(-1.0, 1.0, (3,), np.float32)
DISCRETE = spaces.Discrete(4)
ARRAYS = ("observations", "actions", "rewards", "episode_starts", "values", "log_probs", "returns", "advantages")


class Walk(gym.Env):
    """Observations in [0, 1)⁵; episodes that are cut off by their time limit, or end before."""

    observation_space = spaces.Box(0.0, 1000.0, (5,), np.float32)

    def __init__(self, action_space: spaces.Space) -> None:
        self.action_space = action_space

    def _observe(self) -> np.ndarray:
        return self.np_random.random(5, dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        self.steps += 1
        ended = bool(self.np_random.random() < 0.05)
        return self._observe(), -float(np.square(action).mean()), ended, not ended and self.steps >= 9, {"cost": 1.0}


def agent(policy=ActorCriticPolicy, action=BOX, cls=TRPO, **options):
    env = DummyVecEnv([lambda: Walk(action)] * 2)
    env.seed(0)
    return cls(
        policy, env, **{"n_steps": 32, "batch_size": 32, "n_critic_updates": 2, "seed": 0, "device": "cpu", **options}
    )


def collected(model, callback=None, collect=None):
    """The model with a rollout, by its own way or by another one, from the same seed each time."""
    _, callbacks = model._setup_learn(10**6, callback)
    model.set_random_seed(3)
    model._last_obs = model.env.reset()
    collect = collect or type(model).collect_rollouts
    assert collect(model, model.env, callbacks, model.rollout_buffer, model.n_steps)
    return model


def assert_as_stable_baselines3(make, callback=None, arrays=ARRAYS):
    """Both ways of collecting fill the buffer with the same; returns the model that collected by ours."""
    theirs = collected(make(), callback and callback(), OnPolicyAlgorithm.collect_rollouts)
    ours = collected(make(), callback and callback())
    for name in arrays:
        a, b = (getattr(model.rollout_buffer, name) for model in (theirs, ours))
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=2e-4, err_msg=name)
    return ours


def assert_consistent(model):
    """At the policy that acted all ratios are one, F is that of its own log-likelihoods, and a step is accepted."""
    batch = batch_of(model, next(model.rollout_buffer.get(None)))
    actor, policy = model.networks.actor, model.policy
    with torch.no_grad():
        ratio = (actor.family.log_likelihood(actor(batch.inputs), batch.actions) - batch.old_log_likelihood).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=2e-3)
    # F is the mean of ∇log p ∇log pᵀ over the policy's own samples, here along one direction
    own = dict(model.networks.actor_parameters)
    rows = slice(0, 4)
    observations = batch.inputs[rows]
    fisher = Fisher(actor, observations, actor.family, parameters=own).dense()
    torch.manual_seed(0)
    with torch.no_grad():
        many = observations.repeat(3000, 1)
        if model.use_sde:
            policy.reset_noise(len(many))
        actions = policy.get_distribution(many).sample()
    direction = torch.randn(len(fisher), generator=torch.Generator().manual_seed(1))
    if model.use_sde:  # its noise does not train the features
        direct = [torch.full((p.numel(),), float("mlp" not in name)) for name, p in own.items()]
        direction *= torch.cat(direct)
    start = nn.utils.parameters_to_vector(own.values()).detach()

    def likelihood(scale: float) -> torch.Tensor:
        nn.utils.vector_to_parameters(start + scale * direction, own.values())
        with torch.no_grad():
            return policy.get_distribution(many).log_prob(actions).double()

    score = (likelihood(1e-3) - likelihood(-1e-3)) / 2e-3
    nn.utils.vector_to_parameters(start, own.values())
    assert float(score.square().mean()) == pytest.approx(float(direction @ fisher @ direction), rel=0.15)
    before = {n: p.detach().clone() for n, p in own.items()}
    model.train()
    assert model.logger.name_to_value["train/accepted"] == 1.0
    assert any(not torch.equal(before[n], p) for n, p in own.items())


# ------------------------------------------------------------------------------------- distributions of one's own


class Clamped(distributions.DiagGaussianDistribution):
    def proba_distribution(self, mean_actions, log_std):
        return super().proba_distribution(mean_actions, log_std.clamp(max=-3) + 0.1 * log_std)


class Sharp(distributions.CategoricalDistribution):
    def proba_distribution(self, action_logits):
        return super().proba_distribution(3 * action_logits + torch.arange(4.0))


class BetaDistribution(distributions.Distribution):
    """Not one that Stable-Baselines3 has."""

    def proba_distribution_net(self, latent_dim):
        return nn.Linear(latent_dim, 6)

    def proba_distribution(self, raw):
        a, b = (1 + nn.functional.softplus(raw)).chunk(2, -1)
        self.distribution = torch.distributions.Beta(a, b)
        return self

    def log_prob(self, actions):
        return self.distribution.log_prob(actions).sum(-1)

    def entropy(self):
        return self.distribution.entropy().sum(-1)

    def sample(self):
        return self.distribution.sample()

    def mode(self):
        return self.distribution.mean

    def actions_from_params(self, raw, deterministic=False):
        return self.proba_distribution(raw).get_actions(deterministic)

    def log_prob_from_params(self, raw):
        actions = self.actions_from_params(raw)
        return actions, self.log_prob(actions)


class With(ActorCriticPolicy):
    made: type = distributions.SquashedDiagGaussianDistribution

    def _build(self, lr_schedule):
        size = self.action_space.n if isinstance(self.action_space, spaces.Discrete) else 3
        self.action_dist = self.made(size)
        super()._build(lr_schedule)


class WithClamped(With):
    made = Clamped


class WithSharp(With):
    made = Sharp


class WithBeta(ActorCriticPolicy):
    made = BetaDistribution

    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        del self.log_std
        self.action_dist = self.made()
        self.action_net = self.action_dist.proba_distribution_net(64)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_action_dist_from_latent(self, latent_pi):
        return self.action_dist.proba_distribution(self.action_net(latent_pi))


class StretchedBeta(BetaDistribution):
    """Over (−1, 1), which its ``distribution`` is not."""

    def log_prob(self, actions):
        return super().log_prob((actions + 1) / 2)

    def sample(self):
        return 2 * super().sample() - 1


class WithStretchedBeta(WithBeta):
    made = StretchedBeta


@pytest.mark.parametrize(
    ("policy", "action", "family"),
    [
        (With, BOX, "SquashedGaussian"),
        (WithClamped, BOX, "DiagonalGaussian"),
        (WithSharp, DISCRETE, "Categorical"),
        (WithBeta, spaces.Box(0.0, 1.0, (3,), np.float32), "_TorchFamily"),
    ],
)
def test_distributions_of_ones_own_act_and_are_measured_as_they_are(policy, action, family):
    model = assert_as_stable_baselines3(lambda: agent(policy, action))
    assert type(model.networks.actor.family).__name__ == family
    actions = model.rollout_buffer.actions
    if policy in (With, WithBeta):
        assert np.abs(actions).max() <= 1  # 3.6 when the squashing was passed over
    if policy is WithClamped:
        assert actions.std() < 0.1  # 1.03
        assert model.rollout_buffer.log_probs.mean() > 3
    if policy is not WithBeta:  # whose metric has no closed form
        assert_consistent(model)
    else:
        model.train()
        assert model.logger.name_to_value["train/accepted"] == 1.0
        assert 0 < model.logger.name_to_value["train/kl"] <= model.target_kl


def mask(policy):
    """Forbid action 2, in a method of the object itself."""
    own = policy.action_dist.proba_distribution

    def proba_distribution(action_logits):
        masked = action_logits.clone()
        masked[:, 2] = -1e8
        return own(masked)

    policy.action_dist.proba_distribution = proba_distribution


def mask_policy(policy):
    own = policy.get_distribution

    def get_distribution(obs):
        return type(policy.action_dist)(4).proba_distribution(own(obs).distribution.logits - 1e8 * torch.eye(4)[2])

    policy.get_distribution = get_distribution
    policy._get_action_dist_from_latent = lambda latent: type(policy.action_dist)(4).proba_distribution(
        policy.action_net(latent) - 1e8 * torch.eye(4)[2]
    )


@pytest.mark.parametrize("patch", [mask, mask_policy])
def test_methods_patched_on_the_object_are_called(patch):
    def make():
        model = agent(action=DISCRETE)
        patch(model.policy)
        return model

    model = assert_as_stable_baselines3(make)
    assert not (model.rollout_buffer.actions == 2).any()
    assert_consistent(model)


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("cls", [TRPO, MDPO])
def test_gsde_acts_as_in_stable_baselines3(squash, cls):
    options = {"use_sde": True, "sde_sample_freq": 4, "policy_kwargs": {"squash_output": squash, "log_std_init": -1.0}}
    model = assert_as_stable_baselines3(lambda: agent(cls=cls, **options))
    family = model.networks.actor.family
    assert type(family).__name__ == ("SquashedGaussian" if squash else "DiagonalGaussian")
    assert_consistent(model)


def test_the_transport_metric_of_squashed_actions_is_that_of_the_unsquashed():
    options = {"use_sde": True, "policy_kwargs": {"squash_output": True}}
    metric = collected(agent(metric="wasserstein", **options)).networks.geometry
    outputs = torch.tensor([[0.3, -0.2, 0.1, -1.0]], dtype=torch.float64)
    u = torch.ones_like(outputs)
    torch.testing.assert_close(metric(outputs)(u), torch.cat([u[:, :2], (2 * outputs[:, 2:]).exp()], -1))


def test_a_squashed_step_is_that_of_sb3_contrib():
    contrib = pytest.importorskip("sb3_contrib")
    options = {"n_steps": 256, "n_critic_updates": 0, "use_sde": True, "policy_kwargs": {"squash_output": True}}
    theirs = agent(cls=contrib.TRPO, **options)
    ours = collected(agent(kl_direction="new_old", kl_reduction="mean", **options))
    theirs.policy.load_state_dict(ours.policy.state_dict())
    _, _ = theirs._setup_learn(10**6, None)
    for name in ("observations", "actions", "log_probs", "advantages", "values", "returns"):
        getattr(theirs.rollout_buffer, name)[:] = getattr(ours.rollout_buffer, name)
    theirs.rollout_buffer.full = True
    start = torch.cat([p.detach().flatten() for p in ours.policy.parameters()])
    moved = []
    for model in (theirs, ours):
        np.random.seed(0)  # noqa: NPY002  # the buffer shuffles by it
        model.train()
        moved.append(torch.cat([p.detach().flatten() for p in model.policy.parameters()]) - start)
    assert moved[0].norm() > 0
    assert (moved[1] - moved[0]).norm() <= 1e-3 * moved[0].norm()


class Twisted(distributions.DiagGaussianDistribution):
    """Its log-likelihood is not that of its ``distribution``."""

    def log_prob(self, actions):
        return 2 * super().log_prob(actions)


class Shifted(distributions.DiagGaussianDistribution):
    """Its log-likelihood is that of its ``distribution``, in other units."""

    def log_prob(self, actions):
        return super().log_prob(actions) - 3.0


def test_log_likelihoods_of_another_distribution_are_refused_by_name():
    class WithTwisted(With):
        made = Twisted

    class WithShifted(With):
        made = Shifted

    class Other(ActorCriticPolicy):
        def evaluate_actions(self, obs, actions):
            values, log_prob, entropy = super().evaluate_actions(obs, actions)
            return values, 0.5 * log_prob, entropy

    with pytest.raises(NotImplementedError, match=r"WithTwisted .*evaluate_actions.*get_distribution.*Twisted"):
        collected(agent(WithTwisted))
    with pytest.raises(NotImplementedError, match=r"Other .*evaluate_actions"):
        collected(agent(Other))
    with pytest.raises(NotImplementedError, match=r"WithStretchedBeta .*evaluate_actions"):
        collected(agent(WithStretchedBeta))
    model = assert_as_stable_baselines3(lambda: agent(WithShifted))
    np.testing.assert_allclose(
        model.rollout_buffer.log_probs[0] + 3.0,
        families.DiagonalGaussian()
        .log_likelihood(
            model.networks.actor(torch.as_tensor(model.rollout_buffer.observations[0])),
            torch.as_tensor(model.rollout_buffer.actions[0]),
        )
        .detach(),
        atol=1e-4,
    )


class Unsquashed(distributions.DiagGaussianDistribution):
    """Its log-likelihood is that of the tanh of the action, which the environment takes."""

    def log_prob(self, actions):
        return super().log_prob(actions) - torch.log1p(1e-6 - actions.tanh().square()).sum(-1)


def moved_by_an_update(cls, distribution, change=None):
    class Own(With):
        made = distribution

    options = {"cost_limit": 0.0} if cls is CPO else {"step_size": 0.1} if cls is NPG else {}
    model = agent(Own, cls=cls, **options)
    before = nn.utils.parameters_to_vector(model.policy.parameters()).detach()
    model.learn(64, At(change) if change else None)
    return nn.utils.parameters_to_vector(model.policy.parameters()).detach() - before


@pytest.mark.parametrize("cls", [TRPO, NPG, MDPO, CPO])
@pytest.mark.parametrize("distribution", [Shifted, Unsquashed])
@pytest.mark.parametrize("changing", [False, True])
@pytest.mark.slow
def test_a_function_of_the_action_in_the_log_likelihood_changes_no_step(cls, distribution, changing):
    def change(model):  # after some of the rollout: the ratios are to the policy that acted
        model.policy.log_std.data += 0.5

    moved, plain = (
        moved_by_an_update(cls, d, change if changing else None)
        for d in (distribution, distributions.DiagGaussianDistribution)
    )
    assert plain.norm() > 0
    assert (moved - plain).norm() <= 1e-3 * plain.norm()


def test_distributions_without_a_kl_are_refused_by_name():
    class WithMixture(ActorCriticPolicy):
        def get_distribution(self, obs):
            d = super().get_distribution(obs)
            mixture = torch.distributions.Categorical(logits=torch.zeros(len(obs), 1))
            d.distribution = torch.distributions.MixtureSameFamily(
                mixture,
                torch.distributions.Independent(
                    torch.distributions.Normal(*(t.unsqueeze(1) for t in (d.distribution.loc, d.distribution.scale))), 1
                ),
            )
            return d

    with pytest.raises(NotImplementedError, match=r"DiagGaussianDistribution over MixtureSameFamily.*torch\.distrib"):
        collected(agent(WithMixture))


@pytest.mark.parametrize(
    ("made", "error", "match"),
    [
        (
            lambda mean, std: torch.distributions.MultivariateNormal(mean, torch.diag_embed(std.expand_as(mean))),
            NotImplementedError,
            r"over MultivariateNormal.*one event per component",
        ),
        (
            lambda mean, std: torch.distributions.StudentT(3.0, mean, std),
            NotImplementedError,
            "registered for StudentT",
        ),
        (torch.distributions.VonMises, NotImplementedError, "registered for VonMises"),
        (torch.distributions.Laplace, ValueError, "does not find the curvature"),
        (torch.distributions.Gumbel, None, ""),
    ],
)
def test_other_distributions_of_torch_are_taken_or_refused_by_name(made, error, match):
    class Other(distributions.DiagGaussianDistribution):
        def proba_distribution(self, mean_actions, log_std):
            self.distribution = made(mean_actions, log_std.exp())
            return self

        def log_prob(self, actions):
            log_prob = self.distribution.log_prob(actions)
            return log_prob if log_prob.ndim == 1 else log_prob.sum(-1)

        def entropy(self):
            return None

        def sample(self):
            return self.distribution.sample()

    class WithOther(With):
        made = Other

    if error is None:
        model = agent(WithOther).learn(64)
        assert 0 < model.logger.name_to_value["train/kl"] <= model.target_kl
    else:
        with pytest.raises(error, match=match):
            agent(WithOther).learn(64)


# ---------------------------------------------------------------------------------- what changes while they act


class At(BaseCallback):
    """Calls a function of the model after the tenth step."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def _on_step(self):
        if self.n_calls == 10:
            self.change(self.model)
        return True


def fill(model):
    model.policy.log_std.data.fill_(-4.0)


def other_storage(model):
    model.policy.log_std.data = torch.full((3,), -4.0)


def other_parameter(model):
    model.policy.log_std = nn.Parameter(torch.full((3,), -4.0))


def other_layer(model):
    torch.manual_seed(9)
    model.policy.action_net = nn.Linear(64, 3)


def slope(model):
    model.policy.mlp_extractor.policy_net[1].negative_slope = -2.0


def hook(model):
    model.policy.action_net.register_forward_hook(lambda module, inputs, output: output + 5.0)


def patched(model):
    model.policy.mlp_extractor.forward_actor = lambda features: torch.ones(len(features), 64)
    model.policy.mlp_extractor.forward = lambda features: (
        torch.ones(len(features), 64),
        model.policy.mlp_extractor.value_net(features),
    )


def other_distribution(model):
    model.policy.action_dist = Clamped(3)


def patched_distribution(model):
    own = model.policy.action_dist.proba_distribution
    model.policy.action_dist.proba_distribution = lambda mean, log_std: own(mean + 5.0, log_std)


def other_class(model):
    model.policy.action_net.__class__ = type(
        "Twice", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x) + 1}
    )


def other_policy(model):
    model.policy = agent(seed=7).policy


def nothing(model):
    model.policy.note = "an attribute more"
    model.policy.train()


CHANGES = [
    fill,
    other_storage,
    other_parameter,
    other_layer,
    slope,
    hook,
    patched,
    other_distribution,
    patched_distribution,
    other_class,
    other_policy,
    nothing,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_callback_changes_acts_from_the_next_step_on(change):
    """Actions and their log-likelihoods are those of Stable-Baselines3, before and after."""
    options = {"activation_fn": nn.LeakyReLU}
    arrays = ("observations", "actions", "rewards", "log_probs")
    model = assert_as_stable_baselines3(lambda: agent(policy_kwargs=options), lambda: At(change), arrays)
    if change in (fill, other_storage, other_parameter):
        assert model.rollout_buffer.actions[10:].std() < 0.2  # 1.016
        assert model.rollout_buffer.log_probs[10:].mean() > 5  # −1538.8
    assert np.isfinite(model.rollout_buffer.advantages).all()
    if change is not patched:  # features that are constant leave the actor little to learn
        model.train()
        assert torch.isfinite(torch.cat([p.flatten() for p in model.policy.parameters()])).all()


def test_a_policy_that_is_not_changed_acts_by_one_program_to_the_end(accelerated):
    model = agent()
    seen = []

    class Watch(BaseCallback):
        def _on_step(self):
            seen.append("values" in self.locals)
            self.model.predict(self.model._last_obs)  # as an evaluation does
            return True

    collected(model, Watch())
    assert not any(seen)
    assert len(acceleration._functions.kept(model.networks.actor)) == 1


class Counting(BaseFeaturesExtractor):
    """Moves its buffers in each forward pass."""

    def __init__(self, space):
        super().__init__(space, 5)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, observations):
        with torch.no_grad():
            self.count += 1
            self.mean.lerp_(observations.mean(0), 0.1)
        return observations - self.mean


class Phases(gym.Env):
    """The first five steps of an episode, and the last five."""

    observation_space = spaces.Box(0.0, 1.0, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def _observe(self):
        return np.array([self.steps / 10, self.steps >= 5], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        self.steps += 1
        return self._observe(), float(action == (self.steps > 5)), self.steps == 10, False, {"cost": float(action)}


class Experts(BaseFeaturesExtractor):
    """One for each phase, which only the observations of that phase pass through."""

    def __init__(self, space):
        super().__init__(space, 4)
        self.experts = nn.ModuleList(self.expert() for _ in range(2))

    def expert(self):
        return nn.Sequential(nn.Linear(2, 4), nn.Tanh())

    def forward(self, observations):
        features = observations.new_zeros(len(observations), 4)
        for phase in range(2):
            rows = (observations[:, 1] == phase).nonzero().flatten()
            if len(rows):
                features = features.index_copy(0, rows, self.experts[phase](observations[rows]))
        return features


class BothExperts(Experts):
    """The same, and all observations pass through both."""

    def forward(self, observations):
        return torch.where(observations[:, 1:] > 0, *(self.experts[phase](observations) for phase in (1, 0)))


class NormalisedExperts(Experts):
    def expert(self):
        return nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 4), nn.Tanh())


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (TRPO, {"train_shared_features": True}),
        (TRPO, {"policy": "MlpLstmPolicy"}),
        (TRPO, {"policy_kwargs": {"share_features_extractor": False}, "critic": "natural"}),
        (NPG, {"sub_sampling_factor": 4, "fisher_fraction": 0.3, "preconditioner": "kfac"}),
        (MDPO, {"sub_sampling_factor": 16}),
        (CPO, {"policy_kwargs": {"share_features_extractor": False}}),
    ],
)
@pytest.mark.filterwarnings("ignore:no traced program")
@pytest.mark.slow
def test_what_only_some_observations_reach_learns_as_if_all_did(cls, options):
    def learned(extractor):
        given = {"policy": "MlpPolicy", "batch_size": 4, **options}
        given["policy_kwargs"] = {"features_extractor_class": extractor, **given.get("policy_kwargs", {})}
        env = DummyVecEnv([Phases] * 4)
        model = cls(env=env, n_steps=20, n_critic_updates=2, seed=0, device="cpu", **given)
        before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
        model.learn(160)
        return {name: p.detach() - before[name] for name, p in model.policy.named_parameters()}

    some, every = learned(Experts), learned(BothExperts)
    for name, moved in every.items():
        assert moved.any(), name
        torch.testing.assert_close(some[name], moved, rtol=1e-3, atol=1e-4, msg=name)


def test_statistics_that_only_some_observations_reach_do_not_move():
    env = DummyVecEnv([Phases] * 4)
    model = TRPO(
        "MlpPolicy",
        env,
        n_steps=20,
        seed=0,
        policy_kwargs={"features_extractor_class": NormalisedExperts},
        device="cpu",
    )
    before = {name: b.clone() for name, b in model.policy.named_buffers()}
    assert before
    model.learn(160)
    assert not [name for name, b in model.policy.named_buffers() if not torch.equal(b, before[name])]


def test_buffers_move_as_in_stable_baselines3():
    def make():
        return agent(policy_kwargs={"features_extractor_class": Counting})

    theirs = collected(make(), collect=OnPolicyAlgorithm.collect_rollouts).policy.features_extractor
    ours = assert_as_stable_baselines3(make).policy.features_extractor
    assert theirs.count > 32
    assert ours.count == theirs.count
    torch.testing.assert_close(ours.mean, theirs.mean)


# ------------------------------------------------------------------------------------------- methods of one's own


class Own(ActorCriticPolicy):
    def forward(self, obs, deterministic=False):
        actions, values, log_prob = super().forward(obs, deterministic)
        return 0.5 * actions, torch.full_like(values, 7.0), log_prob - 3.0


class OwnValues(ActorCriticPolicy):
    def predict_values(self, obs):
        return super().predict_values(obs) + 5.0


class OwnFeatures(ActorCriticPolicy):
    def extract_features(self, obs, features_extractor=None):
        return super().extract_features(2 * obs, features_extractor)


class OwnDistribution(ActorCriticPolicy):
    def get_distribution(self, obs):
        return super().get_distribution(2 * obs)

    def forward(self, obs, deterministic=False):
        distribution = self.get_distribution(obs)
        actions = distribution.get_actions(deterministic)
        return actions, self.predict_values(obs), distribution.log_prob(actions)


@pytest.mark.parametrize("policy", [Own, OwnValues, OwnDistribution])
def test_methods_of_ones_own_are_what_is_stored(policy):
    model = assert_as_stable_baselines3(lambda: agent(policy))
    if policy is Own:
        assert (model.rollout_buffer.values == 7.0).all()
    else:
        assert_consistent(model)
    model.learn(64, reset_num_timesteps=False)


def test_a_policy_whose_forward_pass_is_another_than_its_distribution_is_refused():
    # Stable-Baselines3's `get_distribution` passes over the policy's `extract_features`, which `forward` calls
    with pytest.raises(NotImplementedError, match=r"OwnFeatures .*evaluate_actions"):
        collected(agent(OwnFeatures))


@pytest.mark.parametrize("parent", [RolloutBuffer, buffer.RolloutBuffer])
def test_a_buffer_of_ones_own_is_given_values_and_log_likelihoods(parent):
    class Own(parent):
        def add(self, obs, action, reward, episode_start, value, log_prob):
            seen.append((value.flatten().numpy(), log_prob.numpy()))
            super().add(obs, action, reward, episode_start, value, log_prob)

    seen: list = []
    model = collected(agent(rollout_buffer_class=Own))
    assert len(seen) == model.n_steps
    for i, name in enumerate(("values", "log_probs")):
        np.testing.assert_array_equal(np.stack([row[i] for row in seen]), getattr(model.rollout_buffer, name))


# ------------------------------------------------------------------------------- what is run, and what is frozen


class Picky(BaseFeaturesExtractor):
    """Takes the observations that there are, and not all that the space allows."""

    calls = 0

    def __init__(self, space):
        super().__init__(space, 5)
        self.table = nn.Embedding(2, 5)

    def forward(self, observations):
        type(self).calls += 1
        assert (observations < 1).all(), "an observation that the environment never gives"
        return self.table(observations[:, 0].long()) + observations


@pytest.mark.parametrize("cls", [TRPO, NPG, MDPO])
def test_only_real_observations_are_looked_at(cls, tmp_path):
    Picky.calls = 0
    model = agent(cls=cls, policy_kwargs={"features_extractor_class": Picky})
    assert Picky.calls == 0
    model.learn(64)
    table = model.policy.features_extractor.table.weight
    assert any(p is table for p in model.networks.actor_parameters.values())
    model.save(tmp_path / "model")
    calls = Picky.calls
    for env in (None, model.env):
        loaded = cls.load(tmp_path / "model", env=env, custom_objects={"policy_kwargs": model.policy_kwargs})
        assert Picky.calls == calls
        for a, b in zip(model.policy.parameters(), loaded.policy.parameters(), strict=True):
            assert torch.equal(a, b)
    loaded.learn(64, reset_num_timesteps=False)
    assert not torch.equal(loaded.policy.features_extractor.table.weight, table)


@pytest.mark.parametrize("critic", ["adam", "natural"])
@pytest.mark.parametrize("cls", [TRPO, NPG, MDPO])
def test_a_frozen_actor_leaves_the_critic_to_be_trained(cls, critic):
    model = agent(cls=cls, critic=critic)
    policy = model.policy
    actor = [policy.log_std, *policy.action_net.parameters(), *policy.mlp_extractor.policy_net.parameters()]
    for p in actor:
        p.requires_grad = False
    before = [p.detach().clone() for p in actor], policy.value_net.weight.detach().clone()
    model.learn(2 * 64)
    assert all(torch.equal(a, b) for a, b in zip(actor, before[0]))
    assert not torch.equal(policy.value_net.weight, before[1])
    logged = dict(model.logger.name_to_value)  # which has 0 for every other name too
    assert (logged["train/accepted"], logged["train/kl"], logged["train/step_norm"]) == (0.0, 0.0, 0.0)
    assert np.isfinite([v for k, v in logged.items() if k.startswith("train/")]).all()
    for p in actor:  # the warm-up is over
        p.requires_grad = True
    model.learn(64, reset_num_timesteps=False)
    assert model.logger.name_to_value["train/accepted"] == 1.0
    assert not torch.equal(policy.action_net.weight, before[0][1])


@pytest.mark.parametrize("cls", [TRPO, NPG, MDPO])
def test_a_frozen_critic_leaves_the_actor_to_be_trained(cls):
    model = agent(cls=cls)
    critic = [*model.policy.value_net.parameters(), *model.policy.mlp_extractor.value_net.parameters()]
    for p in critic:
        p.requires_grad = False
    before = [p.detach().clone() for p in critic], model.policy.action_net.weight.detach().clone()
    model.learn(64)
    assert all(torch.equal(a, b) for a, b in zip(critic, before[0]))
    assert not torch.equal(model.policy.action_net.weight, before[1])


def test_all_frozen_stays():
    model = agent()
    for p in model.policy.parameters():
        p.requires_grad = False
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(64)
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters()))


# ---------------------------------------------------------------------- what the environments give, and what is changed


class Noise(VecEnvWrapper):
    """Observations of the space's dtype at the beginning of an episode, and float64 in a step."""

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        observations, *rest = self.venv.step_wait()
        return observations + np.random.default_rng(0).normal(size=observations.shape), *rest


def test_observations_of_another_dtype_are_acted_on_by_the_same_network():
    env = Noise(DummyVecEnv([lambda: Walk(BOX)] * 2))
    env.seed(0)
    model = collected(TRPO("MlpPolicy", env, n_steps=32, batch_size=32, seed=0, device="cpu"))
    assert_consistent(model)


class Whole(VecEnvWrapper):
    """Rewards of 1, as whole numbers or as True, which SubprocVecEnv hands on as they are."""

    def __init__(self, venv, dtype):
        super().__init__(venv)
        self.dtype = dtype

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        observations, rewards, *rest = self.venv.step_wait()
        self.given = np.ones(len(rewards), self.dtype)
        return observations, self.given, *rest


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("use_sde", [False, True])
def test_the_bootstrap_of_whole_rewards_is_a_real_number(dtype, use_sde):
    env = Whole(DummyVecEnv([lambda: Walk(BOX)] * 2), dtype)
    env.seed(0)
    model = TRPO("MlpPolicy", env, n_steps=32, batch_size=32, gamma=0.9, seed=0, use_sde=use_sde, device="cpu")
    with torch.no_grad():
        model.policy.value_net.weight.zero_()
        model.policy.value_net.bias.fill_(7.4)
    rewards = collected(model).rollout_buffer.rewards
    cut = rewards != 1
    assert cut.any()
    np.testing.assert_allclose(rewards[cut], 1 + 0.9 * 7.4, rtol=1e-5)
    assert (env.given == 1).all()  # the environments' own array


class AtZero(Walk):
    """Its first observation shows nothing of a network whose biases are zero."""

    observation_space = spaces.Box(-1e3, 1e3, (5,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros(5, np.float32), super().reset(seed=seed)[1]

    def step(self, action):
        return super().step(action)[0] - 0.5, 0.0, False, self.steps >= 16, {}


@pytest.mark.parametrize("change", ["module", "slope", "hook"])
def test_a_change_between_rollouts_that_the_first_observation_hides_counts_at_once(change):
    policy_kwargs = {"activation_fn": nn.LeakyReLU, "ortho_init": False}
    model = TRPO("MlpPolicy", AtZero(BOX), n_steps=16, batch_size=16, seed=0, policy_kwargs=policy_kwargs, device="cpu")
    with torch.no_grad():
        for name, p in model.policy.named_parameters():
            if name.endswith("bias"):
                p.zero_()
    _, callback = model._setup_learn(10**6)
    layers = model.policy.mlp_extractor.policy_net
    for t in range(3):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
        buffer = model.rollout_buffer
        assert not buffer.observations[0].any()
        with torch.no_grad():
            observations, actions = (torch.as_tensor(x[:, 0]) for x in (buffer.observations, buffer.actions))
            _, log_probs, _ = model.policy.evaluate_actions(observations, actions)
        np.testing.assert_allclose(buffer.log_probs[:, 0], log_probs, rtol=1e-4, atol=1e-4)
        if t == 0:
            kept = len(acceleration._functions.kept(model.networks.actor))
        elif change == "module":
            layers[1] = nn.Tanh()
        elif change == "slope":
            layers[1].negative_slope = layers[3].negative_slope = 1.0
        else:
            layers[2].register_forward_hook(lambda module, inputs, outputs: 3 * outputs)
    if acceleration.mode.now != "off":
        assert kept == 1  # it was acted by a program


class OtherDistribution(ActorCriticPolicy):
    def get_distribution(self, obs):
        distribution = super().get_distribution(obs)
        return distribution.proba_distribution(distribution.distribution.mean / 2, self.log_std - 1)


def test_a_policy_that_acts_by_another_distribution_than_it_tells_is_refused():
    with pytest.raises(NotImplementedError, match=r"OtherDistribution .*evaluate_actions"):
        collected(agent(OtherDistribution))


@pytest.mark.parametrize("policy", [ActorCriticPolicy, OwnValues])
def test_one_deviation_may_be_that_of_all_components(policy):
    model = agent(policy)
    model.policy.log_std = nn.Parameter(torch.full((1,), -0.5))
    model.policy.optimizer.add_param_group({"params": [model.policy.log_std]})
    assert_consistent(collected(model))
    model.learn(64, reset_num_timesteps=False)
    assert model.policy.log_std.shape == (1,)
    assert model.policy.log_std != -0.5


def test_a_policy_that_torch_compile_hides_is_refused_with_the_remedy():
    model = agent()
    model.policy = torch.compile(model.policy, backend="eager")
    with pytest.raises(TypeError, match=r"write policy\.compile\(\)"):
        model.learn(64)


class Continuing(gym.Wrapper):
    """Begins anew by itself, and hides the end; the Monitor inside tells of it."""

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            observation, _ = self.env.reset()
        return observation, reward, False, False, info


def test_episodes_of_a_continuing_task_are_counted(tmp_path):
    env = DummyVecEnv([lambda: Continuing(Monitor(Walk(BOX)))] * 2)
    file = EpisodeFile(tmp_path / "monitor.csv", "Walk-v0", ["timesteps"])
    model = TRPO("MlpPolicy", env, n_steps=64, batch_size=64, seed=0, device="cpu")
    model.learn(64, EpisodeRecorder(file, World(torch.device("cpu"))))
    assert len(model.ep_info_buffer) >= 10
    assert len((tmp_path / "monitor.csv").read_text().splitlines()) >= 10


class OneInfo(gym.Wrapper):
    """Gives the same dictionary in every step, in which the Monitor leaves the last episode."""

    info: ClassVar[dict[str, Any]] = {}

    def step(self, action):
        *told, info = self.env.step(action)
        self.info.update(info)
        return *told, self.info


@pytest.mark.parametrize("kind", [DummyVecEnv, partial(SubprocVecEnv, start_method="fork")])
def test_an_episode_is_told_once_by_an_environment_that_gives_one_dictionary(tmp_path, kind):
    def build():
        env = OneInfo(Walk(BOX))
        env.info = {}
        return Monitor(env)

    env = kind([build] * 2)
    model = TRPO("MlpPolicy", env, n_steps=32, batch_size=64, seed=0, device="cpu")
    ends = []

    class Ends(BaseCallback):
        def _on_step(self):
            ends.extend(info["episode"] for info, done in zip(self.locals["infos"], self.locals["dones"]) if done)
            return True

    file = EpisodeFile(tmp_path / "monitor.csv", "Walk-v0", ["timesteps"])
    model.learn(128, [Ends(), EpisodeRecorder(file, World(torch.device("cpu")))])
    env.close()
    assert len(ends) > 10
    assert list(model.ep_info_buffer) == ends
    rows = list(csv.DictReader((tmp_path / "monitor.csv").read_text().splitlines()[1:]))
    assert [int(row["l"]) for row in rows] == [episode["l"] for episode in ends]
