"""Preconditioned conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from npg.checks import number, whole
from npg.solvers.solution import (
    CODE,
    RUNNING,
    AnyOperator,
    Solution,
    Status,
    check_system,
    column_units,
    dot_in_double,
    finish,
    library,
    norms_in_double,
    product_of,
)

__all__ = ["conjugate_gradient"]


_DRIFT = 0.1  # the true residual and the recurrence differ by more than this part: they are two different vectors


def _gram(v: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columnwise v·v, v·w and w·w in float64, in one pass: (P, K), (P, K) → three of (K,)."""
    both = torch.stack([v, w]).double()
    gram = torch.bmm(both.permute(2, 0, 1), both.permute(2, 1, 0))
    return gram[:, 0, 0], gram[:, 0, 1], gram[:, 1, 1]


class _Stop(NamedTuple):
    """When to stop, and when to look whether to."""

    max_iterations: int
    rtol: float
    progress_tolerance: float | None
    residual_refresh: int
    sync_every: int


class _System:
    """(A + λI) x = b in columns, each divided by a power of two, and the arithmetic on a few numbers for each of them.

    7. On a few numbers an operation of NumPy costs a fifth of PyTorch's, and a look at them nothing.
    """

    def __init__(
        self, A: AnyOperator, b: Tensor, damping: float, preconditioner: Callable[[Tensor], Tensor] | None
    ) -> None:
        self.apply, self.b, self.damping = product_of(A), b, damping
        self.preconditioner = None if preconditioner is None else product_of(partial(preconditioner), "preconditioner")
        self.single = b.ndim == 1
        B = b.unsqueeze(1) if self.single else b
        # One power of two per column brings ‖b‖ near 1: squares neither overflow nor underflow, and no digit changes.
        self.scale, self.finite = column_units(B)
        self.B = torch.where(self.finite, B / self.scale, 0.0)
        self.xp = library(b.device)
        self.norm_b = self.xp.sqrt(self.dot(self.B, self.B))

    def product(self, v: Tensor) -> Tensor:
        """(A + λI) v."""
        w = self.apply(v.squeeze(1)).unsqueeze(1) if self.single else self.apply(v)
        return w.add(v, alpha=self.damping) if self.damping else w

    def precondition(self, r: Tensor) -> Tensor:
        """C⁻¹ r, or r itself."""
        if self.preconditioner is None:
            return r
        z = self.preconditioner(r.squeeze(1) if self.single else r)
        return z.unsqueeze(1) if self.single else z

    def start(self, x0: Tensor | None) -> tuple[Tensor, Tensor]:
        """The first x, and its residual."""
        B = self.B
        if x0 is None:
            return torch.zeros_like(B), B.clone()
        # for b = 0 the answer is 0, wherever one starts
        start = x0.unsqueeze(1) if self.single else x0
        x = torch.where(self.finite & self.tensor(self.norm_b == 0), 0.0, start / self.scale)
        r = B - self.product(x)
        worse = ~(dot_in_double(x, B + r) >= 0)  # −½xᵀ(b + r) is above its value at zero
        unused = torch.isfinite(start).all(0) & worse
        return torch.where(unused, 0.0, x), torch.where(unused, B, r)

    def numbers(self, v: Tensor) -> Any:
        """One for each column, from a tensor."""
        return v.numpy() if self.xp is np else v

    def tensor(self, v: Any) -> Tensor:
        """And back."""
        return torch.from_numpy(v) if self.xp is np else v

    def coefficients(self, v: Any) -> Tensor:
        """Back, in the dtype of b."""
        if self.xp is np and self.b.dtype is torch.float32:
            v = v.astype(np.float32)
        return self.tensor(v).to(self.b.dtype)

    def dot(self, v: Tensor, w: Tensor) -> Any:
        """Columnwise inner products."""
        return self.numbers(dot_in_double(v, w))

    def where(self, mask: Any, new: Tensor, old: Tensor) -> Tensor:
        """By columns."""
        return new if self.xp is np and mask.all() else torch.where(self.tensor(mask), new, old)

    def settle(self, state: Any, where: Any, status: Status) -> Any:
        """The states, with this status where a column is still running."""
        return self.xp.where((state == RUNNING) & where, CODE[status], state)


