"""Policies for Tuple and Dict actions: exact Fisher and KL of the whole action, and the plain policy for one part."""

from __future__ import annotations

import os
from collections import OrderedDict
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import SubprocVecEnv

from agents import MDPO, NPG, TRPO, hybrid, masks
from agents.distributions import FlatProduct, HybridDistribution, described
from agents.evaluation import evaluate
from agents.export import ExportError, export_agent
from agents.heads import ActorHead
from agents.recurrent import MlpLstmPolicy
from agents.update import batch_of
from envs import HybridActions, VecNormalize, make_vec_env
from envs.hybrid import FlatActions, leaves
from envs.masks import mask_sizes
from npg import Fisher, acceleration, families
from tests.agents.models import ALGORITHMS, BOX, OPTIONS, Noise, agent, parameters, vec

pytestmark = pytest.mark.usefixtures("untraced")
torch.set_num_threads(1)

#: Policies that KL is measured for, of each structure; NPG_POLICIES=1000 takes so many.
COUNT = int(os.environ.get("NPG_POLICIES", "20"))

REALS = spaces.Box(-2.0, 2.0, (2,), np.float32)
ALONE: dict[str, Any] = {
    "Discrete": spaces.Discrete(5),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3, 4]),
    "MultiBinary": spaces.MultiBinary(4),
    "Box": REALS,
}
NESTED: Any = spaces.Dict(
    {
        "reals": REALS,
        "both": spaces.Tuple((spaces.MultiBinary(3), spaces.Discrete(4), spaces.Box(0.0, 1.0, (), np.float64))),
        "many": spaces.MultiDiscrete([2, 3], start=[1, -1]),
    }
)
SPACES: dict[str, Any] = {
    "nested": NESTED,
    "platform": spaces.Tuple((spaces.Discrete(3), spaces.Box(-1.0, 1.0, (3,), np.float32))),
    "discrete": spaces.Tuple((spaces.MultiBinary(2), spaces.Discrete(3, start=5))),
    "reals": spaces.Dict({"a": REALS, "b": spaces.Box(-np.inf, np.inf, (1,), np.float32)}),
}


def total(space: spaces.Space, action: Any) -> float:
    """Of all numbers in an action, clipped as Stable-Baselines3 clips a Box."""
    if isinstance(space, spaces.Tuple | spaces.Dict):
        keys = range(len(space.spaces)) if isinstance(space, spaces.Tuple) else space.spaces
        return sum(total(space[key], action[key]) for key in keys)
    return float(np.sum(np.clip(action, -2, 2) if isinstance(space, spaces.Box) else action))


class Strict(Noise):
    """Refuses what is not of its space; the larger the numbers in an action, the better."""

    def __init__(self, action_space: spaces.Space = NESTED, space: spaces.Space = BOX) -> None:
        super().__init__(action_space, space)

    def _reward(self, action: Any) -> float:
        assert self.action_space.contains(action), action
        return total(self.action_space, action)


class Picky(Strict):
    """Draws what is allowed of the discrete parts anew in every step, and refuses everything else."""

    likely = 0.5

    def _draw(self) -> None:
        self.allowed = []
        for n in mask_sizes(self.action_space):
            allowed = self.generator.random(n) < self.likely
            allowed[self.generator.integers(n)] = True
            self.allowed.append(allowed)

    def reset(self, **options: Any) -> Any:
        result = super().reset(**options)
        self.generator = np.random.default_rng(0)  # of its own, so that all else is as without masks
        self._draw()
        return result

    def step(self, action: Any) -> Any:
        taken = [
            int(value)
            for (_, part), given in zip(leaves(self.action_space), parts_of(self.action_space, action), strict=True)
            if not isinstance(part, spaces.Box)
            for value in np.ravel(given - part.start if hasattr(part, "start") else given)
        ]
        for allowed, index in zip(self.allowed, taken, strict=True):
            assert allowed[index], f"{action} is forbidden by {self.allowed}"
        result = super().step(action)
        self._draw()
        return result

    def action_masks(self) -> Any:
        return np.concatenate(self.allowed)


