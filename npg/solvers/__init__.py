"""Solvers for (A + λI) x = b with A symmetric positive semi-definite.

A solver is a function ``solver(A, b, *, x0=None, damping=0.0, …) → Solution``; to choose its options, bind them with
``functools.partial(conjugate_gradient, max_iterations=20)``. ``A`` is anything with ``A @ v``.
"""

from npg.solvers.cg import conjugate_gradient
from npg.solvers.dense import dense_solve
from npg.solvers.metric import solve_in_metric
from npg.solvers.solution import LinearOperator, Solution, Solver, Status, norm, not_finite

__all__ = [
    "LinearOperator",
    "Solution",
    "Solver",
    "Status",
    "conjugate_gradient",
    "dense_solve",
    "norm",
    "not_finite",
    "solve_in_metric",
]
