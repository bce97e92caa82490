"""Several independent variables, each of a family of its own, as one event."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Generator, Tensor

from npg.families.base import Family, LinearMap, blockwise
from npg.families.mistakes import family_of
from npg.families.normal import DiagonalGaussian

__all__ = ["Product"]


class Product(Family):
    """Independent parts, p(y | η) = Π pᵢ(yᵢ | ηᵢ); outputs are those of the parts side by side.

    Log-likelihood, KL and entropy are sums over the parts; metric and factor are block-diagonal. Targets, and what is
    sampled, are tuples with those of each part: of ``Product([Categorical(), DiagonalGaussian()], [3, 4])`` class
    indices (…) and reals (…, 2). A part may be a product itself: its targets are then a tuple within the tuple.

    Args:
        parts: the family of each part.
        sizes: the number of outputs of each; they sum to the last axis of the outputs.

    Raises:
        TypeError: if a part is not a family, or an argument is no list.
        ValueError: if there is no part, or the sizes do not fit the parts.
    """

    def __init__(self, parts: Sequence[Family], sizes: Sequence[int]) -> None:
        if not (isinstance(parts, Sequence) and isinstance(sizes, Sequence)):
            raise TypeError(
                f"parts and sizes must be lists, of families and of their numbers of outputs, got {parts!r} and "
                f"{sizes!r}: write Product([Categorical(), DiagonalGaussian()], [3, 4])"
            )
        if not parts or len(parts) != len(sizes):
            raise ValueError(
                f"parts and sizes must name at least one part, and one size for each, got {len(parts)} parts and "
                f"{len(sizes)} sizes"
            )
        for part, size in zip(parts, sizes):
            family_of(part)
            if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
                raise ValueError(f"sizes must be whole numbers of outputs, at least 1, got {size!r} for {part!r}")
            if isinstance(part, Product) and size != sum(part.sizes):
                raise ValueError(f"sizes has {size} for {part!r}, which takes {sum(part.sizes)} outputs: write that")
            if isinstance(part, DiagonalGaussian) and size % 2:
                raise ValueError(
                    f"sizes has {size} for {part!r}, which takes an even number of outputs, [mean, log std]: write 2 "
                    "for each of its components"
                )
        self.parts = list(parts)
        self.sizes = [int(size) for size in sizes]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.parts}, {self.sizes})"

    def _split(self, outputs: Tensor) -> tuple[Tensor, ...]:
        if outputs.shape[-1] != sum(self.sizes):
            raise ValueError(
                f"outputs must have {sum(self.sizes)} = sum({self.sizes}) components on the last axis, "
                f"got {outputs.shape[-1]}"
            )
        return outputs.split(self.sizes, -1)

    def _apart(self, outputs: Tensor, targets: Any) -> Sequence[Tensor]:
        """The targets of each part."""
        if not isinstance(targets, tuple | list) or len(targets) != len(self.parts):
            got = f"{len(targets)}" if isinstance(targets, tuple | list) else f"a {type(targets).__name__}"
            raise ValueError(
                f"targets must be a tuple of {len(self.parts)}, those of each part of {self!r}, got {got}: pass "
                "(targets of the first part, …)"
            )
        return targets

    def _together(self, targets: list[Tensor]) -> Any:
        """The targets of each part as those of the whole."""
        return tuple(targets)

    def log_likelihood(self, outputs: Tensor, targets: Any) -> Tensor:
        each = zip(self.parts, self._split(outputs), self._apart(outputs, targets))
        return torch.stack([part.log_likelihood(o, y) for part, o, y in each]).sum(0)

    def check_targets(self, outputs: Tensor, targets: Any) -> None:
        for part, o, y in zip(self.parts, self._split(outputs), self._apart(outputs, targets)):
            part.check_targets(o, y)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        each = zip(self.parts, self._split(old), self._split(new))
        return torch.stack([part.kl(a, b) for part, a, b in each]).sum(0)

    def entropy(self, outputs: Tensor) -> Tensor:
        return torch.stack([part.entropy(o) for part, o in zip(self.parts, self._split(outputs))]).sum(0)

    def sample(self, outputs: Tensor, generator: Generator | None = None) -> Any:
        return self._together([part.sample(o, generator) for part, o in zip(self.parts, self._split(outputs))])

    def score(self, outputs: Tensor, targets: Any) -> Tensor:
        each = zip(self.parts, self._split(outputs), self._apart(outputs, targets))
        return torch.cat([part.score(o, y) for part, o, y in each], -1)

    def metric(self, outputs: Tensor) -> LinearMap:
        return blockwise([part.metric(o) for part, o in zip(self.parts, self._split(outputs))], self.sizes)

    def metric_factor(self, outputs: Tensor) -> LinearMap:
        return blockwise([part.metric_factor(o) for part, o in zip(self.parts, self._split(outputs))], self.sizes)
