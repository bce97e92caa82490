"""The run folder that a command is given, and the folder to give where it is given something else."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from agents.runs import RunFolder
from agents.seeds import SeedsFolder

__all__ = ["opened"]


def opened(path: Path, *, checkpoints: bool = False) -> RunFolder:
    """The folder of a run.

    Args:
        path: of the folder.
        checkpoints: whether it may also be one of the run's checkpoints.

    Raises:
        FileNotFoundError: for any other path; it names the folder that was meant, if there is one.
    """
    with suppress(FileNotFoundError):
        return RunFolder.of(path) if checkpoints else RunFolder.open(path)
    if SeedsFolder.is_one(path):
        runs = [*filter(_is_run, sorted(path.glob("s*")))]
        remedy = f"give that of one, such as {runs[0]}" if runs else "none of their runs has begun"
        raise FileNotFoundError(f"{path} is not a run folder, it is that of several seeds: {remedy}")
    if (run := next(filter(_is_run, [path.parent, path.parent.parent]), None)) is not None:
        which = {"last_model.zip": " --model last", "best_model.zip": " --model best"}.get(path.name, "")
        raise FileNotFoundError(f"{path} is not a run folder, it is in one: give {run}{which}")
    why = "it has no config.yaml" if path.exists() else "there is nothing"
    raise FileNotFoundError(
        f"{path} is not a run folder: {why}; give the folder that a training made, such as runs/trpo-CartPole-v1-s0-1"
    )


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()
