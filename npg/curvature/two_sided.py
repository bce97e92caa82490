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
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, product
from math import inf, prod
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from npg.curvature.stacks import Dimension, Owner, Stack, batched, rows, stacks
from npg.parameters import power_of_two

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
            if (
                saved := float(state.setdefault("power", torch.tensor(power, dtype=torch.float64, device="cpu")))
            ) != power:
                raise ValueError(f"power must stay {saved}, that of the factors; got {power}")
        owners: dict[Dimension, list[Owner]] = defaultdict(list)
        diagonals: dict[_Kind, list[_Diagonal]] = defaultdict(list)
        tiles: dict[_Kind, list[_Tiles]] = defaultdict(list)
        for place, stack in enumerate(stacks(tensors)):
            kind = (stack.dtype, stack.device)
            if sum(size > 1 for size in stack.shape) < 2:
                diagonals[kind].append(_Diagonal(place, stack, states))
            else:
                tiles[kind] += _tiles(place, stack, max_axis, owners)

        def identities(count: int, key: Dimension) -> Side:
            dim, dtype, device = key
            eye = torch.eye(dim, dtype=dtype, device=device).repeat(count, 1, 1)
            return Side(eye, eye.clone(), torch.full((count, dim), 1 + damping, dtype=dtype, device=device))

        self.sides = batched(owners, identities, states)
        kinds = dict.fromkeys([*diagonals, *tiles])
        self._fields = [_Field(diagonals[kind], tiles[kind], self.sides, states, average, *kind) for kind in kinds]

    def moving(self, inverse: bool) -> Iterator[Tensor]:
        """The tensors of the state that `update`, or with ``inverse`` both it and `inverse`, will change."""
        for side in self.sides.values():
            yield from side if inverse else (side.factor, side.values)
        for field in self._fields:
            yield from (field.unit, *(part.square for part in field.diagonals))

    def update(self, gradients: Sequence[Tensor]) -> Tensor:
        """Let the factors take in gradients, (n, *shape) for each stack of tensors; whether all are finite, ().

        Where they are not, or are zero, the factors are as before.
        """
        finite = [field.update(gradients) for field in self._fields]
        return torch.stack([each.to(finite[0].device) for each in finite]).all()

    def inverse(self, exact: bool = True) -> None:
        """Work out the powers of the factors as they are now; see the head of this module for ``exact``."""
        for field in self._fields:
            field.rescale()
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

    def apply(self, tensors: Sequence[Tensor], longest: float = inf) -> list[Tensor]:
        """V of each M, (n, *shape) for each stack of tensors.

        Args:
            tensors: M.
            longest: a longer M is shortened to it, tile by tile: the root mean square of its entries once whitened,
                ‖L_δ^(−½) M R_δ^(−½)‖ / √(mn), which is 1 in the mean for a gradient.
        """
        out: dict[int, Tensor] = {}
        for field in self._fields:
            field.apply(tensors, self.power, self.damping, longest, out)
        return [out[place] for place in range(len(tensors))]


