"""Tensors of one shape, and factors of one dimension, worked on as one batch; their state is views of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from npg.parameters import power_of_two

__all__ = ["Dimension", "Owner", "Stack", "batched", "normalised", "rows", "stacks"]

#: What the factors of a batch have in common: their dimension, and the dtype and device of the arithmetic.
Dimension: TypeAlias = tuple[int, torch.dtype, torch.device]
#: Whose row of a batch it is: the place of a tensor in the list of tensors, and what its entries end in.
Owner: TypeAlias = tuple[int, str]
_Factors = TypeVar("_Factors", bound=tuple[Tensor, ...])


class Stack(NamedTuple):
    """The tensors of one shape, dtype and device."""

    shape: torch.Size
    dtype: torch.dtype  #: of the arithmetic: the tensors' own, at least float32
    device: torch.device
    indices: list[int]  #: places in the list of tensors

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """Those out of the list that belong here, (n, *shape)."""
        return torch.stack([tensors[i] for i in self.indices]).to(self.dtype).contiguous()


def stacks(tensors: Sequence[Tensor]) -> list[Stack]:
    """The tensors by their shapes, in the order of the first of each."""
    found: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        found[tensor.shape, torch.promote_types(tensor.dtype, torch.float32), tensor.device].append(i)
    return [Stack(*key, indices) for key, indices in found.items()]


def batched(
    owners: Mapping[Dimension, Sequence[Owner]],
    make: Callable[[int, Dimension], _Factors],
    states: Sequence[dict[str, Tensor]],
) -> dict[Dimension, _Factors]:
    """The factors of one dimension as one batch, whichever tensor and axis they belong to.

    Args:
        owners: of the rows of each batch.
        make: the factors of a batch of so many rows that have seen nothing, a named tuple.
        states: one dict for each tensor. Where an entry, such as ``basis_left`` for the field ``basis`` and an owner's
            ``left``, is there already, it is taken; all of them become views of their rows.
    """
    batches = {}
    for key, of in owners.items():
        batches[key] = factors = make(len(of), key)
        names: tuple[str, ...] = factors._fields  # type: ignore[attr-defined]
        for row, (i, suffix) in enumerate(of):
            for name, tensor in zip(names, factors, strict=True):
                if (saved := states[i].get(f"{name}_{suffix}")) is not None:
                    if saved.shape != tensor[row].shape:
                        raise ValueError(
                            f"{name}_{suffix} in the state has the shape {tuple(saved.shape)}, and must have "
                            f"{tuple(tensor[row].shape)}: load the state of an optimizer of the same model and options"
                        )
                    tensor[row].copy_(saved)
                states[i][f"{name}_{suffix}"] = tensor[row]
    return batches


def rows(factors: _Factors, start: int, count: int) -> _Factors:
    """Views of some rows of a batch of factors."""
    return type(factors)(*(tensor[start : start + count] for tensor in factors))


def normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x / unit`` and the unit, the `power_of_two` of the largest entry of each x[n], (n, 1, …): no digit changes."""
    unit = power_of_two(x.reshape(len(x), -1).abs().amax(1).view(-1, *[1] * (x.ndim - 1)))
    return x / unit, unit
