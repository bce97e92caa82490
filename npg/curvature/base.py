"""What all curvatures have in common: an approximation C of F, kept from batch to batch, with a damped inverse."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from math import nan
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from npg.checks import number, whole
from npg.fisher import Fisher
from npg.parameters import Parameters
from npg.solvers import Solution, Status

__all__ = [
    "RESIZED",
    "Curvature",
    "Key",
    "State",
    "check_average",
    "check_shape",
    "count",
    "eigenvectors",
    "inverted",
]

#: The indices of the parameters that a block is of, in the order of `Parameters`.
Key: TypeAlias = tuple[int, ...]
#: The tensors of each block. An optimizer keeps them in the state of the block's first parameter.
State: TypeAlias = dict[Key, dict[str, Tensor]]
#: The remedy where blocks are of tensors of other sizes.
RESIZED = "give the state of this model, and to a resized model a new curvature or optimizer"


class Curvature(ABC):
    """C ≈ F, symmetric positive semi-definite, from the batches so far: a mean in which earlier ones count less.

    Tensors of the state are replaced by `update`, and never changed in place: whoever holds the former `state_dict` can
    go back by `load_state_dict`.

    Parameters are known by their names: what was learnt of one stays with it while others are frozen or thawed.

    Attributes:
        name: under which an optimizer keeps the state.
        fields: the names of the tensors that a block may have.
        parameters: what the vectors are made of; `update` sets it.
        blocks: what it knows of the parameters; a class may hold it in another form.
    """

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    parameters: Parameters

    def __init__(self) -> None:
        self.blocks: Any = {}

    @abstractmethod
    def update(self, fisher: Fisher) -> None:
        """Take F of a batch into C; an update that raises changes nothing."""

    @abstractmethod
    def inverse(self, damping: float) -> Callable[[Tensor], Tensor]:
        """The map v ↦ (C + λI)⁻¹ v of (P,), or the pseudo-inverse; later updates do not change it.

        Raises:
            ValueError: if λ is negative or not finite.
        """

    def state_dict(self) -> State:
        """All that it knows, block by block; a parameter is in one block at most."""
        return {key: dict(block) for key, block in self.blocks.items()}

    def load_state_dict(self, state: Mapping[Key, Mapping[str, Tensor]]) -> None:
        """Know this, and nothing else. Set ``parameters`` first, where no `update` did."""
        self.blocks = self._in_precision(state)

    def _in_precision(self, state: Mapping[Key, Mapping[str, Tensor]]) -> State:
        """``state`` in the precision of the parameters, where these are known: it may be of a model in another one."""
        dtype = self.parameters.dtype if hasattr(self, "parameters") else None
        return {
            key: {name: x.to(dtype) if dtype and x.is_floating_point() else x for name, x in block.items()}
            for key, block in state.items()
        }

    def _former(self, parameters: Parameters) -> dict[Key, Any]:
        """The blocks by the indices that their parameters have among these, by name, without those that are gone.

        Raises:
            ValueError: if one of these parameters had another shape.
        """
        known = getattr(self, "parameters", parameters)
        index = {name: i for i, name in enumerate(parameters.names)}
        former = {}
        for key, block in self.blocks.items():
            if all(known.names[i] in index for i in key):
                now = tuple(index[known.names[i]] for i in key)
                for i, j in zip(key, now):
                    check_shape(known.names[i], known.tensors[i].shape, parameters.tensors[j].shape)
                former[now] = block
        return former

    @abstractmethod
    def __matmul__(self, v: Tensor) -> Tensor:
        """C v; (P,) → (P,), or (P, K) → (P, K)."""

    def dense(self) -> Tensor:
        """C as a matrix (P, P)."""
        return self @ torch.eye(self.parameters.numel, dtype=self.parameters.dtype, device=self.parameters.device)

    def solve(self, b: Tensor, *, damping: float = 0.0, **options: Any) -> Solution:
        """Take (C + λI)⁻¹ b, with the ``options`` of `inverse`, for the solution; (P,).

        Returns:
            A `Solution` whose curvature and model value are those of C + λI, and whose residual is NaN: it would be of
            F, which is not looked at. `StepReport.residual` is NaN then too.
        """
        x = self.inverse(damping, **options)(b)
        curvature = torch.dot(x.double(), (self @ x).double()) + damping * torch.dot(x.double(), x.double())
        value = 0.5 * curvature - torch.dot(b.double(), x.double())
        status = Status.CONVERGED if bool(torch.isfinite(value)) else Status.NON_FINITE
        return Solution(x, status, (status,), 0, torch.full_like(curvature, nan), curvature, value)


def check_shape(name: str, former: Sequence[int], now: Sequence[int]) -> None:
    """Raise ValueError for what was learnt of a tensor ``name`` of a ``former`` shape, unless it is that of ``now``."""
    if tuple(former) != tuple(now):
        raise ValueError(
            f"what was learnt of {name!r} is of the shape {tuple(former)}, but it has {tuple(now)}: {RESIZED}"
        )


def check_average(decay: float, probes: int | None = None) -> None:
    """Raise ValueError for a γ outside of [0, 1), or probes below 1."""
    number("decay", decay, 0, 1, below=True)
    if probes is not None:
        whole("probes", probes, 1)


def count(updates: Tensor | None, decay: float) -> tuple[Tensor, float]:
    """The number t of batches, with this one, and the weight of this one among 1, γ, γ², …: (1 − γ) / (1 − γᵗ)."""
    updates = torch.ones((), dtype=torch.int64, device="cpu") if updates is None else updates + 1
    return updates, (1 - decay) / (1 - decay ** int(updates))


def inverted(damped: Tensor) -> Tensor:
    """1 / x, and 0 for 0, as in a pseudo-inverse."""
    return torch.where(damped == 0, 0.0, 1 / damped)


def eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, none below zero, and eigenvectors; NaN where the matrix is not finite."""
    if not bool(torch.isfinite(matrix).all()):
        return torch.full_like(matrix[0], nan), torch.full_like(matrix, nan)
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except RuntimeError:  # single precision may not converge where eigenvalues are many and near zero
        values, vectors = (x.to(matrix.dtype) for x in torch.linalg.eigh(matrix.double()))
    return values.clamp(min=0), vectors
