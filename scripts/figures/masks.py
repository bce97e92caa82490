r"""Draw the learning curves with action masks, and write the table of docs/masks.md.

    python scripts/benchmarks/masks.py --seeds 0-2 --timesteps 100000 --csv docs/results/masks.csv
    python scripts/figures/masks.py --csv docs/results/masks.csv --out docs/results --table docs/masks.md

In the table stand the environment steps after which the mean return of the last 100 episodes first was a level, seed by
seed, and that mean at the end.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from returns import markdown, number, options_of, read, told, write_tables
from style import BLUE, VERMILION, panels, save

#: The levels of a task, half of the way and near what either has at the end.
LEVELS = {"arms": (5.0, 9.0), "connect-four": (0.5, 0.8)}
ALGORITHMS = {"trpo": ("TRPO", BLUE), "contrib-maskable-ppo": ("MaskablePPO", VERMILION)}

Curve: TypeAlias = list[tuple[int, float]]


def curves(path: Path) -> dict[tuple[str, str], dict[str, Curve]]:
    """(task, algorithm) → seed → (steps, return)."""
    found: dict[tuple[str, str], dict[str, Curve]] = defaultdict(lambda: defaultdict(list))
    for row in read(path, "scripts/benchmarks/masks.py", "task", "algo", "seed", "steps", "return_mean"):
        found[row["task"], row["algo"]][row["seed"]].append((int(row["steps"]), float(row["return_mean"])))
    return found


def reached(curve: Curve, level: float) -> str:
    """The first steps at which a curve has a level; a dash if it never has."""
    return next((f"{steps:,}" for steps, value in curve if value >= level), "–")


def table(found: dict[tuple[str, str], dict[str, Curve]]) -> str:
    """Steps to each level, and the return at the end, of each seed."""
    head = ("task", "return of", *(name for name, _ in ALGORITHMS.values()))
    lines = []
    for task, levels in LEVELS.items():
        runs = [found[task, algo].values() for algo in ALGORITHMS]
        for level in levels:
            after = [", ".join(reached(curve, level) for curve in seeds) for seeds in runs]
            lines.append((task, f"{number(level)}, after steps", *after))
        steps = max(curve[-1][0] for seeds in runs for curve in seeds)
        last = [", ".join(number(curve[-1][1]) for curve in seeds) for seeds in runs]
        lines.append((task, f"the end, {steps:,} steps", *last))
    return markdown(head, lines)


def draw(found: dict[tuple[str, str], dict[str, Curve]], path: Path) -> None:
    """A panel for each task, a line for each seed."""
    figure, axes = panels(len(LEVELS))
    for axis, task in zip(axes, LEVELS):
        for algo, (name, colour) in ALGORITHMS.items():
            for i, curve in enumerate(found[task, algo].values()):
                steps, values = zip(*curve)
                axis.plot(steps, values, color=colour, lw=1.3, alpha=0.85, label=None if i else name)
        axis.set_title(task)
        axis.set_xlim(left=0)
        axis.ticklabel_format(axis="x", scilimits=(-3, 4))
    axes[0].set_ylabel("return of 100 episodes")
    axes[-1].legend(loc="lower right")
    figure.supxlabel("environment steps")
    save(figure, path)


@told
def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(__doc__, "masks.csv").parse_args(arguments)
    found = curves(options.csv)
    if missing := [pair for pair in ((t, a) for t in LEVELS for a in ALGORITHMS) if not found[pair]]:
        of = " and ".join(missing[0])
        raise ValueError(f"{options.csv} has no row of {of}: scripts/benchmarks/masks.py writes it")
    if options.table:
        write_tables(options.table, {"masks": lambda: table(found)})
        print(options.table)
    if options.out:
        draw(found, options.out / "masks.png")
        print(options.out / "masks.png")
    if not (options.out or options.table):
        print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
