"""The folder of a training run: what is in it, and how nothing in it is ever lost.

::

    config.yaml             the whole configuration        command.txt     every command that worked here
    versions.yaml           software and machine           monitor.csv     every training episode
    progress.csv            every update                   evaluations.csv every evaluation during training
    events.out.tfevents…    the same for TensorBoard       learning_curve.png
    last_model.zip          with vecnormalize.pkl and rng.pkl: where `resume` continues
    best_model.zip          with best_vecnormalize.pkl and best_rng.pkl: the best evaluation during training
    checkpoints/            model_<steps>_steps.zip, vecnormalize_…, rng_…
    final_evaluation.json   evaluation_….json              video/
"""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import os
import pickle
import platform
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import yaml
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat, filter_excluded_keys
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.vec_env import VecEnv

from agents.config import ALGORITHMS, RunConfig
from envs import VecNormalize

__all__ = ["RunFolder", "SavedAgent", "load_agent", "normalized", "restore_rng", "save_agent", "versions"]

_PACKAGES = ("torch", "numpy", "gymnasium", "stable-baselines3", "envpool", "mujoco", "ale-py", "npg-toolkit")


class SavedAgent(NamedTuple):
    """The files of one saved agent."""

    model: Path
    statistics: Path
    """VecNormalize's; there only if the run normalises."""
    rng: Path
    """The states of the random number generators."""


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run, and its text files."""

    path: Path

    @classmethod
    def create(cls, path: Path | None, config: RunConfig, command: str) -> Self:
        """Make the folder; without a path it is ``runs/<algo>-<env>-s<seed>-<n>`` with the first free n.

        Raises:
            FileExistsError: if `path` exists.
        """
        if path is None:
            name = f"{config.algo}-{config.env.replace('/', '_').replace(':', '_')}-s{config.seed}"
            n = 1
            while True:
                path = Path("runs") / f"{name}-{n}"
                try:
                    path.mkdir(parents=True)
                    break
                except FileExistsError:
                    n += 1
        else:
            path.mkdir(parents=True)
        folder = cls(path)
        folder.checkpoints.mkdir()
        folder.begin(config, command)
        return folder

    @classmethod
    def open(cls, path: Path) -> Self:
        """The folder of an earlier run.

        Raises:
            FileNotFoundError: if there is none.
        """
        if not (path / "config.yaml").is_file():
            raise FileNotFoundError(f"{path} is not a run folder: it has no config.yaml")
        return cls(path)

    def begin(self, config: RunConfig, command: str) -> None:
        """Write the configuration, and append the command and the versions that now work in the folder."""
        _replace(self.path / "config.yaml", lambda p: p.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False)))
        with (self.path / "command.txt").open("a") as file:
            file.write(command + "\n")
        with (self.path / "versions.yaml").open("a") as file:
            yaml.safe_dump(versions(), file, sort_keys=False, explicit_start=True)

    @property
    def config(self) -> RunConfig:
        """The configuration as it was written."""
        return RunConfig.read(self.path / "config.yaml")

    @property
    def checkpoints(self) -> Path:
        """The folder of the agents on the way."""
        return self.path / "checkpoints"

    @property
    def last(self) -> SavedAgent:
        """The agent with which the run continues."""
        return SavedAgent(self.path / "last_model.zip", self.path / "vecnormalize.pkl", self.path / "rng.pkl")

    @property
    def best(self) -> SavedAgent:
        """The agent of the best evaluation during training."""
        return SavedAgent(self.path / "best_model.zip", self.path / "best_vecnormalize.pkl", self.path / "best_rng.pkl")

    def checkpoint(self, steps: int | str) -> SavedAgent:
        """The agent after `steps` environment steps."""
        names = (f"model_{steps}_steps.zip", f"vecnormalize_{steps}_steps.pkl", f"rng_{steps}_steps.pkl")
        return SavedAgent(*(self.checkpoints / name for name in names))

    # Records ----------------------------------------------------------------------------------------------------------

    def logger(self) -> Logger:
        """Scalars of every update, to progress.csv and TensorBoard; existing ones are continued."""
        return Logger(str(self.path), [_Progress(self.path / "progress.csv"), TensorBoardOutputFormat(str(self.path))])

    def episodes(self, env_id: str) -> EpisodeFile:
        """monitor.csv, to append to."""
        return EpisodeFile(self.path / "monitor.csv", env_id)

    def training_episodes(self) -> dict[str, np.ndarray]:
        """The columns of monitor.csv: ``r``, ``l``, ``t`` and ``timesteps``."""
        return _columns(self.path / "monitor.csv", skip=1)

    def add_evaluation(self, row: dict[str, float]) -> None:
        """Append a row to evaluations.csv."""
        path = self.path / "evaluations.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)

    def evaluations(self) -> dict[str, np.ndarray]:
        """The columns of evaluations.csv; none before the first evaluation."""
        path = self.path / "evaluations.csv"
        return _columns(path) if path.exists() else {}

    @property
    def final_timesteps(self) -> int | None:
        """The environment steps of the agent that the final evaluation was of; None before there is one."""
        path = self.path / "final_evaluation.json"
        return json.loads(path.read_text())["last"]["timesteps"] if path.exists() else None

    def write_json(self, name: str, content: Any) -> Path:
        """Write `content` to a file of the folder."""
        path = self.path / name
        _replace(path, lambda p: p.write_text(json.dumps(content, indent=2) + "\n"))
        return path


class EpisodeFile:
    """monitor.csv in Stable-Baselines3's format, with one more column.

    The columns are the return ``r``, the length ``l`` in steps, the seconds ``t`` since the file was begun, and
    ``timesteps``: the environment steps of the whole run when the episode ended. An existing file is continued.
    """

    def __init__(self, path: Path, env_id: str) -> None:
        exists = path.exists()
        header = {"t_start": time.time(), "env_id": env_id}
        if exists:
            with path.open() as file:
                header = json.loads(file.readline().lstrip("#"))
        self._start = header["t_start"]
        self._writer = ResultsWriter(str(path), header=header, extra_keys=("timesteps",), override_existing=not exists)

    def add(self, episode: dict[str, Any], timesteps: int) -> None:
        """Append an episode, as the infos of a step give it."""
        seconds = round(time.time() - self._start, 6)
        self._writer.write_row({"r": episode["r"], "l": episode["l"], "t": seconds, "timesteps": timesteps})

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class _Progress(KVWriter):
    """progress.csv: a row for each update. An existing file is continued, and gains the columns that it lacks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns: list[str] = []
        if path.exists():
            with path.open(newline="") as file:
                self._columns = next(csv.reader(file), [])

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        row = filter_excluded_keys(key_values, key_excluded, "csv")
        if new := [key for key in row if key not in self._columns]:
            rows = []
            if self._path.exists():
                with self._path.open(newline="") as file:
                    rows = list(csv.DictReader(file))
            self._columns += new
            _replace(self._path, lambda path: self._write(path, "w", rows))
        self._write(self._path, "a", [row])

    def _write(self, path: Path, mode: str, rows: list[dict[str, Any]]) -> None:
        with path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)

    def close(self) -> None:
        pass


