"""The matrix itself: Cholesky's factors, or the eigenvectors."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from npg.checks import number
from npg.solvers.solution import CODE, Solution, Status, check_system, column_units, finish, norms_in_double

__all__ = ["dense_solve"]


_DENSE_RTOL = 1e-6  # what a factorisation in float64 leaves more of has met a singular matrix


def _skew(matrix: Tensor) -> Tensor:
    return (matrix - matrix.T).abs().amax()


@torch.no_grad()
def dense_solve(
    A: Any,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    damping: float = 0.0,
    method: Literal["cholesky", "eigh"] = "cholesky",
    rcond: float | None = None,
) -> Solution:
    """Solve (A + λI) x = b with the matrix itself, in float64: O(P²) memory, O(P³) time.

    Args:
        A: a matrix (P, P), or anything with a method ``dense()``.
        b: right-hand side(s), (P,) or (P, K).
        x0: unused; there for the common signature.
        damping: λ ≥ 0, added to A.
        method: ``"cholesky"``, for a positive definite matrix (otherwise, and where the matrix is so near to a
            singular one that the residual stays above 1e-6, the status is ``BREAKDOWN`` and x = 0);
            ``"eigh"``, the pseudo-inverse: directions with eigenvalues of A below ``rcond`` times the largest one
            are left out unless damped. Eigenvalues below −rcond·max are reported as negative curvature.
        rcond: the relative threshold of ``"eigh"``; by default P times machine precision of A's dtype.

    Raises:
        TypeError: if A is no matrix and has none.
        ValueError: if an argument has the wrong shape or is out of its range, or A is complex or not symmetric.
    """
    check_system(b, x0, damping)
    if method not in ("cholesky", "eigh"):
        raise ValueError(f"method must be 'cholesky' or 'eigh', got {method!r}")
    if rcond is not None:
        number("rcond", rcond, 0)
    if not isinstance(A, Tensor) and not hasattr(A, "dense"):
        raise TypeError(
            f"A must be a matrix, or have a method dense(), got {type(A).__name__}: conjugate_gradient(A, b) needs its "
            "products alone"
        )
    matrix = A if isinstance(A, Tensor) else A.dense()
    if matrix.shape != (b.shape[0], b.shape[0]):
        raise ValueError(
            f"A must be {b.shape[0]} × {b.shape[0]} for b of shape {tuple(b.shape)}, got {tuple(matrix.shape)}"
        )
    if matrix.is_complex():
        raise ValueError(
            f"A must be real, got {matrix.dtype}: solve for the real and the imaginary parts as one vector"
        )
    precision = torch.finfo(matrix.dtype if matrix.is_floating_point() else torch.float64).eps
    if len(matrix) and bool(_skew(matrix) > precision**0.5 * matrix.abs().amax()):
        raise ValueError(
            f"A must be symmetric, its halves differ by {float(_skew(matrix)):.1e}: give (A + A.T) / 2 if meant"
        )
    single = b.ndim == 1
    B = (b.unsqueeze(1) if single else b).double()
    scale, finite_b = column_units(B)
    B = torch.where(finite_b, B / scale, 0.0)
    M = matrix.double()
    damped = M + damping * torch.eye(len(M), dtype=M.dtype, device=M.device)
    status = Status.CONVERGED
    x = torch.zeros_like(B)
    if not bool(torch.isfinite(damped).all()):
        status, x = Status.NON_FINITE, torch.full_like(B, torch.nan)
    elif method == "cholesky":
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            status = Status.BREAKDOWN
        else:
            x = torch.cholesky_solve(B, factor)
    elif len(M):
        values, vectors = torch.linalg.eigh(M)
        threshold = values.abs().amax() * (len(M) * precision if rcond is None else rcond)
        if bool((values < -threshold).any()):
            status = Status.NEGATIVE_CURVATURE
        shifted = torch.where(values > threshold, values, 0.0) + damping
        inverse = torch.where(shifted > 0, 1 / torch.where(shifted > 0, shifted, 1.0), 0.0)
        x = vectors @ (inverse.unsqueeze(1) * (vectors.T @ B))
    r = B - damped @ x
    state = torch.full((B.shape[1],), CODE[status], device=b.device)
    if method == "cholesky" and status is Status.CONVERGED:
        failing = ~(norms_in_double(r) <= _DENSE_RTOL * norms_in_double(B))
        x, r = torch.where(failing, 0.0, x), torch.where(failing, B, r)
        state = torch.where(failing, CODE[Status.BREAKDOWN], state)
    state = torch.where(finite_b, state, CODE[Status.NON_FINITE])
    x = torch.where(finite_b, x, torch.nan)
    return finish(
        B,
        x,
        r,
        state,
        torch.zeros_like(state),
        scale=scale,
        dtype=b.dtype,
        rtol=_DENSE_RTOL,
        product=lambda v: damped @ v,
        single=single,
    )