def parts_of(space: Any, action: Any) -> list[Any]:
    if isinstance(space, spaces.Tuple):
        return [p for part, a in zip(space.spaces, action, strict=True) for p in parts_of(part, a)]
    if isinstance(space, spaces.Dict):
        return [p for key, part in space.spaces.items() for p in parts_of(part, action[key])]
    return [action]


def far(space: Any, seed: int = 0, cls: Any = hybrid.HybridActorCriticPolicy) -> Any:
    """A policy far from its beginning in float64."""
    torch.manual_seed(seed)
    policy = cls(BOX, FlatActions(space), lambda _: 1e-3, net_arch=[4]).double()
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.5 * torch.randn_like(p)
    return policy


def terms(space: Any, outputs: torch.Tensor) -> list[Any]:
    """The twin: of one row, a torch distribution for each choice, for the bits, and for the reals."""
    flat = FlatActions(space)
    classes, bits, means, log_std = outputs.split([sum(flat.sizes), flat.bits, flat.reals, flat.reals])
    each = [torch.distributions.Categorical(logits=logits) for logits in classes.split(flat.sizes)]
    return [*each, torch.distributions.Bernoulli(logits=bits), torch.distributions.Normal(means, log_std.exp())]


def apart(space: Any, action: torch.Tensor) -> list[torch.Tensor]:
    flat = FlatActions(space)
    choices, bits, reals = action.split([len(flat.sizes), flat.bits, flat.reals])
    return [*choices, bits, reals]


# -------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("mode", ["auto", "off"])
@pytest.mark.parametrize("name", SPACES)
def test_fisher_products_are_those_of_the_dense_twin(name, mode):
    """F = mean E[s sᵀ], with the expectation over choices and bits by adding up, over reals by its closed form."""
    space, policy = SPACES[name], far(SPACES[name])
    head, x = ActorHead(policy), torch.randn(6, 3).double()
    assert head.standard
    actors = ("log_std", "mlp_extractor.policy_net", "action_net")
    own = {f"policy.{n}": p for n, p in policy.named_parameters() if n.startswith(actors)}
    n = sum(p.numel() for p in own.values())

    def rows(value: torch.Tensor) -> torch.Tensor:
        gradients = torch.autograd.grad(value, list(own.values()), retain_graph=True, allow_unused=True)
        pairs = zip(own.values(), gradients)
        return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in pairs])

    dense = torch.zeros(n, n, dtype=torch.float64)
    for i in range(len(x)):
        *choices, bits, reals = terms(space, head(x[i : i + 1])[0])
        for choice in choices:
            for log_p in choice.logits:
                score = rows(log_p)
                dense += log_p.exp().detach() * torch.outer(score, score) / len(x)
        for p in bits.probs:
            score = rows(p)
            dense += torch.outer(score, score) / (p * (1 - p)).detach() / len(x)
        for mean, std in zip(reals.loc, reals.scale):
            dense += torch.outer(rows(mean), rows(mean)) / std.detach() ** 2 / len(x)
            dense += 2 * torch.outer(rows(std), rows(std)) / std.detach() ** 2 / len(x)
    with acceleration.mode(mode):
        fisher = Fisher(head, x, head.family, parameters=own)
        v = torch.randn(n, 3, dtype=torch.float64)
        products = torch.stack([fisher @ column for column in v.T], 1)
    assert dense.norm() > 0.1
    assert (products - dense @ v).norm() <= 1e-10 * (dense @ v).norm()


@pytest.mark.parametrize("name", SPACES)
def test_log_likelihood_entropy_and_kl_are_those_of_torch(name):
    space, policy = SPACES[name], far(SPACES[name])
    head, x = ActorHead(policy), torch.randn(40, 3).double()
    with torch.no_grad():
        old = head(x)
        for p in policy.parameters():
            p += 0.3 * torch.randn_like(p)
        new = head(x)
        drawn = head.family.sample(old)
        likelihood, entropy, kl = (
            head.family.log_likelihood(old, drawn),
            head.family.entropy(old),
            head.family.kl(old, new),
        )
    for i in range(len(x)):
        p, q = terms(space, old[i]), terms(space, new[i])
        expected = sum(float(d.log_prob(a).sum()) for d, a in zip(p, apart(space, drawn[i]), strict=True))
        assert likelihood[i] == pytest.approx(expected, rel=1e-10, abs=1e-12)
        assert entropy[i] == pytest.approx(sum(float(d.entropy().sum()) for d in p), rel=1e-10, abs=1e-12)
        divergence = sum(float(torch.distributions.kl_divergence(a, b).sum()) for a, b in zip(p, q))
        assert kl[i] == pytest.approx(divergence, rel=1e-10, abs=1e-12)


