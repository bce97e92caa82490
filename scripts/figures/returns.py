r"""Draw the returns of scripts/benchmarks/returns.py, and write the tables of docs/benchmarks.md.

    python scripts/figures/returns.py --csv docs/results/returns.csv --out docs/results
    python scripts/figures/returns.py --csv docs/results/returns.csv --table docs/benchmarks.md

Pictures: ``returns_steps.png`` and ``returns_seconds.png``, evaluations over environment steps and over processor
seconds of training, interquartile mean of the seeds with its 95 % bootstrap interval; ``returns_bars.png``, the final
policies beside what shall be reached and what is published; ``returns_profiles.png``, the fraction of all runs whose
final return is at least so much, where 0 is a random policy's and 1 is what shall be reached; ``returns_peers.png``,
every single run of the tasks that another implementation has too. A run that has ended keeps its return until the
slowest of its seeds has; over seconds there is no run whose seconds are not known.

Of runs with the same configuration, algorithm, task, seed and number of steps the last row counts. The pictures and
the first two tables have the preset's runs of the seeds below 100, with as many steps as returns.yaml or the preset
say; the third those with more steps; the last compares configurations on the seeds that they have in common.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from style import BLACK, BLUE, GREEN, GREY, PURPLE, VERMILION, WIDTH, save

from agents.config import ALGORITHMS, resolve
from agents.statistics import bootstrap_interval, common_steps, interquartile_mean, performance_profile
from npg.runs.files import read_rows, replacing
from npg.runs.presets import read_yaml

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "scripts" / "benchmarks" / "returns.yaml"
#: What the algorithms are called in pictures and tables, and their colours.
NAMES = {
    "trpo": ("TRPO", BLUE),
    "npg": ("NPG", VERMILION),
    "mdpo": ("MDPO", PURPLE),
    "sb3-ppo": ("PPO (SB3)", GREEN),
    "contrib-trpo": ("TRPO (sb3-contrib)", GREY),
}
TUNING = 100  # seeds from here on chose settings, and are not reported
PEERS = ("contrib-trpo", "trpo")  # the same algorithm, of sb3-contrib and here
Row = dict[str, str]


def told(main: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """A command that says what is wrong with its files in one line, and ends with the status 2."""

    @wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        try:
            return main(arguments)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return run


def read(path: Path, writer: str, *columns: str) -> list[Row]:
    """The rows of a table that the script ``writer`` writes.

    Raises:
        ValueError: if there are none, or if they lack one of the ``columns``.
    """
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path} has no row: {writer} writes it")
    if lacking := [name for name in columns if name not in rows[0]]:
        raise ValueError(f"{path} has no column {', '.join(lacking)}: give a table that {writer} writes")
    return rows


def read_runs(path: Path, *columns: str) -> list[Row]:
    """The last row of each run in a table of scripts/benchmarks/returns.py, which has these columns too."""
    names = ("config", "algo", "task", "seed", "timesteps", "commit")
    return newest(read(path, "scripts/benchmarks/returns.py", *names, *columns))


def read_points(path: Path, *columns: str) -> list[Row]:
    """The evaluations on the way, in the file of curves beside the table of runs at ``path``."""
    names = ("config", "algo", "task", "seed", "timesteps", "commit", "step", "return")
    curves = path.with_name(f"{path.stem}_curves.csv")
    return newest(read(curves, "scripts/benchmarks/returns.py", *names, *columns), "commit", "step")


def tasks() -> dict[str, dict[str, Any]]:
    """The tasks of all suites in their order, with what shall be reached."""
    content = read_yaml(TASKS)
    return {task: entry for suite in ("mujoco", "classic") for task, entry in content[suite].items()}


def steps_of(task: str) -> int:
    """With how many steps a task is reported."""
    return int(tasks()[task].get("timesteps") or resolve("trpo", task).timesteps)


def newest(rows: Iterable[Row], *more: str) -> list[Row]:
    """The last row of each run; `more` names what else tells rows apart."""
    names = ("config", "algo", "task", "seed", "timesteps", *more)
    return list({tuple(row[name] for name in names): row for row in rows}.values())


def reported(rows: Iterable[Row]) -> list[Row]:
    """The preset's runs of the seeds that tuned nothing, of the tasks here, with the steps of the report."""
    steps = {task: steps_of(task) for task in tasks()}
    return [
        row
        for row in rows
        if row["config"] == "preset" and int(row["seed"]) < TUNING and int(row["timesteps"]) == steps.get(row["task"])
    ]


