"""Mirror descent: steps whose length is measured by a Bregman divergence, and the natural gradient that they are.

A potential G, strictly convex, gives a divergence ``B_G(θ, θ') = G(θ) − G(θ') − ⟨∇G(θ'), θ − θ'⟩`` and dual
coordinates μ = ∇G(θ). A mirror descent step (the report, equation 18) is

    θ⁺ = argmin_θ ⟨θ, ∇f(θᵢ)⟩ + B_G(θ, θᵢ)/(2α)        ⟺        ∇G(θ⁺) = ∇G(θᵢ) − 2α ∇f(θᵢ).

The factor 1/(2α) is the report's throughout: with G(θ) = ‖θ‖², whose divergence is ‖θ − θ'‖², equation 18 is
equation 15 and the step is gradient descent, θ⁺ = θᵢ − α∇f. Where a text writes ½‖·‖²/η or B_G/η, its η is 2α.

In dual coordinates f̃(μ) = f(∇G*(μ)) has the gradient ∇²G*(μ) ∇f(θ), and ∇²G* is the Riemannian metric of the dual
manifold. Hence ``μ⁺ = μ − 2α (∇²G*)⁻¹ ∇f̃(μ)``: the mirror step is a natural gradient step along the dual manifold
(Raskutti & Mukherjee 2015, theorem 1). `mirror_step` takes the one way, `dual_natural_step` the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from math import inf, isfinite

import torch
from torch import Tensor
from torch.nn.functional import softplus

from npg.families import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    Family,
    Gaussian,
    LinearMap,
    MultiCategorical,
    relative_entropy,
)
from npg.solvers import dense_solve
from npg.step import natural_step

__all__ = [
    "LogPartition",
    "NegativeEntropy",
    "Potential",
    "SquaredNorm",
    "dual_natural_step",
    "log_partition",
    "mirror_descent",
    "mirror_step",
    "proximal_step",
    "trust_region_step",
]

Function = Callable[[Tensor], Tensor]


# ------------------------------------------------------------------------------------------------------- potentials


class Potential(ABC):
    """A strictly convex function G of the last axis; leading axes are independent points.

    Subclasses give the formulas; the public methods check the domain first and raise ValueError outside of it.
    """

    def value(self, theta: Tensor) -> Tensor:
        """G(θ); (…, D) → (…)."""
        self.check(theta)
        return self._value(theta)

    def gradient(self, theta: Tensor) -> Tensor:
        """The dual coordinates μ = ∇G(θ); (…, D) → (…, D)."""
        self.check(theta)
        return self._gradient(theta)

    def inverse_gradient(self, mu: Tensor) -> Tensor:
        """The point θ = ∇G*(μ) with ∇G(θ) = μ; (…, D) → (…, D)."""
        self.check_dual(mu)
        return self._inverse_gradient(mu)

    def hessian(self, theta: Tensor) -> LinearMap:
        """The metric ∇²G(θ) as a map of tangents, (…, D) → (…, D); a ``metric`` for `npg.Fisher`."""
        self.check(theta)
        return self._hessian(theta)

    def divergence(self, new: Tensor, old: Tensor) -> Tensor:
        """B_G(new, old) = G(new) − G(old) − ⟨∇G(old), new − old⟩ ≥ 0; (…, D), (…, D) → (…)."""
        self.check(new)
        self.check(old)
        return self._divergence(new, old)

    def conjugate(self, mu: Tensor) -> Tensor:
        """G*(μ) = ⟨μ, θ⟩ − G(θ) at θ = ∇G*(μ); (…, D) → (…)."""
        theta = self.inverse_gradient(mu)
        return (mu * theta).sum(-1) - self._value(theta)

    def check(self, theta: Tensor) -> None:
        """Raise ValueError unless θ lies in the domain of G and ∇G."""
        _check_finite(theta, "theta", self)

    def check_dual(self, mu: Tensor) -> None:
        """Raise ValueError unless μ lies in the range of ∇G."""
        _check_finite(mu, "mu", self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @abstractmethod
    def _value(self, theta: Tensor) -> Tensor: ...

    @abstractmethod
    def _gradient(self, theta: Tensor) -> Tensor: ...

    @abstractmethod
    def _inverse_gradient(self, mu: Tensor) -> Tensor: ...

    @abstractmethod
    def _hessian(self, theta: Tensor) -> LinearMap: ...

    def _metric(self, theta: Tensor) -> LinearMap:
        """∇²G, with its null space filled where the dual coordinates cannot move along it."""
        return self._hessian(theta)

    def _divergence(self, new: Tensor, old: Tensor) -> Tensor:
        return self._value(new) - self._value(old) - (self._gradient(old) * (new - old)).sum(-1)


class SquaredNorm(Potential):
    """G(θ) = ½c‖θ‖², with B_G(θ, θ') = ½c‖θ − θ'‖²; at c = 2 equation 18 of the report is its equation 15.

    Args:
        curvature: c > 0.
    """

    def __init__(self, curvature: float = 2.0) -> None:
        if not 0 < curvature < inf:
            raise ValueError(f"curvature must be a positive finite number, got {curvature!r}")
        self.curvature = float(curvature)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(curvature={self.curvature})"

    def _value(self, theta: Tensor) -> Tensor:
        return 0.5 * self.curvature * theta.square().sum(-1)

    def _gradient(self, theta: Tensor) -> Tensor:
        return self.curvature * theta

    def _inverse_gradient(self, mu: Tensor) -> Tensor:
        return mu / self.curvature

    def _hessian(self, theta: Tensor) -> LinearMap:
        return lambda u: self.curvature * u

    def _divergence(self, new: Tensor, old: Tensor) -> Tensor:
        return 0.5 * self.curvature * (new - old).square().sum(-1)


class NegativeEntropy(Potential):
    """G(p) = Σ p log p on the open probability simplex, with B_G(p, q) = KL(p ‖ q) in nats.

    The dual coordinates log p + 1 matter up to one common constant, which the constraint Σp = 1 fixes: ∇G*, the
    softmax, takes any vector, and the mirror step is p⁺ ∝ p exp(−2α∇f) (exponentiated gradient).
    """

    def check(self, theta: Tensor) -> None:
        """Raise ValueError unless θ lies in the open simplex."""
        _check_simplex(theta, "theta", self)

    def _value(self, theta: Tensor) -> Tensor:
        return torch.special.xlogy(theta, theta).sum(-1)

    def _gradient(self, theta: Tensor) -> Tensor:
        return theta.log() + 1

    def _inverse_gradient(self, mu: Tensor) -> Tensor:
        return mu.softmax(-1)

    def _hessian(self, theta: Tensor) -> LinearMap:
        return lambda u: u / theta

    def _divergence(self, new: Tensor, old: Tensor) -> Tensor:
        return relative_entropy(new.log(), old.log()).sum(-1)


class LogPartition(Potential):
    """The log-partition G of an exponential family p(y | θ) = h(y) exp(⟨θ, T(y)⟩ − G(θ)), in natural parameters θ.

    Its dual coordinates are the mean parameters μ = E[T(y)], its Hessian is the Fisher information in θ, and its
    divergence is the KL with arguments exchanged, B_G(θ, θ') = KL(p_θ' ‖ p_θ) in nats. Made by `log_partition`.

    Attributes:
        family: of `npg.families`; `natural` and `outputs` translate between its outputs η and θ.
    """

    family: Family

    def natural(self, outputs: Tensor) -> Tensor:
        """The natural parameters θ of outputs η; (…, D) → (…, D)."""
        return outputs

    def outputs(self, natural: Tensor) -> Tensor:
        """The outputs η of natural parameters θ; (…, D) → (…, D)."""
        return natural

    def _divergence(self, new: Tensor, old: Tensor) -> Tensor:
        return self.family.kl(self._outputs(old), self._outputs(new))

    def _outputs(self, natural: Tensor) -> Tensor:
        """`outputs`, NaN where θ is outside of the domain."""
        return self.outputs(natural)

    def __repr__(self) -> str:
        return f"log_partition({self.family!r})"


def log_partition(family: Family) -> LogPartition:
    """The log-partition potential of a family.

    ==================  ==============================  ===============================  =========================
    family              natural parameters θ            G(θ)                             mean parameters μ
    ==================  ==============================  ===============================  =========================
    Categorical         logits, up to a constant        log Σ e^θ                        p
    MultiCategorical    logits                          a sum of these                   p of each variable
    Bernoulli           logits                          Σ log(1 + e^θ)                   p
    Gaussian            m/σ²                            ½σ²‖θ‖²                          m
    DiagonalGaussian    [m/σ², −1/(2σ²)]                Σ −θ₁²/(4θ₂) − ½ log(−2θ₂)       [m, m² + σ²]
    ==================  ==============================  ===============================  =========================

    Raises:
        TypeError: if the family is none of these.
    """
    if isinstance(family, Categorical):
        return _LogSumExp(family)
    if isinstance(family, MultiCategorical):
        return _SumOfLogSumExps(family)
    if isinstance(family, Bernoulli):
        return _Softplus(family)
    if isinstance(family, Gaussian):
        return _GaussianLogPartition(family)
    if isinstance(family, DiagonalGaussian):
        return _DiagonalGaussianLogPartition(family)
    raise TypeError(
        f"family must be a Categorical, MultiCategorical, Bernoulli, Gaussian or DiagonalGaussian, got {family!r}: "
        "for another exponential family, subclass LogPartition"
    )


class _LogSumExp(LogPartition):
    def __init__(self, family: Categorical) -> None:
        self.family = family

    def check_dual(self, mu: Tensor) -> None:
        _check_simplex(mu, "mu", self)

    def _value(self, theta: Tensor) -> Tensor:
        return theta.logsumexp(-1)

    def _gradient(self, theta: Tensor) -> Tensor:
        return theta.softmax(-1)

    def _inverse_gradient(self, mu: Tensor) -> Tensor:
        return mu.log()

    def _hessian(self, theta: Tensor) -> LinearMap:
        return self.family.metric(theta)

    def _metric(self, theta: Tensor) -> LinearMap:
        # diag(p) − ppᵀ annihilates the constant that logits leave open. With ppᵀ added it pulls back to diag(1/p), the
        # metric of the simplex, under which the gradient of a function of p keeps Σp = 1.
        p = self._gradient(theta.detach())
        return lambda u: p * u


class _SumOfLogSumExps(LogPartition):
    def __init__(self, family: MultiCategorical) -> None:
        self.family = family
        self.sizes: Sequence[int] = family.sizes
        self._part = _LogSumExp(Categorical())

    def _each(self, function: Function, x: Tensor) -> list[Tensor]:
        if x.shape[-1] != sum(self.sizes):
            raise ValueError(f"{self!r} needs {sum(self.sizes)} components on the last axis, got {x.shape[-1]}")
        return [function(part) for part in x.split(list(self.sizes), -1)]

    def check_dual(self, mu: Tensor) -> None:
        for part in self._each(lambda x: x, mu):
            _check_simplex(part, "mu", self)

    def _value(self, theta: Tensor) -> Tensor:
        return torch.stack(self._each(self._part._value, theta)).sum(0)

    def _gradient(self, theta: Tensor) -> Tensor:
        return torch.cat(self._each(self._part._gradient, theta), -1)

    def _inverse_gradient(self, mu: Tensor) -> Tensor:
        return torch.cat(self._each(self._part._inverse_gradient, mu), -1)

    def _hessian(self, theta: Tensor) -> LinearMap:
        return self.family.metric(theta)

    def _metric(self, theta: Tensor) -> LinearMap:
        p = self._gradient(theta.detach())
        return lambda u: p * u


class _Softplus(LogPartition):
    def __init__(self, family: Bernoulli) -> None:
        self.family = family

    def check_dual(self, mu: Tensor) -> None:
        _check_finite(mu, "mu", self)
        if not bool(((mu > 0) & (mu < 1)).all()):
            raise ValueError(
                f"mu must hold probabilities strictly between 0 and 1 for {self!r}, got components from "
                f"{float(mu.detach().min()):g} to {float(mu.detach().max()):g}"
            )

    def _value(self, theta: Tensor) -> Tensor:
        return softplus(theta).sum(-1)

    def _gradient(self, theta: Tensor) -> Tensor:
        return theta.sigmoid()

    def _inverse_gradient(self, mu: Tensor) -> Tensor:
        return mu.logit()

    def _hessian(self, theta: Tensor) -> LinearMap:
        return self.family.metric(theta)


class _GaussianLogPartition(SquaredNorm, LogPartition):
    def __init__(self, family: Gaussian) -> None:
        super().__init__(family.variance)
        self.family = family
        self._variance = family.variance

    def natural(self, outputs: Tensor) -> Tensor:
        return outputs / self._variance

    def outputs(self, natural: Tensor) -> Tensor:
        return natural * self._variance

    def __repr__(self) -> str:
        return LogPartition.__repr__(self)


class _DiagonalGaussianLogPartition(LogPartition):
    def __init__(self, family: DiagonalGaussian) -> None:
        self.family = family

    def natural(self, outputs: Tensor) -> Tensor:
        mean, log_std = DiagonalGaussian.split(outputs)
        precision = torch.exp(-2 * log_std)
        return torch.cat([mean * precision, -0.5 * precision], -1)

    def outputs(self, natural: Tensor) -> Tensor:
        self.check(natural)
        return self._outputs(natural)

    def _outputs(self, natural: Tensor) -> Tensor:
        first, second = natural.chunk(2, -1)
        return torch.cat([-0.5 * first / second, -0.5 * torch.log(-2 * second)], -1)

    def check(self, theta: Tensor) -> None:
        _check_finite(theta, "theta", self)
        if theta.shape[-1] % 2:
            raise ValueError(
                f"theta of {self!r} is [m/σ², −1/(2σ²)]: its last axis must be even, got {theta.shape[-1]}"
            )
        second = theta.chunk(2, -1)[1]
        if not bool((second < 0).all()):
            raise ValueError(
                f"the second half of theta, −1/(2σ²), must be negative for {self!r}, "
                f"got {float(second.detach().max()):g}"
            )

    def check_dual(self, mu: Tensor) -> None:
        _check_finite(mu, "mu", self)
        if mu.shape[-1] % 2:
            raise ValueError(f"mu of {self!r} is [m, m² + σ²]: its last axis must be even, got {mu.shape[-1]}")
        first, second = mu.chunk(2, -1)
        variance = second - first.square()
        if not bool((variance > 0).all()):
            raise ValueError(
                f"mu = [E y, E y²] must have a positive variance E y² − (E y)² for {self!r}, "
                f"got {float(variance.detach().min()):g}"
            )

    def _value(self, theta: Tensor) -> Tensor:
        first, second = theta.chunk(2, -1)
        return (-0.25 * first.square() / second - 0.5 * torch.log(-2 * second)).sum(-1)

    def _gradient(self, theta: Tensor) -> Tensor:
        first, second = theta.chunk(2, -1)
        mean = -0.5 * first / second
        return torch.cat([mean, mean.square() - 0.5 / second], -1)

    def _inverse_gradient(self, mu: Tensor) -> Tensor:
        mean, second = mu.chunk(2, -1)
        precision = 1 / (second - mean.square())
        return torch.cat([mean * precision, -0.5 * precision], -1)

    def _hessian(self, theta: Tensor) -> LinearMap:
        # Cov[y, y²] = [[σ², 2mσ²], [2mσ², 4m²σ² + 2σ⁴]]
        first, second = theta.detach().chunk(2, -1)
        variance = -0.5 / second
        mean = first * variance

        def apply(u: Tensor) -> Tensor:
            a, b = u.chunk(2, -1)
            top = variance * (a + 2 * mean * b)
            return torch.cat([top, 2 * mean * top + 2 * variance.square() * b], -1)

        return apply


def _check_finite(x: Tensor, name: str, potential: Potential) -> None:
    if not x.is_floating_point() or x.ndim < 1:
        raise ValueError(f"{name} must be a floating-point tensor (…, D), got {x.dtype} {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} must be finite for {potential!r}, got a component that is not")


def _check_simplex(x: Tensor, name: str, potential: Potential) -> None:
    _check_finite(x, name, potential)
    smallest = float(x.detach().min())
    if not smallest > 0:
        raise ValueError(
            f"{name} must lie in the open probability simplex for {potential!r}, got the component {smallest:g}: "
            "every component must be positive"
        )
    sums = x.detach().sum(-1).flatten()
    worst = float(sums[(sums - 1).abs().argmax()])
    if abs(worst - 1) > 1e3 * torch.finfo(x.dtype).eps * x.shape[-1]:
        raise ValueError(
            f"{name} must lie in the probability simplex for {potential!r}, but its components sum to {worst:.8g}: "
            "divide by the sum"
        )


# ------------------------------------------------------------------------------------------------------------ steps


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
    _check_alpha(alpha)
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
    if steps < 0:
        raise ValueError(f"steps must be ≥ 0, got {steps}")
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
        ValueError: as `mirror_step`.
    """
    _check_alpha(alpha)
    mu = potential.gradient(theta).detach().clone()

    def primal(parameters: dict[str, Tensor]) -> Tensor:
        return potential._inverse_gradient(parameters["mu"])

    natural_step(
        primal,  # type: ignore[arg-type]  # a function of no further inputs
        (),
        potential._metric,
        lambda outputs: -f(outputs),
        learning_rate=2 * alpha,
        solver=partial(dense_solve, method="eigh"),
        evaluate=False,
        parameters={"mu": mu},
    )
    return _to_primal(potential, mu, alpha)


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
    _check_alpha(alpha)
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

    mu, r = start, residual(start)
    # rounding of the terms that cancel in the residual
    tolerance = 16 * len(mu) * torch.finfo(mu.dtype).eps * float(start.norm() + (r - mu + start).norm())
    for _ in range(max_iterations):
        size = float(r.norm())
        if size <= tolerance:
            return potential.inverse_gradient(mu)
        newton = torch.linalg.solve(torch.func.jacrev(residual)(mu), r)
        length = 1.0
        while length > 1e-12:
            trial = mu - length * newton
            if usable(trial) and float(residual(trial).norm()) < size:
                break
            length /= 2
        else:
            break
        mu, r = trial, residual(trial)
    raise RuntimeError(
        f"the proximal step did not converge (residual {float(r.norm()):.3g}, tolerance {tolerance:.3g}): "
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
    if not 0 < radius < inf:
        raise ValueError(f"radius must be a positive finite number, got {radius!r}")
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


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < inf:
        raise ValueError(f"alpha must be a positive finite number, got {alpha!r}")


def _check_gradient(theta: Tensor, gradient: Tensor) -> None:
    if gradient.shape != theta.shape:
        raise ValueError(f"gradient must have the shape {tuple(theta.shape)} of theta, got {tuple(gradient.shape)}")
    if not bool(torch.isfinite(gradient).all()):
        raise ValueError("gradient must be finite, got a component that is not")


def _check_vector(theta: Tensor) -> None:
    if theta.ndim != 1:
        raise ValueError(f"theta must be one point (D,), got {tuple(theta.shape)}: step from each point by itself")
