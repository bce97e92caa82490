"""Curvatures: approximations of the Fisher information that are kept from batch to batch, and have a cheap inverse.

All have the interface of `Curvature`: ``update``, ``inverse(λ)``, ``C @ v`` where there is such a product, and
``state_dict`` with ``load_state_dict``. Each that learns from a `npg.Fisher` is a solver and a preconditioner of `NGD`.
"""

from npg.curvature.base import Curvature
from npg.curvature.kronecker import KroneckerFisher
from npg.curvature.online import OnlinePreconditioner
from npg.curvature.plain import DenseFisher, DiagonalFisher

__all__ = ["Curvature", "DenseFisher", "DiagonalFisher", "KroneckerFisher", "OnlinePreconditioner"]
