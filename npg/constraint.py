"""A step under one more constraint: that of the trust region, and a limit on the mean of another function.

    max gᵀx   subject to   c + bᵀx ≤ 0   and   ½xᵀHx ≤ δ

with the gradient g of the objective, the gradient b of a cost and its excess c over a limit (Achiam et al. 2017,
equation 10). `docs/cpo.md` derives the solution from v = H⁻¹g and w = H⁻¹b.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isnan, sqrt

import torch
from torch import Tensor

__all__ = ["Constraint", "constrained_step"]


@dataclass(frozen=True)
class Constraint:
    """A cost that must not exceed its limit.

    Args:
        cost: outputs (…, D) ↦ (), the mean over events of a function whose change is the change of the cost.
        excess: c, the cost now less its limit: below zero where the limit is kept, −∞ for no limit.

    Raises:
        ValueError: if ``excess`` is NaN.
        TypeError: if ``cost`` is no function.
    """

    cost: Callable[[Tensor], Tensor]
    excess: float

    def __post_init__(self) -> None:
        if not callable(self.cost):
            raise TypeError(f"cost must be a function of the outputs, got {self.cost!r}: write lambda outputs: …")
        if isnan(self.excess):
            raise ValueError(f"excess must be a number, the cost less its limit, got {self.excess}")

    def binds(self, change: float) -> bool:
        """Whether a step that changes the cost by so much, to first order, leads beyond the limit."""
        return self.excess + change > 0

    def merit(self, gain: float, change: float, *, bound: bool) -> float:
        """What a trial of a search must bring: a positive number; NaN, which never is, for one that is refused.

        From within the limit, the objective's gain, if the trial keeps the limit. From beyond it, what the cost falls
        by; or, if the step that seeks the gain alone is not ``bound`` by the limit, that gain, if the cost does not
        rise.
        """
        if bound and self.excess > 0:
            return -change
        return gain if change <= max(-self.excess, 0.0) else float("nan")


def constrained_step(
    g: Tensor, b: Tensor, v: Tensor, w: Tensor, excess: float, radius: float
) -> tuple[Tensor, bool] | None:
    """The solution x of the problem above where the limit binds; and whether the problem is feasible.

    In the inner product of H, with ŵ = w/√s for s = bᵀw, and û the unit vector of v − (r/s)w for r = bᵀv, which is
    orthogonal to w,

        x = −a ŵ + √(2δ − a²) û,    a = c/√s,

    and where a > √(2δ), so that no step within the radius reaches the limit, the one that reduces the cost most,
    x = −√(2δ) ŵ. Where g lies along b (g = 0 among that), every x with bᵀx = −c is as good: x = −a ŵ.

    Args:
        g: ∇ objective, (P,).
        b: ∇ cost, (P,), not zero.
        v: H⁻¹g, (P,).
        w: H⁻¹b, (P,).
        excess: c.
        radius: δ > 0.

    Returns:
        x, (P,), in the dtype of v, and whether a step within the radius reaches the limit; None where bᵀw is no
        positive number, so that w cannot be H⁻¹b.

    Source: Achiam et al. (2017), Constrained policy optimization, equations 11 to 14.
    """
    g, b, v64, w64 = (t.double() for t in (g, b, v, w))
    r, s, q = torch.stack([torch.dot(b, v64), torch.dot(b, w64), torch.dot(g, v64)]).tolist()
    if not 0 < s < float("inf"):
        return None
    a, reach = excess / sqrt(s), sqrt(2 * radius)
    if a > reach:
        return (-reach / sqrt(s) * w64).to(v.dtype), False
    u = v64 - (r / s) * w64
    length = float(torch.dot(g - (r / s) * b, u))  # uᵀHu: the difference q − r²/s would lose its digits
    x = (-a / sqrt(s)) * w64
    if length > 1e-12 * abs(q):  # else g lies along b, and u is rounding
        x = x + sqrt(max((reach - a) * (reach + a), 0.0) / length) * u
    return x.to(v.dtype), True