def returns(rows: Iterable[Row], **where: str) -> np.ndarray:
    """The final returns of the rows that have these values, by seed."""
    chosen = [row for row in rows if all(row[name] == value for name, value in where.items())]
    return np.array([float(row["return_mean"]) for row in sorted(chosen, key=lambda row: int(row["seed"]))])


def algos_in(rows: Iterable[Row]) -> list[str]:
    found = {row["algo"] for row in rows}
    return [algo for algo in NAMES if algo in found] + sorted(found - NAMES.keys())


def peers_tasks(rows: Iterable[Row]) -> list[str]:
    """The tasks that both TRPOs were run on."""
    found = {(row["task"], row["algo"]) for row in rows}
    return [task for task in tasks() if all((task, algo) in found for algo in PEERS)]


def named(algo: str) -> tuple[str, str]:
    return NAMES.get(algo, (algo, BLACK))


# Pictures -------------------------------------------------------------------------------------------------------------


def grid(count: int, height: float) -> tuple[Any, list[Any]]:
    """A figure of the common width with so many panels, three in a row."""
    columns = min(3, count)
    lines = -(-count // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(WIDTH, height * lines + 0.5), squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def draw_curves(points: list[Row], x: str, label: str, path: Path) -> None:
    """A panel for each task: the interquartile mean over seeds of each algorithm, and its interval."""
    drawn = [task for task in tasks() if any(row["task"] == task for row in points)]
    figure, axes = grid(len(drawn), 2.4)
    lines = {}
    for axis, task in zip(axes, drawn):
        for algo in algos_in(row for row in points if row["task"] == task):
            runs: dict[str, list[Row]] = defaultdict(list)
            for row in points:
                if (row["task"], row["algo"]) == (task, algo):
                    runs[row["seed"]].append(row)
            curves = [
                tuple(np.array([float(row[name] or "nan") for row in run]) for name in (x, "return"))
                for run in (sorted(run, key=lambda row: int(row["step"])) for run in runs.values())
            ]
            curves = [curve for curve in curves if np.isfinite(curve[0]).all()]  # seconds may be unknown
            if not curves:
                continue
            last = max(steps[-1] for steps, _ in curves)
            at, values = common_steps([(np.append(x, last), np.append(y, y[-1])) for x, y in curves])
            name, colour = named(algo)
            (lines[name],) = axis.plot(at, interquartile_mean(values), color=colour, lw=1.8)
            if len(curves) > 1:
                ends = [bootstrap_interval([value], resamples=2000) for value in values]
                axis.fill_between(at, *zip(*ends), color=colour, alpha=0.2, lw=0)
        if (target := tasks()[task].get("target")) is not None:
            axis.axhline(target, color=GREY, lw=1, ls=":")
        axis.set_title(task, fontsize=11)
        axis.set_xlim(left=0)
        axis.ticklabel_format(axis="x", scilimits=(-3, 4))
        axis.tick_params(labelsize=9)
    figure.supxlabel(label, fontsize=11)
    figure.supylabel("evaluation return", fontsize=11)
    figure.legend(list(lines.values()), list(lines), loc="outside upper center", ncols=5)
    save(figure, path)


def draw_peers(points: list[Row], path: Path) -> None:
    """A column for each task that a peer has: every run of TRPO, ours and theirs, over seconds and over steps."""
    drawn = peers_tasks(points)
    figure, axes = plt.subplots(2, len(drawn), figsize=(WIDTH, 4.8), squeeze=False, sharey="col")
    over = (("cpu_seconds", 1.0, "processor seconds"), ("step", 1e6, "million steps"))
    for column, task in zip(axes.T, drawn):
        for axis, (x, unit, label) in zip(column, over):
            for algo in PEERS:
                name, colour = named(algo)
                of_algo = [row for row in points if (row["task"], row["algo"]) == (task, algo)]
                for i, seed in enumerate(sorted({row["seed"] for row in of_algo})):
                    run = sorted((row for row in of_algo if row["seed"] == seed), key=lambda row: int(row["step"]))
                    at = [float(row[x] or "nan") / unit for row in run]
                    values = [float(row["return"]) for row in run]
                    axis.plot(at, values, color=colour, lw=1.1, label=name if i == 0 else None)
            axis.set_xlabel(label, fontsize=10)
            axis.set_xlim(left=0)
            axis.tick_params(labelsize=9)
        column[0].set_title(task, fontsize=11)
    for axis in axes[:, :1].flat:
        axis.set_ylabel("return", fontsize=10)
    lines, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, names, fontsize=10, ncols=2, loc="outside lower center")
    save(figure, path)


