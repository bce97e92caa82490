import csv
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from npg.vision.cli import evaluate_cifar, train_cifar
from npg.vision.cli.train_cifar import configure
from npg.vision.run_folder import RunFolder

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_cifar.py"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, n in (("train", 24), ("test", 4)):
        for label in ("cat", "dog"):
            place = tmp_path / "images" / split / label
            place.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(place / f"{i}.png")
    return tmp_path / "images"


def status(arguments: list[str], main: Callable[[list[str]], int] = train_cifar.main) -> int:
    """The exit status of a command, whether its main function returns or exits."""
    try:
        return int(main(arguments))
    except SystemExit as end:
        return int(end.code or 0)


def arguments(folder: Path, run_dir: Path) -> list[str]:
    return [
        *("--data", str(folder), "--run-dir", str(run_dir), "--device", "cpu"),
        *("--validation-size", "16", "--batch-size", "8", "--epochs", "2"),
    ]


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_train_then_resume_from_the_first_epoch(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    asked = ["--preset", "report", "--set", "rank=4", "alpha=2", "--lr", "1e-2", "--seed", "3"]
    assert status(["wrn-10-1", "online-ngd", *arguments(folder, run), *asked]) == 0
    output = capsys.readouterr().out
    assert "epoch   2/2" in output
    assert "test top-1" in output
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["optimizer_options"] == {
        "lr": 0.01,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "decoupled_weight_decay": False,
        "rank": 4,
        "alpha": 2,
    }
    assert (config["seed"], config["schedule"], config["epochs"]) == (3, "step", 2)
    newest = run / "checkpoints" / "epoch_0002.pt"
    whole = torch.load(newest)["model"]
    before = rows(run)
    first = run / "checkpoints" / "epoch_0001.pt"
    assert status(["--resume", str(first)]) == 2
    assert f"the run has trained to {newest}" in capsys.readouterr().err
    again = tmp_path / "again"
    assert status(["--resume", str(first), "--run-dir", str(again)]) == 0
    timeless = ("epoch", "lr", "train_loss", "validation_loss", "validation_top1")
    assert [[row[k] for k in timeless] for row in rows(again)] == [[row[k] for k in timeless] for row in before]
    assert all(torch.equal(v, whole[k]) for k, v in torch.load(again / "checkpoints" / newest.name)["model"].items())
    # A newest checkpoint that is damaged stands in nobody's way.
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"epoch_0002.pt is truncated or damaged: it is passed over"):
        assert status(["--resume", str(run)]) == 0
    assert all(torch.equal(v, whole[k]) for k, v in torch.load(newest)["model"].items())


