"""What a folder names is imported only if the command that opens it names it too."""

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import gymnasium
import pytest

from agents.cli import evaluate_agent, export_agent, train_agent, tune_agent
from agents.config import resolve
from agents.seeds import SeedsFolder
from agents.training import continuation, start

ENV = "gift:Gift-v0"
MODULE = """
import gymnasium

gymnasium.register("Gift-v0", entry_point="gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=20)
"""
SETTINGS = {"n_steps": 16, "policy_kwargs.net_arch": [4]}
OPTIONS = {"timesteps": 32, "n_envs": 2, "eval_episodes": 1, "backend": "gymnasium", "device": "cpu"}


@pytest.fixture
def gift(tmp_path, monkeypatch):
    """A folder for the module, and of a run that had imported it."""
    monkeypatch.setattr("agents.training.FINAL_EPISODES", 1)
    (tmp_path / "gift.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = resolve("trpo", ENV, settings=SETTINGS, **OPTIONS)
    start(config, tmp_path / "run").train(progress=False)
    SeedsFolder.create(tmp_path / "seeds", config, [0, 1], [])
    if find_spec("optuna") is not None:
        from agents.tuning import Tuning, TuningConfig

        search = TuningConfig("trpo", ENV, trials=1, evaluations=1, options=OPTIONS, space={"gamma": {"choices": [1]}})
        Tuning.create(tmp_path / "search", search, settings=SETTINGS)
    monkeypatch.delitem(sys.modules, "gift")
    monkeypatch.delitem(gymnasium.registry, "Gift-v0")
    return tmp_path


def films(arguments, load):
    if load("figures", "films").main(arguments):
        raise SystemExit(2)
    return 0


@pytest.mark.parametrize(
    ("command", "folder", "options", "named"),
    [
        (evaluate_agent.main, "run", ["--episodes", "1"], ["--env", ENV]),
        (export_agent.main, "run", ["--format", "torch-export"], ["--env", ENV]),
        (films, "run", ["--seconds", "0.1", "--out", "films"], ["--env", ENV]),
        (train_agent.main, "run", ["--timesteps", "64", "--no-progress"], ["trpo", ENV]),
        (train_agent.main, "seeds", ["--no-progress"], ["trpo", ENV]),
        pytest.param(
            *(tune_agent.main, "search", [], ["trpo", ENV]),
            marks=pytest.mark.skipif(find_spec("optuna") is None, reason="needs the extra tune"),
        ),
    ],
    ids=["evaluate", "export", "films", "resume", "seeds", "tune"],
)
@pytest.mark.slow
def test_no_folder_imports_a_module(command, folder, options, named, gift, load, capsys, monkeypatch):
    monkeypatch.chdir(gift)
    if command is films:
        pytest.importorskip("pygame")
    opened = [*([] if "--env" in named else ["--resume"]), folder, *options]
    extra = [load] if command is films else []
    with pytest.raises(SystemExit) as end:
        command(opened, *extra)
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert f"the environment of {folder} is {ENV}, and to make it would import gift" in told
    remedy = f"add --env {ENV}" if "--env" in named else f"trpo {ENV} --resume {folder}"
    assert told.rstrip().endswith(remedy)
    assert "gift" not in sys.modules
    with pytest.raises(SystemExit):
        command([*opened, *named[:1], "other:Gift-v0"], *extra)
    assert "gift" not in sys.modules
    if folder != "seeds":  # of processes of their own
        assert command([*opened, *named], *extra) == 0
        assert "gift" in sys.modules


def test_seeds_that_stop_tell_the_command_that_goes_on(gift, capsys, monkeypatch):
    stopped = [SimpleNamespace(status="stopped")]
    monkeypatch.setattr(SeedsFolder, "run", lambda *args, **kwargs: stopped)
    monkeypatch.setattr(SeedsFolder, "summarize", lambda *args: None)
    monkeypatch.setattr(train_agent, "summary_table", lambda *args: "")
    assert train_agent.main(["trpo", ENV, "--resume", str(gift / "seeds")]) == 130
    assert f"trpo {ENV} --resume {gift / 'seeds'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("env", "expected"), [("CartPole-v1", "--resume a/b"), (ENV, f"trpo {ENV} --resume a/b")], ids=["known", "module"]
)
def test_the_command_that_goes_on_names_a_module(env, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/npg-tune-agent"])
    assert continuation("trpo", env, "a/b") == f"npg-tune-agent {expected}"