def draw_bars(rows: list[Row], path: Path) -> None:
    """A panel for each task: final returns with intervals, what shall be reached, and what is published."""
    drawn = [task for task in tasks() if any(row["task"] == task for row in rows)]
    figure, axes = grid(len(drawn), 2.4)
    for axis, task in zip(axes, drawn):
        entry = tasks()[task]
        ticks = []
        for algo in algos_in(row for row in rows if row["task"] == task):
            name, colour = named(algo)
            mine = returns(rows, task=task, algo=algo)
            middle = float(interquartile_mean(mine))
            axis.bar(len(ticks), middle, color=colour, width=0.7)
            if len(mine) > 1:
                low, high = bootstrap_interval([mine])
                axis.vlines(len(ticks), low, high, color=BLACK, lw=1.5)
            axis.plot(np.full(len(mine), len(ticks)) + np.linspace(-0.2, 0.2, len(mine)), mine, ".", color=BLACK, ms=3)
            ticks.append(name)
        for figures in entry.get("published", []):
            axis.bar(len(ticks), figures["mean"], color="none", edgecolor=GREY, width=0.7, yerr=figures.get("std"))
            ticks.append(f"{figures['algo']} ({figures['source']})")
        if (target := entry.get("target")) is not None:
            axis.axhline(target, color=VERMILION, lw=1, ls=":")
        axis.set_title(task, fontsize=11)
        axis.set_xticks(range(len(ticks)), ticks, rotation=35, ha="right", fontsize=7)
        axis.tick_params(axis="y", labelsize=9)
    figure.supylabel("final return", fontsize=11)
    save(figure, path)


def scores(rows: list[Row], algo: str) -> list[np.ndarray]:
    """The final returns of each task, where 0 is a random policy's and 1 is what shall be reached."""
    found = []
    for task, entry in tasks().items():
        mine = returns(rows, task=task, algo=algo)
        if len(mine) and "random" in entry and "target" in entry:
            found.append((mine - entry["random"]) / (entry["target"] - entry["random"]))
    return found


def draw_profiles(rows: list[Row], path: Path) -> None:
    """For each algorithm the fraction of runs, over all tasks that it has, above each score."""
    figure, axis = plt.subplots(figsize=(WIDTH, 4.2))
    for algo in algos_in(rows):
        if not (tasks_of := scores(rows, algo)):
            continue
        name, colour = named(algo)
        runs = np.concatenate(tasks_of)
        # It steps down behind each score that a run has: P(score ≥ x) is that of the next one.
        thresholds = np.unique([0.0, *runs[(runs > 0) & (runs < 1.2)], 1.2])
        profile = partial(performance_profile, thresholds=thresholds)
        low, high = bootstrap_interval(tasks_of, profile, resamples=2000)
        label = f"{name}: {len(tasks_of)} task{'s' if len(tasks_of) != 1 else ''}, {len(runs)} runs"
        axis.step(thresholds, profile(runs), color=colour, where="pre", label=label)
        axis.fill_between(thresholds, low, high, color=colour, alpha=0.2, lw=0, step="pre")
    axis.set_xlabel("final return (0: a random policy, 1: what shall be reached)")
    axis.set_ylabel("fraction of runs with at least so much")
    axis.set_xlim(0, 1.2)
    axis.set_ylim(0, 1.02)
    axis.legend(loc="lower left")
    save(figure, path)


# Tables ---------------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Four digits that mean something: 4,502, 93.1, −4.12."""
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}".replace("-", "−")


def given(value: float) -> str:
    """A number of returns.yaml as it stands there."""
    return f"{value:,}".replace("-", "−")


def summary(values: np.ndarray) -> str:
    """Interquartile mean and interval."""
    text = number(float(interquartile_mean(values)))
    if len(values) > 1:
        low, high = bootstrap_interval([values])
        text += f" [{number(float(low))}, {number(float(high))}]"
    return text


