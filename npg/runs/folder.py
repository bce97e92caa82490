"""The folder of a run, and what ran in it."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from npg.runs.files import PARTIAL, read_rows, replacing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["FolderInUse", "RunFolder", "begun_only", "refuse_existing", "run_of", "versions"]

_LOCK = ".lock"
# What a run writes before there is anything to go on from; TensorBoard's file; and the row of a first epoch.
_AT_THE_START = {_LOCK, "checkpoints", "config.yaml", "command.txt", "versions.yaml", "versions.txt", "metrics.csv"}


class FolderInUse(FileExistsError):
    """Another process trains in the run folder."""


class RunFolder:
    """What every run leaves: ``config.yaml``, ``command.txt`` and ``checkpoints/``; JSON files beside them.

    Args:
        path: of the folder, which need not exist yet.
    """

    _lock: IO[str] | None = None

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def make(self) -> None:
        """Make the folder, and keep other processes out of it.

        Raises:
            FileExistsError: as `refuse_existing`, and `lock`.
        """
        refuse_existing(self.path)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.lock()
        try:
            refuse_existing(self.path)  # by now another process may have been here
        except FileExistsError:
            self.unlock()
            raise

    def lock(self) -> None:
        """Keep other processes out of the folder, until `unlock` or the end of this process, however it comes.

        What a killed process was writing is removed.

        Raises:
            FolderInUse: another process trains in the folder.
        """
        if self._lock is None and fcntl is not None:
            file = (self.path / _LOCK).open("a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.close()
                raise FolderInUse(
                    f"run folder {self.path} is in use: another process trains in it. Wait for its end, or stop it"
                ) from error
            except OSError:  # a file system that has no locks
                pass
            self._lock = file
        for folder in (self.path, self.checkpoints):
            for left in folder.glob(f".*{PARTIAL}"):
                left.unlink(missing_ok=True)

    def unlock(self) -> None:
        """Let other processes in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def begin(self, config: Mapping[str, Any], command: str) -> None:
        """Write the configuration, and append the command that now works in the folder."""
        with replacing(self.path / "config.yaml") as partial:
            partial.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
        with (self.path / "command.txt").open("a", encoding="utf-8") as file:
            file.write(command + "\n")

    def write_json(self, name: str, content: Any) -> Path:
        """Write `content` to a file of the folder."""
        path = self.path / name
        with replacing(path) as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path


def begun_only(path: Path) -> bool:
    """Whether a run was ended during its start: it made the folder, and left nothing to go on from."""
    names = [file.name for file in path.rglob("*")]
    if not (path / _LOCK).is_file():
        return names == ["checkpoints"]  # it was killed before it made the lock
    if "metrics.csv" in names and len(read_rows(path / "metrics.csv")) != 1:  # with more there were checkpoints
        return False
    return all(name in _AT_THE_START or name.endswith(PARTIAL) or name.startswith("events.out") for name in names)


def refuse_existing(path: Path) -> None:
    """Refuse a path at which there is anything but an empty folder, or one that is `begun_only`.

    Raises:
        FileExistsError: if there is.
        NotADirectoryError: if a part of the path is a file.
    """
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise NotADirectoryError(
                f"run folder {path} cannot be made: {parent} is a file, not a folder; name another with --run-dir"
            )
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and not begun_only(path):
        raise FileExistsError(
            f"run folder {path} exists: continue it with --resume {path}, or name another with --run-dir"
        )


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in; None for a file that lies anywhere else."""
    parent = checkpoint.resolve().parent
    return parent.parent if parent.name == "checkpoints" and (parent.parent / "config.yaml").is_file() else None


def versions(packages: Iterable[str]) -> dict[str, Any]:
    """The date, the versions of Python and of the packages (None is not installed), the machine, and the git commit."""
    found: dict[str, Any] = {"date": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
    found["python"] = platform.python_version()
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["platform"] = platform.platform()
    found["processors"] = os.cpu_count()
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found["git_commit"] = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)docs")
    found["git_modified"] = bool(changes) if found["git_commit"] else None  # of the code: results go into docs
    return found


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
