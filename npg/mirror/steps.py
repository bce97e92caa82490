"""Steps whose length a potential's divergence measures: mirror descent, and the natural gradient that it is."""

from __future__ import annotations

from dataclasses import replace
from math import inf, isfinite

import torch
from torch import Tensor

from npg.checks import number, whole
from npg.fisher import Fisher
from npg.mirror.potentials import Function, Potential
from npg.solvers import Solution, dense_solve
from npg.step import natural_step

__all__ = ["dual_natural_step", "mirror_descent", "mirror_step", "proximal_step", "trust_region_step"]


def mirror_step(potential: Potential, theta: Tensor, gradient: Tensor, alpha: float) -> Tensor:
    """One mirror descent step, ∇G(θ⁺) = ∇G(θ) − 2α∇f(θ) (the report, equation 18; Nemirovski & Yudin 1983).

    Args:
        potential: G.
        theta: where to step from, (…, D).
        gradient: ∇f at ``theta``, (…, D).
        alpha: α > 0; the proximity term is B_G/(2α).

    Returns:
        θ⁺, (…, D).

    Raises:
        ValueError: if ``theta`` is outside the domain, or the step leaves the range of ∇G, where no minimiser exists.
    """
    number("alpha", alpha, 0, above=True)
    _check_gradient(theta, gradient)
    mu = potential.gradient(theta) - 2 * alpha * gradient
    return _to_primal(potential, mu, alpha)


def mirror_descent(potential: Potential, f: Function, theta: Tensor, alpha: float, steps: int) -> Tensor:
    """The path of ``steps`` mirror descent steps on f.

    Args:
        potential: G.
        f: θ (…, D) ↦ the mean over the leading axes of the objective, ().
        theta: where to start, (…, D).
        alpha: α > 0, as in `mirror_step`.
        steps: how many.

    Returns:
        (steps + 1, …, D), the start included.

    Raises:
        ValueError: as `mirror_step`.
    """
    whole("steps", steps, 0)
    path = [theta]
    for _ in range(steps):
        path.append(mirror_step(potential, path[-1], _slope(f, path[-1]), alpha))
    return torch.stack(path)


def dual_natural_step(potential: Potential, f: Function, theta: Tensor, alpha: float) -> Tensor:
    """One natural gradient step on f along the dual manifold, μ⁺ = μ − 2α (∇²G*(μ))⁻¹ ∇_μ f(∇G*(μ)).

    It is `npg.natural_step` on the model μ ↦ θ = ∇G*(μ) with the metric ∇²G(θ) on its outputs: their pull-back
    Jᵀ ∇²G J with J = ∇²G* = (∇²G)⁻¹ is ∇²G*. The result equals `mirror_step` (Raskutti & Mukherjee 2015, theorem 1),
    which is how one takes this step cheaply; this function is the theorem's other side.

    Args:
        potential: G.
        f: θ (…, D) ↦ the mean over the leading axes of the objective, ().
        theta: where to step from, (…, D).
        alpha: α > 0, as in `mirror_step`.

    Returns:
        θ⁺ = ∇G*(μ⁺), (…, D).

    Raises:
        ValueError: as `mirror_step`; also if the metric is singular to working precision.
    """
    number("alpha", alpha, 0, above=True)
    mu = potential.gradient(theta).detach().clone()

    def primal(parameters: dict[str, Tensor]) -> Tensor:
        return potential._inverse_gradient(parameters["mu"])

    report = natural_step(
        primal,  # type: ignore[arg-type]  # a function of no further inputs
        (),
        potential._metric,
        lambda outputs: -f(outputs),
        learning_rate=2 * alpha,
        solver=_pseudo_inverse,
        evaluate=False,
        parameters={"mu": mu},
    )
    if not (report.accepted and report.residual <= torch.finfo(mu.dtype).eps ** 0.5):
        raise ValueError(
            f"the dual natural step of alpha={alpha:g} cannot be taken: the gradient or the step is not finite, or the "
            f"metric of {potential!r} is singular to working precision there (status {report.status.value}); "
            "mirror_step takes the same step without a solve"
        )
    return _to_primal(potential, mu, alpha)


def _pseudo_inverse(F: Fisher, b: Tensor, /, *, x0: Tensor | None = None, damping: float = 0.0) -> Solution:
    """F⁺b with each coordinate in units of its own, so that none has small eigenvalues because its numbers are large.

    What is left out then is singular to working precision; a residual tells where b had a part in it.
    """
    M = F.dense()
    unit = M.diagonal().rsqrt()
    solution = dense_solve(unit[:, None] * M * unit, unit * b, method="eigh")
    return replace(solution, x=unit * solution.x)


