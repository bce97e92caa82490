"""Solvers for (A + λI) x = b with A symmetric positive semi-definite.

A solver is a function ``solver(A, b, *, x0=None, damping=0.0, …) → Solution``; to choose its options, bind them with
``functools.partial(conjugate_gradient, max_iterations=20)``. ``A`` is anything with ``A @ v``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from math import inf, nan
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "LinearOperator",
    "Solution",
    "Solver",
    "Status",
    "conjugate_gradient",
    "dense_solve",
    "solve",
    "solve_in_metric",
]


class LinearOperator(Protocol):
    """What the solvers ask of A: its product with (P,) or (P, K)."""

    def __matmul__(self, v: Tensor, /) -> Tensor: ...


class Status(Enum):
    """How a solve ended. ``x`` is finite after every status but ``NON_FINITE``, and zero where nothing was found.

    * ``CONVERGED``: the residual of x, as it is returned, is within the tolerance, to the rounding of its dtype; or
      the quadratic model has come to rest (``progress_tolerance``); or x is the pseudo-inverse's (``"eigh"``).
    * ``ITERATION_LIMIT``: x is the last iterate.
    * ``NEGATIVE_CURVATURE``: A + λI has a direction of negative curvature; x is the last iterate before it.
    * ``BREAKDOWN``: no further digit can be had (a singular system, a preconditioner that is not positive, a solution
      smaller than the numbers of its dtype); x is the last good iterate.
    * ``NON_FINITE``: b, x₀, a product or its square is not finite, or the solution is larger than the numbers of its
      dtype.
    """

    CONVERGED = "converged"
    ITERATION_LIMIT = "iteration limit"
    NEGATIVE_CURVATURE = "negative curvature"
    BREAKDOWN = "breakdown"
    NON_FINITE = "non-finite"


@dataclass(frozen=True)
class Solution:
    """What a solve found, and what it knows without another product.

    Attributes:
        x: the solution, (P,) or (P, K). After negative curvature or breakdown, the best iterate before it.
        status: how it ended; for several right-hand sides the worst of ``statuses``.
        statuses: one per right-hand side.
        iterations: products with A in the main loop (the largest count over right-hand sides).
        residual_norm: ‖b − (A + λI)x‖ / ‖b‖, () or (K,); 0 for b = 0.
        curvature: xᵀ(A + λI)x = xᵀ(b − r), () or (K,).
        model_value: ½xᵀ(A + λI)x − bᵀx = −½xᵀ(b + r), () or (K,); what the quadratic falls by from x = 0.
    """

    x: Tensor
    status: Status
    statuses: tuple[Status, ...]
    iterations: int
    residual_norm: Tensor
    curvature: Tensor
    model_value: Tensor


class Solver(Protocol):
    """A solver with its options bound."""

    def __call__(self, A: Any, b: Tensor, /, *, x0: Tensor | None = None, damping: float = 0.0) -> Solution:
        """Solve (A + λI) x = b."""
        ...


_ORDER = [
    Status.CONVERGED,
    Status.ITERATION_LIMIT,
    Status.BREAKDOWN,
    Status.NEGATIVE_CURVATURE,
    Status.NON_FINITE,
]
_CODE = {status: code for code, status in enumerate(_ORDER)}
_RUNNING = -1
_DENSE_RTOL = 1e-6  # what a factorisation in float64 leaves more of has met a singular matrix
_DRIFT = 0.1  # the true residual and the recurrence differ by more than this part: they are two different vectors


def _check_system(b: Tensor, x0: Tensor | None, damping: float) -> None:
    if b.ndim not in (1, 2) or not b.is_floating_point():
        raise ValueError(f"b must be a floating-point tensor of shape (P,) or (P, K), got {b.dtype} {tuple(b.shape)}")
    if b.ndim == 2 and b.shape[1] == 0:
        raise ValueError(f"b must have at least one column, got {tuple(b.shape)}")
    if x0 is not None and x0.shape != b.shape:
        raise ValueError(f"x0 must have the shape {tuple(b.shape)} of b, got {tuple(x0.shape)}")
    if x0 is not None and x0.dtype != b.dtype:
        raise ValueError(f"x0 must have the dtype {b.dtype} of b, got {x0.dtype}")
    if not 0 <= damping < inf:
        raise ValueError(f"damping must be a finite number ≥ 0, got {damping}")


def _library(device: torch.device) -> Any:
    return np if device.type == "cpu" else torch


def _power_of_two(B: Tensor) -> tuple[Tensor, Tensor]:
    """Per column the power of two below its largest entry, and whether that is finite; (P, K) → two of (K,).

    Dividing by it changes no digit. It is 1 where the column is zero or not finite.
    """
    largest = B.abs().amax(0) if len(B) else B.new_zeros(B.shape[1])
    power = largest / (2 * torch.frexp(largest).mantissa)  # no logarithm, which rounds up at the largest number
    return torch.where(power > 0, power, 1.0), torch.isfinite(largest)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Columnwise inner products in float64, where float32 would underflow on small A: (P, K), (P, K) → (K,)."""
    return (x.double() * y.double()).sum(0)


