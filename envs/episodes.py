"""Episode statistics on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

__all__ = ["EpisodeFile", "EpisodeWriter"]


class EpisodeFile:
    """A ``monitor.csv`` of Stable-Baselines3's format; an existing one is continued, with the same origin of time.

    The columns are the return ``r``, the length ``l`` in steps, the seconds ``t`` since the file was begun, and
    ``columns``. `stable_baselines3.common.monitor.load_results` reads it.

    Args:
        path: the file. One without any content, such as a power failure leaves, is begun anew.
        env_id: written to the file's header.
        columns: further ones.

    Raises:
        ValueError: for an existing file that is damaged or belongs to another environment.
    """

    def __init__(self, path: Path, env_id: str, columns: Sequence[str] = ()) -> None:
        header: dict[str, Any] = {"t_start": time.time(), "env_id": env_id}
        goes_on = path.exists() and path.stat().st_size > 0
        if goes_on:
            header = _header(path)
            if header["env_id"] != env_id:
                raise ValueError(
                    f"the monitor file {str(path)!r} has episodes of {header['env_id']}, not of {env_id}: choose "
                    "another path"
                )
        self._start = header["t_start"]
        self._writer = ResultsWriter(str(path), header=header, extra_keys=tuple(columns), override_existing=not goes_on)

    def add(self, episode: Mapping[str, Any], **columns: Any) -> None:
        """Append an episode, as the infos of a step give it, with the values of the further columns."""
        seconds = round(time.time() - self._start, 6)
        self._writer.write_row({"r": episode["r"], "l": episode["l"], "t": seconds, **columns})

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class EpisodeWriter(VecEnvWrapper):
    """Writes the episodes of all environments to one `EpisodeFile`, as Stable-Baselines3's Monitor does for one.

    Args:
        venv: environments whose infos have ``episode``.
        path: the file, with a name that ends in ``monitor.csv``, or an existing folder, in which it is ``monitor.csv``.
        env_id: written to the file's header.

    Raises:
        ValueError: for another name, and for an existing file that is damaged or belongs to another environment.
    """

    def __init__(self, venv: VecEnv, path: str | Path, env_id: str) -> None:
        super().__init__(venv)
        path = Path(path)
        if path.is_dir():
            path /= Monitor.EXT
        if not path.name.endswith(Monitor.EXT):
            raise ValueError(f"monitor_path={str(path)!r} must be a folder that exists or end in {Monitor.EXT!r}.")
        self._file = EpisodeFile(path, env_id)

    def reset(self) -> Any:
        """Reset the environments."""
        return self.venv.reset()

    def step_wait(self) -> Any:
        """Finish the step, and write the episodes that end with it."""
        observations, rewards, dones, infos = self.venv.step_wait()
        for i in dones.nonzero()[0].tolist():
            if episode := infos[i].get("episode"):
                self._file.add(episode)
        return observations, rewards, dones, infos

    def close(self) -> None:
        """Close the environments and the file."""
        super().close()
        self._file.close()


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open() as file:
            header = json.loads(file.readline().removeprefix("#"))
        return {"t_start": float(header["t_start"]), "env_id": header["env_id"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} exists and does not begin as a monitor file: choose another path, or move the file away"
        ) from error
