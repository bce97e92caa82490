"""The executable report: every picture and table is written, and what they claim holds.

Numbers of the quick run, which draws from less work; seconds are measured by it and never tested.
"""

from __future__ import annotations

import csv
import struct
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPT, DOCS = ROOT / "scripts" / "figures" / "report.py", ROOT / "docs"
PICTURES = [
    "normals",
    "steepest",
    "identities",
    "expansion",
    "invariance",
    "plateau",
    "cost",
    "mirror",
    "trpo",
    "transport",
]
TABLES = [*PICTURES[:-1], "mirror_trust_region", "transport_normal", "transport_classes", "numbers"]


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "not" / "there yet"
    finished = subprocess.run(
        [sys.executable, SCRIPT, "--out", out, "--quick"], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return out


@pytest.fixture(scope="module")
def number(folder):
    values = {(row["picture"], row["quantity"]): float(row["value"]) for row in read(folder / "numbers.csv")}

    def find(picture: str, *words: str) -> float:
        found = [v for (p, quantity), v in values.items() if p == picture and all(word in quantity for word in words)]
        assert len(found) == 1, f"{words} names {len(found)} numbers of {picture}"
        return found[0]

    return find


def test_every_picture_and_table_is_written(folder):
    assert {path.name for path in folder.iterdir()} == {f"{p}.png" for p in PICTURES} | {f"{t}.csv" for t in TABLES}
    for picture in PICTURES:
        data = (folder / f"{picture}.png").read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert width == 880
        assert height > 300
        assert 10_000 < len(data) < 150_000
    for table in TABLES:
        rows = read(folder / f"{table}.csv")
        assert len(rows) > 1
        assert all(value not in ("", "nan", "inf") for row in rows for key, value in row.items() if key != "unit")


def test_figure_1_holds_for_standard_deviations_and_fails_for_variances(number):
    assert number("normals", "pair 1", "deviation") == pytest.approx(0.005, rel=1e-9)
    assert number("normals", "pair 2", "deviation") == pytest.approx(0.5, rel=1e-9)
    assert number("normals", "pair 1", "variance") == pytest.approx(5.0, rel=1e-9)
    assert number("normals", "pair 2", "variance") == pytest.approx(0.05, rel=1e-9)


def test_theorem_1_the_best_step_by_trial_is_along_the_formula(number):
    assert number("steepest", "−∇L and −F⁻¹∇L") > 20  # the two differ
    assert number("steepest", "angle at length", "Euclidean") < 1
    assert number("steepest", "angle at length", "Fisher") < 0.1
    assert 0.8 < number("steepest", "order", "Euclidean") < 1.2
    assert number("steepest", "order", "Fisher") > 1.5


def test_proposition_1_and_theorem_2(number):
    assert number("identities", "covariance of the score") < 1e-13
    assert number("identities", "expected negative Hessian") < 1e-13
    assert number("identities", "expected score") < 1e-14
    assert -0.75 < number("identities", "order") < -0.3


def test_kl_is_the_quadratic_form_to_third_order_in_both_directions(number):
    assert 2.95 < number("expansion", "KL(θ ‖ θ+d) − ½dᵀFd") < 3.05
    assert 2.95 < number("expansion", "KL(θ+d ‖ θ) − ½dᵀFd") < 3.05
    assert 2.9 < number("expansion", "KL(θ ‖ θ+d) − KL(θ+d ‖ θ)") < 3.1


def test_the_natural_path_is_invariant_and_loses_it_to_first_order(number):
    natural = number("invariance", "natural paths at equal times")
    assert natural < 0.05 * number("invariance", "gradient paths")
    assert number("invariance", "closed form") < 0.05
    assert 0.85 < number("invariance", "order") < 1.3


def test_the_plateau_holds_up_gradient_descent_alone(number):
    natural = number("plateau", "natural gradient")
    assert natural < 15
    assert number("plateau", "gradient descent") > 4 * natural
    assert number("plateau", "diagonal Fisher") > 4 * natural


def test_what_an_inverse_costs_is_measured_for_each_kind(folder):
    rows = read(folder / "cost.csv")
    assert {row["inverse"] for row in rows} == {"diagonal", "matrix-free", "dense"}
    assert all(float(row["seconds"]) > 0 for row in rows)


def test_mirror_step_is_the_dual_natural_step_and_the_trust_region_step(number):
    assert number("mirror", "dual natural step") < 1e-12
    assert number("mirror", "by trial") < 1e-6


def test_trpo_s_solution_is_the_natural_step_for_small_radii(folder, number):
    rows = read(folder / "trpo.csv")
    ratios = [float(row["gain_ratio"]) for row in rows]
    assert ratios == sorted(ratios, reverse=True)  # radii ascend
    assert 0.99 < ratios[0] <= 1 + 1e-9
    assert all(float(row["kl_nats"]) <= float(row["radius_nats"]) for row in rows)
    assert 0.4 < number("trpo", "order") < 0.65
    assert 0 < number("trpo", "classifier") <= 0.01


def test_transport_carries_a_narrow_normal_where_fisher_stalls(folder, number):
    assert number("transport", "to go", "transport") < 0.5 * number("transport", "to go", "Fisher")
    assert number("transport", "closed forms") < 0.05
    rows = read(folder / "transport_classes.csv")
    for metric in ("Fisher", "transport"):
        times = {row["time"] for row in rows if row["metric"] == metric}
        for time in times:
            p = [float(r["probability"]) for r in rows if r["metric"] == metric and r["time"] == time]
            assert sum(p) == pytest.approx(1, abs=1e-6)


def test_the_page_quotes_the_published_numbers():
    page = (DOCS / "report.md").read_text()
    rows = read(DOCS / "results" / "report" / "numbers.csv")
    assert {row["picture"] for row in rows} == set(PICTURES)
    for row in rows:
        assert f"| {row['quantity']} | {float(row['value']):.3g} {row['unit']}".rstrip() + " |" in page
    for picture in PICTURES:
        assert f"](results/report/{picture}.png)" in page
        assert (DOCS / "results" / "report" / f"{picture}.png").stat().st_size < 150_000


def test_one_picture_can_be_drawn_alone(tmp_path):
    others = "picture,quantity,value,unit\nnormals,old,1,nats\nplateau,kept,2,steps\n"
    (tmp_path / "numbers.csv").write_text(others)
    subprocess.run([sys.executable, SCRIPT, "--out", tmp_path, "--quick", "--only", "normals"], check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"normals.png", "normals.csv", "numbers.csv"}
    rows = read(tmp_path / "numbers.csv")
    assert {row["picture"] for row in rows} == {"normals", "plateau"}
    assert "kept" in {row["quantity"] for row in rows}
    assert "old" not in {row["quantity"] for row in rows}


def test_an_unknown_picture_is_refused_with_the_names_there_are(tmp_path):
    finished = subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path, "--only", "norms"], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2
    assert "normals" in finished.stderr
    assert not list(tmp_path.iterdir())
