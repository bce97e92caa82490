"""Geometries of outputs: a metric M(η) to solve for a step in, a factor of it, and the divergence to check the step by.

    FisherRao(family)                M = E[∇log p ∇log pᵀ]    KL(old ‖ new)          the natural gradient
    Euclidean()                      M = I                    ½‖new − old‖²          Gauss–Newton
    npg.transport.wasserstein(…)     that of W₂               ½W₂², or a bound       the transport gradient

`npg.Fisher` pulls M back to the parameters, Jᵀ M J, and `npg.natural_step` steps by that, whichever it is.
A function of one's own, η ↦ (u ↦ M(η)u), is a metric too; with a method ``divergence(old, new)`` it is a geometry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from npg.families import Family, Geometry, LinearMap
from npg.families.mistakes import is_mistaken, meant

__all__ = ["Euclidean", "FisherRao", "Geometry", "Metric", "geometry_of"]

#: A metric: η ↦ (u ↦ M(η)u). Every `Geometry` is one.
Metric = Callable[[Tensor], LinearMap]


@dataclass(frozen=True)
class FisherRao(Geometry):
    """The Fisher information of a family, and its KL divergence in nats (Rao 1945; Amari 1998).

    Args:
        family: whose metric, factor and divergence these are.
    """

    family: Family

    def __call__(self, outputs: Tensor) -> LinearMap:
        """M(η), that of the family."""
        return self.family.metric(outputs)

    def factor(self, outputs: Tensor) -> LinearMap:
        """L with L Lᵀ = M(η), that of the family."""
        return self.family.metric_factor(outputs)

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        """KL(old ‖ new) per event, in nats."""
        return self.family.kl(old, new)


@dataclass(frozen=True)
class Euclidean(Geometry):
    """M = I, and ½‖new − old‖² in squared units of the outputs: the pull-back JᵀJ is the matrix of Gauss and Newton."""

    def __call__(self, outputs: Tensor) -> LinearMap:
        """I."""
        return lambda u: u.clone()

    def factor(self, outputs: Tensor) -> LinearMap:
        """I."""
        return lambda epsilon: epsilon.clone()

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        """½‖new − old‖² per event."""
        return 0.5 * (new - old).square().sum(-1)


@dataclass(frozen=True)
class _Given(Geometry):
    """A user's own metric; its divergence is its method of that name."""

    metric: Any

    def __call__(self, outputs: Tensor) -> LinearMap:
        return self.metric(outputs)

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        if not hasattr(self.metric, "divergence"):
            raise TypeError(
                f"metric={self.metric!r} has no divergence to measure a step by: give it a method divergence(old, new)"
            )
        return self.metric.divergence(old, new)


def geometry_of(given: Family | Metric) -> Geometry:
    """The geometry that is meant: of a family its Fisher–Rao geometry; a geometry itself; of a function, its metric.

    Raises:
        TypeError: if it is none of these.
    """
    if isinstance(given, Family):
        return FisherRao(given)
    if isinstance(given, Geometry):
        return given
    if not callable(given) or is_mistaken(given):
        raise TypeError(f"family must be a family of npg.families or a geometry of npg.geometry, {meant(given)}")
    return _Given(given)
