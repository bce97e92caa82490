"""What is read from a run folder: the curve of the line of agents that ended in the last one, the result, progress."""

import json
import math
from pathlib import Path

import numpy as np

from agents.results import Curve, progress, read_curve, read_result
from agents.runs import RunFolder


def evaluations(path: Path, rows: list[tuple[float, ...]], header: str) -> RunFolder:
    lines = [header, *(",".join(map(str, row)) for row in rows)]
    (path / "evaluations.csv").write_text("\n".join(lines) + "\n")
    return RunFolder(path)


def test_a_run_that_went_over_steps_again_has_one_curve(tmp_path: Path) -> None:
    rows = [(100, 1, 5, 4), (200, 2, 10, 9), (300, 3, 15, 14), (200, 20, "nan", "nan"), (300, 30, "nan", "nan")]
    curve = read_curve(evaluations(tmp_path, rows, "timesteps,mean_return,train_seconds,train_cpu_seconds"))
    np.testing.assert_array_equal(curve.steps, [100, 200, 300])
    np.testing.assert_array_equal(curve.returns, [1, 20, 30])
    np.testing.assert_array_equal(curve.seconds, [5, math.nan, math.nan])
    np.testing.assert_array_equal(curve.cpu_seconds, [4, math.nan, math.nan])


def test_a_run_without_a_clock_or_without_an_evaluation(tmp_path: Path) -> None:
    empty = read_curve(RunFolder(tmp_path))
    assert isinstance(empty, Curve)
    assert [len(column) for column in (empty.steps, empty.returns, empty.seconds, empty.cpu_seconds)] == [0] * 4
    old = read_curve(evaluations(tmp_path, [(100, 1.5)], "timesteps,mean_return"))
    assert (old.steps[0], old.returns[0]) == (100, 1.5)
    assert np.isnan(old.seconds[0])


def test_the_result_is_that_of_the_final_evaluation(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert read_result(folder) is None
    last = {"timesteps": 640, "episodes": 20, "mean_return": 3.0, "std_return": 1.0, "min_return": 2, "max_return": 4}
    best = last | {"timesteps": 320, "mean_return": 9.0}
    folder.write_json("final_evaluation.json", {"last": last, "best": best})
    result = read_result(folder)
    assert result is not None
    assert (result.timesteps, result.episodes) == (640, 20)
    assert (result.return_mean, result.return_std, result.return_min, result.return_max) == (3.0, 1.0, 2.0, 4.0)
    assert result.best_return == 9.0
    assert json.loads((tmp_path / "final_evaluation.json").read_text())["last"] == last


def test_progress_is_of_the_last_whole_row(tmp_path: Path) -> None:
    assert progress(tmp_path, 1000) == "  0% |                | 0/1k"
    path = tmp_path / "progress.csv"
    path.write_text("a,time/total_timesteps,rollout/ep_rew_mean\n1,400,\n")
    assert progress(tmp_path, 1000) == " 40% |██████          | 400/1k"
    path.write_text(path.read_text() + "1,500,-3.25\n1,750,8")
    assert progress(tmp_path, 1000) == " 50% |████████        | 500/1k, return -3.2"
    path.write_text(path.read_text() + ".75\n" + "1,2500000,7.0\n" * 5000)
    assert progress(tmp_path, 2_000_000) == "100% |████████████████| 2.50M/2.00M, return 7.0"
