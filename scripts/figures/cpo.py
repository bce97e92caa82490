r"""Draw what constrained policies return and cost, and write the table of docs/cpo.md.

    python scripts/benchmarks/returns.py --suite safe --algos cpo --seeds 0-4 --csv docs/results/cpo.csv
    python scripts/figures/cpo.py --csv docs/results/cpo.csv --out docs/results --table docs/cpo.md

``cpo.png`` has the evaluations of every run: the return above, and below it the cost of an episode, with the limit. In
the table stand the final policies beside those of TRPO on the same robot without a limit, from returns.csv.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from returns import (
    ROOT,
    TASKS,
    TUNING,
    Row,
    markdown,
    number,
    options_of,
    read_points,
    read_runs,
    returns,
    seeds,
    told,
    write_tables,
)
from style import BLUE, GREY, VERMILION, WIDTH, save

from agents.config import resolve
from npg.runs.presets import read_yaml

#: The tasks, each with the one that has no limit.
FREE: dict[str, str] = {task: entry["free"] for task, entry in read_yaml(TASKS)["safe"].items()}


def of(task: str, rows: Sequence[Row]) -> list[Row]:
    """The preset's rows of a task with the preset's steps, by seed and step."""
    run = (task, "cpo", "preset", str(resolve("cpo", task).timesteps))
    mine = [row for row in rows if (row["task"], row["algo"], row["config"], row["timesteps"]) == run]
    return sorted(mine, key=lambda row: (int(row["seed"]), int(row.get("step", 0))))


def limit(task: str) -> float:
    return float(resolve("cpo", task).hyperparameters["cost_limit"])


def draw(points: list[Row], path: Path) -> None:
    """Two panels for each task: return, and cost with its limit; a line for each seed."""
    drawn = [task for task in FREE if of(task, points)]
    if not drawn:
        raise ValueError("there is no evaluation of a run of CPO's presets: scripts/benchmarks/returns.py writes them")
    columns = min(3, len(drawn))
    lines = -(-len(drawn) // columns)
    figure, axes = plt.subplots(
        2 * lines, columns, figsize=(WIDTH, 4.2 * lines), squeeze=False, height_ratios=[3, 2] * lines
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for i, task in enumerate(drawn):
        pair: list[Any] = [axes[2 * (i // columns) + row, i % columns] for row in (0, 1)]
        mine = of(task, points)
        for seed in dict.fromkeys(row["seed"] for row in mine):
            run = [row for row in mine if row["seed"] == seed]
            steps = [int(row["step"]) for row in run]
            for axis, name, colour in zip(pair, ("return", "cost"), (BLUE, VERMILION)):
                axis.plot(steps, [float(row[name]) for row in run], color=colour, lw=1.2, alpha=0.8)
        pair[1].axhline(limit(task), color=GREY, lw=1, ls=":")
        pair[1].annotate(
            f"limit {limit(task):g}",
            (1, limit(task)),
            (-2, 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8,
            color=GREY,
            zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )
        pair[1].set_ylim(bottom=0)
        pair[0].set_title(task.removeprefix("npg/"), fontsize=11)
        for axis, label in zip(pair, ("return", "cost")):
            axis.set_visible(True)
            axis.set_xlim(left=0)
            axis.ticklabel_format(axis="x", scilimits=(-3, 4))
            axis.tick_params(labelsize=9)
            if i % columns == 0:
                axis.set_ylabel(label, fontsize=11)
    figure.supxlabel("environment steps", fontsize=11)
    save(figure, path)


def table(rows: list[Row], free: list[Row]) -> str:
    """Return and cost of the final policies, means over the seeds, beside what TRPO returns without a limit."""
    head = ("task", "limit", "cost", "highest of a seed", "return", "lowest", "seeds", "TRPO's return without a limit")
    lines = []
    for task in FREE:
        if mine := of(task, rows):
            costs = np.array([float(row["cost_mean"]) for row in mine])
            gained = returns(mine)
            best = returns(free, task=FREE[task], algo="trpo", config="preset", timesteps=mine[0]["timesteps"])
            cells = (f"{limit(task):g}", f"{costs.mean():.1f}", f"{costs.max():.1f}", number(gained.mean()))
            beside = f"{number(best.mean())} ({seeds(best)})" if len(best) else "–"
            lines.append((f"`{task}`", *cells, number(gained.min()), str(len(mine)), beside))
    return markdown(head, lines)


@told
def main(arguments: Sequence[str] | None = None) -> int:
    parser, free_csv = options_of(__doc__, "cpo.csv"), ROOT / "docs" / "results" / "returns.csv"
    parser.add_argument("--free", type=Path, default=free_csv, metavar="FILE", help="TRPO's returns")
    options = parser.parse_args(arguments)
    rows = [row for row in read_runs(options.csv, "return_mean", "cost_mean") if int(row["seed"]) < TUNING]
    free = [row for row in read_runs(options.free, "return_mean") if int(row["seed"]) < TUNING]
    if options.table:
        write_tables(options.table, {"cpo": lambda: table(rows, free)})
        print(options.table)
    if options.out:
        kept = {(row["task"], row["seed"], row["commit"]) for row in rows}
        every = read_points(options.csv, "cost")
        points = [point for point in every if (point["task"], point["seed"], point["commit"]) in kept]
        draw(points, options.out / "cpo.png")
        print(options.out / "cpo.png")
    if not (options.out or options.table):
        print(table(rows, free))
    return 0


if __name__ == "__main__":
    sys.exit(main())
