from pathlib import Path

import pytest
import torch

from npg.parallel import World
from npg.runs.checkpoints import CheckpointError
from npg.vision.checkpoint import checkpoints_in, find_checkpoint, load_checkpoint, load_matching, load_model
from npg.vision.config import Config
from npg.vision.run_folder import RunFolder

CONFIG = Config("wrn-16-1", "sgd", {"lr": 0.1}, keep_checkpoints=2)


def filled(path: Path) -> None:
    folder = RunFolder(path, CONFIG)
    for epoch in (1, 2, 3):
        folder.write_checkpoint(epoch, {"config": CONFIG.to_dict(), "epoch": epoch, "x": torch.ones(3)})
    folder.close()


def test_finding_and_reading_checkpoints(run_dir: Path, tmp_path: Path) -> None:
    filled(run_dir)
    newest = find_checkpoint(run_dir)
    assert newest.name == "epoch_0003.pt"
    assert find_checkpoint(newest) == newest
    assert load_checkpoint(newest)["epoch"] == 3
    assert [checkpoints_in(run_dir).number(path) for path in checkpoints_in(run_dir).all()] == [2, 3]
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        find_checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize("size", [0, 100, -50])
def test_a_truncated_checkpoint_names_an_earlier_one(size: int, run_dir: Path) -> None:
    filled(run_dir)
    newest = find_checkpoint(run_dir)
    newest.write_bytes(newest.read_bytes()[:size])
    with pytest.raises(
        CheckpointError, match=r"truncated or damaged; go on from an earlier one: --resume .*epoch_0002.pt"
    ):
        load_checkpoint(newest)


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="is not a checkpoint of a run"):
        load_checkpoint(tmp_path / "list.pt")


def test_what_a_whole_checkpoint_lacks_or_has_too_much_is_named(run_dir: Path) -> None:
    world = World(torch.device("cpu"))
    folder = RunFolder(run_dir, CONFIG)
    whole = {"config": CONFIG.to_dict(), "epoch": 1}
    path = folder.write_checkpoint(1, whole)
    folder.close()
    with pytest.raises(CheckpointError, match=r"epoch_0001.pt lacks accuracy, .*world_size: it is not as this version"):
        load_matching(path, CONFIG, world)
    with pytest.raises(CheckpointError, match=r"epoch_0001.pt is not as this version.*: it lacks 'model'"):
        load_model(run_dir)
    checkpoints_in(run_dir).write(1, whole | {"config": CONFIG.to_dict() | {"rotation": 3}})
    for read in (lambda: load_matching(path, CONFIG, world), lambda: load_model(path)):
        with pytest.raises(CheckpointError, match=r"epoch_0001.pt is not as this version.*'rotation'"):
            read()