@pytest.mark.slow
def test_a_run_that_was_killed_in_its_first_epoch_begins_anew(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, asked = tmp_path / "run", ["wrn-10-1", "sgd", "--seed", "3", "--preset", "report"]
    killed = "import os; from npg.vision.training import Trainer; Trainer.evaluate = lambda *_: os.kill(os.getpid(), 9)"
    call = f"import runpy, sys; {killed}; sys.argv = {[str(SCRIPT), *asked, *arguments(folder, run)]}"
    ended = subprocess.run([sys.executable, "-c", f"{call}; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"])
    assert ended.returncode == -9
    assert (run / "config.yaml").exists()
    undisturbed = tmp_path / "undisturbed"
    assert status([*asked, *arguments(folder, undisturbed)]) == 0
    expected = torch.load(undisturbed / "checkpoints" / "epoch_0002.pt")["model"]
    again = tmp_path / "again"
    shutil.copytree(run, again)
    killed_run = Path(shutil.copytree(run, tmp_path / "killed"))
    for path, command in ((run, ["--resume", str(run)]), (again, [*asked, *arguments(folder, again)])):
        assert status(command) == 0
        found = torch.load(path / "checkpoints" / "epoch_0002.pt")["model"]
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    # what may change and what may not is as for a run with a checkpoint
    assert_what_a_resume_may_not_change(killed_run, capsys)
    moved = folder.rename(tmp_path / "moved")
    assert status(["wrn-10-1", "sgd", "--resume", str(killed_run), "--data", str(moved), "--epochs", "1"]) == 0
    config = yaml.safe_load((killed_run / "config.yaml").read_text())
    assert (config["data"], config["epochs"], len(rows(killed_run))) == (str(moved), 1, 1)


def test_a_checkpoint_outside_of_a_run_needs_a_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert status(["wrn-10-1", "sgd", *arguments(folder, run), "--epochs", "1"]) == 0
    (tmp_path / "kept").mkdir()
    kept = (run / "checkpoints" / "epoch_0001.pt").rename(tmp_path / "kept" / "best.pt")
    capsys.readouterr()
    assert status(["--resume", str(kept), "--epochs", "2"]) == 2
    assert f"{kept} is not in a run folder: give --run-dir NEW" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["best.pt"]
    assert status(["--resume", str(kept), "--epochs", "2", "--run-dir", str(tmp_path / "new")]) == 0
    assert [row["epoch"] for row in rows(tmp_path / "new")] == ["1", "2"]  # the checkpoint has its rows


def test_a_run_that_stop_above_ended_stays_ended(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert status(["wrn-10-1", "sgd", *arguments(folder, run), "--stop-above", "0"]) == 0
    before = rows(run)
    assert len(before) == 1
    assert status(["--resume", str(run)]) == 0
    assert rows(run) == before
    assert status(["--resume", str(run), "--stop-above", "99.9"]) == 0
    assert len(rows(run)) == 2


@pytest.mark.parametrize("ema", ["0", "0.5"])
def test_a_trained_model_is_evaluated_as_the_run_did(
    ema: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    monkeypatch.chdir(folder.parent)  # a relative path goes on meaning the same
    asked = [*arguments(Path(folder.name), run), "--ema", ema, "--threads", "1"]
    assert status(["wrn-10-1", "sgd", *asked]) == 0
    monkeypatch.chdir(run)
    capsys.readouterr()
    assert evaluate_cifar.main([str(run), "--device", "cpu"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert f"top-1 {summary['test_top1']:.2f}" in capsys.readouterr().out
    assert status([str(tmp_path)], evaluate_cifar.main) == 2
    assert "there is no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [["--amp"], ["--amp", "--channels-last", "--ema", "0.5"]])
def test_a_model_trained_in_bfloat16_is_evaluated_in_it(
    asked: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert status(["wrn-10-1", "sgd", *arguments(folder, run), "--eval-on", "test", "--threads", "1", *asked]) == 0
    assert status(["--resume", str(run)]) == 0
    capsys.readouterr()
    assert evaluate_cifar.main([str(run), "--device", "cpu"]) == 0
    last = {name: float(value) for name, value in rows(run)[-1].items()}
    told = "loss {test_loss:.4f}  top-1 {test_top1:.2f}  top-5 {test_top5:.2f}".format_map(last)
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: ten", "epochs must be a whole number; got 'ten'"),
        ("epochs: 1.5", "epochs must be a whole number; got 1.5"),
        ("augment: 1", "augment must be true or false; got 1"),
        ("mean: 0.5", "mean must be a list of numbers; got 0.5"),
        ("std: [a, b, c]", "std must be a list of numbers"),
        ("optimizers: [sgd]", "optimizers of preset"),
    ],
)
def test_presets_with_values_of_another_kind_are_refused(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text(text)
    assert status(["wrn-10-1", "sgd", "--preset", str(preset), "--lr", "0.1"]) == 2
    assert message in capsys.readouterr().err


def test_a_preset_may_leave_the_optimizers_empty(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("epochs: 3\noptimizers:\n")
    config, _ = configure({"model": "wrn-10-1", "optimizer": "sgd", "preset": str(preset), "lr": 0.1})
    assert (config.epochs, config.optimizer_options) == (3, {"lr": 0.1})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([], "say which MODEL and OPTIMIZER to train"),
        (["wrn-18-1", "sgd"], "wide_resnet has no depth 18; the nearest legal ones are 16 and 22"),
        (["resnet", "sgd"], "unknown model 'resnet'"),
        (["wrn-10-1", "sdg"], "unknown optimizer 'sdg': did you mean sgd"),
        (
            ["wrn-10-1", "sgd", "--preset", "rapport"],
            "unknown preset 'rapport': did you mean report? Or give a YAML file.",
        ),
        (["wrn-10-1", "sgd", "--set", "rank"], "setting 'rank' must have the form key=value"),
        (["wrn-10-1", "sgd", "--set", "rank=3"], "unknown option 'rank' of sgd: known are: lr, momentum"),
        (["wrn-10-1", "sgd", "--set", "lr={"], "setting 'lr={': the value is not YAML"),
        (["wrn-10-1", "sgd", "--epoch", "3"], "unknown option '--epoch': did you mean --epochs"),
        (["wrn-10-1", "sgd", "more"], "unexpected argument 'more'"),
        (["wrn-10-1", "sgd", "--device", "gpu"], "unknown device 'gpu'; known are cpu, cuda, cuda:0"),
        (["wrn-10-1", "sgd", "--threads", "0"], "threads must be at least 1"),
        (["wrn-10-1", "sgd", "--lr", "0.1", "--set", "lr=0.5"], "--lr is 0.1, and --set says lr=0.5: keep one of"),
        (["wrn-10-1", "sgd", "--lr", "nan"], "--lr must lie in [0, inf), got nan"),
        (["wrn-10-1", "sgd", "--lr=-1"], "--lr must lie in [0, inf), got -1.0"),
        (["wrn-10-1", "sgd", "--weight-decay", "nan"], "--weight-decay must lie in [0, inf), got nan"),
        (["wrn-10-1", "sgd", "--set", "lr=-1"], "lr must lie in [0, inf), got -1"),
        (["wrn-10-1", "sgd", "--set", "lr=nan"], "lr must lie in [0, inf), got nan"),
        (["wrn-10-1", "sgd", "--seed", "x"], "argument --seed: must be a whole number, such as 1000 or 1e3; got 'x'"),
        (["wrn-10-1", "sgd", "--gamma", "x"], "argument --gamma: must be a number, such as 0.1 or 1e-3; got 'x'"),
        (["wrn-10-1", "sgd", "--preset", "report", "--resume", "nowhere"], "--preset cannot go with --resume"),
        (["wrn-10-1", "sgd", "--batch-size", "1000"], "batch_size must be between 1 and the 32 training images"),
        (["wrn-10-1", "sgd", "--data", "nowhere"], "no data at nowhere: expected CIFAR-10's Python archive"),
        (["wrn-10-1", "sgd", "--resume", "nowhere"], "there is no checkpoint at nowhere"),
    ],
)
def test_bad_input_ends_in_one_line(
    asked: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert status([*asked[:2], *arguments(folder, tmp_path / "run"), *asked[2:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{Path(sys.argv[0]).name}: error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def assert_what_a_resume_may_not_change(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    for asked, message in (
        (["wrn-16-1", "sgd"], "is of model wrn-10-1, not of wrn-16-1: resume with wrn-10-1 sgd, or start a new run"),
        (["wrn-10-1", "adam"], "is of optimizer sgd, not of adam"),
        (["--batch-size", "4"], "batch_size is 8 in"),
        (["--lr", "5"], "optimizer_options is"),
        (["--seed", "7"], "and cannot become 7 there: start a new run"),
    ):
        assert status([*asked, "--resume", str(run)]) == 2
        assert message in capsys.readouterr().err


def test_what_a_resume_may_not_change(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert status(["wrn-10-1", "sgd", *arguments(folder, run)]) == 0
    capsys.readouterr()
    assert status(["wrn-10-1", "sgd", *arguments(folder, run)]) == 2
    assert "exists: continue it with --resume" in capsys.readouterr().err
    assert_what_a_resume_may_not_change(run, capsys)
    assert len(rows(run)) == 2
    assert status(["--resume", str(run), "--epochs", "3"]) == 0
    assert len(rows(run)) == 3
    for split in ("train", "test"):  # which makes class 0 the other one
        (folder / split / "cat").rename(folder / split / "zebra")
    capsys.readouterr()
    for main, asked in ((train_cifar.main, ["--resume", str(run), "--epochs", "4"]), (evaluate_cifar.main, [str(run)])):
        assert status(asked, main) == 2
        assert "has 'cat' for class 0, and the images have 'dog'" in capsys.readouterr().err


def test_a_loss_that_explodes_ends_with_status_1(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(["wrn-10-1", "sgd", *arguments(folder, tmp_path / "run"), "--lr", "1e38"]) == 1
    assert "is not finite. No epoch was finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (KeyboardInterrupt(), 130, "ended at once"),
    ],
)
def test_what_ends_a_run_is_told_with_the_way_to_go_on(
    error: BaseException,
    expected: int,
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        write = RunFolder.write_checkpoint

        def fail_after_the_first(self: RunFolder, epoch: int, state: dict[str, Any]) -> Path:
            if epoch == 2:
                raise error
            return write(self, epoch, state)

        patch.setattr(RunFolder, "write_checkpoint", fail_after_the_first)
        assert status(["wrn-10-1", "sgd", *arguments(folder, run)]) == expected
    told = capsys.readouterr().err
    assert message in told
    assert f"--resume {run}" in told
    assert status(["--resume", str(run)]) == 0
    assert [row["epoch"] for row in rows(run)] == ["1", "2"]


@pytest.mark.slow
def test_curves_are_drawn_from_runs_and_from_a_csv(folder: Path, tmp_path: Path) -> None:
    run, table = tmp_path / "run", tmp_path / "curves.csv"
    assert status(["wrn-10-1", "sgd", *arguments(folder, run)]) == 0
    lines = [f"net-1-ngd/7,valid_prec,{i},{100 + i},{50 + i}" for i in range(3)]
    table.write_text("\n".join(["run,tag,step,wall_time,value", "net-1-ngd/7,lr,0,99,0.1", *lines]))
    draw = [sys.executable, str(SCRIPT.parent / "figures" / "cifar_curves.py")]
    done = subprocess.run([*draw, str(run), str(table), "--out", str(tmp_path / "new" / "curves.png")], check=False)
    assert done.returncode == 0
    with Image.open(tmp_path / "new" / "curves.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] > pixels.shape[1] * 0.6  # two rows of panels, one per model
    vermilion, black = (213, 94, 0), (0, 0, 0)
    assert (pixels == vermilion).all(2).sum() > 100
    assert (pixels == black).all(2).sum() > 100
    done = subprocess.run([*draw, str(tmp_path / "images")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is neither a run folder of train_cifar.py" in done.stderr


def test_help_fits_80_columns() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"],
        env=os.environ | {"COLUMNS": "200", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert max(map(len, done.stdout.splitlines())) <= 80
    for word in ("densenet-19", "online-ngd", "--preset", "--resume", "torchrun"):
        assert word in done.stdout
