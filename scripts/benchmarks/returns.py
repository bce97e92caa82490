r"""Returns over tasks and seeds: a row for each run, for scripts/figures/returns.py and docs/benchmarks.md.

    python scripts/benchmarks/returns.py --suite mujoco --algos trpo npg --seeds 0-9 --jobs 2
    python scripts/benchmarks/returns.py --tasks Hopper-v5 Ant-v5 --algos sb3-ppo contrib-trpo --seeds 0-2
    python scripts/benchmarks/returns.py --tasks Hopper-v5 --seeds 100-104 --set target_kl=0.02 --csv runs/trials.csv
    python scripts/benchmarks/returns.py --suite safe --algos cpo --seeds 0-4 --csv docs/results/cpo.csv

Each run is a process of scripts/train_agent.py with its preset, or of peers.py, on one processor core with one thread.
Its row is written when it ends. A run that has a row already, of the same code, is not repeated (with ``--keep`` of
any code); one that was stopped goes on. Ctrl-C stops all of them, and the same command continues.

CSV: ``config`` is ``preset``, or what --set changed; ``return_…`` are of 20 episodes of the final policy, with its most
likely actions; ``best_return`` of the agent of the best evaluation, on fresh episodes too; ``first_step_at_target`` the
step of the first evaluation (10 episodes) that was at least the target of returns.yaml; ``lowest_after_target`` the
lowest evaluation after that one; ``seconds`` and ``cpu_seconds`` of training, without evaluations, empty for a run that
was stopped on the way. A second CSV, ``…_curves.csv``, has the evaluations. Costs have a column in both.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from gymnasium import spaces
from interleaved import machine
from peers import ZOO

from agents.config import ALGORITHMS, resolve
from agents.results import Curve, progress, read_curve, read_result
from agents.runs import RunFolder
from agents.seeds import is_finished, parse_seeds, run_command
from envs import make_vec_env
from npg.runs.files import Table, read_rows
from npg.runs.jobs import End, Job, run_jobs
from npg.runs.presets import check_names, parse_settings, read_yaml

ROOT = Path(__file__).resolve().parents[2]
TASKS = Path(__file__).with_name("returns.yaml")
ALL = {"all": ("mujoco", "classic")}
KEY = ("config", "algo", "task", "seed", "timesteps")
PACKAGES = ("python", "torch", "gymnasium", "envpool", "stable-baselines3")


def suites() -> dict[str, dict[str, dict[str, Any]]]:
    """The tasks of each suite with their targets."""
    content = read_yaml(TASKS)
    del content["sources"]
    return content


@dataclass(frozen=True)
class Case:
    """One run of the benchmark."""

    config: str
    algo: str
    task: str
    seed: int
    timesteps: int
    target: float | None

    @property
    def folder(self) -> str:
        """The name of its run folder: the key, and for a long one its beginning and a hash."""
        name = re.sub(r"[^\w.=,+-]+", "_", "-".join(self.key))
        return name if len(name) <= 200 else f"{name[:180]}-{hashlib.sha1(name.encode()).hexdigest()[:16]}"

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from others, as the CSV has it."""
        return tuple(str(getattr(self, name)) for name in KEY)

    @property
    def name(self) -> str:
        """For the display."""
        return f"{self.algo} {self.task} seed {self.seed}"


def cases(options: argparse.Namespace) -> list[Case]:
    """What is asked for, task by task.

    Raises:
        ValueError: for a name that is not known, or settings that an algorithm does not take.
    """
    known = {task: entry for suite in suites().values() for task, entry in suite.items()}
    chosen = [task for suite in ALL.get(options.suite, (options.suite,)) for task in suites()[suite]]
    if options.tasks:
        check_names("task", options.tasks, known, f"in {TASKS.name}")
        chosen = options.tasks
    settings = parse_settings(options.set)
    config = " ".join(sorted(options.set)) or "preset"
    found = []
    for task in chosen:
        steps = options.timesteps or known[task].get("timesteps") or resolve("trpo", task).timesteps
        for algo in options.algos:
            if algo in ALGORITHMS:
                resolve(algo, task, settings=settings)
            elif settings:
                raise ValueError(f"--set is for {', '.join(ALGORITHMS)}: {algo} has the settings of RL Zoo")
            elif task not in ZOO[algo]:
                if options.tasks:
                    raise ValueError(f"RL Zoo has no settings of {algo} for {task}: {', '.join(ZOO[algo])}")
                continue
            target = known[task].get("target")
            found += [Case(config, algo, task, seed, steps, target) for seed in parse_seeds(options.seeds)]
    return found


