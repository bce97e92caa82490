"""The one place where parameters become a flat vector and back."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from npg.graph import graph_nodes, leaves_of

__all__ = ["Memory", "Parameters", "apart", "check_beside", "check_dtypes", "power_of_two"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_dtypes(named: Mapping[str, Tensor]) -> None:
    """Raise ValueError, with the name, for what is no dense real floating-point tensor of a known shape.

    Raise TypeError for what is no mapping of tensors.
    """
    if not isinstance(named, Mapping):
        raise TypeError(
            f"parameters must be a mapping of names to tensors, got {type(named).__name__}: write "
            "dict(model.named_parameters()), or {'w': w, …}"
        )
    for name, p in named.items():
        if not isinstance(p, Tensor):
            flat = ": write one level of names, such as {'a.w': w}" if isinstance(p, Mapping) else ""
            raise TypeError(f"parameter {name!r} must be a tensor, got {type(p).__name__}{flat or ': convert it'}")
        if is_lazy(p):
            raise ValueError(f"parameter {name!r} has no shape yet: run the model once on an example first")
        if hasattr(p, "device_mesh"):  # a DTensor's
            raise ValueError(
                f"parameter {name!r} is sharded over processes (a DTensor, of FSDP or tensor parallelism), which no "
                "optimizer or product here can be: keep it whole in each process, as DistributedDataParallel does"
            )
        if p.is_inference():
            raise ValueError(
                f"parameter {name!r} was made in torch.inference_mode, and has no derivatives: make the model outside "
                "of it"
            )
        if p.dtype not in _DTYPES or p.layout is not torch.strided:
            raise ValueError(
                f"parameter {name!r} is a {p.dtype} tensor of layout {p.layout}: parameters that are trained must be "
                "dense and float64, float32, bfloat16 or float16; convert it, or set requires_grad=False"
            )


def _place(x: Tensor) -> tuple[int, int] | None:
    """The addresses that its elements reach over; None of what has no memory that could be looked at."""
    try:
        first = x.data_ptr()
    except (RuntimeError, ValueError, NotImplementedError):  # sparse, lazy, or a stand-in of torch.func
        return None
    if not (first and x.numel()):
        return None
    return first, first + (sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) + 1) * x.itemsize


K = TypeVar("K")


class Memory:
    """Where tensors lie.

    Args:
        tensors: of one device.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        places = sorted(place for x in tensors if (place := _place(x)) is not None)
        self._starts = [start for start, _ in places]
        self._ends = list(accumulate((end for _, end in places), max))

    def meets(self, x: Tensor) -> bool:
        """Whether a tensor reaches over a part of it."""
        if (place := _place(x)) is None:
            return False
        before = bisect_left(self._starts, place[1])
        return before > 0 and self._ends[before - 1] > place[0]


def apart(tensors: Mapping[int, Tensor]) -> set[int]:
    """The keys of tensors whose memory can be looked at, and that no other one reaches into."""
    return {group[0] for _, group in _groups(tensors) if len(group) == 1}


def _groups(tensors: Mapping[K, Tensor]) -> list[tuple[int, list[K]]]:
    """Those that reach over each other's memory, by key, and where each group ends."""
    places = [(place, key) for key, x in tensors.items() if (place := _place(x)) is not None]
    groups: list[tuple[int, list[K]]] = []
    for (start, end), key in sorted(places, key=lambda entry: entry[0]):
        if groups and start < groups[-1][0]:
            groups[-1] = max(end, groups[-1][0]), [*groups[-1][1], key]
        else:
            groups.append((end, [key]))
    return groups


