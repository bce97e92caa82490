"""CPO: the limit on what an episode costs, its critic, and what is TRPO's to the last bit.

Run as a script, this file is one of two processes that learn together.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from functools import partial
from math import inf, nan
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
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from agents import CPO, TRPO, cpo
from agents.callbacks import Evaluator
from agents.cli import train_agent
from agents.config import resolve
from agents.cpo import CostError
from agents.evaluation import Evaluation, evaluate, table
from agents.heads import CriticHead
from agents.training import start
from agents.update import batch_of, copy_of_state
from npg import acceleration
from npg.runs.files import read_rows
from npg.runs.signals import StopRequest

torch.set_num_threads(1)

#: Policies that KL is measured for, of each structure; NPG_POLICIES=1000 takes so many.
COUNT = int(os.environ.get("NPG_POLICIES", "21"))


class Costly(gym.Env):
    """Twenty steps; to push to the right pays, and costs 1. Some episodes end early, and the others by their time."""

    observation_space: spaces.Space = spaces.Box(-1.0, 1.0, (3,), np.float32)

    def __init__(self, discrete: bool = False, price: Any = 1.0, early: float = 0.0) -> None:
        self.action_space: Any = spaces.Discrete(3) if discrete else spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.price, self.early = price, early

    def _observe(self) -> Any:
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        push = float(np.ravel(action)[0]) - (1.0 if self.action_space.shape == () else 0.0)
        over = bool(self.np_random.random() < self.early)
        info = {} if self.price is None else {"cost": self.price * (push > 0)}
        return self._observe(), push, over, not over and self.steps == 20, info


def costly(n_envs: int = 4, **options: Any) -> DummyVecEnv:
    env = DummyVecEnv([lambda: Costly(**options)] * n_envs)
    env.seed(0)
    return env


def small(cls: Any = CPO, env: Any = None, **options: Any) -> Any:
    defaults = {"n_steps": 40, "batch_size": 80, "n_critic_updates": 3, "seed": 0, "device": "cpu"}
    model = cls("MlpPolicy", env or costly(), **{**defaults, **options})
    model.set_logger(Logger(None, []))
    return model


def vector(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.policy.parameters()])


def logged(model: Any, timesteps: int) -> list[dict[str, float]]:
    """Train, and what every update logged."""
    rows, train = [], model.train

    def noted() -> None:
        train()
        rows.append(dict(model.logger.name_to_value))

    model.train = noted
    model.learn(timesteps, log_interval=10**9)
    del model.train
    return rows


def test_a_frozen_actor_has_no_step_in_the_log():
    model = small(cost_limit=3.0)
    of_the_step = {f"train/{name}" for name in ("predicted_cost", "actual_cost", "limit_bound", "limit_infeasible")}
    assert logged(model, 160)[-1].keys() > of_the_step
    for name, p in model.policy.named_parameters():
        p.requires_grad_("value" in name)
    model.set_logger(Logger(None, []))
    row = logged(model, 160)[-1]
    assert (row["train/accepted"], row["train/kl"], row["train/step_norm"]) == (0.0, 0.0, 0.0)
    assert not of_the_step & row.keys()
    assert row["train/cost_value_loss"] > 0  # the cost critic is trained all the same


# ---------------------------------------------------------------------------------------------------------- evaluation


class Noted(Costly):
    """Notes what each episode costs, beginning with one that is not over."""

    def reset(self, **kwargs: Any) -> Any:
        self.__dict__.setdefault("paid", []).append(0.0)
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        result = super().step(action)
        self.paid[-1] += result[4].get("cost", 0.0)
        return result


def test_an_evaluation_has_the_costs_of_its_episodes():
    makers = [lambda: Monitor(Noted(price=1.5, early=0.1))] * 3
    env, model = DummyVecEnv(makers), small()
    model.learn(160)
    found = evaluate(model, env, 9, seed=3)
    paid = [cost for costs in env.get_attr("paid") for cost in costs[:3]]
    assert sorted(found.costs) == sorted(paid)
    assert len(set(paid)) > 2
    assert found.mean_cost == found.summary["mean_cost"] == pytest.approx(np.mean(paid))
    lines = table([("last model", found)]).splitlines()
    assert re.search(r"min … max +cost +length", lines[0])
    assert re.search(rf" {np.mean(paid):.1f} +{found.mean_length:.0f} +9 ", lines[2])


@pytest.mark.parametrize("price", [None, "much", [1.0, 2.0]])
def test_what_is_no_cost_is_not_summed(price):
    class Other(Costly):
        def step(self, action: Any) -> Any:
            *result, info = super().step(action)
            return *result, info | ({} if price is None else {"cost": price})

    env = DummyVecEnv([lambda: Monitor(Other(price=None))])
    found = evaluate(TRPO("MlpPolicy", env, seed=0, device="cpu"), env, 2, seed=3)
    assert (found.costs, found.mean_cost) == ((), None)
    assert "mean_cost" not in found.summary
    assert "cost" not in table([("last model", found)])


@pytest.mark.parametrize(
    ("limit", "played", "best"),
    [
        (5.0, [(1.0, 9.0), (3.0, 6.0), (9.0, 8.0), (2.0, 5.0), (4.0, 4.0), (3.0, 0.0), (8.0, 5.5)], 4),
        (5.0, [(1.0, 9.0), (3.0, 6.0), (9.0, 8.0)], 1),
        (inf, [(1.0, 9.0), (3.0, 6.0), (2.0, 0.0)], 1),
    ],
)
def test_the_best_agent_keeps_the_limit_before_it_gains(limit, played, best, tmp_path, monkeypatch):
    """Also where a run goes on in the middle."""
    settings = {"env_kwargs.limit": 1.0, "cost_limit": limit, "n_steps": 8, "policy_kwargs.net_arch": [8]}
    options = {"timesteps": 64, "n_envs": 1, "backend": "gymnasium", "device": "cpu", "seed": 0}
    run = start(resolve("cpo", "npg/SwimmerVelocity-v5", settings=settings, **options), tmp_path / "run")
    run.model.set_logger(Logger(None, []))
    saved, rest = [], iter(enumerate(played))

    def pretend(*_: Any, **__: Any) -> Evaluation:
        i, (gained, cost) = next(rest)
        saved.append(i)
        return Evaluation(i, (gained,), (1,), 0.0, True, 0, (cost,))

    monkeypatch.setattr("agents.callbacks.evaluate", pretend)
    monkeypatch.setattr("agents.callbacks.save_agent", lambda _, files: files.model.write_text(str(saved[-1])))
    for _ in played:
        evaluator = Evaluator(run.config, run.folder, None, StopRequest(run.world))
        evaluator.init_callback(run.model)
        evaluator.evaluate()
    assert run.folder.best.model.read_text() == str(best)


# ------------------------------------------------------------------------------------------------------- against TRPO


@pytest.mark.parametrize(
    ("price", "limit", "options"),
    [
        (None, inf, {}),
        (nan, inf, {}),
        (0.0, 25.0, {}),
        (0.0, 0.0, {"sub_sampling_factor": 2, "fisher_fraction": 0.5}),
        (0.0, 1.0, {"critic": "natural"}),
        (0.0, 1.0, {"use_sde": True, "sde_sample_freq": 4}),
    ],
)
@pytest.mark.slow
def test_without_costs_or_a_limit_a_whole_training_is_trpo_s_to_the_last_bit(price, limit, options):
    ours = small(CPO, costly(price=price, early=0.02), cost_limit=limit, **options)
    ours.learn(5 * 160)
    theirs = small(TRPO, costly(price=price, early=0.02), **options)
    before = vector(theirs).clone()
    theirs.learn(5 * 160)
    assert not torch.equal(before, vector(theirs))
    assert torch.equal(vector(ours), vector(theirs))
    assert (ours.episode_cost == 0) == (limit < inf)


def test_the_programs_of_the_cost_critic_are_kept_from_update_to_update(accelerated, monkeypatch):
    traces, straight_line = [], acceleration.straight_line
    monkeypatch.setattr(acceleration, "straight_line", lambda *args: (traces.append(1), straight_line(*args))[1])
    model = small(CPO, costly(), cost_limit=3.0)
    model.learn(160)
    first = len(traces)
    assert first == 3  # to act, and for each of the two critics
    model.learn(3 * 160, reset_num_timesteps=False)
    assert len(traces) == first
    model.cost_policy = model.policy_class(model.observation_space, model.action_space, model.lr_schedule)
    model.learn(160, reset_num_timesteps=False)  # another one has its own
    assert len(traces) == first + 1


class Choices(Costly):
    """Three actions with two features; the first one pays, and costs where it is positive."""

    observation_space = spaces.Box(-10.0, 10.0, (3, 3), np.float32)

    def _observe(self) -> Any:
        self.features = self.np_random.uniform(-1, 1, (3, 3)).astype(np.float32)
        self.features[:, 0] = 1  # legal
        return self.features

    def step(self, action: Any) -> Any:
        gain = float(self.features[int(action), 1])
        observation, _, *ends, _ = super().step(action)
        return observation, gain, *ends, {"cost": float(gain > 0)}


def test_what_the_cost_critic_reads_and_does_not_learn_is_the_actor_s():
    env = DummyVecEnv([lambda: Choices(discrete=True)] * 2)
    model = CPO("AfterstatePolicy", env, n_steps=40, seed=0, cost_limit=16.0, target_kl=0.05)
    model.learn(160)
    acting = model.policy.theta
    assert acting.abs().min() > 0.1
    torch.testing.assert_close(model.cost_policy.theta, acting, rtol=0, atol=0)
    assert model.cost_policy.value_net.weight.abs().max() > 0  # and what it learns stays its own
    assert not torch.equal(model.cost_policy.value_net.weight, model.policy.value_net.weight)


@pytest.mark.parametrize("name", ["policy", "cost_policy"])
def test_a_module_of_a_critic_that_was_replaced_is_trained(name):
    model = small(CPO, costly(2), cost_limit=3.0, learning_rate=1e-2)
    getattr(model, name).value_net = new = torch.nn.Linear(64, 1)
    before = new.weight.detach().clone()
    for _ in range(2):
        model.learn(80)
        assert (new.weight - before).abs().max() > 1e-3
        before = new.weight.detach().clone()


def test_the_cost_critic_draws_what_no_other_run_or_update_draws(monkeypatch):
    seeds, separate = [], cpo.separate_randomness
    for seed in range(3):
        model = small(CPO, costly(), cost_limit=3.0, seed=seed)
        with monkeypatch.context() as patch:
            patch.setattr(cpo, "separate_randomness", lambda *given: (seeds.append(given[1]), separate(*given))[1])
            model.learn(3 * 160)
    assert len(seeds) == 9
    assert len({*range(6), *seeds}) == 15


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.slow
def test_the_cost_stays_near_its_limit_where_trpo_s_goes_to_the_top(discrete):
    env = costly(8, discrete=discrete)
    options = {"n_steps": 40, "target_kl": 0.02, "n_critic_updates": 5}
    limited = logged(small(CPO, env, cost_limit=8.0, **options), 40 * 320)
    costs = [row["train/episode_cost"] for row in limited]
    free = logged(small(CPO, costly(8, discrete=discrete), cost_limit=1e6, **options), 40 * 320)
    assert free[-1]["train/episode_cost"] > 16
    assert np.mean(costs[-15:]) < 9
    assert max(costs[-15:]) < 12
    assert min(costs[-15:]) > 4  # and it is not given up
    assert any(row["train/limit_bound"] for row in limited)
    assert not any(row["train/limit_bound"] for row in free)


def test_a_policy_far_beyond_the_limit_comes_back():
    """Every step is first the one that lowers the cost most; the steps say so."""
    model = small(CPO, costly(8), cost_limit=3.0, target_kl=0.02)
    with torch.no_grad():
        model.policy.action_net.bias[0] = 1.5
    rows = logged(model, 40 * 320)
    costs = [row["train/episode_cost"] for row in rows]
    assert costs[0] > 15
    assert rows[0]["train/limit_infeasible"] == 1
    assert rows[0]["train/predicted_cost"] < 0
    assert rows[0]["train/actual_cost"] < 0
    assert np.mean(costs[-10:]) < 4.5


@pytest.mark.slow
def test_small_rollouts_keep_the_limit_in_the_mean_with_the_correction_and_not_without():
    """Forty steps tell little of a gradient: the step that they choose does less to the cost than they tell."""
    means = []
    for rate in (0.0, 0.1):
        model = small(CPO, costly(2), cost_limit=6.0, n_steps=20, target_kl=0.05, cost_correction=rate)
        rows = logged(model, 60 * 40)
        means.append(np.mean([row["train/episode_cost"] for row in rows[-30:]]))
        assert (model.cost_error > 0) == (rate > 0)
    assert means[0] > 6.8
    assert 4.8 < means[1] < 6.5


def test_a_callback_that_looks_at_mini_batches_changes_nothing():
    """Costs are in the order of the steps, so the rows of the rollout have to stay in it."""

    class Look(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            list(self.model.rollout_buffer.get(16))

    plain, looked = (
        everything(small(CPO, costly(2, early=0.1), cost_limit=6.0).learn(240, look)) for look in (None, Look())
    )
    assert_same(plain, looked)


def test_the_error_of_predicted_costs_is_averaged(monkeypatch):
    """With the costs of episodes and the surrogate's changes as they come, written out."""
    given, constraint = [], cpo.Constraint
    monkeypatch.setattr(cpo, "Constraint", lambda cost, excess: (given.append(excess), constraint(cost, excess))[1])
    model = small(CPO, costly(2), n_steps=20, cost_limit=6.0, cost_correction=0.25)
    _, callback = model._setup_learn(10**6, None)
    before, error = None, 0.0
    for _ in range(6):
        assert model.collect_rollouts(model.env, callback, model.rollout_buffer, 20)
        if before is not None:
            error = 0.75 * error + 0.25 * (model.episode_cost - before)
        assert model.cost_error == pytest.approx(error)
        model.train()
        assert given[-1] == pytest.approx(model.episode_cost + max(error, 0.0) - 6.0)
        report = model._report
        aim = min(model.episode_cost, 6.0 - max(error, 0.0))
        before = max(model.episode_cost + report.actual_cost, aim) if report.accepted else model.episode_cost
    assert error != 0
    assert len(given) == 6


