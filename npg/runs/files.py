"""Files that are replaced as one, and tables: a row for each update, epoch or evaluation."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["PARTIAL", "Table", "count_rows", "cut_rows", "read_columns", "read_rows", "replacing", "sync", "write_rows"]

PARTIAL = ".partial"
"""What ends the name of a file that is being written: after a kill it stays, and nobody reads it."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file at, which takes `path`'s place only when the block ends without an exception.

    A reader, or a run that is killed, sees the old file or the new one and nothing between; so does one that reads
    after a power failure, because the content is on the disk before the name is.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until what was written to a file, or which files a folder has, is on the disk; nothing where it is not."""
    if os.name == "nt" or not path.exists():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a table; none where there is no file."""
    return _read(path, 0)[1]


def read_columns(path: Path, skip: int = 0) -> dict[str, npt.NDArray[np.float64]]:
    """The columns of a table of numbers, after `skip` lines of another kind; none where there is no file.

    An empty cell, of a row that is older than its column, is NaN.
    """
    names, rows = _read(path, skip)
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a table as one. Its columns are those of all rows; where a row lacks one, the cell is empty."""
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def count_rows(path: Path, skip: int = 0) -> int:
    """The whole rows of a table, after `skip` lines of another kind; 0 where there is no file."""
    return len(_read(path, skip)[1])


def cut_rows(path: Path, rows: int, skip: int = 0) -> None:
    """Keep the first `rows` rows of a table; a file that has no more of them, or is not there, stays as it is."""
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    if len(lines) > skip + 1 + rows:
        with replacing(path) as partial:
            partial.write_bytes(b"".join(lines[: skip + 1 + rows]))


class Table:
    """A table to append to. An existing file is continued without an incomplete last row, and gains what it lacks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns, rows = _read(path, 0)
        if self._columns and not path.read_bytes().endswith(b"\n"):  # a row would go on where a killed run's ended
            write_rows(path, rows) if rows else path.unlink()
            self._columns = self._columns if rows else []

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row at the end."""
        if row.keys() <= set(self._columns):
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        else:
            write_rows(self.path, [*read_rows(self.path), row])
            self._columns = _read(self.path, 0)[0]


def _read(path: Path, skip: int) -> tuple[list[str], list[dict[str, str]]]:
    if not path.is_file():
        return [], []
    with path.open(newline="", encoding="utf-8") as file:
        for _ in range(skip):
            file.readline()
        text = file.read()
        # What a killed run's last line lacks may be digits alone: without its end none is whole.
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
        rows = [row for row in reader if None not in row.values()]  # cut within quotes
        return list(reader.fieldnames or ()), rows
