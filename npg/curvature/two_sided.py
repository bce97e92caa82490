r"""The two-sided curvature of a weight: its gradients are taken for matrix normal, with covariance L ⊗ R.

The gradient of a weight is read as a matrix G (m × n), its leading axis against all others. Of all products L ⊗ R, the
matrix normal distribution of mean zero that is nearest, in KL(p ‖ N(0, L ⊗ R)), to a p with the second moment of the
gradients has

    L = E[G R⁻¹ Gᵀ] / n,    R = E[Gᵀ L⁻¹ G] / m.

The expectations are averaged over steps: with what the factors were before on the right,

    L ← β L + (1 − β) G R_δ⁻¹ Gᵀ / n,    R ← β R + (1 − β) Gᵀ L_δ⁻¹ G / m,    S_δ = S + δ (tr S / D) I.

They begin with the isotropic ones of the first gradient, L = ‖G‖²/(mn) I and R = I. What is applied is

    V = L_δ^(−p) M R_δ^(−p).

p = 1 solves with the covariance, an empirical Fisher in Kronecker form: the natural gradient. p = ½ whitens: were M a
gradient, V would have the covariance I. What is no matrix (fewer than two axes with more than one entry) has a
diagonal in place of L ⊗ R: v ← β v + (1 − β) g², V = M / (v + δ v̄)^p.

**Powers.** With p = 1 by Cholesky's factorisation S_δ = C Cᵀ: S_δ^(−1) = C⁻ᵀ C⁻¹. Otherwise in a basis Q of
eigenvectors: exact ones a few times at the start, and then by one step of orthogonal iteration, Q' R' = S_δ Q, with the
diagonal of R' as the eigenvalues, whose product is then still that of S_δ's. It takes less time than exact ones do, and
the host of a GPU does not wait for it. Either way S_δ^(−p) = B diag(d)^(−p) Bᵀ, and only B and d are kept.

**Scale.** G is divided by a power of two before it is squared, and L is kept in such a unit squared, so that no float32
number is too small or too large for the arithmetic; a power of two that scales all gradients changes no digit.

Source: Lin et al. (2025), "Understanding and improving Shampoo and SOAP via Kullback–Leibler minimization", arXiv
2509.03378. The factors are those of the flip-flop algorithm for the matrix normal (Dutilleul 1999), a turn per
gradient.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from math import prod
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from npg.curvature.stacks import Dimension, Owner, Stack, batched, normalised, rows, stacks

__all__ = ["Side", "TwoSidedCurvature"]

#: A gradient counts as if it were at most this many times as large as what the factors have seen before.
BURST = 2.0**20


class Side(NamedTuple):
    """A batch of N factors of dimension D, and their powers: S_δ^(−p) = B diag(d)^(−p) Bᵀ."""

    factor: Tensor  #: S, (N, D, D)
    basis: Tensor  #: B, (N, D, D)
    values: Tensor  #: d, (N, D)


def _mean_eigenvalue(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).mean(-1)


def _power_of_four(x: Tensor) -> tuple[Tensor, Tensor]:
    """4^j with x / 4^j in [1, 4), and 2^j in float64; 1 where x is 0."""
    exponent = torch.frexp(x)[1] - 1
    half = torch.where(x > 0, torch.div(exponent, 2, rounding_mode="floor"), 0)
    root = torch.ldexp(torch.ones_like(x, dtype=torch.float64), half)
    return root.square().to(x.dtype), root


class TwoSidedCurvature:
    """L and R of a list of tensors, and their powers; tensors of one shape, and axes of one length, together.

    Args:
        tensors: the parameters, none of them empty. Only shapes, dtypes and devices are used.
        states: one dict for each tensor. What they hold is taken as the factors, and becomes views of the live ones:
            ``factor``, ``basis`` and ``values``, each of ``_left_<tile>`` and ``_right_<tile>``, and ``unit_<tile>``;
            of what is no matrix, ``square`` and ``unit``; and ``power``.
        power: p, in (0, 1]. It must stay that of the states: the powers in them are of no other.
        average: β, in [0, 1).
        damping: δ > 0, relative to the mean eigenvalue.
        max_axis: a matrix with a longer side is cut into tiles of equal sides, as far as they can be equal, each with
            factors of its own.

    Raises:
        ValueError: the states are of another power.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        *,
        power: float = 0.5,
        average: float = 0.95,
        damping: float = 1e-3,
        max_axis: int = 1024,
    ) -> None:
        self.power, self.damping = power, damping
        for state in states:
            if (saved := float(state.setdefault("power", torch.tensor(power, dtype=torch.float64)))) != power:
                raise ValueError(f"power must stay {saved}, that of the factors; got {power}")
        self.parts: list[_Diagonal | _Matrices] = []
        owners: dict[Dimension, list[Owner]] = defaultdict(list)
        for stack in stacks(tensors):
            if sum(size > 1 for size in stack.shape) < 2:
                self.parts.append(_Diagonal(stack, states, average))
            else:
                self.parts.append(_Matrices(stack, states, average, max_axis, owners))

        def identities(count: int, key: Dimension) -> Side:
            dim, dtype, device = key
            eye = torch.eye(dim, dtype=dtype, device=device).repeat(count, 1, 1)
            return Side(eye, eye.clone(), torch.full((count, dim), 1 + damping, dtype=dtype, device=device))

        self.sides = batched(owners, identities, states)
        for part in self.parts:
            part.find(self.sides)

    def moving(self, inverse: bool) -> Iterator[Tensor]:
        """The tensors of the state that `update`, or with ``inverse`` both it and `inverse`, will change."""
        for side in self.sides.values():
            yield from side if inverse else (side.factor, side.values)
        for part in self.parts:
            yield from part.moving()

    def update(self, gradients: Sequence[Tensor]) -> Tensor:
        """Let the factors take in gradients, (n, *shape) for each stack of tensors; whether all are finite, ().

        Where they are not, or are zero, the factors are as before.
        """
        finite = [part.update(g) for part, g in zip(self.parts, gradients, strict=True)]
        return torch.stack([each.to(finite[0].device) for each in finite]).all()

    def inverse(self, exact: bool = True) -> None:
        """Work out the powers of the factors as they are now; see the head of this module for ``exact``."""
        for part in self.parts:
            part.rescale()
        for side in self.sides.values():
            self._invert(side, exact)

    def _invert(self, side: Side, exact: bool) -> None:
        factor, basis, values = side
        shift = self.damping * _mean_eigenvalue(factor)
        if self.power == 1:
            damped = factor.clone()
            damped.diagonal(dim1=-2, dim2=-1).add_(shift[:, None])
            root, failed = torch.linalg.cholesky_ex(damped)
            eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
            new = torch.linalg.solve_triangular(root, eye, upper=False).mT
            basis.copy_(torch.where((failed == 0)[:, None, None], new, basis))
            values.copy_(torch.where((failed == 0)[:, None], 1.0, values))
            return
        if exact:
            d, q = torch.linalg.eigh(factor)
            d = d.clamp_min(0.0) + shift[:, None]
        else:
            d, q = _iterate(factor, basis, shift)
        basis.copy_(q)
        values.copy_(d)

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """V of each M, (n, *shape) for each stack of tensors."""
        return [part.apply(m, self.power, self.damping) for part, m in zip(self.parts, tensors, strict=True)]


