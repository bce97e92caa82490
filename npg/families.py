"""Predictive distributions: what a network's outputs mean, and the geometry that this meaning puts on them.

A family reads the last axis of ``outputs`` as the parameters η of one distribution; all leading axes are independent
events. Every method is batched over the leading axes, takes and returns tensors, and is differentiable where that
makes sense. Log-likelihoods, KL divergences and entropies are in nats.

The metric M(η) is the Fisher information of the distribution in its own parameters,
``M(η) = E_{y~p(·|η)}[∇_η log p ∇_η log pᵀ]``, the only thing of a family that the Fisher of a network needs
(Amari 1998; Martens 2020, section 5).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import log, pi
from typing import TypeVar

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution, kl_divergence
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, softplus

__all__ = [
    "Bernoulli",
    "Categorical",
    "DiagonalGaussian",
    "Family",
    "Gaussian",
    "Geometry",
    "MultiCategorical",
    "OutOfDomainError",
    "from_torch",
]

LinearMap = Callable[[Tensor], Tensor]

T = TypeVar("T")

_LOG_2PI = log(2 * pi)


class OutOfDomainError(ValueError):
    """Outputs at which a distribution, its metric or a draw from it is not defined or not finite.

    `npg.natural_step` refuses its step for this error, and lets every other one through.
    """


def in_double(function: Callable[..., Tensor], *outputs: Tensor) -> Tensor:
    """``function(*outputs)`` in float64, or in the outputs' own dtype where it takes no other (float32 constants)."""
    try:
        return function(*(x.double() for x in outputs))
    except (RuntimeError, TypeError):
        if all(x.dtype is torch.float64 for x in outputs):
            raise
        return function(*outputs)


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


class Geometry(ABC):
    """A geometry of outputs: a metric to solve for a step in, and the divergence to check the step by.

    `npg.geometry` has Fisher and Rao's, of a family, and Euclid's; `npg.transport` has Wasserstein's.
    """

    @abstractmethod
    def __call__(self, outputs: Tensor) -> LinearMap:
        """M(η) as a map of output tangents, (…, D) → (…, D); further axes in front broadcast."""

    @abstractmethod
    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        """Per event, what ½dᵀM(η)d is the second order of; (…, D), (…, D) → (…)."""

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