def test_the_parts_are_drawn_independently_with_their_probabilities():
    family = FlatProduct([3, 2], 2, 2)
    outputs = torch.tensor([0.5, -1.0, 0.2, 1.0, 0.0, 0.7, -0.3, 1.5, -2.0, -0.5, 0.4]).double()
    generator = torch.Generator().manual_seed(0)
    drawn = family.sample(outputs.expand(100_000, -1), generator)
    assert drawn.shape == (100_000, 6)
    first, second = outputs[:3].softmax(-1), outputs[3:5].softmax(-1)
    for a in range(3):
        for b in range(2):
            both = ((drawn[:, 0] == a) & (drawn[:, 1] == b)).double().mean()
            assert float(both) == pytest.approx(float(first[a] * second[b]), abs=0.006)
    assert drawn[:, 2:4].mean(0).tolist() == pytest.approx(outputs[5:7].sigmoid().tolist(), abs=0.006)
    assert drawn[:, 4:].mean(0).tolist() == pytest.approx([1.5, -2.0], abs=0.02)
    assert drawn[:, 4:].std(0).tolist() == pytest.approx(outputs[9:].exp().tolist(), rel=0.01)
    assert torch.corrcoef(drawn.T).fill_diagonal_(0).abs().max() < 0.015
    np.testing.assert_array_equal(family.mode(outputs), [0, 0, 1, 0, 1.5, -2.0])


@pytest.mark.parametrize("name", SPACES)
def test_the_kl_stays_within_the_radius_on_many_random_policies(name):
    model = agent(vec(Strict, SPACES[name]), target_kl=0.02, n_steps=16, policy_kwargs={"net_arch": [8]})
    model.learn(32)
    generator, accepted = torch.Generator().manual_seed(1), 0
    for scale in np.linspace(0.1, 3.0, COUNT):
        with torch.no_grad():
            for p in model.policy.parameters():
                p.copy_(float(scale) * torch.randn(p.shape, generator=generator))
        model.collect()
        batch = batch_of(model, next(model.rollout_buffer.get(None)))
        with torch.no_grad():
            before = model.networks.actor(batch.inputs).double()
            report = model.actor_step(batch)
            after = model.networks.actor(batch.inputs).double()
        kl = 0.0
        for b, a in zip(before, after):
            pairs = zip(terms(SPACES[name], b), terms(SPACES[name], a))
            kl += sum(float(torch.distributions.kl_divergence(p, q).sum()) for p, q in pairs) / len(before)
        assert kl <= 0.02 * (1 + 1e-4) + 1e-7
        assert kl == pytest.approx(report.kl if report.accepted else 0.0, rel=1e-3, abs=1e-6)
        accepted += report.accepted
    assert accepted >= 0.75 * COUNT


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", ALONE)
def test_a_tuple_of_one_is_trained_as_its_only_part_to_the_last_bit(name, algorithm):
    space = ALONE[name]
    nested, plain = (agent(vec(Strict, s), algorithm).learn(128) for s in (spaces.Tuple((space,)), space))
    assert type(nested.policy) is hybrid.HybridActorCriticPolicy
    assert type(plain.policy) is ActorCriticPolicy
    before = parameters(agent(vec(Strict, space), algorithm))
    assert [n for n, _ in nested.policy.named_parameters()] == [n for n, _ in plain.policy.named_parameters()]
    for a, b in zip(parameters(nested), parameters(plain), strict=True):
        assert torch.equal(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(before, parameters(plain)))
    for deterministic in (True, False):
        torch.manual_seed(0)
        ours, _ = nested.predict(np.zeros((4, 3), np.float32), deterministic=deterministic)
        torch.manual_seed(0)
        theirs, _ = plain.predict(np.zeros((4, 3), np.float32), deterministic=deterministic)
        np.testing.assert_array_equal([action[0] for action in ours], theirs)
    assert nested.logger.name_to_value["train/entropy_loss"] == plain.logger.name_to_value["train/entropy_loss"]
    assert ("train/std" in nested.logger.name_to_value) == (name == "Box")


