"""Families of independent normals."""

from __future__ import annotations

from math import log, pi

import torch
from torch import Generator, Tensor

from npg.checks import number
from npg.families.base import Family, LinearMap, column_hint

__all__ = ["DiagonalGaussian", "Gaussian"]

_LOG_2PI = log(2 * pi)


class DiagonalGaussian(Family):
    """Independent normals with learned mean and spread; outputs are [mean, log std] (…, 2A), targets are (…, A)."""

    @staticmethod
    def split(outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation, each (…, A)."""
        if outputs.shape[-1] % 2:
            raise ValueError(
                "outputs of a DiagonalGaussian are [mean, log std]: the last axis must be even, "
                f"got {outputs.shape[-1]}"
            )
        mean, log_std = outputs.chunk(2, -1)
        return mean, log_std

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        mean, log_std = self.split(outputs)
        if targets.shape != mean.shape:
            raise ValueError(
                f"targets must have the shape {tuple(mean.shape)} of the mean, got {tuple(targets.shape)}"
                f"{column_hint(mean, targets)}"
            )
        z = (targets - mean) * torch.exp(-log_std)
        return (-0.5 * z * z - log_std - 0.5 * _LOG_2PI).sum(-1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        mean_old, log_old = self.split(old)
        mean_new, log_new = self.split(new)
        # ½(e^{2d} − 1) − d with d = log σ_old − log σ_new; with expm1 the error is a rounding of d, not of 1
        d = log_old - log_new
        z = (mean_old - mean_new) * torch.exp(-log_new)
        return (0.5 * (torch.expm1(2 * d) + z * z) - d).sum(-1)

    def entropy(self, outputs: Tensor) -> Tensor:
        _, log_std = self.split(outputs)
        return (log_std + 0.5 * (1 + _LOG_2PI)).sum(-1)

    def sample(self, outputs: Tensor, generator: Generator | None = None) -> Tensor:
        mean, log_std = self.split(outputs.detach())
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + log_std.exp() * noise

    def metric(self, outputs: Tensor) -> LinearMap:
        # diag(M) = [1/σ², 2]
        _, log_std = self.split(outputs.detach())
        information = torch.cat([torch.exp(-2 * log_std), torch.full_like(log_std, 2.0)], -1)
        return lambda u: information * u

    def metric_factor(self, outputs: Tensor) -> LinearMap:
        _, log_std = self.split(outputs.detach())
        root = torch.cat([torch.exp(-log_std), torch.full_like(log_std, 2**0.5)], -1)
        return lambda epsilon: root * epsilon


class Gaussian(Family):
    """Independent normals with known variance (regression); outputs are means (…, D), targets are (…, D).

    Its natural gradient is Gauss–Newton on the squared error.

    Args:
        variance: the variance of every component, a positive number, in squared units of the targets.
    """

    def __init__(self, variance: float = 1.0) -> None:
        number("variance", variance, 0, above=True)
        self.variance = float(variance)

    def __repr__(self) -> str:
        return f"Gaussian(variance={self.variance})"

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.shape != outputs.shape:
            raise ValueError(
                f"targets must have the shape {tuple(outputs.shape)} of outputs, got {tuple(targets.shape)}"
                f"{column_hint(outputs, targets)}"
            )
        return (-0.5 * ((targets - outputs).square() / self.variance + log(self.variance) + _LOG_2PI)).sum(-1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        return 0.5 * (old - new).square().sum(-1) / self.variance

    def entropy(self, outputs: Tensor) -> Tensor:
        per_component = 0.5 * (1 + _LOG_2PI + log(self.variance))
        return torch.full_like(outputs[..., 0], per_component * outputs.shape[-1])

    def sample(self, outputs: Tensor, generator: Generator | None = None) -> Tensor:
        noise = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
        return outputs.detach() + self.variance**0.5 * noise

    def metric(self, outputs: Tensor) -> LinearMap:
        return lambda u: u / self.variance

    def metric_factor(self, outputs: Tensor) -> LinearMap:
        return lambda epsilon: epsilon / self.variance**0.5
