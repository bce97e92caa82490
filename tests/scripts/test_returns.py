"""The two returns.py, of scripts/benchmarks and scripts/figures: which runs there are, their rows, tables, pictures."""

import argparse
import csv
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image
from scipy import stats

from agents.config import RunConfig
from agents.results import Curve
from agents.runs import RunFolder

ROBOTS = ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Swimmer", "Humanoid")


@pytest.fixture(scope="module")
def script(load) -> ModuleType:
    pytest.importorskip("sb3_contrib")
    return load("benchmarks", "returns")


@pytest.fixture(scope="module")
def figures(load) -> ModuleType:
    return load("figures", "returns")


def options(**changes: object) -> argparse.Namespace:
    default = {"suite": "all", "tasks": None, "algos": ["trpo"], "seeds": "0", "timesteps": None, "set": []}
    return argparse.Namespace(**(default | changes))


# Which runs -----------------------------------------------------------------------------------------------------------


def test_the_runs_of_a_suite_come_task_by_task(script: ModuleType) -> None:
    found = script.cases(options(suite="mujoco", algos=["trpo", "sb3-ppo"], seeds="0-1"))
    first = [(case.task, case.algo, case.seed) for case in found[:4]]
    assert first == [("InvertedPendulum-v5", algo, seed) for algo in ("trpo", "sb3-ppo") for seed in (0, 1)]
    assert {case.timesteps for case in found} == {1_000_000}
    assert {case.config for case in found} == {"preset"}
    assert len(found) == 2 * 2 * 9
    assert len(script.cases(options())) == 17


