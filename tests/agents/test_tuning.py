"""A search for settings: what it proposes, keeps and writes, and that it goes on where it was stopped."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import pytest
import yaml

import agents
from agents import tuning
from agents.cli.tune_agent import main
from agents.config import ALGORITHMS, RunConfig, preset_of, resolve
from agents.runs import RunFolder
from agents.search_space import load_space, value_or, widened
from agents.tuning import Tuning, TuningConfig
from npg.runs.folder import FolderInUse
from npg.runs.presets import read_yaml

SCRIPT = Path(__file__).parents[2] / "scripts" / "tune_agent.py"

needs_optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="needs the extra tune")

SPACE = {"target_kl": {"low": 0.001, "high": 0.1, "log": True}, "n_steps": {"choices": [16, 32]}}
FIXED = {"policy_kwargs.net_arch": [4], "n_critic_updates": 1}
OPTIONS = {"timesteps": 128, "n_envs": 2, "eval_episodes": 1, "backend": "gymnasium", "device": "cpu", "threads": 1}


def begun(path, trials=3, settings=FIXED, space=SPACE, **changes):
    config = TuningConfig("trpo", "CartPole-v1", trials=trials, evaluations=2, options=OPTIONS, space=space, **changes)
    return Tuning.create(path, config, settings=settings)


def proposed(search):
    return [(t.params, t.value, t.state.name) for t in search.finished]


@needs_optuna
@pytest.mark.slow
def test_a_search_that_was_stopped_goes_on_as_one_in_a_go(tmp_path, monkeypatch, capsys):
    whole = begun(tmp_path / "whole")
    whole.run()
    assert len(whole.finished) == 3

    stopped = begun(tmp_path / "stopped")
    trained, train = [], tuning._train

    def interrupted(*args):
        trained.append(args)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(*args)

    monkeypatch.setattr(tuning, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert len(stopped.finished) == 1

    again = Tuning.open(tmp_path / "stopped")
    again.run()
    assert proposed(again) == proposed(whole)
    assert "trial 0 (the preset): return" in capsys.readouterr().out


@needs_optuna
@pytest.mark.parametrize(("name", "written"), [("step_size", "null"), ("cg_damping", "0.0")])
def test_a_range_that_cannot_have_the_preset_is_refused_before_there_is_a_folder(tmp_path, name, written):
    preset = tmp_path / "mine.yaml"
    preset.write_text(f"default: {{{name}: {written}}}\n")
    space = {name: {"low": 0.001, "high": 0.1, "log": True}}
    config = TuningConfig("trpo", "CartPole-v1", trials=1, evaluations=1, options=OPTIONS, space=space)
    with pytest.raises(ValueError, match=rf"^{name} is .* in the preset, which no range has"):
        Tuning.create(tmp_path / "s", config, preset=str(preset))
    assert not (tmp_path / "s").exists()


@needs_optuna
def test_the_first_trial_is_the_preset_and_the_best_is_one(tmp_path):
    search = begun(tmp_path / "s", trials=2)
    search.run()
    first = search.finished[0]
    config = resolve("trpo", "CartPole-v1", settings=FIXED)
    assert first.params == {"target_kl": config.hyperparameters["target_kl"], "n_steps": 512}
    assert search.config.space["n_steps"] == {"choices": [16, 32, 512]}

    best = search.best
    assert best.value == max(t.value for t in search.finished if t.value is not None)
    found = resolve("trpo", "CartPole-v1", preset=str(search.path / "best.yaml"))
    for name, value in best.params.items():
        assert found.hyperparameters[name] == pytest.approx(value)
    assert found.hyperparameters["policy_kwargs"] == {"net_arch": [4]}
    assert found.timesteps == config.timesteps  # the preset's, not those of the trials
    assert found.n_envs == OPTIONS["n_envs"] != config.n_envs  # but the settings are of so many environments

    with (search.path / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["value"]) for r in rows if r["value"]] == [t.value for t in search.finished if t.value is not None]
    for t in search.finished:
        assert (search.path / "trials" / f"{t.number:04d}-s100" / "last_model.zip").exists()
        run = yaml.safe_load((search.path / "trials" / f"{t.number:04d}-s100" / "config.yaml").read_text())
        assert run["seed"] == 100
        assert run["hyperparameters"]["target_kl"] == pytest.approx(t.params["target_kl"])


@needs_optuna
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("policy_kwargs.log_std_init", {"low": -2.0, "high": -1.0}),
        ("policy_kwargs.activation_fn", {"choices": ["ReLU", "ELU"]}),
        ("normalize.clip_obs", {"low": 5.0, "high": 20.0}),  # and the preset does not normalise
        ("env_kwargs.sutton_barto_reward", {"choices": [True]}),
    ],
)
def test_the_preset_does_without_what_it_has_no_value_for(tmp_path, name, given):
    search = begun(tmp_path / "s", trials=2, space={name: given, **SPACE})
    search = Tuning.open(search.path)
    search.run()
    preset, other = search.finished
    assert preset.params.keys() == SPACE.keys()
    assert other.params.keys() == {name, *SPACE}
    made = RunConfig.read(search.path / "trials" / "0000-s100" / "config.yaml")
    undisturbed = resolve("trpo", "CartPole-v1", settings=FIXED)
    for part in ("hyperparameters", "normalize", "env_kwargs"):
        assert getattr(made, part) == getattr(undisturbed, part)


@needs_optuna
@pytest.mark.parametrize(
    ("settings", "space"),
    [
        ({"target_kl": 0.02}, {"target_kl": {"low": 0.001, "high": 0.1}}),
        ({}, {"n_envs": {"choices": [2, 8]}}),  # the option of the command would go over every trial's own
    ],
)
def test_what_is_set_is_not_searched(tmp_path, settings, space):
    (name,) = space
    with pytest.raises(ValueError, match=f"^{name} cannot be both set and searched: leave one out"):
        begun(tmp_path / "s", settings=settings, space=space)
    assert not (tmp_path / "s").exists()


@needs_optuna
def test_a_schedule_of_the_preset_is_searched_by_its_first_value(tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text("default: {target_kl: linear_0.02}\n")
    space = {"target_kl": {"low": 0.03, "high": 0.1, "log": True}}
    config = TuningConfig("trpo", "CartPole-v1", trials=2, evaluations=1, options=OPTIONS, space=space)
    search = Tuning.create(tmp_path / "s", config, preset=str(preset), settings=FIXED)
    search = Tuning.open(search.path)
    search.run()
    first, second = search.finished
    assert first.params == {"target_kl": 0.02}
    assert 0.02 <= second.params["target_kl"] <= 0.1
    for t in (first, second):
        run = yaml.safe_load((search.path / "trials" / f"{t.number:04d}-s100" / "config.yaml").read_text())
        assert run["hyperparameters"]["target_kl"] == f"linear_{t.params['target_kl']!r}"
    found = resolve("trpo", "CartPole-v1", preset=str(search.path / "best.yaml"))
    assert found.hyperparameters["target_kl"] == f"linear_{search.best.params['target_kl']!r}"


@needs_optuna
def test_the_value_is_the_mean_of_seeds_from_100(tmp_path, monkeypatch):
    seen = []

    def train(config, path, trial, k, before, search):
        seen.append((config.seed, path.name))
        return float(config.seed)

    monkeypatch.setattr(tuning, "_train", train)
    search = begun(tmp_path / "s", trials=1, seeds=3)
    search.run()
    assert seen == [(100, "0000-s100"), (101, "0000-s101"), (102, "0000-s102")]
    assert search.best.value == 101.0


@needs_optuna
def test_a_trial_below_the_median_ends_early(tmp_path, monkeypatch):
    import optuna

    def train(config, path, trial, k, before, search):
        for step in (1, 2):
            value = -100.0 if trial.number == 5 else float(trial.number)
            trial.report(value, step)
            if step < 2 and trial.should_prune():
                raise optuna.TrialPruned
        return value

    monkeypatch.setattr(tuning, "_train", train)
    search = begun(tmp_path / "s", trials=7)
    search.run()
    states = [t.state.name for t in search.finished]
    assert states == ["COMPLETE"] * 5 + ["PRUNED", "COMPLETE"]
    assert search.best.number == 6


RISING = [*range(50, 501, 50)]


@needs_optuna
@pytest.mark.parametrize(
    ("seeds", "evaluations"),
    [
        # six trials are RISING with each seed, and this one is …
        ([RISING], 10),
        ([[0, *RISING[1:]]], 10),  # behind in its first evaluation, which tells nothing
        ([[0, 90, *RISING[2:]]], 2),
        ([[50, 100, 900, *[10] * 7]], 4),  # the best once, then behind
        ([[50, 100, math.nan, *RISING[3:]]], 3),
        ([RISING, [9] * 10], 11),  # as good with one seed, and lost with the next
        ([[*RISING[:9], 700], [9] * 10], 15),  # until (700 + 9) / 2 < (500 + 250) / 2
        ([[*RISING[:9], 700], [max(9, y - 190) for y in RISING]], 20),  # ahead in the mean of both
    ],
)
def test_a_trial_ends_where_it_is_behind_the_others_at_the_same_step(tmp_path, monkeypatch, seeds, evaluations):
    import optuna

    made = []

    def train(config, path, trial, k, before, search):
        for i, value in enumerate(RISING if trial.number < 6 else seeds[k], 10 * k + 1):
            if trial.number == 6:
                made.append(value)
            trial.report((before + value) / (k + 1), i)
            if i < 10 * len(seeds) and trial.should_prune():
                raise optuna.TrialPruned
        return float(value)

    monkeypatch.setattr(tuning, "_train", train)
    given = {"trials": 7, "seeds": len(seeds), "evaluations": 10, "options": OPTIONS, "space": SPACE}
    search = Tuning.create(tmp_path / "s", TuningConfig("trpo", "CartPole-v1", **given), settings=FIXED)
    search.run()
    assert len(made) == evaluations


class Asked:
    """A trial of Optuna's that never ends early."""

    number = 0

    def __init__(self):
        self.user_attrs, self.reported, self.asked_to_end = {}, [], 0

    def report(self, value, step):
        self.reported.append(step)

    def should_prune(self):
        self.asked_to_end += 1
        return False

    def set_user_attr(self, name, value):
        self.user_attrs[name] = value


