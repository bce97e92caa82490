"""learning_rate and target_kl as functions of the remaining progress, and by RL Zoo's names."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import yaml
from stable_baselines3.common.callbacks import BaseCallback

from agents import MDPO, NPG, TRPO
from agents.config import RunConfig, resolve
from agents.schedules import schedule, value_at
from envs import make_vec_env


def small(algorithm=TRPO, **options):
    """128 steps in an update."""
    env = make_vec_env("CartPole-v1", n_envs=2, seed=0, backend="gymnasium")
    given = {"n_steps": 64, "batch_size": 32, "n_critic_updates": 1, "seed": 0, "device": "cpu"} | options
    return algorithm("MlpPolicy", env, **given)


def parameters_of(model):
    return torch.cat([p.detach().flatten() for p in model.policy.parameters()])


class Seen(BaseCallback):
    """The radius and the rate of every update."""

    def __init__(self):
        super().__init__()
        self.radii, self.rates = [], []

    def _on_training_start(self):
        step = self.model.natural_step

        def noted(batch, *, trust_region, **options):
            self.radii.append(trust_region.radius)
            self.rates.append(self.model.policy.optimizer.param_groups[0]["lr"])
            return step(batch, trust_region=trust_region, **options)

        self.model.natural_step = noted

    def _on_training_end(self):
        del self.model.natural_step

    def _on_step(self):
        return True


def test_a_name_is_the_straight_line_to_zero():
    line = schedule("learning_rate", "linear_1e-3")
    assert [value_at(line, p) for p in (1.0, 0.5, 0.0)] == pytest.approx([1e-3, 5e-4, 0.0])
    assert value_at(schedule("learning_rate", 0.5), 0.1) == 0.5


@pytest.mark.parametrize("algorithm", [TRPO, NPG])
@pytest.mark.parametrize("form", ["name", "function"])
def test_radius_and_rate_follow_the_remaining_progress(algorithm, form):
    given = {"learning_rate": "linear_1e-3", "target_kl": "linear_0.02"}
    if form == "function":
        given = {
            "learning_rate": lambda p: 1e-3 * p,
            "target_kl": lambda p: torch.tensor(0.02, dtype=torch.float64) * p,
        }
    model, seen = small(algorithm, **given), Seen()
    model.learn(4 * 128 - 50, callback=seen)  # the last rollout goes beyond the end
    total = 4 * 128 - 50
    left = [1 - 128 * k / total for k in (1, 2, 3)]
    assert seen.radii == pytest.approx([0.02 * p for p in (*left, 0.01)])
    assert seen.rates == pytest.approx([1e-3 * p for p in (*left, 0.0)])


def test_the_rate_of_mdpo_s_critic_follows_it_too():
    model = small(MDPO, learning_rate="linear_1e-3")
    model.learn(256)
    assert model.policy.optimizer.param_groups[0]["lr"] == 0.0
    assert model.logger.name_to_value["train/learning_rate"] == 0.0


class Annealed(BaseCallback):
    """What MDPO's rate of the actor was in every update, as a part of the one that was given."""

    def __init__(self):
        super().__init__()
        self.parts = []

    def _on_training_start(self):
        step = self.model.actor_step

        def noted(batch):
            report = step(batch)
            (group,) = self.model.actor_optimizer.param_groups
            self.parts.append(group["lr"] / self.model.actor_learning_rate)
            return report

        self.model.actor_step = noted

    def _on_training_end(self):
        del self.model.actor_step

    def _on_step(self):
        return True


@pytest.mark.parametrize(
    ("calls", "parts"),
    [
        ([512], [1, 3 / 4, 1 / 2, 1 / 4]),
        ([512 - 50], [1 - 128 * k / (512 - 50) for k in range(4)]),  # the last rollout goes beyond the end
        ([128], [1]),
        ([128] * 4, [1, 1 / 2, 1 / 3, 1 / 4]),  # no call knows of those that are to come
        ([256] * 2, [1, 1 / 2, 1 / 2, 1 / 4]),
    ],
)
def test_mdpo_anneals_from_the_full_step_to_the_end_of_each_call(calls, parts):
    model, seen = small(MDPO), Annealed()
    for steps in calls:
        model.learn(steps, reset_num_timesteps=False, callback=seen)
    assert seen.parts == pytest.approx(parts)