def test_first_steps_of_one_part_are_the_plain_ones_where_they_are_traced():
    for space in ALONE.values():
        with acceleration.mode("auto"):
            nested, plain = (agent(vec(Strict, s)).learn(64) for s in (spaces.Tuple((space,)), space))
        for a, b in zip(parameters(nested), parameters(plain), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SPACES)
def test_a_traced_actor_acts_as_the_modules_do(name):
    with acceleration.mode("auto"):
        model = agent(vec(Strict, SPACES[name]))
        seen: Any = model.policy.obs_to_tensor(model.get_env().reset())[0]
        actor = model.networks.actor
        run = actor.acting(seen)
        assert run is not None
        assert isinstance(run, partial)  # a program
        with torch.no_grad():
            torch.manual_seed(3)
            actions, outputs = run(seen)
            torch.testing.assert_close(outputs, actor(actor.prepare(seen)))
            torch.manual_seed(3)
            torch.testing.assert_close(actions, model.policy.get_distribution(seen).sample())
        assert actor.unchanged()


# ---------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", SPACES)
def test_a_training_takes_actions_of_the_space(name, algorithm):
    model = agent(vec(Strict, SPACES[name]), algorithm, n_steps=64)
    before = [p.clone() for p in parameters(model)]
    model.learn(256)  # the environment refuses other ones
    assert not all(torch.equal(a, b) for a, b in zip(before, parameters(model)))
    assert np.isfinite(model.logger.name_to_value["train/entropy_loss"])
    evaluation = evaluate(model, vec(Strict, SPACES[name]), 4, seed=1)
    assert all(length <= 25 for length in evaluation.lengths)


def test_it_learns_all_parts_at_once():
    with acceleration.mode("auto"):
        model = agent(vec(Strict, n=8), n_steps=64, target_kl=0.05, gamma=0.0, batch_size=128).learn(20 * 512)
    for action in model.predict(BOX.high * np.linspace(-1, 1, 9)[:, None], deterministic=True)[0]:
        assert action["both"][0].tolist() == [1, 1, 1]
        assert action["both"][1] == 3
        assert action["many"].tolist() == [2, 1]
        assert action["reals"].min() > 0.5
        assert action["both"][2] > 0.5


@pytest.mark.parametrize(
    "options",
    [*OPTIONS, {"kl_reduction": "mean"}, {"policy_kwargs": {"log_std_init": -1.0}}],
    ids=lambda options: str(*options.values()),
)
def test_the_options_of_the_plain_policy_work(options):
    model = agent(vec(Strict), **options)
    model.learn(128)
    assert model.logger.name_to_value["train/accepted"] in (0, 1)
    assert all(bool(torch.isfinite(p).all()) for p in parameters(model))


def test_the_mean_of_components_is_for_one_box_alone():
    """It is what sb3-contrib bounds, which has no such actions."""
    mean, whole = (agent(vec(Strict), kl_reduction=reduction).learn(64) for reduction in ("mean", "sum"))
    for a, b in zip(parameters(mean), parameters(whole), strict=True):
        assert torch.equal(a, b)


def test_images_and_several_parts_of_observations():
    image = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    parts = spaces.Dict({"a": BOX, "b": spaces.Discrete(3)})
    for space, policy, kind in (
        (image, "CnnPolicy", hybrid.HybridActorCriticCnnPolicy),
        (parts, "MultiInputPolicy", hybrid.HybridMultiInputActorCriticPolicy),
    ):
        model = agent(vec(Strict, NESTED, space), policy=policy, n_steps=8, cg_max_steps=3).learn(16)
        assert type(model.policy) is kind


