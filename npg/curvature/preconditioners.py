"""Preconditioners for conjugate gradients, in the form that `npg.step.natural_step` takes: (F, λ) ↦ (r ↦ C⁻¹r)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from npg.checks import number
from npg.curvature.kronecker import KroneckerFisher
from npg.fisher import Fisher

__all__ = ["diagonal_preconditioner", "kronecker_preconditioner"]


def diagonal_preconditioner(
    fisher: Fisher, damping: float, *, probes: int = 4, exponent: float = 0.75
) -> Callable[[Tensor], Tensor]:
    """C = (diag F + λ)^ξ, from a stochastic estimate of the diagonal (Martens 2010, section 4.7, with ξ = 3/4).

    The signs of the estimate come from a generator of its own with a fixed seed, so a solve stays a function of its
    arguments. Coordinates that the estimate says nothing about are treated as if they had a thousandth of the mean.

    Args:
        fisher: F.
        damping: λ ≥ 0.
        probes: backward passes spent on the estimate.
        exponent: ξ in (0, 1]; 1 is Jacobi's preconditioner, smaller values trust the estimate less.

    Raises:
        ValueError: if ``exponent`` is out of its range.
    """
    number("exponent", exponent, 0, 1, above=True)
    generator = torch.Generator(device=fisher.device).manual_seed(0)
    diagonal = fisher.diagonal(probes, generator)
    floor = 1e-3 * diagonal.mean() + torch.finfo(diagonal.dtype).tiny
    inverse = (diagonal.clamp(min=floor) + damping).pow(-exponent)
    return lambda r: inverse * r if r.ndim == 1 else inverse.unsqueeze(1) * r


def kronecker_preconditioner(
    fisher: Fisher, damping: float, *, probes: int = 1, corrected: bool = False
) -> Callable[[Tensor], Tensor]:
    """C = F̂ + λI with the Kronecker-factored F̂ of the same inputs (`npg.curvature.kronecker`).

    The signs of the probes come from a generator of its own with a fixed seed, so a solve stays a function of its
    arguments.

    Args:
        fisher: F, of a module.
        damping: λ ≥ 0.
        probes: backward passes spent on the factors of the gradients.
        corrected: EKFAC in place of K-FAC.
    """
    generator = torch.Generator(device=fisher.device).manual_seed(0)
    return KroneckerFisher(fisher, corrected=corrected, probes=probes, generator=generator).inverse(damping)
