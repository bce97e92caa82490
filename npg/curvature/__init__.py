"""Curvatures: approximations of the Fisher information that are kept from batch to batch, and have a cheap inverse.

All that are named here have the interface of `Curvature`: ``update``, ``inverse(λ)``, ``C @ v``, and ``state_dict``
with ``load_state_dict``. Each is a solver and a preconditioner of `NGD`. What learns from gradients, in
`npg.curvature.online` and `npg.curvature.two_sided`, belongs to optimizers of its own.
"""

from npg.curvature.base import Curvature
from npg.curvature.kronecker import KroneckerFisher
from npg.curvature.plain import DenseFisher, DiagonalFisher

__all__ = ["Curvature", "DenseFisher", "DiagonalFisher", "KroneckerFisher"]