@pytest.mark.parametrize(
    ("n_steps", "evaluations", "k", "steps"),
    [
        (50, 5, 0, {200: 1, 400: 2, 600: 3, 800: 4, 1000: 5}),
        (50, 5, 1, {200: 6, 400: 7, 600: 8, 800: 9, 1000: 10}),
        (200, 5, 0, {400: 2, 800: 4, 1200: 5}),  # rollouts of 400 steps
        (150, 5, 0, {300: 1, 600: 3, 900: 4, 1200: 5}),
        (50, 3, 0, {400: 1, 700: 2, 1000: 3}),  # which does not divide the 1,000 steps
        (600, 5, 0, {1200: 5}),
    ],
)
@pytest.mark.slow
def test_evaluations_are_compared_at_the_same_steps(tmp_path, n_steps, evaluations, k, steps):
    trial = Asked()
    search = TuningConfig("trpo", "CartPole-v1", seeds=2, evaluations=evaluations, options=OPTIONS, space=SPACE)
    settings = FIXED | {"n_steps": n_steps, "batch_size": n_steps}
    config = resolve("trpo", "CartPole-v1", settings=settings, **OPTIONS | {"timesteps": 1000})
    config = replace(config, eval_freq=math.ceil(1000 / evaluations), save_freq=1000)
    tuning._train(config, tmp_path / "trials" / "run", trial, k, 0.0, search)
    evaluated = RunFolder(tmp_path / "trials" / "run").evaluations()["timesteps"]
    assert dict(zip(evaluated, trial.reported, strict=True)) == steps
    assert trial.user_attrs == {"steps": max(steps)}


