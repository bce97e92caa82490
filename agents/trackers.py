"""Weights & Biases and MLflow beside the records of a run, as outputs of Stable-Baselines3's logger.

Neither is a dependency. What they get is what TensorBoard gets; the run's own folder needs none of it.
"""

from __future__ import annotations

import importlib
import json
import math
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import KVWriter, filter_excluded_keys

from agents.config import RunConfig
from npg.runs.files import replacing

__all__ = ["TRACKERS", "MLflow", "Tracker", "TrackerError", "WandB", "check_trackers"]

_FILE = "trackers.json"
_STEP = "time/total_timesteps"


class TrackerError(RuntimeError):
    """A tracker cannot begin."""


def _known(file: Path) -> dict[str, Any]:
    """The trackers' runs so far; none, with a warning, where the file is damaged."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except (ValueError, TypeError) as error:
        warnings.warn(f"{file} is damaged ({error}): the trackers begin runs of their own", stacklevel=2)
        return {}


class Tracker(KVWriter):
    """One run of one tracker; a run that is resumed in its folder goes on in the same one.

    Args:
        path: the run's folder, which keeps the identifier of the tracker's run.
        where: the project or the experiment.
        config: the run.

    Raises:
        ImportError: if the package is missing.
        TrackerError: if the tracker cannot begin, such as for lack of a login.
    """

    package = ""

    def __init__(self, path: Path, where: str, config: RunConfig) -> None:
        file, self._lost = path / _FILE, False
        known = _known(file)
        mine = known.get(self.package, {})
        try:
            run = self._begin(path, where, mine.get("run") if mine.get("where") == where else None, config.to_dict())
        except Exception as error:  # theirs, of many kinds
            raise TrackerError(f"--{self.package} {where} cannot begin: {' '.join(str(error).split())}") from error
        with replacing(file) as partial:
            partial.write_text(json.dumps(known | {self.package: {"where": where, "run": run}}, indent=2), "utf-8")

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Send one row. If that fails, the run goes on without the tracker, and a warning says so."""
        row = filter_excluded_keys(key_values, key_excluded, "tensorboard")
        values = {k: float(v) for k, v in row.items() if not isinstance(v, str)}
        self._try(lambda: self._send(values, step))

    def close(self) -> None:
        """End the tracker's run."""
        self._try(self._finish)

    def _try(self, act: Callable[[], None]) -> None:
        if self._lost:
            return
        try:
            act()
        except Exception as error:  # of a network or a service, on which no training shall depend
            self._lost = True
            warnings.warn(
                f"{self.package} takes no more rows ({error}): the run goes on, and its folder has all of them",
                stacklevel=3,
            )

    @abstractmethod
    def _begin(self, path: Path, where: str, run: str | None, config: Mapping[str, Any]) -> str:
        """Begin a run, or go on with `run`; returns its identifier."""

    @abstractmethod
    def _send(self, row: dict[str, float], step: int) -> None:
        """Send the values at an environment step."""

    @abstractmethod
    def _finish(self) -> None:
        """End the run."""


class WandB(Tracker):
    """A run of Weights & Biases; its own variables, such as ``WANDB_MODE=offline``, hold."""

    package = "wandb"

    def _begin(self, path: Path, where: str, run: str | None, config: Mapping[str, Any]) -> str:
        wandb = importlib.import_module(self.package)
        self._run = wandb.init(
            project=where,
            name=str(path),
            id=run,
            resume="allow",
            dir=str(path),
            config=dict(config),
            settings=wandb.Settings(console="off"),  # the console is the run's own
        )
        # By environment steps: rows that a resumed run repeats are not out of order then.
        self._run.define_metric("*", step_metric=_STEP)
        return str(self._run.id)

    def _send(self, row: dict[str, float], step: int) -> None:
        self._run.log({**row, _STEP: step})

    def _finish(self) -> None:
        self._run.finish()


class MLflow(Tracker):
    """A run of MLflow; its own variables, such as ``MLFLOW_TRACKING_URI``, hold."""

    package = "mlflow"

    def _begin(self, path: Path, where: str, run: str | None, config: Mapping[str, Any]) -> str:
        mlflow = importlib.import_module(self.package)
        self._metric = mlflow.entities.Metric
        self._client = mlflow.MlflowClient()
        if run is None:
            experiment = self._client.get_experiment_by_name(where)
            found = experiment.experiment_id if experiment else self._client.create_experiment(where)
            run = str(self._client.create_run(found, run_name=str(path)).info.run_id)
            for name, value in config.items():
                self._client.log_param(run, name, value)
        else:
            self._client.update_run(run, status="RUNNING")
        self._id = run
        return run

    def _send(self, row: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        finite = {k: v for k, v in row.items() if math.isfinite(v)}  # its databases take no others
        self._client.log_batch(self._id, metrics=[self._metric(k, v, now, step) for k, v in finite.items()])

    def _finish(self) -> None:
        self._client.set_terminated(self._id)


TRACKERS: dict[str, type[Tracker]] = {"wandb": WandB, "mlflow": MLflow}


def check_trackers(names: Mapping[str, str]) -> None:
    """Refuse those whose package is not installed, or that have no name to go to.

    Args:
        names: tracker ↦ project or experiment.

    Raises:
        ImportError: if a package is missing.
        ValueError: if a name is empty.
    """
    for package, where in names.items():
        if not where.strip():
            raise ValueError(f"--{package} needs a name, such as: --{package} npg")
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(f"--{package} needs the package {package}: pip install {package}") from error