def test_a_step_is_expected_to_do_no_more_than_it_was_asked_for(monkeypatch):
    """A cost critic far off tells of steps that make an episode cost less than nothing; that is no error to learn."""
    model = small(CPO, costly(2), n_steps=20, cost_limit=6.0)
    _, callback = model._setup_learn(10**6, None)
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, 20)
    batch, step = batch_of(model, next(model.rollout_buffer.get(None))), model.step_in_region
    # what an episode cost and the error so far, what the step tells, and what is expected then
    cases = [
        (20.0, 1.0, -500.0, 5.0),
        (20.0, 0.0, -500.0, 6.0),
        (4.0, 0.0, -500.0, 4.0),
        (4.0, 0.0, 2.0, 6.0),
        (9.0, -3.0, -1.0, 8.0),
    ]
    for cost, error, told, expected in cases:
        taken = partial(replace, accepted=True, actual_cost=told)
        monkeypatch.setattr(
            model, "step_in_region", lambda *args, taken=taken, **options: taken(step(*args, **options))
        )
        model.episode_cost = model._expected_cost = cost
        model.cost_error = error
        model.actor_step(batch)
        assert model._expected_cost == expected
    model.cost_correction, model._expected_cost, model.cost_error = 0, 9.0, 1.0  # what was learnt before has no part
    monkeypatch.setattr(
        model, "step_in_region", lambda *a, **k: replace(step(*a, **k), accepted=True, actual_cost=-500.0)
    )
    model.actor_step(batch)
    assert model._expected_cost == 6.0


