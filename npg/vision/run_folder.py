"""The folder of a run: what was asked, what came out, and checkpoints to go on from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from npg.runs import folder
from npg.runs.checkpoints import CheckpointError, NewerFormat
from npg.runs.command_line import command
from npg.runs.files import read_rows, write_rows
from npg.runs.folder import run_of, versions
from npg.vision.checkpoint import checkpoints_in, load_checkpoint
from npg.vision.config import Config

__all__ = ["THRESHOLDS", "RunFolder", "summarize"]

#: Accuracies, in percent, to which epochs and seconds are counted in a run's summary.
THRESHOLDS = (60, 70, 75, 80, 85, 90, 92, 94)


class RunFolder(folder.RunFolder):
    """Writes a run's files; every file is whole after every epoch.

    ``config.yaml``, ``command.txt`` and ``versions.txt`` say what was run; ``metrics.csv`` has a row per epoch, and
    TensorBoard's event files beside it the same numbers; ``summary.json`` comes at the end; ``checkpoints/`` holds
    the newest checkpoints.

    Args:
        path: the folder; it is made here.
        config: the run's configuration.
        checkpoint: the checkpoint that is gone on from, whose rows are kept.
        epoch: the checkpoint's.

    Raises:
        FileExistsError: the folder exists, and it is not the checkpoint's own.
        ValueError: it is the checkpoint's own, and has later checkpoints.
    """

    def __init__(self, path: Path, config: Config, checkpoint: Path | None = None, epoch: int = 0) -> None:
        super().__init__(path)
        self._saved, self._keep = checkpoints_in(path), config.keep_checkpoints
        past = None if checkpoint is None else run_of(checkpoint)
        if path.resolve() != past:
            self.make()
        else:
            self.lock()
        later = [p for p in self._saved.all() if (self._saved.number(p) or 0) > epoch]
        if whole := [p for p in later if _is_whole(p)]:
            self.unlock()
            raise ValueError(
                f"the run has trained to {whole[-1]}. To continue here from epoch {epoch} would lose that: give "
                "--run-dir NEW, and it continues in a folder of its own"
            )
        state = {} if checkpoint is None else load_checkpoint(checkpoint)
        earlier = [] if past is None else read_rows(past / "metrics.csv")
        self.rows: list[dict[str, Any]] = [row for row in state.get("rows", earlier) if int(row["epoch"]) <= epoch]
        """The rows written so far; older checkpoints have none, and those of their runs are strings."""
        for damaged in later:
            damaged.unlink()
        if checkpoint is not None and path.resolve() != past:  # from now on it can go on here, whatever ends it
            self.write_checkpoint(epoch, {**state, "config": config.to_dict()})
            write_rows(path / "metrics.csv", self.rows)
        self.begin(config.to_dict(), command())
        (path / "versions.txt").write_text(_versions(), encoding="utf-8")
        self._tensorboard = SummaryWriter(str(path), purge_step=epoch + 1)

    def write_epoch(self, row: Mapping[str, Any]) -> None:
        """Add a row to ``metrics.csv`` and to TensorBoard; names before the first ``_`` become TensorBoard's groups."""
        self.rows.append(dict(row))
        write_rows(self.path / "metrics.csv", self.rows)
        for name, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                group, _, rest = name.partition("_")
                tag = f"{group}/{rest}" if rest else name
                self._tensorboard.add_scalar(tag, value, row["epoch"])
        self._tensorboard.flush()

    def write_checkpoint(self, epoch: int, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint with the rows so far, whole or not at all, and drop those that are too old to keep."""
        return self._saved.write(epoch, {**state, "rows": self.rows}, self._keep)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        self.write_json("summary.json", dict(summary))

    def close(self) -> None:
        """Close TensorBoard's file, and let other processes into the folder."""
        self._tensorboard.close()
        self.unlock()


def summarize(rows: Sequence[Mapping[str, Any]], evaluated_on: str) -> dict[str, Any]:
    """Best, last and mean of the last five accuracies, and when each of `THRESHOLDS` was first passed."""
    curve = [(int(row["epoch"]), float(row["seconds"]), float(row[f"{evaluated_on}_top1"])) for row in rows]
    accuracies = [accuracy for _, _, accuracy in curve]
    reached: dict[str, Any] = {}
    for threshold in THRESHOLDS:
        first = next(((e, s) for e, s, accuracy in curve if accuracy > threshold), None)
        reached[str(threshold)] = first and {"epoch": first[0], "seconds": first[1]}
    return {
        "evaluated_on": evaluated_on,
        "best_top1": max(accuracies),
        "final_top1": accuracies[-1],
        "last_five_top1": sum(accuracies[-5:]) / len(accuracies[-5:]),
        "first_above": reached,
    }


def _is_whole(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except NewerFormat:
        return True
    except CheckpointError:
        return False
    return True


def _versions() -> str:
    found = versions(["numpy"])
    lines = {
        "git commit": (found["git_commit"] or "unknown") + (" with changes" if found["git_modified"] else ""),
        "python": found["python"],
        "torch": torch.__version__,
        "numpy": found["numpy"],
        "machine": f"{found['platform']}, {torch.get_num_threads()} threads",
        "cuda": f"{torch.version.cuda}, {found['gpu']}" if found["gpu"] else "none",
    }
    return "".join(f"{name}: {value}\n" for name, value in lines.items())
