"""The Fisher information itself, or its diagonal, as a curvature: a mean over batches, and a damped inverse of that."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from npg.curvature.base import (
    Curvature,
    check_average,
    check_shape,
    count,
    eigenvectors,
    inverted,
)
from npg.fisher import Fisher
from npg.solvers.solution import check_damping

__all__ = ["DenseFisher", "DiagonalFisher"]


class DiagonalFisher(Curvature):
    """C = diag F, the mean of batches.

    Args:
        fisher: of the first batch; None to begin with `update`.
        probes: backward passes for the estimate of each batch; None for the diagonal itself (`Fisher.diagonal`).
        generator: the source of signs, by default torch's global one.
        decay: γ, in [0, 1): in the mean an estimate of k updates ago has the weight γᵏ.

    Raises:
        ValueError: if an argument is out of its range.
    """

    name, fields = "diagonal", ("values", "updates")

    def __init__(
        self,
        fisher: Fisher | None = None,
        *,
        probes: int | None = 1,
        generator: Generator | None = None,
        decay: float = 0.0,
    ) -> None:
        check_average(decay, probes)
        self.probes, self.generator, self.decay = probes, generator, decay
        super().__init__()
        if fisher is not None:
            self.update(fisher)

    def update(self, fisher: Fisher) -> None:
        """Take the diagonal of a batch into the mean.

        Raises:
            ValueError: if a parameter had another shape before; nothing is changed then.
        """
        parameters, blocks = fisher.parameters, {}
        former = self._former(parameters)
        parts = fisher.diagonal(self.probes, self.generator).split(parameters.sizes)
        for i, (part, p) in enumerate(zip(parts, parameters.tensors)):
            values, before = part.view(p.shape), former.get((i,), {})
            updates, newest = count(before.get("updates"), self.decay)
            if before:
                check_shape(parameters.names[i], before["values"].shape, p.shape)
                values = before["values"].lerp(values, newest)
            blocks[i,] = {"values": values, "updates": updates}
        self.parameters, self.blocks = parameters, blocks

    def _diagonal(self) -> Tensor:
        return torch.cat([self.blocks[i,]["values"].flatten() for i in range(len(self.parameters.tensors))])

    def _scaled(self, diagonal: Tensor, v: Tensor) -> Tensor:
        self.parameters.check(v)
        return diagonal * v if v.ndim == 1 else diagonal.unsqueeze(1) * v

    def __matmul__(self, v: Tensor) -> Tensor:
        """C v; (P,) → (P,), or (P, K) → (P, K)."""
        return self._scaled(self._diagonal(), v)

    def inverse(self, damping: float) -> Callable[[Tensor], Tensor]:
        """The map v ↦ (C + λI)⁻¹ v, of (P,) or (P, K); 0 for an entry where C + λI is 0."""
        check_damping(damping)
        inverse = inverted(self._diagonal() + damping)
        return lambda v: self._scaled(inverse, v)


class DenseFisher(Curvature):
    """C = F as a matrix, the mean of batches: O(P²) memory, and O(P³) time for each inverse.

    Args:
        fisher: of the first batch; None to begin with `update`.
        decay: γ, in [0, 1): in the mean the F of k updates ago has the weight γᵏ.

    Raises:
        ValueError: if ``decay`` is out of its range.
    """

    name, fields = "dense", ("matrix", "updates")

    def __init__(self, fisher: Fisher | None = None, *, decay: float = 0.0) -> None:
        check_average(decay)
        self.decay = decay
        super().__init__()
        if fisher is not None:
            self.update(fisher)

    @property
    def _matrix(self) -> Tensor:
        return self.blocks[tuple(range(len(self.parameters.tensors)))]["matrix"]

    def update(self, fisher: Fisher) -> None:
        """Take F of a batch into the mean.

        Raises:
            ValueError: if a parameter had another shape before; nothing is changed then.
        """
        key = tuple(range(len(fisher.parameters.tensors)))
        before = self._former(fisher.parameters).get(key, {})
        matrix = fisher.dense()
        updates, newest = count(before.get("updates"), self.decay)
        if before:
            check_shape("F", before["matrix"].shape, matrix.shape)
            matrix = before["matrix"].lerp(matrix, newest)
        self.parameters, self.blocks = fisher.parameters, {key: {"matrix": matrix, "updates": updates}}

    def __matmul__(self, v: Tensor) -> Tensor:
        """C v; (P,) → (P,), or (P, K) → (P, K)."""
        self.parameters.check(v)
        return self._matrix @ v

    def inverse(self, damping: float) -> Callable[[Tensor], Tensor]:
        """The map v ↦ (C + λI)⁻¹ v, of (P,) or (P, K).

        Eigenvalues of C below P times machine precision of the largest are taken for zero, and without damping their
        directions are left out.
        """
        check_damping(damping)
        values, vectors = eigenvectors(self._matrix.double())
        rounding = len(values) * torch.finfo(self._matrix.dtype).eps * values.amax()
        inverse = inverted(torch.where(values <= rounding, 0.0, values) + damping)

        def apply(v: Tensor) -> Tensor:
            self.parameters.check(v)
            columns = v.double().reshape(len(v), -1)
            return (vectors @ (inverse.unsqueeze(1) * (vectors.T @ columns))).view(v.shape).to(v.dtype)

        return apply
