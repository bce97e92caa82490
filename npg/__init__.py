"""Natural gradients: one exact Fisher, one conjugate gradient, one trust region, for classifiers and for policies."""

from npg import families
from npg.curvature.kronecker import KroneckerFisher
from npg.fisher import Fisher
from npg.solvers import Solution, Status, conjugate_gradient, dense_solve
from npg.step import StepReport, natural_step
from npg.trust_region import LevenbergMarquardt, TrustRegion

__all__ = [
    "Fisher",
    "KroneckerFisher",
    "LevenbergMarquardt",
    "Solution",
    "Status",
    "StepReport",
    "TrustRegion",
    "conjugate_gradient",
    "dense_solve",
    "families",
    "natural_step",
]