def test_where_no_episode_ends_a_step_goes_on_from_what_the_last_was_to_reach(monkeypatch):
    """Planned on the episodes of four rollouts ago, each of four steps would lower the cost by all of the excess."""
    given, constraint = [], cpo.Constraint
    monkeypatch.setattr(cpo, "Constraint", lambda cost, excess: (given.append(excess), constraint(cost, excess))[1])
    model = small(CPO, costly(32), n_steps=5, cost_limit=6.0, cost_correction=0.0)
    _, callback = model._setup_learn(10**6, None)
    changes = 0
    for i in range(12):
        cost, expected = model.episode_cost, model._expected_cost
        assert model.collect_rollouts(model.env, callback, model.rollout_buffer, 5)
        model.train()
        if i < 3 or i % 4 == 3:  # so far, and of the episodes that ended
            assert given[-1] == model.episode_cost - 6.0
        else:
            assert model.episode_cost == cost
            assert given[-1] == expected - 6.0
            changes += expected != cost
    assert changes > 4


def test_what_was_expected_is_forgotten_without_a_limit_and_kept_while_no_episode_ends():
    model = small(CPO, costly(2), n_steps=10, cost_limit=6.0)
    _, callback = model._setup_learn(10**6, None)

    def step() -> float:
        assert model.collect_rollouts(model.env, callback, model.rollout_buffer, 10)
        model.train()
        return model.cost_error

    assert step() == step() == 0  # the first episodes end
    model._expected_cost = expected = 100.0
    assert step() == 0  # none ends
    assert model._expected_cost != expected  # and this step counts as well
    assert step() < -5
    model.cost_limit, error = inf, model.cost_error
    step()
    assert np.isnan(model._expected_cost)
    model.cost_limit = 6.0
    assert step() == step() == error


