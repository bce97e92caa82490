"""Episode statistics on disk."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

__all__ = ["EpisodeWriter"]


class EpisodeWriter(VecEnvWrapper):
    """Writes the episodes of all environments to one ``monitor.csv``, as Stable-Baselines3's Monitor does for one.

    The columns are the return ``r``, the length ``l`` in steps and the seconds ``t`` since the file was begun; an
    existing file is continued, with the same origin of time. `stable_baselines3.common.monitor.load_results` reads it.

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
        header: dict[str, Any] = {"t_start": time.time(), "env_id": env_id}
        exists = path.exists()
        if exists:
            header = _header(path)
            if header["env_id"] != env_id:
                raise ValueError(
                    f"monitor_path={str(path)!r} has episodes of {header['env_id']}, not of {env_id}. Choose another."
                )
        self._start = header["t_start"]
        self._writer = ResultsWriter(str(path), header=header, override_existing=not exists)

    def reset(self) -> Any:
        """Reset the environments."""
        return self.venv.reset()

    def step_wait(self) -> Any:
        """Finish the step, and write the episodes that end with it."""
        observations, rewards, dones, infos = self.venv.step_wait()
        if dones.any():
            for i in dones.nonzero()[0].tolist():
                if episode := infos[i].get("episode"):
                    seconds = round(time.time() - self._start, 6)
                    self._writer.write_row({"r": episode["r"], "l": episode["l"], "t": seconds})
        return observations, rewards, dones, infos

    def close(self) -> None:
        """Close the environments and the file."""
        super().close()
        self._writer.close()


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open() as file:
            header = json.loads(file.readline().removeprefix("#"))
        return {"t_start": float(header["t_start"]), "env_id": header["env_id"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"monitor_path={str(path)!r} exists and does not begin as a monitor file. Choose another."
        ) from error