def _check_memory(named: Mapping[str, Tensor]) -> None:
    """Raise ValueError, with the names, where parameters share an element of memory: one's step would be lost."""
    for end, names in _groups(named):
        names.sort(key=list(named).index)
        tensors = [named[name] for name in names]
        if len(names) == 1 and (tensors[0].is_contiguous() or _apart_within(tensors[0])):
            continue
        first, size = min(p.data_ptr() for p in tensors), tensors[0].itemsize
        if len({p.dtype for p in tensors}) == 1:  # columns of one matrix lie between each other, and share nothing
            elements = torch.arange((end - first) // size, device="cpu")
            taken = [elements.as_strided(p.shape, p.stride(), (p.data_ptr() - first) // size) for p in tensors]
            if int(torch.bincount(torch.cat([part.reshape(-1) for part in taken])).amax()) <= 1:
                continue
        raise ValueError(
            f"parameters {names} share memory with each other, or their own elements do, and a step in one would be "
            "written over by the next: make one parameter of them. A layer is tied by self.b.weight = self.a.weight, "
            "or with the transpose by F.linear(x, self.a.weight.t()) in the forward pass; an expanded parameter is "
            "expanded there too"
        )


def _apart_within(p: Tensor) -> bool:
    """Whether each of its axes steps over all that the finer ones reach: then no two elements are at one place."""
    reached = 0
    for stride, size in sorted(zip(p.stride(), p.shape)):
        if size > 1:
            if stride <= reached:
                return False
            reached += (size - 1) * stride
    return True


def power_of_two(largest: Tensor) -> Tensor:
    """A power of two with largest / unit in [1, 2), by which vectors are divided without changing a digit.

    It is 1 where ``largest`` is 0, infinite or NaN.
    """
    mantissa, _ = torch.frexp(largest)  # in [½, 1); a logarithm would round up at the largest number
    return torch.where((largest > 0) & torch.isfinite(largest), largest / (2 * mantissa), 1.0)


def _check_embeddings(model: nn.Module, trained: Iterable[Tensor]) -> None:
    ids = {id(p) for p in trained}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        if module.max_norm is not None:
            raise ValueError(
                f"embedding {name!r} has max_norm={module.max_norm}: each forward pass then changes its weight, and no "
                "step can be measured or taken back. Set max_norm=None, and divide by the norm in the forward pass"
            )
        if module.sparse and id(module.weight) in ids:
            raise ValueError(
                f"embedding {name!r} has sparse=True, but gradients are parts of a dense vector here: set sparse=False"
            )
        if module.scale_grad_by_freq and id(module.weight) in ids:
            raise ValueError(
                f"embedding {name!r} has scale_grad_by_freq=True: its backward pass is then not the derivative of its "
                "forward pass, and F no Fisher information. Set scale_grad_by_freq=False, or freeze its weight"
            )


class Parameters:
    """The trainable parameters of a model as one vector θ of length P.

    The order is that of ``model.parameters()``; frozen parameters are left out, shared ones count once. The vector
    lives in at least float32, whatever the precision of the parameters.

    Args:
        source: a module, or a mapping from names to tensors.
        only: of a module, the parameters to take, by name; by default all that are trainable.

    Raises:
        ValueError: if nothing is trainable, if parameters lie on several devices, or if one of them cannot be part of
            the vector: one that is not a dense real floating-point tensor, or whose shape is not known yet, and an
            embedding with ``max_norm``, or with gradients that are sparse or scaled by frequency. Neither may
            parameters share memory.
    """

    def __init__(self, source: nn.Module | Mapping[str, Tensor], only: Mapping[str, Tensor] | None = None) -> None:
        if isinstance(source, nn.Module):
            if only is None:
                only = {name: p for name, p in source.named_parameters() if p.requires_grad}
            _check_embeddings(source, only.values())
            source = only
        check_dtypes(source)
        named = dict(source)
        if not named:
            raise ValueError("model has no trainable parameter: set requires_grad on at least one")
        devices = {p.device for p in named.values()}
        if len(devices) > 1:
            raise ValueError(f"parameters must lie on one device, got {sorted(map(str, devices))}")
        _check_memory(named)
        self.names = list(named)
        self.tensors = list(named.values())
        self.sizes = [p.numel() for p in self.tensors]
        self.numel = sum(self.sizes)
        self.device = self.tensors[0].device
        self.dtype = torch.float32
        for p in self.tensors:
            self.dtype = torch.promote_types(self.dtype, p.dtype)

    def __len__(self) -> int:
        return self.numel

    def named(self, tensors: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """``tensors`` (or the parameters) under the parameters' names."""
        return dict(zip(self.names, self.tensors if tensors is None else tensors, strict=True))

    def flatten(self, tensors: Iterable[Tensor | None]) -> Tensor:
        """Tensors shaped like the parameters → (P,); None counts as zeros."""
        parts = [
            (torch.zeros_like(p) if t is None else t).reshape(-1) for p, t in zip(self.tensors, tensors, strict=True)
        ]
        return torch.cat(parts).to(self.dtype)

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """(P,) → tensors shaped and typed like the parameters; views of ``vector`` where the dtype allows it."""
        self.check(vector)
        parts = [part.view(p.shape) for part, p in zip(vector.split(self.sizes), self.tensors)]
        return [part if part.dtype == p.dtype else part.to(p.dtype) for part, p in zip(parts, self.tensors)]

    def check(self, vector: Tensor) -> None:
        """Raise TypeError for what is no tensor, and ValueError unless ``vector`` is real, here, and has P rows."""
        if not isinstance(vector, Tensor):
            several = isinstance(vector, (list, tuple))
            remedy = "torch.nn.utils.parameters_to_vector(…)" if several else "torch.as_tensor(…)"
            raise TypeError(
                f"vector must be one tensor of shape ({self.numel},) or ({self.numel}, K), got "
                f"{type(vector).__name__}: use {remedy}"
            )
        if vector.is_complex():
            raise ValueError(
                f"vector must be real, got {vector.dtype}: the maps are linear, apply them to .real and .imag"
            )
        if vector.ndim not in (1, 2) or vector.shape[0] != self.numel:
            raise ValueError(
                f"vector must have shape ({self.numel},) or ({self.numel}, K), one row per trainable parameter, "
                f"got {tuple(vector.shape)}"
            )
        if vector.device != self.device:
            raise ValueError(
                f"vector must be on {self.device}, where the parameters are, got it on {vector.device}: write "
                "vector.to(fisher.device)"
            )

    @torch.no_grad()
    def get(self) -> Tensor:
        """A copy of θ, (P,)."""
        return self.flatten(self.tensors).clone()

    @torch.no_grad()
    def copy(self) -> list[Tensor]:
        """Bit-exact copies of the parameter tensors, for `restore`."""
        return [p.detach().clone() for p in self.tensors]

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether every parameter is finite; the host waits for it."""
        held = [p for p in self.tensors if p.numel()]
        return not held or bool(torch.stack(torch._foreach_max(torch._foreach_abs(held))).isfinite().all())

    @torch.no_grad()
    def restore(self, copies: Sequence[Tensor]) -> None:
        """Put the values of `copy` back, bit for bit."""
        for p, value in zip(self.tensors, copies, strict=True):
            p.copy_(value)
        torch.clear_autocast_cache()  # which holds the former values in low precision

    @torch.no_grad()
    def move(self, origin: Sequence[Tensor], step: Tensor, scale: float | Tensor = 1.0) -> None:
        """θ ← origin + scale·step, in place."""
        # scaled in the precision of the vector: float16 does not hold every s whose βs it holds
        for p, value, change in zip(self.tensors, origin, self.unflatten(step * scale), strict=True):
            p.copy_(value + change)
        torch.clear_autocast_cache()


def check_beside(value: Tensor, parameters: Parameters, name: str) -> None:
    """Raise ValueError if the graph of a function of the outputs ends in parameters: the function reads them itself.

    Derivatives are taken in the outputs, and do not see that.
    """
    leaves = leaves_of(graph_nodes(value))
    if beside := [n for n, p in zip(parameters.names, parameters.tensors) if id(p) in leaves]:
        raise ValueError(
            f"{name} depends on {', '.join(beside)} beside the outputs, which neither gradient nor F would see: let "
            "the model return them with its outputs (a spread, as the second half of a DiagonalGaussian's), put a "
            "penalty of weights into weight_decay, or leave the dependence out by .detach()"
        )
