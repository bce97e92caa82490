"""What the returns of several seeds say together.

After Agarwal et al. (2021), *Deep reinforcement learning at the edge of the statistical precipice*. Scores are arrays
whose last axis goes over runs. The interquartile mean leaves out the lowest and the highest quarter:
it is less moved by one lucky or unlucky seed than the mean, and by less chance than the median.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["bootstrap_interval", "common_steps", "interquartile_mean", "performance_profile"]

Array = npt.NDArray[np.float64]


def interquartile_mean(scores: npt.ArrayLike) -> Array:
    """The mean of what is left of n runs without the ⌊n/4⌋ lowest and the ⌊n/4⌋ highest: (…, n) → (…).

    It is NaN where a score is, as that of a run that has none.

    Raises:
        ValueError: if there are no runs.
    """
    ordered = np.sort(np.asarray(scores, dtype=float), axis=-1)
    n = ordered.shape[-1]
    if not n:
        raise ValueError(f"scores must hold at least one run, got the shape {ordered.shape}: leave out what has none")
    mean = ordered[..., n // 4 : n - n // 4].mean(-1)
    return np.where(np.isnan(ordered[..., -1]), np.nan, mean)[()]  # NaN is sorted behind all numbers


def performance_profile(scores: npt.ArrayLike, thresholds: npt.ArrayLike) -> Array:
    """The fraction of runs whose score is at least each of T thresholds: (…, n) → (…, T)."""
    return (np.asarray(scores, dtype=float)[..., None] >= np.asarray(thresholds, dtype=float)).mean(-2)


def bootstrap_interval(
    scores: Sequence[npt.ArrayLike],
    statistic: Callable[[Array], Array] = interquartile_mean,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[Array, Array]:
    """The percentile bootstrap interval of a statistic of the runs of one or more tasks, taken together.

    Runs are drawn with replacement within each task (stratified). The same scores always give the same interval.

    Args:
        scores: for each task the scores of its runs, (nᵢ,).
        statistic: (…, Σ nᵢ) → (…), or with more axes behind.
        level: the part of the resamples that lies between the two ends.
        resamples: how many.
        seed: of the draws.

    Returns:
        The lower and the upper end, each of the shape that `statistic` has for one sample.

    Raises:
        ValueError: if a task has no runs.
    """
    generator = np.random.default_rng(seed)
    tasks = [np.asarray(task, dtype=float) for task in scores]
    if not tasks or any(task.ndim != 1 or not len(task) for task in tasks):
        raise ValueError("scores must hold one array of at least one run for each task")
    drawn = [task[generator.integers(len(task), size=(resamples, len(task)))] for task in tasks]
    values = statistic(np.concatenate(drawn, axis=-1))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def common_steps(curves: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]]) -> tuple[Array, Array]:
    """Curves at the same places: all steps that lie within every curve, and the values there, linear between points.

    Args:
        curves: steps and values of each run, both (kᵢ,), steps increasing; at least one.

    Returns:
        The steps (k,), and the values (k, number of curves).
    """
    pairs = [(np.asarray(x, dtype=float), np.asarray(y, dtype=float)) for x, y in curves]
    begin, end = max(x[0] for x, _ in pairs), min(x[-1] for x, _ in pairs)
    steps = np.unique(np.concatenate([x for x, _ in pairs]))
    steps = steps[(begin <= steps) & (steps <= end)]
    return steps, np.stack([np.interp(steps, x, y) for x, y in pairs], axis=-1)