@needs_optuna
@pytest.mark.parametrize(
    ("excesses", "best"),
    [
        ([2.0, 0.0, 0.0, 5.0], 2),
        ([0.0, 0.0, 0.0, 0.0], 3),
        ([2.0, 1.0, 1.0, 5.0], 2),  # if none keeps the limit, the one that breaks it least
    ],
)
def test_the_best_trial_of_cpo_keeps_the_limit(tmp_path, monkeypatch, capsys, excesses, best):
    import optuna

    def train(config, path, trial, k, before, search):
        trial.set_user_attr("excess", excesses[trial.number])
        return float(trial.number)

    monkeypatch.setattr(tuning, "_train", train)
    config = TuningConfig("cpo", "CartPole-v1", trials=4, evaluations=1, options=OPTIONS, space=SPACE)
    search = Tuning.create(tmp_path / "s", config, settings=FIXED)
    search.run()
    assert search.best.number == best
    told = capsys.readouterr().out
    for number, excess in enumerate(excesses):
        assert f"return {number}.0{f' (cost {excess:.3g} above the limit)' if excess else ''}, " in told
    with (search.path / "trials.csv").open() as file:
        assert [float(row["excess"]) for row in csv.DictReader(file)] == excesses
    if hasattr(optuna.Trial, "set_constraint"):  # which Optuna's sampler goes by
        assert [t.constraints["cost"] for t in search.finished] == excesses


