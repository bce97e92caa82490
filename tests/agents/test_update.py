"""One update: which rows the Fisher sees, what stands still, and that it is taken whole or not at all."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from agents import MDPO, NPG, TRPO, natural_step
from agents import critic as critics
from agents.buffer import random_part
from agents.critic import AdamCritic
from agents.update import batch_of, copy_of_state, critic_of

torch.set_num_threads(1)

ALGORITHMS = [TRPO, NPG, MDPO]
CRITICS = ["adam", "natural"]


def filled(cls: Any = TRPO, env: str = "CartPole-v1", **kwargs: Any) -> Any:
    """An agent with one rollout, not yet trained on."""
    options = {"n_steps": 64, "batch_size": 32, "n_critic_updates": 2, "seed": 0, "device": "cpu"}
    model = cls("MlpPolicy", make_vec_env(env, 2, seed=0), **{**options, **kwargs})
    model.set_logger(Logger(None, []))
    _, callback = model._setup_learn(10**6)
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


def refilled(model: Any) -> Any:
    """The agent with its next rollout."""
    callback = model._init_callback(None)
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


def state_of(model: Any) -> dict[str, Any]:
    """All that an update may move."""
    names, _ = model._get_torch_save_params()
    owners = {"policy": model.policy, "policy.optimizer": model.policy.optimizer}
    if "actor_optimizer" in names:
        owners["actor_optimizer"] = model.actor_optimizer
    assert sorted(owners) == sorted(names)
    states = {name: copy_of_state(owner) for name, owner in owners.items()}
    return states | {
        "damping": model.critic_damping,
        "updates": model._n_updates,
        "variance": tuple(model.advantage_variance),
        "refused": model.refused_steps,
    }


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------------------------------------------- the Fisher's rows


@pytest.mark.parametrize("critic", CRITICS)
def test_fisher_sees_all_times_of_the_rollout(critic, monkeypatch):
    """Rows carry the step at which they were collected; a quarter of them must be spread over all quarters."""
    model = filled(critic=critic, fisher_fraction=0.25, n_steps=256, n_critic_updates=2)
    steps, envs = model.rollout_buffer.buffer_size, model.rollout_buffer.n_envs
    model.rollout_buffer.observations[..., 0] = np.arange(steps)[:, None] / steps
    seen = []
    for module in (natural_step, critics):
        step = module.natural_step

        def watched(*args, step=step, **kwargs):
            seen.append(kwargs["curvature_inputs"][:, 0].clone())
            return step(*args, **kwargs)

        monkeypatch.setattr(module, "natural_step", watched)
    model.train()
    assert len(seen) == (1 if critic == "adam" else 3)  # the actor, and two steps of a natural critic
    for times in seen:
        assert len(times) == steps * envs // 4
        counts = torch.histc(times, 4, 0, 1)
        # hypergeometric, 32 of 128 in each quarter: a standard deviation of 4.2
        assert (counts - 32).abs().max() <= 5 * 4.2
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_fisher_on_a_part_is_that_of_the_whole_in_expectation():
    """The dense Fisher of the critic, averaged over draws: the first steps alone are far from it."""
    model = filled(critic="natural", fisher_fraction=0.25, n_steps=128, policy_kwargs={"net_arch": []})
    inputs = model.networks.critic.prepare(torch.as_tensor(model.rollout_buffer.observations).flatten(0, 1)).double()
    inputs[:, 0] += torch.linspace(-5, 5, len(inputs))  # what drifts in the course of a rollout

    def gram(x: torch.Tensor) -> torch.Tensor:
        return x.T @ x / len(x)

    whole = gram(inputs)
    drawn = torch.stack([gram(random_part(inputs, 0.25)) for _ in range(300)])
    error = (drawn.mean(0) - whole).abs()
    assert (error <= 5 * drawn.std(0) / 300**0.5 + 1e-12).all()
    assert (gram(inputs[: len(inputs) // 4]) - whole).abs().max() > 50 * error.max()


def test_same_seed_same_run_with_a_part_of_the_batch():
    runs = []
    for _ in range(2):
        model = filled(critic="natural", fisher_fraction=0.25, sub_sampling_factor=2)
        model.train()
        runs.append(state_of(model))
    assert_same(*runs)


# ---------------------------------------------------------------------------- what stands still while the critic learns


class Normalized(BaseFeaturesExtractor):
    """BatchNorm without parameters of its own, which no gradient finds, and a spectral norm with vectors of its own."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, 8)
        self.norm = nn.BatchNorm1d(observation_space.shape[0], affine=False)
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(observation_space.shape[0], 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(self.norm(x)))


