r"""Online low-rank natural gradient: one factor F = Rᵀ D R + ρ I for every axis of every tensor.

For an axis of dimension D, the gradient tensor is read as a matrix X of N rows of length D: all other axes are the
rows. The factor follows the rows' second moment S = XᵀX / N by one block power iteration for each update:

    T = η S + (1−η) F,   Y = R T,   Z = Y Yᵀ = U C Uᵀ
    R' = C^{−1/2} Uᵀ Y,   D' = C^{1/2} − ρ' I,
    ρ' = (η tr S + (1−η)(D ρ + tr D) − tr C^{1/2}) / (D − rank)

The gradient is preconditioned with the smoothed factor G = F + (α/D) tr(F) I = Rᵀ D R + β I. Only W = E^{1/2} R, D
and ρ are kept, with E = D / (β + D), because by the matrix inversion lemma

    X̂ = β X G⁻¹ = X − X Wᵀ W,   then rescaled so that ‖X̂‖ = ‖X‖.

The same factors define a metric C for the damping of a solve (`InverseRoot`): with R Rᵀ = I,

    C⁻¹ = √(τ̄/τ) ⊗ c β G⁻¹,     (β G⁻¹)^{1/2} = I − Wᵀ (I + (I − E)^{1/2})⁻¹ W,     c² = tr F / tr(β G⁻¹ F β G⁻¹)

for every tensor, over its axes: c keeps the expected norm of the rows that F has tracked, τ = tr F / D is the mean
square of the tensor's gradient, and τ̄ its mean over all entries of all tensors. Inside a tensor C is then the smoothed
second moment of gradients, and from tensor to tensor it goes with their root mean square.

None of this depends on the unit that gradients are measured in, and neither does the arithmetic: gradients are divided
by a power of two before they are squared, which changes no digit, and F has its eigenvalues in float64, whose range
holds the squares of all float32 numbers.

Source: Povey, Zhang and Khudanpur (2015), "Parallel training of DNNs with natural gradient and parameter averaging",
arXiv 1410.7455; the update is that of Kaldi's nnet3/natural-gradient-online.h, eqn:zt and following. Reading the other
axes as rows is what Kaldi does for convolutions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from npg.curvature.stacks import Dimension, Owner, Stack, batched, normalised, rows, stacks

#: Eigenvalues of F below this fraction of the largest are raised to it (Kaldi's δ).
DELTA = 5e-4
#: F of a tensor whose gradients have all been zero, times the identity: far below the square of any float32 number, and
#: its own square is representable in float64.
TINY = 1e-150
#: Block power iterations on the first gradient before it is preconditioned.
INITIAL_PASSES = 3


class Factors(NamedTuple):
    """A batch of B factors F = Rᵀ diag(d) R + ρ I of dimension D and rank R, stored with W = E^{1/2} R."""

    weight: Tensor  #: W, (B, R, D); W Wᵀ = E = diag(d / (β + d))
    d: Tensor  #: (B, R), float64
    rho: Tensor  #: (B,), float64

    def beta(self, alpha: float) -> Tensor:
        """Eigenvalue of G outside of the row space of W: β = ρ (1 + α) + (α/D) tr D, shape (B,)."""
        return (1 + alpha) * self.rho + alpha / self.weight.shape[-1] * self.d.sum(-1)

    def trace(self) -> Tensor:
        """The trace of F, D ρ + tr D, (B,)."""
        return self.weight.shape[-1] * self.rho + self.d.sum(-1)

    def e(self, alpha: float) -> Tensor:
        """Diagonal of E = D (β I + D)⁻¹, shape (B, R)."""
        return self.d / (self.beta(alpha).unsqueeze(-1) + self.d)


def initial_factors(batch: int, dim: int, rank: int, alpha: float, dtype: torch.dtype, device: torch.device) -> Factors:
    """Factors that know nothing: ρ = d = TINY on a fixed sparse orthonormal basis.

    Row i of the basis has its entries at the columns j ≡ i (mod rank): 1.1 the first and 1 the others before they
    are normalised, so that no row is orthogonal to gradients whose entries sum to zero.
    """
    column, row = torch.arange(dim, device=device), torch.arange(rank, device=device)
    basis = (column % rank == row[:, None]).to(torch.float64)
    basis[:, :rank] *= 1.1
    basis /= torch.linalg.vector_norm(basis, dim=1, keepdim=True)
    d = torch.full((batch, rank), TINY, dtype=torch.float64, device=device)
    rho = torch.full((batch,), TINY, dtype=torch.float64, device=device)
    factors = Factors(basis.to(dtype).repeat(batch, 1, 1), d, rho)
    factors.weight.mul_(factors.e(alpha).sqrt().unsqueeze(-1))
    return factors


def update_factors(factors: Factors, projected: Tensor, trace: Tensor, alpha: float, eta: float) -> Factors:
    """Factors after one more gradient, by the formulas at the head of this module.

    The R × R eigenproblem and what leads to it run in float64; W keeps its dtype. The textbook
    formulas lose their invariants to rounding. These three measures keep them, with no branch on a value:

    1. Z is formed from Y, and not from the expansion that takes R Rᵀ = I for granted, so errors do not build up.
    2. ρ and d are first raised to δ η tr S. A gradient far above all before it, as the first one is, then cannot
       make Z numerically singular: its condition number is below 4 / (δ (1−η))².
    3. R' takes one Newton–Schulz step towards orthonormal rows, R' ← (3 I − R' R'ᵀ) R' / 2, which squares its error.

    Args:
        factors: the batch of B factors.
        projected: W S, (B, R, D).
        trace: tr S, (B,).
        alpha: α ≥ 0.
        eta: η, in (0, 0.9].

    A factor whose gradient is not finite stays as it was.
    """
    weight, d, rho = (tensor.double() for tensor in factors)
    rank, dim = weight.shape[-2:]
    finite = torch.isfinite(trace) & torch.isfinite(projected).flatten(1).all(1)
    trace = torch.where(finite, trace.double(), 0.0)
    projected = torch.where(finite[:, None, None], projected.double(), 0.0)

    inverse_root_e = factors.e(alpha).rsqrt().unsqueeze(-1)
    r, rs = inverse_root_e * weight, inverse_root_e * projected
    floor = DELTA * eta * trace
    d, rho = torch.maximum(d, floor.unsqueeze(-1)), torch.maximum(rho, floor)

    y = eta * rs + (1 - eta) * (d + rho.unsqueeze(-1)).unsqueeze(-1) * r
    # Z would hold the gradient's fourth power.
    y, unit = normalised(y)
    scale = torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True)
    y, scale = y / scale, unit * scale
    c, u = torch.linalg.eigh(y @ y.mT)
    root = c.sqrt()
    r = u.mT @ y / root.unsqueeze(-1)
    r = 1.5 * r - 0.5 * (r @ r.mT) @ r

    root = root * scale.squeeze(-1)
    total = eta * trace + (1 - eta) * (dim * rho + d.sum(-1))
    rho = (total - root.sum(-1)) / (dim - rank)
    floor = (DELTA * root.amax(-1)).clamp_min(TINY)
    d = torch.maximum(root - rho.unsqueeze(-1), floor.unsqueeze(-1))
    rho = torch.maximum(rho, floor)

    new = Factors(r, d, rho)
    new = new._replace(weight=(new.e(alpha).sqrt().unsqueeze(-1) * r).to(factors.weight.dtype))
    return Factors(
        *(torch.where(finite.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(new, factors, strict=True))
    )


class _Axis(NamedTuple):
    key: Dimension  #: its dimension, and the dtype and device of the arithmetic
    factors: Factors  #: views of the rows of `OnlinePreconditioner.factors[key]` that belong to it


class Block(NamedTuple):
    """The tensors of one shape."""

    stack: Stack
    axes: list[_Axis]  #: those of dimension above 1, in order


class OnlinePreconditioner:
    """Preconditions a list of tensors on all axes in turn, all tensors of one shape together.

    The factors of one dimension are one batch, whichever tensor and axis they belong to, so an update solves one
    batched eigenproblem for each distinct dimension. On a CUDA device the error check inside that eigenproblem
    is the only thing that the host waits for.

    Args:
        tensors: the parameters, none of them empty. Only shapes, dtypes and devices are used.
        states: one dict for each tensor. Entries ``weight_<axis>``, ``d_<axis>`` and ``rho_<axis>`` are taken as the
            factors where they exist, and become views of the live factors.
        alpha, eta: as in `update_factors`.
        rank: the largest rank; an axis of dimension D gets min((D + 1) // 2, rank). With 0 nothing is
            preconditioned.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        *,
        alpha: float = 4.0,
        rank: int = 80,
        eta: float = 0.1,
    ) -> None:
        self.alpha, self.eta = alpha, eta
        self._root: tuple[list[int], InverseRoot] | None = None
        self.sizes = [tensor.numel() for tensor in tensors]
        found = stacks(tensors)
        owners: dict[Dimension, list[Owner]] = defaultdict(list)
        places: list[list[tuple[Dimension, int]]] = []  # of each stack's axes: batch, first row
        for stack in found:
            places.append([])
            for axis, dim in enumerate(stack.shape):
                if dim > 1 and rank > 0:
                    key = (dim, stack.dtype, stack.device)
                    places[-1].append((key, len(owners[key])))
                    owners[key] += [(i, str(axis)) for i in stack.indices]

        def make(count: int, key: Dimension) -> Factors:
            return initial_factors(count, key[0], min((key[0] + 1) // 2, rank), alpha, *key[1:])

        self.factors = batched(owners, make, states)
        self._fit()
        self.blocks = [
            Block(stack, [_Axis(key, rows(self.factors[key], start, len(stack.indices))) for key, start in axes])
            for stack, axes in zip(found, places, strict=True)
        ]

    def __call__(self, gradients: Sequence[Tensor], *, update: bool = False, first: bool = False) -> list[Tensor]:
        """Preconditioned gradients, (n, *shape) for each of `blocks`; each tensor keeps its gradient's norm.

        With ``update`` the factors then take the gradients in; with ``first`` they do so three times before as well.
        """
        if not self.blocks:
            return []
        with torch.autocast(self.blocks[0].stack.device.type, enabled=False):
            return self._precondition(gradients, update, first)

    def _precondition(self, gradients: Sequence[Tensor], update: bool, first: bool) -> list[Tensor]:
        statistics: dict[Dimension, list[tuple[Tensor, ...]]] = defaultdict(list)
        out = []
        for block in self.blocks:
            x, unit = normalised(block.stack(gradients))
            gradient = x
            norm = _norms(gradient)
            for key, factors in block.axes:
                # This axis leads. The product below is written transposed, so that the next axis leads, and after
                # the last one the tensor is again as it was.
                x = x.view(len(x), key[0], -1)
                root_trace = unit.view(-1).double() * norm / x.shape[-1] ** 0.5
                for _ in range(INITIAL_PASSES if first else 0):
                    self._update(factors, factors.weight @ x @ x.mT, _norms(x), root_trace)
                h = factors.weight @ x
                if update:
                    statistics[key].append((h @ x.mT, _norms(x), root_trace))
                x = torch.baddbmm(x.mT, h.mT, factors.weight, alpha=-1)
            scale = norm / _norms(x).clamp_min(torch.finfo(x.dtype).tiny)
            x = x.view_as(gradient) * scale.view(-1, *[1] * (gradient.ndim - 1))
            out.append(x.mul_(unit))
        for key, parts in statistics.items():
            self._update(self.factors[key], *(torch.cat(part) for part in zip(*parts, strict=True)))
        return out

    def _fit(self) -> None:
        """W = E^{1/2} R of factors that were made with another α; R and F stay. Others keep every bit."""
        for factors in self.factors.values():
            length = torch.linalg.vector_norm(factors.weight, dim=-1, dtype=torch.float64)
            ratio = factors.e(self.alpha).sqrt() / length
            other = ((ratio - 1).abs() > 1e-3) & torch.isfinite(ratio)
            factors.weight.mul_(torch.where(other, ratio, 1.0).unsqueeze(-1).to(factors.weight.dtype))

    def inverse_root(self) -> InverseRoot:
        """L = C^{−1/2} of the factors as they are now; later updates do not change it."""
        versions = [tensor._version for factors in self.factors.values() for tensor in factors]
        if self._root is None or self._root[0] != versions:
            self._root = versions, InverseRoot(self)
        return self._root[1]

    def _update(self, factors: Factors, product: Tensor, norm: Tensor, root_trace: Tensor) -> None:
        """Take in S, given W XᵀX and ‖X‖ for an X of any scale, and the (tr S)^{1/2} that X is to be scaled to."""
        scale = (root_trace / norm.clamp_min(torch.finfo(norm.dtype).tiny)).square()
        new = update_factors(factors, scale.view(-1, 1, 1) * product, root_trace.square(), self.alpha, self.eta)
        for old, value in zip(factors, new, strict=True):
            old.copy_(value)


class InverseRoot:
    """L = C^{−1/2} as a map of flat vectors: linear, symmetric, positive definite, block-diagonal over tensors.

    The factors of different axes act on different axes, so they commute, and their product is symmetric as each is.

    Args:
        preconditioner: whose factors are copied.
    """

    def __init__(self, preconditioner: OnlinePreconditioner) -> None:
        self._sizes = preconditioner.sizes
        self._blocks: list[tuple[Block, list[tuple[Tensor, Tensor]], Tensor]] = []
        # τ, by the first axis, which sees the gradient before it is preconditioned.
        squares = {id(b): b.axes[0].factors.trace() / b.axes[0].key[0] for b in preconditioner.blocks if b.axes}
        weights = {id(b): self._sizes[b.stack.indices[0]] for b in preconditioner.blocks}
        entries = sum(weights[i] * len(tau) for i, tau in squares.items())
        parts = [weights[i] * tau.sum() / entries for i, tau in squares.items()]
        mean = torch.stack(parts).sum() if parts else torch.zeros((), device="cpu")
        for block in preconditioner.blocks:
            indices, dtype = block.stack.indices, block.stack.dtype
            axes, scale = [], torch.ones(len(indices), dtype=torch.float64, device=block.stack.device)
            if block.axes:
                scale = (mean / torch.maximum(squares[id(block)], DELTA * mean)) ** 0.25
            for (dim, *_), factors in block.axes:
                beta, d, rho = factors.beta(preconditioner.alpha).unsqueeze(-1), factors.d, factors.rho
                kept = beta / (beta + d)  # I − E, without its cancellation
                outside, inside = (dim - d.shape[-1]) * rho, d + rho.unsqueeze(-1)
                scale = scale * (factors.trace() / (outside + (kept.square() * inside).sum(-1))) ** 0.25
                axes.append((factors.weight.clone(), factors.weight / (1 + kept.sqrt()).to(dtype).unsqueeze(-1)))
            self._blocks.append((block, axes, scale.to(dtype)))

    def __call__(self, v: Tensor) -> Tensor:
        """L v; (P,) → (P,), in the order of the tensors."""
        with torch.autocast(v.device.type, enabled=False):
            return self._apply(v)

    def _apply(self, v: Tensor) -> Tensor:
        parts = v.split(self._sizes)
        out = list(parts)
        for block, axes, scale in self._blocks:
            x = block.stack(parts) * scale.unsqueeze(-1)
            for weight, scaled in axes:  # turned round axis by axis, as in the preconditioner
                x = x.view(len(x), weight.shape[-1], -1)
                x = torch.baddbmm(x.mT, (scaled @ x).mT, weight, alpha=-1)
            for i, row in zip(block.stack.indices, x.view(len(x), -1).to(v.dtype), strict=True):
                out[i] = row
        return torch.cat(out)


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1)
