"""The same run with several seeds: a process and a run folder each, under one folder, with what they say together.

::

    seeds.yaml     what was asked for                 s0, s1, …      the run folders
    preset.yaml    the settings of every seed         s0.log, …      what their processes printed
    seeds.csv      a row for each seed                learning_curves.png
    summary.json   all of it, with the statistics
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import yaml

from agents.config import RunConfig, preset_of, write_preset
from agents.curves import seed_curves
from agents.results import Result, progress, read_curve, read_result
from agents.runs import RunFolder
from agents.statistics import bootstrap_interval, interquartile_mean
from agents.trackers import TRACKERS
from npg.runs.files import replacing, write_rows
from npg.runs.folder import refuse_existing
from npg.runs.jobs import End, Job, run_jobs, threads_for
from npg.runs.presets import check_names, read_yaml

__all__ = ["SeedResult", "SeedsFolder", "is_finished", "parse_seeds", "run_command", "statistics", "summary_table"]

FILE = "seeds.yaml"
_PRESET = "preset.yaml"
_NOT_KEPT = ("--video", *(f"--{name}" for name in TRACKERS))


def parse_seeds(text: str) -> tuple[int, ...]:
    """``"0-3,7"`` → ``(0, 1, 2, 3, 7)``: each seed once, in rising order.

    Raises:
        ValueError: for anything else.
    """
    seeds: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"seeds must be numbers and ranges, such as 0-9 or 0,3,7; got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last - first >= 10_000:
            raise ValueError(f"seeds must be at most 10000; got {text!r}")
        seeds.update(range(first, last + 1))
    return tuple(sorted(seeds))


# One run --------------------------------------------------------------------------------------------------------------


def is_finished(run_dir: Path, timesteps: int | None = None) -> bool:
    """Whether a run has its final evaluation, after all of its steps or after `timesteps`."""
    if not (run_dir / "config.yaml").is_file():
        return False
    folder = RunFolder(run_dir)
    final = folder.final_timesteps
    return final is not None and final >= (timesteps or folder.config.timesteps)


def run_command(
    script: Path,
    run_dir: Path,
    begin: Sequence[str],
    changes: Sequence[str] = (),
    timesteps: int | None = None,
) -> list[str] | None:
    """The command that begins a run or goes on with it, as train_agent.py takes it; None if it is finished.

    Args:
        script: train_agent.py.
        run_dir: the run's folder. What a run left that has not saved an agent yet is removed.
        begin: the arguments of a run that begins, algorithm and environment first. Of its options a run that goes on
            takes those that no folder keeps, such as ``--video``.
        changes: options that also a run that goes on takes.
        timesteps: of the whole run, where `changes` has more than its beginning.
    """
    if is_finished(run_dir, timesteps):
        return None
    command = [sys.executable, str(script)]
    if (run_dir / "config.yaml").is_file():
        folder = RunFolder(run_dir)
        # One with results that lost its agents stays, and its process says what is missing.
        if folder.last.model.is_file() or folder.agents.all() or folder.final_timesteps is not None:
            again = [option for option in begin[2:] if option.partition("=")[0] in _NOT_KEPT]
            return [*command, *begin[:2], "--resume", str(run_dir), *again, *changes, "--no-progress"]
        shutil.rmtree(run_dir, ignore_errors=True)
    return [*command, *begin, *changes, "--run-dir", str(run_dir), "--no-progress"]


# Several --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeedResult:
    """What became of one seed.

    Attributes:
        seed: the seed.
        status: as of `npg.runs.jobs.End`.
        reason: why it failed, or was killed.
        result: what its run came to; None before its end.
    """

    seed: int
    status: str
    reason: str
    result: Result | None


@dataclass(frozen=True)
class SeedsFolder:
    """A run with several seeds, and its folder.

    Attributes:
        path: of the folder.
        algo: the algorithm.
        env: the environment.
        timesteps: environment steps of each run.
        seeds: the seeds.
        options: of train_agent.py, as the runs begin, beside the folder's preset.yaml (which older ones lack).
        changes: options that were given on the way.
    """

    path: Path
    algo: str
    env: str
    timesteps: int
    seeds: tuple[int, ...]
    options: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()

    @classmethod
    def create(cls, path: Path | None, config: RunConfig, seeds: Sequence[int], options: Sequence[str]) -> Self:
        """Make the folder; without a path it is ``runs/<algo>-<env>-seeds-<n>`` with the first free n.

        The settings of `config` are written down, so that a seed that begins later has them too, whatever became of
        the preset that they came from.

        Args:
            path: of the folder.
            config: of every seed.
            seeds: the seeds.
            options: of train_agent.py beside them.

        Raises:
            FileExistsError: if `path` exists, and is not an empty folder.
        """
        name = f"{config.algo}-{config.env.replace('/', '_').replace(':', '_')}-seeds"
        n = 1
        while path is None:
            candidate = Path("runs") / f"{name}-{n}"
            path, n = (None, n + 1) if candidate.exists() else (candidate, n)
        refuse_existing(path)
        path.mkdir(parents=True, exist_ok=True)
        write_preset(path / _PRESET, config.env, preset_of(config))
        watched = [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in ("eval_freq", "save_freq")]
        made = cls(path, config.algo, config.env, config.timesteps, tuple(seeds), (*options, *watched))
        made.write()
        return made

    @classmethod
    def open(cls, path: Path) -> Self:
        """The folder of an earlier call.

        Raises:
            ValueError: if its file is damaged.
        """
        content = read_yaml(path / FILE)
        names = ("algo", "env", "timesteps", "seeds", "options", "changes")
        check_names("key", content, names, f"in {path / FILE}")
        if missing := set(names) - content.keys():
            raise ValueError(f"{path / FILE} lacks {' and '.join(sorted(missing))}: it is damaged")
        lists = {name: tuple(content[name]) for name in ("seeds", "options", "changes")}
        return cls(path, content["algo"], content["env"], int(content["timesteps"]), **lists)

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether there is such a folder at `path`."""
        return (path / FILE).is_file()

    def going_on(self, seeds: Sequence[int], changes: Sequence[str], timesteps: int | None) -> Self:
        """The same with more seeds, and with options that change on the way.

        Raises:
            ValueError: for fewer steps than the seeds have, whose returns would not be of one kind.
        """
        if timesteps is not None and timesteps < self.timesteps:
            raise ValueError(
                f"--timesteps must be at least {self.timesteps}, which the seeds of {self.path} have; got {timesteps}: "
                "give as many or more, or begin in another folder"
            )
        return replace(
            self,
            seeds=tuple(sorted({*self.seeds, *seeds})),
            changes=(*self.changes, *changes),
            timesteps=timesteps or self.timesteps,
        )

    def write(self) -> None:
        """Write what was asked for."""
        content = asdict(self) | {name: list(getattr(self, name)) for name in ("seeds", "options", "changes")}
        del content["path"]
        with replacing(self.path / FILE) as partial:
            partial.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")

    def run_dir(self, seed: int) -> Path:
        """The run folder of a seed."""
        return self.path / f"s{seed}"

    def log(self, seed: int) -> Path:
        """What the processes of a seed printed."""
        return self.path / f"s{seed}.log"

    def run(self, script: Path, at_once: int, threads: int | None, show: bool = True) -> list[SeedResult]:
        """Run every seed that is not finished, at most `at_once` at a time; what each of them came to.

        Args:
            script: train_agent.py.
            at_once: how many processes.
            threads: of each; None shares the processors among them.
            show: show how far they are.
        """
        if threads is None and at_once > 1:
            threads = threads_for(at_once)
        changes = (*self.changes, *([f"--threads={threads}"] if threads else []))
        environment = {"OMP_NUM_THREADS": str(threads)} if threads else None
        preset = [f"--preset={file}"] if (file := self.path / _PRESET).is_file() else []
        jobs = {}
        for seed in self.seeds:
            begin = [self.algo, self.env, *preset, *self.options, f"--seed={seed}"]
            command = partial(run_command, script, self.run_dir(seed), begin, changes, self.timesteps)
            shown = partial(progress, self.run_dir(seed), self.timesteps)
            jobs[Job(f"seed {seed}", command, self.log(seed), shown)] = seed

        def result(seed: int, end: End) -> Result | None:
            return read_result(RunFolder(self.run_dir(seed))) if end.status in ("done", "done before") else None

        def ended(job: Job, end: End) -> str:
            found = result(jobs[job], end)
            return "" if found is None else f"return {found.return_mean:.1f} ± {found.return_std:.1f}"

        ends = run_jobs(jobs, at_once, environment=environment, ended=ended, show=show)
        return [
            SeedResult(seed, ends[job].status, ends[job].reason, result(seed, ends[job])) for job, seed in jobs.items()
        ]

    def summarize(self, results: Sequence[SeedResult]) -> None:
        """Write seeds.csv, summary.json and, if there is an evaluation, learning_curves.png."""
        rows = [
            {"seed": r.seed, "status": r.status, "reason": r.reason} | ({} if r.result is None else asdict(r.result))
            for r in results
        ]
        write_rows(self.path / "seeds.csv", rows)
        about = {"algo": self.algo, "env": self.env, "timesteps": self.timesteps}
        RunFolder(self.path).write_json("summary.json", about | {"statistics": statistics(results), "seeds": rows})
        curves = {r.seed: read_curve(RunFolder(self.run_dir(r.seed))) for r in results}
        if any(len(curve.steps) for curve in curves.values()):
            seed_curves(self.path / "learning_curves.png", f"{self.algo.upper()} on {self.env}", curves)


