r"""Memory and open files of a long training, over its steps: both shall stay as they are once it is under way.

    python scripts/benchmarks/memory.py CartPole-v1:10_000_000 HalfCheetah-v5:3_000_000 --csv docs/results/memory.csv

Each task is trained by scripts/train_agent.py with its preset, evaluations and checkpoints, in a process of its own,
which is looked at from outside (Linux): resident memory, open files, threads. The last column of what is printed is how
much more the last tenth of the training has than the second tenth, in the median; a leak of a byte per step would be
10 MB in ten million. The picture beside the CSV has the curves.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import machine, with_number, write_csv

from npg.runs.files import read_rows

SCRIPTS = Path(__file__).resolve().parents[1]


def looked_at(process: int) -> dict[str, float] | None:
    """Resident memory in MB, open files and threads of a process; None of one that is just ending."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    if "VmRSS" not in status:
        return None
    return {
        "memory_mb": int(status["VmRSS"].split()[0]) / 1024,
        "files": len(list(Path(f"/proc/{process}/fd").iterdir())),
        "threads": int(status["Threads"]),
    }


def watch(task: str, timesteps: int, every: float, folder: Path) -> list[dict[str, Any]]:
    """Train, and look at the process every so many seconds; raises RuntimeError if the training fails."""
    run = folder / task.replace("/", "_")
    command = [sys.executable, str(SCRIPTS / "train_agent.py"), "trpo", task, "--timesteps", str(timesteps)]
    command += ["--eval-freq", str(timesteps // 200), "--save-freq", str(timesteps // 100), "--seed", "0"]
    command += ["--threads", "1", "--no-progress", "--run-dir", str(run)]
    log = folder / "log.txt"
    rows, started = [], time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(every)
            progress = read_rows(run / "progress.csv") if (run / "progress.csv").exists() else []
            steps = [row["time/total_timesteps"] for row in progress[-1:]]
            if process.poll() is None and steps and steps[0] and (seen := looked_at(process.pid)):
                seconds = round(time.perf_counter() - started, 1)
                rounded = {name: round(value, 2) for name, value in seen.items()}
                rows.append({"task": task, "step": int(float(steps[0])), "seconds": seconds, **rounded})
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return rows


def growth(rows: Sequence[dict[str, Any]], name: str) -> float:
    """The median over the last tenth of the steps less that over the second tenth."""
    steps, values = (np.array([float(row[key]) for row in rows]) for key in ("step", name))
    parts = np.floor(10 * steps / (steps.max() + 1))
    return float(np.median(values[parts == 9]) - np.median(values[parts == 1]))


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Curves of memory and open files."""
    sys.path.insert(0, str(SCRIPTS / "figures"))
    import style

    figure, (left, right) = style.panels()
    for task in dict.fromkeys(row["task"] for row in rows):
        of = [row for row in rows if row["task"] == task]
        steps = [float(row["step"]) / 1e6 for row in of]
        left.plot(steps, [float(row["memory_mb"]) for row in of], label=task)
        right.plot(steps, [float(row["files"]) for row in of], label=task)
    left.set(xlabel="million steps", ylabel="resident memory, MB", ylim=(0, None))
    right.set(xlabel="million steps", ylabel="open files", ylim=(0, None))
    left.legend(loc="lower right")
    style.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("tasks", nargs="+", type=with_number(":", 200), metavar="ENV_ID:STEPS")
    add("--every", type=float, default=2.0, metavar="SECONDS", help="[%(default)s]")
    add("--csv", type=Path, help="write the rows here, and the picture beside it")
    options = parser.parse_args(arguments)
    if not Path("/proc/self/status").exists():
        parser.error("processes are looked at by /proc, which this system does not have: run it on Linux")
    rows: list[dict[str, Any]] = []
    print(f"{'task':<20}{'steps':>12}{'seconds':>9}{'memory, MB':>12}{'files':>7}{'grown by':>18}")
    for task, steps in options.tasks:
        with tempfile.TemporaryDirectory() as folder:
            of = watch(task, steps, options.every, Path(folder))
        rows += [{**row, "machine": machine()} for row in of]
        last, more = of[-1], f"{growth(of, 'memory_mb'):+.1f} MB {growth(of, 'files'):+.0f}"
        print(
            f"{task:<20}{last['step']:>12,}{last['seconds']:>9.0f}{last['memory_mb']:>12.0f}{last['files']:>7.0f}{more:>18}"
        )
        if options.csv is not None:  # what was measured stays, if a later task fails
            write_csv(options.csv, rows)
            draw(rows, options.csv.with_suffix(".png"))


if __name__ == "__main__":
    main()
