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

from npg.mirror.potentials import LogPartition, NegativeEntropy, Potential, SquaredNorm, log_partition
from npg.mirror.steps import dual_natural_step, mirror_descent, mirror_step, proximal_step, trust_region_step

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
