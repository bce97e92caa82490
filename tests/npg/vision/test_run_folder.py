import csv
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from npg.vision.checkpoint import find_checkpoint, load_checkpoint
from npg.vision.config import Config
from npg.vision.run_folder import RunFolder

CONFIG = Config("wrn-16-1", "sgd", {"lr": 0.1}, keep_checkpoints=2)


def rows(path: Path) -> list[dict[str, str]]:
    with (path / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def filled(path: Path, epochs: int = 3) -> RunFolder:
    folder = RunFolder(path, CONFIG)
    for epoch in range(1, epochs + 1):
        folder.write_epoch({"epoch": epoch, "train_loss": 1.0 / epoch})
        folder.write_checkpoint(epoch, {"config": CONFIG.to_dict(), "epoch": epoch, "x": torch.ones(3)})
    folder.write_summary({"best": 1})
    folder.close()
    return folder


def test_what_a_run_leaves(run_dir: Path) -> None:
    filled(run_dir)
    assert [float(row["train_loss"]) for row in rows(run_dir)] == [1.0, 0.5, 1 / 3]
    assert Config(**yaml.safe_load((run_dir / "config.yaml").read_text())) == CONFIG
    assert f"torch: {torch.__version__}" in (run_dir / "versions.txt").read_text()
    assert "git commit: " in (run_dir / "versions.txt").read_text()
    assert (run_dir / "command.txt").read_text().strip()
    assert json.loads((run_dir / "summary.json").read_text()) == {"best": 1}
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["epoch_0002.pt", "epoch_0003.pt"]
    events = EventAccumulator(str(run_dir)).Reload().Scalars("train/loss")
    assert [(e.step, round(e.value, 6)) for e in events] == [(1, 1.0), (2, 0.5), (3, 0.333333)]


def test_an_existing_folder_is_not_touched(run_dir: Path) -> None:
    filled(run_dir)
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError, match=r"run folder .* exists: continue it with --resume"):
        RunFolder(run_dir, CONFIG)
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before


def test_going_on_in_the_same_folder_loses_no_checkpoint(run_dir: Path) -> None:
    filled(run_dir)
    second, third = (run_dir / "checkpoints" / f"epoch_000{i}.pt" for i in (2, 3))
    with pytest.raises(
        ValueError, match=r"the run has trained to .*epoch_0003.pt. To continue here from epoch 2 would lose that"
    ):
        RunFolder(run_dir, CONFIG, second, 2)
    third.write_bytes(third.read_bytes()[:-50])
    folder = RunFolder(run_dir, CONFIG, second, 2)
    folder.write_epoch({"epoch": 3, "train_loss": 7.0})
    folder.close()
    assert [float(row["train_loss"]) for row in rows(run_dir)] == [1.0, 0.5, 7.0]
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["epoch_0002.pt"]


def test_the_rows_of_the_past_are_in_the_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    filled(run_dir)
    newest = run_dir / "checkpoints" / "epoch_0003.pt"
    elsewhere = Path(shutil.copy(newest, tmp_path / "mine.pt"))
    (run_dir / "metrics.csv").unlink()
    for path, checkpoint in ((run_dir, newest), (tmp_path / "new", elsewhere)):
        folder = RunFolder(path, CONFIG, checkpoint, 3)
        folder.write_epoch({"epoch": 4, "train_loss": 7.0})
        folder.close()
        assert [float(row["train_loss"]) for row in rows(path)] == [1.0, 0.5, 1 / 3, 7.0]


def test_going_on_elsewhere_leaves_the_old_run_alone(run_dir: Path, tmp_path: Path) -> None:
    filled(run_dir)
    longer = dataclasses.replace(CONFIG, epochs=CONFIG.epochs + 1)
    folder = RunFolder(tmp_path / "new", longer, run_dir / "checkpoints" / "epoch_0002.pt", 2)
    # before the first epoch is over, there is all to go on from here
    found = find_checkpoint(tmp_path / "new")
    state = load_checkpoint(found)
    assert (found.name, state["epoch"], state["config"]) == ("epoch_0002.pt", 2, longer.to_dict())
    assert [float(row["train_loss"]) for row in rows(tmp_path / "new")] == [1.0, 0.5]
    folder.write_epoch({"epoch": 3, "train_loss": 7.0})
    folder.close()
    assert [float(row["train_loss"]) for row in rows(tmp_path / "new")] == [1.0, 0.5, 7.0]
    assert [float(row["train_loss"]) for row in rows(run_dir)] == [1.0, 0.5, 1 / 3]
    assert len(list((run_dir / "checkpoints").iterdir())) == 2
    with pytest.raises(FileExistsError, match="exists"):
        RunFolder(tmp_path / "new", CONFIG, run_dir / "checkpoints" / "epoch_0002.pt", 2)