def published(entry: dict[str, Any]) -> str:
    """The published figures of a task in one cell."""
    cells = []
    for figures in entry.get("published", []):
        spread = f" ± {given(figures['std'])}" if "std" in figures else ""
        steps = f" after {figures['steps']:,} steps" if "steps" in figures else ""
        cells.append(f"{figures['algo']} {given(figures['mean'])}{spread}{steps} ({figures['source']})")
    return "; ".join(cells)


def met(values: np.ndarray, entry: dict[str, Any]) -> str:
    """Whether all that shall be reached is; fewer than five seeds cannot say so."""
    if interquartile_mean(values) < entry["target"] or values.min() < entry.get("worst", -np.inf):
        return "no"
    return "yes" if len(values) >= 5 else "–"


def seeds(values: Sequence[Any] | np.ndarray) -> str:
    """How many there are."""
    return f"{len(values)} seed{'s' if len(values) != 1 else ''}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return "No runs yet."
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


def table_returns(rows: list[Row]) -> str:
    """Our algorithms, task by task, beside what shall be reached and what is published."""
    head = ("task", "steps", "", "interquartile mean", "worst seed", "seeds", "target (worst)", "met", "published")
    lines = []
    for task, entry in tasks().items():
        for algo in (a for a in algos_in(rows) if a in ALGORITHMS):
            mine = returns(rows, task=task, algo=algo)
            if len(mine):
                goal = given(entry["target"]) + (f" ({given(entry['worst'])})" if "worst" in entry else "")
                cells = (summary(mine), number(mine.min()), str(len(mine)), goal, met(mine, entry), published(entry))
                lines.append((task, f"{steps_of(task):,}", named(algo)[0], *cells))
    return markdown(head, lines)


def table_algorithms(rows: list[Row]) -> str:
    """Algorithm × task: interquartile mean and interval of the final returns."""
    algos = algos_in(rows)
    lines = []
    for task in tasks():
        found = [returns(rows, task=task, algo=algo) for algo in algos]
        if any(len(mine) for mine in found):
            cells = [f"{summary(mine)}, {seeds(mine)}" if len(mine) else "–" for mine in found]
            lines.append((task, *cells))
    return markdown(("task", *(named(algo)[0] for algo in algos)), lines)


def seconds(values: Sequence[float]) -> str:
    """The median of those that are known: a run that was stopped on the way has none."""
    known = [value for value in values if np.isfinite(value)]
    return f"{np.median(known):.0f} s" if known else "–"


def table_seconds(rows: list[Row], points: list[Row]) -> str:
    """How long both TRPOs take to the final return of sb3-contrib's, in processor seconds of training."""
    head = ("task", "sb3-contrib's final return", "in seconds", "seeds", "ours has it after", "by", "all steps in")
    lines = []
    for task in peers_tasks(rows):
        theirs, mine = ([row for row in rows if (row["task"], row["algo"]) == (task, algo)] for algo in PEERS)
        goal = float(interquartile_mean(returns(theirs)))
        first: dict[str, float] = {}
        for point in sorted(points, key=lambda row: int(row["step"])):
            if (point["task"], point["algo"]) == (task, PEERS[1]) and float(point["return"]) >= goal:
                first.setdefault(point["seed"], float(point["cpu_seconds"] or "nan"))
        took = [seconds([float(row["cpu_seconds"] or "nan") for row in runs]) for runs in (theirs, mine)]
        reached = seconds(list(first.values()))
        by = f"{len(first)} of {seeds(mine)}"
        lines.append((task, number(goal), took[0], str(len(theirs)), reached, by, took[1]))
    return markdown(head, lines)


def table_stability(rows: list[Row]) -> str:
    """Runs that go on after they reached what they shall: how deep the evaluations fall again."""
    head = ("task", "", "steps", "reached at the latest", "by", "lowest evaluation after it", "% of target")
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        known = row["config"] == "preset" and int(row["seed"]) < TUNING and row["task"] in tasks()
        if known and int(row["timesteps"]) > steps_of(row["task"]):
            groups[row["task"], row["algo"], row["timesteps"]].append(row)
    lines = []
    for (task, algo, steps), group in sorted(groups.items(), key=lambda item: list(tasks()).index(item[0][0])):
        target = tasks()[task]["target"]
        reached = [int(row["first_step_at_target"]) for row in group if row["first_step_at_target"]]
        after = [float(row["lowest_after_target"]) for row in group if row["lowest_after_target"]]
        lowest = (number(min(after)), f"{100 * fraction(min(after), target):.0f}") if after else ("–", "–")
        by = f"{len(reached)} of {seeds(group)}"
        latest = f"{max(reached):,}" if reached else "–"
        lines.append((task, named(algo)[0], f"{int(steps):,}", latest, by, *lowest))
    return markdown(head, lines)