def _norm(x: Tensor) -> Tensor:
    """Columnwise norms whose squares cannot overflow: (P, K) → (K,)."""
    return torch.linalg.vector_norm(x, dim=0, dtype=torch.float64)


def not_finite(b: Tensor) -> Solution:
    """What a solver says of a system whose right-hand side b, (P,), is not finite; no product is spent on it."""
    number = b.new_full((), nan, dtype=torch.float64)
    status = Status.NON_FINITE
    return Solution(torch.full_like(b, nan), status, (status,), 0, number, number, number)


def norm(v: Tensor) -> Tensor:
    """‖v‖ of a vector (P,), () in float64, though the squares of its entries be no numbers."""
    if v.dtype is not torch.float64:  # which holds the squares of all others
        return torch.linalg.vector_norm(v, dtype=torch.float64)
    scale = _power_of_two(v.unsqueeze(1))[0][0]
    return torch.linalg.vector_norm(v / scale) * scale


def _gram(v: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columnwise v·v, v·w and w·w in float64, in one pass: (P, K), (P, K) → three of (K,)."""
    both = torch.stack([v, w]).double()
    gram = torch.bmm(both.permute(2, 0, 1), both.permute(2, 1, 0))
    return gram[:, 0, 0], gram[:, 0, 1], gram[:, 1, 1]


def _finish(
    b: Tensor,
    x: Tensor,
    r: Tensor,
    state: Tensor,
    iterations: Any,
    *,
    scale: Tensor,
    dtype: torch.dtype,
    rtol: float,
    product: Callable[[Tensor], Tensor],
    single: bool,
) -> Solution:
    """The solution, in ``dtype``, of a system whose b, x and r are columns divided by ``scale``.

    Where it leaves the numbers of the dtype, the status is that of what is returned, for one more ``product``.
    """
    norm_b = _dot(b, b).sqrt()
    answer = (x * scale).to(dtype)
    kind = torch.finfo(dtype)
    largest = answer.abs().amax(0) if len(b) else answer.new_zeros(b.shape[1])
    faint = torch.minimum(largest, largest / scale) < kind.tiny / kind.eps  # the smallest entries lose digits
    overflow = ~(largest < inf)
    if bool((faint | overflow).any()):
        faint = faint & (state == _CODE[Status.CONVERGED]) & x.any(0)
        overflow = overflow & (state != _CODE[Status.NON_FINITE])
        x = torch.where(faint, answer.to(x.dtype) / scale, x)
        r = torch.where(faint, b - product(torch.where(faint, x, 0.0)), r)
        worse = faint & ~(_norm(r) <= (rtol + 32 * kind.eps) * norm_b)
        state = torch.where(worse, _CODE[Status.BREAKDOWN], state)
        state = torch.where(overflow, _CODE[Status.NON_FINITE], state)
    residual = torch.where(norm_b > 0, _dot(r, r).sqrt() / torch.where(norm_b > 0, norm_b, 1.0), 0.0)
    factor = scale.double()  # twice, and not its square, which may be no number where the product is one
    curvature = _dot(x, b - r) * factor * factor
    model_value = -0.5 * _dot(x, b + r) * factor * factor
    x = answer
    statuses = tuple(_ORDER[code] for code in state.tolist())
    if single:
        x, residual, curvature, model_value = x[:, 0], residual[0], curvature[0], model_value[0]
    worst = max(statuses, key=_ORDER.index)
    return Solution(x, worst, statuses, int(iterations.max()), residual, curvature, model_value)


@torch.no_grad()
def conjugate_gradient(
    A: LinearOperator,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    damping: float = 0.0,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    max_iterations: int = 100,
    rtol: float = 1e-6,
    progress_tolerance: float | None = None,
    residual_refresh: int = 50,
    sync_every: int | None = None,
) -> Solution:
    """Solve (A + λI) x = b by preconditioned conjugate gradients (Hestenes & Stiefel 1952).

    What differs from the textbook:

    1. Every test is relative to the scale of the problem: scaling A or b changes neither iterations nor answer.
    2. Several right-hand sides share each product A @ (P, K), and each stops on its own account.
    3. Nothing is divided by without being tested: pᵀ(A + λI)p below −ε‖p‖‖(A + λI)p‖ is reported as negative
       curvature, within ±ε of zero as breakdown; in both cases the last good iterate is returned.
    4. The quadratic model, the curvature and the residual of the solution come from vectors that CG holds anyway.
    5. From x₀ = 0 no product is spent on the first residual.
    6. Where a refreshed residual differs from the recurrence by more than a tenth, the direction starts again from
       steepest descent: β would compare two different residuals, and the iteration would diverge in float32.
    7. The few numbers of each iteration are NumPy's on a CPU, and stay on the device elsewhere.
    8. An x₀ that the quadratic model finds worse than zero is not used: bᵀx ≥ 0 for every x on a positive A.
    9. What the recurrence calls converged after a warm start is looked at: it may have lost the digits of b against
       those of Ax₀. Where the true residual is not within the tolerance, the iteration starts again from there.

    Args:
        A: symmetric positive semi-definite; anything with ``A @ v`` for v of the shape of b.
        b: right-hand side(s), (P,) or (P, K).
        x0: where to start, zero by default (a warm start costs one more product, and one where it has converged).
        damping: λ ≥ 0, added to A.
        preconditioner: r ↦ C⁻¹r, a fixed symmetric positive definite approximation of (A + λI)⁻¹.
        max_iterations: the most products with A.
        rtol: stop where ‖r‖ ≤ rtol·‖b‖.
        progress_tolerance: stop as well where the quadratic model φ has fallen, over the last
            k = max(10, i/10) of i iterations, by less than k·progress_tolerance·|φ| (Martens 2010, section 4.4,
            who takes 5e-4).
        residual_refresh: recompute the true residual b − (A + λI)x every so many iterations (one more product).
        sync_every: look whether all is done every so many iterations; 1 on CPU, 8 on a GPU by default. In between,
            finished columns stand still, so the answer does not depend on it.

    Returns:
        A `Solution`; its vectors have the dtype of ``b``. No random number is drawn.

    Raises:
        ValueError: if an argument has the wrong shape or is out of its range.
    """
    _check_system(b, x0, damping)
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    if not rtol >= 0:
        raise ValueError(f"rtol must be ≥ 0, got {rtol}")
    if residual_refresh < 1:
        raise ValueError(f"residual_refresh must be at least 1, got {residual_refresh}")
    if sync_every is not None and sync_every < 1:
        raise ValueError(f"sync_every must be at least 1, got {sync_every}")
    single = b.ndim == 1
    B = b.unsqueeze(1) if single else b

    def shaped(f: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        return f(v.squeeze(1)).unsqueeze(1) if single else f(v)

    def product(v: Tensor) -> Tensor:
        w = shaped(lambda u: A @ u, v)
        return w.add(v, alpha=damping) if damping else w

    epsilon = 8 * torch.finfo(b.dtype).eps
    sync_every = sync_every or (8 if b.is_cuda else 1)
    columns = B.shape[1]
    # One power of two per column brings ‖b‖ near 1: squares neither overflow nor underflow, and no digit changes.
    scale, finite_b = _power_of_two(B)
    B = torch.where(finite_b, B / scale, 0.0)

    # 7. On a few numbers an operation of NumPy costs a fifth of PyTorch's, and a look at them nothing.
    xp = _library(b.device)

    def numbers(v: Tensor) -> Any:
        return v.numpy() if xp is np else v

    def tensor(v: Any) -> Tensor:
        return torch.from_numpy(v) if xp is np else v

    def coefficients(v: Any) -> Tensor:
        if xp is np and b.dtype is torch.float32:
            v = v.astype(np.float32)
        return tensor(v).to(b.dtype)

    def dot(v: Tensor, w: Tensor) -> Any:
        return numbers(_dot(v, w))

    def where(mask: Any, new: Tensor, old: Tensor) -> Tensor:
        return new if xp is np and mask.all() else torch.where(tensor(mask), new, old)

    norm_b = xp.sqrt(dot(B, B))
    if x0 is None:
        x = torch.zeros_like(B)
        r = B.clone()
    else:
        # for b = 0 the answer is 0, wherever one starts
        start = x0.unsqueeze(1) if single else x0
        x = torch.where(finite_b & tensor(norm_b == 0), 0.0, start / scale)
        r = B - product(x)
        unused = torch.isfinite(start).all(0) & ~(_dot(x, B + r) >= 0)  # where −½xᵀ(b + r) is above its value at zero
        x, r = torch.where(unused, 0.0, x), torch.where(unused, B, r)
    state = numbers(torch.full((columns,), _RUNNING, dtype=torch.int64, device=b.device))

    def settle(state: Any, where: Any, status: Status) -> Any:
        return xp.where((state == _RUNNING) & where, _CODE[status], state)

    rr = first = dot(r, r)
    state = settle(state, ~numbers(finite_b), Status.NON_FINITE)
    state = settle(state, ~xp.isfinite(rr), Status.NON_FINITE)
    state = settle(state, xp.sqrt(rr) <= rtol * norm_b, Status.CONVERGED)
    z = shaped(preconditioner, r) if preconditioner else r
    p = z.clone()
    rz = dot(r, z)
    state = settle(state, ~xp.isfinite(rz), Status.NON_FINITE)
    state = settle(state, ~(rz > 0), Status.BREAKDOWN)
    model: list[Any] = [-0.5 * dot(x, B + r)]

    iterations = xp.zeros_like(state)
    with np.errstate(all="ignore"):  # what is divided by zero is not taken
        for iteration in range(1, max_iterations + 1):
            running = state == _RUNNING
            if (iteration - 1) % sync_every == 0 and not running.any():
                break
            iterations = iterations + running
            Ap = product(p)
            pp, pAp, ApAp = (numbers(v) for v in _gram(p, Ap))
            bound = epsilon * xp.sqrt(pp) * xp.sqrt(ApAp)
            usual = (pAp > bound) & (pAp < inf)
            if not (xp is np and usual.all()):
                state = settle(state, ~xp.isfinite(pAp + ApAp), Status.NON_FINITE)
                state = settle(state, pAp < -bound, Status.NEGATIVE_CURVATURE)
                state = settle(state, ~usual, Status.BREAKDOWN)
                running = state == _RUNNING
            alpha = coefficients(xp.where(running, rz / pAp, 0.0))
            x = torch.addcmul(x, alpha, p)  # α = 0 where a column stands still, and p is finite
            r = recurred = where(running, torch.addcmul(r, alpha, Ap, value=-1), r)
            goes_on = True
            if iteration % residual_refresh == 0:
                r = where(running, B - product(x), r)
                goes_on = ~numbers(_norm(r - recurred) > _DRIFT * _norm(recurred))
            rr = dot(r, r)
            usual = (xp.sqrt(rr) > rtol * norm_b) & (rr < inf)
            if not (xp is np and usual.all()):
                state = settle(state, ~xp.isfinite(rr), Status.NON_FINITE)
                state = settle(state, ~usual, Status.CONVERGED)
            if progress_tolerance is not None:
                model.append(-0.5 * dot(x, B + r))
                k = max(10, iteration // 10)
                if iteration > k:
                    small = model[-1] - model[-1 - k] >= k * progress_tolerance * model[-1]
                    state = settle(state, (model[-1] < 0) & small, Status.CONVERGED)
            z, rz_next = r, rr
            if preconditioner:
                z = shaped(preconditioner, r)
                rz_next = dot(r, z)
                state = settle(state, ~xp.isfinite(rz_next), Status.NON_FINITE)
                state = settle(state, ~(rz_next > 0), Status.BREAKDOWN)
            running = state == _RUNNING
            beta = coefficients(xp.where(running & goes_on, rz_next / rz, 0.0))
            p = where(running, torch.addcmul(z, beta, p), p)
            rz = rz_next
    state = xp.where(state == _RUNNING, _CODE[Status.ITERATION_LIMIT], state)
    if x0 is not None:
        claimed = (state == _CODE[Status.CONVERGED]) & (iterations > 0) & (xp.sqrt(rr) <= rtol * norm_b)
        if claimed.any():
            r = where(claimed, B - product(x), r)
            rr = dot(r, r)
            claimed = claimed & ~(xp.sqrt(rr) <= (rtol + 4 * epsilon) * norm_b)
            left = max_iterations - int(iterations.max())
            if left and (claimed & (rr < 0.25 * first)).any():
                again = conjugate_gradient(
                    A,
                    b,
                    x0=(x * scale).view_as(b),
                    damping=damping,
                    preconditioner=preconditioner,
                    max_iterations=left,
                    rtol=rtol,
                    progress_tolerance=progress_tolerance,
                    residual_refresh=residual_refresh,
                    sync_every=sync_every,
                )
                return replace(again, iterations=max_iterations - left + again.iterations)
            state = xp.where(claimed, _CODE[Status.BREAKDOWN if left else Status.ITERATION_LIMIT], state)
    x = torch.where(finite_b, x, torch.nan)
    return _finish(
        B,
        x,
        r,
        tensor(state),
        iterations,
        scale=scale,
        dtype=b.dtype,
        rtol=rtol,
        product=product,
        single=single,
    )


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
        ValueError: if an argument has the wrong shape or is out of its range.
    """
    _check_system(b, x0, damping)
    if method not in ("cholesky", "eigh"):
        raise ValueError(f"method must be 'cholesky' or 'eigh', got {method!r}")
    matrix = A if isinstance(A, Tensor) else A.dense()
    if matrix.shape != (b.shape[0], b.shape[0]):
        raise ValueError(
            f"A must be {b.shape[0]} × {b.shape[0]} for b of shape {tuple(b.shape)}, got {tuple(matrix.shape)}"
        )
    single = b.ndim == 1
    B = (b.unsqueeze(1) if single else b).double()
    scale, finite_b = _power_of_two(B)
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
    else:
        values, vectors = torch.linalg.eigh(M)
        threshold = values.abs().amax() * (rcond if rcond is not None else len(M) * torch.finfo(matrix.dtype).eps)
        if bool((values < -threshold).any()):
            status = Status.NEGATIVE_CURVATURE
        shifted = torch.where(values > threshold, values, 0.0) + damping
        inverse = torch.where(shifted > 0, 1 / torch.where(shifted > 0, shifted, 1.0), 0.0)
        x = vectors @ (inverse.unsqueeze(1) * (vectors.T @ B))
    r = B - damped @ x
    state = torch.full((B.shape[1],), _CODE[status], device=b.device)
    if method == "cholesky" and status is Status.CONVERGED:
        failing = ~(_norm(r) <= _DENSE_RTOL * _norm(B))
        x, r = torch.where(failing, 0.0, x), torch.where(failing, B, r)
        state = torch.where(failing, _CODE[Status.BREAKDOWN], state)
    state = torch.where(finite_b, state, _CODE[Status.NON_FINITE])
    x = torch.where(finite_b, x, torch.nan)
    return _finish(
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


@dataclass(frozen=True)
class _Whitened:
    """L A L."""

    A: LinearOperator
    root: Callable[[Tensor], Tensor]

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.root(self.A @ self.root(v))


def solve_in_metric(
    A: LinearOperator,
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
        A: symmetric positive semi-definite.
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
        raise ValueError("x0 must be None with root: a start for x is none for y, for want of L⁻¹")
    solution = solver(_Whitened(A, root), root(b), damping=damping)
    x = root(solution.x)
    extra = damping * (_dot(x, x) - _dot(solution.x, solution.x))
    solution = replace(solution, x=x, curvature=solution.curvature + extra)
    if bool(torch.isfinite(x).all()):
        return solution
    return replace(solution, status=Status.NON_FINITE, statuses=(Status.NON_FINITE,) * len(solution.statuses))


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
