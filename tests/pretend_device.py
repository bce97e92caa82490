"""A make-believe accelerator for machines without one: CPU arithmetic behind the device name "pretend".

    import pretend_device
    x = torch.randn(3, 4, device="pretend")       # autograd, torch.func, modules and optimizers work on it
    pretend_device.reads                          # how often the host has looked at it: item, tolist, cpu

An operation that mixes its tensors with CPU tensors of one axis or more is an error, as on CUDA. Every tensor of it is
a wrapper around a CPU tensor whose operations arrive in Python below autograd, so convolutions, BatchNorm and pooling,
forward and backward, are PyTorch's own. To import it changes this process for good (there is an accelerator now), so
tests that use it are run in a process of their own.

Raises ImportError where this PyTorch has no hook for devices in Python.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend:0")
#: Looks of the host at the device since the last `reads.clear()`, by what they were.
reads: collections.Counter[str] = collections.Counter()
#: Operations that take CPU tensors beside their own on CUDA too.
_MAY_MIX = ("aten.copy_", "aten.index", "aten._index_put")
_counting = True


class Pretend(torch.Tensor):
    """A tensor of the device, around the CPU tensor that holds its numbers."""

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Pretend:
        self = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )
        self.raw = raw
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def uncounted() -> Iterator[None]:
    """Looks in this block count for nothing: the test's own."""
    global _counting
    before, _counting = _counting, False
    try:
        yield
    finally:
        _counting = before


def _look(kind: str) -> None:
    reads[kind] += _counting


def _unwrap(x: Any) -> Any:
    return x.raw if isinstance(x, Pretend) else x


def _wrap(x: Any) -> Any:
    return Pretend(x) if isinstance(x, torch.Tensor) and not isinstance(x, Pretend) else x


def _check(name: str, operands: Any) -> None:
    """Raise RuntimeError if tensors on the device meet CPU tensors of one axis or more."""
    if any(isinstance(x, Pretend) or x is DEVICE for x in operands):
        for x in operands:
            if isinstance(x, torch.Tensor) and not isinstance(x, Pretend) and x.ndim > 0:
                raise RuntimeError(f"{name}: a CPU tensor of shape {tuple(x.shape)} meets tensors on {DEVICE}")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, device = str(func), kwargs.get("device")
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    raw_args, raw_kwargs = tree_map(_unwrap, args), tree_map(_unwrap, kwargs)
    if name.startswith("aten._local_scalar_dense"):
        _look("item")
        return func(*raw_args, **raw_kwargs)
    if name.startswith("aten._efficientzerotensor"):  # a CPU one has no memory behind it
        return Pretend(torch.zeros(*raw_args, **(raw_kwargs | {"device": "cpu"})))
    if name.startswith(("aten._to_copy", "aten.to.")):
        raw_kwargs.pop("device", None)
        out = func(*raw_args, **raw_kwargs)
        if device is not None and torch.device(device).type == "cpu":
            _look("cpu")
            return out
        return Pretend(out)
    if name.startswith("aten._foreach_"):  # place by place, each may be on another device
        for place in zip(*(x for x in args if isinstance(x, (list, tuple))), strict=True):
            _check(name, place)
        out = func(*raw_args, **raw_kwargs)
        return out and [_wrap(x) if isinstance(first, Pretend) else x for x, first in zip(out, args[0], strict=True)]
    if name.startswith("aten.copy_") and not isinstance(args[0], Pretend):
        _look("cpu")
    if not name.startswith(_MAY_MIX):
        _check(name, [DEVICE, *tensors])
    if device is not None:
        raw_kwargs["device"] = "cpu"
    out = func(*raw_args, **raw_kwargs)
    if func._schema.is_mutable:
        # what was changed in place is the tensor that came in
        came_in = {id(_unwrap(x)): x for x in tensors}
        return tree_map(lambda x: came_in.get(id(x), _wrap(x)), out)
    return tree_map(_wrap, out)


_tolist = torch.Tensor.tolist


def _counted_tolist(self: torch.Tensor) -> Any:
    if isinstance(self, Pretend):
        _look("tolist")
        return _tolist(self.raw)
    return _tolist(self)


def _moved(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A factory that the hook cannot dispatch: on the CPU, and then to the device."""

    def made(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return make(*args, **kwargs) if device is None else make(*args, **kwargs).to(device)

    return made


torch.Tensor.tolist = _counted_tolist
torch.arange, torch.tensor = _moved(torch.arange), _moved(torch.tensor)
torch.pretend.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
torch.pretend.is_available = lambda: True
_library = torch.library.Library("_", "IMPL")
_library.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
