"""The one check: each pair of maps v ↦ J v, u ↦ Jᵀu is compared with autograd before it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import hypot, inf, isfinite

import torch
from torch import Tensor
from torch.linalg import vector_norm

from npg.acceleration.program import Maps, Program
from npg.parameters import Parameters

__all__ = ["OTHER_OUTPUTS", "Recorded", "close", "precision", "same_outputs", "sums_agree"]

OTHER_OUTPUTS = "a second forward pass gives other outputs than the first"
_ROUNDINGS = 6  # standard deviations, about, of the rounding errors of a sum
_DRAWS = 4  # of the rounding errors of both derivatives, before a difference is called one


class Recorded:
    """What autograd gives over the recorded forward pass, which is the truth.

    Args:
        parameters: the P parameters.
        outputs: η, (…, D).
        pull: u ↦ Jᵀu by autograd, as a list of tensors.
        seen: a cotangent and its Jᵀu, (P,), where there are any: the gradient of a step is there already.
        epsilon: the relative rounding error of one operation of the network.
    """

    def __init__(
        self,
        parameters: Parameters,
        outputs: Tensor,
        pull: Callable[[Tensor], Sequence[Tensor]],
        seen: tuple[Tensor, Tensor] | None,
        epsilon: float,
    ) -> None:
        self._parameters, self._outputs, self._pull = parameters, outputs, pull
        self._epsilon = epsilon
        if seen is not None:
            least, largest = torch.stack(torch.aminmax(seen[0].abs())).tolist()
            if not 0 < least <= largest < inf:  # zeros would leave something unchecked
                seen = None
            elif not 1e-9 < largest < 1e9:
                seen = seen[0] / largest, seen[1] / largest
        self._is_given = seen is not None
        self._go_by(*(self._generic_pair() if seen is None else seen))

    def _generic_pair(self) -> tuple[Tensor, Tensor]:
        u = _generic(self._outputs)
        return u, self._parameters.flatten(self._pull(u))

    def _go_by(self, u: Tensor, pulled: Tensor) -> None:
        self._u, self._pulled = u, pulled
        self._norms_pulled = self._norms(pulled)

    def _norms(self, vector: Tensor) -> list[float]:
        """Of each parameter's part."""
        parts = list(vector.split(self._parameters.sizes))
        norms: list[float] = torch.stack(torch._foreach_norm(parts)).tolist()
        if not 1e-12 < hypot(*norms) < 1e12:  # squares may have left the range
            norms = torch.stack(torch._foreach_norm(parts, dtype=torch.float64)).tolist()
        return norms

    def same_outputs(self, outputs: Tensor) -> bool:
        """Whether the outputs of a second forward pass are η."""
        return same_outputs(self._outputs, outputs, self._epsilon)

    def agree(self, program: Program, outputs: Tensor) -> bool:
        """Whether the outputs of a program are η: up to what rounding may do, and then to 8 times what it has done.

        What a new program differs by is rounding alone, and is remembered. A kept one that differs by more may be of
        another function, such as one whose temperature has moved by a thousandth since.
        """
        found = apart(self._outputs, outputs, self._epsilon)
        if program.rounding is None:
            program.rounding = max(found, 2 * torch.finfo(outputs.dtype).eps)
        return found <= min(8 * program.rounding, _most(self._epsilon))

    def difference(self, maps: Maps) -> str:
        """In what two maps differ from those of the recorded forward pass.

        1. Each parameter's part of Jᵀu must be the recorded one, relative to its own size: to 10√ε, since of E
           activations rounding puts some εE on the other side of a kink, each with a share of 1/√E; or to what rounding
           does to either, as before a normalisation that takes all of it out.
        2. The push forward must be the adjoint of that, ⟨u, J v⟩ = ⟨Jᵀu, v⟩, up to rounding, which kinks have no part
           in. Each parameter has its share of the sum: v is its part of Jᵀu by its square. Where Jᵀu is zero, v is not:
           what reverse mode leaves out (a row of padding, what a hook masks) must not move in forward mode either.

        It costs one product.
        """
        found = self._difference(maps)
        if found and self._is_given:
            # Where a step's gradient vanishes, it is what rounding has left of a sum of large terms, and tells little.
            self._is_given = False
            self._go_by(*self._generic_pair())
            found = self._difference(maps)
        return found

    def _difference(self, maps: Maps) -> str:
        p, epsilon = self._parameters, self._epsilon
        u, expected, norms = self._u, self._pulled, self._norms_pulled
        if not all(map(isfinite, norms)):
            return ""  # no product will be finite, whoever computes it
        pulled = p.flatten(maps.pull(u))
        errors = self._norms(pulled - expected)
        tolerance = min(10 * epsilon**0.5, 0.03)
        size = hypot(*norms)
        nothing = 1e-3 * epsilon * size  # far below one rounding of the whole vector
        wrong = [i for i, error in enumerate(errors) if not error <= max(tolerance * norms[i], nothing)]
        for attempt in range(_DRAWS):  # rounding is a matter of luck: a single draw of it may be zero
            if not wrong:
                break
            jittered = _generic(u).add_(attempt).cos_().mul_(2 * epsilon).add_(1).mul_(u)
            # The other way rounds otherwise, but what it says of itself counts for no more than roundings.
            roundings = min(1000 * epsilon, 0.01) * size
            for pull, unjittered, most in ((self._pull, expected, inf), (maps.pull, pulled, roundings)):
                noise = self._norms(p.flatten(pull(jittered)) - unjittered)
                wrong = [i for i in wrong if not errors[i] <= min(8 * noise[i], most)]
        if wrong:
            return f"its derivative along {p.names[wrong[0]]} is not that of autograd"
        weights = [(1 + i % 7 / 7) * size / max(norm, 1e-3 * size, 1e-150) ** 2 for i, norm in enumerate(norms)]
        v = torch.cat([part * weight for part, weight in zip(expected.split(p.sizes), weights)])  # unequal, none cancel
        if int(torch.count_nonzero(v)) < p.numel:
            v = torch.where(v == 0, self._generic_like(v), v)
        moved = maps.push(p.unflatten(v))
        pairs = u * moved, pulled * v
        value, expected_value = (terms.sum(dtype=torch.float64) for terms in pairs)
        rounding = _ROUNDINGS * epsilon * (pairs[0].norm() + pairs[1].norm())
        if not bool((value - expected_value).abs() <= rounding + min(1000 * epsilon, 0.01) * expected_value.abs()):
            return "J v is not the adjoint of Jᵀu"
        return ""

    def _generic_like(self, v: Tensor) -> Tensor:
        """A generic vector, (P,), as large in each parameter as the largest element of ``v`` there, or of all of it."""
        sizes = self._parameters.sizes
        parts = list(_generic(v).split(sizes))
        largest = [t.abs().amax() if t.numel() else t.new_zeros(()) for t in v.split(sizes)]
        units = torch.stack(largest).tolist()
        whole = max(units) or 1.0
        torch._foreach_mul_(parts, [unit or whole for unit in units])
        return torch.cat(parts)


