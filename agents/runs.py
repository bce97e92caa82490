"""The folder of a training run: what is in it, and how nothing in it is ever lost.

::

    config.yaml             the whole configuration        command.txt     every command that worked here
    versions.yaml           software and machine           monitor.csv     every training episode
    progress.csv            every update                   evaluations.csv every evaluation during training
    events.out.tfevents…    the same for TensorBoard       learning_curve.png
    last_model.zip          where `resume` continues       best_model.zip  the best evaluation during training
    checkpoints/            model_<steps>_steps.zip, and best_model.zip as it was at the last of them
    final_evaluation.json   evaluation_….json              video/

An agent is one file, which takes its name when it is whole: Stable-Baselines3's archive with one more part, the JSON
text of `agents.state` and how far each record was. Folders from before that was so have pickles beside it, for the
statistics and the generators; these are read as data, and anything else in them is refused.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import yaml
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat, filter_excluded_keys
from stable_baselines3.common.vec_env import VecEnv

from agents.base import NaturalPolicyAlgorithm
from agents.config import ALGORITHMS, RunConfig
from agents.saved import plain_pickle, saved_values
from agents.state import set_statistics, state_of
from envs import VecNormalize
from envs.episodes import EpisodeFile
from npg.runs import folder
from npg.runs.checkpoints import FORMAT, CheckpointError, Checkpoints, NewerFormat, check_archive, check_format
from npg.runs.files import Table, count_rows, cut_rows, read_columns, replacing, sync
from npg.runs.folder import run_of, versions
from npg.runs.plain import from_text, to_text

__all__ = ["RunFolder", "SavedAgent", "copy_agent", "load_agent", "normalized", "read_state", "save_agent"]

_PACKAGES = ("torch", "numpy", "gymnasium", "stable-baselines3", "envpool", "mujoco", "ale-py", "npg-toolkit")


#: The tables of a run, and how many lines each has before its columns.
_RECORDS = {"progress.csv": 0, "evaluations.csv": 0, "monitor.csv": 1}
_STATE = "state.json"


class SavedAgent(NamedTuple):
    """The file of one saved agent, and the pickles that older versions wrote beside it."""

    model: Path
    statistics: Path
    """VecNormalize's, in an old folder."""
    rng: Path
    """The states of the random number generators, in an old folder."""


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

    @classmethod
    def of(cls, path: Path) -> Self:
        """The folder that `path` is, or that it is a checkpoint of; raises as `open`."""
        return cls.open(path.parent.parent if path.suffix == ".zip" and path.parent.name == "checkpoints" else path)

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

    @property
    def best_before(self) -> SavedAgent:
        """The best agent as it was at the last checkpoint."""
        return SavedAgent(self.checkpoints / "best_model.zip", Path(), Path())

    def checkpoint(self, steps: int) -> SavedAgent:
        """The agent after `steps` environment steps."""
        names = (f"vecnormalize_{steps}_steps.pkl", f"rng_{steps}_steps.pkl")
        return SavedAgent(self.agents.path(steps), *(self.checkpoints / name for name in names))

    def newest(self) -> SavedAgent:
        """The agent to go on from: the last one, or if it is damaged the newest whole checkpoint, with a warning.

        Raises:
            FileNotFoundError: if the folder has no agent.
            CheckpointError: if none is whole, or if the last one is of a newer version of the package.
        """
        there = [self.last, *(self.checkpoint(self.agents.number(path) or 0) for path in reversed(self.agents.all()))]
        damaged: list[str] = []
        for files in there:
            try:
                read_state(files)
            except FileNotFoundError:
                damaged.append(f"{files.model} is missing")
            except NewerFormat:
                raise
            except CheckpointError as error:
                damaged.append(str(error))
            else:
                if damaged:
                    warnings.warn(f"{'; '.join(damaged)}. The run goes on from {files.model}", stacklevel=2)
                return files
        if len(there) == 1 and not self.last.model.exists():
            raise FileNotFoundError(f"{self.last.model} is missing: the run saved no agent")
        raise CheckpointError(f"{'; '.join(damaged)}: no agent of the run is left")

    # Records ----------------------------------------------------------------------------------------------------------

    def positions(self) -> dict[str, int]:
        """How far each record is, which is then on the disk: the rows of a table, the bytes of TensorBoard's files."""
        boards = self._boards()
        for path in (*(self.path / name for name in _RECORDS), *boards):
            sync(path)
        rows = {name: count_rows(self.path / name, skip) for name, skip in _RECORDS.items()}
        return rows | {path.name: path.stat().st_size for path in boards}

    def cut(self, positions: Mapping[str, int]) -> None:
        """Take back from every record what came after `positions`; a warning says where rows are missing."""
        for name, skip in _RECORDS.items():
            cut_rows(self.path / name, positions[name], skip)
            if (found := count_rows(self.path / name, skip)) < positions[name]:
                warnings.warn(f"{self.path / name} has {found} of {positions[name]} rows", stacklevel=2)
        for path in self._boards():
            if path.name not in positions:
                path.unlink()
            elif path.stat().st_size > positions[path.name]:
                os.truncate(path, positions[path.name])

    def cut_best(self, steps: int) -> None:
        """Take back the best agent if it came after `steps`: the one of the last checkpoint takes its place, if any.

        One that is damaged stays, and is told where it is needed.
        """
        best, before = _steps_of(self.best), _steps_of(self.best_before)
        if best is None or best <= steps:
            return
        if before is not None and before <= steps:
            copy_agent(self.best_before, self.best)
            return
        warnings.warn(
            f"{self.best.model} came after step {steps:,}, where the run goes on, and is removed: the best evaluation "
            "from here on takes its place",
            stacklevel=2,
        )
        self.best.model.unlink()

    def _boards(self) -> list[Path]:
        return sorted(self.path.glob("events.out.tfevents.*"))

    def logger(self, others: Iterable[KVWriter] = ()) -> Logger:
        """Scalars of every update, to progress.csv, TensorBoard and `others`; existing ones are continued."""
        own = [_Progress(self.path / "progress.csv"), TensorBoardOutputFormat(str(self.path))]
        return Logger(str(self.path), [*own, *others])

    def episodes(self, env_id: str) -> EpisodeFile:
        """monitor.csv, to append to."""
        return EpisodeFile(self.path / "monitor.csv", env_id, ["timesteps"])

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


