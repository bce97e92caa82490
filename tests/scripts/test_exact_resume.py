"""A killed run that resumes ends as the undisturbed one: models bit for bit, and every record but for columns of time.

The runs are real, and so are the kills. `scripts/benchmarks/soak.py` kills before each event and at more moments.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SOAK = Path(__file__).parents[2] / "scripts" / "benchmarks" / "soak.py"


CLASSIFIERS = ["cifar-sgd", "cifar-ngd", "cifar-online-ngd", "cifar-kfac"]


@pytest.mark.parametrize("case", ["cartpole", "cartpole-envpool", "pendulum", "tetris", *CLASSIFIERS])
def test_a_killed_run_ends_as_the_undisturbed_one(case):
    if case == "cartpole-envpool":
        pytest.importorskip("envpool")
    if case == "tetris":
        pytest.importorskip("numba")
    command = [sys.executable, str(SOAK), "kills", case, "--events", "2", "--moments", "1", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{case}: 3 of 3 resumed runs are the undisturbed one" in done.stdout


def test_the_comparison_finds_what_differs(load, tmp_path):
    soak = load("benchmarks", "soak")
    a, b = {"x": [1.0], "y": {"z": float("nan")}}, {"x": [1.0], "y": {"z": float("nan")}}
    assert soak.differences(a, b) == []
    assert soak.differences(a, b | {"x": [1.0 + 1e-15]}) == ["x"]
    assert soak.differences(a, {"x": [1.0]}) == ["y"]
