"""The commands as processes: from any folder, with any console, with readers that leave."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from agents.runs import RunFolder
from npg.runs.command_line import again

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
TINY = ["trpo", "CartPole-v1", "--n-envs=2", "--eval-episodes=2", "--device=cpu", "--backend=gymnasium"]
TINY += ["--set=n_steps=32", "--set=n_critic_updates=1", "--set=policy_kwargs.net_arch=[8]"]


def script(command: str) -> Path:
    return ROOT / "scripts" / f"{command.removeprefix('npg-').replace('-', '_')}.py"


def process(command: str, *arguments: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    words = [sys.executable, *(str(a) for a in (script(command), *arguments))]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, cwd=cwd, env=environment, encoding="utf-8")


def test_each_script_is_a_command_of_the_package():
    scripts = {path.name for path in (ROOT / "scripts").glob("*.py")}
    assert scripts == {script(command).name for command in COMMANDS}
    for command, target in COMMANDS.items():
        module = target.removesuffix(":main")
        assert module.rpartition(".")[2] == script(command).stem
        assert f"from {module} import main" in script(command).read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_version_is_the_packages(command, capsys):
    with pytest.raises(SystemExit) as end:
        import_module(COMMANDS[command].removesuffix(":main")).main(["--version"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    try:
        expected = importlib.metadata.version("npg-toolkit")
    except importlib.metadata.PackageNotFoundError:
        expected = "(not installed)"
    assert out.startswith(f"npg-toolkit {expected}, PyTorch ")


def test_help_that_nobody_reads_is_no_error(tmp_path):
    started = process("npg-train-cifar", "--help", cwd=tmp_path, PYTHONIOENCODING="ascii")
    started.stdout.close()
    assert started.wait(timeout=600) == 0
    assert started.stderr.read() == ""


def test_a_console_without_the_signs_of_the_table_shows_the_numbers(tmp_path):
    console = {"PYTHONIOENCODING": "ascii"}
    training = process("npg-train-agent", *TINY, "--timesteps=128", "--run-dir=run", cwd=tmp_path, **console)
    out, err = training.communicate(timeout=600)
    assert training.returncode == 0, err
    assert "last model" in out
    assert " ? " in out
    assert out.rstrip().endswith("run folder: run")
    evaluation = process("npg-evaluate-agent", "run", "--episodes=2", cwd=tmp_path, PYTHONUNBUFFERED="1", **console)
    out, err = evaluation.communicate(timeout=600)
    assert evaluation.returncode == 0, err
    assert "best model" in out


def test_a_training_whose_reader_leaves_goes_on_to_its_end(tmp_path):
    training = process("npg-train-agent", *TINY, "--timesteps=512", "--run-dir=run", cwd=tmp_path)
    assert training.stdout.readline() == "trpo on CartPole-v1, seed 0: run\n"
    training.stdout.close()
    training.stderr.close()  # where the progress bar is drawn
    assert training.wait(timeout=600) == 0
    assert RunFolder(tmp_path / "run").final_timesteps == 512
    assert (tmp_path / "run" / "learning_curve.png").is_file()


@pytest.mark.skipif(os.name != "posix", reason="a shell's way to close a stream")
def test_a_command_may_have_no_console_at_all(tmp_path):
    words = [sys.executable, script("npg-train-agent"), *TINY, "--timesteps=64", "--run-dir=run"]
    line = " ".join(f"'{word}'" for word in map(str, words)) + " >&- 2>&-"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    assert (
        subprocess.run(line, shell=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, check=False).returncode
        == 0
    )
    assert (tmp_path / "run" / "final_evaluation.json").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_disk_that_is_full_is_an_error_still(tmp_path):
    words = [sys.executable, script("npg-train-agent"), "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    assert done.returncode != 0


def test_the_next_command_is_named_as_this_one_was(monkeypatch):
    for name, expected in (
        ("scripts/train_agent.py", "python scripts/train_agent.py --resume 'a b'"),
        ("/usr/local/bin/npg-train-agent", "npg-train-agent --resume 'a b'"),
        ("/Scripts/npg-train-agent.exe", "npg-train-agent --resume 'a b'"),
    ):
        monkeypatch.setattr(sys, "argv", [name, "trpo"])
        assert again("--resume", Path("a b")) == expected
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/npg-tune-agent"])
    assert again("trpo", command="train_agent") == "npg-train-agent trpo"
    monkeypatch.setattr(sys, "argv", ["scripts/tune_agent.py"])
    assert again("trpo", command="train_agent") == "python scripts/train_agent.py trpo"


def test_steps_are_read_alike_everywhere():
    from agents.cli import train_agent, tune_agent

    for command in (train_agent, tune_agent):
        assert command.make_parser().parse(["--timesteps", "1e6"]).timesteps == 1_000_000
