"""Families of classes and bits, in logits, with all digits where an event is nearly certain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, softplus

from npg.checks import whole
from npg.families.base import Family, LinearMap, column_hint
from npg.families.product import Product

__all__ = ["Bernoulli", "Categorical", "MultiCategorical", "covariance", "relative_entropy"]


def relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Entry by entry p log(p/q) − p + q; summed over what p and q are distributions of, it is KL(p ‖ q).

    The sum of −p + q is zero, and with it every entry is p(e⁻ᵈ − 1 + d) ≥ 0 for d = log(p/q): nothing cancels, where
    the terms p log(p/q) alone are of first order in d, and their sum is of second.
    """
    p = log_p.exp()
    d = log_p - log_q
    near = d.abs() < 1  # where q − p has lost digits
    d = d.masked_fill(p == 0, 0.0)  # before any product, so that no NaN passes to a gradient either
    change = torch.where(near, p * torch.expm1(-d.masked_fill(~near, 0.0)), log_q.exp() - p)
    return change + p * d


def covariance(p: Tensor) -> LinearMap:
    """diag(p) − p pᵀ of probabilities (…, C), as a map (…, C) → (…, C); further axes in front broadcast.

    p∘(u − pᵀu) is a difference of equals at a class that is nearly certain. A common constant in u changes nothing, so
    that u is first taken from that of the most probable class k: then pᵀu holds no p_k, and no digit is lost.
    """
    k = p.argmax(-1, keepdim=True)

    def apply(u: Tensor) -> Tensor:
        centred = u - u.gather(-1, k.expand(*u.shape[:-1], 1))
        return p * (centred - (p * centred).sum(-1, keepdim=True))

    return apply


def _index_hint(outputs: Tensor, targets: Tensor) -> str:
    """How targets of another shape become class indices, where that is plain."""
    if targets.shape == (*outputs.shape[:-1], 1):
        return ", by targets.squeeze(-1)"
    if outputs.ndim > 2 and targets.shape == (*outputs.shape[:1], *outputs.shape[2:]):  # as cross_entropy takes them
        return ", and let the model return outputs.movedim(1, -1), with the classes on the last axis"
    return ", by targets.argmax(-1) of rows with a single 1" if targets.shape == outputs.shape else ""


class Categorical(Family):
    """One of C classes; outputs are logits (…, C), targets are class indices (…), integers from 0 to C − 1.

    Classes stand on the last axis, also for sequences and images, where `torch.nn.functional.cross_entropy` has them on
    axis 1. Forbidden classes may carry the logit −inf: they have probability, metric and KL contribution zero.
    """

    @staticmethod
    def _index(outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.shape != outputs.shape[:-1]:
            raise ValueError(
                f"targets must have shape {tuple(outputs.shape[:-1])} for outputs of shape {tuple(outputs.shape)}, "
                f"got {tuple(targets.shape)}: pass class indices, one per event{_index_hint(outputs, targets)}"
            )
        if targets.is_floating_point() or targets.is_complex():
            raise ValueError(
                f"targets must be class indices of an integer dtype, got {targets.dtype}: use targets.long() if these "
                "are whole numbers"
            )
        return targets.long().unsqueeze(-1)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        low, high = (int(x) for x in self._index(outputs, targets).aminmax())
        if low < 0 or high >= outputs.shape[-1]:
            raise ValueError(
                f"targets must be class indices from 0 to {outputs.shape[-1] - 1}, got {low} to {high}: leave out "
                "events whose label is to be ignored, and give the model an output for each class"
            )

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        index = self._index(outputs, targets)
        return outputs.log_softmax(-1).gather(-1, index).squeeze(-1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        return relative_entropy(old.log_softmax(-1), new.log_softmax(-1)).sum(-1)

    def entropy(self, outputs: Tensor) -> Tensor:
        log_p = outputs.log_softmax(-1)
        p = log_p.exp()
        # of a class that is nearly certain, log p = log(1 − Σ of the others) has no digits but by that sum
        k = p.argmax(-1, keepdim=True)
        others = p.scatter(-1, k, 0.0).sum(-1, keepdim=True)
        log_p = log_p.scatter(-1, k, torch.log1p(-others))
        return -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)

    def sample(self, outputs: Tensor, generator: Generator | None = None) -> Tensor:
        p = outputs.detach().softmax(-1)
        draws = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator)
        return draws.reshape(p.shape[:-1])

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # eᵧ − p, with 1 − pᵧ as the sum of the others: the difference has no digits where pᵧ is nearly 1
        index = self._index(outputs, targets)
        others = outputs.detach().softmax(-1).scatter(-1, index, 0.0)
        return others.neg().scatter(-1, index, others.sum(-1, keepdim=True))

    def metric(self, outputs: Tensor) -> LinearMap:
        # M = diag(p) − p pᵀ
        return covariance(outputs.detach().softmax(-1))

    def metric_factor(self, outputs: Tensor) -> LinearMap:
        # L = diag(r) − m rᵀ with k the most probable class, r = √p but for r_k = 0, and m = p/(1 + √p_k) but for
        # m_k = √p_k: rᵀr = 1 − p_k makes L Lᵀ = diag(p) − p pᵀ, and the difference is never taken, as in `covariance`
        p = outputs.detach().softmax(-1)
        root_k, k = p.sqrt().max(-1, keepdim=True)
        root = p.sqrt().scatter(-1, k, 0.0)
        shared = (p / (1 + root_k)).scatter(-1, k, root_k)

        def apply(epsilon: Tensor) -> Tensor:
            scaled = root * epsilon
            return scaled - shared * scaled.sum(-1, keepdim=True)

        return apply


