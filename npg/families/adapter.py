"""Any distribution of PyTorch as a family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution, Independent, kl_divergence

from npg.families.base import Family, LinearMap, OutOfDomainError, check_events, in_double
from npg.randomness import separate_randomness

__all__ = ["from_torch"]

T = TypeVar("T")


@contextmanager
def _arguments_checked() -> Iterator[None]:
    """Where distributions look at their arguments, and so refuse what they are not defined at.

    The first use of `torch.compile`, and ``python -O``, switch that off for the whole process.
    """
    before = Distribution._validate_args
    Distribution.set_default_validate_args(True)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


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
            raise OutOfDomainError(f"{self!r} is not defined at these outputs: {error}") from error

    def _make(self, outputs: Tensor) -> Distribution:
        p = self._here(self.distribution, outputs)
        if p.batch_shape != outputs.shape[:-1]:
            raise ValueError(
                f"distribution must map outputs of shape {tuple(outputs.shape)} to batch_shape "
                f"{tuple(outputs.shape[:-1])}, got {tuple(p.batch_shape)}: "
                "wrap factors of one event in torch.distributions.Independent"
            )
        return p

    @_arguments_checked()
    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        p = self._make(outputs)
        return check_events(p.log_prob(targets), outputs, targets, event=p.event_shape)

    @_arguments_checked()
    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        # a registered KL is a difference of terms that may be many times larger than it
        return in_double(self._kl, old, new).to(old.dtype)

    def _kl(self, old: Tensor, new: Tensor) -> Tensor:
        p, q = self._make(old), self._make(new)
        try:
            return kl_divergence(p, q)
        except NotImplementedError as error:
            while isinstance(p, Independent):
                p = p.base_dist
            raise NotImplementedError(
                f"no KL divergence is registered for {type(p).__name__} with such arguments: register one with "
                "torch.distributions.kl.register_kl, whose Hessian is the metric"
            ) from error

    @_arguments_checked()
    def entropy(self, outputs: Tensor) -> Tensor:
        return self._make(outputs).entropy()

    @_arguments_checked()
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
        with separate_randomness(outputs.device, seed):
            return p.sample()

    @_arguments_checked()
    def _blocks(self, outputs: Tensor) -> Tensor:
        """M(η) = ∇²_new KL(η ‖ new) at new = η, as dense blocks (…, D, D)."""
        return self._here(lambda o: in_double(self._hessian, o), outputs.detach()).to(outputs.dtype)

    def _hessian(self, old: Tensor) -> Tensor:
        with torch.enable_grad():
            new = old.clone().requires_grad_()
            # PyTorch's KL of transformed distributions is for equal transforms alone, and takes them for constants.
            self._kl(old, old + torch.finfo(old.dtype).eps ** 0.5 * (1 + old.abs()))
            kl = self._kl(old, new)
            if not kl.requires_grad:
                raise ValueError(f"the KL of {self!r} does not depend on the outputs: check the map to distributions")
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
                f"the KL of {self!r} is taken at equal arguments. It has no minimum there or no second derivatives, so "
                "there is no metric: check the map from outputs to distribution"
            )
        if self._mixes(old):
            raise ValueError(
                f"{self!r} makes an event's distribution of other events' outputs too (such as o - o.mean(0)), so that "
                "the metric has no block for each event: let the model compute that, and the distribution take each "
                "event alone"
            )
        blocks = 0.5 * (blocks + blocks.mT)
        if self._rises_unseen(old, blocks, max(torch.finfo(x.dtype).eps for x in (old, kl))):
            raise ValueError(
                f"automatic differentiation does not find the curvature of the KL of {self!r}, which rises faster, as "
                "that of a Laplace distribution in its location: it has |d| in it. Use another distribution; "
                "outside of agents also a Family whose metric(outputs) is known, as docs/howto_family.md shows"
            )
        return blocks

    @torch.no_grad()
    def _mixes(self, old: Tensor) -> bool:
        """Whether the KL of an event changes with the outputs of others, of which about every second one is moved."""
        index = torch.arange(old[..., 0].numel(), device=old.device).view(old.shape[:-1])
        moved = index * 0.618034 % 1.0 < 0.5  # along no axis alike
        new = torch.where(moved.unsqueeze(-1), old + 1e-3 * (1 + old.abs()), old)
        try:
            change = (self._kl(old, new) - self._kl(old, old)).abs().nan_to_num()
        except ValueError:  # outside of the domain
            return False
        largest = torch.where(moved, change, 0.0).amax()
        return bool((torch.where(moved, 0.0, change) > 1e-4 * largest).any())

    @torch.no_grad()
    def _rises_unseen(self, old: Tensor, blocks: Tensor, epsilon: float) -> bool:
        """Whether the KL rises on both sides of ``old`` by the square, and otherwise than by ½dᵀMd.

        Beside a clamp it does so on one side; where a map has no slope, such as o³ at zero, by a higher power.
        The KL is rounded by about ``epsilon``.
        """
        diagonal, size = blocks.diagonal(dim1=-2, dim2=-1), old.shape[-1]

        def excess(d: Tensor) -> Tensor:
            """Of KL(η ‖ η ± d) over ½dᵀMd, on both sides, or the other way round; per event, NaN out of the domain."""
            try:
                low, high = torch.aminmax(torch.stack([self._kl(old, old + d), self._kl(old, old - d)]), dim=0)
            except ValueError:
                return torch.full_like(old[..., 0], torch.nan)
            expected = 0.5 * (d * (blocks @ d.unsqueeze(-1)).squeeze(-1)).sum(-1)
            return torch.maximum(low - expected, expected - high) - 0.01 * (diagonal * d.square()).sum(-1)

        # 1. Along outputs with a curvature, in their units; ε^¼ since rounding counts by ε/d² and what is left by d².
        generic = 0.5 + torch.arange(size, device=old.device).to(old.dtype).cos().square()  # in no null space of M
        moving = diagonal > 0
        d = torch.where(moving, 4 * epsilon**0.25 * generic / (size * torch.where(moving, diagonal, 1.0)).sqrt(), 0.0)
        whole = excess(d)
        if bool((whole > 0).any()):
            rounding = excess(1e-3 * d).nan_to_num().abs().amax().clamp(min=epsilon)
            if bool(((whole > 8 * rounding) & (excess(0.5 * d) > whole / 8)).any()):
                return True
        # 2. Along those without one, whose unit is not known: the first step that is long enough tells.
        flat = (diagonal == 0).to(old.dtype)
        left = flat.any(-1)
        for step in (1e-2, 1.0, 1e2, 1e4, 1e6) if bool(left.any()) else ():
            whole = excess(step * flat)
            rises = left & (whole > epsilon**0.5)
            if bool(rises.any()) and bool((rises & (excess(0.5 * step * flat) > whole / 8)).any()):
                return True
            left = left & ~rises
        return False

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
            ``lambda o: Independent(Poisson(o.exp()), 1)``. Targets have the shape of its draws: (…) and the event's.

    The KL and its Hessian are taken in float64 where ``distribution`` takes outputs in float64.

    Raises:
        OutOfDomainError: from the methods, if the distribution or its metric is not defined at these outputs, but is
            at outputs of zero.
        ValueError: from the methods, if the batch shape is not that of the leading axes, or the KL has no minimum
            at equal arguments.
        NotImplementedError: from ``kl`` and ``metric``, if no KL is registered.
    """
    return _TorchFamily(distribution)
