"""The checkpoints of a run: which there are, and how one is written and read."""

from __future__ import annotations

import errno
import io
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from npg.runs.files import replacing

__all__ = ["FORMAT", "CheckpointError", "Checkpoints", "NewerFormat", "check_archive", "check_format", "check_parts"]

FORMAT = 1
"""The number of the format that checkpoints are written in; those from before it was counted have none."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another run; the message says what to do."""


class NewerFormat(CheckpointError):
    """A checkpoint is whole, and of a version of this package that is newer than this one."""


def check_parts(archive: zipfile.ZipFile) -> None:
    """Compare every part of an archive with the checksum that it has there.

    Raises:
        zipfile.BadZipFile: a part is not what was written, or reads as a folder, whose content nothing checks.
    """
    try:
        damaged = archive.testzip()
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise zipfile.BadZipFile("its list of parts points to before its beginning") from error
    # PyTorch's reader leaves the memory of such a part as it found it.
    damaged = damaged or next((part.filename for part in archive.infolist() if part.external_attr & 0x10), None)
    if damaged:
        raise zipfile.BadZipFile(f"{damaged} is not what was written")


def check_archive(path: Path) -> None:
    """Compare every part of a ZIP archive, which is what PyTorch's files are, with the checksum that it has there.

    Raises:
        CheckpointError: the file is truncated, or a part is not what was written.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            check_parts(archive)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error})") from error


def check_format(path: Path, number: Any) -> None:
    """Refuse a checkpoint by the number of its format.

    Raises:
        NewerFormat: the number is larger than `FORMAT`.
    """
    if not isinstance(number, int) or number > FORMAT:
        raise NewerFormat(
            f"{path} was written by a newer version of npg-toolkit, in format {number}, and this one reads up to "
            f"{FORMAT}: update the package"
        )


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
        content = io.BytesIO()  # PyTorch's own writer does not tell that a disk is full
        torch.save({"format": FORMAT, **state}, content)
        with replacing(path) as partial:
            partial.write_bytes(content.getbuffer())
        for stale in self.all()[:-keep] if keep else []:
            stale.unlink()
        return path

    def read(self, path: Path) -> dict[str, Any]:
        """Read onto the CPU what `write` wrote; nothing but tensors and plain values is unpickled.

        Raises:
            CheckpointError: the file is truncated, damaged, or holds anything else.
            NewerFormat: it is of a newer version of the package.
            OSError: it cannot be read.
        """
        try:
            check_archive(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds for a damaged file
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise
            raise CheckpointError(f"the checkpoint {path} is truncated or damaged{self.instead_of(path)}") from error
        if not isinstance(state, dict) or "config" not in state:
            raise CheckpointError(f"{path} is not a checkpoint of a run")
        check_format(path, state.pop("format", 0))
        return state

    def newest(self) -> Path | None:
        """The newest one that is whole, with a warning for each newer one; None where there is none.

        Raises:
            NewerFormat: the newest whole one is of a newer version of the package.
        """
        for path in reversed(self.all()):
            try:
                self.read(path)
                return path
            except NewerFormat:
                raise
            except (CheckpointError, OSError) as error:
                reason = str(error).partition("; go on")[0]
                warnings.warn(f"{reason}: it is passed over for an earlier one", stacklevel=2)
        return None

    def instead_of(self, damaged: Path) -> str:
        """The end of a message: how to go on from the newest of the others, if there is one."""
        others = [path for path in self.all() if path.resolve() != damaged.resolve()]
        return f"; go on from an earlier one: --resume {others[-1]}" if others else ""