def _columns(path: Path, skip: int = 0) -> dict[str, np.ndarray]:
    with path.open(newline="") as file:
        for _ in range(skip):
            file.readline()
        reader = csv.DictReader(file)
        rows = [row for row in reader if None not in row.values()]  # a last line may be incomplete
    return {name: np.array([float(row[name]) for row in rows]) for name in reader.fieldnames or ()}


# Agents ---------------------------------------------------------------------------------------------------------------


def save_agent(model: BaseAlgorithm, files: SavedAgent) -> None:
    """Save model, statistics and generators. Each file is replaced whole, the model's last, or stays as it was."""
    statistics = model.get_vec_normalize_env()
    if statistics is not None:
        _replace(files.statistics, lambda p: statistics.save(str(p)))
    rng = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002  what Stable-Baselines3 draws from
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    _replace(files.rng, lambda p: p.write_bytes(pickle.dumps(rng)))
    _replace(files.model, lambda p: model.save(p))


def load_agent(
    files: SavedAgent, config: RunConfig, make_env: Callable[[], VecEnv], *, training: bool
) -> tuple[BaseAlgorithm, VecEnv]:
    """A saved agent, and the environments that `make_env` makes with its statistics.

    Args:
        files: the agent's.
        config: the run's.
        make_env: the bare environments.
        training: whether the statistics go on moving and rewards are scaled.

    Raises:
        ValueError: if a file is damaged or belongs to another algorithm or environment.
        FileNotFoundError: if a file is missing.
    """
    config.check_device()
    needed = [files.model, *([files.statistics] if config.normalize is not None else [])]
    for path in needed:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: the run saved no such agent")
    env = make_env()
    try:
        env = normalized(env, config, files.statistics, training=training)
        return ALGORITHMS[config.algo].load(files.model, env, device=config.device), env
    except Exception as error:  # unpickling damaged data can raise anything
        env.close()
        remedy = "" if "saved by" in str(error) else _other_agents(files)
        raise ValueError(f"{files.model} cannot be loaded: {error}.{remedy}") from error


def _other_agents(files: SavedAgent) -> str:
    checkpoints = list((files.model.parent / "checkpoints").glob("model_*_steps.zip"))
    if not checkpoints:
        return ""
    newest = max(checkpoints, key=lambda path: path.stat().st_mtime)
    return f" An earlier agent of the run is whole: {newest}"


def normalized(env: VecEnv, config: RunConfig, statistics: Path | None = None, *, training: bool) -> VecEnv:
    """`env` with the run's VecNormalize around it, if it has one: new, or with saved statistics.

    Raises:
        ValueError: if the file is damaged.
    """
    if config.normalize is None:
        return env
    if statistics is None:
        wrapped = VecNormalize(env, training=training, **config.normalize)
    else:
        try:
            wrapped = VecNormalize.load(str(statistics), env)
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
            raise ValueError(f"{statistics} is damaged ({error})") from error
    wrapped.training = training
    wrapped.norm_reward = training and config.normalize["norm_reward"]
    return wrapped


def restore_rng(files: SavedAgent) -> None:
    """Set the generators of Python, NumPy and PyTorch to their saved states."""
    if not files.rng.is_file():
        raise FileNotFoundError(f"{files.rng} is missing: without it the run would not continue as it was")
    try:
        rng = pickle.loads(files.rng.read_bytes())
        random.setstate(rng["python"])
        np.random.set_state(rng["numpy"])  # noqa: NPY002
        torch.set_rng_state(rng["torch"])
        if len(rng["cuda"]) == torch.cuda.device_count() > 0:
            torch.cuda.set_rng_state_all(rng["cuda"])
    except Exception as error:  # unpickling damaged data can raise anything
        raise ValueError(f"{files.rng} is damaged ({error}).{_other_agents(files)}") from error


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    # A reader, or a run that is killed, sees the old file or the new one and nothing between.
    temporary = path.with_name(f".{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def versions() -> dict[str, Any]:
    """The software and the machine."""
    found: dict[str, Any] = {"date": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
    found["python"] = platform.python_version()
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["platform"] = platform.platform()
    found["processors"] = os.cpu_count()
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found["git_commit"] = _git("rev-parse", "HEAD")
    found["git_modified"] = bool(_git("status", "--porcelain", "--untracked-files=no")) if found["git_commit"] else None
    return found


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