class Counting(BaseFeaturesExtractor):
    """Its mean moves in every forward pass, whatever the mode; it is used without a call of the module."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, observation_space.shape[0])
        self.register_buffer("mean", torch.zeros(observation_space.shape[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = self.mean + 0.1 * (x.detach().mean(0) - self.mean)
        return x - self.mean


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("extractor", [Normalized, Counting])
def test_the_policy_after_an_update_is_the_one_whose_kl_was_measured(algorithm, critic, extractor):
    model = filled(algorithm, critic=critic, policy_kwargs={"features_extractor_class": extractor})
    inputs = torch.as_tensor(model.rollout_buffer.observations).flatten(0, 1)

    def outputs() -> torch.Tensor:
        kept = copy.deepcopy(model.policy)
        with torch.no_grad():
            result = model.networks.actor(inputs)
        model.policy.load_state_dict(kept.state_dict())  # as if nobody had looked
        return result

    old = outputs()
    model.train()
    logged = model.logger.name_to_value
    assert logged["train/accepted"] == 1.0
    assert logged["train/kl"] == pytest.approx(float(model.networks.actor.family.kl(old, outputs()).mean()), rel=1e-3)


@pytest.mark.parametrize("critic", CRITICS)
def test_statistics_of_the_critic_alone_move_and_shared_ones_if_told_to(critic):
    def moved(**kwargs: Any) -> set[str]:
        options = {"features_extractor_class": Normalized, **kwargs.pop("policy_kwargs", {})}
        model = filled(critic=critic, policy_kwargs=options, **kwargs)
        before = {name: b.clone() for name, b in model.policy.named_buffers()}
        model.train()
        assert not any(m.training for m in model.policy.modules())
        return {name.split(".")[0] for name, b in model.policy.named_buffers() if not torch.equal(b, before[name])}

    assert moved() == set()
    assert moved(train_shared_features=True) == {"features_extractor"}
    assert moved(policy_kwargs={"share_features_extractor": False}) == {"vf_features_extractor"}


@pytest.mark.parametrize("extractor", [Normalized, Counting])
def test_they_are_put_back_after_an_error_too(extractor):
    model = filled(policy_kwargs={"features_extractor_class": extractor})
    observations = next(model.rollout_buffer.get(batch_size=None)).observations
    before = {name: b.clone() for name, b in model.policy.named_buffers()}

    def broken_off() -> None:
        with critics.fixed_statistics_of_the_actor(model.networks, observations, moving=False) as fixed:
            for module in fixed:
                for name, buffer in list(module.named_buffers(recurse=False)):
                    if buffer.is_floating_point():
                        setattr(module, name, buffer + 1)
            assert any(not torch.equal(b, before[name]) for name, b in model.policy.named_buffers())
            raise KeyError

    with pytest.raises(KeyError):
        broken_off()
    assert all(torch.equal(b, before[name]) for name, b in model.policy.named_buffers())


# ------------------------------------------------------------------------------------------------- whole, or not at all


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_mdpo_refuses_a_batch_as_a_whole_and_goes_on(value):
    """1e30: the gradient is finite, and its square, which Adam keeps, is not."""
    model = filled(MDPO, normalize_advantage=False, n_critic_updates=0)
    model.train()  # Adam has moments to lose
    refilled(model)
    model.rollout_buffer.advantages[3, 0] = value
    before = state_of(model)
    model.train()
    assert model.logger.name_to_value["train/accepted"] == 0.0
    assert_same(state_of(model), before | {"updates": 2, "refused": 1})
    refilled(model).train()
    logged = model.logger.name_to_value
    assert logged["train/accepted"] == 1.0
    assert logged["train/actual_gain"] > 0
    assert logged["train/step_norm"] > 1e-3


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("critic", CRITICS)
def test_an_update_whose_critic_fails_changes_nothing_and_the_next_one_learns(algorithm, critic):
    model = filled(algorithm, critic=critic)
    model.train()
    refilled(model)
    good = model.rollout_buffer.returns.copy()
    before = state_of(model)
    model.rollout_buffer.returns[3, 0] = np.nan
    with pytest.raises(FloatingPointError, match=r"critic's loss is not finite in update 2: rewards or observations"):
        model.train()
    assert_same(state_of(model), before)
    model.rollout_buffer.returns[:] = good
    model.train()
    assert model._n_updates == 2
    assert np.isfinite(model.logger.name_to_value["train/value_loss"])
    assert not torch.equal(model.policy.value_net.weight, before["policy"]["value_net.weight"])


@pytest.mark.parametrize("critic", CRITICS)
def test_a_failed_update_does_not_count_in_the_running_deviation(critic):
    model = filled(critic=critic, advantage_deviation="running")
    model.train()
    before = state_of(model)
    assert before["variance"][0] == 1
    assert before["variance"][1] > 0
    refilled(model).rollout_buffer.returns[3, 0] = np.nan
    with pytest.raises(FloatingPointError, match="critic's loss"):
        model.train()
    assert_same(state_of(model), before)


def test_moments_that_overflow_are_not_kept():
    model = filled()
    before = state_of(model)
    model.rollout_buffer.returns[:] = 1e19  # the loss is finite, and the square of its gradient is not
    with pytest.raises(FloatingPointError, match="critic's loss"):
        model.train()
    assert_same(state_of(model), before)


def test_an_interrupt_changes_nothing(monkeypatch):
    model = filled(policy_kwargs={"features_extractor_class": Normalized, "share_features_extractor": False})
    before = state_of(model)
    fit = AdamCritic.fit

    def interrupted(*args: Any) -> float:
        fit(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(AdamCritic, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.train()
    assert_same(state_of(model), before)


# ------------------------------------------------------------------------------------ how long a step is without a gain


def surrogate_advantages(model: Any, values: np.ndarray) -> torch.Tensor:
    model.rollout_buffer.advantages[:] = values
    rollout = next(model.rollout_buffer.get(batch_size=None))
    return batch_of(model, rollout).advantages


def test_running_deviation_is_the_root_mean_square_over_all_updates(tmp_path):
    model = filled(advantage_deviation="running")
    noise = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    variances = []
    for deviation in (2.0, 0.01, 3.0):
        variances.append(deviation**2)
        advantages = surrogate_advantages(model, deviation * noise + 5.0)
        # the size of the advantages is kept in units of all that were seen
        expected = torch.as_tensor(deviation * noise / np.sqrt(np.mean(variances))).T.flatten()
        torch.testing.assert_close(advantages.sort().values.double(), expected.sort().values, rtol=1e-5, atol=1e-5)
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", env=model.env)
    assert loaded.advantage_deviation == "running"
    np.testing.assert_allclose(loaded.advantage_variance, [3, np.mean(variances)], rtol=1e-6)
    assert tuple(filled().advantage_variance) == (0, 0.0)


def test_trpo_with_a_step_size_is_natural_policy_gradient_within_the_radius():
    def moved(model: Any) -> tuple[torch.Tensor, dict[str, float]]:
        model.train()
        return nn.utils.parameters_to_vector(model.policy.parameters()), model.logger.name_to_value

    fixed, _ = moved(filled(NPG, step_size=1e-3, n_critic_updates=0))
    capped, log = moved(filled(TRPO, step_size=1e-3, n_critic_updates=0))
    assert log["train/backtracks"] == 0
    assert log["train/kl"] < 0.5 * 0.01
    torch.testing.assert_close(capped, fixed, rtol=0, atol=0)
    whole, log = moved(filled(TRPO, n_critic_updates=0))
    assert log["train/predicted_kl"] == pytest.approx(0.01, rel=0.2)
    torch.testing.assert_close(moved(filled(TRPO, step_size=1e6, n_critic_updates=0))[0], whole, rtol=0, atol=0)


def test_a_capped_step_shrinks_with_the_advantages_and_a_full_one_does_not():
    """Where all episodes go well what is left of the advantages is noise: it should move the policy little."""
    norms = {}
    for step_size in (None, 1e-3):
        for size in (1.0, 1e-3):
            model = filled(advantage_deviation="running", step_size=step_size, n_critic_updates=0)
            model.advantage_variance = (99, 1.0)
            noise = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
            model.rollout_buffer.advantages[:] = size * noise
            model.train()
            norms[step_size, size] = model.logger.name_to_value["train/step_norm"]
    assert norms[None, 1e-3] == pytest.approx(norms[None, 1.0], rel=1e-2)
    assert norms[1e-3, 1e-3] == pytest.approx(1e-3 * norms[1e-3, 1.0], rel=1e-2)


# ------------------------------------------------------------------------------------ steps that are refused in a row


#: A step that leaves so large a radius after one trial; a shorter one, along the gradient, gains.
TOO_FAR = {"target_kl": 20.0, "line_search_max_iter": 1, "cg_damping": 1e-7, "n_critic_updates": 0}


def trained(model: Any, updates: int, monkeypatch: Any) -> list[Any]:
    """The reports of the actor's steps in so many updates."""
    reports = []
    with monkeypatch.context() as patch:
        step = natural_step.natural_step
        patch.setattr(
            natural_step, "natural_step", lambda *args, **kw: reports.append(step(*args, **kw)) or reports[-1]
        )
        for _ in range(updates):
            model.train()
            refilled(model)
    return reports


