import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from npg.runs import folder as module
from npg.runs.files import PARTIAL
from npg.runs.folder import FolderInUse, RunFolder, begun_only, refuse_existing, run_of, versions


def test_what_a_run_begins_with(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "run")
    folder.make()
    assert folder.checkpoints.is_dir()
    config = {"seed": 3, "algo": "x", "options": {"lr": 0.1}}
    folder.begin(config, "first")
    folder.begin(config | {"seed": 4}, "second")
    text = (folder.path / "config.yaml").read_text()
    assert yaml.safe_load(text) == config | {"seed": 4}
    assert text.startswith("seed: 4\nalgo: x\n")  # in the order that was given
    assert (folder.path / "command.txt").read_text() == "first\nsecond\n"
    path = folder.write_json("s.json", {"b": [1, None]})
    assert json.loads(path.read_text()) == {"b": [1, None]}
    assert sorted(p.name for p in folder.path.iterdir()) == [
        ".lock",
        *("checkpoints", "command.txt", "config.yaml", "s.json"),
    ]


def test_an_empty_folder_is_taken_and_anything_else_is_left(tmp_path: Path) -> None:
    RunFolder(tmp_path / "new").make()
    (tmp_path / "new" / "summary.json").touch()
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "empty").make()
    (tmp_path / "file").touch()
    for name in ("new", "file"):
        path = tmp_path / name
        with pytest.raises(FileExistsError, match=f"{name} exists: continue it with --resume {path}, or name another"):
            RunFolder(path).make()
        with pytest.raises(FileExistsError):
            refuse_existing(path)
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y"):
        told = f"run folder {path} cannot be made: {tmp_path / 'file'} is a file, .* with --run-dir$"
        with pytest.raises(NotADirectoryError, match=told):
            RunFolder(path).make()
    refuse_existing(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_run_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.make()
    checkpoint = folder.checkpoints / "1.pt"
    assert run_of(checkpoint) is None
    folder.begin({}, "")
    assert run_of(checkpoint) == folder.path
    assert run_of(folder.path / "1.pt") is None
    monkeypatch.chdir(folder.checkpoints)
    assert run_of(Path("1.pt")) == folder.path


def test_what_ran_where() -> None:
    found = versions(["numpy", "no-such-package"])
    assert list(found)[:4] == ["date", "python", "numpy", "no-such-package"]
    assert found["numpy"] == importlib.metadata.version("numpy") == np.__version__
    assert found["no-such-package"] is None
    assert found["platform"] == platform.platform()


def test_the_commit_is_that_of_this_source() -> None:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    assert versions([])["git_commit"] == (commit or None)


def test_results_in_docs_do_not_modify_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    for name in ("docs/results/x.csv", "npg/runs/folder.py", "scripts/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "npg" / "runs" / "folder.py"))
    (tmp_path / "docs/results/x.csv").write_text("2")
    assert versions([])["git_modified"] is False
    (tmp_path / "scripts/a.py").write_text("2")
    assert versions([])["git_modified"] is True


def test_a_machine_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(module.subprocess, "run", missing)
    found = versions([])
    assert found["git_commit"] is found["git_modified"] is None


def test_a_run_that_was_ended_during_its_start_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert not begun_only(path)
    (path / "checkpoints").mkdir(parents=True)  # killed before it made the lock
    assert begun_only(path)
    RunFolder(path).make()
    RunFolder(path).begin({}, "first")
    (path / "checkpoints" / f".1.pt.1{PARTIAL}").touch()
    assert begun_only(path)
    refuse_existing(path)
    again = RunFolder(path)
    again.make()
    assert list(again.checkpoints.iterdir()) == []
    for name in ("checkpoints/1.pt", "last_model.zip", "notes.txt"):
        (path / name).touch()
        assert not begun_only(path)
        with pytest.raises(FileExistsError, match="continue it with --resume"):
            refuse_existing(path)
        (path / name).unlink()
    (path / "metrics.csv").write_text("epoch\n1\n")  # killed before its first checkpoint
    assert begun_only(path)
    (path / "metrics.csv").write_text("epoch\n1\n2\n")  # whoever took the checkpoints away keeps the rows
    assert not begun_only(path)
    (path / "metrics.csv").unlink()
    (path / ".lock").unlink()  # a folder that is not ours
    assert not begun_only(path)


TRAIN = """
import sys, time
from pathlib import Path
from npg.runs.folder import RunFolder

folder = RunFolder(Path(sys.argv[1]))
folder.make()
(folder.path / "command.txt").touch()
(folder.path / f".left.{PARTIAL}").touch()
print("ready", flush=True)
time.sleep(600)
""".replace("{PARTIAL}", "1" + PARTIAL)


def test_a_second_process_is_kept_out_until_the_first_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", TRAIN, str(path)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout
        assert first.stdout.readline() == "ready\n"
        try:
            with pytest.raises(FolderInUse, match=r"run is in use: another process trains in it\. Wait for its end"):
                RunFolder(path).lock()
            with pytest.raises(FolderInUse):
                RunFolder(path).make()
            assert list(path.glob(f".*{PARTIAL}"))  # of a process that lives
        finally:
            first.kill()
    folder = RunFolder(path)
    folder.lock()
    assert not list(path.glob(f".*{PARTIAL}"))
    with pytest.raises(FolderInUse):
        RunFolder(path).lock()
    folder.unlock()
    RunFolder(path).lock()
