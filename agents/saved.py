"""What a saved model says of itself, in plain JSON: nothing is unpickled."""

from __future__ import annotations

import json
import zipfile
import zlib
from typing import Any

from stable_baselines3.common.save_util import open_path

__all__ = ["saved_values"]


def saved_values(path: Any) -> dict[str, Any]:
    """The attributes of a saved model as its archive has them.

    Raises:
        ValueError: if the file is damaged.
    """
    file = open_path(path, "r", suffix="zip")
    try:
        with zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} is not what was written")
            return json.loads(archive.read("data"))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"path={str(path)!r} is not a complete saved model ({str(error) or type(error).__name__}): it may be "
            "truncated; take an earlier checkpoint of the run"
        ) from error
    finally:
        file.seek(0) if file is path else file.close()