@pytest.mark.filterwarnings("ignore:the last")
def test_refused_steps_in_a_row_raise_the_damping_until_one_is_taken(monkeypatch):
    model = filled(**TOO_FAR, max_refusals=2)
    reports = trained(model, 14, monkeypatch)
    refused = 0
    for report in reports:
        raised = 1e-7 if refused < 2 else 1e-3 * 10.0 ** (refused - 1)
        assert report.damping == pytest.approx(raised, rel=1e-12)
        refused = 0 if report.accepted else refused + 1
    assert model.refused_steps == refused
    accepted = [report.accepted for report in reports]
    taken = accepted.index(True)
    assert taken >= 2, "this case is made so that the usual damping takes no step"
    assert reports[taken + 1].damping == 1e-7

    never = filled(**TOO_FAR, max_refusals=0)
    assert not any(r.accepted or r.damping != 1e-7 for r in trained(never, 6, monkeypatch))


def test_raised_damping_is_told_until_it_is_raised_no_further():
    model = filled(cg_damping=0.1)
    for refused, told in ((2, None), (3, "1 in"), (4, "10 in"), (10, "1e+07 in"), (11, None)):
        model.refused_steps = refused
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            damping = model._raised(0.1)
        assert damping == pytest.approx(0.1 * 10 ** min(8, max(0, refused - 2)))
        said = [str(w.message) for w in caught]
        assert said == [] if told is None else f"last {refused} steps" in said[0] and f"damping {told}" in said[0]


