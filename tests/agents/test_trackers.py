"""Weights & Biases and MLflow: what they get, how they go on, and that a training does not depend on them.

Where the packages are installed the real ones take part, without a network.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

import agents.training
from agents.cli import train_agent
from agents.config import resolve
from agents.runs import RunFolder
from agents.trackers import TRACKERS, Tracker, TrackerError, check_trackers
from agents.training import resume, start

TINY = ["trpo", "CartPole-v1", "--timesteps=128", "--n-envs=2", "--eval-episodes=2", "--no-progress", "--device=cpu"]
TINY += ["--backend=gymnasium", "--set=n_steps=32", "--set=n_critic_updates=1", "--set=policy_kwargs.net_arch=[8]"]


class Recorder(Tracker):
    """A tracker that keeps what it gets."""

    package = "recorder"
    runs: dict[str, list[tuple[int, dict[str, float]]]] = {}  # noqa: RUF012
    broken_after = 10**9

    def _begin(self, path, where, run, config):
        if where == "no login":
            raise RuntimeError("no\nlogin")
        self.run = run or f"r{len(self.runs)}"
        self.runs.setdefault(self.run, [])
        self.config = config
        return self.run

    def _send(self, row, step):
        if len(self.runs[self.run]) >= self.broken_after:
            raise ConnectionError("the cable was pulled")
        self.runs[self.run].append((step, row))

    def _finish(self):
        self.runs[self.run].append((-1, {}))


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(TRACKERS, "recorder", Recorder)
    monkeypatch.setitem(sys.modules, "recorder", SimpleNamespace())
    monkeypatch.setattr("agents.training.FINAL_EPISODES", 2)
    monkeypatch.setattr(Recorder, "runs", {})
    return Recorder


def config(timesteps=128):
    settings = {"n_steps": 32, "n_critic_updates": 1, "policy_kwargs.net_arch": [8]}
    options = {"n_envs": 2, "eval_episodes": 2, "backend": "gymnasium", "device": "cpu"}
    return resolve("trpo", "CartPole-v1", settings=settings, timesteps=timesteps, **options)


def test_a_tracker_gets_what_tensorboard_gets_and_goes_on_in_its_run(recorder, tmp_path):
    run = start(config(), tmp_path / "run")
    run.train(progress=False, trackers={"recorder": "a"})
    (rows,) = recorder.runs.values()
    steps = [step for step, _ in rows]
    assert steps[-1] == -1  # ended
    assert max(steps) == 128
    names = set().union(*(row for _, row in rows))
    assert {"train/kl", "eval/mean_return", "rollout/ep_rew_mean"} <= names
    assert "train/n_updates" not in names  # nor has TensorBoard
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == {"recorder": {"where": "a", "run": "r0"}}

    resume(tmp_path / "run", timesteps=256).train(progress=False, trackers={"recorder": "a"})
    assert recorder.runs.keys() == {"r0"}
    assert max(step for step, _ in recorder.runs["r0"]) == 256
    resume(tmp_path / "run", timesteps=384).train(progress=False, trackers={"recorder": "b"})
    assert recorder.runs.keys() == {"r0", "r1"}


def test_damaged_files_of_a_killed_machine_do_not_keep_a_run_from_going_on(recorder, tmp_path):
    run = start(config(), tmp_path / "run")
    run.train(progress=False, trackers={"recorder": "a"})
    (tmp_path / "run" / "trackers.json").write_text('{"recorder": {"wh')
    (tmp_path / "run" / "monitor.csv").write_text("")
    with pytest.warns(UserWarning, match=r"trackers\.json is damaged .*: the trackers begin runs of their own"):
        resume(tmp_path / "run", timesteps=256).train(progress=False, trackers={"recorder": "a"})
    assert recorder.runs.keys() == {"r0", "r1"}
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == {"recorder": {"where": "a", "run": "r1"}}
    episodes = RunFolder(tmp_path / "run").training_episodes()
    assert len(episodes["r"]) > 0
    assert (episodes["timesteps"] > 128).all()


def test_what_was_opened_is_closed_where_a_run_cannot_begin(recorder, monkeypatch, tmp_path):
    run, made = start(config(), tmp_path / "run"), []

    def make_env(*args, **kwargs):
        env = agents.training.evaluation_environments(*args, **kwargs)
        monkeypatch.setattr(env, "close", lambda: made.append(env))
        return env

    (tmp_path / "run" / "monitor.csv").write_text("no monitor file")
    monkeypatch.setattr(agents.training, "evaluation_environments", agents.training.make_env, raising=False)
    monkeypatch.setattr(agents.training, "make_env", make_env)
    with pytest.raises(ValueError, match="does not begin as a monitor file"):
        run.train(progress=False, trackers={"recorder": "a"})
    assert len(made) == 1
    assert recorder.runs["r0"][-1][0] == -1  # the tracker's run has ended


def test_a_tracker_that_breaks_ends_no_training(recorder, monkeypatch, tmp_path):
    monkeypatch.setattr(recorder, "broken_after", 1)
    with pytest.warns(UserWarning, match=r"recorder takes no more rows \(the cable was pulled\)") as warned:
        outcome = start(config(), tmp_path / "run").train(progress=False, trackers={"recorder": "a"})
    assert len([w for w in warned if "no more rows" in str(w.message)]) == 1
    assert outcome.evaluations
    assert len(recorder.runs["r0"]) == 1


def test_a_tracker_that_cannot_begin_says_so_in_one_line(recorder, tmp_path):
    with pytest.raises(TrackerError, match=r"^--recorder no login cannot begin: no login$"):
        start(config(), tmp_path / "run").train(progress=False, trackers={"recorder": "no login"})
    assert resume(tmp_path / "run").model.num_timesteps == 0  # begins anew


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_with_its_remedy_before_any_work(name, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    for more in ([], ["--seeds=0-1"]):
        with pytest.raises(SystemExit) as end:
            train_agent.main([*TINY, *more, f"--{name}=x", "--run-dir", str(tmp_path / "run")])
        assert end.value.code == 2
        assert f"error: --{name} needs the package {name}: pip install {name}\n" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


def test_a_project_has_a_name(recorder):
    with pytest.raises(ValueError, match="--recorder needs a name"):
        check_trackers({"recorder": " "})


def test_the_real_mlflow_has_the_run(monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions would rather have a database
    monkeypatch.setattr("agents.training.FINAL_EPISODES", 2)
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    path = tmp_path / "run"
    assert train_agent.main([*TINY, "--mlflow=ours", "--run-dir", str(path)]) == 0
    assert train_agent.main(["--resume", str(path), "--timesteps=256", "--mlflow=ours", "--no-progress"]) == 0
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("ours").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["algo"] == "trpo"
    kls = client.get_metric_history(run.info.run_id, "train/kl")
    assert [m.step for m in kls] == sorted(m.step for m in kls)
    assert kls[-1].step == 256


def test_the_real_wandb_has_the_run(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("agents.training.FINAL_EPISODES", 2)
    path = tmp_path / "run"
    assert train_agent.main([*TINY, "--wandb=ours", "--run-dir", str(path)]) == 0
    known = json.loads((path / "trackers.json").read_text())["wandb"]
    (file,) = path.glob(f"wandb/offline-run-*/run-{known['run']}.wandb")
    assert b"train/kl" in file.read_bytes()
    assert RunFolder(path).final_timesteps == 128
