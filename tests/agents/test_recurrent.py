"""Agents with recurrent policies: exact steps through time, and a memory that goes through a whole life cycle.

Run as a script, this file is one of two processes that learn together.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.distributed as dist
from gymnasium import spaces
from stable_baselines3.common import buffers
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn

from agents import CPO, MDPO, NPG, TRPO
from agents.config import resolve
from agents.export import DeployedPolicy, ExportError
from agents.recurrent import POLICIES, MlpLstmPolicy, RNNStates
from agents.runs import RunFolder
from agents.sequences import RecurrentActor, RecurrentCritic, SequenceBuffer
from agents.training import resume, start
from agents.update import batch_of, critic_of, surrogate
from npg import Fisher, TrustRegion
from npg.solvers import conjugate_gradient
from npg.step import natural_step

torch.set_num_threads(1)

#: Policies that KL is measured for, of each structure; NPG_POLICIES=1000 takes so many.
COUNT = int(os.environ.get("NPG_POLICIES", "40"))

ACTIONS: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(3),
    "box": spaces.Box(-1.0, 1.0, (2,), np.float32),
    "multi-discrete": spaces.MultiDiscrete([3, 2]),
    "multi-binary": spaces.MultiBinary(2),
}
SMALL = {"lstm_hidden_size": 6, "net_arch": {"pi": [5], "vf": [5]}}


class Ragged(gym.Env):
    """Noise of three components; an episode ends by chance, or after seven steps by its time."""

    def __init__(self, actions: str = "discrete", observations: Any = None, ends: float = 0.2) -> None:
        self.action_space = ACTIONS[actions]
        self.observation_space = observations or spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.ends = ends

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        over = bool(self.np_random.random() < self.ends)
        reward = float(np.sum(action)) * self.np_random.random()
        return self.observation_space.sample(), reward, over, not over and self.steps == 7, {}


class Recall(gym.Env):
    """A sign is shown in the first of three steps, and to repeat it in the last one pays 1."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps, self.sign = 0, int(self.np_random.integers(2))
        return np.array([2 * self.sign - 1, 0], np.float32), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        last = np.array([0, self.steps == 2], np.float32)
        return last, float(self.steps == 3 and action == self.sign), self.steps == 3, False, {}


def ragged(n_envs: int = 3, **options: Any) -> DummyVecEnv:
    env = DummyVecEnv([lambda: Ragged(**options)] * n_envs)
    env.seed(0)
    return env


def small(cls: Any = TRPO, policy: Any = "MlpLstmPolicy", env: Any = None, **options: Any) -> Any:
    options = {"n_steps": 8, "batch_size": 8, "n_critic_updates": 2, "seed": 0, "device": "cpu", **options}
    options.setdefault("policy_kwargs", SMALL)
    model = cls(policy, ragged() if env is None else env, **options)
    model.set_logger(Logger(None, []))
    return model


def vector(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.policy.parameters()])


def rollout(model: Any, times: int = 1) -> Any:
    """Collect that often without learning; what an update then gets."""
    if model._last_obs is None:
        model._setup_learn(10**6, None)
    for _ in range(times):
        model.collect()
    model.policy.set_training_mode(False)
    return next(model.rollout_buffer.get())


def exactly(model: Any) -> tuple[RecurrentActor, RecurrentCritic]:
    """The networks in float64."""
    policy = model.policy.double()
    actor = RecurrentActor(policy)
    actor.family = model.networks.actor.family
    return actor, RecurrentCritic(policy)


def doubled(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: doubled(value) for key, value in tree.items()}
    return tree.double() if isinstance(tree, Tensor) else tree


def twin(policy: Any, inputs: dict[str, Any]) -> Tensor:
    """The actor's outputs (E, T, D) by PyTorch's own LSTM or GRU, one environment and one step after the other."""
    observations, starts, state = inputs["observations"], inputs["starts"], inputs["actor"]
    rnn = policy.lstm_actor
    outputs = []
    for e in range(len(starts)):
        s = state[e]
        for t in range(starts.shape[1]):
            s = torch.zeros_like(s) if starts[e, t] else s
            out, hx = rnn(observations[e, t : t + 1], tuple(s) if isinstance(rnn, nn.LSTM) else s[0])
            s = torch.stack(hx) if isinstance(rnn, nn.LSTM) else hx.unsqueeze(0)
            mean = policy.action_net(policy.mlp_extractor.policy_net(out[0]))
            outputs.append(torch.cat([mean, policy.log_std]) if hasattr(policy, "log_std") else mean)
    return torch.stack(outputs).unflatten(0, starts.shape)


