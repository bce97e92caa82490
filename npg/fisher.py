"""The Fisher information of a network as a linear operator: the pull-back of its family's metric.

For outputs η(θ) of a network on N events and the metric M(η) of its predictive family,

    F = (1/N) Σₙ Jₙᵀ M(ηₙ) Jₙ,        J = ∂η/∂θ

which for the Fisher–Rao metric is E[∇log p ∇log pᵀ] over the model's own labels, and the generalised Gauss–Newton
matrix of the mean negative log-likelihood (Amari 1998; Martens 2020, equation 6). Sampled and empirical Fishers are
the same pull-back with M replaced by the outer products of output scores, and any other metric on the outputs may be
put in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from math import inf, nan
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Generator, Tensor

from npg.checks import one_of, whole
from npg.families import Bernoulli, Categorical, DiagonalGaussian, Family, Gaussian, MultiCategorical
from npg.families.base import OutOfDomainError, check_outputs
from npg.geometry import FisherRao, Metric, geometry_of
from npg.linearize import Linearization
from npg.model import Model, unwrapped
from npg.parallel import mean_, mean_of_shares
from npg.parameters import check_beside

__all__ = ["Fisher", "Kind"]

Kind = Literal["exact", "sampled", "empirical"]

_CHUNK = 64  # right-hand sides, or rows of the Jacobian, that are treated at once


#: Families that are functions of the outputs alone, for certain.
_WITHOUT_TENSORS = (Bernoulli, Categorical, DiagonalGaussian, Gaussian, MultiCategorical)


def _outer_products(scores: Tensor, u: Tensor) -> Tensor:
    """M u with M = (1/S) Σ g gᵀ and the scores g, (S, …, D)."""
    u = u.unsqueeze(-scores.ndim)
    return (scores * (scores * u).sum(-1, keepdim=True)).mean(-scores.ndim)


class _Product(torch.autograd.Function):
    """F v as a function of v: F is symmetric, so its derivative's transpose is F too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, fisher: Fisher) -> Tensor:
        return fisher @ v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Fisher], output: Tensor) -> None:
        ctx.fisher = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.fisher @ gradient, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return cast(Tensor, ctx.fisher @ tangent)


