import subprocess
import sys
from pathlib import Path

import pytest
import torch

from npg.runs.checkpoints import FORMAT, CheckpointError, Checkpoints, NewerFormat


def filled(folder: Path) -> Checkpoints:
    checkpoints = Checkpoints(folder, "model_", "_steps.zip")
    for number in (9, 10, 256, 0):
        checkpoints.path(number).touch()
    for other in ("model_x_steps.zip", "model_9_steps.pkl", ".model_7_steps.zip.1.partial", "model_-1_steps.zip"):
        (folder / other).touch()
    return checkpoints


def test_names_and_numbers(tmp_path: Path) -> None:
    padded = Checkpoints(tmp_path, "epoch_", ".pt", digits=4)
    assert [padded.path(n).name for n in (7, 12345)] == ["epoch_0007.pt", "epoch_12345.pt"]
    assert [padded.number(padded.path(n)) for n in (0, 7, 12345)] == [0, 7, 12345]
    assert padded.number(tmp_path / "epoch_0007xpt") is None
    assert Checkpoints(tmp_path, "model_", "_steps.zip").path(256).name == "model_256_steps.zip"


def test_the_newest_is_the_last_by_its_number(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path)
    assert [checkpoints.number(path) for path in checkpoints.all()] == [0, 9, 10, 256]
    assert Checkpoints(tmp_path / "none", "a", "b").all() == []


@pytest.mark.parametrize(("keep", "left"), [(0, [0, 9, 10, 256, 300]), (2, [256, 300]), (9, [0, 9, 10, 256, 300])])
def test_the_newest_are_kept(keep: int, left: list[int], tmp_path: Path) -> None:
    checkpoints = filled(tmp_path)
    files = len(list(tmp_path.iterdir()))
    assert checkpoints.write(300, {}, keep) == checkpoints.path(300)
    assert [checkpoints.number(path) for path in checkpoints.all()] == left
    assert len(list(tmp_path.iterdir())) == files - 4 + len(left)


def test_another_is_offered_for_a_damaged_one(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path)
    newest, second = checkpoints.path(256), checkpoints.path(10)
    assert checkpoints.instead_of(newest) == f"; go on from an earlier one: --resume {second}"
    assert checkpoints.instead_of(tmp_path / "last.zip") == f"; go on from an earlier one: --resume {newest}"
    newest.unlink()
    assert checkpoints.instead_of(newest).endswith(f"--resume {second}")
    assert Checkpoints(tmp_path / "none", "a", "b").instead_of(newest) == ""


def test_a_full_disk_is_an_error_of_the_system_and_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import errno, resource, torch; from pathlib import Path; from npg.runs.checkpoints import Checkpoints\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"try: Checkpoints(Path({str(tmp_path)!r}), 'epoch_', '.pt').write(1, {{'x': torch.zeros(100_000)}})\n"
        "except OSError as error: print(errno.errorcode[error.errno])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.strip()) == (0, "EFBIG"), ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "epoch_", ".pt", digits=4)
    path = checkpoints.write(3, {"config": {"lr": 0.1}, "a": torch.arange(3), "b": [1, None, "c"]})
    assert path.name == "epoch_0003.pt"
    state = checkpoints.read(path)
    assert torch.equal(state.pop("a"), torch.arange(3))
    assert state == {"config": {"lr": 0.1}, "b": [1, None, "c"]}
    assert list(tmp_path.iterdir()) == [path]


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("ran"),)  # type: ignore[return-value]


def test_reading_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints(tmp_path, "epoch_", ".pt")
    path = checkpoints.write(1, {"config": {}, "a": Code()})
    with pytest.raises(CheckpointError, match=r"epoch_1.pt is truncated or damaged$"):
        checkpoints.read(path)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints, path = Checkpoints(tmp_path, "epoch_", ".pt"), tmp_path / "x.pt"
    for content in ([1], {"a": 1}):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"x.pt is not a checkpoint of a run"):
            checkpoints.read(path)
    good = checkpoints.write(1, {"config": {}})
    with pytest.raises(CheckpointError, match=f"truncated or damaged; go on from an earlier one: --resume {good}"):
        checkpoints.read(tmp_path / "none.pt")


def test_no_flipped_bit_changes_a_number_in_silence(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "epoch_", ".pt")
    torch.manual_seed(0)
    state = {"config": {"lr": 0.1}, "a": torch.randn(40, 40), "n": 3}
    path = checkpoints.write(1, state)
    whole = path.read_bytes()
    refused = 0
    for place in torch.randint(8 * len(whole), (200,)).tolist():
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = checkpoints.read(path)
        except CheckpointError:
            refused += 1
        else:
            assert torch.equal(found.pop("a"), state["a"])
            assert found == {"config": {"lr": 0.1}, "n": 3}
    assert refused > 100


def test_a_part_that_reads_as_a_folder_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "epoch_", ".pt")
    path = checkpoints.write(1, {"config": {}, "a": torch.ones(9)})
    damaged = bytearray(path.read_bytes())
    name = damaged.rindex(b"data/0")
    entry = damaged.rindex(b"PK\x01\x02", 0, name)
    damaged[entry + 38] |= 0x10  # the attribute of a folder: torch.load would give memory that nobody wrote
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        checkpoints.read(path)


def test_a_damaged_newest_one_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "epoch_", ".pt")
    first, second = (checkpoints.write(n, {"config": {}, "a": torch.ones(99)}) for n in (1, 2))
    damaged = bytearray(second.read_bytes())
    damaged[damaged.index(torch.ones(4).numpy().tobytes()) + 1] ^= 1
    second.write_bytes(damaged)
    with pytest.warns(UserWarning, match=r"epoch_2\.pt is truncated or damaged: it is passed over"):
        assert checkpoints.newest() == first
    first.unlink()
    with pytest.warns(UserWarning, match=r"epoch_2\.pt"):
        assert checkpoints.newest() is None


def test_a_checkpoint_of_a_newer_version_is_refused_by_name(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "epoch_", ".pt")
    checkpoints.write(1, {"config": {}})
    path = checkpoints.write(2, {"format": FORMAT + 1, "config": {}})
    for read in (lambda: checkpoints.read(path), checkpoints.newest):
        with pytest.raises(NewerFormat, match=r"epoch_2\.pt was written by a newer version.*update the package"):
            read()


def test_a_checkpoint_from_before_there_was_a_format_is_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "epoch_", ".pt")
    torch.save({"config": {}, "a": torch.ones(3)}, checkpoints.path(4))
    assert torch.equal(checkpoints.read(checkpoints.path(4))["a"], torch.ones(3))
