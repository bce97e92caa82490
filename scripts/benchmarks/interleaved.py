"""Times of several functions as ratios taken in one run: they take turns, so that what slows one slows all."""

from __future__ import annotations

import argparse
import csv
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from npg.runs.files import read_rows


def at_least(low: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from ``low`` on."""

    def whole(text: str) -> int:
        if not (text.isdecimal() and int(text) >= low):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {low}")
        return int(text)

    return whole


def environment(text: str) -> str:
    """The type of an option that is the id of an environment which can be made here."""
    from envs import make_vec_env

    try:
        make_vec_env(text).close()
    except (ValueError, ImportError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def with_number(separator: str, low: int) -> Callable[[str], tuple[str, int]]:
    """The type of an option that is a name and a whole number from ``low`` on, such as ``mlp-64@2048``."""

    def parts(text: str) -> tuple[str, int]:
        name, _, number = text.rpartition(separator)
        if not name:
            raise argparse.ArgumentTypeError(f"{text!r} has no number: write {text}{separator}{max(low, 2048)}")
        return name, at_least(low)(number.replace("_", ""))

    return parts


def make_parser(description: str | None, rounds: int, threads: int = 2) -> argparse.ArgumentParser:
    """A parser with ``--rounds``, ``--threads`` and ``--csv``, which measurements in turns have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least(1), default=rounds, help="turns of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=threads, help="CPU threads of PyTorch (default: %(default)s)")
    parser.add_argument("--csv", type=Path, help="write the table here as well")
    return parser


def synchronize(device: torch.device | str = "cpu") -> None:
    """Wait for a CUDA device; nothing on CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Turn:
    """What was done in a turn, in units such as steps of an environment."""

    units: float = 1.0


@contextmanager
def one_turn(name: str) -> Iterator[Turn]:
    """Wait for the other process that is measured beside this one, if there is one (`commits.py`), and then let it on.

    The seconds for each unit are then written down, turn by turn, where ``MEASURED_BESIDE`` says.
    """
    done = Turn()
    mine, theirs, log = os.environ.get("MEASURED_BESIDE", ",,").split(",")
    if mine and not os.read(int(mine), 1):
        raise SystemExit("the process that is measured beside this one has ended")
    start = perf_counter()
    try:
        yield done
    finally:
        seconds = (perf_counter() - start) / done.units
        if mine:
            with Path(log).open("a") as file:
                file.write(f"{name}\t{seconds}\n")
            with suppress(BrokenPipeError):  # the other one has ended
                os.write(int(theirs), b".")


def measure(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    turn: int = 4,
    warm_up: int = 3,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = perf_counter,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each function in each round, by the given clock.

    Every round gives each function one turn of ``turn`` calls, in an order that alternates from round to round.
    ``before`` a function's turn something may be done that is not measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    prepare = {name: (before or {}).get(name, lambda: None) for name in functions}
    for name, function in functions.items():
        for _ in range(warm_up):
            prepare[name]()
            function()
    for number in range(rounds):
        for name in functions if number % 2 == 0 else reversed(list(functions)):
            prepare[name]()
            synchronize(device)
            with one_turn(name):
                start = clock()
                for _ in range(turn):
                    functions[name]()
                synchronize(device)
                seconds[name].append((clock() - start) / turn)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], name: str, unit: str) -> tuple[float, float, float]:
    """Quartiles (median in the middle) of the ratio of ``name`` to ``unit``, each taken within one round."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[unit], strict=True)]
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    return low, middle, high


def machine(device: torch.device | str = "cpu") -> str:
    """What ran: the GPU's name, or the number of CPU cores, their name and their vector units."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0))
    return f"{cores} core{'s' if cores > 1 else ''} {_processor()} {torch.backends.cpu.get_cpu_capability()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_csv(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows; without a path, do nothing."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def update_csv(path: Path | None, rows: Sequence[Mapping[str, Any]], *keys: str) -> None:
    """Write the rows in the place of those that a file has with the same ``keys``; its others stay, before them.

    Raises:
        ValueError: if the file has other columns.
    """
    if path is None:
        return
    former = read_rows(path)
    if former and list(former[0]) != list(rows[0]):
        raise ValueError(f"{path} has the columns {', '.join(former[0])}, not {', '.join(rows[0])}: write elsewhere")
    new = {tuple(str(row[key]) for key in keys) for row in rows}
    write_csv(path, [*(row for row in former if tuple(row[key] for key in keys) not in new), *rows])
