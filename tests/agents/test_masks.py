"""Masked policies: no forbidden action, exact Fisher and KL, and the plain policy where all is allowed."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv

from agents import masks
from agents.evaluation import evaluate
from agents.export import DeployedPolicy, export_agent, load_exported
from agents.heads import ActorHead
from agents.update import batch_of
from envs import ActionMasks, VecNormalize, make_vec_env
from envs.masks import ACTION_MASK, mask_sizes
from npg import Fisher, acceleration
from tests.agents.models import ALGORITHMS, BOX, OPTIONS, Noise, agent, parameters, vec

pytestmark = pytest.mark.usefixtures("untraced")
torch.set_num_threads(1)

#: Policies that KL is measured for, of each structure; NPG_POLICIES=1000 takes so many.
COUNT = int(os.environ.get("NPG_POLICIES", "40"))

ACTIONS = {
    "Discrete": spaces.Discrete(5),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3, 4]),
    "MultiBinary": spaces.MultiBinary(4),
}


class Picky(Noise):
    """Draws what is allowed anew in every step, and refuses everything else; to take a larger number pays."""

    def __init__(self, action_space: spaces.Space = ACTIONS["Discrete"], likely: float = 0.5, space: Any = BOX) -> None:
        super().__init__(action_space, space)
        self.likely, self.sizes = likely, mask_sizes(action_space)

    def _observe(self) -> Any:
        self.allowed = []
        for n in self.sizes:
            allowed = self.np_random.random(n) < self.likely
            allowed[self.np_random.integers(n)] = True
            self.allowed.append(allowed)
        return super()._observe()

    def _reward(self, action: Any) -> float:
        for allowed, taken in zip(self.allowed, np.ravel(action).astype(int), strict=True):
            assert allowed[taken], f"{action} is forbidden by {self.allowed}"
        return float(np.sum(action))


class Asked(Picky):
    def action_masks(self) -> Any:
        return np.concatenate(self.allowed)


class Told(Picky):
    """The mask is a part of the observation."""

    def __init__(self, action_space: spaces.Space = ACTIONS["Discrete"]) -> None:
        super().__init__(action_space)
        self.parts = spaces.Dict({"x": BOX, "speed": BOX})
        mask = spaces.Box(0, 1, (sum(self.sizes),), np.int8)
        self.observation_space = spaces.Dict({**self.parts.spaces, ACTION_MASK: mask})

    def _observe(self) -> Any:
        seen = super()._observe()
        return {**seen, ACTION_MASK: np.concatenate(self.allowed).astype(np.int8)}


def policy_and_batch(space: spaces.Space, n: int = 6, seed: int = 0) -> tuple[Any, dict[str, torch.Tensor]]:
    """A policy far from its beginning in float64, and observations with random masks."""
    torch.manual_seed(seed)
    rng, sizes = np.random.default_rng(seed), mask_sizes(space)
    whole = spaces.Dict({"observation": BOX, ACTION_MASK: spaces.MultiBinary(sum(sizes))})
    policy = masks.MaskableActorCriticPolicy(whole, space, lambda _: 1e-3, net_arch=[4]).double()
    with torch.no_grad():
        for p in policy.parameters():
            p += torch.randn_like(p)
    rows = []
    for _ in range(n):
        parts = [rng.random(size) < 0.5 for size in sizes]
        for part in parts:
            part[rng.integers(len(part))] = True
        rows.append(np.concatenate(parts))
    rows[0][:] = True
    mask = torch.as_tensor(np.array(rows)).double()
    return policy, {"observation": torch.randn(n, 3).double(), ACTION_MASK: mask}


def allowed_log_p(space: spaces.Space, logits: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """The twin, which knows of no constant: of one row, log p of each choice over what is allowed alone."""
    sizes = mask_sizes(space)
    if isinstance(space, spaces.MultiBinary):
        logits = torch.stack([torch.zeros_like(logits), logits], -1).flatten()
    parts = zip(logits.split(sizes), mask.split(sizes))
    return [part[allowed > 0].log_softmax(-1) for part, allowed in parts]


def raw_logits(policy: Any, observations: dict[str, torch.Tensor]) -> torch.Tensor:
    latent = policy.mlp_extractor.extractor.forward_actor(observations["observation"])
    return policy.action_net.net(latent)


# -------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("mode", ["auto", "off"])
@pytest.mark.parametrize("action", ACTIONS)
def test_fisher_products_are_those_of_the_dense_twin(action, mode):
    space = ACTIONS[action]
    policy, observations = policy_and_batch(space)
    head = masks_head(policy)
    named = {n: p for n, p in policy.named_parameters() if n.startswith(("mlp_extractor.extractor.policy", "action"))}
    n = sum(p.numel() for p in named.values())
    dense = torch.zeros(n, n, dtype=torch.float64)
    for i in range(len(observations[ACTION_MASK])):
        row = {k: v[i : i + 1] for k, v in observations.items()}
        for log_p in allowed_log_p(space, raw_logits(policy, row)[0], row[ACTION_MASK][0]):
            for value in log_p:
                gradients = torch.autograd.grad(value, list(named.values()), retain_graph=True, allow_unused=True)
                score = torch.cat(
                    [
                        torch.zeros_like(p).flatten() if g is None else g.flatten()
                        for p, g in zip(named.values(), gradients)
                    ]
                )
                dense += value.exp().detach() * torch.outer(score, score) / len(observations[ACTION_MASK])
    with acceleration.mode(mode):
        own = {f"policy.{name}": p for name, p in named.items()}
        fisher = Fisher(head, observations, head.family, parameters=own)
        v = torch.randn(n, 3, dtype=torch.float64)
        products = torch.stack([fisher @ column for column in v.T], 1)
    assert dense.norm() > 0.1
    assert (products - dense @ v).norm() <= 1e-10 * (dense @ v).norm()


def masks_head(policy: Any) -> Any:
    head = ActorHead(policy)
    assert head.standard
    return head


@pytest.mark.parametrize("action", ACTIONS)
def test_log_likelihood_entropy_and_kl_are_those_over_what_is_allowed(action):
    space = ACTIONS[action]
    policy, observations = policy_and_batch(space, n=40)
    head = masks_head(policy)
    with torch.no_grad():
        old, before = head(observations), raw_logits(policy, observations)
        for p in policy.parameters():
            p += 0.3 * torch.randn_like(p)
        new, after = head(observations), raw_logits(policy, observations)
        samples = head.family.sample(old)
        likelihoods = head.family.log_likelihood(old, samples)
    for i, mask in enumerate(observations[ACTION_MASK]):
        p, q = (allowed_log_p(space, logits[i], mask) for logits in (before, after))
        entropy = sum(-(a.exp() * a).sum() for a in p)
        kl = sum((a.exp() * (a - b)).sum() for a, b in zip(p, q))
        places = [torch.nonzero(part).flatten().tolist() for part in mask.split(mask_sizes(space))]
        chosen = torch.atleast_1d(samples[i]).long().tolist()
        likelihood = sum(a[place.index(c)] for a, place, c in zip(p, places, chosen, strict=True))
        assert head.family.entropy(old)[i] == pytest.approx(float(entropy), rel=1e-10, abs=1e-12)
        assert head.family.kl(old, new)[i] == pytest.approx(float(kl), rel=1e-9, abs=1e-12)
        assert likelihoods[i] == pytest.approx(float(likelihood), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("action", ACTIONS)
def test_the_kl_stays_within_the_radius_on_many_random_policies(action):
    space = ACTIONS[action]
    model = agent(vec(Asked, space), target_kl=0.02, n_steps=16, policy_kwargs={"net_arch": [8]})
    model.learn(32)
    generator, accepted = torch.Generator().manual_seed(1), 0
    for scale in np.linspace(0.1, 4.0, COUNT):
        with torch.no_grad():
            for p in model.policy.parameters():
                p.copy_(float(scale) * torch.randn(p.shape, generator=generator))
        model.collect()
        rollout = next(model.rollout_buffer.get(None))
        batch = batch_of(model, rollout)
        before = raw_logits(model.policy, batch.inputs)
        report = model.actor_step(batch)
        after = raw_logits(model.policy, batch.inputs)
        kl = 0.0
        for b, a, mask in zip(before, after, batch.inputs[ACTION_MASK]):
            pairs = zip(*(allowed_log_p(space, logits.detach().double(), mask) for logits in (b, a)))
            kl += sum(float((p.exp() * (p - q)).sum()) for p, q in pairs) / len(before)
        assert kl <= 0.02 * (1 + 1e-4) + 1e-7
        assert kl == pytest.approx(report.kl if report.accepted else 0.0, rel=1e-3, abs=1e-6)
        accepted += report.accepted
    assert accepted >= 0.75 * COUNT


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("action", ACTIONS)
def test_where_all_is_allowed_a_training_is_the_plain_one_s_to_the_last_bit(action, algorithm):
    masked, plain = (agent(vec(cls, ACTIONS[action], likely=2.0), algorithm).learn(128) for cls in (Asked, Picky))
    assert type(masked.policy) is masks.MaskableActorCriticPolicy
    assert type(plain.policy) is ActorCriticPolicy
    for a, b in zip(parameters(masked), parameters(plain), strict=True):
        assert torch.equal(a, b)
    initial = parameters(agent(vec(Picky, ACTIONS[action])))
    assert not all(torch.equal(a, b) for a, b in zip(initial, parameters(plain)))


def test_a_wide_space_of_images_and_several_parts_are_the_plain_ones_too():
    image = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    parts = spaces.Dict({"a": BOX, "b": spaces.Discrete(3)})
    for space, policy in ((image, "CnnPolicy"), (parts, "MultiInputPolicy")):
        options = {"n_steps": 8, "policy": policy, "cg_max_steps": 3}
        masked, plain = (agent(vec(cls, likely=2.0, space=space), **options).learn(16) for cls in (Asked, Picky))
        for a, b in zip(parameters(masked), parameters(plain), strict=True):
            assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------- what is forbidden is never


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("action", ACTIONS)
def test_a_training_takes_no_forbidden_action(action, algorithm):
    model = agent(vec(Asked, ACTIONS[action], likely=0.3), algorithm, n_steps=64)
    before = [p.clone() for p in parameters(model)]
    model.learn(512)  # the environment refuses what is forbidden
    assert not all(torch.equal(a, b) for a, b in zip(before, parameters(model)))
    assert np.isfinite(model.logger.name_to_value["train/entropy_loss"])
    evaluation = evaluate(model, vec(Asked, ACTIONS[action], likely=0.3), 4, seed=1)
    assert all(length <= 25 for length in evaluation.lengths)


@pytest.mark.parametrize("action", ACTIONS)
def test_a_policy_that_wants_the_forbidden_does_not_get_it(action):
    """Logits up to ±1e6, the allowed ones among the smallest."""
    space = ACTIONS[action]
    policy, observations = policy_and_batch(space, n=20_000)
    policy, sizes = policy.float(), mask_sizes(space)
    observations = {k: v.float() for k, v in observations.items()}
    head = masks_head(policy)
    with torch.no_grad():
        policy.action_net.net.bias.copy_(torch.linspace(-1e6, 1e6, len(policy.action_net.net.bias)))
        outputs = head(observations)
        modes = policy.get_distribution(observations).mode()
        draws = [head.family.sample(outputs), modes, policy.get_distribution(observations).sample()]
    for taken in draws:
        taken = taken.reshape(20_000, -1).long()
        for part, choice in zip(observations[ACTION_MASK].split(sizes, -1), taken.T, strict=True):
            assert bool((part.gather(1, choice[:, None]) == 1).all())
    assert len(torch.unique(draws[0].reshape(20_000, -1), dim=0)) > 1
    assert bool(torch.isfinite(head.family.entropy(outputs)).all())


def test_a_state_with_one_action_has_no_choice_and_no_gradient():
    policy, observations = policy_and_batch(ACTIONS["Discrete"])
    observations = {"observation": observations["observation"].float(), ACTION_MASK: torch.eye(5)[[0, 1, 2, 3, 4, 0]]}
    head = masks_head(policy.float())
    outputs = head(observations)
    assert head.family.sample(outputs).tolist() == [0, 1, 2, 3, 4, 0]
    assert head.family.entropy(outputs).abs().max() == 0
    assert head.family.log_likelihood(outputs, torch.tensor([0, 1, 2, 3, 4, 0])).abs().max() == 0
    own = head.own_parameters(observations)
    fisher = Fisher(head, observations, head.family, parameters=own)
    assert (fisher @ torch.ones(sum(p.numel() for p in own.values()))).abs().max() == 0


def test_it_learns_what_is_best_of_what_is_allowed():
    with acceleration.mode("auto"):
        model = agent(vec(Asked, n=8), n_steps=64, target_kl=0.05, gamma=0.0, batch_size=128).learn(20 * 512)
    env = ActionMasks(vec(Asked, n=8))
    seen: Any = env.reset()
    right = []
    for _ in range(20):
        actions, _ = model.predict(seen, deterministic=True)
        right += (actions == 4 - seen[ACTION_MASK][:, ::-1].argmax(1)).tolist()
        seen, *_ = env.step(actions)
    assert np.mean(right) > 0.95


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: str(*options.values()))
def test_the_options_of_the_plain_policy_work(options):
    model = agent(vec(Asked, ACTIONS["MultiDiscrete"]), **options)
    model.learn(128)
    assert model.logger.name_to_value["train/accepted"] in (0, 1)
    assert all(bool(torch.isfinite(p).all()) for p in parameters(model))


# --------------------------------------------------------------------------------------------- the life cycle of agents


def test_masks_in_the_observation_are_the_same_policy():
    assert type(agent(vec(Told), policy="MultiInputPolicy").policy) is masks.MaskableMultiInputActorCriticPolicy
    model = agent(VecNormalize(vec(Told)), policy="MultiInputPolicy").learn(128)
    assert set(model.get_vec_normalize_env().obs_rms) == {"x", "speed"}
    assert model.policy.features_extractor.features_dim == 6


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_saved_agent_is_the_same_and_goes_on(algorithm, tmp_path):
    model = agent(VecNormalize(vec(Asked)), algorithm).learn(128)
    model.save(tmp_path / "agent")
    seen: Any = model.get_env().reset()
    alone = algorithm.load(tmp_path / "agent", device="cpu")
    taken, _ = alone.predict(seen, deterministic=True)
    np.testing.assert_array_equal(taken, model.predict(seen, deterministic=True)[0])
    np.testing.assert_array_equal(
        taken, alone.predict(seen["observation"], deterministic=True, action_masks=seen[ACTION_MASK] == 1)[0]
    )
    alone.set_env(VecNormalize(vec(Asked)))
    alone.learn(64)
    again = algorithm.load(tmp_path / "agent", env=VecNormalize(vec(Asked)), device="cpu")
    again.learn(64, reset_num_timesteps=False)
    assert again.num_timesteps == 192


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.slow
def test_an_exported_policy_takes_the_mask(format, deterministic, tmp_path):
    if format == "onnx" and any(find_spec(package) is None for package in ("onnx", "onnxscript", "onnxruntime")):
        pytest.skip("needs the extra export")
    model = agent(VecNormalize(vec(Asked, ACTIONS["MultiDiscrete"], likely=0.3)), n_steps=8, batch_size=16).learn(64)
    inputs = DeployedPolicy(model).inputs
    assert inputs == [ACTION_MASK, "observation"]
    path = export_agent(
        model, tmp_path / {"onnx": "a.onnx", "torch-export": "a.pt2"}[format], format, deterministic=deterministic
    )
    bare = vec(Asked, ACTIONS["MultiDiscrete"], likely=0.3, n=4)
    act, raw = load_exported(path, format), bare.reset()
    for _ in range(30):
        allowed = np.stack(bare.env_method("action_masks")).astype(np.int8)
        actions = act(allowed, raw)
        if deterministic:
            seen = model.get_vec_normalize_env().normalize_obs(raw)
            np.testing.assert_array_equal(actions, model.predict(seen, deterministic=True, action_masks=allowed)[0])
        raw, *_ = bare.step(actions)  # which refuses what is forbidden


# ------------------------------------------------------------------------------------------------- with sb3-contrib


def test_its_wrapper_and_its_evaluation_serve():
    contrib = pytest.importorskip("sb3_contrib")
    from sb3_contrib.common.maskable.evaluation import evaluate_policy as masked_evaluation
    from sb3_contrib.common.wrappers import ActionMasker

    env = DummyVecEnv([lambda: gym.wrappers.TimeLimit(ActionMasker(Picky(), lambda e: np.concatenate(e.allowed)), 10)])
    model = agent(env, n_steps=64).learn(128)
    mean, _ = masked_evaluation(model, env, n_eval_episodes=2)
    assert mean > 0
    mean, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=2, warn=False)
    assert mean > 0
    assert contrib.MaskablePPO.policy_aliases["MlpPolicy"].__name__ == masks.MaskableActorCriticPolicy.__name__


# ----------------------------------------------------------------------------------------------------- what is refused


def test_a_state_without_a_legal_action_ends_the_training_and_changes_nothing():
    class Dead(Asked):
        def action_masks(self):
            return super().action_masks() * (self.steps < 10)

    model = agent(vec(Dead))
    before = [p.clone() for p in parameters(model)]
    with pytest.raises(ValueError, match="environment 0 allows nothing in step 10"):
        model.learn(64)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(model)))


def test_observations_without_a_mask_or_with_a_bad_one_are_refused():
    model = agent(vec(Asked))
    seen: Any = model.get_env().reset()
    for observation, given, message in (
        (seen["observation"], None, r"no action_mask: take it from .*get_env.*action_masks="),
        (seen["observation"], np.zeros((2, 5)), "observation 0 allows nothing"),
        (seen["observation"], np.full((2, 5), 0.3), r"observation 0 has the value 0.3"),
        (seen["observation"], np.ones((2, 4)), r"shape \(2, 4\), and Discrete\(5\) needs 5 entries"),
        (seen["observation"], np.ones(5), r"shape \(5,\), which is 1 of .* 'observation' the shape \(2, .*\): each"),
        (seen["observation"], np.ones((3, 5)), r"shape \(3, 5\), which is 3 of .*: each observation needs one mask"),
        (seen["observation"][0], np.ones((2, 5)), r"shape \(2, 5\), which is 2 of .*: each observation needs one mask"),
        ({**seen, ACTION_MASK: np.zeros((2, 5))}, None, "observation 0 allows nothing"),
        ({**seen, ACTION_MASK: np.ones((2, 6))}, None, r"shape \(2, 6\), and Discrete\(5\) needs 5 entries"),
    ):
        with pytest.raises(ValueError, match=message):
            model.predict(observation, action_masks=given)
    plain = agent(vec(Picky))
    with pytest.raises(ValueError, match="action_masks were given, and the policy ActorCriticPolicy takes none"):
        plain.predict(plain.get_env().reset(), action_masks=np.ones((2, 5)))


def test_masks_of_another_shape_are_refused_before_work_starts():
    class Short(Asked):
        def action_masks(self):
            return super().action_masks()[:3]

    with pytest.raises(ValueError, match=r"environment 0 returns an array of shape \(3,\) after the reset"):
        agent(vec(Short)).learn(64)
    with pytest.raises(ValueError, match="not for Box"):
        agent(vec(boxed(), n=1))


def boxed() -> Any:
    class Boxed(Asked):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = BOX

    return Boxed


def test_the_policy_says_which_observations_it_needs():
    plain, told = vec(Picky), vec(Told)
    with pytest.raises(ValueError, match="no method action_masks"):
        agent(plain, policy=masks.MaskableActorCriticPolicy)
    with pytest.raises(ValueError, match=r"\['speed', 'x'\] beside its action_mask.*MultiInputPolicy"):
        agent(told, policy="MlpPolicy")
    with pytest.raises(ValueError, match="needs observations with an action_mask"):
        masks.MaskableActorCriticPolicy(BOX, ACTIONS["Discrete"], lambda _: 1e-3)


def test_a_policy_of_ones_own_is_told_that_it_takes_no_masks():
    class Own(ActorCriticPolicy):
        pass

    with pytest.warns(UserWarning, match=r"give action masks, which .*Own.* does not take"):
        agent(vec(Asked), policy=Own)
    with pytest.warns(UserWarning, match="give action masks"):
        assert type(agent(vec(Asked), policy=ActorCriticPolicy).policy) is ActorCriticPolicy
    for env, policy in ((vec(Asked), "MlpLstmPolicy"), (vec(Told), "MultiInputLstmPolicy")):
        with pytest.warns(UserWarning, match=f"give action masks, which '{policy}' does not take"):
            agent(env, policy=policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent(vec(Picky), policy=Own)

    class OwnMasked(masks.MaskableActorCriticPolicy):
        pass

    model = agent(vec(Asked), policy=OwnMasked).learn(128)
    assert type(model.policy) is OwnMasked


def test_tetris_keeps_its_own_policy_and_takes_masks_with_the_others():
    pytest.importorskip("numba")
    env = make_vec_env("npg/Tetris-v0", 2, seed=0, env_kwargs={"height": 6})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert agent(env, policy="AfterstatePolicy").observation_space == env.observation_space
    assert type(agent(env, policy="MlpPolicy").policy) is masks.MaskableActorCriticPolicy


def test_only_exact_parts_are_taken_for_what_is_known():
    class Doubled(masks.MaskedLogits):
        def forward(self, latent):
            return 2 * super().forward(latent)

    model = agent(vec(Asked))
    seen: Any = model.policy.obs_to_tensor(model.get_env().reset())[0]
    assert model.networks.actor.acting(seen) is not None
    net = model.policy.action_net
    model.policy.action_net = Doubled(net.net, net.entries, net.bits)
    model.networks.follow()
    assert model.networks.actor.acting(seen) is None


def test_a_feature_extractor_of_ones_own_sees_no_mask():
    class Sees(BaseFeaturesExtractor):
        def __init__(self, space: spaces.Space) -> None:
            super().__init__(space, 3)
            assert space == BOX

        def forward(self, observations: torch.Tensor) -> torch.Tensor:
            assert observations.shape[1:] == (3,)
            return observations

    agent(vec(Asked), policy_kwargs={"features_extractor_class": Sees}).learn(64)