def proximal_step(
    potential: Potential, f: Function, theta: Tensor, alpha: float, *, max_iterations: int = 100
) -> Tensor:
    """The implicit step θ⁺ = argmin f(θ') + B_G(θ', θ)/(2α): `mirror_step` with the gradient taken at its end.

    Newton's method on ∇G(θ⁺) − ∇G(θ) + 2α∇f(θ⁺) = 0 in the dual coordinates of θ⁺, with the dense Jacobian
    I + 2α ∇²f ∇²G*, shortened where it leaves the range of ∇G or does not reduce the residual.

    Args:
        potential: G.
        f: θ (D,) ↦ the objective, (); convex and twice differentiable.
        theta: where to step from, (D,).
        alpha: α > 0; the proximity term is B_G/(2α).
        max_iterations: the most Newton steps.

    Returns:
        θ⁺, (D,).

    Raises:
        ValueError: if ``theta`` is outside the domain or not a vector.
        RuntimeError: if Newton's method does not converge.
    """
    number("alpha", alpha, 0, above=True)
    _check_vector(theta)
    start = potential.gradient(theta).detach()
    slope = torch.func.grad(f)

    def residual(mu: Tensor) -> Tensor:
        return mu - start + 2 * alpha * slope(potential._inverse_gradient(mu))

    def usable(mu: Tensor) -> bool:
        try:
            potential.check_dual(mu)
        except ValueError:
            return False
        return True

    # In the units of the coordinates those with large numbers hide the others; in those of ∇²G*, which knows how far a
    # coordinate may go, none does. The residual must be small in both, beside the terms that cancel in it.
    units = torch.stack(
        [torch.ones_like(start), torch.func.jacrev(potential._inverse_gradient)(start).diagonal().sqrt()]
    )
    mu, r = start, residual(start)
    terms = (units * start).norm(dim=1) + (units * (r - mu + start)).norm(dim=1)
    terms = terms.clamp(min=torch.finfo(terms.dtype).tiny)

    def size_of(r: Tensor) -> float:
        return float(((units * r).norm(dim=1) / terms).max())

    tolerance = 16 * len(mu) * torch.finfo(mu.dtype).eps
    for _ in range(max_iterations):
        size = size_of(r)
        if size <= tolerance:
            return potential.inverse_gradient(mu)
        newton = torch.linalg.solve(torch.func.jacrev(residual)(mu), r)
        length = 1.0
        while length > 1e-12:
            trial = mu - length * newton
            if usable(trial) and size_of(residual(trial)) < size:
                break
            length /= 2
        else:
            break
        mu, r = trial, residual(trial)
    raise RuntimeError(
        f"the proximal step did not converge (relative residual {size_of(r):.3g}, tolerance {tolerance:.3g}): "
        f"is f convex and smooth? Otherwise take a smaller alpha than {alpha}"
    )


def trust_region_step(potential: Potential, theta: Tensor, gradient: Tensor, radius: float) -> tuple[Tensor, float]:
    """The minimiser of ⟨θ', ∇f⟩ subject to B_G(θ', θ) ≤ ε (the report, equation 17), and its α.

    The Lagrangian of this problem is equation 18 with 1/(2α) the multiplier, so the minimiser is `mirror_step` at the
    one α where B_G(θ⁺(α), θ) = ε. It is found by bisection: ``dB_G/dα = 4α ∇fᵀ∇²G*∇f ≥ 0``.

    Args:
        potential: G.
        theta: the centre, (D,).
        gradient: ∇f, (D,), not zero.
        radius: ε > 0, in units of G (nats for the entropy and the log-partitions).

    Returns:
        The minimiser, (D,), and α.

    Raises:
        ValueError: if ``theta`` is outside the domain, the gradient vanishes along it, or the whole domain lies within
            the radius, so that the constraint binds nowhere.
    """
    number("radius", radius, 0, above=True)
    _check_vector(theta)
    _check_gradient(theta, gradient)
    start = potential.gradient(theta).double()
    centre, slope = theta.double(), gradient.double()
    if not float(slope.norm()) > 0:
        raise ValueError("gradient must not be zero: every point of the region is a minimiser")

    def move(alpha: float) -> Tensor:
        return potential._inverse_gradient(start - 2 * alpha * slope)

    def divergence(alpha: float) -> float:
        value = float(potential._divergence(move(alpha), centre))
        return value if isfinite(value) else inf  # beyond the range of ∇G

    low = high = 0.5 / float(slope.norm())
    for _ in range(200):
        if divergence(high) >= radius:
            break
        low, high = high, 2 * high
    else:
        raise ValueError(
            f"radius={radius:g} is never reached: against the gradient, the divergence stays below "
            f"{divergence(high):.6g} on the domain of {potential!r}; take a smaller radius"
        )
    while divergence(low) > radius:
        low, high = low / 2, low
        if low == 0:
            raise ValueError(f"radius={radius:g} is so small that rounding hides the divergence: take a larger one")
    for _ in range(100):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        low, high = (middle, high) if divergence(middle) < radius else (low, middle)
    return _to_primal(potential, start - 2 * low * slope, low).to(theta.dtype), low


def _slope(f: Function, theta: Tensor) -> Tensor:
    """∇f of each point, where f is the mean over points."""
    with torch.enable_grad():
        theta = theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(f(theta), theta)
    return gradient * (theta.numel() // theta.shape[-1])


def _to_primal(potential: Potential, mu: Tensor, alpha: float) -> Tensor:
    try:
        return potential.inverse_gradient(mu)
    except ValueError as error:
        raise ValueError(
            f"alpha={alpha:g} leads out of the range of the gradient: {error}; take a smaller alpha"
        ) from error


def _check_gradient(theta: Tensor, gradient: Tensor) -> None:
    if gradient.shape != theta.shape:
        raise ValueError(f"gradient must have the shape {tuple(theta.shape)} of theta, got {tuple(gradient.shape)}")
    if not bool(torch.isfinite(gradient).all()):
        raise ValueError("gradient must be finite, got a component that is not")


def _check_vector(theta: Tensor) -> None:
    if theta.ndim != 1:
        raise ValueError(f"theta must be one point (D,), got {tuple(theta.shape)}: step from each point by itself")
