import shutil
from pathlib import Path

import numpy as np
import pytest

from agents.cli.export_agent import main
from agents.evaluation import make_env
from agents.export import load_exported
from agents.runs import RunFolder, load_agent


@pytest.mark.parametrize("model", ["best", "last", "checkpoint"])
def test_the_file_of_a_run_acts_as_its_agent(trained, model, tmp_path, capsys):
    checkpoint = trained.checkpoint(trained.agents.number(trained.agents.all()[0]))
    files = {"best": trained.best, "last": trained.last, "checkpoint": checkpoint}[model]
    source = [str(files.model)] if model == "checkpoint" else [str(trained.path), "--model", model]
    path = tmp_path / "policy.pt2"
    assert main([*source, "--format", "torch-export", "--out", str(path)]) == 0
    raw = np.random.default_rng(0).uniform(-1, 1, (9, 3)).astype(np.float32)
    config = trained.config
    agent, env, _ = load_agent(files, config, lambda: make_env(config, 1, 0, evaluation=True), training=False)
    expected, _ = agent.predict(env.normalize_obs(raw), deterministic=True)
    env.close()
    np.testing.assert_allclose(load_exported(path)(raw), expected, rtol=1e-5, atol=1e-5)
    out = capsys.readouterr().out
    assert f"steps, deterministic actions: {path}" in out
    assert "observation: float32 (N, 3)" in out


def test_the_file_lies_beside_its_model(trained):
    arguments = [str(trained.path), "--format", "torchscript", "--stochastic"]
    assert main(arguments) == 0
    path = trained.path / "best_model_stochastic.pt"
    raw = np.zeros((64, 3), np.float32)
    assert len(np.unique(load_exported(path)(raw))) > 1
    path.unlink()


@pytest.mark.parametrize("model", ["best", "last"])
def test_a_damaged_last_agent_is_not_exported_and_does_not_hide_the_best(trained, model, tmp_path, capsys):
    run = RunFolder(Path(shutil.copytree(trained.path, tmp_path / "run")))
    content = bytearray(run.last.model.read_bytes())
    content[len(content) // 2] ^= 0xFF
    run.last.model.write_bytes(content)
    arguments = [str(run.path), "--model", model, "--format", "torchscript"]
    if model == "last":
        with pytest.raises(SystemExit):
            main(arguments)
        assert f"{run.last.model} is truncated or damaged" in capsys.readouterr().err
    else:
        assert main(arguments) == 0
        assert f": {run.path / 'best_model.pt'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--format", "tflite"], "tflite"), (["--model", "worst"], "worst"), (["--outt", "x"], "did you mean --out")],
)
def test_bad_input_is_refused(refused, arguments, message):
    assert message in refused(main, *arguments)


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("p.bin", [], "--out must be a file that ends in .onnx, for --format onnx; got "),
        (
            "p.onnx",
            ["--format", "torchscript"],
            "--out must be a file that ends in .pt, for --format torchscript; got ",
        ),
        (
            "p.pt",
            ["--format", "torch-export"],
            "--out must be a file that ends in .pt2, for --format torch-export; got ",
        ),
        ("p", ["--format", "torchscript"], "--out must be a file that ends in .pt"),
        ("none/p.pt", ["--format", "torchscript"], "--out must be in a folder that exists: make it first; got "),
        ("d.pt", ["--format", "torchscript"], "--out must be a file; got "),
    ],
)
def test_a_file_that_cannot_be_written_or_read_again_is_refused_first(
    trained, refused, out, options, message, tmp_path
):
    (tmp_path / "d.pt").mkdir()
    assert message in refused(main, *options, "--out", str(tmp_path / out))
    assert [path.name for path in tmp_path.iterdir()] == ["d.pt"]


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "is not a run folder" in capsys.readouterr().err
