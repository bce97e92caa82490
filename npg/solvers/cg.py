"""Preconditioned conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npg.solvers.solution import (
    CODE,
    RUNNING,
    LinearOperator,
    Solution,
    Status,
    check_system,
    dot_in_double,
    finish,
    library,
    norms_in_double,
    power_of_two,
)

__all__ = ["conjugate_gradient"]


_DRIFT = 0.1  # the true residual and the recurrence differ by more than this part: they are two different vectors


def _gram(v: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columnwise v·v, v·w and w·w in float64, in one pass: (P, K), (P, K) → three of (K,)."""
    both = torch.stack([v, w]).double()
    gram = torch.bmm(both.permute(2, 0, 1), both.permute(2, 1, 0))
    return gram[:, 0, 0], gram[:, 0, 1], gram[:, 1, 1]


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
    check_system(b, x0, damping)
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
    scale, finite_b = power_of_two(B)
    B = torch.where(finite_b, B / scale, 0.0)

    # 7. On a few numbers an operation of NumPy costs a fifth of PyTorch's, and a look at them nothing.
    xp = library(b.device)

    def numbers(v: Tensor) -> Any:
        return v.numpy() if xp is np else v

    def tensor(v: Any) -> Tensor:
        return torch.from_numpy(v) if xp is np else v

    def coefficients(v: Any) -> Tensor:
        if xp is np and b.dtype is torch.float32:
            v = v.astype(np.float32)
        return tensor(v).to(b.dtype)

    def dot(v: Tensor, w: Tensor) -> Any:
        return numbers(dot_in_double(v, w))

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
        unused = torch.isfinite(start).all(0) & ~(
            dot_in_double(x, B + r) >= 0
        )  # where −½xᵀ(b + r) is above its value at zero
        x, r = torch.where(unused, 0.0, x), torch.where(unused, B, r)
    state = numbers(torch.full((columns,), RUNNING, dtype=torch.int64, device=b.device))

    def settle(state: Any, where: Any, status: Status) -> Any:
        return xp.where((state == RUNNING) & where, CODE[status], state)

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
            running = state == RUNNING
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
                running = state == RUNNING
            alpha = coefficients(xp.where(running, rz / pAp, 0.0))
            x = torch.addcmul(x, alpha, p)  # α = 0 where a column stands still, and p is finite
            r = recurred = where(running, torch.addcmul(r, alpha, Ap, value=-1), r)
            goes_on = True
            if iteration % residual_refresh == 0:
                r = where(running, B - product(x), r)
                goes_on = ~numbers(norms_in_double(r - recurred) > _DRIFT * norms_in_double(recurred))
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
            running = state == RUNNING
            beta = coefficients(xp.where(running & goes_on, rz_next / rz, 0.0))
            p = where(running, torch.addcmul(z, beta, p), p)
            rz = rz_next
    state = xp.where(state == RUNNING, CODE[Status.ITERATION_LIMIT], state)
    if x0 is not None:
        claimed = (state == CODE[Status.CONVERGED]) & (iterations > 0) & (xp.sqrt(rr) <= rtol * norm_b)
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
            state = xp.where(claimed, CODE[Status.BREAKDOWN if left else Status.ITERATION_LIMIT], state)
    x = torch.where(finite_b, x, torch.nan)
    return finish(
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
