"""The checkpoints of a run: which there are, and how one is written and read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from npg.runs.files import replacing

__all__ = ["CheckpointError", "Checkpoints"]


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another run; the message says what to do."""


@dataclass(frozen=True)
class Checkpoints:
    """The files of a folder that are numbered by epochs or steps.

    Attributes:
        folder: where they lie.
        prefix: what their names have before the number.
        suffix: what they have after it.
        digits: to which a number is filled up with zeros.
    """

    folder: Path
    prefix: str
    suffix: str
    digits: int = 1

    def path(self, number: int) -> Path:
        """Where the checkpoint of that number lies."""
        return self.folder / f"{self.prefix}{number:0{self.digits}d}{self.suffix}"

    def number(self, path: Path) -> int | None:
        """The number of a checkpoint, by its name; None for any other file."""
        found = re.fullmatch(f"{re.escape(self.prefix)}([0-9]+){re.escape(self.suffix)}", path.name)
        return None if found is None else int(found[1])

    def all(self) -> list[Path]:
        """Those that there are, oldest first."""
        numbers = {path: self.number(path) for path in self.folder.glob("*")}
        return sorted((path for path, n in numbers.items() if n is not None), key=lambda path: numbers[path] or 0)

    def write(self, number: int, state: Mapping[str, Any], keep: int = 0) -> Path:
        """Write tensors and plain values, whole or not at all, and remove all but the newest `keep`; 0 keeps all."""
        path = self.path(number)
        with replacing(path) as partial:
            torch.save(dict(state), partial)
        for stale in self.all()[:-keep] if keep else []:
            stale.unlink()
        return path

    def read(self, path: Path) -> dict[str, Any]:
        """Read onto the CPU what `write` wrote; nothing but tensors and plain values is unpickled.

        Raises:
            CheckpointError: the file is truncated, damaged, or holds anything else.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds for a damaged file
            raise CheckpointError(f"the checkpoint {path} is truncated or damaged{self.instead_of(path)}") from error
        if not isinstance(state, dict) or "config" not in state:
            raise CheckpointError(f"{path} is not a checkpoint of a run")
        return state

    def instead_of(self, damaged: Path) -> str:
        """The end of a message: how to go on from the newest of the others, if there is one."""
        others = [path for path in self.all() if path.resolve() != damaged.resolve()]
        return f"; go on from an earlier one: --resume {others[-1]}" if others else ""