# -------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("discrete", [False, True])
def test_the_kl_stays_within_the_radius_on_many_random_policies(discrete):
    """Whether the limit binds, cannot be met, or does not matter."""
    model = small(CPO, costly(discrete=discrete), n_steps=16, target_kl=0.02, policy_kwargs={"net_arch": [8]})
    model.learn(64)
    generator, accepted, limits = torch.Generator().manual_seed(1), 0, set()
    for i, scale in enumerate(np.linspace(0.1, 3.0, COUNT)):
        with torch.no_grad():
            for p in model.policy.parameters():
                p.copy_(float(scale) * torch.randn(p.shape, generator=generator))
        model.cost_limit = (1.0, 8.0, 100.0)[i % 3]
        model.collect()
        batch = batch_of(model, next(model.rollout_buffer.get(None)))
        with torch.no_grad():
            before = model.networks.actor(batch.inputs).double()
            report = model.actor_step(batch)
            after = model.networks.actor(batch.inputs).double()
        if discrete:
            p, q = (torch.distributions.Categorical(logits=logits) for logits in (before, after))
            kl = float(torch.distributions.kl_divergence(p, q).mean())
        else:
            p, q = (
                torch.distributions.Normal(mean, log_std.exp())
                for mean, log_std in (before.chunk(2, -1), after.chunk(2, -1))
            )
            kl = float(torch.distributions.kl_divergence(p, q).sum(-1).mean())
        assert kl <= 0.02 * (1 + 1e-4) + 1e-7
        assert kl == pytest.approx(report.kl if report.accepted else 0.0, rel=1e-3, abs=1e-6)
        accepted += report.accepted
        limits.add(report.limit)
    assert accepted >= 0.75 * COUNT
    assert {"infeasible", "bound"} < limits


