"""The leading part of a mini-batch, whatever its inputs are made of."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

__all__ = ["first_rows"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), Enum, torch.dtype, torch.device, torch.Size)


def first_rows(inputs: Any, rows: int, batch: int) -> Any:
    """``inputs`` with the first rows of each tensor that has the batch's on its leading axis; all else as it is.

    Raises:
        TypeError: for something that may hold rows, and is neither a tensor nor a collection of them.
        ValueError: where sizes do not tell which tensors have the batch's rows.
    """
    fraction = f"curvature_fraction takes the first {rows} of {batch} rows of the inputs"
    remedy = "or leave curvature_fraction at 1"
    found: dict[str, Tensor] = {}

    def walk(tree: Any, path: str, take: Callable[[Tensor], Tensor]) -> Any:
        def leaf(keys: Any, x: Any) -> Any:
            here = path + pytree.keystr(keys)
            if isinstance(x, Tensor):
                if x.ndim > 0:
                    found[here] = x
                return take(x) if x.ndim > 0 else x
            if isinstance(x, (dict, UserDict)):  # of which a copy has items of its own
                other = copy.copy(x)
                for key in x:
                    other[key] = walk(x[key], f"{here}[{key!r}]", take)
                return other
            if not isinstance(x, _PLAIN):
                raise TypeError(
                    f"{fraction}, and {here} is a {type(x).__name__}, in which none can be found: "
                    f"pass tensors in tuples, lists and dicts, {remedy}"
                )
            return x

        # The rows of a packed sequence are all over its tensors.
        return pytree.tree_map_with_path(leaf, tree, is_leaf=lambda x: isinstance(x, PackedSequence))

    walk(inputs, "inputs", lambda x: x)
    held = [path for path, x in found.items() if len(x) == batch]
    if not held:
        shapes = {path: tuple(x.shape) for path, x in found.items()}
        raise ValueError(
            f"{fraction}, and none has {batch} on its leading axis: {shapes}. Put the batch first, {remedy}"
        )
    for path, x in found.items():
        second = x.ndim > 1 and x.shape[1] == batch
        if second and (len(held) > 1 if len(x) == batch else len(x) > 1):
            raise ValueError(
                f"{fraction}, and {path} of shape {tuple(x.shape)} may have them on its second axis, or not at all: "
                f"give it a leading axis of the batch, take a batch of another size, {remedy}"
            )
    return walk(inputs, "inputs", lambda x: x[:rows] if len(x) == batch else x)
