"""Action distributions as families: Stable-Baselines3's own, and what a user's policy returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from torch import Tensor, nn

from envs.hybrid import FlatActions
from npg import families

__all__ = ["FAMILIES", "FlatProduct", "HybridDistribution", "SquashedGaussian", "described", "with_deviations"]


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


class FlatProduct(families.Product):
    """Choices, bits and reals, all independent, as one vector (…, K + B + R): the actions of `envs.hybrid.FlatActions`.

    Outputs are the logits of the choices, those of the bits, the means and the log standard deviations, side by side.

    Args:
        sizes: how many values each of the K choices has.
        bits: B.
        reals: R.
    """

    def __init__(self, sizes: Sequence[int], bits: int, reals: int) -> None:
        parts: list[tuple[families.Family, int, int]] = []
        if sizes:
            parts.append((families.MultiCategorical(sizes), sum(sizes), len(sizes)))
        if bits:
            parts.append((families.Bernoulli(), bits, bits))
        if reals:
            parts.append((families.DiagonalGaussian(), 2 * reals, reals))
        super().__init__([part for part, _, _ in parts], [outputs for _, outputs, _ in parts])
        self.columns = [columns for _, _, columns in parts]

    def _apart(self, outputs: Tensor, targets: Tensor) -> Sequence[Tensor]:
        wanted = (*outputs.shape[:-1], sum(self.columns))
        if targets.shape != wanted:
            raise ValueError(
                f"targets must have shape {wanted} for outputs of shape {tuple(outputs.shape)}, got "
                f"{tuple(targets.shape)}: pass vectors of `envs.hybrid.FlatActions`"
            )
        apart = targets.split(self.columns, -1)
        return [t.long() if type(p) is families.MultiCategorical else t for p, t in zip(self.parts, apart)]

    def _together(self, targets: list[Tensor]) -> Tensor:
        dtype = torch.promote_types(torch.get_default_dtype(), targets[-1].dtype)
        return torch.cat([t.to(dtype) for t in targets], -1)

    def mode(self, outputs: Tensor) -> Tensor:
        """The most likely event."""
        modes: list[Tensor] = []
        for part, own in zip(self.parts, self._split(outputs)):
            if isinstance(part, families.MultiCategorical):
                modes.append(torch.stack([logits.argmax(-1) for logits in own.split(part.sizes, -1)], -1))
            else:
                modes.append((own > 0).to(own.dtype) if isinstance(part, families.Bernoulli) else own.chunk(2, -1)[0])
        return self._together(modes)


class HybridDistribution(DiagGaussianDistribution):
    """Of `envs.hybrid.FlatActions`, with the interface of Stable-Baselines3's distributions.

    As its Gaussian, it has a network for everything but the log standard deviations, which are parameters of their own:
    None where no part is real.

    Args:
        space: the actions.
    """

    def __init__(self, space: FlatActions) -> None:
        super().__init__(sum(space.sizes) + space.bits + space.reals)
        self.reals = space.reals
        self.family = FlatProduct(space.sizes, space.bits, space.reals)
        self.outputs: Any = None

    def proba_distribution_net(self, latent_dim: int, log_std_init: float = 0.0) -> Any:
        """The linear layer, and the parameters."""
        net = nn.Linear(latent_dim, self.action_dim)
        return net, nn.Parameter(torch.ones(self.reals) * log_std_init) if self.reals else None

    def proba_distribution(self, mean_actions: Tensor, log_std: Any) -> HybridDistribution:
        """The distribution with these parameters."""
        self.outputs = mean_actions if log_std is None else _beside(mean_actions, log_std)
        return self

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log p(a), (N,)."""
        return self.family.log_likelihood(self.outputs, actions)

    def entropy(self) -> Tensor:
        """In nats, (N,)."""
        return self.family.entropy(self.outputs)

    def sample(self) -> Tensor:
        """Draw actions, (N, D)."""
        return self.family.sample(self.outputs)

    def mode(self) -> Tensor:
        """The most likely ones."""
        return self.family.mode(self.outputs)


def _beside(outputs: Tensor, log_std: Tensor) -> Tensor:
    return torch.cat([outputs, log_std.expand(*outputs.shape[:-1], *log_std.shape)], -1)


def with_deviations(policy: Any, distribution: Distribution, outputs: Tensor) -> Tensor:
    """The parameters of a policy's distribution: what its network gives, and beside that a Gaussian's ``log_std``."""
    kind = type(distribution)
    if kind is DiagGaussianDistribution:  # a single deviation may be that of all components
        return torch.cat([outputs, policy.log_std.expand_as(outputs)], -1)
    if kind is HybridDistribution and policy.log_std is not None:
        return _beside(outputs, policy.log_std)
    return outputs


FAMILIES: dict[type[Distribution], Callable[[Any], families.Family]] = {
    DiagGaussianDistribution: lambda d: families.DiagonalGaussian(),
    CategoricalDistribution: lambda d: families.Categorical(),
    MultiCategoricalDistribution: lambda d: families.MultiCategorical([int(n) for n in d.action_dims]),
    BernoulliDistribution: lambda d: families.Bernoulli(),
    HybridDistribution: lambda d: d.family,
}


def described(distribution: Distribution) -> tuple[families.Family, Tensor]:
    """The family of what a policy of one's own returns, and its parameters there: outputs (N, D)."""
    if isinstance(distribution, HybridDistribution):
        return distribution.family, distribution.outputs
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
    of_components = isinstance(p, torch.distributions.Distribution) and not p.event_shape
    names = list(p.arg_constraints) if of_components else []
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
