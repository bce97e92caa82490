"""Draw accuracy over epochs and over seconds, as in the report's figures 2 and 3.

One row of panels per model: runs faint, and bold the moving average of their
median for each optimizer, as far as all of its runs go. A source is a run
folder of train_cifar.py, or a CSV file of curves with the columns
run,tag,step,wall_time,value, such as the report's own, whose runs are named
MODEL-OPTIMIZER/… With --beside, such a file's curves are thin lines in the
panels of the same kind of network, on a scale of seconds of their own.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import matplotlib.pyplot as plt
from returns import markdown, told, write_tables
from style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, WIDTH, save

from npg.runs.files import read_rows
from npg.runs.presets import read_yaml

#: Colours tell the optimizers apart, and line styles where the colours have run out.
STYLES = {
    "ngd": (VERMILION, "-"),
    "online-ngd": (BLUE, "-"),
    "diagonal-ngd": (GREEN, "-"),
    "kfac": (VERMILION, "--"),
    "kl-shampoo": (GREEN, "--"),
    "sgd": (BLACK, "-"),
    "adam": (ORANGE, "-"),
    "adamw": (ORANGE, "--"),
    "amsgrad": (SKY, "-"),
    "rmsprop": (PURPLE, "-"),
    "adagrad": (SKY, "--"),
    "muon": (PURPLE, "--"),
    "soap": (BLUE, "--"),
    "shampoo": (BLUE, ":"),
}

#: Accuracies whose first epoch the table names.
LEVELS = (60, 70, 75, 80, 85, 90)


@dataclass(frozen=True)
class Curve:
    """One run's accuracy, in percent, after each epoch and so many seconds of it."""

    model: str
    optimizer: str
    measured_on: str
    epochs: list[float]
    seconds: list[float]
    accuracy: list[float]

    @property
    def family(self) -> str:
        """The kind of network: densenet of densenet-19, wrn of wrn-16-1."""
        return self.model.split("-")[0]


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
        named = run.split("/")[0]
        known = [f"-{name}" for name in STYLES if named.endswith(f"-{name}")]
        optimizer = max(known, key=len, default=f"-{named.rpartition('-')[2]}")[1:]
        model = named.removesuffix(f"-{optimizer}")
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


def draw(curves: list[Curve], out: Path, dataset: str | None, weight: float, beside: Sequence[Curve] = ()) -> None:
    """One row per model: accuracy over epochs, and beside it over seconds; those ``beside`` are thin."""
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
        others = [curve for curve in beside if curve.family == model.split("-")[0]]
        above = right.twiny() if others else right
        for curve in others:
            colour, line = STYLES.get(curve.optimizer, (GREY, ":"))
            for axis, x in ((left, "epochs"), (above, "seconds")):
                smoothed = smooth(curve.accuracy, weight)
                (thin,) = axis.plot(getattr(curve, x), smoothed, color=colour, linestyle=line, linewidth=0.8, alpha=0.8)
            drawn.setdefault(curve.optimizer, thin)
        if others:
            above.set_xlim(left=0)
            above.set_xlabel("time of the thin lines (s)")
            above.spines["top"].set_visible(True)
        measured = " and ".join(sorted({curve.measured_on for curve in of_model}))
        left.set_ylabel(f"{measured} accuracy (%)")
        left.set_title(("\n" if others else ", ").join(filter(None, (model, dataset))), loc="left")
        for axis, label in ((left, "epoch"), (right, "time (s)")):
            axis.set_xlabel(label)
            axis.set_xlim(left=0)
            axis.grid(alpha=0.3)
    order = [name for name in STYLES if name in drawn] + sorted(set(drawn) - set(STYLES))
    figure.legend([drawn[name] for name in order], order, loc="outside lower center", ncols=5)
    save(figure, out)


def seconds_an_epoch(curve: Curve) -> float:
    """The median over epochs, which a pause of the process does not move."""
    return median(b - a for a, b in zip([0.0, *curve.seconds], curve.seconds))


def table(curves: list[Curve], beside: Sequence[Curve] = ()) -> str:
    """One line per network and optimizer, means over runs; beside the report's of the same kind of network."""
    head = ["network", "optimizer", "runs", "best, %", "last, %", "mean of the last five, %"]
    head += [f"first epoch above {', '.join(map(str, LEVELS))} %", "seconds per epoch"]
    if beside:
        head.append("the report's: best, mean of the last five, %")
    lines = []
    for model, optimizer in sorted({(curve.model, curve.optimizer) for curve in curves}):
        runs = [curve for curve in curves if (curve.model, curve.optimizer) == (model, optimizer)]
        values = [(max(c.accuracy), c.accuracy[-1], mean(c.accuracy[-5:])) for c in runs]
        typical = middle(runs)
        first = [next((e for e, a in zip(typical.epochs, typical.accuracy) if a > level), None) for level in LEVELS]
        cells = [model, optimizer, str(len(runs)), *(f"{mean(column):.2f}" for column in zip(*values))]
        cells += [", ".join("–" if e is None else f"{e:.0f}" for e in first)]
        cells += [f"{median(map(seconds_an_epoch, runs)):.0f}"]
        if beside:
            same = [c for c in beside if (c.family, c.optimizer) == (runs[0].family, optimizer)]
            cells.append("; ".join(f"{max(c.accuracy):.2f}, {mean(c.accuracy[-5:]):.2f}" for c in same) or "–")
        lines.append(cells)
    return markdown(head, lines)


@told
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", metavar="RUN", type=Path, nargs="+", help="a run folder, or a CSV of curves")
    parser.add_argument("--out", type=Path, default=Path("cifar_curves.png"), metavar="FILE", help="[%(default)s]")
    parser.add_argument("--beside", type=Path, metavar="CSV", help="curves of others, drawn as thin lines [none]")
    parser.add_argument("--table", type=Path, metavar="PAGE", help="a page whose table 'curves' is written anew [none]")
    parser.add_argument("--dataset", metavar="NAME", help="for the titles, such as CIFAR-10 [none]")
    parser.add_argument(
        "--smoothing", type=float, default=0.6, metavar="W", help="weight of the past in the average [%(default)s]"
    )
    options = parser.parse_args(arguments)
    if not 0.0 <= options.smoothing < 1.0:
        raise ValueError(f"--smoothing must be in [0, 1); got {options.smoothing}")
    if options.out.suffix != ".png":
        raise ValueError(f"--out must be the name of a picture that ends with .png, got {options.out}")
    curves = [curve for source in options.sources for curve in read(source)]
    beside = read(options.beside) if options.beside else []
    measured: dict[tuple[str, str], str] = {}
    for curve in curves:
        if measured.setdefault((curve.model, curve.optimizer), curve.measured_on) != curve.measured_on:
            raise ValueError(
                f"runs of {curve.model} with {curve.optimizer} were measured on test and on validation images, which "
                "have no mean: give those of one kind"
            )
    draw(curves, options.out, options.dataset, options.smoothing, beside)
    print(options.out)
    if options.table:
        write_tables(options.table, {"curves": lambda: table(curves, beside)})
        print(options.table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
