"""What every family and every geometry of outputs has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

__all__ = [
    "Family",
    "Geometry",
    "LinearMap",
    "OutOfDomainError",
    "blockwise",
    "check_events",
    "check_outputs",
    "column_hint",
    "in_double",
]

LinearMap = Callable[[Tensor], Tensor]


class OutOfDomainError(ValueError):
    """Outputs at which a distribution, its metric or a draw from it is not defined or not finite.

    `npg.natural_step` refuses its step for this error, and lets every other one through.
    """


def blockwise(maps: Sequence[LinearMap], sizes: Sequence[int]) -> LinearMap:
    """The block diagonal map of `maps`, each for its share `sizes` of the last axis."""
    return lambda u: torch.cat([m(part) for m, part in zip(maps, u.split(list(sizes), -1), strict=True)], -1)


def check_outputs(outputs: Tensor, inputs: Any = None) -> None:
    """Raise ValueError for outputs without an axis of events, (N,): N events of one component or one of N.

    A function without inputs, ``inputs=()``, has no mini-batch: its outputs are one event, with or without an axis.
    Neither may an event have no components.
    """
    if outputs.shape[-1] == 0:
        raise ValueError(
            f"the model returns outputs of shape {tuple(outputs.shape)}: their last axis, an event's components, is "
            "empty. Return at least one"
        )
    if outputs.ndim < 2 and not (isinstance(inputs, tuple) and not inputs):
        n = outputs.numel()
        raise ValueError(
            f"the model returns outputs of shape {tuple(outputs.shape)}: that is one event of {n} components, and a "
            f"mini-batch has its events on the leading axis. Return ({n}, 1) for {n} events, without squeeze(-1); "
            f"(1, {n}) for one"
        )


def column_hint(outputs: Tensor, targets: Tensor) -> str:
    """How targets (N,) become those of outputs (N, 1); nothing for other shapes."""
    return ": use targets.unsqueeze(-1)" if (*targets.shape, 1) == outputs.shape else ""


def check_events(values: Tensor, outputs: Tensor, targets: Any, event: tuple[int, ...] | None = None) -> Tensor:
    """Return ``values``, log-likelihoods; raise ValueError unless there is one for each event, (…) for outputs (…, D).

    Others come of targets that were broadcast, such as (N, 1) against the (N,) of a distribution of numbers, ``event``
    being the shape of one target where it is known.
    """
    if values.shape != outputs.shape[:-1]:
        shape = f"of shape {tuple(targets.shape)} " if isinstance(targets, Tensor) else ""
        wanted = "" if event is None else f": give targets of shape {(*outputs.shape[:-1], *event)}"
        raise ValueError(
            f"targets {shape}have log-likelihoods of shape {tuple(values.shape)} at outputs of shape "
            f"{tuple(outputs.shape)}, where each event has one, {tuple(outputs.shape[:-1])}{wanted}"
        )
    return values


def in_double(function: Callable[..., Tensor], *outputs: Tensor) -> Tensor:
    """``function(*outputs)`` in float64, or in the outputs' own dtype where it takes no other (float32 constants)."""
    try:
        return function(*(x.double() for x in outputs))
    except torch.OutOfMemoryError:  # a RuntimeError, but none of the dtype
        raise
    except (RuntimeError, TypeError):
        if all(x.dtype is torch.float64 for x in outputs):
            raise
        return function(*outputs)


class Geometry(ABC):
    """A geometry of outputs: a metric to solve for a step in, and the divergence to check the step by.

    `npg.geometry` has Fisher and Rao's, of a family, and Euclid's; `npg.transport` has Wasserstein's.
    """

    @abstractmethod
    def __call__(self, outputs: Tensor) -> LinearMap:
        """M(η) as a map of output tangents, (…, D) → (…, D); further axes in front broadcast."""

    @abstractmethod
    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        """D(old, new) ≥ 0 per event, with D(η, η + d) = ½dᵀM(η)d + O(‖d‖³); (…, D), (…, D) → (…). KL is in nats."""

    def factor(self, outputs: Tensor) -> LinearMap:
        """A factor L with L Lᵀ = M(η), as a map ε ↦ Lε, (…, D) → (…, D); further axes in front broadcast.

        By default V√Λ of the dense blocks M = VΛVᵀ: D products with M, and O(D³) per event.

        Raises:
            ValueError: if M is not symmetric and positive semi-definite.
        """
        dim = outputs.shape[-1]
        units = torch.eye(dim, dtype=outputs.dtype, device=outputs.device)
        units = units.reshape(dim, *[1] * (outputs.ndim - 1), dim).expand(dim, *outputs.shape)
        blocks = self(outputs)(units).movedim(0, -1)
        finite = torch.isfinite(blocks).all(-1, keepdim=True).all(-2, keepdim=True)
        values, vectors = torch.linalg.eigh(torch.where(finite, blocks, 0.0).double())
        rounding = torch.finfo(blocks.dtype).eps ** 0.5 * values.abs().amax(-1)
        skew = (blocks - blocks.mT).masked_fill(~finite, 0.0).abs().amax((-2, -1))
        if bool(((values.amin(-1) < -rounding) | (skew > rounding)).any()):
            raise ValueError(
                f"the metric of {self!r} is not symmetric and positive semi-definite at these outputs: it has no factor"
            )
        factor = torch.where(finite, (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)).to(outputs.dtype), torch.nan)
        return lambda epsilon: (factor @ epsilon.unsqueeze(-1)).squeeze(-1)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or ((a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b))
    try:
        return bool(a == b)
    except (RuntimeError, ValueError):  # arrays, or lists of tensors, have no single answer
        return a is b


class Family(ABC):
    """A family of distributions p(y | η), with η the last axis of ``outputs``.

    Two are equal if they are of exactly one class and their attributes are equal.
    """

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        mine, others = vars(self), vars(other)
        return mine.keys() == others.keys() and all(_same(value, others[name]) for name, value in mine.items())

    def __hash__(self) -> int:
        return hash(type(self))  # attributes may have none

    @abstractmethod
    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Log p(y | η), in nats; outputs (…, D) → (…)."""

    def check_targets(self, outputs: Tensor, targets: Any) -> None:  # noqa: B027 - most take any number
        """Raise ValueError for targets with values that no event has; a look at them, which a GPU would wait for."""

    @abstractmethod
    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """KL(old ‖ new) per event, in nats; (…, D), (…, D) → (…)."""

    @abstractmethod
    def entropy(self, outputs: Tensor) -> Tensor:
        """Entropy per event, in nats; (…, D) → (…)."""

    @abstractmethod
    def sample(self, outputs: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw one y ~ p(· | η) per event, without gradient; in the shape ``log_likelihood`` takes as targets."""

    @abstractmethod
    def metric(self, outputs: Tensor) -> LinearMap:
        """M(η) as a map of output tangents, (…, D) → (…, D); further axes in front broadcast."""

    @abstractmethod
    def metric_factor(self, outputs: Tensor) -> LinearMap:
        """A factor L with L Lᵀ = M(η) as a map ε ↦ Lε, (…, D) → (…, D); further axes in front broadcast."""

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """∇_η log p(y | η) per event; (…, D) → (…, D)."""
        with torch.enable_grad():
            outputs = outputs.detach().requires_grad_()
            values = check_events(self.log_likelihood(outputs, targets), outputs, targets)
            (score,) = torch.autograd.grad(values.sum(), outputs)
        return score

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
