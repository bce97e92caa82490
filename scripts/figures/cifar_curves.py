"""Draw accuracy over epochs and over seconds, as in the report's figures 2 and 3.

One row of panels per model: runs faint, and bold the moving average of their
median for each optimizer, as far as all of its runs go. A source is a run
folder of train_cifar.py, or a CSV file of curves with the columns
run,tag,step,wall_time,value, such as the report's own, whose runs are named
MODEL-OPTIMIZER/…
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
from style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, WIDTH, save

from npg.runs.files import read_rows
from npg.runs.presets import read_yaml

#: Colours tell the optimizers apart, and line styles where the colours have run out.
STYLES = {
    "ngd": (VERMILION, "-"),
    "online-ngd": (BLUE, "-"),
    "diagonal-ngd": (GREEN, "-"),
    "kfac": (VERMILION, "--"),
    "sgd": (BLACK, "-"),
    "adam": (ORANGE, "-"),
    "adamw": (ORANGE, "--"),
    "amsgrad": (SKY, "-"),
    "rmsprop": (PURPLE, "-"),
    "adagrad": (SKY, "--"),
}


@dataclass(frozen=True)
class Curve:
    """One run's accuracy, in percent, after each epoch and so many seconds of it."""

    model: str
    optimizer: str
    measured_on: str
    epochs: list[float]
    seconds: list[float]
    accuracy: list[float]


def read_run(folder: Path) -> list[Curve]:
    """The curve of a run folder; its seconds are of training alone."""
    config, rows = read_yaml(folder / "config.yaml"), read_rows(folder / "metrics.csv")
    if not rows:
        raise ValueError("metrics.csv has no row")
    epochs, seconds, accuracy = (
        [float(row[name]) for row in rows] for name in ("epoch", "seconds", f"{config['eval_on']}_top1")
    )
    return [Curve(config["model"], config["optimizer"], config["eval_on"], epochs, seconds, accuracy)]


def read_curves(path: Path) -> list[Curve]:
    """The finished runs of a CSV of TensorBoard's scalars; seconds count from the first value of a run."""
    points: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    begun: dict[str, float] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            run, time = row["run"], float(row["wall_time"])
            begun[run] = min(time, begun.get(run, time))
            if row["tag"] == "valid_prec":
                points[run].append((float(row["step"]) + 1, time, float(row["value"])))
    curves = []
    for run, values in points.items():
        model, _, optimizer = run.split("/")[0].rpartition("-")
        epochs, times, accuracy = (list(column) for column in zip(*sorted(values)))
        curves.append(Curve(model, optimizer, "test", epochs, [t - begun[run] for t in times], accuracy))
    return curves


def read(source: Path) -> list[Curve]:
    """The curves of a run folder or a CSV file.

    Raises:
        ValueError: the source is neither.
    """
    try:
        curves = read_run(source) if source.is_dir() else read_curves(source)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{source} is neither a run folder of train_cifar.py with a finished epoch nor a CSV of curves: {error}"
        ) from error
    if not curves or not all(curve.epochs for curve in curves):
        raise ValueError(f"{source} holds no curve yet")
    return curves


def smooth(values: list[float], weight: float) -> list[float]:
    """The moving average Σ wᵏ x_{t−k} / Σ wᵏ over the past."""
    total = norm = 0.0
    smoothed = []
    for value in values:
        total, norm = weight * total + value, weight * norm + 1.0
        smoothed.append(total / norm)
    return smoothed


def middle(curves: list[Curve]) -> Curve:
    """The median over runs of one model and optimizer after each epoch that all of them reached."""
    epochs, seconds, accuracy = (
        [median(values) for values in zip(*(getattr(curve, name) for curve in curves))]
        for name in ("epochs", "seconds", "accuracy")
    )
    return Curve(curves[0].model, curves[0].optimizer, curves[0].measured_on, epochs, seconds, accuracy)


def draw(curves: list[Curve], out: Path, dataset: str | None, weight: float) -> None:
    """One row per model: accuracy over epochs, and beside it over seconds."""
    models = sorted({curve.model for curve in curves})
    size = (WIDTH, 0.6 + 3.4 * len(models))
    figure, axes = plt.subplots(len(models), 2, figsize=size, squeeze=False, sharey="row")
    drawn = {}
    for (left, right), model in zip(axes, models):
        of_model = [curve for curve in curves if curve.model == model]
        for optimizer in dict.fromkeys(curve.optimizer for curve in of_model):
            runs = [curve for curve in of_model if curve.optimizer == optimizer]
            typical = middle(runs)
            colour, line = STYLES.get(optimizer, (GREY, ":"))
            for axis, x in ((left, "epochs"), (right, "seconds")):
                for curve in runs:
                    axis.plot(getattr(curve, x), curve.accuracy, color=colour, linestyle=line, alpha=0.25, linewidth=1)
                smoothed = smooth(typical.accuracy, weight)
                (drawn[optimizer],) = axis.plot(getattr(typical, x), smoothed, color=colour, linestyle=line)
        measured = " and ".join(sorted({curve.measured_on for curve in of_model}))
        left.set_ylabel(f"{measured} accuracy (%)")
        left.set_title(", ".join(filter(None, (model, dataset))), loc="left")
        for axis, label in ((left, "epoch"), (right, "time (s)")):
            axis.set_xlabel(label)
            axis.set_xlim(left=0)
            axis.grid(alpha=0.3)
    order = [name for name in STYLES if name in drawn] + sorted(set(drawn) - set(STYLES))
    figure.legend([drawn[name] for name in order], order, loc="outside lower center", ncols=5)
    save(figure, out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", metavar="RUN", type=Path, nargs="+", help="a run folder, or a CSV of curves")
    parser.add_argument("--out", type=Path, default=Path("cifar_curves.png"), metavar="FILE", help="[%(default)s]")
    parser.add_argument("--dataset", metavar="NAME", help="for the titles, such as CIFAR-10 [none]")
    parser.add_argument(
        "--smoothing", type=float, default=0.6, metavar="W", help="weight of the past in the average [%(default)s]"
    )
    options = parser.parse_args(arguments)
    try:
        if not 0.0 <= options.smoothing < 1.0:
            raise ValueError(f"--smoothing must be in [0, 1); got {options.smoothing}")
        curves = [curve for source in options.sources for curve in read(source)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    draw(curves, options.out, options.dataset, options.smoothing)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