# ------------------------------------------------------------------------------------------------- exact through time


@pytest.mark.parametrize("policy", ["MlpLstmPolicy", "MlpGruPolicy"])
@pytest.mark.parametrize("actions", list(ACTIONS))
def test_the_fisher_through_time_is_that_of_a_dense_twin(policy, actions):
    model = small(TRPO, policy, ragged(actions=actions), policy_kwargs={**SMALL, "n_lstm_layers": 1})
    seen = rollout(model, 2)  # whose episodes are under way where it begins
    assert 0 < seen.observations["starts"].sum() < seen.observations["starts"].size
    assert seen.observations["actor"].abs().sum() > 0
    actor, _ = exactly(model)
    inputs = doubled(model.networks.actor.prepare(seen.observations))
    parameters = dict(model.networks.actor_parameters)
    fisher = Fisher(actor, inputs, actor.family, parameters=parameters)
    assert fisher.events == 24

    expected = twin(model.policy, inputs)
    torch.testing.assert_close(fisher.outputs, expected.detach(), rtol=0, atol=1e-13)
    D = expected.shape[-1]
    J = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(output, [*parameters.values()], retain_graph=True)])
            for output in expected.flatten()
        ]
    ).reshape(24, D, -1)
    units = torch.eye(D, dtype=torch.float64)[:, None].expand(D, 24, D)
    M = actor.family.metric(expected.detach().flatten(0, 1))(units).movedim(0, 1)
    F = torch.einsum("nip,nij,njq->pq", J, M, J) / 24
    torch.testing.assert_close(fisher.dense(), F, rtol=1e-10, atol=1e-10 * float(F.abs().max()))
    v = torch.randn(len(F), dtype=torch.float64)
    torch.testing.assert_close(fisher @ v, F @ v, rtol=1e-10, atol=1e-10 * float((F @ v).abs().max()))


@pytest.mark.parametrize(("policy", "options"), [("MlpLstmPolicy", {}), ("MlpGruPolicy", {"n_lstm_layers": 2})])
def test_an_update_sees_the_policy_that_acted(policy, options):
    """Ratios are 1 and the KL is 0 at the old parameters, in every rollout, wherever an episode is cut."""
    model = small(TRPO, policy, ragged(actions="box"), policy_kwargs={**SMALL, **options}, n_steps=6)
    for _ in range(4):
        batch = batch_of(model, rollout(model))
        actor = model.networks.actor
        with torch.no_grad():
            outputs = actor(batch.inputs)
            now = actor.family.log_likelihood(outputs, batch.actions)
        torch.testing.assert_close(now, batch.old_log_likelihood, rtol=0, atol=2e-6)
        assert now.shape == batch.advantages.shape == (3, 6)
        model.train()


class Ends(BaseCallback):
    """Ends the second rollout after five steps: by False, or in the environments' sixth step, by an exception."""

    def __init__(self, raises: bool) -> None:
        super().__init__()
        self.raises = raises

    def _on_step(self) -> bool:
        if self.n_calls == 8 + 5:
            if not self.raises:
                return False
            env = self.training_env

            def broken() -> Any:
                del env.step_wait
                raise KeyboardInterrupt

            env.step_wait = broken
        return True