def test_mdpo_s_penalty_falls_with_its_rate():
    """From the second gradient step on, the update k has the penalty of 1/t_k."""
    models = [small(MDPO), small(MDPO, annealed=False, step_size=0.75, actor_learning_rate=0.75 * 3e-4)]
    for model in models:
        model.set_random_seed(0)
        model._setup_learn(10**6, None)
        model.collect()
        model._update_current_progress_remaining(256, 512)  # the second of four updates
        model.train()
    assert torch.equal(*map(parameters_of, models))


def test_mdpo_without_annealing_learns_in_pieces_as_at_once():
    models, seen = [], Annealed()
    for calls in ([512], [128] * 4):
        models.append(small(MDPO, annealed=False))
        for steps in calls:
            models[-1].learn(steps, reset_num_timesteps=False, callback=seen)
    assert seen.parts == [1] * 8
    assert torch.equal(*map(parameters_of, models))


@pytest.mark.parametrize("given", ["linear_0.02", lambda p: 0.02 * p], ids=["name", "function"])
def test_a_model_keeps_its_schedules(given, tmp_path):
    model = small(target_kl=given, learning_rate=given)
    model.learn(128)
    model.save(tmp_path / "model")
    # a function is code, which is not read from a file unless that is asked for
    asked = {} if isinstance(given, str) else {"unpickle": ["target_kl", "learning_rate"]}
    with nullcontext() if isinstance(given, str) else pytest.warns(UserWarning, match="is unpickled"):
        loaded = TRPO.load(tmp_path / "model", env=model.env, **asked)
    assert [loaded.target_kl(p) for p in (1.0, 0.5)] == pytest.approx([0.02, 0.01])
    assert loaded.lr_schedule(0.5) == pytest.approx(0.01)
    seen = Seen()
    loaded.learn(128, reset_num_timesteps=False, callback=seen)
    assert seen.radii == pytest.approx([0.02 * 0.01])  # of 256 steps none is left


def test_a_model_is_loaded_with_another_schedule(tmp_path):
    small().save(tmp_path / "model")
    model = TRPO.load(tmp_path / "model", target_kl="linear_0.5", learning_rate="linear_0.25")
    assert (model.radius(model.target_kl), model.lr_schedule(1.0)) == (0.5, 0.25)


@pytest.mark.parametrize("option", ["learning_rate", "target_kl"])
@pytest.mark.parametrize("value", ["linear_", "linear_fast", "linear_-1", "linear_nan", "cosine_1e-3", "1e-3"])
def test_what_is_no_schedule_is_refused(option, value):
    with pytest.raises((TypeError, ValueError), match=rf"^{option} must"):
        small(**{option: value})


@pytest.mark.parametrize("option", ["gamma", "cg_damping", "n_steps"])
def test_other_settings_are_no_schedules(option):
    with pytest.raises((TypeError, ValueError), match=f"^{option} must"):
        small(**{option: "linear_0.5"})


@pytest.mark.parametrize("later", [0.0, -0.01, float("nan"), float("inf"), None, "0.01"], ids=repr)
def test_a_radius_that_becomes_unusable_ends_the_training_and_changes_nothing(later):
    model, seen = small(target_kl=lambda p: 0.01 if p > 0.7 else later), Before()
    with pytest.raises((TypeError, ValueError), match=r"^target_kl must"):
        model.learn(128 * 4, callback=seen)
    assert model.n_updates == 1
    assert torch.equal(parameters_of(model), seen.parameters)


class Before(BaseCallback):
    """The parameters before the last update."""

    def _on_rollout_end(self):
        self.parameters = parameters_of(self.model)

    def _on_step(self):
        return True


# Runs -----------------------------------------------------------------------------------------------------------------


def test_a_run_keeps_the_name_as_it_was_written(tmp_path):
    settings = {"learning_rate": "linear_1e-3", "target_kl": "linear_0.02"}
    config = resolve("trpo", "CartPole-v1", settings=settings)
    assert settings.items() <= config.hyperparameters.items()
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    assert RunConfig.read(path) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": "linear_fast"}, "learning_rate must be a number, or linear_ and a number"),
        ({"target_kl": "cosine_0.1"}, "target_kl must be a number; got 'cosine_0.1'"),
        ({"gamma": "linear_0.9"}, "gamma must be a number; got 'linear_0.9'"),
    ],
)
def test_what_is_no_schedule_of_a_run_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        resolve("trpo", "CartPole-v1", settings=settings)


def test_a_learning_rate_below_zero_is_refused_in_the_update_that_has_it():
    model = small(learning_rate=lambda progress: 1e-3 * (2 * progress - 1.2))
    with pytest.raises(ValueError, match=r"learning_rate must lie in \[0, inf\), got -0\.0001999"):
        model.learn(512)
    assert model.n_updates == 1