def statistics(results: Sequence[SeedResult]) -> dict[str, Any]:
    """Median, interquartile mean, its 95 % bootstrap interval (of two seeds or more), and the worst final return."""
    finished = {r.seed: r.result.return_mean for r in results if r.result is not None}
    if not finished:
        return {"seeds": 0}
    returns = np.array(list(finished.values()))
    interval = [float(end) for end in bootstrap_interval([returns])] if len(returns) > 1 else None
    worst = min(finished, key=lambda seed: finished[seed])
    return {
        "seeds": len(finished),
        "median": float(np.median(returns)),
        "interquartile_mean": float(interquartile_mean(returns)),
        "interval": interval,
        "worst": finished[worst],
        "worst_seed": worst,
    }


def summary_table(results: Sequence[SeedResult], logs: Mapping[int, Path]) -> str:
    """What became of each seed, and what they say together, in at most 80 columns but for paths and reasons."""
    cells = [("seed", "return", "min … max", "best", "trained", "status")]
    for r in results:
        row = ("", "", "", "")
        if (x := r.result) is not None:
            spread = f"{x.return_min:.1f} … {x.return_max:.1f}"
            row = (f"{x.return_mean:.1f} ± {x.return_std:.1f}", spread, f"{x.best_return:.1f}", f"{x.timesteps:,}")
        cells.append((str(r.seed), *row, r.status))
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join(cell.ljust(w) if i == 5 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in cells
    ]
    lines.insert(1, "─" * max(map(len, lines)))
    for r in results:
        if r.reason:
            lines += ["", f"seed {r.seed} {r.status}: {r.reason}", f"  {logs[r.seed]}"]
    if (s := statistics(results))["seeds"]:
        interval = "" if s["interval"] is None else " [{:.1f}, {:.1f}]".format(*s["interval"])
        lines += [
            "",
            f"interquartile mean {s['interquartile_mean']:.1f}{interval}, median {s['median']:.1f}, "
            f"worst {s['worst']:.1f} (seed {s['worst_seed']})",
            f"of {s['seeds']} of {len(results)} seeds; in brackets the 95 % bootstrap interval",
        ]
    return "\n".join(lines)
