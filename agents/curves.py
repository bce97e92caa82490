"""The learning curve of a run as a picture, and those of several seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from agents.results import Curve
from agents.runs import RunFolder
from agents.statistics import common_steps, interquartile_mean
from npg.runs.files import replacing

__all__ = ["learning_curve", "seed_curves"]


def learning_curve(folder: RunFolder) -> Path:
    """Draw learning_curve.png: training episodes, their running mean, and the evaluations with their deviation."""
    config = folder.config
    episodes, evaluations = folder.training_episodes(), folder.evaluations()
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    returns, steps = episodes["r"], episodes["timesteps"]
    if len(returns):
        order = np.argsort(steps, kind="stable")  # a run that was resumed from an earlier agent goes over steps again
        returns, steps = returns[order], steps[order]
        window = max(1, min(100, len(returns) // 10))
        axes.plot(steps, returns, ".", color="C0", alpha=0.3, markersize=5, markeredgewidth=0, label="training episode")
        mean = np.convolve(returns, np.full(window, 1 / window), mode="valid")
        axes.plot(steps[window - 1 :], mean, color="C0", linewidth=2, label=f"mean of {window} episodes")
    if evaluations:
        axes.errorbar(
            evaluations["timesteps"],
            evaluations["mean_return"],
            evaluations["std_return"],
            fmt="o-",
            color="C1",
            markersize=4,
            linewidth=1,
            capsize=2,
            label=f"evaluation: mean ± sd of {config.eval_episodes} episodes",
        )
    axes.set_xlabel("training (environment steps)")
    axes.set_ylabel("return (sum of rewards per episode)")
    axes.set_title(f"{config.algo.upper()} on {config.env}, seed {config.seed}")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="best", frameon=False)
    path = folder.path / "learning_curve.png"
    figure.savefig(path)
    return path


def seed_curves(path: Path, title: str, curves: Mapping[int, Curve]) -> None:
    """Draw the evaluations of several seeds, and bold their interquartile mean where all of them are."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    curves = {seed: curve for seed, curve in curves.items() if len(curve.steps)}
    for seed, curve in curves.items():
        axes.plot(curve.steps, curve.returns, linewidth=1, alpha=0.6, marker=".", label=f"seed {seed}")
    steps, returns = common_steps([(curve.steps, curve.returns) for curve in curves.values()])
    if len(curves) > 1 and len(steps):
        axes.plot(steps, interquartile_mean(returns), color="black", linewidth=2.5, label="interquartile mean")
    axes.set_xlabel("training (environment steps)")
    axes.set_ylabel("evaluation return")
    axes.set_title(title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", frameon=False, ncols=2, fontsize="small")
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
