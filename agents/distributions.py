"""Action distributions as families: Stable-Baselines3's own, and what a user's policy returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    SquashedDiagGaussianDistribution,
    StateDependentNoiseDistribution,
    TanhBijector,
)
from torch import Tensor

from npg import families

__all__ = ["FAMILIES", "SquashedGaussian", "described"]


class SquashedGaussian(families.DiagonalGaussian):
    """The distribution of tanh(x) for a Gaussian x: its ratios, KL divergences and metric are those of x.

    The log-likelihood is Stable-Baselines3's, with its correction for the change of volume.
    """

    def __init__(self, epsilon: float) -> None:
        self.bijector = TanhBijector(epsilon)

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Log p(a | η) of actions a in (−1, 1)."""
        x = self.bijector.inverse(targets)
        return super().log_likelihood(outputs, x) - self.bijector.log_prob_correction(x).sum(-1)

    def entropy(self, outputs: Tensor) -> Tensor:
        """Not known in closed form."""
        raise NotImplementedError("the entropy of a squashed Gaussian has no closed form: average −log p of samples")

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw actions in (−1, 1)."""
        return super().sample(outputs, generator).tanh()


FAMILIES: dict[type[Distribution], Callable[[Any], families.Family]] = {
    DiagGaussianDistribution: lambda d: families.DiagonalGaussian(),
    CategoricalDistribution: lambda d: families.Categorical(),
    MultiCategoricalDistribution: lambda d: families.MultiCategorical([int(n) for n in d.action_dims]),
    BernoulliDistribution: lambda d: families.Bernoulli(),
}


def described(distribution: Distribution) -> tuple[families.Family, Tensor]:
    """The family of what a policy of one's own returns, and its parameters there: outputs (N, D)."""
    p: Any = getattr(distribution, "distribution", None)
    if isinstance(p, list) and p and all(isinstance(c, torch.distributions.Categorical) for c in p):
        logits = [c.logits for c in p]
        return families.MultiCategorical([part.shape[-1] for part in logits]), torch.cat(logits, -1)
    if isinstance(p, torch.distributions.Independent):
        p = p.base_dist
    if isinstance(p, torch.distributions.Categorical):
        return families.Categorical(), p.logits
    if isinstance(p, torch.distributions.Bernoulli):
        return families.Bernoulli(), p.logits
    if isinstance(p, torch.distributions.Normal):
        outputs = torch.cat([p.mean, p.stddev.log()], -1)
        if isinstance(distribution, SquashedDiagGaussianDistribution):
            return SquashedGaussian(distribution.epsilon), outputs
        if isinstance(distribution, StateDependentNoiseDistribution) and distribution.bijector is not None:
            return SquashedGaussian(distribution.epsilon), outputs
        return families.DiagonalGaussian(), outputs
    names = [] if p is None or isinstance(p, list) else list(p.arg_constraints)
    if not names or "logits" in names:
        raise NotImplementedError(
            f"policy has the action distribution {type(distribution).__name__} over {type(p).__name__}, of which the "
            "KL is not known: let its attribute `distribution` be a Normal, Categorical, Bernoulli, list of "
            "Categoricals, or another one of torch.distributions with one event per component of the action"
        )
    kind = type(p)

    def made(outputs: Tensor) -> torch.distributions.Distribution:
        return torch.distributions.Independent(kind(**dict(zip(names, outputs.chunk(len(names), -1)))), 1)

    return families.from_torch(made), torch.cat([getattr(p, name) for name in names], -1)