def code_version() -> str:
    """The commit, and behind it a hash of what differs from it, docs aside; ``unknown`` without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    try:
        commit, changes = git("rev-parse", "HEAD")[:10], git("diff", "HEAD", "--", ":/", ":(top,exclude)docs")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + (f"+{hashlib.sha1(changes.encode()).hexdigest()[:6]}" if changes else "")


def command(case: Case, run_dir: Path, options: argparse.Namespace) -> list[str] | None:
    """What begins the run, or goes on with it; None if it is finished."""
    steps, evaluations = f"--timesteps={case.timesteps}", max(1, case.timesteps // options.evaluations)
    common = [case.algo, case.task, f"--seed={case.seed}", steps, "--threads=1"]
    if case.algo in ALGORITHMS:
        settings = [f"--set={setting}" for setting in options.set]
        begin = [*common, "--device=cpu", f"--eval-freq={evaluations}", *settings]
        return run_command(ROOT / "scripts" / "train_agent.py", run_dir, begin, timesteps=case.timesteps)
    if is_finished(run_dir, case.timesteps):
        return None
    shutil.rmtree(run_dir, ignore_errors=True)  # it cannot go on
    return [sys.executable, str(Path(__file__).with_name("peers.py")), *common, "--run-dir", str(run_dir)]


def at_target(curve: Curve, target: float | None) -> tuple[int | str, float | str]:
    """The first step whose evaluation is at least the target, and the lowest evaluation after it; empty without one."""
    if target is None or not (reached := np.flatnonzero(curve.returns >= target)).size:
        return "", ""
    first = reached[0]
    after = curve.returns[first + 1 :]
    return int(curve.steps[first]), round(float(after.min()), 3) if after.size else ""


def row(case: Case, folder: RunFolder, version: str) -> dict[str, Any]:
    """A line of the CSV, from the folder of a finished run."""
    result, curve = read_result(folder), read_curve(folder)
    assert result is not None
    where = list(yaml.safe_load_all((folder.path / "versions.yaml").read_text(encoding="utf-8")))
    ran = {f"{(w['git_commit'] or 'unknown')[:10]}{'+' if w['git_modified'] else ''}" for w in where}
    first, lowest = at_target(curve, case.target)
    return {
        **dict(zip(KEY, case.key)),
        # What the processes saw, if the code has changed under them.
        "commit": version if ran == {version.partition("+")[0] + "+" * ("+" in version)} else " ".join(sorted(ran)),
        "return_mean": round(result.return_mean, 3),
        "return_std": round(result.return_std, 3),
        "return_min": round(result.return_min, 3),
        "episodes": result.episodes,
        "best_return": round(result.best_return, 3),
        **({} if result.cost_mean is None else {"cost_mean": round(result.cost_mean, 3)}),
        "first_step_at_target": first,
        "lowest_after_target": lowest,
        "trained": result.timesteps,
        "seconds": _seconds(curve.seconds),
        "cpu_seconds": _seconds(curve.cpu_seconds),
        **{package: where[-1].get(package) or "" for package in PACKAGES},
        "machine": machine(),
    }


def _seconds(clock: np.ndarray) -> float | str:
    return round(float(clock[-1]), 2) if len(clock) and isfinite(clock[-1]) else ""


def curves_path(path: Path) -> Path:
    """The CSV of the evaluations beside that of the runs."""
    return path.with_name(f"{path.stem}_curves.csv")


def record(case: Case, folder: RunFolder, version: str, path: Path) -> dict[str, Any]:
    """Append a finished run to both tables; the row comes last, for with it the run counts as done."""
    line, curve = row(case, folder, version), read_curve(folder)
    table = Table(curves_path(path))
    about = {name: line[name] for name in (*KEY, "commit")}
    for i, step in enumerate(curve.steps):
        clocks = {"seconds": round(curve.seconds[i], 2), "cpu_seconds": round(curve.cpu_seconds[i], 2)}
        cost = {"cost": round(float(curve.costs[i]), 3)} if isfinite(curve.costs[i]) else {}
        table.append({**about, "step": int(step), **clocks, "return": round(float(curve.returns[i]), 3), **cost})
    Table(path).append(line)
    return line


def random_return(task: str, episodes: int = 100, n_envs: int = 20) -> float:
    """The mean return of uniformly drawn actions, seed 0; as many episodes of each environment."""
    env = make_vec_env(task, n_envs, 0, n_threads=1, evaluation=True)
    generator, space = np.random.default_rng(0), env.action_space
    env.reset()
    returns: list[list[float]] = [[] for _ in range(n_envs)]
    while min(map(len, returns)) < episodes // n_envs:
        if isinstance(space, spaces.Box):
            action = generator.uniform(space.low, space.high, (n_envs, *space.shape)).astype(space.dtype)
        else:
            action = generator.integers(space.n, size=n_envs)
        _, _, dones, infos = env.step(action)
        for i in np.flatnonzero(dones):
            returns[i].append(infos[i]["episode"]["r"])
    env.close()
    return float(np.mean([own[: episodes // n_envs] for own in returns]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--suite", choices=(*suites(), *ALL), default="all", help="of tasks (default: %(default)s)")
    add("--tasks", nargs="+", metavar="ENV_ID", help="these tasks instead of a suite")
    add("--algos", nargs="+", choices=(*ALGORITHMS, *ZOO), default=["trpo"], help="(default: trpo)")
    add("--seeds", default="0-9", metavar="LIST", help="such as 0-4 or 0,3 (default: %(default)s)")
    add("--timesteps", type=int, metavar="N", help="of each run (default: those of returns.yaml, else the preset's)")
    add("--evaluations", type=int, default=20, metavar="N", help="on the way (default: %(default)s)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, as for train_agent.py. Repeatable")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time, one thread each (default: %(default)s)")
    add("--nice", type=int, default=10, metavar="N", help="priority, 0 is that of other work (default: %(default)s)")
    add("--keep", action="store_true", help="rows of other code count as done as well")
    add("--random", action="store_true", help="only print what uniformly drawn actions return, as in returns.yaml")
    csv_help = "the table, to which the rows of new runs are added (default: docs/results/returns.csv)"
    add("--csv", type=Path, default=ROOT / "docs" / "results" / "returns.csv", metavar="FILE", help=csv_help)
    add(
        "--runs",
        type=Path,
        default=Path("runs/returns"),
        metavar="DIR",
        help="of the run folders (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        for name in ("jobs", "evaluations", "timesteps"):
            if (value := getattr(options, name)) is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1; got {value}")
        wanted, version = cases(options), code_version()
        if options.random:
            for task in dict.fromkeys(case.task for case in wanted):
                print(f"{task}: {random_return(task):.4g}", flush=True)
            return 0
    except ValueError as error:
        parser.error(str(error))
    rows = [r for r in read_rows(options.csv) if options.keep or r["commit"] == version]
    done = {tuple(r[name] for name in KEY) for r in rows}
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    runs = options.runs / version
    runs.mkdir(parents=True, exist_ok=True)
    os.nice(options.nice)

    jobs: dict[Job, tuple[Case, RunFolder]] = {}
    for case in wanted:
        if case.key in done:
            continue
        run_dir = runs / case.folder
        start, shown = partial(command, case, run_dir, options), partial(progress, run_dir, case.timesteps)
        jobs[Job(case.name, start, run_dir.with_name(f"{run_dir.name}.log"), shown)] = case, RunFolder(run_dir)
    print(f"{len(wanted)} runs, {len(jobs)} of them to do: {options.csv}", flush=True)

    def ended(job: Job, end: End) -> str:
        if end.status not in ("done", "done before"):
            return str(job.log)
        line = record(*jobs[job], version, options.csv)
        return f"return {line['return_mean']:.1f} ± {line['return_std']:.1f}"

    ends = run_jobs(jobs, options.jobs, environment={"OMP_NUM_THREADS": "1"}, ended=ended)
    states = {end.status for end in ends.values()}
    return 1 if states & {"failed", "killed", "running elsewhere"} else 130 if states - {"done", "done before"} else 0


if __name__ == "__main__":
    sys.exit(main())