@pytest.mark.filterwarnings("ignore:the last")
def test_refusals_go_on_in_a_saved_agent_and_not_through_an_error(tmp_path, monkeypatch):
    whole = filled(**TOO_FAR)
    trained(whole, 3, monkeypatch)
    assert whole.refused_steps == 3
    whole.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", env=whole.env)
    assert loaded.refused_steps == 3
    loaded.set_logger(Logger(None, []))
    loaded._last_obs, loaded._last_episode_starts = whole._last_obs, whole._last_episode_starts
    loaded.rollout_buffer = copy.deepcopy(whole.rollout_buffer)
    for model in (whole, loaded):
        model.train()
    assert_same(state_of(whole), state_of(loaded))
    assert whole.refused_steps == 0  # of the raised damping, which both had

    whole.refused_steps = 2
    before = state_of(whole)
    refilled(whole)
    monkeypatch.setattr(AdamCritic, "fit", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        whole.train()
    assert_same(state_of(whole), before)


# ---------------------------------------------------------------------------------------- what is not finite, and where


class Poisoned:
    """Makes an observation, or a reward, of environment 1 NaN in step 17."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, env: Any) -> Any:
        step, steps = env.step_wait, iter(range(1000))

        def step_wait() -> Any:
            observations, rewards, dones, infos = step()
            if next(steps) == 17:
                (observations if self.what == "observation" else rewards)[1] = np.nan
            return observations, rewards, dones, infos

        env.step_wait = step_wait
        return env


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize(("what", "step"), [("observation", 18), ("reward", 17)])
def test_what_is_not_finite_in_training_is_named(env, what, step):
    venv = Poisoned(what)(make_vec_env(env, 2, seed=0))
    model = TRPO("MlpPolicy", venv, n_steps=64, seed=0, device="cpu")
    before = state_of(model)
    with pytest.raises(FloatingPointError, match=rf"{what} of environment 1 is not finite in step {step} .*: correct"):
        model.learn(128)
    assert_same(state_of(model), before)


def test_other_errors_stay_what_they_were():
    def failing(*_: Any) -> Any:
        raise RuntimeError("out of order")

    model = filled()
    model.env.step_wait = failing
    with pytest.raises(RuntimeError, match=r"^out of order$"):
        model.learn(64)


# ------------------------------------------------------------------------------------------------------- Adam's options


@pytest.mark.parametrize("option", [{}, {"amsgrad": True}, {"maximize": True}, {"capturable": True}, {"eps": 1e-7}])
def test_fused_adam_gives_the_numbers_of_the_plain_one(option):
    after = []
    for fused in (None, False):
        if option.get("capturable") and fused is False:
            option = {}  # PyTorch has no other kernel for it on a CPU
        kwargs = {"optimizer_kwargs": {**option, **({} if fused is None else {"fused": False})}}
        model = filled(policy_kwargs=kwargs)
        assert model.policy.optimizer.param_groups[0]["fused"] is (fused is None)
        model.train()
        after.append(torch.cat([p.detach().flatten() for p in model.networks.critic_parameters.values()]))
    torch.testing.assert_close(*after, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("foreach", [True, False])
def test_another_way_of_adam_is_left_alone(foreach):
    model = filled(policy_kwargs={"optimizer_kwargs": {"foreach": foreach}})
    model.train()
    assert model.policy.optimizer.param_groups[0]["fused"] is None
    assert model.policy.optimizer.param_groups[0]["foreach"] is foreach


def test_other_optimizers_are_left_alone_and_differentiable_ones_refused_by_name():
    class Own(torch.optim.Adam):
        pass

    for optimizer in (Own, torch.optim.AdamW):
        model = filled(policy_kwargs={"optimizer_class": optimizer})
        assert not model.policy.optimizer.param_groups[0].get("fused")
    for optimizer in (torch.optim.Adam, torch.optim.SGD):
        options = {"optimizer_class": optimizer, "optimizer_kwargs": {"differentiable": True}}
        with pytest.raises(ValueError, match=r"optimizer_kwargs has differentiable=True.*leave it out"):
            filled(policy_kwargs=options)


def test_a_natural_critic_sees_gains_that_float32_would_round_away(monkeypatch):
    """A common error of 3·10⁻⁴ beside a noise of 1 that no linear critic fits: the gain is 4·10⁻⁸ nats."""
    model = filled(critic="natural", n_critic_updates=1, policy_kwargs={"net_arch": []})
    reports, step = [], critics.natural_step

    def noted(*args, **kwargs):
        reports.append(step(*args, **kwargs))
        return reports[-1]

    monkeypatch.setattr(critics, "natural_step", noted)
    observations = torch.as_tensor(model.rollout_buffer.observations).reshape(128, 4)
    features = torch.cat([observations, torch.ones(128, 1)], 1).double()
    noise = torch.randn(128, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = noise - features @ torch.linalg.lstsq(features, noise).solution
    with torch.no_grad():
        returns = model.policy.predict_values(observations) + (noise + 3e-4).float()
    critic_of(model).fit(observations, returns.squeeze(1))
    (report,) = reports
    assert report.accepted
    assert report.actual_gain == pytest.approx(report.predicted_gain, rel=0.1)
