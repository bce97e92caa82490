"""How far to go along a direction: a KL radius with backtracking, and Levenberg–Marquardt control of the damping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import Literal, NamedTuple

from npg.checks import number, one_of, whole

__all__ = ["LevenbergMarquardt", "SearchResult", "Trial", "TrustRegion"]

_ROUNDING = 1e-6  # of the radius: a KL may be so far below zero, as zero is when it is computed
KLDirection = Literal["old_new", "new_old"]


class Trial(NamedTuple):
    """What one evaluation at a trial point gives: the gain of the objective, and the mean KL in nats."""

    gain: float
    kl: float


class SearchResult(NamedTuple):
    """The outcome of a backtracking search; where nothing was accepted, ``scale`` is 0."""

    accepted: bool
    scale: float
    trial: Trial
    backtracks: int


@dataclass(frozen=True)
class TrustRegion:
    """The set KL(old ‖ new) ≤ δ around a policy or a classifier, and how to stay in it (Schulman et al. 2015, app. C).

    The proposal is scaled so that ½dᵀ(F + λI)d = δ, by which the quadratic model of the KL, ½dᵀFd, is at most δ; and is
    then shortened until the true mean KL is within δ and the objective has gained.

    Args:
        radius: δ > 0, in nats per event.
        backtrack: whether to check the true KL and objective at all; without it the scaled step is taken as it is
            (the natural policy gradient with normalised step).
        shrink: the factor of each backtrack, in (0, 1).
        max_trials: how many lengths are tried before the step is refused, the full one included.
        min_gain_ratio: accept only if the gain is more than this fraction of what the linear model predicts; 0 asks
            for any gain at all.
        kl_direction: ``"old_new"`` for KL(old ‖ new), the paper's; ``"new_old"`` for KL(new ‖ old).

    Raises:
        ValueError: if an argument is out of its range.
    """

    radius: float
    backtrack: bool = True
    shrink: float = 0.8
    max_trials: int = 10
    min_gain_ratio: float = 0.0
    kl_direction: KLDirection = "old_new"

    def __post_init__(self) -> None:
        number("radius, a KL in nats,", self.radius, 0, above=True)
        number("shrink", self.shrink, 0, 1, above=True, below=True)
        whole("max_trials", self.max_trials, 1)
        number("min_gain_ratio", self.min_gain_ratio, 0, 1, below=True)
        one_of("kl_direction", self.kl_direction, ("old_new", "new_old"))

    def scale(self, curvature: float) -> float:
        """The β with ½(βs)ᵀ(F + λI)(βs) = δ, from sᵀ(F + λI)s; 0 where that is not a positive number."""
        if not (curvature > 0 and isfinite(curvature)):
            return 0.0
        return sqrt(2.0) * (sqrt(self.radius) / sqrt(curvature))  # 2δ/c may be larger than any number

    def search(self, evaluate: Callable[[float], Trial], scale: float, slope: float) -> SearchResult:
        """Shorten ``scale`` until the trial is inside the region and gains.

        A KL below zero, by more than a millionth of the radius, has lost its digits and says nothing: that trial fails
        as one whose KL is NaN does.

        Args:
            evaluate: moves to origin + scale·s, and returns the gain and the KL there.
            scale: the first length to try.
            slope: gᵀs, the gain per unit of scale that the linear model predicts.
        """
        for backtracks in range(self.max_trials):
            trial = evaluate(scale)
            # written so that NaN fails, and a gain of +∞ too, which comes of ratios that overflow
            inside = -_ROUNDING * self.radius <= trial.kl <= self.radius
            if inside and self.min_gain_ratio * (slope * scale) < trial.gain < inf:
                return SearchResult(True, scale, trial, backtracks)
            scale *= self.shrink
        return SearchResult(False, 0.0, trial, self.max_trials - 1)


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Damping that follows how well the quadratic model predicts (Martens 2010, section 4.1).

    With ρ = actual gain / predicted gain: λ ← λ/ω where ρ > 3/4, and λ ← ωλ where ρ < 1/4 or the step was refused.
    An accepted step of length zero, whose gains are 0, says nothing of the model, and leaves λ.

    Args:
        factor: ω > 1.
        minimum: the smallest damping.
        maximum: the largest damping.

    Raises:
        ValueError: if an argument is out of its range.
    """

    factor: float = 1.5
    minimum: float = 1e-8
    maximum: float = 1e3

    def __post_init__(self) -> None:
        number("factor", self.factor, 1, above=True)
        number("minimum", self.minimum, 0, above=True)
        number("maximum", self.maximum, self.minimum)

    def update(self, damping: float, predicted_gain: float, actual_gain: float, accepted: bool) -> float:
        """The damping of the next step."""
        nothing = accepted and predicted_gain == actual_gain == 0
        ratio = actual_gain / predicted_gain if accepted and predicted_gain > 0 else -inf
        if ratio > 0.75:
            damping /= self.factor
        elif not (nothing or ratio >= 0.25):  # written so that NaN raises it
            damping *= self.factor
        return min(max(damping, self.minimum), self.maximum)
