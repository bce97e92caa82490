"""The tables that scripts write into pages are those of the CSV files beside them."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
CURVES = [*sorted(map(str, (RESULTS / "figures-2-3").glob("*-s?"))), "--beside", str(RESULTS / "report" / "curves.csv")]


@pytest.mark.parametrize(
    ("script", "page", "arguments"),
    [
        ("returns", "benchmarks.md", []),
        ("cpo", "cpo.md", []),
        ("masks", "masks.md", []),
        ("cifar_curves", "cifar.md", [*CURVES, "--smoothing", "0"]),
    ],
)
def test_a_pages_tables_are_those_of_its_results(load, script, page, arguments, tmp_path):
    copy = shutil.copy(ROOT / "docs" / page, tmp_path)
    if script == "cifar_curves":
        arguments = [*arguments, "--out", str(tmp_path / "curves.png")]
    text = Path(copy).read_text(encoding="utf-8")
    begun = text.count("<!-- table: ")
    assert load("figures", script).main([*arguments, "--table", str(copy)]) == 0
    assert begun
    assert Path(copy).read_text(encoding="utf-8") == text