class Costly(gym.Wrapper):
    """Episodes of twenty steps, which cost 1 each."""

    def step(self, action):
        *result, info = self.env.step(action)
        return *result, info | {"cost": 1.0}


gym.register("Costly-v0", lambda: Costly(gym.make("Pendulum-v1", max_episode_steps=20)))


@pytest.mark.parametrize(("limit", "excess"), [(5.0, 15.0), (30.0, 0.0), (math.inf, None)])
def test_a_trial_of_cpo_knows_how_far_it_is_above_the_limit(tmp_path, limit, excess):
    settings = FIXED | {"n_steps": 32, "cost_limit": limit}
    config = resolve("cpo", "Costly-v0", settings=settings, eval_freq=64, save_freq=128, **OPTIONS)
    search = TuningConfig("cpo", "Costly-v0", seeds=2, evaluations=2, options=OPTIONS, space=SPACE)
    trial = Asked()
    for k in (0, 1):
        tuning._train(config, tmp_path / "trials" / f"run{k}", trial, k, 0.0, search)
        assert trial.user_attrs.get("excess") == (None if excess is None else excess * (k + 1) / 2)
    assert trial.asked_to_end == (3 if limit == math.inf else 0)


@needs_optuna
@pytest.mark.parametrize("policy", ["CnnPolicy", "MultiInputPolicy", "MultiInputLstmPolicy"])
def test_a_policy_that_does_not_fit_is_a_trial(tmp_path, policy, monkeypatch):
    train = tuning._train
    monkeypatch.setattr(tuning, "_train", lambda run, *args: 1.0 if run.policy is None else train(run, *args))
    search = begun(tmp_path / "s", trials=5, space={"policy": {"choices": [policy]}})
    search.run()
    others = [t for t in search.finished if t.params["policy"] == policy]
    assert 1 <= len(others) < len(search.finished) == 5
    for trial in others:
        assert trial.state.name == "FAIL"
        assert trial.user_attrs["error"].startswith(f"policy={policy}, policy_kwargs={{'net_arch': [4]}}: no {policy}")


@needs_optuna
def test_settings_that_are_refused_are_a_trial_and_a_refused_preset_ends_the_search(tmp_path, monkeypatch):
    def train(config, path, trial, k, before, search):
        if trial.number == refused:
            raise FloatingPointError("the loss is not finite")
        return 1.0

    monkeypatch.setattr(tuning, "_train", train)
    refused = 1
    search = begun(tmp_path / "a")
    search.run()
    assert [t.user_attrs.get("error") for t in search.finished] == [None, "the loss is not finite", None]
    refused = 0
    with pytest.raises(ValueError, match="the preset itself cannot be trained: the loss is not finite"):
        begun(tmp_path / "b").run()


@needs_optuna
@pytest.mark.slow
def test_two_processes_train_as_many_trials_as_were_asked_for(tmp_path):
    search = begun(tmp_path / "s", trials=3)
    search.run(jobs=2)
    finished = Tuning.open(tmp_path / "s").finished
    assert len(finished) == 3
    assert len({t.params["target_kl"] for t in finished}) == 3  # of those at one time too
    assert sorted(p.name for p in (tmp_path / "s" / "trials").iterdir()) == ["0000-s100", "0001-s100", "0002-s100"]


