"""The folder of a run: what was asked, what came out, and checkpoints to go on from."""

from __future__ import annotations

import csv
import json
import math
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from npg.vision.config import Config
from npg.vision.data import replacing
from npg.vision.models import model_from_name

__all__ = ["CheckpointError", "RunFolder", "find_checkpoint", "load_checkpoint", "load_model", "run_of"]


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another run; the message says what to do."""


class RunFolder:
    """Writes a run's files; every file is whole after every epoch.

    ``config.yaml``, ``command.txt`` and ``versions.txt`` say what was run; ``metrics.csv`` has a row per epoch, and
    TensorBoard's event files beside it the same numbers; ``summary.json`` comes at the end; ``checkpoints/`` holds
    the newest checkpoints.

    Args:
        path: the folder; it is made here.
        config: the run's configuration.
        checkpoint: the checkpoint that is gone on from. Its run's rows are kept up to its epoch.
        epoch: the checkpoint's.

    Raises:
        ValueError: the folder exists, and it is not the checkpoint's own; or it is, and has later checkpoints.
    """

    def __init__(self, path: Path, config: Config, checkpoint: Path | None = None, epoch: int = 0) -> None:
        past = None if checkpoint is None else run_of(checkpoint)
        if path.exists() and path.resolve() != past and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"the run folder {path} exists; go on with --resume {path}, or choose another --run-dir")
        later = [p for p in checkpoints_in(path) if epoch_of(p) > epoch]
        if whole := [p for p in later if _is_whole(p)]:
            raise ValueError(
                f"the run went on to {whole[-1]}, which would be lost if it went on from epoch {epoch} here: give "
                "--run-dir NEW to do so in a folder of its own"
            )
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._keep = config.keep_checkpoints
        self._rows: list[dict[str, Any]] = []
        begin = epoch + 1
        if past is not None:
            self._rows = [row for row in _read_rows(past / "metrics.csv") if int(row["epoch"]) < begin]
        for damaged in later:
            damaged.unlink()
        (path / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")
        with (path / "command.txt").open("a", encoding="utf-8") as file:
            file.write(" ".join(sys.argv) + "\n")
        (path / "versions.txt").write_text(_versions(), encoding="utf-8")
        self._tensorboard = SummaryWriter(str(path), purge_step=begin)

    def write_epoch(self, row: Mapping[str, Any]) -> None:
        """Add a row to ``metrics.csv`` and to TensorBoard; names before the first ``_`` become TensorBoard's groups."""
        self._rows.append(dict(row))
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        with replacing(self.path / "metrics.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(self._rows)
        for name, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                group, _, rest = name.partition("_")
                tag = f"{group}/{rest}" if rest else name
                self._tensorboard.add_scalar(tag, value, row["epoch"])
        self._tensorboard.flush()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows written so far; those of a resumed run's past are strings."""
        return self._rows

    def write_checkpoint(self, epoch: int, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint, whole or not at all, and drop those that are too old to keep."""
        path = self.checkpoints / f"epoch_{epoch:04d}.pt"
        with replacing(path) as partial:
            torch.save(dict(state), partial)
        if self._keep:
            for stale in checkpoints_in(self.path)[: -self._keep]:
                stale.unlink()
        return path

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        with replacing(self.path / "summary.json") as partial:
            partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Close TensorBoard's file."""
        self._tensorboard.close()


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in; None for a file that lies anywhere else."""
    parent = checkpoint.resolve().parent
    return parent.parent if parent.name == "checkpoints" and (parent.parent / "config.yaml").is_file() else None


def checkpoints_in(path: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return sorted((path / "checkpoints").glob("epoch_[0-9]*.pt"), key=epoch_of)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: the file itself, or the newest one of a run folder.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_file():
        return path
    if found := checkpoints_in(path):
        return found[-1]
    raise CheckpointError(
        f"there is no checkpoint at {path}; --resume takes a run folder or a file of its checkpoints/"
    )


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing but tensors and plain values is unpickled.

    Raises:
        CheckpointError: the file is truncated or no checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        run = run_of(path)
        others = [p for p in checkpoints_in(run) if p.resolve() != path.resolve()] if run else []
        remedy = f"; go on from an earlier one: --resume {others[-1]}" if others else ""
        raise CheckpointError(f"the checkpoint {path} is truncated or damaged{remedy}") from error
    if not isinstance(state, dict) or "config" not in state:
        raise CheckpointError(f"{path} is no checkpoint of train_cifar.py")
    return state


def _is_whole(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except CheckpointError:
        return False
    return True


def load_model(path: Path | str) -> tuple[nn.Module, Config]:
    """The model of a run, on the CPU and in evaluation mode, with the weights that the run evaluates; and its `Config`.

    Args:
        path: the run's folder, whose newest checkpoint it is, or a checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    state = load_checkpoint(find_checkpoint(Path(path)))
    config, weights = Config(**state["config"]), state["model"]
    if state["ema"] is not None:
        weights = {name.removeprefix("module."): w for name, w in state["ema"].items() if name != "n_averaged"}
    model = model_from_name(config.model, len(weights["classifier.bias"]), dropout=config.dropout)
    model.load_state_dict(weights)
    return model.eval(), config


def epoch_of(path: Path) -> int:
    """The epoch after which a checkpoint was written, by its name."""
    return int(path.stem.removeprefix("epoch_"))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _versions() -> str:
    def git(*arguments: str) -> str:
        try:
            return subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    commit = git("rev-parse", "HEAD") or "unknown"
    if git("status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    lines = {
        "git commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": f"{platform.platform()}, {torch.get_num_threads()} threads",
        "cuda": f"{torch.version.cuda}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "none",
    }
    return "".join(f"{name}: {value}\n" for name, value in lines.items())
