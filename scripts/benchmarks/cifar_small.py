"""Epochs and seconds to 60, 70 and 75 % validation accuracy on CIFAR-10, for every optimizer, on one CPU core.

    python scripts/benchmarks/cifar_small.py tune --data PATH
    python scripts/benchmarks/cifar_small.py table --data PATH

Both phases train with scripts/train_cifar.py, one process and one thread at a time, and go on where they were stopped.
`tune` tries four learning rates for each optimizer for three epochs: three around a centre, and a fourth beside the
best of them. `table` trains with the preset `small`, which holds the best of each, on three other seeds; the
optimizers take turns, so that whatever else slows the machine down slows all of them. soap and shampoo need the extra
`rivals`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import inf, isfinite, isnan, nan, sqrt
from pathlib import Path
from statistics import median
from typing import Any

from interleaved import update_csv

from npg.runs.files import read_rows
from npg.runs.presets import read_yaml
from npg.vision.optimizers import OPTIMIZERS

MODEL = "wrn-10-1-s2"
SEEDS = (0, 1, 2)
THRESHOLDS = (60, 70, 75)

TUNING_SEED = 100
TUNING_EPOCHS = 3
#: Learning rates to tune around, and the factor between them.
CENTRES = {
    "sgd": 0.6,
    "adam": 3e-3,
    "adamw": 3e-3,
    "amsgrad": 3e-3,
    "rmsprop": 3e-3,
    "adagrad": 0.03,
    "muon": 0.3,
    "soap": 0.03,
    "shampoo": 0.3,
    "online-ngd": 0.6,
    "kl-shampoo": 0.03,
    "diagonal-ngd": 0.05,
    "kfac": 0.02,
    "ngd": 0.3,
}
FACTOR = 3.0

ROOT = Path(__file__).resolve().parents[2]
#: One thread. glibc would give the activations back to the system at each step and fault them in again at the next.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


def train(run_dir: Path, optimizer: str, arguments: Iterable[str]) -> None:
    """One run of train_cifar.py, unless it is finished; what a stopped one left is done again.

    Raises:
        RuntimeError: the run was refused. One whose loss is not finite is finished, and has no summary.
    """
    if (run_dir / "summary.json").exists() or (run_dir / "diverged.txt").exists():
        return
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [sys.executable, str(ROOT / "scripts" / "train_cifar.py"), MODEL, optimizer, "--preset", "small"]
    command += ["--keep-checkpoints", "1", "--run-dir", str(run_dir), *arguments]
    print(" ".join(command[1:]), flush=True)
    result = subprocess.run(command, env=os.environ | ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    if result.returncode == 1 and "not finite" in result.stderr:
        (run_dir / "diverged.txt").write_text(result.stderr.splitlines()[-1] + "\n", encoding="utf-8")
    elif result.returncode:
        raise RuntimeError(f"{run_dir} ended with status {result.returncode}: {result.stderr[-2000:]}")


def summary(run_dir: Path) -> dict[str, Any]:
    """What a run left as its summary; an accuracy of NaN if it diverged."""
    if (run_dir / "diverged.txt").exists():
        return {"best_top1": nan, "train_seconds": nan}
    values: dict[str, Any] = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    return values


# --- learning rates


def next_rate(accuracies: Mapping[float, float], factor: float = FACTOR) -> float:
    """The learning rate to try after those that were: beside the best one, on the side of the better neighbour.

    Between the two if the best has a neighbour on either side, a factor further if it is the first or the last. A run
    that diverged (NaN) is below all others.
    """
    rates = sorted(accuracies)
    scores = [accuracies[rate] if isfinite(accuracies[rate]) else -inf for rate in rates]
    best = scores.index(max(scores))
    if best == 0:
        return rates[0] / factor
    if best == len(rates) - 1:
        return rates[-1] * factor
    neighbour = best - 1 if scores[best - 1] > scores[best + 1] else best + 1
    return sqrt(rates[best] * rates[neighbour])


def tune(options: argparse.Namespace) -> None:
    """Try four learning rates for each optimizer, and write them to a CSV file, where others stay."""
    rows = []
    for optimizer in options.optimizers:
        centre = CENTRES[optimizer]
        accuracies: dict[float, float] = {}
        for trial in range(4):
            rate = float(
                f"{(centre / FACTOR, centre, centre * FACTOR)[trial] if trial < 3 else next_rate(accuracies):.3g}"
            )
            run_dir = options.runs / "tuning" / f"{optimizer}_lr{rate:g}"
            steps_alike = (
                12 / TUNING_EPOCHS
            )  # the warm-up is a fraction of the run, and is to be as long as in the table
            arguments = ["--lr", f"{rate:g}", "--epochs", str(TUNING_EPOCHS), "--seed", str(TUNING_SEED)]
            train(run_dir, optimizer, [*data_argument(options), *arguments, "--warmup", f"{0.02 * steps_alike:g}"])
            result = summary(run_dir)
            accuracies[rate] = result["best_top1"]
            rows.append(
                {
                    "optimizer": optimizer,
                    "trial": trial + 1,
                    "lr": rate,
                    "seed": TUNING_SEED,
                    "epochs": TUNING_EPOCHS,
                    "best_validation_top1": round(result["best_top1"], 2),
                    "train_seconds": round(result["train_seconds"], 1),
                    "chosen": "",
                }
            )
        best = max(accuracies, key=lambda rate: accuracies[rate] if isfinite(accuracies[rate]) else -inf)
        next(row for row in rows if row["optimizer"] == optimizer and row["lr"] == best)["chosen"] = "yes"
        print(f"{optimizer:<14}" + "  ".join(f"{r:g}: {a:.2f}" for r, a in sorted(accuracies.items())), flush=True)
        update_csv(options.results / "cifar_small_tuning.csv", rows, "optimizer")


# --- the table


def table(options: argparse.Namespace) -> None:
    """Train every optimizer on every seed; write the runs to a CSV file, and print the medians."""
    for seed in SEEDS:
        for optimizer in options.optimizers:
            run_dir = options.runs / "table" / f"{optimizer}_seed{seed}"
            train(run_dir, optimizer, [*data_argument(options), "--seed", str(seed)])
    rows = [row(options.runs / "table" / f"{o}_seed{s}", o, s) for o in options.optimizers for s in SEEDS]
    update_csv(options.results / "cifar_small.csv", rows, "optimizer")
    print_table(rows)


def crossing(positions: Sequence[float], accuracies: Sequence[float], threshold: float) -> float | None:
    """Where a curve first passes a threshold, linearly between its points; it begins at chance, 10 %, at 0."""
    points = list(zip([0.0, *positions], [10.0, *accuracies]))
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 > threshold:
            return x0 + (x1 - x0) * (threshold - y0) / (y1 - y0)
    return None


def row(run_dir: Path, optimizer: str, seed: int) -> dict[str, Any]:
    """A line of the CSV file: empty where an accuracy was not reached."""
    result, curve = summary(run_dir), read_rows(run_dir / "metrics.csv")
    config = read_yaml(run_dir / "config.yaml")
    epochs, seconds, accuracies = (
        [float(point[name]) for point in curve] for name in ("epoch", "seconds", "validation_top1")
    )
    reached = {
        f"{name}_to_{threshold}": crossing(x, accuracies, threshold)
        for name, x in (("epochs", epochs), ("seconds", seconds))
        for threshold in THRESHOLDS
    }
    return {
        "optimizer": optimizer,
        "seed": seed,
        "lr": config["optimizer_options"]["lr"],
        **{name: "" if x is None else round(x, 2) for name, x in reached.items()},
        "best_validation_top1": round(result["best_top1"], 2),
        "epochs_run": len(curve),
        "seconds_per_epoch": round(result["train_seconds"] / len(curve), 2) if curve else "",
        "memory_peak_mb": round(max(float(point["memory_peak_bytes"]) for point in curve) / 1e6) if curve else "",
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Medians over the seeds; a dash for an accuracy that most of them did not reach."""
    print(f"{'':<13}{'':>9}{'epochs to':>15}{'seconds to':>17}")
    print(f"{'optimizer':<13}{'lr':>9}" + f"{'60':>5}{'70':>5}{'75':>5}" + f"{'60':>6}{'70':>6}{'75':>6}", end="")
    print(f"{'s/epoch':>9}{'MB':>6}{'best %':>8}")
    for optimizer in dict.fromkeys(row["optimizer"] for row in rows):
        own = [row for row in rows if row["optimizer"] == optimizer]
        print(
            f"{optimizer:<13}{own[0]['lr']:>9.3g}"
            + "".join(_cell(own, f"epochs_to_{t}", 5, 1) for t in THRESHOLDS)
            + "".join(_cell(own, f"seconds_to_{t}", 6) for t in THRESHOLDS)
            + _cell(own, "seconds_per_epoch", 9, 1)
            + _cell(own, "memory_peak_mb", 6)
            + _cell(own, "best_validation_top1", 8, 2)
        )


def _cell(rows: list[dict[str, Any]], column: str, width: int, digits: int = 0) -> str:
    """The median; what a run does not have is worse than all numbers, and NaN is no number."""
    numbers = [float(row[column] or "nan") for row in rows]
    worst = -inf if column.startswith("best") else inf
    middle = median(worst if isnan(number) else number for number in numbers)
    return f"{'–':>{width}}" if middle == worst else f"{middle:>{width}.{digits}f}"


def data_argument(options: argparse.Namespace) -> list[str]:
    return [] if options.data is None else ["--data", str(options.data)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("tune", "table"))
    parser.add_argument("--data", type=Path, metavar="PATH", help="as for train_cifar.py [CIFAR-10, downloaded]")
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(CENTRES), metavar="NAME")
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar_small"), metavar="DIR", help="[%(default)s]")
    parser.add_argument(
        "--results", type=Path, default=Path("docs/results"), metavar="DIR", help="of the CSV files [%(default)s]"
    )
    options = parser.parse_args(arguments)
    try:
        (tune if options.phase == "tune" else table)(options)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