class _Progress(KVWriter):
    """progress.csv: a row for each update."""

    def __init__(self, path: Path) -> None:
        self._table = Table(path)

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self._table.append(filter_excluded_keys(key_values, key_excluded, "csv"))

    def close(self) -> None:
        pass


# Agents ---------------------------------------------------------------------------------------------------------------


def save_agent(
    model: BaseAlgorithm,
    files: SavedAgent,
    folder: RunFolder | None = None,
    config: RunConfig | None = None,
    *,
    episodes: bool = False,
) -> None:
    """Save an agent with its state as one file, which is replaced whole, or stays as it was.

    Args:
        model: the agent.
        files: where.
        folder: if given, the run continues from here: the positions of its records are saved.
        config: the run's, if it continues from here: what decides the agent is saved.
        episodes: whether the episodes under way continue too.
    """
    state = {"format": FORMAT, **state_of(model, episodes=episodes)}
    state["records"] = None if folder is None else folder.positions()
    state["config"] = None if config is None else _deciding(config)
    with replacing(files.model) as partial:
        model.save(partial)
        with zipfile.ZipFile(partial, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(_STATE, to_text(state))


def _deciding(config: RunConfig) -> dict[str, Any]:
    """What an agent was made of, which no run that goes on can change: settings by name, as YAML."""
    settings = {"policy": config.policy, **config.hyperparameters}
    return {name: yaml.safe_dump(value) for name, value in settings.items()}


def _check_unchanged(files: SavedAgent, state: Mapping[str, Any] | None, config: RunConfig) -> None:
    """Compare a configuration with the one that an agent was trained with; older agents do not tell.

    Raises:
        ValueError: for a setting that was edited since, which would say what is not so.
    """
    saved, now = (state or {}).get("config") or {}, _deciding(config)
    if changed := [name for name, value in saved.items() if now.get(name) != value]:
        was, got = ({name: yaml.safe_load(of[name]) for name in changed if name in of} for of in (saved, now))
        raise ValueError(
            f"config.yaml has {_in_words(got)}, and {files.model} was trained with {_in_words(was)}: a run keeps what "
            "it began with. Write that back, or begin another run with --set"
        )


def _in_words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "nothing there"


def _steps_of(files: SavedAgent) -> int | None:
    """The environment steps of a saved agent; None if it is missing or damaged."""
    try:
        return int(saved_values(files.model)["num_timesteps"])
    except (FileNotFoundError, KeyError, ValueError):
        return None


def copy_agent(files: SavedAgent, to: SavedAgent) -> None:
    """Save a saved agent once more."""
    with replacing(to.model) as partial:
        shutil.copyfile(files.model, partial)


def read_state(files: SavedAgent) -> dict[str, Any] | None:
    """What a saved agent has beside the model (`agents.state`); None for one of an older version, which had none.

    Raises:
        FileNotFoundError: if there is no such agent.
        CheckpointError: if the file is damaged.
        NewerFormat: if it is of a newer version of the package.
    """
    if not files.model.is_file():
        raise FileNotFoundError(f"{files.model} is missing: the run saved no such agent")
    check_archive(files.model)
    with zipfile.ZipFile(files.model) as archive:
        names = archive.namelist()
        if "data" not in names:  # what is left of a truncated file may end with an archive that it held
            raise CheckpointError(f"{files.model} is truncated or damaged (it has no data)")
        if _STATE not in names:
            return None
        try:
            state = from_text(archive.read(_STATE))
            number = state["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{files.model} is damaged: its {_STATE} is {error}") from error
    check_format(files.model, number)
    return state


def load_agent(
    files: SavedAgent, config: RunConfig, make_env: Callable[[], VecEnv], *, training: bool
) -> tuple[NaturalPolicyAlgorithm, VecEnv, dict[str, Any]]:
    """A saved agent, the environments that `make_env` makes with its statistics, and the rest of its state.

    Args:
        files: the agent's.
        config: the run's.
        make_env: the bare environments.
        training: whether the statistics go on moving and rewards are scaled.

    Raises:
        ValueError: if a file is damaged or belongs to another algorithm or environment, or the configuration of an
            agent that trains on was edited.
        FileNotFoundError: if a file is missing.
    """
    config.check_device()
    try:
        state = read_state(files)
    except NewerFormat:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_instead_of(files, training)}") from error
    if training:
        _check_unchanged(files, state, config)
    env = make_env()
    try:
        env = normalized(env, config, training=training)
        model = ALGORITHMS[config.algo].load(files.model, env, device=config.device)
        state = state or _old_state(files, config)
        if isinstance(env, VecNormalize):
            set_statistics(env, state["statistics"])
        return model, env, state
    except Exception as error:  # damaged data can raise anything
        env.close()
        remedy = "" if "saved by" in str(error) else _instead_of(files, training)
        raise ValueError(f"{files.model} cannot be loaded: {error}{remedy}") from error