def test_advantages_and_episodes_are_those_written_out(steps_of):
    env = costly(3, early=0.05)
    model = small(CPO, env, n_steps=30, gamma=0.9, gae_lambda=0.8, cost_limit=5.0)
    with torch.no_grad():
        for p in model.cost_policy.value_net.parameters():
            p.fill_(0.1)
    seen = steps_of(env)
    value = CriticHead(model.cost_policy)

    def values(observations: Any) -> np.ndarray:
        with torch.no_grad():
            return value(torch.as_tensor(np.asarray(observations))).numpy()[:, 0]

    sums, lengths, previous = np.zeros(3), np.zeros(3), (nan, nan)
    _, callback = model._setup_learn(10**6, None)
    for _ in range(2):
        seen.clear()
        assert model.collect_rollouts(model.env, callback, model.rollout_buffer, 30)
        acted = values(model.rollout_buffer.observations.reshape(90, -1)).reshape(30, 3)
        advantages, following, done_episodes = np.zeros((30, 3)), np.zeros(3), []
        for t in reversed(range(30)):
            step = seen[t]
            ahead = values(step.last) * np.where(step.dones & ~step.cut, 0.0, 1.0)  # a time limit ends nothing
            delta = step.costs + 0.9 * ahead - acted[t]
            advantages[t] = following = delta + 0.72 * following * ~step.dones
        for _, costs, dones, *_ in seen:
            sums, lengths = sums + costs, lengths + 1
            done_episodes += [(sums[i], lengths[i]) for i in np.flatnonzero(dones)]
            sums, lengths = np.where(dones, 0.0, sums), np.where(dones, 0.0, lengths)
        np.testing.assert_allclose(model._costs.advantages.numpy().reshape(30, 3), advantages, rtol=1e-4, atol=1e-5)
        returns = (advantages + acted).flatten()
        np.testing.assert_allclose(model._costs.returns.numpy(), returns, rtol=1e-4, atol=1e-5)
        previous = tuple(np.mean(done_episodes, 0)) if done_episodes else previous
        assert (model.episode_cost, model.episode_length) == pytest.approx(previous)
        assert done_episodes


