"""scripts/benchmarks/cifar_small.py without its training: which learning rates it tries, and its table."""

import csv
import json
import math
from pathlib import Path
from types import ModuleType

import pytest

REST = [f"{name}_to_{level}" for name in ("epochs", "seconds") for level in (60, 70, 75)]
REST += ["best_validation_top1", "epochs_run", "seconds_per_epoch", "memory_peak_mb"]


@pytest.fixture(scope="module")
def script(load) -> ModuleType:
    return load("benchmarks", "cifar_small")


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ({0.1: 50.0, 0.3: 60.0, 0.9: 55.0}, math.sqrt(0.3 * 0.9)),
        ({0.1: 56.0, 0.3: 60.0, 0.9: 55.0}, math.sqrt(0.1 * 0.3)),
        ({0.1: 60.0, 0.3: 59.0, 0.9: 50.0}, 0.1 / 3),
        ({0.1: 50.0, 0.3: 59.0, 0.9: 60.0}, 2.7),
        ({0.1: 60.0, 0.3: 70.0, 0.9: math.nan}, math.sqrt(0.1 * 0.3)),
        ({0.1: math.nan, 0.3: math.nan, 0.9: math.nan}, 0.1 / 3),
    ],
)
def test_the_fourth_learning_rate_is_beside_the_best(script: ModuleType, accuracies: dict, expected: float) -> None:
    assert script.next_rate(accuracies) == pytest.approx(expected)


def test_a_crossing_is_between_two_evaluations(script: ModuleType) -> None:
    epochs, accuracies = [1.0, 2.0, 3.0, 4.0], [50.0, 58.0, 56.0, 66.0]
    assert script.crossing(epochs, accuracies, 30) == pytest.approx(0.5)
    assert script.crossing(epochs, accuracies, 57) == pytest.approx(1.875)
    assert script.crossing(epochs, accuracies, 60) == pytest.approx(3.4)
    assert script.crossing([10 * e for e in epochs], accuracies, 60) == pytest.approx(34.0)
    assert script.crossing(epochs, accuracies, 66) is None


def finished_run(path: Path, optimizer: str, accuracies: list[float]) -> None:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(f"{{optimizer: {optimizer}, optimizer_options: {{lr: 0.1}}}}")
    (path / "summary.json").write_text(
        json.dumps({"best_top1": max(accuracies), "train_seconds": 10 * len(accuracies)})
    )
    lines = [f"{epoch},{10 * epoch},{accuracy},3e8" for epoch, accuracy in enumerate(accuracies, start=1)]
    (path / "metrics.csv").write_text("\n".join(["epoch,seconds,validation_top1,memory_peak_bytes", *lines, ""]))


def test_the_table_of_finished_runs(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for optimizer in script.CENTRES:
        for seed in script.SEEDS:
            last = 69.0 if optimizer == "adagrad" and seed != 1 else 72.0 + seed
            finished_run(tmp_path / "runs" / "table" / f"{optimizer}_seed{seed}", optimizer, [55.0, 65.0, last])
    assert script.main(["table", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]) == 0
    with (tmp_path / "cifar_small.csv").open() as file:
        rows = {(row["optimizer"], row["seed"]): row for row in csv.DictReader(file)}
    assert len(rows) == 3 * len(script.CENTRES)
    assert (rows["sgd", "1"]["epochs_to_60"], rows["sgd", "1"]["seconds_to_60"]) == ("1.5", "15.0")
    assert float(rows["sgd", "1"]["epochs_to_70"]) == pytest.approx(2 + 5 / 8, abs=0.01)
    assert rows["adagrad", "0"]["epochs_to_70"] == rows["sgd", "0"]["epochs_to_75"] == ""
    assert (rows["ngd", "0"]["seconds_per_epoch"], rows["ngd", "0"]["memory_peak_mb"]) == ("10.0", "300")
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    cells = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert cells["sgd"] == ["0.1", "1.5", "2.6", "–", "15", "26", "–", "10.0", "300", "73.00"]
    assert cells["adagrad"][1:4] == ["1.5", "–", "–"]


@pytest.mark.parametrize("diverged", [0, 1, 2])
def test_a_run_that_diverged_at_once_is_the_worst_of_the_table(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], diverged: int
) -> None:
    for seed in script.SEEDS:
        run = tmp_path / "runs" / "table" / f"sgd_seed{seed}"
        finished_run(run, "sgd", [55.0, 65.0 + seed])
        if seed == diverged:
            (run / "diverged.txt").write_text("the loss of step 3 is not finite")
            for name in ("summary.json", "metrics.csv"):
                (run / name).unlink()
    (tmp_path / "cifar_small.csv").write_text(f"optimizer,seed,lr,{','.join(REST)}\nother,0,0.1{',1' * len(REST)}\n")
    common = ["--optimizers", "sgd", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    assert script.main(["table", *common]) == 0
    lowest = min(65.0 + seed for seed in script.SEEDS if seed != diverged)
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == f"{lowest:.2f}"
    with (tmp_path / "cifar_small.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["optimizer"] for row in rows] == ["other", "sgd", "sgd", "sgd"]  # what was there stays
    assert rows[1 + diverged]["seconds_per_epoch"] == rows[1 + diverged]["epochs_to_60"] == ""
    assert rows[1 + diverged]["best_validation_top1"] == "nan"
    assert script.main(["table", *common]) == 0
    with (tmp_path / "cifar_small.csv").open() as file:
        assert list(csv.DictReader(file)) == rows


def test_a_run_that_diverged_is_finished(script: ModuleType, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "diverged.txt").write_text("the loss of step 3 is not finite")
    script.train(run, "sgd", [])
    assert math.isnan(script.summary(run)["best_top1"])


@pytest.mark.slow
def test_a_run_that_is_refused_stops_the_benchmark(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, missing = tmp_path / "runs", tmp_path / "no such folder"
    assert script.main(["table", "--runs", str(runs), "--results", str(tmp_path), "--data", str(missing)]) == 1
    assert "no data at" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.csv"))
