"""Traced programs in place of PyTorch's own forward and reverse mode: the same numbers, sooner. The one door to them.

`accelerate` gives the two maps of a linearisation, and `accelerate_function` any function of tensors, as straight-line
programs; both give None where there is none, and then the caller does without. A program is only ever used after it was
seen to agree with autograd on the very batch at hand (`agreement`); the `Cache` says which ones are kept, and when a
shape is worth a trace.

It is all turned off by the environment variable ``NPG_ACCELERATION=off``, or in Python by

    npg.acceleration.mode("off")            # from here on
    with npg.acceleration.mode("off"): …    # for what is linearised, or asked for, in this block
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import jvp, vjp

from npg.acceleration.agreement import OTHER_OUTPUTS, Recorded, close, precision, same_outputs, sums_agree
from npg.acceleration.cache import Cache
from npg.acceleration.program import Maps, Program, straight_line
from npg.model import Model, plain_attention, without_autocast
from npg.parameters import Parameters
from npg.randomness import replayed_randomness

__all__ = [
    "OTHER_OUTPUTS",
    "Function",
    "Maps",
    "Recorded",
    "accelerate",
    "accelerate_function",
    "close",
    "mode",
    "precision",
    "same_outputs",
    "sums_agree",
]


class mode:
    """Use traced programs where they are right ("auto"), or never ("off"): from here on, or in a ``with`` block.

    It holds for all threads. A linearisation keeps the maps that it has had since its first product.

    Raises:
        ValueError: for another mode.
    """

    now: str = "auto"

    def __init__(self, value: str) -> None:
        self._before = mode.now
        mode.now = _known(value, "mode")

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        mode.now = self._before


def _known(value: str, name: str) -> str:
    if value not in ("auto", "off"):
        raise ValueError(f"{name} must be 'auto' or 'off', got {value!r}")
    return value


mode.now = _known(os.environ.get("NPG_ACCELERATION") or "auto", "the environment variable NPG_ACCELERATION")


class Function(NamedTuple):
    """A network as a function of tensors alone.

    Attributes:
        call: tensors ↦ η, (…, D).
        arguments: its tensors as they are, the parameters first.
        constants: what it depends on beside them, so far as that can be compared.
    """

    call: Callable[..., Tensor]
    arguments: list[Tensor]
    constants: Hashable


class Linearized(Protocol):
    """What `accelerate` has to know of a linearisation; see `npg.linearize.Linearization`."""

    model: Model
    parameters: Parameters
    outputs: Tensor
    random_state: tuple[Tensor, Tensor | None]

    def as_function(self) -> Function: ...

    def as_before(self) -> AbstractContextManager[None]: ...


_programs: Cache[Program] = Cache(Program.confirms)
_functions: Cache[Callable[..., Sequence[Tensor]]] = Cache(every_shape=True)


def accelerate(linearization: Linearized, recorded: Recorded) -> Maps | None:
    """The two maps of a linearisation by a traced program; None if acceleration is off, or a trace does not pay yet.

    A model that says ``traceable = False``, such as a loop over time of a changing length, has none.

    Raises:
        RuntimeError: in what the program differs from what was recorded.
        Exception: whatever an operation raises that has no forward rule, or looks at values.
    """
    model, outputs = linearization.model, linearization.outputs
    if mode.now == "off" or not getattr(model, "traceable", True):
        return None
    device = linearization.parameters.device
    network, arguments, constants = linearization.as_function()
    n, m = len(linearization.parameters.names), len(arguments)

    def first_order(*values: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        def moved(*p: Tensor) -> Any:  # (η, J v): reverse mode over η takes J v along
            return jvp(lambda *p: network(*p, *values[n:m]), p, values[m:-1])

        outputs, pull, tangent = vjp(moved, *values[:n], has_aux=True)  # type: ignore[misc]  # its stub forgets aux
        with without_autocast(device):
            return outputs, tangent, pull(values[-1])

    def trace() -> Program:
        with linearization.as_before(), plain_attention(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Program(
                first_order, arguments, [torch.zeros_like(p) for p in arguments[:n]], torch.zeros_like(outputs)
            )

    def attempt(program: Program) -> tuple[Maps, str]:
        with replayed_randomness(linearization.random_state, device):
            outputs, maps = program.linearize(arguments)
        return maps, recorded.difference(maps) if recorded.agree(program, outputs) else OTHER_OUTPUTS

    return _programs.use(model, (constants, *_alike(arguments)), trace, attempt)


def accelerate_function(
    owner: Any,
    function: Callable[..., Sequence[Tensor]],
    arguments: Sequence[Tensor],
    agrees: Callable[[Callable[..., Sequence[Tensor]]], bool],
    version: int = 0,
) -> Callable[..., Sequence[Tensor]] | None:
    """``function`` of tensors as a program for shapes like these; None if acceleration is off, or there can be none.

    It takes the tensors as they are in each call, draws random numbers anew, and is to be called without gradients.

    Args:
        owner: the object whose only function this is; its programs are kept as long as it lives.
        function: tensors ↦ tensors.
        arguments: the tensors now.
        agrees: whether a program of it is right.
        version: of the function; programs of another one are not used.
    """
    if mode.now == "off":
        return None

    @torch.no_grad()
    def attempt(run: Callable[..., Sequence[Tensor]]) -> tuple[Callable[..., Sequence[Tensor]], str]:
        return run, "" if agrees(run) else "its results are not those of the modules"

    try:
        return _functions.use(owner, (version, *_alike(arguments)), lambda: straight_line(function, arguments), attempt)
    except Exception:  # what looks at values cannot be traced
        return None


def _alike(tensors: Sequence[Tensor]) -> tuple[Hashable, ...]:
    """What tensors must have in common to share a program."""
    return (torch.backends.mkldnn.enabled, *((t.shape, t.dtype, t.device) for t in tensors))