def test_a_rollout_that_an_exception_ends_leaves_both_memories_where_the_environments_are():
    stopped = small(TRPO, env=ragged(ends=0.0)).learn(10**6, Ends(False))
    broken = small(TRPO, env=ragged(ends=0.0))
    with pytest.raises(KeyboardInterrupt):
        broken.learn(10**6, Ends(True))
    np.testing.assert_array_equal(broken._last_obs, stopped._last_obs)
    for a, b in zip(broken._last_states, stopped._last_states, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
        assert np.abs(a).sum() > 0


def test_values_and_bootstraps_are_those_of_a_critic_that_remembers(steps_of):
    env = ragged(2, ends=0.1)
    model = small(env=env, n_steps=20, gamma=0.9)
    seen = steps_of(env)
    rollout(model)
    seen.clear()
    rollout(model)
    assert any(step.cut.any() for step in seen)
    buffer, policy = model.rollout_buffer, model.policy
    state = buffer.states[1].permute(1, 2, 0, 3)
    with torch.no_grad():
        for t, step in enumerate(seen):
            starts = torch.as_tensor(buffer.episode_starts[t])
            values, state = policy._values(torch.as_tensor(buffer.observations[t]), tuple(state), starts)
            np.testing.assert_allclose(buffer.values[t], values[:, 0], atol=1e-6)
            after, _ = policy._values(torch.as_tensor(step.last), state, torch.zeros(2))
            expected = step.rewards + np.where(step.cut, 0.9 * after[:, 0].numpy(), 0.0)
            np.testing.assert_allclose(buffer.rewards[t], expected, atol=1e-5)
    np.testing.assert_allclose(model._last_states[1], torch.stack(state).permute(2, 0, 1, 3), atol=1e-6)


def test_the_kl_stays_within_the_radius_for_many_policies_and_rollouts():
    env, radius, accepted = ragged(actions="discrete"), 0.02, 0
    model = small(env=env, n_steps=5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(COUNT):
        with torch.no_grad():
            for p in model.policy.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.7)
        batch = batch_of(model, rollout(model))
        actor = model.networks.actor
        with torch.no_grad():
            before = actor(batch.inputs)
        report = natural_step(
            actor,
            batch.inputs,
            actor.family,
            surrogate(actor.family, batch),
            trust_region=TrustRegion(radius),
            damping=1e-3,
            solver=partial(conjugate_gradient, max_iterations=6),
            parameters=model.networks.actor_parameters,
        )
        with torch.no_grad():
            kl = float(actor.family.kl(before, actor(batch.inputs)).mean())
        assert kl <= radius * (1 + 1e-4)
        accepted += report.accepted
        if report.accepted:
            assert kl == pytest.approx(report.kl, rel=1e-2, abs=1e-6)
            assert report.actual_gain > 0
        else:
            assert kl == 0
    assert accepted > 0.8 * COUNT


class OneStep(BaseFeaturesExtractor):
    """What an LSTM makes of a sequence of one step."""

    def __init__(self, space: Any, size: int) -> None:
        super().__init__(space, size)
        rnn = nn.LSTM(3, size)
        self.weight_ih_l0, self.bias_ih_l0, self.bias_hh_l0 = rnn.weight_ih_l0, rnn.bias_ih_l0, rnn.bias_hh_l0

    def forward(self, x: Tensor) -> Tensor:
        z = nn.functional.linear(x, self.weight_ih_l0, self.bias_ih_l0 + self.bias_hh_l0)
        i, _, g, o = z.chunk(4, -1)
        return o.sigmoid() * (i.sigmoid() * g.tanh()).tanh()


@pytest.mark.parametrize("cls", [TRPO, NPG, MDPO])
def test_with_episodes_of_one_step_updates_are_those_of_a_plain_policy(cls):
    options: dict[str, Any] = {"batch_size": 24, "n_steps": 8}
    model = small(cls, env=ragged(ends=1.0), **options)
    plain = small(
        cls,
        "MlpPolicy",
        ragged(ends=1.0),
        policy_kwargs={
            "net_arch": SMALL["net_arch"],
            "features_extractor_class": OneStep,
            "features_extractor_kwargs": {"size": 6},
            "share_features_extractor": False,
        },
        **options,
    )
    names = {
        "lstm_actor": "pi_features_extractor",
        "lstm_critic": "vf_features_extractor",
        "mlp_extractor": "mlp_extractor",
        "action_net": "action_net",
        "value_net": "value_net",
    }
    pairs = []
    for name, p in model.policy.named_parameters():
        part, rest = name.split(".", 1)
        if "weight_hh" not in name:
            pairs.append((p, plain.policy.get_parameter(f"{names[part]}.{rest}")))
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    before = vector(model)
    for m in (model, plain):
        torch.manual_seed(1)
        m.learn(24)
    assert np.array_equal(model.rollout_buffer.actions, plain.rollout_buffer.actions)
    assert not torch.equal(before, vector(model))
    for mine, other in pairs[:5] + pairs[9:]:
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("cls", [TRPO, NPG, MDPO])
@pytest.mark.parametrize("critic", ["adam", "natural"])
def test_parts_of_a_rollout_are_whole_sequences(cls, critic):
    options = {} if cls is MDPO else {"fisher_fraction": 0.5}
    model = small(cls, env=ragged(6), critic=critic, sub_sampling_factor=2, batch_size=20, **options)
    batch = batch_of(model, rollout(model))
    assert batch.inputs["observations"].shape == (3, 8, 3)
    assert batch.inputs["starts"].shape == batch.advantages.shape == (3, 8)
    if options:
        assert batch.curvature_inputs["observations"].shape == (2, 8, 3)
        places = [
            next(e for e in range(3) if torch.equal(batch.inputs["observations"][e], rows))
            for rows in batch.curvature_inputs["observations"]
        ]
        assert np.array_equal(batch.curvature_inputs["starts"], batch.inputs["starts"][places])
        assert torch.equal(batch.curvature_inputs["actor"], batch.inputs["actor"][places])
    before = vector(model)
    model.learn(2 * 48, reset_num_timesteps=False)
    assert torch.isfinite(vector(model)).all()
    assert not torch.equal(before, vector(model))
    assert model.logger.name_to_value["train/value_loss"] > 0


@pytest.mark.parametrize("critic", ["adam", "natural"])
def test_the_critic_is_fitted_through_time(critic):
    """Its loss falls on one rollout, and its gradient is that of the whole recurrence."""
    model = small(env=ragged(4), critic=critic, n_critic_updates=1, learning_rate=0.01)
    seen = rollout(model)
    head = model.networks.critic

    def loss() -> float:
        with torch.no_grad():
            return float((head(head.prepare(seen.observations))[..., 0] - seen.returns).square().mean())

    before, actor = loss(), [p.clone() for p in model.networks.actor_parameters.values()]
    assert any("lstm_critic.weight_hh" in name for name in model.networks.critic_parameters)
    for _ in range(20):
        critic_of(model).fit(seen.observations, seen.returns)
    assert loss() < 0.7 * before
    assert all(torch.equal(a, b) for a, b in zip(actor, model.networks.actor_parameters.values()))


# --------------------------------------------------------------------------------------------------------- policies


IMAGES = spaces.Box(0, 255, (1, 36, 36), np.uint8)
DICTS = spaces.Dict({"a": spaces.Box(-1, 1, (2,), np.float32), "b": spaces.Discrete(3)})


@pytest.mark.parametrize("cell", ["Lstm", "Gru"])
@pytest.mark.parametrize(
    ("kind", "observations"),
    [
        ("Cnn", IMAGES),
        ("MultiInput", DICTS),
        ("MultiInput", spaces.Dict({"image": IMAGES, "a": DICTS["a"]})),
        ("Mlp", spaces.Discrete(4)),
        ("Mlp", spaces.MultiDiscrete([2, 3])),
    ],
)
def test_observations_of_every_kind(cell, kind, observations):
    options = {"lstm_hidden_size": 4, "net_arch": []}
    model = small(policy=f"{kind}{cell}Policy", env=ragged(2, observations=observations), policy_kwargs=options)
    batch = batch_of(model, rollout(model))
    with torch.no_grad():
        now = model.networks.actor.family.log_likelihood(model.networks.actor(batch.inputs), batch.actions)
    torch.testing.assert_close(now, batch.old_log_likelihood, rtol=0, atol=2e-6)
    before = vector(model)
    model.learn(32)
    assert not torch.equal(before, vector(model))
    assert torch.isfinite(vector(model)).all()
    action, state = model.predict(observations.sample(), deterministic=True)
    assert model.action_space.contains(action.item())
    assert [part.shape for part in state] == [(1, 1, 4)] * (2 if cell == "Lstm" else 1)


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"enable_critic_lstm": False, "shared_lstm": True}, ["mlp_extractor", "value_net"]),
        ({"enable_critic_lstm": False}, ["critic", "mlp_extractor", "value_net"]),
        ({}, ["lstm_critic", "mlp_extractor", "value_net"]),
        ({"share_features_extractor": False, "n_lstm_layers": 2}, ["lstm_critic", "mlp_extractor", "value_net"]),
    ],
)
def test_memories_of_the_critic(options, trained):
    model = small(policy_kwargs={**SMALL, **options})
    model.learn(48)
    assert list(dict.fromkeys(name.split(".")[1] for name in model.networks.critic_parameters)) == trained
    actor = {id(p) for p in model.networks.actor_parameters.values()}
    assert not actor & {id(p) for p in model.networks.critic_parameters.values()}
    assert {n.split(".")[1] for n in model.networks.actor_parameters} == {"lstm_actor", "mlp_extractor", "action_net"}