def test_before_an_episode_has_ended_its_cost_is_what_it_was_so_far():
    model = small(CPO, costly(2), n_steps=8, cost_limit=5.0)
    with torch.no_grad():
        model.policy.action_net.bias[0] = 50.0
    _, callback = model._setup_learn(10**6, None)
    expected = [(8, 8), (16, 16), (20, 20), (20, 20), (20, 20)]  # the third rollout ends the episodes
    for cost, length in expected:
        assert model.collect_rollouts(model.env, callback, model.rollout_buffer, 8)
        assert (model.episode_cost, model.episode_length) == (cost, length)


class Stop(BaseCallback):
    """Ends the rollout in its n-th step, or has an error there."""

    def __init__(self, n: int, error: bool = False) -> None:
        super().__init__()
        self.n, self.error = n, error

    def _on_step(self) -> bool:
        if self.error and self.n_calls == self.n:
            raise OSError("no space left")
        return self.n_calls < self.n


def test_every_episode_counts_whole_after_rollouts_that_were_stopped_or_without_a_limit():
    model = small(CPO, costly(2), n_steps=8, cost_limit=5.0)
    with torch.no_grad():
        model.policy.action_net.bias[0] = 50.0  # every step costs 1, and an episode has 20
    _, free = model._setup_learn(10**6, None)

    def collected(callback: Any = free) -> tuple[float, float]:
        if callback is not free:
            callback.init_callback(model)
        model.collect_rollouts(model.env, callback, model.rollout_buffer, 8)
        return model.episode_cost, model.episode_length

    assert collected() == (8, 8)
    assert collected(Stop(5)) == (13, 13)
    assert collected(Stop(7)) == (20, 20)  # it ends with the episodes
    assert collected(Stop(3)) == (20, 20)
    with pytest.raises(OSError, match="no space"):
        collected(Stop(2, error=True))
    for _ in range(5):  # the end of the episode that is not known whole, and another one
        assert collected() == (20, 20)
    model.cost_limit = inf
    collected()
    model.cost_limit = 5.0
    for _ in range(5):
        assert collected() == (20, 20)


@pytest.mark.parametrize("limits", [[5.0, inf], [inf]])
def test_before_a_whole_episode_was_seen_its_cost_is_what_was_seen(limits):
    model = small(CPO, costly(2), n_steps=8, cost_limit=5.0)
    with torch.no_grad():
        model.policy.action_net.bias[0] = 50.0
    _, callback = model._setup_learn(10**6, None)
    for model.cost_limit in [*limits, 5.0]:
        assert model.collect_rollouts(model.env, callback, model.rollout_buffer, 8)
    assert (model.episode_cost, model.episode_length) == ((4, 4) if len(limits) == 2 else (8, 8))


def test_the_predicted_cost_is_the_derivative_of_the_true_one():
    """Of the cost of an episode in a shift of the action, by simulation: 20 steps, each with the chance of a push."""
    model = small(CPO, costly(64), n_steps=200, gamma=1.0, gae_lambda=1.0, cost_limit=1e6, cg_damping=1e-3)
    _, callback = model._setup_learn(10**6, None)
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, 200)
    model.train()
    report = model._report
    changed = model.episode_cost
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, 200)
    changed = model.episode_cost - changed
    # √(20 p q / 640) ≈ 0.09 for the mean of 640 episodes each time
    assert report.actual_cost == pytest.approx(changed, abs=0.6)
    assert report.predicted_cost == pytest.approx(changed, abs=0.6)
    assert changed > 0.7


@pytest.mark.parametrize(
    "options",
    [
        {"critic": "natural", "sub_sampling_factor": 2},
        {"use_sde": True},
        {"preconditioner": "kfac", "fisher_fraction": 0.5, "kl_reduction": "mean"},
        {"metric": "wasserstein", "kl_direction": "new_old", "normalize_advantage": False},
        {"n_critic_updates": 0},
    ],
)
def test_it_goes_with_the_options_of_the_others(options):
    model = small(CPO, costly(early=0.05), cost_limit=3.0, target_kl=0.02, **options)
    before = vector(model).clone()
    rows = logged(model, 6 * 160)
    assert torch.isfinite(vector(model)).all()
    assert not torch.equal(before, vector(model))
    assert any(row["train/limit_bound"] for row in rows)
    assert all(np.isfinite(row["train/cost_value_loss"]) == bool(model.n_critic_updates) for row in rows)