def test_steps_and_settings(script: ModuleType) -> None:
    (cartpole,) = script.cases(options(tasks=["CartPole-v1"]))
    assert cartpole.timesteps == script.resolve("trpo", "CartPole-v1").timesteps
    (changed,) = script.cases(options(tasks=["CartPole-v1"], timesteps=64, set=["target_kl=0.1", "gamma=0.9"]))
    assert changed.key == ("gamma=0.9 target_kl=0.1", "trpo", "CartPole-v1", "0", "64")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["Hoper-v5"]}, "did you mean Hopper-v5"),
        ({"set": ["taget_kl=1"]}, "did you mean target_kl"),
        ({"tasks": ["Hopper-v5"], "algos": ["sb3-ppo"], "set": ["gamma=1"]}, "--set is for"),
        ({"tasks": ["CartPole-v1"], "algos": ["sb3-ppo"]}, "no settings of sb3-ppo for CartPole-v1"),
        ({"seeds": "9-0"}, "seeds must be"),
    ],
)
def test_what_cannot_be_is_refused(script: ModuleType, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        script.cases(options(**changes))


# Rows -----------------------------------------------------------------------------------------------------------------


def curve(*returns: float) -> Curve:
    steps = 100.0 * np.arange(1, len(returns) + 1)
    return Curve(steps, np.array(returns), steps / 10, steps / 20, np.full_like(steps, np.nan))


def test_the_folder_of_a_run_with_many_settings_is_one_that_can_be_made(script: ModuleType, tmp_path: Path) -> None:
    many = " ".join(f"policy_kwargs.number_{i}={{layers: [64, 64]}}" for i in range(30))
    cases = [script.Case(config, "trpo", "npg/A-v0", 1, 1000, None) for config in ("gamma=0.9", many, f"{many} a=1")]
    assert cases[0].folder == "gamma=0.9-trpo-npg_A-v0-1-1000"
    assert len({case.folder for case in cases}) == 3
    for case in cases:
        (tmp_path / f"{case.folder}.log").touch()


@pytest.mark.parametrize(
    ("returns", "target", "expected"),
    [
        ((1.0, 9.0, 10.0, 4.0, 8.0), 9.0, (200, 4.0)),
        ((1.0, 9.5), 9.0, (200, "")),
        ((1.0, 2.0), 9.0, ("", "")),
        ((), 9.0, ("", "")),
        ((1.0,), None, ("", "")),
        ((-5.0, -4.0, -6.5), -4.1, (200, -6.5)),
    ],
)
def test_where_the_target_is_reached_and_lost(
    script: ModuleType, returns: tuple, target: float, expected: tuple
) -> None:
    assert script.at_target(curve(*returns), target) == expected


def finished(path: Path, script: ModuleType, case: object, returns: tuple[float, ...], final: float) -> RunFolder:
    folder = RunFolder.create(path, RunConfig(case.algo, case.task, case.seed, case.timesteps), "")
    for step, value in zip((100, 200, 300), returns):
        clocks = {"train_seconds": step / 10, "train_cpu_seconds": step / 20}
        folder.add_evaluation({"timesteps": step, "mean_return": value, **clocks})
    entry = {"timesteps": 300, "episodes": 20, "mean_return": final, "std_return": 1, "min_return": 0, "max_return": 9}
    folder.write_json("final_evaluation.json", {"last": entry, "best": entry | {"mean_return": 600.0}})
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_row_has_the_run_and_what_made_it(script: ModuleType, tmp_path: Path) -> None:
    (case,) = script.cases(options(tasks=["CartPole-v1"], timesteps=300, seeds="3"))
    folder = finished(tmp_path / "run", script, case, (100.0, 500.0, 450.0), 321.5)
    version = script.code_version()
    script.record(case, folder, version, tmp_path / "r.csv")
    (row,) = rows_of(tmp_path / "r.csv")
    expected = {"config": "preset", "algo": "trpo", "task": "CartPole-v1", "seed": "3", "timesteps": "300"}
    expected |= {"return_mean": "321.5", "return_min": "0.0", "episodes": "20", "best_return": "600.0"}
    expected |= {
        "first_step_at_target": "200",
        "lowest_after_target": "450.0",
        "seconds": "30.0",
        "cpu_seconds": "15.0",
    }
    assert row.items() >= expected.items()
    assert row["commit"].split("+")[0] == version.split("+")[0]
    assert row["torch"]
    assert row["machine"]
    points = rows_of(tmp_path / "r_curves.csv")
    assert [(p["step"], p["return"]) for p in points] == [("100", "100.0"), ("200", "500.0"), ("300", "450.0")]
    # Code that changed while the run was under way is told.
    script.record(replace(case, seed=4), folder, "0123456789", tmp_path / "r.csv")
    assert rows_of(tmp_path / "r.csv")[1]["commit"] != "0123456789"


def test_costs_have_columns_of_their_own_and_a_picture(script: ModuleType, load, tmp_path: Path) -> None:
    task, path = "npg/SwimmerVelocity-v5", tmp_path / "cpo.csv"
    cases = script.cases(options(suite="safe", algos=["cpo"], seeds="0-1"))
    assert {case.task.rpartition("Velocity")[0] for case in cases} == {f"npg/{robot}" for robot in ROBOTS}
    final = {"timesteps": 1_000_000, "episodes": 20, "std_return": 1, "min_return": 0, "max_return": 9}
    for case in (case for case in cases if case.task == task):
        folder = RunFolder.create(tmp_path / str(case.seed), RunConfig("cpo", task, case.seed, case.timesteps), "")
        for step in (100, 200):
            folder.add_evaluation({"timesteps": step, "mean_return": step / 2.0, "mean_cost": 30.0 + case.seed})
        last = final | {"mean_return": 150.0 + 10 * case.seed, "mean_cost": 24.0 - 4 * case.seed}
        folder.write_json("final_evaluation.json", {"last": last, "best": last})
        script.record(case, folder, "unknown", path)
    assert [row["cost_mean"] for row in rows_of(path)] == ["24.0", "20.0"]
    assert [row["cost"] for row in rows_of(tmp_path / "cpo_curves.csv")] == ["30.0", "30.0", "31.0", "31.0"]

    free, page = tmp_path / "free.csv", tmp_path / "page.md"
    head = ("config", "algo", "task", "seed", "timesteps", "commit", "return_mean")
    row = ("preset", "trpo", "Swimmer-v5", "0", "1000000", "c", "350")
    free.write_text("\n".join(map(",".join, (head, row, (*row[:4], "64", "c", "1")))) + "\n")
    page.write_text("<!-- table: cpo --><!-- end -->")
    shorter = replace(case, timesteps=4000)  # a run that is not reported
    script.record(shorter, folder, "unknown", path)
    assert len(rows_of(path)) == 3
    figures = load("figures", "cpo")
    arguments = ["--csv", str(path), "--free", str(free), "--table", str(page), "--out", str(tmp_path)]
    assert figures.main(arguments) == 0
    assert page.read_text().split("\n")[-3] == f"| `{task}` | 25 | 22.0 | 24.0 | 155.0 | 150.0 | 2 | 350.0 (1 seed) |"
    assert Image.open(tmp_path / "cpo.png").size[0] > 800


def test_masks_have_a_table_and_a_picture(load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, path, page = load("figures", "masks"), tmp_path / "masks.csv", tmp_path / "page.md"
    rows = [("task", "algo", "seed", "steps", "return_mean")]
    for seed, final in ((0, 10), (1, 4)):
        rows += [("arms", "trpo", seed, 100 * i, final * i / 4) for i in range(1, 5)]
    rows += [("connect-four", algo, 0, 100, 0.6) for algo in figures.ALGORITHMS]
    page.write_text("<!-- table: masks --><!-- end -->")
    arguments = ["--csv", str(path), "--out", str(tmp_path), "--table", str(page)]
    path.write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n")
    assert figures.main(arguments) == 2
    assert "has no row of arms and contrib-maskable-ppo" in capsys.readouterr().err
    rows.append(("arms", "contrib-maskable-ppo", 0, 300, 5))
    path.write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n")
    assert figures.main(arguments) == 0
    lines = page.read_text().split("\n")
    assert "| arms | 5.00, after steps | 200, – | 300 |" in lines
    assert "| arms | the end, 400 steps | 10.0, 4.00 | 5.00 |" in lines
    assert "| connect-four | 0.50, after steps | 100 | 100 |" in lines
    assert Image.open(tmp_path / "masks.png").size[0] > 800


def test_runs_that_have_a_row_are_not_repeated(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, started = tmp_path / "r.csv", []
    fields = ("config", "algo", "task", "seed", "timesteps", "commit")
    version = script.code_version()
    lines = ["preset,trpo,CartPole-v1,0,64," + version, "preset,trpo,CartPole-v1,1,64,older"]
    table.write_text("\n".join([",".join(fields), *lines]) + "\n")
    monkeypatch.setattr(script, "run_jobs", lambda jobs, *_, **__: started.append([job.name for job in jobs]) or {})
    monkeypatch.setattr(script.os, "nice", lambda _: None)
    common = ["--tasks", "CartPole-v1", "--seeds", "0-2", "--timesteps", "64", "--csv", str(table)]
    common += ["--runs", str(tmp_path / "runs")]
    assert script.main(common) == 0
    assert script.main([*common, "--keep"]) == 0
    assert script.main([*common, "--set", "gamma=0.9"]) == 0
    names = [f"trpo CartPole-v1 seed {seed}" for seed in range(3)]
    assert started == [names[1:], names[2:], names]


@pytest.mark.slow
def test_runs_of_ours_and_of_peers_leave_the_same(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script.os, "nice", lambda _: None)
    common = ["--evaluations", "2", "--seeds", "0", "--csv", str(tmp_path / "r.csv"), "--runs", str(tmp_path / "runs")]
    pendulum = ["--tasks", "InvertedPendulum-v5", "--timesteps", "64"]
    settings = ["--set", "n_steps=16", "--set", "n_envs=2", "--set", "batch_size=16"]
    assert script.main([*common, *pendulum, "--algos", "trpo", *settings]) == 0
    assert script.main([*common, *pendulum, "--algos", "sb3-ppo"]) == 0
    assert script.main([*common, "--tasks", "Hopper-v5", "--timesteps", "64", "--algos", "contrib-trpo"]) == 0
    rows = rows_of(tmp_path / "r.csv")
    assert [row["algo"] for row in rows] == ["trpo", "sb3-ppo", "contrib-trpo"]
    assert [row["config"] for row in rows] == ["batch_size=16 n_envs=2 n_steps=16", "preset", "preset"]
    for row in rows:
        assert float(row["cpu_seconds"]) > 0
        assert float(row["return_min"]) <= float(row["return_mean"])
    steps = {(p["algo"], p["step"]) for p in rows_of(tmp_path / "r_curves.csv")}
    assert {("trpo", "32"), ("trpo", "64"), ("sb3-ppo", "32"), ("sb3-ppo", "64"), ("contrib-trpo", "2048")} == steps
    # A refused setting fails, and has no row.
    capfd.readouterr()
    assert script.main([*common, *pendulum, "--set", "target_kl=-1"]) == 1
    assert "target_kl must" in capfd.readouterr().err
    assert len(rows_of(tmp_path / "r.csv")) == 3


def test_peers_have_the_discount_of_their_normaliser(load, script: ModuleType) -> None:
    peers = load("benchmarks", "peers")
    for algo, settings in peers.ZOO.items():
        for task in settings:
            config = peers.config_of(algo, task, 0, 1000, 1)
            assert config.normalize["gamma"] == config.hyperparameters.get("gamma", 0.99)
            assert config.n_envs == (1 if algo == "sb3-ppo" else 2)
            assert "n_envs" not in config.hyperparameters


# Tables and pictures --------------------------------------------------------------------------------------------------


def line(algo: str, task: str, seed: int, value: float, timesteps: int = 1_000_000, **more: object) -> dict[str, str]:
    about = {"config": "preset", "algo": algo, "task": task, "seed": seed, "timesteps": timesteps, "commit": "c"}
    reached = {"return_mean": value, "cpu_seconds": 40.0 + seed, "first_step_at_target": "", "lowest_after_target": ""}
    return {name: str(entry) for name, entry in (about | reached | more).items()}


HOPPER = [3500.0, 3300.0, 3600.0, 2600.0, 3700.0]


@pytest.fixture
def table(tmp_path: Path, figures: ModuleType) -> Path:
    rows = [line("trpo", "Hopper-v5", seed, value) for seed, value in enumerate(HOPPER)]
    rows += [line("trpo", "Hopper-v5", 100, 1.0), line("trpo", "Hopper-v5", 0, 2.0, timesteps=77)]
    rows += [line("contrib-trpo", "Hopper-v5", seed, value) for seed, value in enumerate((1200.0, 1300.0))]
    rows += [line("trpo", "Reacher-v5", seed, value) for seed, value in enumerate((-4.0, -6.0))]
    more = {"first_step_at_target": 50_000, "lowest_after_target": -4.5}
    rows += [line("trpo", "Reacher-v5", 0, -4.0, timesteps=2_000_000, **more)]
    rows += [line("trpo", "Reacher-v5", 1, -9.0, timesteps=2_000_000)]
    rows += [line("trpo", "Hopper-v5", seed, 1000.0 * seed, config="gamma=0.9") for seed in (1, 2, 3)]
    rows += [line("trpo", "Hopper-v5", 1, 1.0, config="gamma=0.8")]
    points: list[dict[str, str]] = [
        {name: row[name] for name in ("config", "algo", "task", "seed", "timesteps", "commit")}
        | {"step": str(step), "seconds": "1", "cpu_seconds": str(step / 1000), "return": str(step / 300)}
        for row in rows
        for step in (500_000, 1_000_000)
    ]
    for name, lines in (("r.csv", rows), ("r_curves.csv", points)):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    return tmp_path / "r.csv"


def cells(text: str, row: int) -> list[str]:
    return [cell.strip() for cell in text.splitlines()[row + 2].strip("|").split("|")]


def test_the_tables_of_the_page(figures: ModuleType, table: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    names = ("returns", "algorithms", "seconds", "stability", "configurations")
    page.write_text("begin\n" + "\n".join(f"<!-- table: {n} -->\nold\n<!-- end -->\nafter {n}" for n in names))
    assert figures.main(["--csv", str(table), "--table", str(page)]) == 0
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("begin\n")
    parts = {n: text.split(f"<!-- table: {n} -->\n\n")[1].split("\n\n<!-- end -->")[0] for n in names}
    iqm = stats.trim_mean(HOPPER, 0.25)
    hopper = cells(parts["returns"], 0)
    assert hopper[:3] == ["Hopper-v5", "1,000,000", "TRPO"]
    assert hopper[3].startswith(f"{iqm:,.0f} [")
    assert hopper[4:8] == ["2,600", "5", "3,400 (2,500)", "yes"]
    assert "TRPO 3,372 ± 215 (sb3-contrib)" in hopper[8]
    reacher = cells(parts["returns"], 1)
    assert reacher[3].startswith("−5.00 [−6.00, −4.00]")
    assert reacher[4:8] == ["−6.00", "2", "−4.1 (−5)", "no"]
    assert figures.met(np.array(HOPPER[:4]) + 9e3, {"target": 3400}) == "–"
    assert cells(parts["algorithms"], 0)[2].startswith("1,250 [1,200, 1,300], 2 seeds")
    assert cells(parts["algorithms"], 1)[2] == "–"
    # The curves of both have 1,667 after 500,000 steps, which are 500 seconds there.
    assert cells(parts["seconds"], 0) == ["Hopper-v5", "1,250", "40 s", "2", "500 s", "5 of 5 seeds", "42 s"]
    assert cells(parts["stability"], 0) == ["Reacher-v5", "TRPO", "2,000,000", "50,000", "1 of 2 seeds", "−4.50", "91"]
    changed = cells(parts["configurations"], 0)
    assert changed[:3] == ["Hopper-v5", "TRPO", "`gamma=0.9`"]
    assert (changed[4], changed[6], changed[7]) == ("1,000", "2,600", "1, 2, 3")
    assert "gamma=0.8" not in text
    again = text
    assert figures.main(["--csv", str(table), "--table", str(page)]) == 0
    assert page.read_text() == again


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: none -->\n<!-- end -->", "there are: returns"),
        ("<!-- table: returns -->\nprose\n<!-- table: seconds -->\n<!-- end -->", "the table 'returns' does not end"),
        ("<!-- table: returns --><!-- end -->\nprose\n<!-- table: seconds -->\n", "has no table that ends"),
        ("prose", "has no table that ends"),
    ],
)
def test_a_page_whose_tables_are_not_whole_stays_as_it_is(
    figures: ModuleType, table: Path, tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert figures.main(["--csv", str(table), "--table", str(page)]) == 2
    assert message in capsys.readouterr().err
    assert page.read_text() == text


def test_files_that_are_not_there_are_told(
    load, figures: ModuleType, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(script: ModuleType, *arguments: str) -> str:
        assert script.main(["--csv", str(table), *arguments]) == 2
        return capsys.readouterr().err

    page = tmp_path / "page.md"
    assert "page.md" in error(figures, "--table", str(page))
    page.write_text("<!-- table: seconds --><!-- end -->")
    (tmp_path / "r_curves.csv").unlink()
    for arguments in (["--table", str(page)], ["--out", str(tmp_path)]):
        assert "r_curves.csv has no row: scripts/benchmarks/returns.py writes it" in error(figures, *arguments)
    assert page.read_text() == "<!-- table: seconds --><!-- end -->"
    for name in ("returns", "cpo", "masks"):
        lacking = "has no column steps" if name == "masks" else "has no column config, algo"
        table.write_text("task,algo,seed,return_mean\n1,2,3,4\n" if name == "masks" else "task,seed\n1,2\n")
        assert lacking in error(load("figures", name))


def test_the_pages_tables_are_known(figures: ModuleType, table: Path, tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text((Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text())
    assert figures.main(["--csv", str(table), "--table", str(page)]) == 0
    assert page.read_text().count("| --- |") + page.read_text().count("| ---") >= 4


def test_the_last_row_of_a_run_counts(figures: ModuleType) -> None:
    rows = [line("trpo", "Hopper-v5", 0, 1.0), line("trpo", "Hopper-v5", 1, 2.0), line("trpo", "Hopper-v5", 0, 3.0)]
    assert sorted(figures.returns(figures.newest(rows))) == [2.0, 3.0]


def test_scores_are_between_a_random_policy_and_the_target(figures: ModuleType) -> None:
    entry = figures.tasks()["Hopper-v5"]
    rows = [line("trpo", "Hopper-v5", 0, entry["random"]), line("trpo", "Hopper-v5", 1, entry["target"])]
    np.testing.assert_allclose(figures.scores(rows, "trpo"), [[0.0, 1.0]])
    assert all({"random", "target"} <= entry.keys() for entry in figures.tasks().values())


@pytest.fixture
def drawn(figures: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The first panel of each picture in place of its file."""
    panels: list[Axes] = []
    monkeypatch.setattr(figures, "save", lambda figure, path: panels.append(figure.axes[0]))
    return panels


def test_a_profile_is_the_fraction_of_runs_at_every_score(figures: ModuleType, drawn: list[Axes]) -> None:
    entry = figures.tasks()["CartPole-v1"]
    finals = [entry["random"] + score * (entry["target"] - entry["random"]) for score in (-0.1, 0.5, 1.0, 1.0, 2.0)]
    rows = [line("trpo", "CartPole-v1", seed, value) for seed, value in enumerate(finals)]
    figures.draw_profiles(rows, Path())
    curve = drawn[0].lines[0]
    assert curve.get_drawstyle() == "steps-pre"
    x, y = curve.get_xdata(), curve.get_ydata()
    for score, fraction in ((0.0, 0.8), (0.49, 0.8), (0.51, 0.6), (0.999, 0.6), (1.001, 0.2), (1.2, 0.2)):
        assert y[np.searchsorted(x, score)] == fraction


def test_a_run_that_has_ended_keeps_its_return(figures: ModuleType, drawn: list[Axes]) -> None:
    points = []
    for seed, seconds in ((0, 10.0), (1, 30.0)):
        for part in (1, 2):
            found = {"step": str(part), "cpu_seconds": str(seconds * part / 2), "return": str(100.0 * part + seed)}
            points.append(line("trpo", "Hopper-v5", seed, 0.0) | found)
    figures.draw_curves(points, "cpu_seconds", "seconds", Path())
    x, y = drawn[0].lines[0].get_data()
    assert (x[0], x[-1]) == (15.0, 30.0)  # seed 0 had ended after ten
    np.testing.assert_allclose(y, [(200.0 + 101.0) / 2, (200.0 + 201.0) / 2])


def test_the_pictures(figures: ModuleType, table: Path, tmp_path: Path) -> None:
    assert figures.main(["--csv", str(table), "--out", str(tmp_path / "out")]) == 0
    for name in ("steps", "seconds", "bars", "profiles", "peers"):
        with Image.open(tmp_path / "out" / f"returns_{name}.png") as image:
            assert image.width == 880
            assert len(image.convert("RGB").getcolors(2**20)) > 100


def test_an_empty_table_is_told(figures: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert figures.main(["--csv", str(tmp_path / "none.csv")]) == 2
    assert "returns.py writes it" in capsys.readouterr().err