class MultiCategorical(Product):
    """Several independent categorical variables; outputs are their logits side by side, targets are K indices (…, K).

    Args:
        sizes: the number of classes of each variable; they sum to the last axis of the outputs.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        sizes = list(sizes)
        for i, size in enumerate(sizes):
            whole(f"sizes[{i}]", size, 1)
        if not sizes:
            raise ValueError("sizes must name at least one variable, with its number of classes, got []")
        super().__init__([Categorical()] * len(sizes), [int(size) for size in sizes])

    def __repr__(self) -> str:
        return f"MultiCategorical({self.sizes})"

    def _apart(self, outputs: Tensor, targets: Tensor) -> Sequence[Tensor]:
        if targets.shape != (*outputs.shape[:-1], len(self.sizes)):
            raise ValueError(
                f"targets must have shape {(*outputs.shape[:-1], len(self.sizes))} for outputs of shape "
                f"{tuple(outputs.shape)}, got {tuple(targets.shape)}: pass one class index per variable"
            )
        return targets.unbind(-1)

    def _together(self, targets: list[Tensor]) -> Tensor:
        return torch.stack(targets, -1)


class Bernoulli(Family):
    """D independent bits; outputs are logits (…, D), targets are bits (…, D) of any dtype."""

    @staticmethod
    def _bits(outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.shape != outputs.shape:
            raise ValueError(
                f"targets must have the shape {tuple(outputs.shape)} of outputs, got {tuple(targets.shape)}"
                f"{column_hint(outputs, targets)}"
            )
        return targets.to(outputs.dtype)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        low, high = (float(x) for x in self._bits(outputs, targets).aminmax())
        if low < 0 or high > 1:
            raise ValueError(
                f"targets must be bits, 0 or 1, or probabilities between them, got {low:g} to {high:g}: divide bytes "
                "by 255, and write (y + 1) / 2 for y of ±1"
            )

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        bits = self._bits(outputs, targets)
        return -binary_cross_entropy_with_logits(outputs, bits, reduction="none").sum(-1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        # of both values of a bit, each from its own logit: 1 − p would lose all digits of q for large logits
        ones = relative_entropy(logsigmoid(old), logsigmoid(new))
        return (ones + relative_entropy(logsigmoid(-old), logsigmoid(-new))).sum(-1)

    def entropy(self, outputs: Tensor) -> Tensor:
        # H = −p log p − q log q, a sum of positive terms
        return (outputs.sigmoid() * softplus(-outputs) + (-outputs).sigmoid() * softplus(outputs)).sum(-1)

    def sample(self, outputs: Tensor, generator: Generator | None = None) -> Tensor:
        return torch.bernoulli(outputs.detach().sigmoid(), generator=generator)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # y − p = yq − (1 − y)p
        bits, outputs = self._bits(outputs, targets), outputs.detach()
        return bits * (-outputs).sigmoid() - (1 - bits) * outputs.sigmoid()

    @staticmethod
    def _variance(outputs: Tensor) -> Tensor:
        outputs = outputs.detach()
        return outputs.sigmoid() * (-outputs).sigmoid()

    def metric(self, outputs: Tensor) -> LinearMap:
        variance = self._variance(outputs)
        return lambda u: variance * u

    def metric_factor(self, outputs: Tensor) -> LinearMap:
        deviation = self._variance(outputs).sqrt()
        return lambda epsilon: deviation * epsilon