# ------------------------------------------------------------------------------------------------------- life cycle


def everything(model: Any) -> dict[str, Any]:
    return {
        "policy": copy_of_state(model.policy),
        "optimizer": copy_of_state(model.policy.optimizer),
        "costs": copy_of_state(model.cost_policy),
        "its optimizer": copy_of_state(model.cost_policy.optimizer),
        "numbers": [model.episode_cost, model.episode_length, model.cost_critic_damping, model._n_updates],
        "running": model._running.copy(),
    }


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_it_is_saved_whole(tmp_path):
    env = costly(early=0.05)
    model = small(CPO, env, cost_limit=3.0, critic="natural")
    model.learn(3 * 160)
    assert model.cost_critic_damping != 0.1  # where it began
    model.save(tmp_path / "model")
    loaded = CPO.load(tmp_path / "model", env=env)
    assert loaded.cost_limit == 3.0
    assert_same(everything(loaded), everything(model))
    loaded.learn(160, reset_num_timesteps=False)
    assert loaded.n_updates == 4
    observation = env.observation_space.sample()
    twin = CPO.load(tmp_path / "model")
    assert np.array_equal(*(m.predict(observation, deterministic=True)[0] for m in (twin, model)))
    with pytest.raises(ValueError, match="was saved by CPO, not by TRPO"):
        TRPO.load(tmp_path / "model")


def test_an_update_that_fails_in_the_cost_critic_changes_nothing():
    model = small(CPO, costly(), cost_limit=3.0, critic="natural")
    model.learn(160)
    _, callback = model._setup_learn(10**6, None)
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, 40)
    model._costs = model._costs._replace(returns=model._costs.returns * nan)
    before = everything(model)
    with pytest.raises(FloatingPointError, match="the cost critic's loss is not finite in update 2"):
        model.train()
    assert_same(everything(model), before)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("price", "error", "match"),
    [
        (
            None,
            CostError,
            r"info\['cost'\] is missing from environment 0 in step 0 .*envs.velocity_limited.*backend='gymnasium'",
        ),
        (nan, FloatingPointError, r"info\['cost'\] is nan from environment \d in step"),
        (np.ones(2), CostError, r"info\['cost'\] must be a number, got array"),
    ],
)
def test_costs_that_are_none_are_refused(price, error, match):
    model = small(CPO, costly(price=price), cost_limit=3.0)
    before = vector(model).clone()
    with pytest.raises(error, match=match):
        model.learn(160)
    assert torch.equal(vector(model), before)


class Priced(Costly):
    """Costs as they are given, whatever they are."""

    def step(self, action: Any) -> Any:
        return *super().step(action)[:-1], {"cost": self.price}


@pytest.mark.parametrize(
    "price", [None, 1j, np.complex64(1), "1", b"1", [], 10**400, torch.tensor(1.0, requires_grad=True)], ids=type
)
def test_what_is_no_number_is_refused_with_its_place(price):
    model = small(CPO, DummyVecEnv([lambda: Priced(price=price)] * 2), cost_limit=3.0)
    with pytest.raises(
        CostError, match=r"info\['cost'\] must be a number, got .* from environment 0 in step 0"
    ) as told:
        model.learn(80)
    assert len(str(told.value)) < 250


@pytest.mark.parametrize("price", [0.5, Fraction(1, 2), Decimal("0.5"), np.float16(0.5), torch.tensor(0.5)], ids=type)
def test_every_kind_of_number_is_a_cost(price):
    model = small(CPO, DummyVecEnv([lambda: Priced(price=price)] * 2), cost_limit=3.0)
    model.learn(80)
    assert model.episode_cost == 10.0