def same_outputs(first: Tensor, second: Tensor, epsilon: float) -> bool:
    """Whether the outputs of two forward passes are the same, each of the D up to rounding by its own largest value."""
    return apart(first, second, epsilon) <= _most(epsilon)


def sums_agree(
    results: Sequence[Tensor], block: Tensor, single: Callable[[Tensor], Sequence[Tensor]], epsilon: float
) -> bool:
    """Whether a linear map's ``results`` for the rows of a ``block``, weighted and summed, are those of the sum.

    Each tensor must be, relative to its own size, or to what rounding does to it (as `Recorded.difference` measures).

    Args:
        results: the map's tensors, each (K, …).
        block: (K, …).
        single: the map of one row.
        epsilon: the relative rounding error of one operation.
    """
    weights = _generic(block.new_empty(len(block))) / len(block) ** 0.5
    whole = torch.tensordot(weights, block, 1)
    expected = single(whole)

    def apart_by(sums: Sequence[Tensor]) -> Tensor:
        differences = (x - y for x, y in zip(sums, expected, strict=True))
        return torch.stack([vector_norm(x, dtype=torch.float64) for x in differences])

    errors = apart_by([torch.tensordot(weights.to(x.dtype), x, 1) for x in results])
    rows = (vector_norm(x.flatten(1), dim=1, dtype=torch.float64) for x in results)
    sizes = torch.stack([vector_norm(weights * row) for row in rows])
    most = torch.maximum(min(10 * epsilon**0.5, 0.03) * sizes, 1e-3 * epsilon * sizes.norm())
    wrong = ~(errors <= most)
    for attempt in range(_DRAWS):
        if not bool(wrong.any()):
            return True
        jittered = _generic(whole).add_(attempt).cos_().mul_(2 * epsilon).add_(1).mul_(whole)
        wrong &= ~(errors <= 8 * apart_by(single(jittered)))
    return not bool(wrong.any())


def apart(first: Tensor, second: Tensor, epsilon: float) -> float:
    """How far the outputs of two forward passes are apart: the most of the D, each relative to its own largest value.

    One that is small beside the others is measured by their size too, as far as their rounding reaches it. inf if the
    shapes differ, or what is finite.
    """
    others, tiny = min(64 * epsilon, 0.03) / _most(epsilon), torch.finfo(first.dtype).tiny
    finite = torch.isfinite

    def distance(mine: Tensor, theirs: Tensor) -> float:
        axes = list(range(mine.ndim - 1))
        errors, sizes = (theirs - mine).abs().amax(axes), mine.abs().amax(axes)
        return float((errors / (sizes + others * sizes.amax()).clamp(min=tiny)).amax())

    if first.shape != second.shape:
        return inf
    found = distance(first, second)
    if isfinite(found):
        return found
    if not torch.equal(finite(second), finite(first)):
        return inf
    return distance(*(torch.where(finite(x), x, 0.0) for x in (first, second)))


def _most(epsilon: float) -> float:
    """The largest relative difference of outputs that rounding may make."""
    return min(epsilon**0.5, 0.03)


def close(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors are the same up to rounding, each relative to its largest element."""
    return all(
        x.shape == y.shape and bool((x - y).abs().amax() <= 1e-4 * y.abs().amax()) for x, y in zip(a, b, strict=True)
    )


def precision(p: Parameters, lowest: torch.dtype | None) -> float:
    """The relative rounding error ε of one operation, in the types of the parameters and the ``lowest`` on the way."""
    types = {t.dtype for t in p.tensors} | ({lowest} if lowest is not None else set())
    epsilon = max(torch.finfo(dtype).eps for dtype in types)
    return epsilon if p.device.type == "cpu" or p.dtype is torch.float64 else max(epsilon, 2.0**-10)  # TF32


def _generic(like: Tensor) -> Tensor:
    """A fixed vector that is orthogonal to nothing by accident; no random number is drawn for it."""
    period = torch.arange(1009, device=like.device).to(like.dtype).cos_()
    return period.repeat(like.numel() // 1009 + 1)[: like.numel()].view(like.shape)