@pytest.mark.parametrize("squash", [False, True])
def test_state_dependent_exploration(squash):
    options = {**SMALL, "squash_output": squash}
    model = small(env=ragged(actions="box"), use_sde=True, sde_sample_freq=4, policy_kwargs=options)
    batch = batch_of(model, rollout(model))
    with torch.no_grad():
        now = model.networks.actor.family.log_likelihood(model.networks.actor(batch.inputs), batch.actions)
    torch.testing.assert_close(now, batch.old_log_likelihood, rtol=1e-4, atol=1e-4)
    before = vector(model)
    model.learn(48)
    assert not torch.equal(before, vector(model))


def test_the_methods_of_a_policy_agree_and_weights_of_sb3_contrib_fit():
    contrib = pytest.importorskip("sb3_contrib")
    env = ragged(actions="box")
    options: dict[str, Any] = {"n_steps": 8, "batch_size": 8, "device": "cpu", "policy_kwargs": SMALL}
    theirs = contrib.RecurrentPPO("MlpLstmPolicy", env, **options).policy
    policy = small(env=env).policy
    policy.load_state_dict(theirs.state_dict())
    E, T = 3, 4
    torch.manual_seed(0)
    observations, actions = torch.randn(E * T, 3), torch.randn(E * T, 2)
    starts = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.float32).flatten()
    states = RNNStates(*(tuple(torch.randn(1, E, 6) for _ in range(2)) for _ in range(2)))
    for mine, other in zip(
        policy.evaluate_actions(observations, actions, states, starts),
        theirs.evaluate_actions(observations, actions, states, starts),
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    mine, other = (p(observations, states, starts, deterministic=True) for p in (policy, theirs))
    torch.testing.assert_close(mine[:3], other[:3], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tuple(mine[3]), tuple(other[3]), rtol=1e-5, atol=1e-6)
    values = policy.predict_values(observations, states.vf, starts)
    torch.testing.assert_close(values, other[1], rtol=1e-5, atol=1e-6)
    row = observations[:E].numpy()
    state, mask = tuple(part.numpy() for part in states.pi), np.array([True, False, False])
    for known in (None, state):
        a, s = policy.predict(row, known, mask, deterministic=True)
        b, r = theirs.predict(row, known, mask, deterministic=True)
        np.testing.assert_allclose(a, b, atol=1e-6)
        for mine, other in zip(s, r):
            np.testing.assert_allclose(mine, other, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- life cycle


def test_predict_with_its_state_does_what_acting_does():
    model = small(env=ragged(actions="box"))
    rollout(model)
    buffer, state = model.rollout_buffer, None
    seen = model.networks.actor(model.networks.actor.prepare(buffer.steps(8)))
    modes = seen[..., :2].detach().clamp(-1, 1).swapaxes(0, 1)
    for t in range(8):
        actions, state = model.predict(buffer.observations[t], state, buffer.episode_starts[t], deterministic=True)
        np.testing.assert_allclose(actions, modes[t], atol=1e-6)
    torch.testing.assert_close(torch.as_tensor(state[0]), buffer.after[:, 0].swapaxes(0, 1), rtol=0, atol=1e-6)
    assert np.array_equal(state[0].swapaxes(0, 1), model._last_states[0][:, 0])
    # one environment alone, without the axis of environments
    alone, _ = model.predict(buffer.observations[0][1], deterministic=True)
    np.testing.assert_allclose(alone, modes[0][1], atol=1e-6)


def test_memories_go_on_from_rollout_to_rollout_and_with_a_callback_that_ends_one():
    class End(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps < 24 + 3 * 5

    model = small()
    model.learn(10**6, callback=End())
    kept = model.rollout_buffer
    assert kept.pos == 5
    seen = kept.steps(5)
    states = []
    with torch.no_grad():
        for head in (model.networks.actor, model.networks.critic):
            p = head.prepare(seen)
            flat, key = p["observations"].flatten(0, 1), "actor" if head is model.networks.actor else "critic"
            run = model.policy.actor_latent if key == "actor" else model.policy.values
            states.append(run(flat, p["starts"], p[key], keep=True)[1][:, -1])
    for mine, expected in zip(model._last_states, states):
        np.testing.assert_allclose(mine, expected, atol=1e-6)
        assert np.abs(mine).sum() > 0


def test_it_is_saved_and_loaded(tmp_path):
    env = ragged()
    model = small(NPG, "MlpGruPolicy", env)
    model.learn(48)
    model.save(tmp_path / "model")
    loaded = NPG.load(tmp_path / "model", env=env)
    assert torch.equal(vector(loaded), vector(model))
    assert type(loaded.rollout_buffer) is SequenceBuffer
    observation = env.observation_space.sample()
    state = tuple(np.ones((1, 1, 6), np.float32) for _ in range(1))
    for m in (loaded, NPG.load(tmp_path / "model")):
        mine, other = (p.predict(observation, state, deterministic=True) for p in (m, model))
        assert np.array_equal(mine[0], other[0])
        assert np.array_equal(mine[1][0], other[1][0])
    loaded.learn(24, reset_num_timesteps=False)
    assert loaded.n_updates == 3
    model.policy.save(str(tmp_path / "policy"))
    policy = type(model.policy).load(str(tmp_path / "policy"))
    assert np.array_equal(policy.predict(observation, state)[1][0], model.predict(observation, state)[1][0])


def test_a_run_that_resumes_goes_on_as_the_undisturbed_one(tmp_path, monkeypatch):
    monkeypatch.setattr("agents.training.FINAL_EPISODES", 1)
    settings = {"n_steps": 16, "policy": "MlpLstmPolicy", "policy_kwargs": SMALL, "target_kl": 0.02}
    options: dict[str, Any] = {"n_envs": 2, "eval_episodes": 1, "device": "cpu", "eval_freq": 10**6}
    options |= {"algo": "trpo", "env": "npg/CartPoleNoVel-v1", "settings": settings}
    one = start(resolve(timesteps=128, **options), tmp_path / "one")
    assert one.config.exact_resume == "state"
    one.train(progress=False)
    start(resolve(timesteps=64, **options), tmp_path / "two").train(progress=False)
    two = resume(tmp_path / "two", timesteps=128)
    memory = two.model._last_states
    assert all(np.abs(part).sum() > 0 for part in memory)
    two.train(progress=False)
    assert torch.equal(vector(one.model), vector(two.model))
    assert all(np.array_equal(a, b) for a, b in zip(one.model._last_states, two.model._last_states))
    assert RunFolder.open(tmp_path / "two").final_timesteps == 128


def test_it_remembers_what_a_plain_policy_cannot_know():
    def learned(policy: str, options: Any) -> float:
        env = DummyVecEnv([Recall] * 16)
        env.seed(0)
        options = {"n_steps": 24, "batch_size": 384, "target_kl": 0.03, "learning_rate": 0.01, **options}
        model = small(TRPO, policy, env, cg_damping=0.01, n_critic_updates=5, **options)
        model.learn(25 * 384)
        return float(model.rollout_buffer.rewards.sum() / (24 * 16 / 3))

    assert learned("MlpLstmPolicy", {"policy_kwargs": {"lstm_hidden_size": 8, "net_arch": []}}) > 0.9
    assert learned("MlpPolicy", {"policy_kwargs": {"net_arch": []}}) < 0.7


# --------------------------------------------------------------------------------------------------------- bad input


def test_what_cannot_go_with_a_memory_is_refused():
    class Mine(MlpLstmPolicy):
        def get_distribution(self, *args: Any) -> Any:
            return super().get_distribution(*args)

    cases: list[tuple[Any, dict[str, Any], str]] = [
        (
            "MlpLstmPolicy",
            {"rollout_buffer_class": buffers.RolloutBuffer},
            "rollout_buffer_class=RolloutBuffer cannot",
        ),
        ("MlpLstmPolicy", {"sub_sampling_factor": 4}, "sub_sampling_factor must be at most the 3 environments"),
        ("MlpLstmPolicy", {"preconditioner": "kfac"}, "preconditioner='kfac' has no factors of the memory"),
        ("MlpLstmPolicy", {"policy_kwargs": {"shared_lstm": True}}, "goes with enable_critic_lstm=False"),
        ("MlpLstmPolicy", {"policy_kwargs": {"lstm_hidden_size": 0}}, "lstm_hidden_size"),
        ("MlpLstmPolicy", {"policy_kwargs": {"n_lstm_layers": 0}}, "n_lstm_layers"),
        ("MlpLstmPolicy", {"policy_kwargs": {"lstm_kwargs": {"dropout": 0.1}}}, "lstm_kwargs is not taken"),
        (Mine, {}, "Mine changes get_distribution"),
        (
            "MlpLstmPolicy",
            {"policy_kwargs": {"shared_lstm": True, "enable_critic_lstm": False, "share_features_extractor": False}},
            "needs share_features_extractor=True",
        ),
    ]
    for policy, options, match in cases:
        with pytest.raises(ValueError, match=match):
            small(TRPO, policy, **options)
    with pytest.raises(ValueError, match="CPO takes no recurrent policy, got MlpLstmPolicy"):
        small(CPO)
    with pytest.raises(ExportError, match="MlpLstmPolicy cannot be exported"):
        DeployedPolicy(small())


@pytest.mark.parametrize(
    ("batch_size", "processes", "fits"), [(48, 3, True), (32, 2, True), (32, 3, False), (8, 2, False)]
)
def test_processes_share_a_mini_batch_in_whole_sequences(batch_size, processes, fits, monkeypatch):
    model = small(env=ragged(6), n_steps=16, batch_size=batch_size)
    monkeypatch.setattr("agents.base.size", lambda _: processes)
    if fits:
        return model.join(None)
    whole = f"of {16 * processes}, whole sequences of 16 steps for each of the {processes} processes"
    with pytest.raises(ValueError, match=f"batch_size must be a multiple {whole} that share it, got {batch_size}"):
        model.join(None)


def test_a_policy_of_sb3_contrib_is_refused_with_the_one_to_take():
    contrib = pytest.importorskip("sb3_contrib.ppo_recurrent")
    with pytest.raises(ValueError, match="such as 'MlpLstmPolicy'"):
        small(TRPO, contrib.MlpLstmPolicy)


def test_what_is_changed_later_is_refused_before_it_acts():
    model = small()
    model.learn(24)
    before = vector(model)
    model.policy.get_distribution = lambda *args: None
    with pytest.raises(ValueError, match="MlpLstmPolicy changes get_distribution"):
        model.learn(24)
    del model.policy.get_distribution
    hook = model.policy.lstm_actor.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="forward hooks, which are not called"):
        model.learn(24)
    hook.remove()
    assert torch.equal(vector(model), before)
    model.policy.action_dist = type("Mine", (type(model.policy.action_dist),), {})(3)
    with pytest.raises(NotImplementedError, match="no action distribution of one's own, got Mine"):
        model.learn(24)


def test_statistics_of_a_features_extractor_stay_as_the_policy_that_acted_had_them():
    class Normed(BaseFeaturesExtractor):
        def __init__(self, space: Any) -> None:
            super().__init__(space, 3)
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    model = small(policy_kwargs={**SMALL, "features_extractor_class": Normed})
    with torch.no_grad():
        model.policy.features_extractor.norm.running_mean.fill_(0.3)
    before = vector(model)
    model.learn(48)
    assert not torch.equal(vector(model), before)
    assert torch.equal(model.policy.features_extractor.norm.running_mean, torch.full((3,), 0.3))


def test_predict_refuses_states_of_another_shape():
    model, observations = small(), np.zeros((3, 3), np.float32)
    good = tuple(np.zeros((1, 3, 6), np.float32) for _ in range(2))
    for state in (good[:1], tuple(part[:, :2] for part in good), tuple(part[0] for part in good)):
        with pytest.raises(ValueError, match="state must be 2 arrays of shape"):
            model.predict(observations, state)
    with pytest.raises(ValueError, match=r"episode_start must have shape \(3,\)"):
        model.predict(observations, good, np.zeros(2, bool))


def test_all_policies_are_known_by_name():
    assert list(POLICIES) == [
        *("MlpLstmPolicy", "CnnLstmPolicy", "MultiInputLstmPolicy"),
        *("MlpGruPolicy", "CnnGruPolicy", "MultiInputGruPolicy"),
    ]
    assert all(POLICIES[name] is TRPO.policy_aliases[name] for name in POLICIES)


# ----------------------------------------------------------------------------------------------------- two processes


@pytest.mark.slow
def test_two_processes_learn_as_one(two_processes, tmp_path):
    one, other = two_processes(__file__, tmp_path)
    assert torch.equal(one["policy"], other["policy"])
    assert not torch.equal(one["memory"], other["memory"])
    assert not torch.equal(one["policy"], one["before"])


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    env = ragged(2)
    env.seed(rank)
    model = small(env=env, seed=rank, batch_size=16)
    model.join(dist.group.WORLD)
    before = vector(model)
    model.learn(3 * 32)
    saved = {"policy": vector(model), "before": before, "memory": torch.as_tensor(model._last_states[0])}
    torch.save(saved, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