class Family(ABC):
    """A family of distributions p(y | η), with η the last axis of ``outputs``."""

    @abstractmethod
    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Log p(y | η), in nats; outputs (…, D) → (…)."""

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
            (score,) = torch.autograd.grad(self.log_likelihood(outputs, targets).sum(), outputs)
        return score

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Categorical(Family):
    """One of C classes; outputs are logits (…, C), targets are class indices (…).

    Forbidden classes may carry the logit −inf: they have probability, metric and KL contribution zero.
    """

    @staticmethod
    def _index(outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.shape != outputs.shape[:-1]:
            raise ValueError(
                f"targets must have shape {tuple(outputs.shape[:-1])} for outputs of shape {tuple(outputs.shape)}, "
                f"got {tuple(targets.shape)}: pass class indices, one per event"
            )
        if targets.is_floating_point() or targets.is_complex():
            raise ValueError(
                f"targets must be class indices of an integer dtype, got {targets.dtype}: use targets.long() if these "
                "are whole numbers"
            )
        return targets.long().unsqueeze(-1)

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


class MultiCategorical(Family):
    """Several independent categorical variables; outputs are their logits side by side, targets are indices (…, K).

    Args:
        sizes: the number of classes of each variable; they sum to the last axis of the outputs.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        if not sizes or any(size < 1 for size in sizes):
            raise ValueError(f"sizes must name at least one variable with at least one class each, got {sizes!r}")
        self.sizes = [int(size) for size in sizes]
        self._categorical = Categorical()

    def __repr__(self) -> str:
        return f"MultiCategorical({self.sizes})"

    def _split(self, outputs: Tensor) -> tuple[Tensor, ...]:
        if outputs.shape[-1] != sum(self.sizes):
            raise ValueError(
                f"outputs must have {sum(self.sizes)} = sum({self.sizes}) logits on the last axis, "
                f"got {outputs.shape[-1]}"
            )
        return outputs.split(self.sizes, -1)

    def _pairs(self, outputs: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
        if targets.shape != (*outputs.shape[:-1], len(self.sizes)):
            raise ValueError(
                f"targets must have shape {(*outputs.shape[:-1], len(self.sizes))} for outputs of shape "
                f"{tuple(outputs.shape)}, got {tuple(targets.shape)}: pass one class index per variable"
            )
        return list(zip(self._split(outputs), targets.unbind(-1)))

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        pairs = self._pairs(outputs, targets)
        return torch.stack([self._categorical.log_likelihood(o, t) for o, t in pairs]).sum(0)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        return torch.stack([self._categorical.kl(a, b) for a, b in zip(self._split(old), self._split(new))]).sum(0)

    def entropy(self, outputs: Tensor) -> Tensor:
        return torch.stack([self._categorical.entropy(o) for o in self._split(outputs)]).sum(0)

    def sample(self, outputs: Tensor, generator: Generator | None = None) -> Tensor:
        return torch.stack([self._categorical.sample(o, generator) for o in self._split(outputs)], -1)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.cat([self._categorical.score(o, t) for o, t in self._pairs(outputs, targets)], -1)

    def _blockwise(self, maps: list[LinearMap]) -> LinearMap:
        return lambda u: torch.cat([m(part) for m, part in zip(maps, self._split(u))], -1)

    def metric(self, outputs: Tensor) -> LinearMap:
        return self._blockwise([self._categorical.metric(o) for o in self._split(outputs)])

    def metric_factor(self, outputs: Tensor) -> LinearMap:
        return self._blockwise([self._categorical.metric_factor(o) for o in self._split(outputs)])


class Bernoulli(Family):
    """D independent bits; outputs are logits (…, D), targets are bits (…, D) of any dtype."""

    @staticmethod
    def _bits(outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.shape != outputs.shape:
            raise ValueError(
                f"targets must have the shape {tuple(outputs.shape)} of outputs, got {tuple(targets.shape)}"
            )
        return targets.to(outputs.dtype)

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
            raise ValueError(f"targets must have the shape {tuple(mean.shape)} of the mean, got {tuple(targets.shape)}")
        z = (targets - mean) * torch.exp(-log_std)
        return (-0.5 * z * z - log_std - 0.5 * _LOG_2PI).sum(-1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        mean_old, log_old = self.split(old)
        mean_new, log_new = self.split(new)
        # ½(e^{2d} − 1) − d with d = log σ_old − log σ_new; expm1 keeps it exact to rounding when d is tiny
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
        if not variance > 0:
            raise ValueError(f"variance must be positive, got {variance!r}")
        self.variance = float(variance)

    def __repr__(self) -> str:
        return f"Gaussian(variance={self.variance})"

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.shape != outputs.shape:
            raise ValueError(
                f"targets must have the shape {tuple(outputs.shape)} of outputs, got {tuple(targets.shape)}"
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


class _TorchFamily(Family):
    """The adapter behind `from_torch`."""

    def __init__(self, distribution: Callable[[Tensor], Distribution]) -> None:
        self.distribution = distribution

    def __repr__(self) -> str:
        return f"from_torch({self.distribution!r})"

    def _here(self, work: Callable[[Tensor], T], outputs: Tensor) -> T:
        """``work(outputs)``, where a ValueError becomes an `OutOfDomainError` unless outputs of zero give one as well.

        What fails at zeros too is a mistake in the map from outputs to distribution; what fails here alone is so for
        the values of these outputs.
        """
        try:
            return work(outputs)
        except ValueError as error:
            try:
                work(torch.zeros_like(outputs))
            except ValueError:
                raise error from None
            raise OutOfDomainError(f"{self!r} cannot be had at these outputs: {error}") from error

    def _make(self, outputs: Tensor) -> Distribution:
        p = self._here(self.distribution, outputs)
        if p.batch_shape != outputs.shape[:-1]:
            raise ValueError(
                f"distribution must map outputs of shape {tuple(outputs.shape)} to batch_shape "
                f"{tuple(outputs.shape[:-1])}, got {tuple(p.batch_shape)}: "
                "wrap factors of one event in torch.distributions.Independent"
            )
        return p

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._make(outputs).log_prob(targets)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        # a registered KL is a difference of terms that may be many times larger than it
        return in_double(self._kl, old, new).to(old.dtype)

    def _kl(self, old: Tensor, new: Tensor) -> Tensor:
        return kl_divergence(self._make(old), self._make(new))

    def entropy(self, outputs: Tensor) -> Tensor:
        return self._make(outputs).entropy()

    def sample(self, outputs: Tensor, generator: Generator | None = None) -> Tensor:
        p = self._make(outputs.detach())
        draws = self._draw(p, outputs, generator)
        try:
            support = p.support
        except NotImplementedError:
            support = None
        if support is not None and not bool(support.check(draws).all()):
            raise OutOfDomainError(
                f"{self!r} draws what is outside of its support at these outputs, such as counts beyond 2⁶³: "
                "keep them within the range of its draws"
            )
        return draws

    @staticmethod
    def _draw(p: Distribution, outputs: Tensor, generator: Generator | None) -> Tensor:
        if generator is None:
            return p.sample()
        # torch.distributions knows only the global stream: lend it ours for the one draw
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        devices = [outputs.device] if outputs.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return p.sample()

    def _blocks(self, outputs: Tensor) -> Tensor:
        """M(η) = ∇²_new KL(η ‖ new) at new = η, as dense blocks (…, D, D)."""
        return self._here(lambda o: in_double(self._hessian, o), outputs.detach()).to(outputs.dtype)

    def _hessian(self, old: Tensor) -> Tensor:
        with torch.enable_grad():
            new = old.clone().requires_grad_()
            try:
                kl = self._kl(old, new)
            except NotImplementedError as error:
                raise NotImplementedError(
                    f"no KL divergence is registered for {type(self._make(old)).__name__}: register one with "
                    "torch.distributions.kl.register_kl, the metric is its Hessian"
                ) from error
            (gradient,) = torch.autograd.grad(kl.sum(), new, create_graph=True)
            # events are independent, so one unit tangent serves all of them at once
            units = torch.eye(old.shape[-1], dtype=old.dtype, device=old.device)
            rows = [
                torch.autograd.grad(gradient, new, unit.expand_as(old), retain_graph=True, materialize_grads=True)[0]
                for unit in units
            ]
        blocks = torch.stack(rows, -2)
        scale = blocks.abs().amax()
        tolerance = 1e3 * torch.finfo(blocks.dtype).eps
        if not bool(torch.isfinite(scale) & torch.isfinite(gradient).all()):
            raise ValueError(f"the Hessian of the KL of {self!r} is not finite at these outputs")
        if gradient.abs().amax() > tolerance * scale.clamp(min=1.0).sqrt() or (
            (blocks - blocks.mT).abs().amax() > tolerance * scale
        ):
            raise ValueError(
                f"the KL of {self!r} is not minimal at equal arguments or not twice differentiable there: "
                "it gives no metric; check the map from outputs to distribution"
            )
        flat = blocks.diagonal(dim1=-2, dim2=-1) == 0
        if bool(flat.any()) and bool((self._kl(old, torch.where(flat, old + 0.01, old)) > tolerance).any()):
            raise ValueError(
                f"the KL of {self!r} rises along outputs in which automatic differentiation finds no curvature "
                "(a kink, as that of a Laplace distribution in its location): it gives no metric"
            )
        return 0.5 * (blocks + blocks.mT)

    def metric(self, outputs: Tensor) -> LinearMap:
        blocks = self._blocks(outputs)
        return lambda u: (blocks @ u.unsqueeze(-1)).squeeze(-1)

    def metric_factor(self, outputs: Tensor) -> LinearMap:
        values, vectors = torch.linalg.eigh(self._blocks(outputs).double())
        factor = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)).to(outputs.dtype)
        return lambda epsilon: (factor @ epsilon.unsqueeze(-1)).squeeze(-1)


def from_torch(distribution: Callable[[Tensor], Distribution]) -> Family:
    """Any ``torch.distributions`` family with a registered KL; the metric is the Hessian of that KL in output space.

    ``M(η) = ∇²_{η'} KL(p_η ‖ p_η') at η' = η`` costs D second derivatives per linearisation and D² numbers per event,
    so the closed-form families of this module are preferable where they fit.

    Args:
        distribution: maps outputs (…, D) to a distribution of batch shape (…), for example
            ``lambda o: Independent(Poisson(o.exp()), 1)``.

    The KL and its Hessian are taken in float64 where ``distribution`` takes outputs in float64.

    Raises:
        OutOfDomainError: from the methods, if the distribution or its metric cannot be had at these outputs, but can
            at outputs of zero.
        ValueError: from the methods, if the batch shape is not that of the leading axes, or the KL has no minimum
            at equal arguments.
        NotImplementedError: from ``kl`` and ``metric``, if no KL is registered.
    """
    return _TorchFamily(distribution)
