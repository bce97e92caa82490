"""Benchmarks run, on next to nothing, and write their tables: some measure private parts, which may move."""

import csv
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "scripts" / "benchmarks"
# The script, its arguments, the option that names the CSV, and what must be in it: (column, values).
RUNS = {
    "fvp": ("mlp-64@64 --rounds 1 --threads 1", "--csv", "product", {"gradient", "ours", "double backward", "jvp-vjp"}),
    "changing_shapes": (
        "--lengths 2 4 --steps 4 --block 2 --batch 2 --products 1",
        "--csv",
        "length",
        {"fixed", "changing"},
    ),
    "collecting": ("--env CartPole-v1 --n-envs 2 --steps 4 --rounds 1 --threads 1", "--csv", "n_envs", {"2"}),
    "update": (
        "--env InvertedPendulum-v5 --before 2048 --rounds 1 --threads 1",
        "--csv",
        "update",
        {"sb3-contrib", "ours"},
    ),
    "preconditioning": (
        "--systems policy --env InvertedPendulum-v5 --before 2048 --rounds 1 --threads 1",
        "--csv",
        "preconditioner",
        {"none", "diagonal", "kfac", "ekfac"},
    ),
    "memory": ("CartPole-v1:16384 --every 0.1", "--csv", "task", {"CartPole-v1"}),
    "masks": (
        "--tasks arms --seeds 0 --timesteps 2048",
        "--csv",
        "algo",
        {"trpo", "contrib-maskable-ppo"},
    ),
    "hybrid": (
        "--seeds 0 --timesteps 2048 --episodes 2",
        "--csv",
        "way",
        {"hybrid", "flat", "contrib-flat"},
    ),
    "critics": ("--env InvertedPendulum-v5 --before 2048 --rollouts 6", "--csv", "env", {"InvertedPendulum-v5"}),
    "end_to_end": (
        "CartPole-v1 --seconds 0.01 --rounds 1 --threads 1",
        "--csv",
        "way",
        {"environments", "ours", "sb3-contrib"},
    ),
    "environments": (
        "CartPole-v1 --n-envs 2 --threads 1 --steps 32 --rounds 1",
        "--output",
        "environment",
        {"CartPole-v1"},
    ),
    "recurrent": (
        "--tasks npg/CartPoleNoVel-v1 --timesteps 64 --episodes 1",
        "--csv",
        "agent",
        {"ours", "sb3-contrib"},
    ),
    "optimizer_overhead": (
        "--models wrn-10-1-s2 --optimizers online-ngd --batch 4 --rounds 2 --steps 4 --threads 1",
        "--csv",
        "optimizer",
        {"online-ngd"},
    ),
    "inverse_roots": (
        "--sizes 2x12 --rounds 2",
        "--csv",
        "way",
        {"eigenvectors", "Householder", "Cholesky, twice", "Cholesky, p = 1"},
    ),
}


@pytest.mark.slow
def test_what_a_gpu_would_tell_is_told_by_a_cpu_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = runpy.run_path(str(BENCHMARKS / "gpu.py"))
    assert script["main"](["--device", "cpu", "--small", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    with (tmp_path / "gpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [list(row.values()) for row in rows] == [[str(value) for value in row.values()] for row in found["rows"]]
    assert list(found["seconds"]) == list(dict.fromkeys(row["part"] for row in rows)) == list(script["PARTS"])
    numbers = [float(row["value"]) for row in rows if row["quantity"].endswith((", ms", "gradients", "over sgd", "s"))]
    assert len(numbers) > 15
    assert all(math.isfinite(number) and number > 0 for number in numbers)
    assert script["main"](["--device", "cpu", "--small", "--minutes", "-1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["value"] for row in found["rows"]} == {"no time left"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_how_to_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = runpy.run_path(str(BENCHMARKS / "gpu.py"))
    with pytest.raises(SystemExit, match="2"):
        script["main"](["--out", str(tmp_path / "out")])
    assert "--device cpu --small" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.slow
def test_a_benchmark_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sb3_contrib")
    arguments, option, column, expected = RUNS[name]
    table = tmp_path / "table.csv"
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [name, *arguments.split(), option, str(table)])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert expected <= {row[column] for row in rows}
    kinds = ("memory_mb", "median", "over_fixed", "us_per", "steps_per_second", "return_mean")
    measured = [k for k in rows[0] if any(kind in k for kind in kinds)]
    assert measured
    assert all(math.isfinite(float(row[k])) for row in rows for k in measured if row[k])


@pytest.mark.parametrize(
    "command",
    ["collecting --env", "critics --env", "update --env", "preconditioning --env", "end_to_end", "environments"],
)
def test_an_unknown_environment_is_one_message(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sb3_contrib")
    name, *option = command.split()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *option, "HalfCheatah-v5"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 2
    assert "env_id='HalfCheatah-v5' is not known. Did you mean HalfCheetah-v5" in capsys.readouterr().err