@pytest.mark.parametrize("algorithm", [NPG, TRPO, MDPO])
@pytest.mark.parametrize("name", ["nested", "discrete"])
def test_policies_with_a_memory_take_them_too(name, algorithm, tmp_path):
    model = agent(
        vec(Strict, SPACES[name]), algorithm, "MlpLstmPolicy", n_steps=16, policy_kwargs={"lstm_hidden_size": 8}
    )
    before = [p.clone() for p in parameters(model)]
    model.learn(64)
    assert type(model.policy) is MlpLstmPolicy
    assert not all(torch.equal(a, b) for a, b in zip(before, parameters(model)))
    seen: Any = model.get_env().reset()
    actions, state = model.predict(seen, deterministic=True)
    assert all(SPACES[name].contains(action) for action in actions)
    assert SPACES[name].contains(model.predict(seen[0], tuple(part[:, :1] for part in state))[0])
    model.save(tmp_path / "agent")
    again, _ = algorithm.load(tmp_path / "agent", env=vec(Strict, SPACES[name])).predict(seen, deterministic=True)
    assert [FlatActions(SPACES[name]).flatten(a).tolist() for a in again] == [
        FlatActions(SPACES[name]).flatten(a).tolist() for a in actions
    ]


def test_a_tuple_of_one_with_a_memory_is_trained_as_its_only_part():
    for space in (ALONE["Discrete"], ALONE["Box"]):
        options = {"policy": "MlpLstmPolicy", "n_steps": 16, "policy_kwargs": {"lstm_hidden_size": 8}}
        nested, plain = (agent(vec(Strict, s), **options).learn(64) for s in (spaces.Tuple((space,)), space))
        for a, b in zip(parameters(nested), parameters(plain), strict=True):
            assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", ["nested", "platform", "discrete"])
def test_masks_of_the_discrete_parts(name, algorithm):
    model = agent(vec(Picky, SPACES[name]), algorithm, n_steps=64).learn(256)  # it refuses what is forbidden
    assert type(model.policy) is masks.MaskableActorCriticPolicy
    env: Any = model.get_env()
    observations = env.reset()
    for _ in range(30):
        actions, _ = model.predict(observations, deterministic=bool(_ % 2))
        observations, *_rest = env.step(actions)
    for name_, parameter in model.policy.named_parameters():
        assert bool(torch.isfinite(parameter).all()), name_


@pytest.mark.parametrize("algorithm", [TRPO, MDPO])
@pytest.mark.parametrize("name", ["nested", "platform", "discrete"])
def test_where_all_is_allowed_a_training_is_that_without_masks(name, algorithm):
    class Open(Picky):
        likely = 2.0

    masked, plain = (agent(vec(cls, SPACES[name]), algorithm).learn(128) for cls in (Open, Strict))
    for p, q in zip(parameters(masked), parameters(plain), strict=True):
        assert torch.equal(p, q)
    before = parameters(agent(vec(Strict, SPACES[name]), algorithm))
    assert not all(torch.equal(p, q) for p, q in zip(before, parameters(plain)))


def test_what_is_forbidden_has_probability_zero_wherever_its_part_stands():
    """The mask has the bits first, in the order of the space, and the logits have them after the classes."""
    policy = agent(vec(Picky, SPACES["discrete"]), n_steps=8, batch_size=8).policy
    mask = torch.tensor([[0.0, 1, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 0, 1]])
    observation = {"observation": torch.zeros(2, 3), "action_mask": mask}
    with torch.no_grad():
        distribution = policy.get_distribution(observation)
        drawn = torch.stack([distribution.sample() for _ in range(300)])
    assert (drawn[:, 0] == torch.tensor([1.0, 1.0, 0.0])).all()  # class 1, bits (1, 0)
    assert distribution.entropy()[0] == 0
    assert set(drawn[:, 1, 0].tolist()) == {0.0, 2.0}
    assert {tuple(bits) for bits in drawn[:, 1, 1:].tolist()} == {(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)}


