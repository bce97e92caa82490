r"""A benchmark of this folder on two commits at once, turn by turn: what a change costs, or gives.

    python scripts/benchmarks/commits.py 192bb93 --csv docs/results/commits.csv -- fvp.py mlp-64@2048 --rounds 40

The other commit is checked out beside this one, and each runs its own copy of the script in a process of its own. The
two are never at work at the same time: a turn of one is followed by the same turn of the other, some milliseconds
later, so that what slows the machine down slows both. Shown are the median and the quartiles of this commit's seconds
over the other's, each ratio taken within one pair of turns.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from interleaved import machine, write_csv

from npg.runs.files import read_rows

HERE = Path(__file__).resolve().parents[2]
BENCHMARKS = Path("scripts", "benchmarks")


def pairs_of_turns(this: Path, other: Path, command: list[str], logs: Path) -> dict[str, list[tuple[float, float]]]:
    """The seconds of all pairs of turns, by the name of what was measured."""
    (read_a, write_a), (read_b, write_b) = os.pipe(), os.pipe()
    os.write(write_a, b".")  # this commit begins
    processes = []
    for name, tree, mine, theirs in (("this", this, read_a, write_b), ("other", other, read_b, write_a)):
        beside = {"MEASURED_BESIDE": f"{mine},{theirs},{logs / name}", "PYTHONPATH": str(tree)}
        script = [sys.executable, str(tree / BENCHMARKS / command[0]), *command[1:]]
        with (logs / f"{name}.txt").open("w") as out:
            processes.append(
                subprocess.Popen(
                    script,
                    cwd=tree,
                    env={**os.environ, **beside},
                    pass_fds=(mine, theirs),
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )
        os.close(mine)
        os.close(theirs)
    names = ("this", "other")
    while any(process.poll() is None for process in processes):
        if failed := [name for name, process in zip(names, processes) if process.poll()]:
            for process in processes:  # the other would wait for its turn for ever
                process.kill()
                process.wait()
            break
        time.sleep(0.1)
    else:
        failed = [name for name, process in zip(names, processes) if process.returncode]
    if failed:
        raise SystemExit(f"{failed[0]} commit, {' '.join(command)}:\n{(logs / f'{failed[0]}.txt').read_text()[-2000:]}")
    a, b = ([line.split("\t") for line in (logs / name).read_text().splitlines()] for name in ("this", "other"))
    if [name for name, _ in a] != [name for name, _ in b]:
        raise SystemExit(f"{' '.join(command)} measures other things on the two commits: their turns do not match")
    seconds = defaultdict(list)
    for (name, mine_took), (_, theirs_took) in zip(a, b):
        seconds[name].append((float(mine_took), float(theirs_took)))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the commit to compare with")
    parser.add_argument("--csv", type=Path, help="add the rows to this table")
    parser.add_argument("command", nargs="+", help="SCRIPT [ARGUMENT ...], after --")
    arguments = parser.parse_args()
    this, other = (
        subprocess.check_output(["git", "rev-parse", "--short", name], cwd=HERE, text=True).strip()
        for name in ("HEAD", arguments.commit)
    )
    with tempfile.TemporaryDirectory() as folder:
        tree, logs = Path(folder, "tree"), Path(folder)
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(tree), other], cwd=HERE, check=True)
        try:
            # an earlier commit takes no turns by itself
            shutil.copy(HERE / BENCHMARKS / "interleaved.py", tree / BENCHMARKS / "interleaved.py")
            if arguments.command[0] == "end_to_end.py":
                shutil.copy(HERE / BENCHMARKS / "end_to_end.py", tree / BENCHMARKS / "end_to_end.py")
            seconds = pairs_of_turns(HERE, tree, arguments.command, logs)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=HERE, check=True)
    rows = []
    for name, pairs in seconds.items():
        low, middle, high = np.quantile([a / b for a, b in pairs], [0.25, 0.5, 0.75]).tolist()
        rows.append(
            {
                "command": " ".join(arguments.command),
                "measured": name,
                "this_over_other_median": f"{middle:.3f}",
                "quartile_1": f"{low:.3f}",
                "quartile_3": f"{high:.3f}",
                "ms_median": f"{1e3 * float(np.median([a for a, _ in pairs])):.3f}",
                "turns": len(pairs),
                "commit": this,
                "other": other,
                "machine": machine(),
            }
        )
        print(f"{middle:6.3f} ({low:.3f} to {high:.3f}) of {rows[-1]['ms_median']:>10} ms  {name}")
    if arguments.csv is not None:
        write_csv(arguments.csv, [*(read_rows(arguments.csv) if arguments.csv.exists() else []), *rows])


if __name__ == "__main__":
    main()
