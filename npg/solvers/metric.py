"""A system damped in another metric than the identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from npg.solvers.cg import conjugate_gradient
from npg.solvers.solution import AnyOperator, Solution, Solver, Status, dot_in_double, product_of

__all__ = ["solve_in_metric"]


@dataclass(frozen=True)
class _Whitened:
    """L A L."""

    product: Callable[[Tensor], Tensor]
    root: Callable[[Tensor], Tensor]

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.root(self.product(self.root(v)))


def solve_in_metric(
    A: AnyOperator,
    b: Tensor,
    *,
    root: Callable[[Tensor], Tensor],
    solver: Solver = conjugate_gradient,
    x0: Tensor | None = None,
    damping: float = 0.0,
) -> Solution:
    """Solve (A + λC) x = b, where L = C^{−1/2} is known: (L A L + λI) y = L b, and x = L y.

    It damps the length of x in the metric C, and preconditions with C at the same time: conjugate gradients take here
    the iterates that the preconditioner C gives them on A + λC.

    Args:
        A: symmetric positive semi-definite; with ``A @ v``, or the function v ↦ Av.
        b: right-hand side, (P,).
        root: v ↦ L v, symmetric positive definite.
        solver: a matrix-free solver with its options bound.
        x0: must be None; there for the common signature.
        damping: λ ≥ 0, in units of C.

    Returns:
        A `Solution` whose residual and model value are those of the system in y; its curvature is xᵀ(A + λI)x, as
        everywhere.

    Raises:
        ValueError: if ``x0`` is given.
    """
    if x0 is not None:
        raise ValueError("x0 must be None with root: the solver has other coordinates than those of x. Leave x0 out")
    solution = solver(_Whitened(product_of(A), root), root(b), damping=damping)
    x = root(solution.x)
    extra = damping * (dot_in_double(x, x) - dot_in_double(solution.x, solution.x))
    solution = replace(solution, x=x, curvature=solution.curvature + extra)
    if bool(torch.isfinite(x).all()):
        return solution
    return replace(solution, status=Status.NON_FINITE, statuses=(Status.NON_FINITE,) * len(solution.statuses))
