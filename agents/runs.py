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

import json
import pickle
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import yaml
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat, filter_excluded_keys
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env import VecNormalize as AnyVecNormalize

from agents.base import NaturalPolicyAlgorithm
from agents.config import ALGORITHMS, RunConfig
from envs import VecNormalize
from npg.runs import folder
from npg.runs.checkpoints import Checkpoints
from npg.runs.files import Table, read_columns, replacing
from npg.runs.folder import run_of, versions

__all__ = ["RunFolder", "SavedAgent", "load_agent", "normalized", "restore_rng", "save_agent"]

_PACKAGES = ("torch", "numpy", "gymnasium", "stable-baselines3", "envpool", "mujoco", "ale-py", "npg-toolkit")


class SavedAgent(NamedTuple):
    """The files of one saved agent."""

    model: Path
    statistics: Path
    """VecNormalize's; there only if the run normalises."""
    rng: Path
    """The states of the random number generators."""


class RunFolder(folder.RunFolder):
    """The paths of a run, and its text files."""

    @classmethod
    def create(cls, path: Path | None, config: RunConfig, command: str) -> Self:
        """Make the folder; without a path it is ``runs/<algo>-<env>-s<seed>-<n>`` with the first free n.

        Raises:
            FileExistsError: if `path` exists, and is not an empty folder.
        """
        name = f"{config.algo}-{config.env.replace('/', '_').replace(':', '_')}-s{config.seed}"
        n = 1
        while True:
            made = cls(path or Path("runs") / f"{name}-{n}")
            try:
                made.make()
                break
            except FileExistsError:
                if path is not None:
                    raise
                n += 1
        made.begin(config.to_dict(), command)
        return made

    @classmethod
    def open(cls, path: Path) -> Self:
        """The folder of an earlier run.

        Raises:
            FileNotFoundError: if there is none.
        """
        if not (path / "config.yaml").is_file():
            raise FileNotFoundError(f"{path} is not a run folder: it has no config.yaml")
        return cls(path)

    def begin(self, config: Mapping[str, Any], command: str) -> None:
        """Write the configuration, and append the command and the versions that now work in the folder."""
        super().begin(config, command)
        with (self.path / "versions.yaml").open("a", encoding="utf-8") as file:
            yaml.safe_dump(versions(_PACKAGES), file, sort_keys=False, explicit_start=True)

    @property
    def config(self) -> RunConfig:
        """The configuration as it was written."""
        return RunConfig.read(self.path / "config.yaml")

    @property
    def agents(self) -> Checkpoints:
        """The agents on the way, by their environment steps."""
        return Checkpoints(self.checkpoints, "model_", "_steps.zip")

    @property
    def last(self) -> SavedAgent:
        """The agent with which the run continues."""
        return SavedAgent(self.path / "last_model.zip", self.path / "vecnormalize.pkl", self.path / "rng.pkl")

    @property
    def best(self) -> SavedAgent:
        """The agent of the best evaluation during training."""
        return SavedAgent(self.path / "best_model.zip", self.path / "best_vecnormalize.pkl", self.path / "best_rng.pkl")

    def checkpoint(self, steps: int) -> SavedAgent:
        """The agent after `steps` environment steps."""
        names = (f"vecnormalize_{steps}_steps.pkl", f"rng_{steps}_steps.pkl")
        return SavedAgent(self.agents.path(steps), *(self.checkpoints / name for name in names))

    # Records ----------------------------------------------------------------------------------------------------------

    def logger(self) -> Logger:
        """Scalars of every update, to progress.csv and TensorBoard; existing ones are continued."""
        return Logger(str(self.path), [_Progress(self.path / "progress.csv"), TensorBoardOutputFormat(str(self.path))])

    def episodes(self, env_id: str) -> EpisodeFile:
        """monitor.csv, to append to."""
        return EpisodeFile(self.path / "monitor.csv", env_id)

    def training_episodes(self) -> dict[str, np.ndarray]:
        """The columns of monitor.csv: ``r``, ``l``, ``t`` and ``timesteps``."""
        return read_columns(self.path / "monitor.csv", skip=1)

    def add_evaluation(self, row: dict[str, float]) -> None:
        """Append a row to evaluations.csv."""
        Table(self.path / "evaluations.csv").append(row)

    def evaluations(self) -> dict[str, np.ndarray]:
        """The columns of evaluations.csv; none before the first evaluation."""
        return read_columns(self.path / "evaluations.csv")

    @property
    def final_timesteps(self) -> int | None:
        """The environment steps of the agent that the final evaluation was of; None before there is one."""
        path = self.path / "final_evaluation.json"
        return json.loads(path.read_text())["last"]["timesteps"] if path.exists() else None


class EpisodeFile:
    """monitor.csv in Stable-Baselines3's format, with one more column.

    The columns are the return ``r``, the length ``l`` in steps, the seconds ``t`` since the file was begun, and
    ``timesteps``: the environment steps of the whole run when the episode ended. An existing file is continued.
    """

    def __init__(self, path: Path, env_id: str) -> None:
        exists = path.exists()
        header: dict[str, float | str] = {"t_start": time.time(), "env_id": env_id}
        if exists:
            with path.open() as file:
                header = json.loads(file.readline().lstrip("#"))
        self._start = float(header["t_start"])
        self._writer = ResultsWriter(str(path), header=header, extra_keys=("timesteps",), override_existing=not exists)

    def add(self, episode: dict[str, Any], timesteps: int) -> None:
        """Append an episode, as the infos of a step give it."""
        seconds = round(time.time() - self._start, 6)
        self._writer.write_row({"r": episode["r"], "l": episode["l"], "t": seconds, "timesteps": timesteps})

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class _Progress(KVWriter):
    """progress.csv: a row for each update."""

    def __init__(self, path: Path) -> None:
        self._table = Table(path)

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self._table.append(filter_excluded_keys(key_values, key_excluded, "csv"))

    def close(self) -> None:
        pass


# Agents ---------------------------------------------------------------------------------------------------------------


def save_agent(model: BaseAlgorithm, files: SavedAgent) -> None:
    """Save model, statistics and generators. Each file is replaced whole, the model's last, or stays as it was."""
    statistics = model.get_vec_normalize_env()
    if statistics is not None:
        with replacing(files.statistics) as partial:
            statistics.save(str(partial))
    rng = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002  what Stable-Baselines3 draws from
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    with replacing(files.rng) as partial:
        partial.write_bytes(pickle.dumps(rng))
    with replacing(files.model) as partial:
        model.save(partial)


def load_agent(
    files: SavedAgent, config: RunConfig, make_env: Callable[[], VecEnv], *, training: bool
) -> tuple[NaturalPolicyAlgorithm, VecEnv]:
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
        remedy = "" if "saved by" in str(error) else _instead_of(files)
        raise ValueError(f"{files.model} cannot be loaded: {error}{remedy}") from error


def _instead_of(files: SavedAgent) -> str:
    return RunFolder(run_of(files.model) or files.model.parent).agents.instead_of(files.model)


def normalized(env: VecEnv, config: RunConfig, statistics: Path | None = None, *, training: bool) -> VecEnv:
    """`env` with the run's VecNormalize around it, if it has one: new, or with saved statistics.

    Raises:
        ValueError: if the file is damaged.
    """
    if config.normalize is None:
        return env
    if statistics is None:
        wrapped: AnyVecNormalize = VecNormalize(env, training=training, **config.normalize)
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
        raise ValueError(f"{files.rng} is damaged ({error}){_instead_of(files)}") from error
