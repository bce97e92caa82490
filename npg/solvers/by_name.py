"""A solver by its name."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from npg.solvers.cg import conjugate_gradient
from npg.solvers.dense import dense_solve
from npg.solvers.solution import Solution

__all__ = ["solve"]


def solve(A: Any, b: Tensor, *, method: Literal["cg", "cholesky", "eigh"] = "cg", **options: Any) -> Solution:
    """Solve (A + λI) x = b by the named method: `conjugate_gradient`, or `dense_solve` for a small P.

    Raises:
        ValueError: if the method is unknown.
    """
    if method == "cg":
        return conjugate_gradient(A, b, **options)
    if method in ("cholesky", "eigh"):
        return dense_solve(A, b, method=method, **options)
    raise ValueError(f"method must be 'cg', 'cholesky' or 'eigh', got {method!r}")
