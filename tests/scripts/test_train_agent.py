import base64
import csv
import errno
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import load_results
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import NPG, TRPO
from agents.callbacks import LOOK_EVERY, Saver, evaluation_seed
from agents.cli.train_agent import main
from agents.config import RunConfig, resolve
from agents.evaluation import evaluate_saved, make_env
from agents.runs import RunFolder, copy_agent, normalized, read_state, save_agent
from agents.seeds import SeedsFolder
from agents.state import set_statistics
from agents.training import resume, start
from npg.parallel import World
from npg.runs.plain import to_text

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_agent.py"

# 64 steps in an update; Pendulum is normalised, and its episodes have 200 steps.
TINY = [
    *("--n-envs", "2", "--eval-episodes", "2", "--no-progress", "--device", "cpu", "--backend", "gymnasium"),
    *("--set", "n_steps=32", "--set", "n_critic_updates=1", "--set", "policy_kwargs.net_arch=[8]"),
]
PENDULUM = ["trpo", "Pendulum-v1", "--timesteps", "600", "--eval-freq", "200", "--save-freq", "200", *TINY]
PENDULUM += ["--set", "normalize=true", "--set", "use_sde=false", "--set", "target_kl=0.01"]
CARTPOLE = ["trpo", "CartPole-v1", "--timesteps", "256", *TINY]


