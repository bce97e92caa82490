"""Potentials: convex functions G with a divergence, dual coordinates and a metric."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from npg.checks import number
from npg.families import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    Family,
    Gaussian,
    LinearMap,
    MultiCategorical,
    Product,
    relative_entropy,
)
from npg.families.base import blockwise

__all__ = ["Function", "LogPartition", "NegativeEntropy", "Potential", "SquaredNorm", "log_partition"]

Function = Callable[[Tensor], Tensor]


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
        number("curvature", curvature, 0, above=True)
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
    Product             those of the parts              a sum of theirs                  those of the parts
    Bernoulli           logits                          Σ log(1 + e^θ)                   p
    Gaussian            m/σ²                            ½σ²‖θ‖²                          m
    DiagonalGaussian    [m/σ², −1/(2σ²)]                Σ −θ₁²/(4θ₂) − ½ log(−2θ₂)       [m, m² + σ²]
    ==================  ==============================  ===============================  =========================

    A MultiCategorical is a product of Categoricals.

    Raises:
        TypeError: if the family is of another class, of a subclass of these too, or a product of such.
    """
    made = _KINDS.get(type(family))
    if made is None:
        raise TypeError(
            f"family must be a Categorical, Bernoulli, Gaussian or DiagonalGaussian, or a product of them, got "
            f"{family!r}, a {type(family).__name__}. A subclass may have another potential: for one that has not, pass "
            "its parent; for another exponential family, subclass LogPartition"
        )
    return made(family)


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


class _SumOfLogPartitions(LogPartition):
    """Of independent parts, whose parameters stand side by side."""

    def __init__(self, family: Product) -> None:
        self.family = family
        self._parts, self._sizes = [log_partition(part) for part in family.parts], family.sizes

    def _each(self, x: Tensor) -> Iterator[tuple[LogPartition, Tensor]]:
        if x.shape[-1] != sum(self._sizes):
            raise ValueError(f"{self!r} needs {sum(self._sizes)} components on the last axis, got {x.shape[-1]}")
        return zip(self._parts, x.split(self._sizes, -1))

    def natural(self, outputs: Tensor) -> Tensor:
        return torch.cat([part.natural(o) for part, o in self._each(outputs)], -1)

    def outputs(self, natural: Tensor) -> Tensor:
        return torch.cat([part.outputs(theta) for part, theta in self._each(natural)], -1)

    def _outputs(self, natural: Tensor) -> Tensor:
        return torch.cat([part._outputs(theta) for part, theta in self._each(natural)], -1)

    def check(self, theta: Tensor) -> None:
        _check_finite(theta, "theta", self)
        for part, own in self._each(theta):
            part.check(own)

    def check_dual(self, mu: Tensor) -> None:
        _check_finite(mu, "mu", self)
        for part, own in self._each(mu):
            part.check_dual(own)

    def _value(self, theta: Tensor) -> Tensor:
        return torch.stack([part._value(own) for part, own in self._each(theta)]).sum(0)

    def _gradient(self, theta: Tensor) -> Tensor:
        return torch.cat([part._gradient(own) for part, own in self._each(theta)], -1)

    def _inverse_gradient(self, mu: Tensor) -> Tensor:
        return torch.cat([part._inverse_gradient(own) for part, own in self._each(mu)], -1)

    def _hessian(self, theta: Tensor) -> LinearMap:
        return blockwise([part._hessian(own) for part, own in self._each(theta)], self._sizes)

    def _metric(self, theta: Tensor) -> LinearMap:
        return blockwise([part._metric(own) for part, own in self._each(theta)], self._sizes)


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


#: By the class itself: what a subclass changes, its parent's potential does not know.
_KINDS: dict[type[Family], Callable[[Any], LogPartition]] = {
    Categorical: _LogSumExp,
    Product: _SumOfLogPartitions,
    MultiCategorical: _SumOfLogPartitions,
    Bernoulli: _Softplus,
    Gaussian: _GaussianLogPartition,
    DiagonalGaussian: _DiagonalGaussianLogPartition,
}


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