# --------------------------------------------------------------------------------------------- the life cycle of agents


@pytest.mark.parametrize("name", SPACES)
def test_predict_gives_actions_of_the_space(name):
    model = agent(vec(Strict, SPACES[name]))
    for deterministic in (True, False):
        actions, state = model.predict(np.zeros((5, 3), np.float32), deterministic=deterministic)
        assert isinstance(actions, list)
        assert len(actions) == 5
        assert state is None
        assert all(SPACES[name].contains(action) for action in actions)
        action, _ = model.predict(np.zeros(3, np.float32), deterministic=deterministic)
        assert SPACES[name].contains(action)
    bare = Strict(SPACES[name])
    bare.reset(seed=0)
    bare.step(action)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_saved_agent_is_the_same_and_goes_on(algorithm, tmp_path):
    model = agent(VecNormalize(vec(Strict)), algorithm).learn(128)
    model.save(tmp_path / "agent")
    seen: Any = model.get_env().reset()
    alone = algorithm.load(tmp_path / "agent", device="cpu")
    flat = FlatActions(NESTED)
    taken, again = (m.predict(seen, deterministic=True)[0] for m in (alone, model))
    np.testing.assert_array_equal([flat.flatten(a) for a in taken], [flat.flatten(a) for a in again])
    assert alone.action_space == flat
    alone.set_env(VecNormalize(vec(Strict)))
    alone.learn(64)
    further = algorithm.load(tmp_path / "agent", env=VecNormalize(vec(Strict)), device="cpu")
    further.learn(64, reset_num_timesteps=False)
    assert further.num_timesteps == 192
    with pytest.raises(ValueError, match="Action spaces do not match"):
        algorithm.load(tmp_path / "agent", env=vec(Strict, SPACES["platform"]))
    with pytest.raises(ValueError, match="Action spaces do not match"):
        model.set_env(vec(Strict, spaces.Dict(OrderedDict(reversed(NESTED.spaces.items())))))


def test_the_evaluations_and_callbacks_of_stable_baselines3_serve():
    model = agent(vec(Strict))
    callback = EvalCallback(HybridActions(vec(Strict, n=1)), n_eval_episodes=1, eval_freq=32, verbose=0, warn=False)
    model.learn(64, callback)
    assert np.isfinite(callback.last_mean_reward)
    for env in (model.get_env(), vec(Strict), Strict()):
        mean, _ = evaluate_policy(model, env, n_eval_episodes=2, warn=False)
        assert np.isfinite(mean)
    platform = agent(make_vec_env("npg/Platform-v0", 2, seed=0))
    mean, _ = evaluate_policy(platform, make_vec_env("npg/Platform-v0", 2, seed=1), n_eval_episodes=2)
    assert mean >= 0


def test_environments_in_processes_of_their_own():
    env = SubprocVecEnv([Strict, Strict], start_method="fork")
    try:
        model = agent(env, n_steps=8, batch_size=8)
        before = [p.detach().clone() for p in model.policy.parameters()]
        model.learn(16)
        assert not all(map(torch.equal, before, model.policy.parameters()))
    finally:
        env.close()


def test_one_environment_and_its_id_are_enough():
    assert type(agent(Strict()).learn(32).policy) is hybrid.HybridActorCriticPolicy
    assert agent("npg/Platform-v0").learn(32).num_timesteps == 32
    wrapped = HybridActions(vec(Strict))
    assert agent(wrapped).get_env() is wrapped


# ---------------------------------------------------------------------------------------------------- what is one's own


class Doubled(hybrid.HybridActorCriticPolicy):
    """A policy whose forward pass is its own."""

    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        return super().forward(obs, deterministic)