def _iterate(factor: Tensor, basis: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration with S + shift · I: eigenvalues (N, D), and the new basis."""
    moved = torch.addcmul(factor @ basis, basis, shift[:, None, None])
    # The largest first: the iteration takes out of each what belongs to those before it.
    order = (basis * moved).sum(-2).sort(dim=-1, descending=True, stable=True)[1]
    q, triangle = torch.linalg.qr(moved.gather(-1, order[:, None, :].expand_as(moved)))
    return triangle.diagonal(dim1=-2, dim2=-1).abs(), q


class _Gradient(NamedTuple):
    """Gradients (n, …), of one axis or more each, as they enter the factors."""

    x: Tensor  #: over its own unit, zero where it is not finite
    square: Tensor  #: the mean of x², (n,)
    ratio: Tensor  #: its own unit over that of the factors, (n,)
    unit: Tensor  #: what that is to become, (n,), float64
    finite: Tensor  #: whether all are


def _gradient(x: Tensor, unit: Tensor, fresh: Tensor) -> _Gradient:
    """With the unit of the factors, and whether they have seen no gradient yet, (n,)."""
    x, own = normalised(x)
    square = x.square().flatten(1).mean(1)
    finite = torch.isfinite(square)
    square = torch.where(finite, square, 0.0)
    own = own.flatten().double()
    unit = torch.where(fresh & (square > 0), own, unit)
    ratio = (own / unit).clamp_max(BURST).to(x.dtype)
    return _Gradient(torch.where(finite.view(-1, *[1] * (x.ndim - 1)), x, 0.0), square, ratio, unit, finite.all())


def _kept(total: Tensor, average: float) -> Tensor:
    """β where there is a gradient, 1 where it is zero, in its dtype."""
    return 1 - (1 - average) * (total > 0).to(total.dtype)


def _scaled(x: Tensor, unit: Tensor, power: float) -> Tensor:
    """The product x · unit^(1 − 2p)."""
    return x if power == 0.5 else x * (unit ** (1 - 2 * power)).to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class _Diagonal:
    """The curvature of the tensors of one shape that are no matrices: the mean of their squared gradients."""

    def __init__(self, stack: Stack, states: Sequence[dict[str, Tensor]], average: float) -> None:
        self.average = average
        count, device = len(stack.indices), stack.device
        self.square = torch.zeros(count, *stack.shape, dtype=stack.dtype, device=device)
        self.unit = torch.ones(count, dtype=torch.float64, device=device)
        _adopt(stack, states, {"square": self.square, "unit": self.unit})

    def find(self, sides: dict[Dimension, Side]) -> None:
        """It has no sides."""

    def moving(self) -> Iterator[Tensor]:
        yield from (self.square, self.unit)

    def update(self, x: Tensor) -> Tensor:
        flat = self.square.view(len(x), -1)
        fresh = ~(flat > 0).any(1)
        g, mean, ratio, unit, finite = _gradient(x.reshape(flat.shape), self.unit, fresh)
        self.unit.copy_(unit)
        flat.add_(torch.where(fresh, mean, 0.0)[:, None])
        flat.mul_(_kept(mean, self.average)[:, None])
        flat.add_(g.square() * ((1 - self.average) * ratio.square())[:, None])
        return finite

    def rescale(self) -> None:
        flat = self.square.view(len(self.unit), -1)
        factor, root = _power_of_four(flat.mean(1))
        flat.div_(factor[:, None])
        self.unit.mul_(root)

    def apply(self, m: Tensor, power: float, damping: float) -> Tensor:
        flat = self.square.view(len(m), -1)
        x = m.reshape(flat.shape) / self.unit.to(m.dtype)[:, None]
        damped = flat + damping * flat.mean(1, keepdim=True)
        x = x / damped.clamp_min(torch.finfo(m.dtype).tiny) ** power
        return _scaled(x, self.unit, power).view_as(m)


_Place: TypeAlias = tuple[slice, slice]


class _Tiles(NamedTuple):
    """The tiles of one size of the matrices of one shape, N of them."""

    places: list[_Place]  #: of each tile in a matrix
    left: Side
    right: Side
    unit: Tensor  #: L is in units of its square, (N,), float64


class _Matrices:
    """The curvature of the weights of one shape."""

    def __init__(
        self,
        stack: Stack,
        states: Sequence[dict[str, Tensor]],
        average: float,
        max_axis: int,
        owners: dict[Dimension, list[Owner]],
    ) -> None:
        self.average, self.stack, self.max_axis = average, stack, max_axis
        lead = next(size for size in stack.shape if size > 1)
        self.matrix = (lead, prod(stack.shape) // lead)
        self.tiles: list[_Tiles] = []
        self._rows: list[tuple[list[_Place], list[tuple[Dimension, int]], Tensor]] = []
        places = list(product(_cuts(self.matrix[0], max_axis), _cuts(self.matrix[1], max_axis)))
        sizes: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, (r, c) in enumerate(places):
            sizes[r.stop - r.start, c.stop - c.start].append(number)
        for size, numbers in sizes.items():
            starts = []
            for dim, side in zip(size, ("left", "right"), strict=True):
                key = (dim, stack.dtype, stack.device)
                starts.append((key, len(owners[key])))
                owners[key] += [(i, f"{side}_{number}") for number in numbers for i in stack.indices]
            unit = torch.zeros(len(numbers), len(stack.indices), dtype=torch.float64, device=stack.device)
            for row, number in zip(unit, numbers, strict=True):
                _adopt(stack, states, {f"unit_{number}": row})
            self._rows.append(([places[number] for number in numbers], starts, unit.view(-1)))

    def find(self, sides: dict[Dimension, Side]) -> None:
        """Take the views of the batches that belong here; what has seen no gradient yet has the unit 0."""
        for places, starts, unit in self._rows:
            left, right = (rows(sides[key], start, len(unit)) for key, start in starts)
            self.tiles.append(_Tiles(places, left, right, unit))

    def moving(self) -> Iterator[Tensor]:
        yield from (tiles.unit for tiles in self.tiles)

    def _cut(self, x: Tensor, tiles: _Tiles) -> Tensor:
        """(n, *shape) → the tiles, (N, ·, ·)."""
        x = x.reshape(len(x), *self.matrix)
        return torch.cat([x[:, r, c] for r, c in tiles.places]) if x[0].shape != _extent(tiles.places) else x

    def update(self, x: Tensor) -> Tensor:
        finite = []
        for tiles in self.tiles:
            left, right, unit = tiles.left, tiles.right, tiles.unit
            fresh = unit == 0
            g, total, ratio, new_unit, ok = _gradient(self._cut(x, tiles), torch.where(fresh, 1.0, unit), fresh)
            seen = total > 0
            begins = fresh & seen
            unit.copy_(torch.where(fresh & ~seen, 0.0, new_unit))
            m, n = g.shape[1:]
            # Before their first gradient L and R, and the powers, are those of the identity: the first sets L's scale.
            scale = torch.where(begins, total, 1.0)
            left.values.mul_(scale[:, None])
            weight = (1 - self.average) ** 0.5 * ratio
            columns = (g @ right.basis) * (right.values.rsqrt() * (weight / n**0.5)[:, None])[:, None, :]
            lines = (left.basis.mT @ g) * (left.values.rsqrt() * (weight / m**0.5)[:, None])[:, :, None]
            kept = _kept(total, self.average)
            left.factor.mul_((scale * kept)[:, None, None]).baddbmm_(columns, columns.mT)
            right.factor.mul_(kept[:, None, None]).baddbmm_(lines.mT, lines)
            finite.append(ok)
        return torch.stack(finite).all()

    def rescale(self) -> None:
        """Bring the mean eigenvalues of L and R to [1, 4) by powers of four: (cL, R/c) is the same curvature."""
        for tiles in self.tiles:
            for side in (tiles.left, tiles.right):
                factor, root = _power_of_four(_mean_eigenvalue(side.factor))
                side.factor.div_(factor[:, None, None])
                tiles.unit.mul_(root)

    def apply(self, m: Tensor, power: float, damping: float) -> Tensor:
        out = torch.empty_like(m).view(len(m), *self.matrix)
        for tiles in self.tiles:
            left, right = tiles.left, tiles.right
            unit = torch.where(tiles.unit == 0, 1.0, tiles.unit)
            x = self._cut(m, tiles) / unit.to(m.dtype)[:, None, None]
            x = left.basis.mT @ x @ right.basis
            x *= (left.values**-power)[:, :, None] * (right.values**-power)[:, None, :]
            x = _scaled(left.basis @ x @ right.basis.mT, unit, power)
            if len(tiles.places) == 1 and len(self.tiles) == 1:
                return x.view_as(m)
            for (r, c), part in zip(tiles.places, x.split(len(m)), strict=True):
                out[:, r, c] = part
        return out.view_as(m)


def _adopt(stack: Stack, states: Sequence[dict[str, Tensor]], entries: dict[str, Tensor]) -> None:
    """Take what the states hold under these names into stacked tensors, and make the states views of them."""
    for name, stacked in entries.items():
        for i, view in zip(stack.indices, stacked.unbind(), strict=True):
            if (saved := states[i].get(name)) is not None:
                view.copy_(saved)
            states[i][name] = view


def _cuts(size: int, longest: int) -> list[slice]:
    """A range in as few parts as there can be of at most this length, as equal as they can be."""
    count = -(-size // longest)
    ends = [size * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]


def _extent(places: list[_Place]) -> tuple[int, int]:
    (r, c), *others = places
    return (-1, -1) if others else (r.stop - r.start, c.stop - c.start)
