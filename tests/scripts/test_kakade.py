"""A short run of scripts/figures/kakade.py: the pictures, the CSV files, and the claims that need no long learning."""

import csv
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("numba")

SCRIPT = Path(__file__).parents[2] / "scripts" / "figures" / "kakade.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("kakade")
    command = [sys.executable, SCRIPT, "--out", out, "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return out


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_picture_has_its_csv(folder):
    names = {"kakade_lqr", "kakade_two_state", "kakade_tetris"}
    assert {path.stem for path in folder.glob("*.png")} == names
    assert {path.stem for path in folder.glob("*.csv")} == {*names, "kakade_numbers"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))


def test_numbers_are_the_claims(folder):
    numbers = {row["name"]: float(row["value"]) for row in read(folder / "kakade_numbers.csv")}
    assert numbers["two_state_orders_of_magnitude"] == pytest.approx(6.1, abs=0.2)
    assert numbers["two_state_plain_smallest_rho_j"] < 1e-5
    assert numbers["two_state_natural_smallest_rho_j"] > 0.05
    assert numbers["lqr_orders_of_magnitude_s1_0.1_to_22"] == pytest.approx(2.8, abs=0.2)
    assert all(value > 1.4 for name, value in numbers.items() if name.startswith("lqr_orders_of_magnitude"))


def test_flows_descend_and_end_near_the_optima(folder):
    lqr, two_state = read(folder / "kakade_lqr.csv"), read(folder / "kakade_two_state.csv")
    for method in ("plain", "natural"):
        for s1 in ("1", "10", "0.1"):
            cost = [float(row["cost"]) for row in lqr if row["method"] == method and row["s1"] == s1]
            assert len(cost) == 60
            assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(cost))
            assert 20 < cost[-1] < 20.5
        reward = [float(row["reward"]) for row in two_state if row["method"] == method]
        assert reward[-1] == pytest.approx(2, abs=1e-3)
        assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(reward))


def test_learning_curves_hold_every_run_and_theta(folder):
    rows = read(folder / "kakade_tetris.csv")
    keys = ("method", "features", "step_size", "units")
    runs = {tuple(row[key] for key in keys) for row in rows}
    assert len(runs) == 9
    for run in runs:
        own = [row for row in rows if tuple(row[key] for key in keys) == run]
        policies = [row["policy"] for row in own if row["iteration"] == "-1"]
        assert policies == (["greedy"] if run[0] == "policy iteration" else ["greedy", "softmax"])
        assert [int(row["iteration"]) for row in own] == [0, 1, 2] + [-1] * len(policies)
        assert all(len(row["theta"].split()) == (22 if run[1] == "bertsekas" else 9) for row in own)
        moved = own[0]["theta"] != own[2]["theta"]
        assert moved
