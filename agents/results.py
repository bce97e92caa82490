"""What a run came to, read from its folder: the final evaluation, and the curve that leads to the final agent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from agents.runs import RunFolder

__all__ = ["Curve", "Result", "progress", "read_curve", "read_result"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """The evaluations during training, each the mean of some episodes; all (k,), steps increasing.

    Attributes:
        steps: environment steps.
        returns: mean returns.
        seconds: of training, evaluations left out; NaN where they are not known.
        cpu_seconds: the same, of the processor.
        costs: mean costs; NaN where the environment gives none.
    """

    steps: Array
    returns: Array
    seconds: Array
    cpu_seconds: Array
    costs: Array


@dataclass(frozen=True)
class Result:
    """A finished run: its last agent on fresh episodes, with the mode of the policy.

    Attributes:
        timesteps: environment steps of its training.
        return_mean: over the episodes.
        return_std: over the episodes (population).
        return_min: of the worst episode.
        return_max: of the best episode.
        episodes: how many.
        best_return: the mean return of the agent of the best evaluation, on fresh episodes as well.
        cost_mean: over the episodes; None where the environment gives none.
    """

    timesteps: int
    return_mean: float
    return_std: float
    return_min: float
    return_max: float
    episodes: int
    best_return: float
    cost_mean: float | None = None


def read_curve(folder: RunFolder) -> Curve:
    """The evaluations of the line of agents that the last one comes from.

    A run that was killed goes on from what was saved last, and goes over some steps again: the later evaluations count.
    """
    table = folder.evaluations()
    steps = table.get("timesteps", np.empty(0))
    smallest_after = np.append(np.minimum.accumulate(steps[::-1])[::-1][1:], np.inf)
    kept = steps < smallest_after
    unknown = np.full_like(steps, np.nan)
    columns = ("mean_return", "train_seconds", "train_cpu_seconds", "mean_cost")
    return Curve(steps[kept], *(table.get(name, unknown)[kept] for name in columns))


def read_result(folder: RunFolder) -> Result | None:
    """What the run came to; None before its final evaluation."""
    path = folder.path / "final_evaluation.json"
    if not path.exists():
        return None
    final = json.loads(path.read_text(encoding="utf-8"))
    last, best = final["last"], final["best"]
    mean, std, worst, most = (float(last[f"{name}_return"]) for name in ("mean", "std", "min", "max"))
    found = mean, std, worst, most, last["episodes"], float(best["mean_return"]), last.get("mean_cost")
    return Result(last["timesteps"], *found)


def progress(run_dir: Path, timesteps: int) -> str:
    """How far a run is, in a few words: a bar, steps, and the mean return of its latest training episodes."""
    row = _last_row(run_dir / "progress.csv")
    done = int(row.get("time/total_timesteps") or 0)
    fraction = min(1.0, done / timesteps)
    line = f"{fraction:4.0%} |{'█' * round(16 * fraction):<16}| {_short(done)}/{_short(timesteps)}"
    mean = row.get("rollout/ep_rew_mean")
    return line + (f", return {float(mean):.1f}" if mean else "")


def _last_row(path: Path) -> dict[str, str]:
    """The last whole row of a table that may be long, and may be written to at this moment."""
    try:
        with path.open("rb") as file:
            names = file.readline().decode().strip().split(",")
            file.seek(max(file.tell(), file.seek(0, 2) - 4096))
            lines = file.read().decode().split("\n")[:-1]
    except OSError:
        return {}
    cells = lines[-1].strip().split(",") if lines else []
    return dict(zip(names, cells)) if len(cells) == len(names) else {}


def _short(number: int) -> str:
    return f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number // 1000}k" if number >= 1000 else str(number)