def fraction(value: float, target: float) -> float:
    """How much of a target a return is; of a negative one, as 1 / 0.9 of it is 90 %."""
    return value / target if target > 0 else target / value


def table_configurations(rows: list[Row]) -> str:
    """What each change of the preset is worth, on the seeds that it and the preset have in common, two at least."""
    head = ("task", "", "changed", "interquartile mean", "worst seed", "the preset's", "its worst", "seeds")
    groups: dict[tuple[str, str, str, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        groups[row["task"], row["algo"], row["timesteps"], row["config"]][row["seed"]] = float(row["return_mean"])
    lines = []
    for (task, algo, steps, config), found in groups.items():
        preset = groups.get((task, algo, steps, "preset"), {})
        common = sorted(found.keys() & preset.keys(), key=int)
        if config != "preset" and len(common) > 1:
            both = [np.array([runs[seed] for seed in common]) for runs in (found, preset)]
            cells = [cell for values in both for cell in (summary(values), number(values.min()))]
            lines.append((task, named(algo)[0], f"`{config}`", *cells, ", ".join(common)))
    return markdown(head, lines)


def write_tables(page: Path, tables: Mapping[str, Callable[[], str]]) -> None:
    """Replace what stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.

    Raises:
        ValueError: if the page has no table, one that there is not, or one that does not end.
    """

    def fill(match: re.Match[str]) -> str:
        if "<!-- table: " in match[2]:
            raise ValueError(f"{page}: the table {match[1]!r} does not end: write <!-- end --> behind it")
        if match[1] not in tables:
            raise ValueError(f"{page} names the table {match[1]!r}; there are: {', '.join(tables)}")
        return f"<!-- table: {match[1]} -->\n\n{tables[match[1]]()}\n\n<!-- end -->"

    text = page.read_text(encoding="utf-8")
    filled, count = re.subn(r"<!-- table: (\w+) -->(.*?)<!-- end -->", fill, text, flags=re.DOTALL)
    if count != text.count("<!-- table: ") or not count:
        raise ValueError(f"{page} has no table that ends: write <!-- table: {next(iter(tables))} --> <!-- end -->")
    with replacing(page) as unfinished:
        unfinished.write_text(filled, encoding="utf-8")


def options_of(description: str | None, name: str) -> argparse.ArgumentParser:
    """What a script takes that draws a table of docs/results and fills a page: --csv, --out and --table."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--csv", type=Path, default=ROOT / "docs" / "results" / name, metavar="FILE")
    add("--out", type=Path, metavar="DIR", help="of the pictures; without it none are drawn")
    add("--table", type=Path, metavar="PAGE", help="a page whose tables are written anew")
    return parser


@told
def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(__doc__, "returns.csv").parse_args(arguments)
    rows = read_runs(options.csv, "return_mean", "cpu_seconds", "first_step_at_target", "lowest_after_target")
    shown = reported(rows)

    @cache
    def points() -> list[Row]:
        kept = {(row["algo"], row["task"], row["seed"], row["commit"]) for row in shown}
        every = reported(read_points(options.csv, "cpu_seconds"))
        return [p for p in every if (p["algo"], p["task"], p["seed"], p["commit"]) in kept]

    if options.table:
        tables = {
            "returns": lambda: table_returns(shown),
            "algorithms": lambda: table_algorithms(shown),
            "seconds": lambda: table_seconds(shown, points()),
            "stability": lambda: table_stability(rows),
            "configurations": lambda: table_configurations(rows),
        }
        write_tables(options.table, tables)
        print(options.table)
    if options.out:
        if not points():
            raise ValueError(f"{options.csv} has no run of a preset with the reported steps")
        draw_curves(points(), "step", "environment steps", options.out / "returns_steps.png")
        draw_curves(points(), "cpu_seconds", "processor seconds of training", options.out / "returns_seconds.png")
        draw_bars(shown, options.out / "returns_bars.png")
        draw_profiles(shown, options.out / "returns_profiles.png")
        if peers_tasks(points()):
            draw_peers(points(), options.out / "returns_peers.png")
        print(options.out)
    if not (options.out or options.table):
        print(table_returns(shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
