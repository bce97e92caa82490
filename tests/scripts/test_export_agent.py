import importlib.util
from pathlib import Path

import numpy as np
import pytest

from agents.config import resolve
from agents.evaluation import make_env
from agents.export import load_exported
from agents.runs import load_agent
from agents.training import start

SPEC = importlib.util.spec_from_file_location("export_agent", Path(__file__).parents[2] / "scripts" / "export_agent.py")
export_agent = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(export_agent)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.training.FINAL_EPISODES", 1)
        settings = {"normalize": True, "use_sde": False, "n_steps": 32, "policy_kwargs.net_arch": [8]}
        options = {"timesteps": 256, "n_envs": 2, "eval_episodes": 1, "save_freq": 128, "backend": "gymnasium"}
        config = resolve("trpo", "Pendulum-v1", settings=settings, device="cpu", **options)
        run = start(config, tmp_path_factory.mktemp("runs") / "run")
        run.train(progress=False)
    return run.folder


@pytest.mark.parametrize("model", ["best", "last", "checkpoint"])
def test_the_file_of_a_run_acts_as_its_agent(folder, model, tmp_path, capsys):
    checkpoint = folder.checkpoint(folder.agents.number(folder.agents.all()[0]))
    files = {"best": folder.best, "last": folder.last, "checkpoint": checkpoint}[model]
    source = [str(files.model)] if model == "checkpoint" else [str(folder.path), "--model", model]
    path = tmp_path / "policy.pt2"
    assert export_agent.main([*source, "--format", "torch-export", "--out", str(path)]) == 0
    raw = np.random.default_rng(0).uniform(-1, 1, (9, 3)).astype(np.float32)
    config = folder.config
    agent, env, _ = load_agent(files, config, lambda: make_env(config, 1, 0, evaluation=True), training=False)
    expected, _ = agent.predict(env.normalize_obs(raw), deterministic=True)
    env.close()
    np.testing.assert_allclose(load_exported(path)(raw), expected, rtol=1e-5, atol=1e-5)
    out = capsys.readouterr().out
    assert f"steps, deterministic actions: {path}" in out
    assert "observation: float32 (N, 3)" in out


def test_the_file_lies_beside_its_model(folder):
    arguments = [str(folder.path), "--format", "torchscript", "--stochastic"]
    assert export_agent.main(arguments) == 0
    path = folder.path / "best_model_stochastic.pt"
    raw = np.zeros((64, 3), np.float32)
    assert len(np.unique(load_exported(path)(raw))) > 1
    path.unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--format", "tflite"], "tflite"), (["--model", "worst"], "worst"), (["--outt", "x"], "did you mean --out")],
)
def test_bad_input_is_refused(folder, arguments, message, capsys):
    before = sorted(folder.path.rglob("*"))
    with pytest.raises(SystemExit) as exit_info:
        export_agent.main([str(folder.path), *arguments])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(folder.path.rglob("*")) == before


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        export_agent.main([str(tmp_path)])
    assert "is not a run folder" in capsys.readouterr().err
