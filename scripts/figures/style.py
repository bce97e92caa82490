"""How this project's pictures look: colour-blind safe, legible at half width, with a CSV beside each.

Figures are 8 inches wide at 110 dots per inch and set in 13 points: shown at half of a page's width they still read.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe & Ito (2008), Color universal design
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#777777"
CYCLE = [BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK]

WIDTH, DPI = 8.0, 110

plt.rcParams.update(
    {
        "font.size": 13,
        "axes.titlesize": 13,
        "axes.labelsize": 13,
        "legend.fontsize": 11.5,
        "legend.frameon": False,
        "xtick.labelsize": 12,
        "ytick.labelsize": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": plt.cycler(color=CYCLE),
        "lines.linewidth": 2.2,
        "lines.markersize": 6,
        "figure.constrained_layout.use": True,
        "axes.formatter.use_mathtext": True,
    }
)


def panels(columns: int = 2, height: float = 3.9, **options: Any) -> tuple[Figure, Any]:
    """A figure of the common width with its axes side by side."""
    return plt.subplots(1, columns, figsize=(WIDTH, height), **options)


def save(figure: Figure, path: Path) -> None:
    """Write the picture as PNG, the same bytes for the same picture, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows with one set of columns, numbers to nine digits."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()})


def update_csv(path: Path, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    """Write rows in the place of those that a file has with the same ``key``, after its others."""
    new, kept = {row[key] for row in rows}, []
    if path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row[key] not in new]
    write_csv(path, [*kept, *rows])


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent k of y ∝ xᵏ, by least squares in logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def guide(axes: Axes, x: Sequence[float], y: Sequence[float], exponent: float, label: str) -> None:
    """A faint line of the given exponent through the last point, with its label at the first."""
    xs = np.array([min(x), max(x)])
    at = int(np.argmax(x))
    ys = y[at] * (xs / x[at]) ** exponent
    axes.plot(xs, ys, color=GREY, lw=1, ls="--", zorder=0, label=label)
