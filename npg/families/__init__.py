"""Predictive distributions: what a network's outputs mean, and the geometry that this meaning puts on them.

A family reads the last axis of ``outputs`` as the parameters η of one distribution; all leading axes are independent
events. Every method is batched over the leading axes, takes and returns tensors, and is differentiable where that
makes sense. Log-likelihoods, KL divergences and entropies are in nats.

The metric M(η) is the Fisher information of the distribution in its own parameters,
``M(η) = E_{y~p(·|η)}[∇_η log p ∇_η log pᵀ]``, the only thing of a family that the Fisher of a network needs
(Amari 1998; Martens 2020, section 5).
"""

from npg.families.adapter import from_torch
from npg.families.base import Family, Geometry, LinearMap, OutOfDomainError, in_double
from npg.families.discrete import Bernoulli, Categorical, MultiCategorical, covariance, relative_entropy
from npg.families.normal import DiagonalGaussian, Gaussian
from npg.families.product import Product

__all__ = [
    "Bernoulli",
    "Categorical",
    "DiagonalGaussian",
    "Family",
    "Gaussian",
    "Geometry",
    "LinearMap",
    "MultiCategorical",
    "OutOfDomainError",
    "Product",
    "covariance",
    "from_torch",
    "in_double",
    "relative_entropy",
]