@pytest.fixture(autouse=True)
def few_final_episodes(monkeypatch):
    monkeypatch.setattr("agents.training.FINAL_EPISODES", 2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that came to its end; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.training.FINAL_EPISODES", 2)
        path = tmp_path_factory.mktemp("runs") / "pendulum"
        assert main([*PENDULUM, "--run-dir", str(path)]) == 0
    return RunFolder(path)


def run(arguments, path):
    assert main([*arguments, "--run-dir", str(path)]) == 0
    return RunFolder(path)


def refused(arguments, capsys):
    """The message of a command that must be refused in one line."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(a) for a in arguments])
    assert exit_info.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "error: " in err
    return err


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


# The folder -----------------------------------------------------------------------------------------------------------


def test_the_configuration_is_complete(finished):
    written = yaml.safe_load((finished.path / "config.yaml").read_text())
    assert RunConfig(**written) == finished.config
    assert written["policy"] == "MlpPolicy"
    model = TRPO.load(finished.last.model)
    for name in ("target_kl", "cg_damping", "n_steps", "gamma", "gae_lambda", "batch_size"):
        assert written["hyperparameters"][name] == getattr(model, name)
    assert written["hyperparameters"]["n_steps"] == 32


def test_schedules_of_the_command_line_are_kept_as_written_and_go_on(tmp_path):
    schedules = ["--set", "learning_rate=linear_1e-3", "--set", "target_kl=linear_0.02"]
    folder = run(["trpo", "CartPole-v1", "--timesteps", "2.56e2", *TINY, *schedules], tmp_path / "run")
    written = yaml.safe_load((folder.path / "config.yaml").read_text())
    assert written["timesteps"] == 256
    assert written["hyperparameters"]["learning_rate"] == "linear_1e-3"
    assert written["hyperparameters"]["target_kl"] == "linear_0.02"
    model = TRPO.load(folder.last.model)
    assert model.target_kl(0.5) == pytest.approx(0.01)
    continued = resume(folder.path, timesteps=512)
    assert continued.model.target_kl(0.5) == pytest.approx(0.01)
    continued.train(progress=False)
    with (folder.path / "progress.csv").open() as file:
        rates = [float(row["train/learning_rate"]) for row in csv.DictReader(file) if row["train/learning_rate"]]
    assert rates == pytest.approx([1e-3 * p for p in (0.75, 0.5, 0.25, 0.0, 0.375, 0.25, 0.125, 0.0)], rel=1e-3)


def test_what_is_no_number_of_timesteps_is_refused(capsys):
    assert "such as 1000 or 1e3; got '1.5'" in refused(["trpo", "CartPole-v1", "--timesteps", "1.5"], capsys)


def test_every_episode_is_recorded_as_stable_baselines3_reads_it(finished):
    pytest.importorskip("pandas")
    episodes = load_results(str(finished.path))
    # Of 640 steps in two environments, each has had one episode of 200, which ended together.
    assert list(episodes["l"]) == [200, 200]
    assert list(episodes["timesteps"]) == [400, 400]
    assert episodes["r"].max() < -1  # of the environment, not normalised


def test_every_update_is_recorded(finished):
    with (finished.path / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = finished.config.timesteps + (-finished.config.timesteps % 64)
    assert int(rows[-1]["time/total_timesteps"]) == last
    kls = [float(row["train/kl"]) for row in rows if row["train/kl"]]
    assert len(kls) == last // 64
    assert max(kls) <= finished.config.hyperparameters["target_kl"]
    assert "rollout/ep_rew_mean" in rows[-1]


def test_tensorboard_has_the_same_scalars(finished):
    events = EventAccumulator(str(finished.path)).Reload()
    with (finished.path / "progress.csv").open() as file:
        kls = [float(row["train/kl"]) for row in csv.DictReader(file) if row["train/kl"]]
    np.testing.assert_allclose([e.value for e in events.Scalars("train/kl")], kls, rtol=1e-6)


def test_evaluations_come_at_their_frequency_and_at_the_end(finished):
    assert list(finished.evaluations()["timesteps"]) == [256, 448, 640]
    names = sorted(p.name for p in finished.checkpoints.glob("model_*"))
    assert names == ["model_256_steps.zip", "model_448_steps.zip"]
    assert {TRPO.load(p).num_timesteps for p in finished.checkpoints.glob("model_*")} == {256, 448}


def test_the_best_agent_with_its_statistics_gives_its_return_again(finished):
    config = finished.config
    again = evaluate_saved(finished.best, config, 2, evaluation_seed(config))
    assert again.mean_return == pytest.approx(max(finished.evaluations()["mean_return"]), rel=1e-6)


def test_the_final_evaluation_is_of_other_episodes_and_is_written(finished):
    content = json.loads((finished.path / "final_evaluation.json").read_text())
    again = evaluate_saved(finished.last, finished.config, 2, evaluation_seed(finished.config, final=True))
    assert content["last"]["returns"] == pytest.approx(again.returns)
    assert content["last"]["timesteps"] == 640
    assert content["last"]["seed"] != evaluation_seed(finished.config)


def test_versions_and_command_are_written(finished):
    versions = yaml.safe_load((finished.path / "versions.yaml").read_text())
    assert versions["torch"] == torch.__version__.split("+")[0] or versions["torch"] == torch.__version__
    assert versions["python"] == sys.version.split()[0]
    assert len((finished.path / "command.txt").read_text().splitlines()) == 1


def test_the_curve_is_a_picture(finished):
    with Image.open(finished.path / "learning_curve.png") as image:
        assert image.size == (960, 600)
        assert len(image.convert("RGB").getcolors(2**20)) > 100


def test_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(CARTPOLE) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["trpo-CartPole-v1-s0-1", "trpo-CartPole-v1-s0-2"]


# Reproducibility ------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_however_it_is_watched(tmp_path):
    a = run(CARTPOLE, tmp_path / "a")
    b = run([*CARTPOLE, "--eval-freq", "64", "--save-freq", "64"], tmp_path / "b")
    c = run([*CARTPOLE, "--seed", "1"], tmp_path / "c")
    returns = [folder.training_episodes()["r"].tolist() for folder in (a, b, c)]
    assert returns[0] == returns[1] != returns[2]
    parameters = [TRPO.load(folder.last.model).policy.state_dict() for folder in (a, b)]
    for name, value in parameters[0].items():
        assert torch.equal(value, parameters[1][name])


def test_npg_trains_too(tmp_path):
    folder = run(["npg", *CARTPOLE[1:]], tmp_path / "npg")
    assert NPG.load(folder.last.model).num_timesteps == 256


# Continuing -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(finished, tmp_path):
    path = tmp_path / "copy"
    for name, content in contents(finished.path).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return RunFolder(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("hyperparameters", "target_kl", 0.9), "has target_kl=0.9, and .* was trained with target_kl=0.01"),
        (("hyperparameters", "policy_kwargs", {"net_arch": [64]}), r"policy_kwargs=\{'net_arch': \[64\]\}, and"),
        ((None, "policy", "MultiInputPolicy"), "has policy=MultiInputPolicy, and .* policy=MlpPolicy"),
    ],
)
def test_settings_that_were_edited_since_are_refused(edit, message, copy, capsys):
    config = yaml.safe_load((copy.path / "config.yaml").read_text())
    part, name, value = edit
    (config if part is None else config[part])[name] = value
    (copy.path / "config.yaml").write_text(yaml.safe_dump(config))
    before = contents(copy.path)
    error = refused(["--resume", copy.path, "--timesteps", "700"], capsys)
    assert re.search(message, error)
    assert "Write that back" in error
    before.pop(".lock", None)
    assert {name: content for name, content in contents(copy.path).items() if name != ".lock"} == before


def test_the_best_agent_is_of_the_line_that_goes_on(copy):
    """A best agent that came after the checkpoint is taken back with the records: to the one of that time, if kept."""
    kept = TRPO.load(copy.best_before.model).num_timesteps
    assert kept in (256, 448)  # the best of the evaluations up to the last checkpoint
    earlier = copy.best_before.model.read_bytes()
    copy_agent(copy.last, copy.best)  # of step 640
    copy.cut_best(448)
    assert copy.best.model.read_bytes() == earlier
    copy.cut_best(448)
    assert copy.best.model.read_bytes() == earlier
    with pytest.warns(UserWarning, match=r"best_model.zip came after step 128, where the run goes on, and is removed"):
        copy.cut_best(128)
    assert not copy.best.model.exists()


def test_a_damaged_best_agent_does_not_keep_a_run_from_going_on(copy):
    copy.best.model.write_bytes(copy.best.model.read_bytes()[:-100])
    damaged = copy.best.model.read_bytes()
    resume(copy.path, timesteps=1000).folder.unlock()
    assert copy.best.model.read_bytes() == damaged


def test_a_run_that_lost_its_last_agent_goes_on_with_the_best_of_its_line(copy):
    copy_agent(copy.last, copy.best)
    copy.last.model.unlink()
    with pytest.warns(UserWarning, match="last_model.zip is missing"):
        resume(copy.path).folder.unlock()
    assert TRPO.load(copy.best.model).num_timesteps <= 448
    assert list(copy.evaluations()["timesteps"]) == [256, 448]


def test_a_run_continues_with_everything_that_was_saved(copy):
    state = read_state(copy.last)
    saved = state["generators"]
    continued = resume(copy.path, timesteps=1000)
    assert torch.equal(torch.get_rng_state(), torch.from_numpy(saved["torch"]))
    assert random.getstate() == saved["python"]
    np.testing.assert_array_equal(np.random.get_state()[1], saved["numpy"][1])  # noqa: NPY002
    model = TRPO.load(copy.last.model)
    assert continued.model.num_timesteps == 640
    assert continued.model._n_updates == 10
    for name, value in model.policy.state_dict().items():
        assert torch.equal(value, continued.model.policy.state_dict()[name])
    old, new = model.policy.optimizer.state_dict(), continued.model.policy.optimizer.state_dict()
    assert new["state"].keys() == old["state"].keys() != set()
    for key, moments in old["state"].items():
        assert torch.equal(moments["exp_avg_sq"], new["state"][key]["exp_avg_sq"])
    statistics = state["statistics"]["observations"][""]
    running = continued.model.get_vec_normalize_env()
    np.testing.assert_array_equal(running.obs_rms.mean, statistics["mean"])
    assert running.obs_rms.count == statistics["count"] > 640
    assert running.training
    assert running.norm_reward
    continued.model.get_env().close()


def test_records_are_continued_and_not_overwritten(copy):
    names = ["monitor.csv", "progress.csv", "evaluations.csv", "command.txt", "versions.yaml"]
    before = {name: (copy.path / name).read_text() for name in names}
    checkpoints = contents(copy.checkpoints)
    assert main(["--resume", str(copy.path), "--timesteps", "1000", "--no-progress"]) == 0
    for name in names:
        assert (copy.path / name).read_text().startswith(before[name])
    assert len((copy.path / "command.txt").read_text().splitlines()) == 2
    assert contents(copy.checkpoints).items() >= checkpoints.items()
    assert TRPO.load(copy.last.model).num_timesteps == 1024
    assert list(copy.evaluations()["timesteps"]) == [256, 448, 640, 832, 1024]
    with (copy.path / "progress.csv").open() as file:
        steps = [int(row["time/total_timesteps"]) for row in csv.DictReader(file)]
    assert steps == sorted(steps)
    assert copy.config.timesteps == 1000


def test_an_earlier_checkpoint_continues_in_a_folder_of_its_own(copy, tmp_path, capsys):
    before = contents(copy.path)
    checkpoint = copy.checkpoints / "model_256_steps.zip"
    message = refused(["--resume", checkpoint], capsys)
    assert "has trained on to step 640" in message
    assert "--run-dir NEW" in message
    branch = tmp_path / "branch"
    arguments = ["--resume", str(checkpoint), "--run-dir", str(branch), "--timesteps", "400", "--no-progress"]
    assert main(arguments) == 0
    assert contents(copy.path) == before
    assert TRPO.load(RunFolder(branch).last.model).num_timesteps == 448
    assert list(RunFolder(branch).evaluations()["timesteps"]) == [448]
    assert RunFolder(branch).config == replace(copy.config, timesteps=400)
    capsys.readouterr()
    assert "exists" in refused(arguments, capsys)


def test_a_checkpoint_takes_the_place_of_a_last_agent_that_is_lost(copy):
    copy.last.model.write_bytes(b"garbage")
    continued = resume(copy.checkpoints / "model_448_steps.zip")
    assert continued.model.num_timesteps == 448
    continued.model.get_env().close()


@pytest.mark.parametrize("stopped", ["in the last update", "in the final evaluation"])
def test_a_run_that_lacks_its_final_evaluation_gets_it(stopped, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        if stopped == "in the last update":
            train = TRPO.train

            def interrupted(self):
                train(self)
                if self.num_timesteps == 256:
                    signal.raise_signal(signal.SIGINT)

            patch.setattr(TRPO, "train", interrupted)
            assert main([*CARTPOLE, "--run-dir", str(path)]) == 130
        else:

            def interrupted(*args):
                raise KeyboardInterrupt

            patch.setattr("agents.training.evaluate_saved", interrupted)
            with pytest.raises(SystemExit) as exit_info:
                main([*CARTPOLE, "--run-dir", str(path)])
            assert exit_info.value.code == 130
    folder = RunFolder(path)
    assert folder.final_timesteps is None
    updates = (path / "progress.csv").read_text()
    assert main(["--resume", str(path), "--no-progress"]) == 0
    assert folder.final_timesteps == TRPO.load(folder.last.model).num_timesteps == 256
    assert list(folder.evaluations()["timesteps"]).count(256) == 1
    assert (path / "progress.csv").read_text() == updates
    capsys.readouterr()
    assert "nothing is left to do" in refused(["--resume", path], capsys)


def test_a_full_disk_ends_with_a_message(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "run"
    monkeypatch.setattr(Saver, "_act", full)
    monkeypatch.setattr("agents.training.learning_curve", full)
    with pytest.raises(SystemExit) as exit_info:
        main([*CARTPOLE, "--save-freq", "100", "--run-dir", str(path)])
    assert exit_info.value.code == 1
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert f"--resume {path}" in message


def test_a_run_continues_on_a_machine_without_its_device(copy, capsys):
    config = yaml.safe_load((copy.path / "config.yaml").read_text()) | {"device": "cuda:99"}
    (copy.path / "config.yaml").write_text(yaml.safe_dump(config))
    assert "CUDA devices" in refused(["--resume", copy.path, "--timesteps", "700"], capsys)
    arguments = ["--resume", str(copy.path), "--timesteps", "700", "--device", "cpu", "--no-progress"]
    assert main(arguments) == 0
    assert copy.config.device == "cpu"


def test_an_interrupt_saves_and_tells_how_to_go_on(tmp_path, monkeypatch, capsys):
    path = tmp_path / "run"
    handler = signal.getsignal(signal.SIGINT)  # a shell in the background starts us with another than Python's own
    with monkeypatch.context() as patch:
        patch.setattr(Saver, "_act", lambda self: signal.raise_signal(signal.SIGINT))
        assert main([*CARTPOLE, "--save-freq", "100", "--run-dir", str(path)]) == 130
    assert f"--resume {path}" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler
    # The update under way was finished, then a single step was taken.
    assert TRPO.load(RunFolder(path).last.model).num_timesteps == 130
    assert (path / "learning_curve.png").is_file()
    assert main(["--resume", str(path), "--no-progress"]) == 0
    assert TRPO.load(RunFolder(path).last.model).num_timesteps >= 256


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tpro", "CartPole-v1"], "did you mean trpo"),
        (["trpo", "CartPol-v1"], "CartPole-v1"),
        (["trpo", "CartPole-v1", "--timestep", "5"], "did you mean --timesteps"),
        (["trpo", "CartPole-v1", "--set", "taget_kl=1"], "did you mean target_kl"),
        (["trpo", "CartPole-v1", "--set", "policy=MlpPolice"], "did you mean MlpPolicy"),
        (
            ["trpo", "CartPole-v1", "--set", "policy=MultiInputPolicy"],
            "policy=MultiInputPolicy: no MultiInputPolicy can",
        ),
        (
            ["trpo", "CartPole-v1", "--set", "policy=CnnLstmPolicy"],
            "policy=CnnLstmPolicy: no CnnLstmPolicy can be made",
        ),
        (["trpo", "CartPole-v1", "--set", "policy_kwargs.net_ach=[8]"], "did you mean net_arch"),
        (["trpo", "CartPole-v1", "--set", "policy_kwargs.activation_fn=Than"], "activation_fn='Than'"),
        (["trpo", "CartPole-v1", "--set", "target_kl=-1"], "target_kl"),
        (["trpo", "CartPole-v1", "--set", "cg_damping=-1"], "cg_damping"),
        (["trpo", "CartPole-v1", "--set", "fisher_fraction=2"], "fisher_fraction"),
        (["trpo", "CartPole-v1", "--set", "gamma"], "key=value"),
        (["trpo", "CartPole-v1", "--preset", "CartPole-v2"], "did you mean CartPole-v1"),
        (["trpo", "CartPole-v1", "--preset", "none.yaml"], "none.yaml"),
        (["trpo", "CartPole-v1", "--timesteps", "0"], "timesteps must be at least 1; got 0"),
        (["trpo", "CartPole-v1", "--device", "cuda:99"], "CUDA devices"),
        (["trpo", "CartPole-v1", "--set", "stats_window_size=0"], "stats_window_size"),
        (["trpo", "CartPole-v1", "--set", "policy_kwargs=5"], "policy_kwargs must be a mapping"),
        (["trpo", "CartPole-v1", "--set", "policy_kwargs.activation_fn=functional"], "activation_fn='functional'"),
        (["trpo", "CartPole-v1", "--set", "normalize.clip_obs=abc"], "normalize.clip_obs must be a number; got 'abc'"),
        (
            ["trpo", "CartPole-v1", "--set", "normalize.norm_obs=maybe"],
            "normalize.norm_obs must be true or false; got 'maybe'",
        ),
        (["npg", "CartPole-v1", "--set", "step_size=abc"], "step_size"),
        (["trpo", "CartPole-v1", "--backend", "pool"], "'envpool'"),
        (["trpo", "Blackjack-v1", "--backend", "gymnasium"], "policies take no Tuple"),
        (["trpo"], "ENV_ID"),
        (["trpo", "CartPole-v1", "more"], "'more'"),
        (["--resume", "none"], "not a run folder"),
    ],
)
def test_bad_input_is_refused_before_anything_is_created(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in refused(arguments, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_refused(copy, capsys):
    before = contents(copy.path)
    assert f"--resume {copy.path}" in refused([*CARTPOLE, "--run-dir", copy.path], capsys)
    assert contents(copy.path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "3"], "--seed"),
        (["--seed", "0"], "--seed"),
        (["--set", "gamma=0.9"], "--set"),
        (["npg", "Pendulum-v1"], "trpo, not npg"),
        (["trpo", "CartPole-v1"], "Pendulum-v1, not CartPole-v1"),
        ([], "nothing is left to do"),
    ],
)
def test_a_run_keeps_what_it_began_with(copy, arguments, message, capsys):
    before = contents(copy.path)
    assert message in refused([*arguments, "--resume", copy.path], capsys)
    assert contents(copy.path) == before


@pytest.fixture
def old(copy):
    """A folder as it was written when the statistics and the generators were pickles beside the model."""
    config = copy.config
    for files in (copy.last, copy.best, *(copy.checkpoint(n) for n in (256, 448))):
        state = read_state(files)
        env = normalized(make_env(config, 2, 0, evaluation=False), config, training=True)
        set_statistics(env, state["statistics"])
        env.save(str(files.statistics))
        env.close()
        rng = state["generators"] | {"torch": torch.from_numpy(state["generators"]["torch"])}
        del rng["actions"]
        files.rng.write_bytes(pickle.dumps(rng))
        with zipfile.ZipFile(files.model) as archive:
            parts = {name: archive.read(name) for name in archive.namelist() if name != "state.json"}
        with zipfile.ZipFile(files.model, "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, content)
    written = yaml.safe_load((copy.path / "config.yaml").read_text())
    del written["exact_resume"]
    (copy.path / "config.yaml").write_text(yaml.safe_dump(written))
    return copy


def test_an_old_folder_goes_on_and_can_be_evaluated(old, finished):
    seed = evaluation_seed(old.config, final=True)
    again, expected = (evaluate_saved(folder.last, folder.config, 2, seed) for folder in (old, finished))
    assert again.returns == expected.returns
    generators = pickle.loads(old.last.rng.read_bytes())
    continued = resume(old.path, timesteps=1000)
    assert torch.equal(torch.get_rng_state(), generators["torch"])
    assert (
        continued.model.get_vec_normalize_env().obs_rms.count
        == read_state(finished.last)["statistics"]["observations"][""]["count"]
    )
    continued.train(progress=False)
    assert old.config.exact_resume == "state"
    assert read_state(old.last)["environments"] is not None
    assert list(old.evaluations()["timesteps"]) == [256, 448, 640, 832, 1024]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing", "a flipped bit"])
def test_a_damaged_last_agent_is_passed_over_and_nothing_is_lost(copy, finished, damage):
    path = copy.last.model
    if damage == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes({"truncated": content[:-200], "garbage": b"garbage"}.get(damage, content))
    before = {name: (copy.path / name).read_text() for name in ("progress.csv", "monitor.csv", "evaluations.csv")}
    with pytest.warns(UserWarning, match=r"last_model\.zip.*The run goes on from .*model_448_steps\.zip"):
        assert main(["--resume", str(copy.path), "--no-progress"]) == 0
    states = [TRPO.load(folder.last.model).policy.state_dict() for folder in (copy, finished)]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])
    for name, text in before.items():  # as many rows as before
        assert (copy.path / name).read_text().count("\n") == text.count("\n")


def test_no_agent_is_left_where_all_are_damaged(copy, capsys):
    for path in (copy.last.model, *copy.agents.all()):
        path.write_bytes(path.read_bytes()[:-200])
    before = contents(copy.path)
    message = refused(["--resume", copy.path, "--timesteps", "1000"], capsys)
    assert "model_256_steps.zip is truncated or damaged" in message
    assert "no agent of the run is left" in message
    assert contents(copy.path) == before


def test_an_agent_of_a_newer_version_is_refused_by_name(copy, capsys, monkeypatch):
    monkeypatch.setattr("agents.runs.FORMAT", 99)
    model = TRPO.load(copy.last.model, env=make_env(copy.config, 2, 0, evaluation=False))
    model.set_logger(Logger(None, []))
    save_agent(model, copy.last)
    before = contents(copy.path)
    message = refused(["--resume", copy.path, "--timesteps", "1000"], capsys)
    assert "last_model.zip was written by a newer version of npg-toolkit, in format 99" in message
    assert contents(copy.path) == before


def test_a_second_run_is_kept_out_of_the_folder(copy, capsys):
    first = resume(copy.path, timesteps=1000)
    before = contents(copy.path)
    assert "is in use: another process trains in it" in refused(["--resume", copy.path, "--timesteps", "900"], capsys)
    assert contents(copy.path) == before
    first.train(progress=False)
    assert main(["--resume", str(copy.path), "--timesteps", "1100", "--no-progress"]) == 0


class Code:
    """What runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("place", ["vecnormalize.pkl", "rng.pkl", "data", "policy.pth", "state.json", "config.yaml"])
def test_no_file_runs_code(old, place, tmp_path, capsys):
    ran = tmp_path / "ran"
    malicious = pickle.dumps(Code(ran))
    model = old.last.model
    if place.endswith(".pkl"):
        (old.path / place).write_bytes(malicious)
        old.best.statistics.write_bytes(malicious)
    elif place == "config.yaml":
        text = f"\nenv_kwargs: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{ran}]]\n"
        with (old.path / place).open("a") as file:
            file.write(text)
    else:
        with zipfile.ZipFile(model) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        parts[place] = malicious
        if place == "data":
            data = json.loads(TRPO_data(model))
            data["observation_space"] |= {":serialized:": base64.b64encode(malicious).decode()}
            parts[place] = json.dumps(data)
        with zipfile.ZipFile(model, "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, content)
        old.best.model.write_bytes(model.read_bytes())
    for path in old.agents.all():
        path.unlink()
    message = refused(["--resume", old.path, "--timesteps", "1000"], capsys)
    assert "error: " in message
    if place != "rng.pkl":  # which an evaluation does not read
        with pytest.raises((ValueError, FileNotFoundError)):
            evaluate_saved(old.best, old.config, 1, 0)
    assert not ran.exists()


def TRPO_data(path):
    with zipfile.ZipFile(path) as archive:
        return archive.read("data")


@pytest.mark.parametrize("name", ["vecnormalize.pkl", "rng.pkl"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing"])
def test_damaged_files_are_refused_and_left(old, name, damage, capsys):
    copy = old
    path = copy.path / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-200] if damage == "truncated" else b"garbage")
    before = contents(copy.path)
    message = refused(["--resume", copy.path, "--timesteps", "1000"], capsys)
    assert name in message
    assert contents(copy.path) == before


def test_an_agent_of_another_algorithm_is_refused_and_left(copy, capsys):
    NPG("MlpPolicy", "Pendulum-v1", n_steps=32).save(copy.last.model)
    before = contents(copy.path)
    message = refused(["--resume", copy.path, "--timesteps", "1000"], capsys)
    assert "NPG" in message
    assert "TRPO" in message
    assert contents(copy.path) == before


# The command line -----------------------------------------------------------------------------------------------------


def test_help_fits_a_terminal(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert all(option in text for option in ("--timesteps", "--resume", "--set", "--video", "--eval-freq"))


@pytest.mark.slow
def test_the_script_runs_and_shows_progress(tmp_path):
    arguments = [a for a in CARTPOLE if a != "--no-progress"]
    command = [sys.executable, str(SCRIPT), *arguments, "--run-dir", str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    assert "last model" in result.stdout
    assert "Traceback" not in result.stderr
    assert "256/256" in result.stderr
    assert "return" in result.stderr


# Several processes ----------------------------------------------------------------------------------------------------

FRAGILE = """
import os, signal
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

class Fragile(CartPoleEnv):
    steps = 0

    def step(self, action):
        Fragile.steps += 1
        if Fragile.steps == 100 and os.environ["RANK"] == "1":
            if os.environ["BREAKS"] == "by a signal":
                os.kill(os.getpid(), signal.SIGTERM)
            elif os.environ["BREAKS"] == "by a kill" and not os.path.exists("killed"):
                open("killed", "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            elif os.environ["BREAKS"] == "by an error":
                raise OSError("the pole broke")
        return super().step(action)

gymnasium.register("Fragile-v0", entry_point=Fragile, max_episode_steps=50)
"""
BOTH = ["--timesteps", "600", "--eval-freq", "200", "--save-freq", "200", *TINY, "--set", "normalize=true"]


def two_processes(arguments, breaks, folder, where=("--standalone", "--nproc_per_node=2")):
    """Train in an environment that breaks in the 100th step of the second process."""
    process = start_processes(arguments, breaks, folder, where)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_processes(arguments, breaks, folder, where):
    (folder / "fragile.py").write_text(FRAGILE)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *where, str(SCRIPT), *arguments, "--no-progress"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "BREAKS": breaks},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


@pytest.mark.slow
def test_two_processes_stop_as_one_and_go_on(tmp_path):
    path = tmp_path / "run"
    stopped = two_processes(["trpo", "fragile:Fragile-v0", *BOTH, "--run-dir", str(path)], "by a signal", tmp_path)
    (at,) = map(int, re.findall(r"stopped and saved at step (\d+) of 600", stopped.stdout))
    assert 2 * 100 <= at <= 2 * (100 + LOOK_EVERY)  # where they next look, which depends on their speed
    assert 'Traceback (most recent call last):\n  File "' + str(SCRIPT) not in stopped.stderr
    assert TRPO.load(RunFolder(path).last.model).num_timesteps == at
    first = next(steps for steps in range(at + 64, 1000, 64) if steps // 200 > at // 200)  # that is evaluated
    end = next(steps for steps in range(at + 64, 1000, 64) if steps >= 600)

    refused = two_processes(["--resume", str(path)], "not", tmp_path)
    assert refused.returncode != 0
    assert "to make it would import fragile, which its folder alone cannot ask for" in refused.stderr
    finished = two_processes(["trpo", "fragile:Fragile-v0", "--resume", str(path)], "not", tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("last model") == 1
    folder = RunFolder(path)
    assert TRPO.load(folder.last.model).num_timesteps == end
    assert folder.config.n_envs == 2
    assert len((path / "command.txt").read_text().splitlines()) == 2
    assert len(list(path.glob("events*"))) == 2
    assert list(folder.evaluations()["timesteps"]) == [*([256] if at > 256 else []), first, end]
    with (path / "progress.csv").open() as file:
        steps = [int(row["time/total_timesteps"]) for row in csv.DictReader(file)]
    assert steps == sorted(steps)
    # Each process took half of the steps: more than that are in episodes and statistics only if both are.
    assert end // 2 < sum(folder.training_episodes()["l"]) <= end
    assert end <= read_state(folder.last)["statistics"]["observations"][""]["count"] <= end + 10


RESTARTED = [*BOTH, "--save-freq", "64", "--run-dir"]


def outcome_of(path, starts):
    folder = RunFolder(path)
    assert len((path / "command.txt").read_text().splitlines()) == starts
    model, state = TRPO.load(folder.last.model), read_state(folder.last)
    evaluations = folder.evaluations()["mean_return"].tolist()
    return to_text({name: value.numpy() for name, value in model.policy.state_dict().items()}), to_text(
        [state["statistics"], evaluations]
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = two_processes(["trpo", "fragile:Fragile-v0", *RESTARTED, str(folder / "run")], "not", folder)
    assert done.returncode == 0, done.stderr
    return outcome_of(folder / "run", starts=1)


@pytest.mark.slow
def test_two_processes_that_torchrun_restarts_end_as_the_undisturbed_ones(undisturbed, tmp_path):
    arguments = ["trpo", "fragile:Fragile-v0", *RESTARTED, str(tmp_path / "run")]
    where = ("--standalone", "--nproc_per_node=2", "--max-restarts=1")
    done = two_processes(arguments, "by a kill", tmp_path, where)
    assert done.returncode == 0, done.stderr
    assert outcome_of(tmp_path / "run", starts=2) == undisturbed


@pytest.mark.slow
def test_processes_of_two_machines_that_are_restarted_end_as_the_undisturbed_ones(undisturbed, tmp_path, free_port):
    # Only the torchrun of the killed process counts this as a restart.
    where = ["--nnodes=2", "--nproc_per_node=1", "--max-restarts=1", "--local-addr=127.0.0.1"]
    where += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port}"]
    arguments = ["trpo", "fragile:Fragile-v0", *RESTARTED, str(tmp_path / "run")]
    both = [start_processes(arguments, "by a kill", tmp_path, where) for _ in range(2)]
    for process in both:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    assert outcome_of(tmp_path / "run", starts=2) == undisturbed


def test_a_run_that_was_over_before_a_restart_is_left_as_it_is(trained, monkeypatch, capsys):
    monkeypatch.setattr("agents.cli.train_agent.restarted", lambda run_dir: run_dir == trained.path)
    before = {path: path.read_bytes() for path in trained.path.rglob("*") if path.is_file()}
    assert main(["trpo", "Pendulum-v1", "--run-dir", str(trained.path)]) == 0
    assert capsys.readouterr().out == f"{trained.path} was over before the restart: nothing is left to do\n"
    assert {path: path.read_bytes() for path in trained.path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_an_error_in_one_process_ends_both_and_is_shown_once(tmp_path):
    path = tmp_path / "run"
    broken = two_processes(["trpo", "fragile:Fragile-v0", *BOTH, "--run-dir", str(path)], "by an error", tmp_path)
    assert broken.returncode != 0
    assert broken.stderr.count("OSError: the pole broke") == 1
    assert "Connection" not in broken.stderr
    assert TRPO.load(RunFolder(path).last.model).num_timesteps == 0


def test_processes_share_the_environments_evenly(tmp_path):
    config = resolve("trpo", "CartPole-v1", n_envs=8)
    world = World(torch.device("cpu"), size=3)
    with pytest.raises(ValueError, match=r"n_envs=8 must be a multiple of the 3 processes.*--n-envs 9"):
        start(config, tmp_path / "run", world=world)
    assert not (tmp_path / "run").exists()


# Several seeds --------------------------------------------------------------------------------------------------------

BREAKABLE = """
import os, signal, sys
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

class Breakable(CartPoleEnv):
    steps = 0

    def step(self, action):
        Breakable.steps += 1
        if Breakable.steps == 200 and os.environ["BREAKS"] == "yes":
            if "--seed=1" in sys.argv:
                raise OSError("the pole broke")
            if "--seed=2" in sys.argv:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)

gymnasium.register("Breakable-v0", entry_point=Breakable, max_episode_steps=50)
"""


@pytest.fixture
def breakable(tmp_path, monkeypatch):
    """The module of an environment that breaks with seed 1, and kills its process with seed 2."""
    (tmp_path / "breakable.py").write_text(BREAKABLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return "breakable:Breakable-v0"


def statuses(path):
    summary = json.loads((path / "summary.json").read_text())
    return {row["seed"]: row["status"] for row in summary["seeds"]}, summary["statistics"]


@pytest.mark.slow
def test_a_seed_that_fails_or_is_killed_leaves_the_others_and_goes_on(breakable, tmp_path, monkeypatch, capsys):
    path = tmp_path / "seeds"
    monkeypatch.setenv("BREAKS", "yes")
    arguments = ["trpo", breakable, "--timesteps", "256", *TINY, "--save-freq", "100", "--eval-freq", "256"]
    arguments += ["--threads", "1"]
    assert main([*arguments, "--seeds", "0-2", "--jobs", "2", "--run-dir", str(path)]) == 1
    found, numbers = statuses(path)
    assert found == {0: "done", 1: "failed", 2: "killed"}
    assert (numbers["seeds"], numbers["interval"]) == (1, None)
    out, err = capsys.readouterr()
    assert f"trpo {breakable} --resume {path}" in out
    assert re.search(r"seed 1 failed: .*the pole broke", out)
    assert str(path / "s1.log") in out
    assert "seed 2 killed: by SIGKILL" in out
    assert "seed 0 done, return " in err
    assert "Traceback" not in err
    assert (path / "learning_curves.png").is_file()
    before = contents(path / "s0")
    trained = TRPO.load(RunFolder(path / "s1").last.model).num_timesteps
    assert trained == 198  # as it was when its 200th step of one environment failed

    monkeypatch.setenv("BREAKS", "no")
    assert main(["trpo", breakable, "--resume", str(path), "--seeds", "3", "--threads", "1"]) == 0
    assert contents(path / "s0") == before
    found, numbers = statuses(path)
    assert found == {0: "done before", 1: "done", 2: "done", 3: "done"}
    assert numbers["seeds"] == 4
    assert len((path / "s1" / "command.txt").read_text().splitlines()) == 2  # it went on, and did not begin again
    returns = []
    for seed in range(4):
        folder = RunFolder(path / f"s{seed}")
        assert folder.config.seed == seed
        # Seed 1 was saved in the middle of the rollout that failed, and has gone on from there by whole ones.
        assert folder.final_timesteps == (trained + 64 if seed == 1 else 256)
        returns.append(json.loads((folder.path / "final_evaluation.json").read_text())["last"]["mean_return"])
    assert numbers["worst"] == min(returns)
    assert numbers["median"] == pytest.approx(np.median(returns))
    out, err = capsys.readouterr()
    assert "seed 0 done before, return " in err
    assert "95 % bootstrap" in out
    # A seed alone is the same run.
    alone = run([*arguments, "--seed", "3"], tmp_path / "alone")
    np.testing.assert_array_equal(alone.training_episodes()["r"], RunFolder(path / "s3").training_episodes()["r"])


@pytest.mark.slow
def test_an_interrupt_stops_all_seeds_which_save(tmp_path):
    path = tmp_path / "seeds"
    options = ["--timesteps", "1000000", *TINY, "--eval-freq", "1000000", "--seeds", "0-2", "--jobs", "2"]
    command = [sys.executable, str(SCRIPT), "trpo", "CartPole-v1", *options, "--run-dir", str(path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if all((path / f"s{seed}" / "progress.csv").exists() for seed in (0, 1)):
            break
        time.sleep(0.1)
    parent.send_signal(signal.SIGINT)
    out, err = parent.communicate(timeout=120)
    assert parent.returncode == 130, err
    assert f"--resume {path}" in out
    assert "Traceback" not in err
    assert statuses(path)[0] == {0: "stopped", 1: "stopped", 2: "waiting"}
    for seed in (0, 1):
        assert TRPO.load(RunFolder(path / f"s{seed}").last.model).num_timesteps > 0
        assert "stopped and saved at step" in (path / f"s{seed}.log").read_text()
    assert not (path / "s2").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "3-1"], "seeds must be numbers and ranges, such as 0-9 or 0,3,7; got '3-1'"),
        (["--seeds", "0-2", "--seed", "1"], "--seed cannot go with --seeds"),
        (["--seeds", "0-2", "--jobs", "0"], "--jobs must be at least 1; got 0"),
        (["--seeds", "268435456"], "seed must be at least 0 and less than 2**28"),
        (["--seeds", "0-2", "--set", "target_kl=-1"], "target_kl"),
        (["--seeds", "0-2", "--device", "cuda:99"], "CUDA devices"),
        (["--jobs", "2"], "--jobs is for several seeds: give --seeds"),
    ],
)
def test_seeds_that_cannot_be_are_refused_before_anything_is_created(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in refused(["trpo", "CartPole-v1", *arguments], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_seeds_that_begin_later_have_the_same_settings_as_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    preset, path, moved = tmp_path / "p.yaml", tmp_path / "seeds", tmp_path / "moved"
    preset.write_text("default: {target_kl: 0.01, normalize: {clip_obs: 5.0}}")
    begin = ["trpo", "CartPole-v1", "--timesteps", "64", "--preset", str(preset), *TINY, "--threads", "1"]
    assert main([*begin, "--seeds", "0", "--run-dir", str(path)]) == 0
    preset.write_text("default: {target_kl: 0.5}")
    path.rename(moved)
    assert main(["--resume", str(moved), "--seeds", "1", "--timesteps", "128", "--no-progress", "--threads", "1"]) == 0
    first, later = (RunFolder(moved / f"s{seed}").config for seed in (0, 1))
    assert first == replace(later, seed=0)
    assert (later.hyperparameters["target_kl"], later.normalize["clip_obs"], later.timesteps) == (0.01, 5.0, 128)
    assert later.save_freq == 64 // 5
    assert RunFolder(moved / "s0").final_timesteps == RunFolder(moved / "s1").final_timesteps == 128


def test_several_seeds_keep_what_they_began_with(tmp_path, monkeypatch, capsys):
    path = tmp_path / "seeds"
    folder = SeedsFolder.create(path, resolve("trpo", "CartPole-v1", timesteps=100), (0, 1), [])
    before = contents(path)
    for arguments, message in (
        (["--set", "gamma=0.9"], "--set cannot go with --resume"),
        (["--run-dir", tmp_path / "other"], "--run-dir cannot go with several seeds"),
        (["npg", "CartPole-v1"], "is trpo, not npg"),
        (["--seed", "1"], "--seed cannot go with --seeds"),
        (["--timesteps", "99"], "--timesteps must be at least 100"),
    ):
        assert message in refused(["--resume", path, *arguments], capsys)
    assert "--resume" in refused(["trpo", "CartPole-v1", "--seeds", "0-1", "--run-dir", path], capsys)
    monkeypatch.setenv("RANK", "0")
    assert "torchrun" in refused(["trpo", "CartPole-v1", "--seeds", "0-1"], capsys)
    assert contents(path) == before
    assert SeedsFolder.open(path) == folder


def test_several_seeds_do_not_continue_one_run(trained, tmp_path, capsys):
    before = contents(trained.path)
    for path in (trained.path, tmp_path):
        told = f"--seeds cannot go with --resume {path}, which is not the folder of several seeds: leave --seeds out"
        assert told in refused(["--resume", path, "--seeds", "0-1"], capsys)
    assert contents(trained.path) == before


def test_the_clock_of_training_goes_on_where_it_can(copy):
    first = copy.evaluations()
    assert all(np.diff(first["train_seconds"]) > 0)
    assert all(np.diff(first["train_cpu_seconds"]) > 0)
    assert main(["--resume", str(copy.path), "--timesteps", "1000", "--no-progress"]) == 0
    seconds = copy.evaluations()["train_seconds"]
    assert all(np.diff(seconds) > 0)  # 640 steps were evaluated: nothing is lost
    # From a checkpoint that was not evaluated in this folder nobody knows.
    branch = RunFolder(copy.path.parent / "branch")
    checkpoint = copy.checkpoints / "model_256_steps.zip"
    arguments = ["--resume", str(checkpoint), "--run-dir", str(branch.path), "--timesteps", "400", "--no-progress"]
    assert main(arguments) == 0
    assert np.isnan(branch.evaluations()["train_seconds"]).all()