def test_a_task_without_costs_ends_a_run_with_a_message(tmp_path, capsys):
    arguments = ["cpo", "CartPole-v1", "--n-envs", "2", "--timesteps", "64", "--device", "cpu", "--no-progress"]
    with pytest.raises(SystemExit) as end:
        train_agent.main([*arguments, "--run-dir", str(tmp_path / "run")])
    assert end.value.code == 1
    told = capsys.readouterr().err
    assert re.search(r"error: info\['cost'\] is missing from environment 0 in step 0 .* or set cost_limit=inf\.", told)
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"cost_limit": -1}, ValueError, r"cost_limit must lie in \[0, inf\], got -1"),
        ({"cost_limit": -inf}, ValueError, r"cost_limit must lie in \[0, inf\], got -inf"),
        ({"cost_limit": nan}, ValueError, r"cost_limit must lie in \[0, inf\], got nan: inf sets no limit"),
        ({"cost_limit": "25"}, TypeError, "cost_limit must be a number, got '25'"),
        ({"cost_limit": True}, TypeError, "cost_limit must be a number, got True"),
        ({"cost_limit": None}, TypeError, "cost_limit must be a number, got None"),
        ({"rollout_buffer_class": buffers.RolloutBuffer}, ValueError, "rollout_buffer_class must be a subclass of"),
        ({"line_search_shrinking_factor": 1.0}, ValueError, r"must lie in \(0, 1\), got 1"),
        ({"step_size": 1.0}, TypeError, "unexpected keyword argument 'step_size'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        small(CPO, costly(), **options)


def test_a_limit_that_is_set_wrong_later_is_refused():
    model = small(CPO, costly())
    with pytest.raises(ValueError, match="cost_limit must lie"):
        model.cost_limit = -2.0
    assert model.cost_limit == 25.0


def test_dict_observations_train_as_the_vector_that_they_hold():
    class Named(Costly):
        observation_space = spaces.Dict({"a": Costly.observation_space})

        def _observe(self):
            return {"a": super()._observe()}

    env = DummyVecEnv([lambda: Named(early=0.05)] * 4)
    env.seed(0)
    options = {"n_steps": 40, "batch_size": 80, "n_critic_updates": 3, "seed": 0, "device": "cpu", "cost_limit": 1.0}
    with acceleration.mode("off"):  # programs are made of one tensor, and round in another order
        ours = CPO("MultiInputPolicy", env, **options).learn(640)
        theirs = small(CPO, costly(early=0.05), cost_limit=1.0).learn(640)
    assert torch.equal(vector(ours), vector(theirs))
    assert torch.equal(*(torch.cat([p.flatten() for p in m.cost_policy.parameters()]) for m in (ours, theirs)))
    assert ours.episode_cost == theirs.episode_cost > 0


# -------------------------------------------------------------------------------------------------------------- runs


def test_a_run_records_what_an_episode_costs(tmp_path, monkeypatch):
    pytest.importorskip("mujoco")
    monkeypatch.setattr("agents.training.FINAL_EPISODES", 1)
    settings = {"env_kwargs": {"limit": 0.1, "max_episode_steps": 50}, "n_steps": 50, "cost_limit": 1}
    settings |= {"target_kl": 1e-3}  # so that a step in any direction leaves it beyond the limit
    task = "npg/HalfCheetahVelocity-v5"
    config = resolve("cpo", task, settings=settings, timesteps=200, n_envs=2, eval_episodes=1, device="cpu")
    assert config.normalize is not None
    start(config, tmp_path / "run").train(progress=False)
    rows = [row for row in read_rows(tmp_path / "run" / "progress.csv") if row["train/episode_cost"]]
    assert len(rows) == 2
    assert all(float(row["train/episode_cost"]) > 1 for row in rows)
    assert all(float(row["train/limit_bound"]) == 1 for row in rows)
    assert all(np.isfinite(float(row["train/cost_value_loss"])) for row in rows)


# ---------------------------------------------------------------------------------------------------- two processes


@pytest.mark.slow
def test_two_processes_have_one_limit_and_one_cost_critic(two_processes, tmp_path):
    one, other = two_processes(__file__, tmp_path)
    assert torch.equal(one["policy"], other["policy"])
    assert torch.equal(one["costs"], other["costs"])
    assert one["cost"] == other["cost"]
    assert one["own"] != other["own"]


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    env = costly(2, early=0.05)
    env.seed(rank)
    model = small(CPO, env, cost_limit=3.0, seed=rank)
    model.join(dist.group.WORLD)
    own: list[float] = []
    count = model._count
    model._count = lambda costs, *others: (own.append(float(costs.sum())), count(costs, *others))
    model.learn(3 * 160)
    costs = torch.cat([p.detach().flatten() for p in model.cost_policy.parameters()])
    saved = {"policy": vector(model), "costs": costs, "cost": model.episode_cost, "own": own}
    torch.save(saved, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