class _Quadratic(torch.autograd.Function):
    """vᵀFv as a function of v, with the derivative 2Fv."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, fisher: Fisher) -> Tensor:
        return fisher.quadratic(v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Fisher], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])
        ctx.fisher = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        return 2 * gradient * (ctx.fisher @ v), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (v,) = ctx.saved_tensors
        return cast(Tensor, 2 * (tangent * (ctx.fisher @ v)).sum(0))


class Fisher:
    """The Fisher information matrix F of a network, matrix-free: ``fisher @ v``.

    ``F = (1/N) Σₙ Jₙᵀ M(ηₙ) Jₙ`` over all N events, that is over every axis of the outputs but the last. The network
    is linearised once, at construction, in the mode it is in (training or evaluation), without moving running
    statistics; the operator is symmetric and positive semi-definite, and stays valid until the parameters change.

    Args:
        model: a module, or a function ``f(parameters, *inputs)``.
        inputs: a tensor, or a tuple of positional arguments (a named tuple is one of them).
        family: the predictive distribution of the outputs, or a geometry of them (`npg.geometry`).
        kind: ``"exact"`` (the expectation over labels in closed form), ``"sampled"`` (labels drawn from the model,
            once, so that all products are with one matrix) or ``"empirical"`` (the labels of the data).
        targets: the labels, for ``"empirical"``, in the form that ``family.log_likelihood`` takes.
        samples: how many labels to draw per event, for ``"sampled"``.
        generator: the source of randomness of ``"sampled"``.
        metric: another metric on the outputs than the family's Fisher information, in its place: a geometry, or any
            function of the outputs η that returns the map u ↦ M(η)u.
        parameters: by name: needed where ``model`` is a function; for a module, all trainable ones by default.
        process_group: average over the processes of this group, each of which holds an equal share of the events.
            A model in DistributedDataParallel brings its own.
        linearization: of the same model at the same inputs, where one exists already.

    Raises:
        ValueError: if an argument is out of its range, or if nothing is trainable.
        OutOfDomainError: a ValueError, if the family's metric is not finite at these outputs.
    """

    def __init__(
        self,
        model: Model,
        inputs: Any,
        family: Family | Metric,
        *,
        kind: Kind = "exact",
        targets: Any = None,
        samples: int = 1,
        generator: Generator | None = None,
        metric: Metric | None = None,
        parameters: Mapping[str, Tensor] | None = None,
        process_group: dist.ProcessGroup | None = None,
        linearization: Linearization | None = None,
    ) -> None:
        one_of("kind", kind, ("exact", "sampled", "empirical"))
        if (kind == "empirical") != (targets is not None):
            raise ValueError(f"targets must be given for kind='empirical', and only for it (kind={kind!r})")
        whole("samples", samples, 1)
        model, process_group = unwrapped(model, process_group)
        self.geometry = geometry_of(family if metric is None else metric)
        if kind != "exact" and type(self.geometry) is not FisherRao:
            raise ValueError(
                f"another metric than a family's own goes with kind='exact' only, got kind={kind!r}: leave it out"
            )
        self.linearization = linearization or Linearization(model, inputs, parameters)
        self.parameters = self.linearization.parameters
        self.process_group = process_group
        # What brings a linearisation has the shares compared, with its objective.
        self._shares_compared = process_group is None or linearization is not None
        outputs = self.linearization.outputs
        check_outputs(outputs, inputs)
        self.events = outputs.numel() // outputs.shape[-1]
        if self.events == 0:
            raise ValueError(f"inputs must hold at least one event, got outputs of shape {tuple(outputs.shape)}")
        self._scores: Tensor | None = None
        if type(self.geometry) is not FisherRao or kind == "exact":
            self._metric = self.geometry(outputs)
            if type(self.geometry) is FisherRao and type(self.geometry.family) not in _WITHOUT_TENSORS:
                self._check_beside(partial(self.geometry.family.kl, outputs, outputs))
        else:
            family = self.geometry.family
            # An event with NaN or ∞ among its outputs has no label to draw (on CUDA that would end the process) and no
            # score: all products are NaN with it. −∞ forbids a class.
            usable = (outputs < inf).all(-1, keepdim=True)
            at = torch.where(usable, outputs, 0.0)
            if targets is not None and at.device.type == "cpu":
                family.check_targets(at, targets)
            labels = [targets] if targets is not None else [family.sample(at, generator) for _ in range(samples)]
            self._check_beside(partial(family.log_likelihood, at, labels[0]))
            self._scores = torch.stack([torch.where(usable, family.score(at, y), nan) for y in labels])
            # Not a method of this object, which would hold itself and all of its activations that way.
            self._metric = partial(_outer_products, self._scores)

    def _check_beside(self, of_family: Callable[[], Tensor]) -> None:
        """Raise ValueError if a value of the family, computed from outputs without a graph, depends on parameters."""
        with torch.enable_grad(), suppress(NotImplementedError, OutOfDomainError):
            value = of_family()
            if value.requires_grad:
                check_beside(value, self.parameters, repr(self.geometry.family))  # type: ignore[attr-defined]

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Fisher holds a recorded forward pass, which is neither copied nor pickled: copy the model, and make the "
            "Fisher of the copy anew"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.parameters.numel, self.parameters.numel

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors it takes and returns."""
        return self.parameters.dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.parameters.device

    @property
    def outputs(self) -> Tensor:
        """η at the point of linearisation, (…, D), detached."""
        return self.linearization.outputs

    def __repr__(self) -> str:
        return f"Fisher({self.parameters.numel} parameters, {self.events} events, {self.geometry!r})"

    def compare_shares(self) -> None:
        """Look once whether all processes have equal shares of the events; every product does, before it is a mean.

        Raises:
            ValueError: in all processes alike, if they have not.
        """
        if not self._shares_compared:
            mean_of_shares(self.outputs.new_zeros(()), self.events, self.process_group)
            self._shares_compared = True

    def _mean_(self, tensor: Tensor) -> Tensor:
        self.compare_shares()
        return mean_(tensor, self.process_group)

    def __matmul__(self, v: Tensor) -> Tensor:
        """F v; (P,) → (P,), or (P, K) → (P, K); differentiable in ``v``, as a function of which F is constant.

        Raises:
            TypeError: if ``v`` is no tensor.
            ValueError: if ``v`` is not real, or does not have P rows; in several processes, if they do not have equal
                shares of the events.
            RuntimeError: if the parameters have changed since construction.
        """
        self.parameters.check(v)
        if v.ndim == 2 and v.shape[1] == 0:
            return torch.zeros_like(v, dtype=self.dtype)
        if v.requires_grad and torch.is_grad_enabled():
            return cast(Tensor, _Product.apply(v, self))
        u = self._metric(self.linearization.push_forward(v.to(self.dtype)))
        return self._mean_(self.linearization.pull_back(u).div_(self.events))

    def quadratic(self, v: Tensor) -> Tensor:
        """vᵀFv for (P,) → (), or columnwise for (P, K) → (K,), at the cost of a push forward alone.

        It is differentiable in ``v``: the penalty ½(θ − θ₀)ᵀF(θ − θ₀) of elastic weight consolidation is
        ``0.5 * fisher.quadratic(theta - theta_0)``, with θ as one vector (`torch.nn.utils.parameters_to_vector`), and
        the Fisher of a copy of the model that stays as it is.
        """
        self.parameters.check(v)
        if v.ndim == 2 and v.shape[1] == 0:
            return torch.zeros(0, dtype=self.dtype, device=self.device)
        if v.requires_grad and torch.is_grad_enabled():
            return cast(Tensor, _Quadratic.apply(v, self))
        u = self.linearization.push_forward(v.to(self.dtype))
        products = (u * self._metric(u)).flatten(v.ndim - 1).sum(-1, dtype=torch.float64)
        return self._mean_(products / self.events).to(self.dtype)

    # ------------------------------------------------------------------------------------------ for small models

    def _factor_rows(self) -> Iterator[Tensor]:
        """The rows of B with F = BᵀB, (events·D, P), in chunks; exact also where events interact (BatchNorm)."""
        outputs = self.outputs
        if self._scores is not None:
            per_sample = (self.events * len(self._scores)) ** -0.5
            for scores in self._scores:
                flat = scores.reshape(self.events, -1)
                for index in torch.arange(self.events, device=outputs.device).split(_CHUNK):
                    u = flat.new_zeros(len(index), *flat.shape)
                    u[torch.arange(len(index), device=u.device), index] = flat[index] * per_sample
                    yield self.linearization.pull_back(u.reshape(len(index), *outputs.shape)).T
        else:
            factor = self.geometry.factor(outputs)
            for index in torch.arange(outputs.numel(), device=outputs.device).split(_CHUNK):
                units = outputs.new_zeros(len(index), outputs.numel())
                units[torch.arange(len(index), device=units.device), index] = self.events**-0.5
                yield self.linearization.pull_back(factor(units.reshape(len(index), *outputs.shape))).T

    def _columns(self) -> Iterator[Tensor]:
        for index in torch.arange(self.parameters.numel, device=self.device).split(_CHUNK):
            units = torch.zeros(self.parameters.numel, len(index), dtype=self.dtype, device=self.device)
            units[index, torch.arange(len(index), device=units.device)] = 1.0
            yield self @ units

    @property
    def _few_rows(self) -> bool:
        rows = self.events * len(self._scores) if self._scores is not None else self.outputs.numel()
        return rows < self.parameters.numel

    def dense(self) -> Tensor:
        """F as a matrix (P, P); costs min(P, events·D) products with Jᵀ or with F.

        Raises:
            ValueError: if the products with F are not those of a symmetric matrix.
        """
        self.compare_shares()
        if self._few_rows:
            total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
            for rows in self._factor_rows():
                total.addmm_(rows.T, rows)
            return self._mean_(total)
        matrix = torch.cat(list(self._columns()), 1)
        skew, largest = (matrix - matrix.T).abs().amax(), matrix.abs().amax()
        if bool(skew > max(self.linearization.precision, torch.finfo(self.dtype).eps) ** 0.5 * largest):
            raise ValueError(
                f"F is not symmetric: its halves differ by {float(skew):.1e}, its largest element is "
                f"{float(largest):.1e}. Check that the metric is symmetric, and each backward pass linear and the "
                "derivative of its forward pass"
            )
        return 0.5 * (matrix + matrix.T)

    def diagonal(
        self,
        probes: int | None = None,
        generator: Generator | None = None,
        *,
        root: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The diagonal of F, (P,); with ``root``, a map v ↦ L v, that of LFLᵀ.

        Exact by default, at the cost of ``dense``. With ``probes``, an unbiased estimate from that many backward
        passes: ``diag(JᵀMJ) = E[(Jᵀ L ε)²]`` for M = LLᵀ and independent signs ε, one per event and output. The
        events need not be independent of each other, so it holds through BatchNorm in training mode as well.
        """

        def rooted(rows: Tensor) -> Tensor:
            return rows if root is None else torch.stack([root(row) for row in rows])

        self.compare_shares()
        if probes is None:
            total = torch.zeros(self.parameters.numel, dtype=self.dtype, device=self.device)
            if self._few_rows or root is not None:
                for rows in self._factor_rows():
                    total += rooted(rows).square().sum(0)
                return self._mean_(total)
            for start, columns in zip(range(0, self.parameters.numel, _CHUNK), self._columns()):
                index = torch.arange(columns.shape[1], device=self.device)
                total[start : start + len(index)] = columns[start + index, index]
            return total
        total = torch.zeros(self.parameters.numel, dtype=self.dtype, device=self.device)
        for u in self.factor_vectors(probes, generator):
            row = self.linearization.pull_back(u)
            total += rooted(row.unsqueeze(0)).squeeze(0).square()
        return self._mean_(total.div_(self.events))

    def factor_vectors(self, probes: int | None = 1, generator: Generator | None = None) -> Iterator[Tensor]:
        """Vectors u of outputs, (…, D), whose Σ uuᵀ is the metric of all events in expectation: N F = E[Σ (Jᵀu)(Jᵀu)ᵀ].

        Each has random signs of its own for every event. With ``probes``, they are so many u = Lε for M = LLᵀ, with
        signs ε over all outputs, or over all labels; with None one for each column of L, so that Σ uuᵀ is M within
        every event, and only what is between two events is random. That is nothing where no event has a part in the
        outputs of another. Through BatchNorm in training mode, or where events are the tokens of a sequence that attend
        to each other, it remains in Σ (Jᵀu)(Jᵀu)ᵀ: `diagonal` and `dense` without probes are exact there too.

        Raises:
            ValueError: for ``probes`` below 1.
        """
        if probes is not None:
            whole("probes", probes, 1)
        outputs = self.outputs

        def signs(*shape: int) -> Tensor:
            like = {"dtype": outputs.dtype, "device": outputs.device}
            return torch.randint(0, 2, shape, generator=generator, **like).mul_(2).sub_(1)  # type: ignore[call-overload]

        if self._scores is None:
            factor = self.geometry.factor(outputs)
            if probes is None:
                for unit in torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device):
                    yield factor(signs(*outputs.shape[:-1], 1) * unit)
            else:
                for _ in range(probes):
                    yield factor(signs(*outputs.shape)) / probes**0.5
        elif probes is None:
            for scores in self._scores:
                yield scores * signs(*scores.shape[:-1], 1) / len(self._scores) ** 0.5
        else:
            for _ in range(probes):
                epsilon = signs(*self._scores.shape[:-1], 1)
                yield (self._scores * epsilon).sum(0) / (probes * len(self._scores)) ** 0.5

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator`` over float64 NumPy vectors, for SciPy's solvers on small models."""
        import numpy as np
        from scipy.sparse.linalg import LinearOperator

        def product(v: Any) -> Any:
            w = self @ torch.as_tensor(v, dtype=self.dtype, device=self.device)
            return w.to("cpu", torch.float64).numpy()

        return LinearOperator(self.shape, matvec=product, rmatvec=product, matmat=product, dtype=np.dtype("float64"))