def test_a_policy_of_ones_own_is_asked():
    model, plain = agent(vec(Strict), policy=Doubled).learn(128), agent(vec(Strict)).learn(128)
    assert not model.networks.actor.standard
    assert type(model.networks.actor.family) is FlatProduct
    for a, b in zip(parameters(model), parameters(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_stable_baselines3_s_distributions_say():
    policy, x = far(NESTED).float(), torch.zeros(5, 3)
    with torch.no_grad():
        distribution = policy.get_distribution(x)
        assert type(distribution) is HybridDistribution
        family, outputs = described(distribution)
        actions, likelihood = distribution.log_prob_from_params(outputs[:, :-3], policy.log_std)
        torch.testing.assert_close(likelihood, family.log_likelihood(outputs, actions))
        torch.testing.assert_close(distribution.entropy(), family.entropy(outputs))
        mode = distribution.actions_from_params(outputs[:, :-3], policy.log_std, deterministic=True)
        assert torch.equal(mode, family.mode(outputs))
        values, log_prob, entropy = policy.evaluate_actions(x, actions)
    torch.testing.assert_close(log_prob, likelihood)
    assert values.shape == (5, 1)
    assert entropy.shape == (5,)


def test_only_exact_parts_are_taken_for_what_is_known():
    class Other(HybridDistribution):
        def log_prob(self, actions):
            return 2 * super().log_prob(actions)

    model = agent(vec(Strict))
    seen: Any = model.policy.obs_to_tensor(model.get_env().reset())[0]
    assert model.networks.actor.acting(seen) is not None
    model.policy.action_dist = Other(model.action_space)
    model.networks.follow()
    assert model.networks.actor.acting(seen) is None
    with pytest.raises(NotImplementedError, match="are not those of the distribution"):
        model.learn(64)


def test_the_flat_family_says_what_it_takes():
    family = FlatProduct([3, 2], 1, 2)
    assert family.sizes == [5, 1, 4]
    assert [type(part) for part in family.parts] == [
        families.MultiCategorical,
        families.Bernoulli,
        families.DiagonalGaussian,
    ]
    with pytest.raises(
        ValueError, match=r"targets must have shape \(4, 5\) for outputs of shape \(4, 10\), got \(4, 6\)"
    ):
        family.log_likelihood(torch.zeros(4, 10), torch.zeros(4, 6))
    outputs = torch.randn(4, 10).double()
    drawn = family.sample(outputs)
    assert drawn.dtype == torch.float64
    own, (score,) = outputs.clone().requires_grad_(), (None,)
    (score,) = torch.autograd.grad(family.log_likelihood(own, drawn).sum(), own)
    torch.testing.assert_close(family.score(outputs, drawn), score)


# ----------------------------------------------------------------------------------------------------- what is refused


def test_what_cannot_be_is_refused_before_work_starts():
    text = spaces.Tuple((spaces.Discrete(2), spaces.Text(3)))
    with pytest.raises(ValueError, match=r"action_space\[1\] is Text"):
        agent(vec(Strict, text))
    with pytest.raises(ValueError, match="has no part"):
        agent(vec(Strict, spaces.Dict({})))
    with pytest.raises(ValueError, match="use_sde=True is for actions that are one Box, not for Dict"):
        agent(vec(Strict), use_sde=True)
    for policy in (ActorCriticPolicy, "AfterstatePolicy"):
        with pytest.raises(ValueError, match=r"does not take: take \"MlpPolicy\" by its name, or a subclass of agents"):
            agent(vec(Strict), policy=policy)
    with pytest.raises(ValueError, match="not for Tuple"):
        agent(vec(Picky, spaces.Tuple((REALS,))))


@pytest.mark.parametrize(
    "space", [spaces.Discrete(3, start=5), spaces.MultiDiscrete([2, 3], start=[0, 1]), spaces.MultiDiscrete([[2], [3]])]
)
def test_one_part_that_does_not_count_from_0_is_for_a_tuple(space):
    with pytest.raises(ValueError, match=r"would take to count from 0 along one axis: make it a Tuple"):
        agent(vec(Strict, space))
    agent(vec(Strict, spaces.Tuple((space,))), n_steps=8, batch_size=8).learn(16)


@pytest.mark.parametrize("format", ["onnx", "torchscript", "torch-export"])
def test_an_export_is_refused_by_name(format, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    with pytest.raises(ExportError, match="HybridActorCriticPolicy cannot be exported: its actions have several parts"):
        export_agent(agent(vec(Strict)), tmp_path / "agent", format)