def _iterate(factor: Tensor, basis: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration with S + shift · I: eigenvalues (N, D), and the new basis."""
    moved = torch.addcmul(factor @ basis, basis, shift[:, None, None])
    # The largest first: the iteration takes out of each what belongs to those before it.
    order = (basis * moved).sum(-2).sort(dim=-1, descending=True, stable=True)[1]
    q, triangle = torch.linalg.qr(moved.gather(-1, order[:, None, :].expand_as(moved)))
    return triangle.diagonal(dim1=-2, dim2=-1).abs(), q


#: What the parts of a field have in common.
_Kind: TypeAlias = tuple[torch.dtype, torch.device]


class _Diagonal:
    """The curvature of the N tensors of one shape that are no matrices: the mean of their squared gradients.

    Attributes:
        place: of their stack.
        owners: of each row: the place of its tensor in the list of tensors, and the name of its unit.
        size: of a row.
    """

    def __init__(self, place: int, stack: Stack, states: Sequence[dict[str, Tensor]]) -> None:
        self.place, self.size = place, (1, prod(stack.shape))
        self.owners = [(i, "unit") for i in stack.indices]
        self.square = torch.zeros(len(stack.indices), *stack.shape, dtype=stack.dtype, device=stack.device)
        _adopt(self.square, states, [(i, "square") for i in stack.indices])
        self.flat = self.square.view(len(self.owners), -1)

    def cut(self, x: Tensor) -> Tensor:
        """(n, *shape) → the rows, (N, numel)."""
        return x.reshape(len(x), -1)

    def put(self, v: Tensor, m: Tensor, out: dict[int, Tensor]) -> None:
        """The rows back in the form of M, at their place."""
        out[self.place] = v.view_as(m)

    def update(self, x: Tensor, start: Tensor, kept: Tensor, weight: Tensor) -> None:
        """Make v kept (v + start) + (weight · x)², with a number for each row, (N, 1)."""
        new = x * weight
        self.flat.add_(start).mul_(kept).addcmul_(new, new)

    def apply(self, x: Tensor, power: float, damping: float) -> tuple[Tensor, Tensor]:
        """(N, numel) → V, and what it is with p = ½."""
        damped = torch.add(self.flat, self.flat.mean(1, keepdim=True), alpha=damping)
        damped.clamp_min_(torch.finfo(x.dtype).tiny)
        white = x / damped.sqrt()
        return (white if power == 0.5 else x / damped.pow_(power)), white


#: Rows and columns of a tile.
_Place: TypeAlias = tuple[slice, slice]


class _Tiles:
    """The curvature of the tiles of one size of the weights of one shape, or of those weights whole.

    Attributes:
        place, owners, size: as of `_Diagonal`.
        axes: of L and of R: the batch of their factors, and which rows of it they are.
    """

    def __init__(
        self,
        place: int,
        stack: Stack,
        matrix: tuple[int, int],
        places: dict[int, _Place],
        owners: dict[Dimension, list[Owner]],
    ) -> None:
        self.place, self.matrix, self.places = place, matrix, list(places.values())
        r, c = self.places[0]
        self.size = (r.stop - r.start, c.stop - c.start)
        self.owners = [(i, f"unit_{number}") for number in places for i in stack.indices]
        self.axes: list[tuple[Dimension, slice]] = []
        for dim, side in zip(self.size, ("left", "right"), strict=True):
            key = (dim, stack.dtype, stack.device)
            start = len(owners[key])
            owners[key] += [(i, f"{side}_{number}") for number in places for i in stack.indices]
            self.axes.append((key, slice(start, len(owners[key]))))

    def of(self, batches: Mapping[Dimension, Tensor]) -> list[Tensor]:
        """The rows of L and those of R."""
        return [batches[key][part] for key, part in self.axes]

    def find(self, sides: Mapping[Dimension, Side]) -> None:
        """Take the views of the factors that belong here."""
        self.left, self.right = (rows(sides[key], part.start, len(self.owners)) for key, part in self.axes)

    def cut(self, x: Tensor) -> Tensor:
        """(n, *shape) → the tiles, (N, numel)."""
        x = x.reshape(len(x), *self.matrix)
        return (x if self.size == self.matrix else torch.cat([x[:, r, c] for r, c in self.places])).flatten(1)

    def put(self, v: Tensor, m: Tensor, out: dict[int, Tensor]) -> None:
        """The tiles back where they were cut out of M, at its place."""
        if self.size == self.matrix:
            out[self.place] = v.view_as(m)
            return
        whole = out.setdefault(self.place, torch.empty_like(m)).view(len(m), *self.matrix)
        for (r, c), tile in zip(self.places, v.view(-1, *self.size).split(len(m)), strict=True):
            whole[:, r, c] = tile

    def update(self, x: Tensor, roots: Mapping[Dimension, Tensor]) -> None:
        """Add (x B_R diag(r_R))(…)ᵀ to L and (diag(r_L) B_Lᵀ x)ᵀ(…) to R; roots r (…, D) of each factor."""
        g, (left, right) = x.view(len(x), *self.size), self.of(roots)
        columns = (g @ self.right.basis).mul_(right[:, None, :])
        lines = (self.left.basis.mT @ g).mul_(left[:, :, None])
        self.left.factor.baddbmm_(columns, columns.mT)
        self.right.factor.baddbmm_(lines.mT, lines)

    def apply(
        self, x: Tensor, powers: Mapping[Dimension, Tensor], halves: Mapping[Dimension, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(N, numel) → V, and in the bases what it is with p = ½; powers d^(−p) and d^(−½) (…, D) of each factor."""
        m = self.left.basis.mT @ x.view(len(x), *self.size) @ self.right.basis
        v = white = self._divided(m, halves)
        if powers is not halves:
            v = self._divided(m, powers)
        return (self.left.basis @ v @ self.right.basis.mT).flatten(1), white.flatten(1)

    def _divided(self, m: Tensor, powers: Mapping[Dimension, Tensor]) -> Tensor:
        left, right = self.of(powers)
        return (m * left[:, :, None]).mul_(right[:, None, :])


def _tiles(place: int, stack: Stack, max_axis: int, owners: dict[Dimension, list[Owner]]) -> Iterator[_Tiles]:
    """The tiles of the weights of a stack, by their sizes."""
    lead = next(size for size in stack.shape if size > 1)
    matrix = (lead, prod(stack.shape) // lead)
    sizes: dict[tuple[int, int], dict[int, _Place]] = defaultdict(dict)
    for number, (r, c) in enumerate(product(_cuts(matrix[0], max_axis), _cuts(matrix[1], max_axis))):
        sizes[r.stop - r.start, c.stop - c.start][number] = (r, c)
    for places in sizes.values():
        yield _Tiles(place, stack, matrix, places, owners)


class _Field:
    """All of one dtype and device. What is one number for each row of its parts is a vector of all of them, (R,).

    Attributes:
        unit: L and v are in units of its square, float64; 0 where no gradient was seen yet.
    """

    def __init__(
        self,
        diagonals: list[_Diagonal],
        tiles: list[_Tiles],
        sides: dict[Dimension, Side],
        states: Sequence[dict[str, Tensor]],
        average: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.diagonals, self.tiles, self.sides, self.average = diagonals, tiles, sides, average
        self.parts: list[_Diagonal | _Tiles] = [*diagonals, *tiles]
        owners = [owner for part in self.parts for owner in part.owners]
        self._rows = [len(part.owners) for part in self.parts]
        self.unit = torch.zeros(len(owners), dtype=torch.float64, device=device)
        _adopt(self.unit, states, owners)
        for diagonal, unit in zip(diagonals, self.unit.split(self._rows), strict=False):
            unit.mul_((diagonal.flat > 0).any(1))
        size = torch.tensor([part.size for part in self.parts for _ in part.owners], dtype=dtype, device=device)
        self._numel, self._rsqrt = size.prod(1), size.mT.flatten().rsqrt()
        #: Where the numbers of each factor are in (2R,): those of L of all rows, and those of R.
        places: dict[Dimension, list[Tensor]] = defaultdict(list)
        order = torch.arange(len(owners), device=device).split(self._rows)[len(diagonals) :]
        for part, row in zip(tiles, order, strict=True):
            part.find(sides)
            for (key, _), start in zip(part.axes, (0, len(owners)), strict=True):
                places[key].append(start + row)
        self._places = {key: torch.cat(found) for key, found in places.items()}

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        """(R,) → (N, 1) for each part."""
        return x[:, None].split(self._rows)

    def update(self, gradients: Sequence[Tensor]) -> Tensor:
        """As `TwoSidedCurvature.update`, of what belongs here."""
        x = [part.cut(gradients[part.place]) for part in self.parts]
        largest = torch.cat([torch.linalg.vector_norm(each, inf, 1) for each in x])
        finite, own = torch.isfinite(largest), power_of_two(largest)
        masks = zip(x, self._split(finite), self._split(own), strict=True)
        x = [torch.where(ok, each, 0.0).div_(unit) for each, ok, unit in masks]
        square = torch.cat([torch.linalg.vector_norm(each, 2, 1) for each in x]).square() / self._numel
        seen = square > 0
        begins = (self.unit == 0) & seen
        self.unit.copy_(torch.where(begins, own, self.unit))
        ratio = torch.where(seen, (own / self.unit).clamp_max(BURST), 0.0).to(square.dtype)
        weight = (1 - self.average) ** 0.5 * ratio
        kept = 1 - (1 - self.average) * seen.to(square.dtype)
        # Before their first gradient L and R, and the powers, are those of the identity: the first sets L's scale.
        scale, one = torch.where(begins, square, 1.0), torch.ones_like(square)
        factors, values, roots = (torch.cat(p) for p in ((scale * kept, kept), (scale, one), (weight, weight)))
        numbers, of = torch.stack([factors, values, roots * self._rsqrt]), {}
        for key, places in self._places.items():
            side, (for_factor, for_values, for_root) = self.sides[key], numbers[:, places]
            side.factor.mul_(for_factor[:, None, None])
            side.values.mul_(for_values[:, None])
            of[key] = side.values.rsqrt().mul_(for_root[:, None])
        start = self._split(torch.where(begins, square, 0.0))
        for part, *row in zip(self.diagonals, x, start, self._split(kept), self._split(weight), strict=False):
            part.update(*row)
        for tiles, each in zip(self.tiles, x[len(self.diagonals) :], strict=True):
            tiles.update(each, of)
        return finite.all()

    def rescale(self) -> None:
        """Bring the means of v and the mean eigenvalues of L and R to [1, 4) by powers of four: (cL, R/c) is L ⊗ R."""
        count = len(self.unit)
        roots = torch.ones(2 * count, dtype=torch.float64, device=self.unit.device)
        for part, root in zip(self.diagonals, roots[:count].split(self._rows), strict=False):
            factor, new = _power_of_four(part.flat.mean(1))
            part.flat.div_(factor[:, None])
            root.copy_(new)
        for key, places in self._places.items():
            side = self.sides[key]
            factor, roots[places] = _power_of_four(_mean_eigenvalue(side.factor))
            side.factor.div_(factor[:, None, None])
            side.values.div_(factor[:, None])  # which stay where a factorisation fails
        self.unit.mul_(roots[:count] * roots[count:])

    def apply(
        self, tensors: Sequence[Tensor], power: float, damping: float, longest: float, out: dict[int, Tensor]
    ) -> None:
        """Put V of each M into ``out``, by the place of the stack."""
        unit = torch.where(self.unit == 0, 1.0, self.unit)
        powers = halves = {key: self.sides[key].values ** -0.5 for key in self._places}
        if power != 0.5:
            powers = {key: self.sides[key].values ** -power for key in self._places}
        dtype = self._numel.dtype
        before, after = (self._split(u.to(dtype)) for u in (unit, unit ** (1 - 2 * power)))
        for part, u, w in zip(self.parts, before, after, strict=True):
            m = tensors[part.place]
            x = part.cut(m) / u
            of = (x, power, damping) if isinstance(part, _Diagonal) else (x, powers, halves)
            v, white = part.apply(*of)
            if longest < inf:
                largest = torch.linalg.vector_norm(white, inf, 1, keepdim=True).clamp_min_(torch.finfo(dtype).tiny)
                size = torch.linalg.vector_norm(white / largest, 2, 1, keepdim=True)  # whose square could be infinite
                v.mul_((longest * white.shape[1] ** 0.5 / size / largest).clamp_max_(1.0))
            part.put(v if power == 0.5 else v * w, m, out)


def _adopt(stacked: Tensor, states: Sequence[dict[str, Tensor]], owners: Sequence[Owner]) -> None:
    """Take what the states hold of these rows, and make the states views of them."""
    for (i, name), view in zip(owners, stacked.unbind(), strict=True):
        if (saved := states[i].get(name)) is not None:
            view.copy_(saved)
        states[i][name] = view


def _cuts(size: int, longest: int) -> list[slice]:
    """A range in as few parts as there can be of at most this length, as equal as they can be."""
    count = -(-size // longest)
    ends = [size * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]