def _old_state(files: SavedAgent, config: RunConfig) -> dict[str, Any]:
    """The state of an agent of an older version, which lies in pickles beside it; these are read as data alone."""
    state: dict[str, Any] = {"environments": None, "records": None, "log": []}
    for name, path in (("generators", files.rng), ("statistics", files.statistics)):
        if name == "statistics" and config.normalize is None:
            continue
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: without it the run would not continue as it was")
        try:
            state[name] = plain_pickle(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    return state


def _instead_of(files: SavedAgent, training: bool) -> str:
    """The end of a message about a damaged agent: what there is in its place."""
    folder = RunFolder(run_of(files.model) or files.model.parent)
    if training:
        return folder.agents.instead_of(files.model)
    there = [folder.best.model, folder.last.model, *folder.agents.all()[-1:]]
    others = [str(path) for path in there if path.is_file() and path.resolve() != files.model.resolve()]
    return f"; other agents of the run: {', '.join(others)}" if others else "; no other agent of the run is left"


def normalized(env: VecEnv, config: RunConfig, *, training: bool) -> VecEnv:
    """`env` with the run's VecNormalize around it, if it has one."""
    if config.normalize is None:
        return env
    wrapped = VecNormalize(env, training=training, **config.normalize)
    wrapped.norm_reward = training and config.normalize["norm_reward"]
    return wrapped
