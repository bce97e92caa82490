"""Several seeds: which there are, whether one is finished, and what they say together. The processes themselves are in
tests/scripts/test_train_agent.py.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from agents.config import RunConfig
from agents.results import Result
from agents.runs import RunFolder
from agents.seeds import SeedResult, SeedsFolder, is_finished, parse_seeds, run_command, statistics, summary_table

CONFIG = RunConfig("trpo", "CartPole-v1", timesteps=1000)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("0-3", (0, 1, 2, 3)),
        ("7", (7,)),
        ("0,3,7", (0, 3, 7)),
        ("5-6,1, 6", (1, 5, 6)),
        ("100-100", (100,)),
    ],
)
def test_seeds_are_numbers_and_ranges(text: str, seeds: tuple[int, ...]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "0-", "1,,2", "0.5", "0-100000"])
def test_other_seeds_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"seeds must be .*; got '"):
        parse_seeds(text)


# One run --------------------------------------------------------------------------------------------------------------


def final(folder: RunFolder, timesteps: int, mean: float = 5.0) -> None:
    episodes = {"timesteps": timesteps, "episodes": 20, "mean_return": mean, "std_return": 1.0}
    entry = episodes | {"min_return": mean - 2, "max_return": mean + 2}
    folder.write_json("final_evaluation.json", {"last": entry, "best": entry})


def test_a_run_begins_goes_on_and_is_finished(tmp_path: Path) -> None:
    script, path, begin = Path("train_agent.py"), tmp_path / "s0", ["trpo", "CartPole-v1", "--seed=0"]

    def command(timesteps: int | None = None) -> list[str] | None:
        full = run_command(script, path, begin, ["--device=cpu"], timesteps)
        return full and full[1:]

    fresh = ["train_agent.py", *begin, "--device=cpu", "--run-dir", str(path), "--no-progress"]
    assert command() == fresh
    folder = RunFolder.create(path, CONFIG, "")
    (path / "wandb").mkdir()
    assert command() == fresh
    assert not path.exists()  # it had no agent to go on from
    folder = RunFolder.create(path, CONFIG, "")
    going_on = ["train_agent.py", *begin[:2], "--resume", str(path), "--device=cpu", "--no-progress"]
    folder.checkpoint(256).model.touch()
    assert command() == going_on  # it lost its last agent, and has others
    assert folder.checkpoint(256).model.exists()
    folder.last.model.touch()
    assert command() == going_on
    assert not is_finished(path)
    final(folder, 1024)
    assert command() is None
    assert is_finished(path)
    assert command(2000) == going_on
    folder.begin(replace(CONFIG, timesteps=2000).to_dict(), "")  # it was resumed with more steps, and stopped
    assert command() == going_on
    folder.last.model.unlink()
    folder.checkpoint(256).model.unlink()
    assert command() == going_on  # which says that its agents are gone: the rest of it is not removed
    assert folder.final_timesteps == 1024


def test_options_that_no_folder_keeps_go_on_with_the_run(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "s0", CONFIG, "").last.model.touch()
    begin = ["trpo", "CartPole-v1", "--set=gamma=0.9", "--video", "--wandb=mine", "--mlflow=a=b", "--seed=0"]
    command = run_command(Path("train_agent.py"), tmp_path / "s0", begin)
    assert command is not None
    going_on = ["--resume", str(tmp_path / "s0"), "--video", "--wandb=mine", "--mlflow=a=b", "--no-progress"]
    assert command[2:] == [*begin[:2], *going_on]


# Several --------------------------------------------------------------------------------------------------------------


def test_the_folder_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = SeedsFolder.create(None, CONFIG, (0, 2), ["--set=gamma=0.9"])
    assert made.path == Path("runs/trpo-CartPole-v1-seeds-1")
    assert SeedsFolder.is_one(made.path)
    assert SeedsFolder.open(made.path) == made
    assert SeedsFolder.create(None, CONFIG, (0,), []).path == Path("runs/trpo-CartPole-v1-seeds-2")
    with pytest.raises(FileExistsError, match="--resume"):
        SeedsFolder.create(made.path, CONFIG, (0,), [])
    more = made.going_on((1, 2), ["--timesteps=2000"], 2000)
    more.write()
    again = SeedsFolder.open(made.path)
    assert (again.seeds, again.timesteps, again.changes) == ((0, 1, 2), 2000, ("--timesteps=2000",))
    assert again.going_on((), (), None) == again
    with pytest.raises(ValueError, match=r"--timesteps must be at least 2000, .*; got 1999"):
        again.going_on((), (), 1999)


@pytest.mark.parametrize("content", ["- 1", "algo: trpo", "algo: trpo\nsedes: [1]", "{"])
def test_a_damaged_folder_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "seeds.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"seeds\.yaml"):
        SeedsFolder.open(tmp_path)


def results(*returns: float | None) -> list[SeedResult]:
    return [
        SeedResult(seed, "failed", "OSError: the pole broke", None)
        if mean is None
        else SeedResult(seed, "done", "", Result(1024, mean, 1.0, mean - 2, mean + 2, 20, mean + 5))
        for seed, mean in enumerate(returns)
    ]


def test_the_statistics_are_of_the_seeds_that_ended() -> None:
    returns = [10.0, 40.0, 20.0, 90.0, 30.0]
    found = statistics(results(*returns, None))
    assert (found["seeds"], found["worst"], found["worst_seed"], found["median"]) == (5, 10.0, 0, 30.0)
    assert found["interquartile_mean"] == pytest.approx(stats.trim_mean(returns, 0.25)) == pytest.approx(30.0)
    low, high = found["interval"]
    assert 10.0 <= low < 30.0 < high <= 90.0
    assert statistics(results(7.0))["interval"] is None
    assert statistics(results(None)) == {"seeds": 0}


def test_the_table_tells_all(tmp_path: Path) -> None:
    logs = {seed: tmp_path / f"s{seed}.log" for seed in range(3)}
    text = summary_table(results(-4321.0, None, 12_345.0), logs)
    lines = text.splitlines()
    assert max(map(len, lines[:5])) <= 80
    assert " ".join(lines[2].split()) == "0 -4321.0 ± 1.0 -4323.0 … -4319.0 -4316.0 1,024 done"
    assert lines[3].split() == ["1", "failed"]
    assert lines[5:8] == ["", "seed 1 failed: OSError: the pole broke", f"  {logs[1]}"]
    assert "interquartile mean 4012.0 [" in text
    assert "worst -4321.0 (seed 0)" in text
    assert "of 2 of 3 seeds" in text
    assert "interquartile" not in summary_table(results(None), logs)


def test_the_summary_has_a_picture_of_all_curves(tmp_path: Path) -> None:
    seeds = SeedsFolder.create(tmp_path / "x", CONFIG, (0, 1, 2), [])
    rows = {0: [(100, 1.0), (200, 5.0)], 1: [(100, 2.0), (200, 3.0)]}  # seed 2 has no evaluation yet
    for seed, curve in rows.items():
        folder = RunFolder.create(seeds.run_dir(seed), replace(CONFIG, seed=seed), "")
        for step, mean in curve:
            folder.add_evaluation({"timesteps": step, "mean_return": mean})
    seeds.summarize(results(10.0, 20.0, None))
    with Image.open(seeds.path / "learning_curves.png") as image:
        assert image.size == (960, 600)
        assert len(image.convert("RGB").getcolors(2**20)) > 100
    summary = json.loads((seeds.path / "summary.json").read_text())
    assert (summary["algo"], summary["timesteps"]) == ("trpo", 1000)
    assert [row["status"] for row in summary["seeds"]] == ["done", "done", "failed"]
    assert summary["statistics"]["median"] == 15.0
    lines = (seeds.path / "seeds.csv").read_text().splitlines()
    assert lines[0].startswith("seed,status,reason,timesteps,return_mean,return_std,return_min")
    assert lines[3].startswith("2,failed,OSError: the pole broke,,")


def test_a_summary_without_any_curve_has_no_picture(tmp_path: Path) -> None:
    seeds = SeedsFolder.create(tmp_path / "x", CONFIG, (0,), [])
    seeds.summarize(results(None))
    assert sorted(p.name for p in seeds.path.iterdir()) == ["preset.yaml", "seeds.csv", "seeds.yaml", "summary.json"]
    assert np.isfinite(json.loads((seeds.path / "summary.json").read_text())["timesteps"])