@torch.no_grad()
def conjugate_gradient(
    A: AnyOperator,
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
        A: symmetric positive semi-definite; anything with ``A @ v`` for v of the shape of b, or the function v ↦ Av.
        b: right-hand side(s), (P,) or (P, K).
        x0: where to start, zero by default (a warm start costs one more product, and one where it has converged).
        damping: λ ≥ 0, added to A.
        preconditioner: r ↦ C⁻¹r, a fixed symmetric positive definite approximation of (A + λI)⁻¹.
        max_iterations: the most iterations, each of one product with A. One more each is spent on an ``x0``, on every
            refresh of the residual, on the look of 9. and on the start after it, and on a solution whose smallest
            entries are below the numbers of its dtype.
        rtol: stop where ‖r‖ ≤ rtol·‖b‖.
        progress_tolerance: stop as well where the quadratic model φ has fallen, over the last
            k = max(10, i/10) of i iterations, by less than k·progress_tolerance·|φ| (Martens 2010, section 4.4,
            who takes 5e-4).
        residual_refresh: recompute the true residual b − (A + λI)x every so many iterations (one more product).
        sync_every: look whether all is done every so many iterations; 1 on CPU and 8 elsewhere by default. In between,
            finished columns stand still, so the answer does not depend on it.

    Returns:
        A `Solution`; its vectors have the dtype of ``b``. No random number is drawn.

    Raises:
        TypeError: if A has no products, or b or a product is no tensor.
        ValueError: if an argument has the wrong shape or is out of its range.
    """
    check_system(b, x0, damping)
    if not (preconditioner is None or callable(preconditioner)):
        raise TypeError(
            f"preconditioner must be a function r ↦ C⁻¹r, got {type(preconditioner).__name__}: for a matrix, "
            "lambda r: torch.linalg.solve(C, r)"
        )
    whole("max_iterations", max_iterations, 1)
    number("rtol", rtol, 0)
    if progress_tolerance is not None:
        number("progress_tolerance", progress_tolerance, 0)
    whole("residual_refresh", residual_refresh, 1)
    if sync_every is not None:
        whole("sync_every", sync_every, 1)
    sync_every = sync_every or (1 if b.device.type == "cpu" else 8)
    stop = _Stop(max_iterations, rtol, progress_tolerance, residual_refresh, sync_every)
    return _solve(_System(A, b, damping, preconditioner), x0, stop)


def _solve(system: _System, x0: Tensor | None, stop: _Stop) -> Solution:
    b, B, xp, norm_b, product = system.b, system.B, system.xp, system.norm_b, system.product
    numbers, coefficients, dot, where, settle = (
        system.numbers, system.coefficients, system.dot, system.where, system.settle
    )  # fmt: skip
    epsilon, rtol = 8 * torch.finfo(b.dtype).eps, stop.rtol
    x, r = system.start(x0)
    state = numbers(torch.full((B.shape[1],), RUNNING, dtype=torch.int64, device=b.device))
    rr = first = dot(r, r)
    state = settle(state, ~numbers(system.finite), Status.NON_FINITE)
    state = settle(state, ~xp.isfinite(rr), Status.NON_FINITE)
    state = settle(state, xp.sqrt(rr) <= rtol * norm_b, Status.CONVERGED)
    z = system.precondition(r)
    p = z.clone()
    rz = dot(r, z)
    state = settle(state, ~xp.isfinite(rz), Status.NON_FINITE)
    state = settle(state, ~(rz > 0), Status.BREAKDOWN)
    model: list[Any] = []

    iterations = xp.zeros_like(state)
    with np.errstate(all="ignore"):  # what is divided by zero is not taken
        for iteration in range(1, stop.max_iterations + 1):
            running = state == RUNNING
            if (iteration - 1) % stop.sync_every == 0 and not running.any():
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
                running = state == RUNNING
            alpha = coefficients(xp.where(running, rz / pAp, 0.0))
            x = torch.addcmul(x, alpha, p)  # α = 0 where a column stands still, and p is finite
            r = recurred = where(running, torch.addcmul(r, alpha, Ap, value=-1), r)
            goes_on = True
            if iteration % stop.residual_refresh == 0:
                r = where(running, B - product(x), r)
                goes_on = ~numbers(norms_in_double(r - recurred) > _DRIFT * norms_in_double(recurred))
            rr = dot(r, r)
            usual = (xp.sqrt(rr) > rtol * norm_b) & (rr < inf)
            if not (xp is np and usual.all()):
                state = settle(state, ~xp.isfinite(rr), Status.NON_FINITE)
                state = settle(state, ~usual, Status.CONVERGED)
            if stop.progress_tolerance is not None:
                model.append(-0.5 * dot(x, B + r))
                k = max(10, iteration // 10)
                if iteration > k:
                    small = model[-1] - model[-1 - k] >= k * stop.progress_tolerance * model[-1]
                    state = settle(state, (model[-1] < 0) & small, Status.CONVERGED)
            z, rz_next = r, rr
            if system.preconditioner is not None:
                z = system.precondition(r)
                rz_next = dot(r, z)
                state = settle(state, ~xp.isfinite(rz_next), Status.NON_FINITE)
                state = settle(state, ~(rz_next > 0), Status.BREAKDOWN)
            running = state == RUNNING
            beta = coefficients(xp.where(running & goes_on, rz_next / rz, 0.0))
            p = where(running, torch.addcmul(z, beta, p), p)
            rz = rz_next
    state = xp.where(state == RUNNING, CODE[Status.ITERATION_LIMIT], state)
    if x0 is not None:
        claimed = (state == CODE[Status.CONVERGED]) & (iterations > 0) & (xp.sqrt(rr) <= rtol * norm_b)
        if claimed.any():
            return _looked_at(system, x, r, state, iterations, claimed, first, stop)
    return _finished(system, x, r, state, iterations, rtol)


def _looked_at(
    system: _System, x: Tensor, r: Tensor, state: Any, iterations: Any, claimed: Any, first: Any, stop: _Stop
) -> Solution:
    """9. What the recurrence calls converged, by its true residual; from there on again where it is not."""
    xp, epsilon = system.xp, 8 * torch.finfo(system.b.dtype).eps
    r = system.where(claimed, system.B - system.product(x), r)
    rr = system.dot(r, r)
    claimed = claimed & ~(xp.sqrt(rr) <= (stop.rtol + 4 * epsilon) * system.norm_b)
    taken = int(iterations.max())
    left = stop.max_iterations - taken
    if left and (claimed & (rr < 0.25 * first)).any():
        again = _solve(system, (x * system.scale).view_as(system.b), stop._replace(max_iterations=left))
        return replace(again, iterations=taken + again.iterations)
    state = xp.where(claimed, CODE[Status.BREAKDOWN if left else Status.ITERATION_LIMIT], state)
    return _finished(system, x, r, state, iterations, stop.rtol)


def _finished(system: _System, x: Tensor, r: Tensor, state: Any, iterations: Any, rtol: float) -> Solution:
    return finish(
        system.B,
        torch.where(system.finite, x, torch.nan),
        r,
        system.tensor(state),
        iterations,
        scale=system.scale,
        dtype=system.b.dtype,
        rtol=rtol,
        product=system.product,
        single=system.single,
    )