@needs_optuna
def test_an_interrupt_of_the_lock_is_an_interrupt(tmp_path, monkeypatch):
    def train(*args):
        try:
            raise KeyboardInterrupt
        except BaseException:
            (tmp_path / "study.log.lock").unlink()  # as Optuna does, when it was already gone

    monkeypatch.setattr(tuning, "_train", train)
    with pytest.raises(KeyboardInterrupt):
        begun(tmp_path / "s").run()
    monkeypatch.setattr(tuning, "_train", lambda *args: (tmp_path / "data").unlink())
    with pytest.raises(FileNotFoundError):
        begun(tmp_path / "t").run()


@needs_optuna
def test_another_process_is_kept_out_of_a_search_that_runs(tmp_path, monkeypatch):
    train, refused = tuning._train, []

    def busy(*args):
        for command in (lambda: Tuning.open(tmp_path / "s", trials=9), Tuning(tmp_path / "s").run):
            with pytest.raises(FolderInUse, match="is in use: another process"):
                command()
        refused.append(args)
        return train(*args)

    search = begun(tmp_path / "s", trials=1)
    monkeypatch.setattr(tuning, "_train", busy)
    search.run()
    assert len(refused) == 1
    assert [t.state.name for t in search.study().trials] == ["COMPLETE"]
    again = Tuning.open(tmp_path / "s")  # the folder is free again
    again.run()
    assert again.config.trials == 1


@needs_optuna
def test_a_search_that_was_killed_at_its_start_begins_with_the_preset(tmp_path):
    search = begun(tmp_path / "s", trials=1)
    (tmp_path / "s" / "study.log").unlink(missing_ok=True)
    Tuning.open(tmp_path / "s").run()
    (trial,) = search.study().trials
    assert trial.user_attrs["preset"]
    assert trial.params["target_kl"] == resolve("trpo", "CartPole-v1").hyperparameters["target_kl"]


def test_ctrl_c_during_the_start_has_the_status_of_one(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Tuning, "create", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["trpo", "CartPole-v1", "--run-dir", str(tmp_path / "s")])
    assert ended.value.code == 130
    assert "ended before it began" in capsys.readouterr().err


@needs_optuna
@pytest.mark.slow
def test_the_command_stops_on_a_signal_and_goes_on(tmp_path):
    path = tmp_path / "s"
    short = ["--evaluations", "1", "--eval-episodes", "1", "--n-envs", "2", "--backend", "gymnasium", "--device", "cpu"]
    short += ["--set", "policy_kwargs.net_arch=[4]", "--threads", "1", "--timesteps", "256"]
    command = [sys.executable, str(SCRIPT), "trpo", "CartPole-v1", "--trials", "400", *short, "--run-dir", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.monotonic() + 200
    while not (path / "trials.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130, out + err
    assert f"--resume {path}" in out
    done = len(Tuning(path).finished)
    assert 1 <= done < 400

    again = [sys.executable, str(SCRIPT), "--resume", str(path), "--trials", str(done + 1)]
    finished = subprocess.run(again, capture_output=True, text=True, timeout=200, check=False)
    assert finished.returncode == 0, finished.stderr
    assert f"--preset {path / 'best.yaml'}" in finished.stdout
    assert len(Tuning(path).finished) == done + 1


# The space ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ["trpo", "npg", "mdpo", "cpo"])
def test_every_setting_of_the_search_spaces_exists(algo):
    space = load_space(algo)
    assert len(space) >= 6
    for name, given in space.items():
        for value in given.get("choices", [given.get("low"), given.get("high")]):
            assert resolve(algo, "CartPole-v1", settings={name: value}).hyperparameters[name] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trpo: {gamma: {low: 0.9}}", "search space of gamma must be low < high, or choices"),
        ("trpo: {gamma: {low: 1.0, high: 0.9}}", "low < high"),
        ("trpo: {gamma: {low: 0, high: 1, log: true}}", "low of gamma must be above 0, with log"),
        ("trpo: {gamma: {choices: []}}", "search space of gamma"),
        ("trpo: {gamma: {choices: [1], low: 0}}", "either choices"),
        ("trpo: {gamma: {lo: 0.9, high: 1.0}}", "unknown word 'lo'.*low"),
        ("trpo: {n_steps: {low: 64, high: 1024, step: 0.5}}", "step of n_steps must be a whole number"),
        ("trpo: {n_steps: {low: 64, high: 1024, step: -64}}", r"step of n_steps must lie in \(0, inf\), got -64"),
        ("trpo: {}", "must be a mapping of settings"),
        ("npg: {gamma: {low: 0.9, high: 1.0}}", "unknown search space 'trpo'"),
    ],
)
def test_a_search_space_that_cannot_be_is_refused(tmp_path, text, message):
    path = tmp_path / "search.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_space("trpo", path)


