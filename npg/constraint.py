"""A step under one more constraint: that of the trust region, and a limit on the mean of another function.

    max gᵀx   subject to   c + bᵀx ≤ 0   and   ½xᵀHx ≤ δ

with the gradient g of the objective, the gradient b of a cost and its excess c over a limit (Achiam et al. 2017,
equation 10), and H = F + λI, so that the quadratic model of the KL, ½xᵀFx, is at most δ. `docs/cpo.md` derives the
solution from v = H⁻¹g and w = H⁻¹b.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite, isnan, nan, sqrt
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from npg.fisher import Fisher
from npg.linearize import Linearization
from npg.parallel import mean_
from npg.parameters import check_beside
from npg.solvers import Solution, Status, norm, not_finite
from npg.solvers.solution import ORDER
from npg.trust_region import TrustRegion

__all__ = ["Constraint", "Limited", "constrained_step", "limit", "value_and_slope"]


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


class Limited(NamedTuple):
    """The solution under a constraint, and what the search along it asks."""

    solution: Solution
    constraint: Constraint
    kind: Literal["free", "bound", "infeasible"]
    slope: float
    """bᵀs."""
    cost: float
    """Before the step."""

    @property
    def bound(self) -> bool:
        """Whether the limit had a part in the solution."""
        return self.kind != "free"

    def search(self, scale: float, slope: float) -> tuple[float, float]:
        """With which multiple of the solution a search begins, and the slope of what it looks at, per unit of that."""
        if self.bound:  # the solution is the step itself
            return min(scale, 1.0), self.merit(slope, self.slope) if self.constraint.excess > 0 else slope
        return scale, slope

    def merit(self, gain: float, change: float) -> float:
        """`Constraint.merit` of a trial."""
        return self.constraint.merit(gain, change, bound=self.bound)

    def report(self, scale: float, change: float) -> dict[str, Any]:
        """What the report of the step βs says of the constraint, where the last trial changed the cost by so much."""
        return {"predicted_cost": scale * self.slope if scale else 0.0, "actual_cost": change, "limit": self.kind}


def limit(
    linearization: Linearization,
    F: Fisher,
    g: Tensor,
    solution: Solution,
    solve: Callable[[Tensor], Solution],
    damping: float,
    constraint: Constraint,
    region: TrustRegion,
    process_group: dist.ProcessGroup | None,
) -> Limited:
    """The step of ``solution`` if it keeps the constraint, to first order; else the one that is bound by it."""
    value, slope = value_and_slope(constraint.cost, linearization, "constraint.cost")
    cost = mean_(value.double(), process_group)
    b = mean_(linearization.pull_back(slope), process_group)
    along, size, curvature, before = torch.stack(
        [torch.dot(b.double(), solution.x.double()), norm(b), solution.curvature, cost]
    ).tolist()
    if not (isfinite(size) and isfinite(before)):
        return Limited(not_finite(torch.full_like(g, nan)), constraint, "free", nan, nan)
    if size == 0 or not constraint.binds(region.scale(curvature) * along):
        return Limited(solution, constraint, "free", along, before)
    second = solve(b)
    found = None
    if second.status is not Status.NON_FINITE:
        found = constrained_step(g, b, solution.x, second.x, constraint.excess, region.radius)
    if found is None:
        lost = second.status if second.status is Status.NON_FINITE else Status.BREAKDOWN
        nothing = replace(second, x=torch.zeros_like(g), status=lost, statuses=(lost,))
        return Limited(nothing, constraint, "bound", 0.0, before)
    x, feasible = found
    damped = F.quadratic(x) + damping * norm(x).square()
    worst = max(solution.status, second.status, key=ORDER.index)
    both = Solution(
        x=x,
        status=worst,
        statuses=(worst,),
        iterations=solution.iterations + second.iterations,
        residual_norm=torch.maximum(solution.residual_norm, second.residual_norm),
        curvature=damped,
        model_value=0.5 * damped - torch.dot(g.double(), x.double()),
    )
    change = float(torch.dot(b.double(), x.double()))
    return Limited(both, constraint, "bound" if feasible else "infeasible", change, before)


def value_and_slope(function: Callable[[Tensor], Tensor], at: Linearization, name: str) -> tuple[Tensor, Tensor]:
    """The value of a mean over events, and its slope in the outputs."""
    with torch.enable_grad():
        outputs = at.outputs.clone().requires_grad_()
        value = function(outputs)
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must return a tensor, got {type(value).__name__}: leave out float(…) and .item()")
        if value.ndim != 0:
            raise ValueError(f"{name} must return a mean over events, a scalar, got shape {tuple(value.shape)}")
        if not value.requires_grad:
            raise ValueError(
                f"{name} must depend on the outputs that it is given, got a tensor without gradients: leave out "
                ".detach() and torch.no_grad()"
            )
        check_beside(value, at.parameters, name)
        (slope,) = torch.autograd.grad(value, outputs)
    return value.detach(), slope