@needs_optuna
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"space": {"taget_kl": {"low": 0.1, "high": 1.0}}}, "unknown setting 'taget_kl' for trpo: did you mean"),
        ({"settings": {"target_kl": 0.1}}, "target_kl cannot be both set and searched"),
        ({"space": {"gamma": {"low": 0.9, "high": 1.4}}}, r"gamma must lie in \[0, 1\], got 1.4"),
        ({"space": {"gae_lambda": {"choices": [0.9, -1.0]}}}, r"gae_lambda must lie in \[0, 1\], got -1.0"),
        ({"settings": {**FIXED, "batch_size": 0}}, "batch_size"),
        ({"trials": 0}, "trials must be at least 1; got 0"),
        ({"seeds": 0}, "seeds must be at least 1; got 0"),
    ],
)
def test_bad_input_creates_nothing(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        begun(tmp_path / "s", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match="needs Optuna: pip install optuna"):
        begun(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "HalfCheetah-v5", "npg/Tetris-v0"])
def test_a_run_and_its_preset_are_the_same(env, tmp_path):
    config = resolve("trpo", env)
    path = tmp_path / "preset.yaml"
    path.write_text(yaml.safe_dump({env: preset_of(config)}))
    assert resolve("trpo", env, preset=str(path)) == config


def test_the_discount_of_rewards_follows_a_tuned_discount(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text(yaml.safe_dump({"HalfCheetah-v5": preset_of(resolve("trpo", "HalfCheetah-v5"))}))
    assert resolve("trpo", "HalfCheetah-v5", preset=str(path), settings={"gamma": 0.9}).normalize["gamma"] == 0.9
    own = resolve("trpo", "HalfCheetah-v5", settings={"normalize": {"gamma": 0.5}})
    path.write_text(yaml.safe_dump({"HalfCheetah-v5": preset_of(own)}))
    assert resolve("trpo", "HalfCheetah-v5", preset=str(path), settings={"gamma": 0.9}).normalize["gamma"] == 0.5


@needs_optuna
def test_an_environment_that_is_not_there_is_refused_before_there_is_a_folder(tmp_path):
    config = TuningConfig("trpo", "CartPole-v9", options=OPTIONS, space=SPACE)
    with pytest.raises((ValueError, ImportError), match="CartPole"):
        Tuning.create(tmp_path / "s", config)
    assert list(tmp_path.iterdir()) == []


@needs_optuna
@pytest.mark.parametrize("settings", [{"normalize.gamma": 0.99}, {"normalize": {"gamma": 0.99}}, {"normalize": True}])
def test_a_discount_of_rewards_that_was_set_stays(settings, tmp_path):
    search = begun(tmp_path / "s", settings={**FIXED, **settings}, space={"gamma": {"choices": [0.5, 0.99]}})
    preset = str(search.path / "preset.yaml")
    found = resolve("trpo", "CartPole-v1", preset=preset, settings={"gamma": 0.5})
    assert found.normalize["gamma"] == (0.5 if settings == {"normalize": True} else 0.99)


@needs_optuna
def test_the_tables_have_a_trial_that_ended_just_before_a_stop(tmp_path, monkeypatch):
    search = begun(tmp_path / "s", trials=2)

    def stopped(self, number):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Tuning, "_write", lambda self: None)
    monkeypatch.setattr(Tuning, "_tell", stopped)
    with pytest.raises(KeyboardInterrupt):
        search.run()
    with (search.path / "trials.csv").open() as file:
        assert [row["trial"] for row in csv.DictReader(file)] == ["0"]
    assert "trial 0 of 1" in (search.path / "best.yaml").read_text()


@pytest.mark.parametrize("algo", sorted(ALGORITHMS))
def test_a_search_can_begin_at_every_preset(algo):
    space = load_space(algo)
    for env in read_yaml(Path(agents.__file__).parent / "presets" / f"{algo}.yaml"):
        if env != "default" and env != "Atari":
            base = resolve(algo, env)
            for name, given in space.items():
                assert widened(name, given, value_or(base, name, given))
