"""The first-order model of a network: η(θ + v) ≈ η + J v, formed once and applied as often as a solver asks.

A Fisher-vector product is Jᵀ M J v. Here are its two outer maps, by PyTorch's own derivatives:

* **pull back**, u ↦ Jᵀu: `torch.autograd.grad` over the recorded forward pass. It is the truth, and gives the gradient;
* **push forward**, v ↦ J v, in the first of these ways that is right:

  1. a traced program of both maps, where `npg.acceleration` has one: the same numbers, sooner;
  2. forward mode, `torch.func.jvp`;
  3. double backward: u ↦ Jᵀu is linear, and its derivative in u, applied to v, is J v. For operations that have no
     forward rule;
  4. the same, with attention by its plain formula: a fused kernel has no second backward;
  5. J itself, if it is small, one backward pass for each row. A custom ``autograd.Function`` whose backward is
     ``once_differentiable``, or computes without a graph, has no second derivative.

Every way has to agree with the recorded pull back before it is used (`npg.acceleration.agreement`): its own pull back
in every parameter, and its push forward as the adjoint of that. What is left out is said once for each model. A network
for which no way is right is refused by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, cast
from weakref import WeakKeyDictionary, proxy

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from npg.acceleration import (
    OTHER_OUTPUTS,
    Function,
    Maps,
    Recorded,
    accelerate,
    precision,
    same_outputs,
    sums_agree,
)
from npg.graph import graph_nodes, leaves_of, source_of
from npg.model import (
    Buffers,
    Model,
    by_slot,
    frozen_statistics,
    is_autocast,
    layer_by_layer,
    padding_rows,
    plain_attention,
    unwrapped,
    without_autocast,
)
from npg.parameters import Memory, Parameters, check_dtypes, power_of_two
from npg.randomness import random_state, replayed_randomness

__all__ = ["Linearization"]

_Map = Callable[[Tensor], Sequence[Tensor]]


class Linearization:
    """η(θ + v) ≈ η + J v around the present parameters.

    Args:
        model: a module, or a function ``f(parameters, *inputs)`` of a mapping of parameters.
        inputs: a tensor, or a tuple of positional arguments (a named tuple is one of them).
        parameters: the parameters to differentiate, by name: needed for a function; for a module, all that are
            trainable by default.
        move_statistics: let this forward pass move running statistics, as one training step does.

    Attributes:
        model: the model; what is behind a compiled one, or DistributedDataParallel.
        leaves: the tensors that its graph is differentiated at, one for each parameter.
        outputs: η, (…, D), detached, at least float32.
        parameters: the `Parameters` whose vector the maps take and return.
        random_state: of the generators before the forward pass, so that it can be repeated (see
            `replayed_randomness`).
    """

    def __init__(
        self,
        model: Model,
        inputs: Any,
        parameters: Mapping[str, Tensor] | None = None,
        *,
        move_statistics: bool = False,
    ) -> None:
        _check_mode()
        model, _ = unwrapped(model)
        if not callable(model):
            raise TypeError(
                f"model must be a module, or a function f(parameters, *inputs), got {type(model).__name__}: write "
                "model, without .parameters()"
            )
        self.model = model
        self._inputs = pytree.tree_map(_counted, _as_tuple(inputs))
        if parameters is not None:
            check_dtypes(parameters)
        if isinstance(model, nn.Module):
            own = dict(model.named_parameters())
            if unknown := [name for name in parameters or () if name not in own]:
                raise ValueError(f"parameters names {unknown}, which the model does not have: it has {list(own)}")
            self.parameters = Parameters(model, parameters)
            direct = all(own.get(name) is p and p.requires_grad for name, p in self.parameters.named().items())
        elif parameters is None:
            raise ValueError("parameters must be given for a model that is a function: pass a mapping of tensors")
        else:
            self.parameters = Parameters(parameters)
            direct = False
        # A module's own parameters are differentiated in place, other tensors at detached stand-ins for them.
        self.leaves: list[Tensor] = (
            self.parameters.tensors if direct else [p.detach().requires_grad_() for p in self.parameters.tensors]
        )
        _check_cache(model)
        self._direct = direct
        device = self.parameters.device
        self.random_state = random_state(device)
        self._autocast = torch.get_autocast_dtype(device.type) if is_autocast(device) else None
        # Both maps are linear: what goes into arithmetic of so small a range is brought near to 1 first.
        self._half = torch.float16 in (self._autocast, *(p.dtype for p in self.parameters.tensors))
        self._buffers = Buffers(model)
        self._statistics_move = move_statistics
        self._values = self.parameters.copy()
        self._places = _places(model)
        mine = set(map(id, self.parameters.tensors))
        frozen = [p for p in model.parameters() if id(p) not in mine] if isinstance(model, nn.Module) else []
        self._check_history()
        self._inputs = self._apart_from_parameters(self._inputs)
        given = [x for x in pytree.tree_leaves(self._inputs) if isinstance(x, Tensor)]
        others = [*given, *frozen]
        self._others = [x for x in others if not x.is_inference()]  # which has no version
        versions = self._present_versions()
        with torch.enable_grad(), nullcontext() if move_statistics else frozen_statistics(model):
            self._graph: Tensor | None = self.forward(self.leaves)
        # They may lie in the memory of a parameter, or in one that the next forward pass writes to.
        self.outputs = self._graph.detach().clone()
        nodes = graph_nodes(self._graph)
        _check_checkpoints(nodes, model)
        self._lowest = _lowest(nodes, self._autocast)
        if not leaves_of(nodes).intersection(map(id, self.leaves)):
            raise ValueError(f"the outputs of model do not depend on any trainable parameter{self._read_past(nodes)}")
        if read := self._read_past(nodes):
            raise ValueError(f"model must be a function of the parameters that it is given{read}")
        n, moved = len(self.leaves), self._present_versions()
        if moved[:n] != versions[:n] and not all(map(_same, self.parameters.tensors, self._values)):
            raise ValueError(
                f"the forward pass of {_name(model)} writes to its trainable parameters, so that each pass is of "
                "another function: compute the weight from the parameter (torch.nn.utils.parametrize), or write to it "
                "outside of the forward pass. They have changed already"
            )
        self._versions = moved
        if moved[n:] != versions[n:] and not (self._repeats() and self._present_versions() == moved):
            raise ValueError(  # ReLU in place writes too, and changes nothing
                f"the forward pass of {_name(model)} writes to its inputs (x.sub_(…), x -= …) or frozen parameters, "
                "which later passes read: write x = x - … in its place, and keep what moves from pass to pass in "
                "buffers (register_buffer). These inputs, or parameters, have changed already"
            )
        self._maps: Maps | None = None
        self._other_outputs = False  # whether a second forward pass was seen to give them
        self._seen: tuple[Tensor, Tensor] | None = None  # (u, Jᵀu) of the first pull back, see _reference
        self._row_by_row: set[str] = set()  # the directions in which torch.vmap is not right

    @property
    def precision(self) -> float:
        """The relative rounding error ε of one operation of the network."""
        return precision(self.parameters, self._lowest)

    def forward(self, values: Sequence[Tensor] | None = None, inputs: tuple[Any, ...] | None = None) -> Tensor:
        """η at the given values of the parameters, by default at the present ones, and at its inputs; (…, D)."""
        values = self.parameters.tensors if values is None else values
        inputs = self._inputs if inputs is None else inputs
        with layer_by_layer():
            if self._direct and values is self.parameters.tensors:
                return _at_least_float(cast(nn.Module, self.model)(*inputs))
            return _at_least_float(self._call(self.parameters.named(values), *inputs))

    def record(self, *, same: bool = True) -> Tensor:
        """The forward pass once more, as a graph over ``leaves``: with the same dropout, and moving nothing.

        Raises:
            RuntimeError: if its outputs are not the ``same``.
        """
        _check_mode()
        self._check()
        with torch.enable_grad(), self.as_before():
            graph = self.forward(self.leaves)
        if same and not same_outputs(self.outputs, graph.detach(), self.precision):
            raise RuntimeError(_OTHERWISE)
        return graph

    def _apart_from_parameters(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Inputs that lie in the memory of parameters, as ``w.detach()`` does, copied: a trial would move them too."""
        memory, own = Memory(self.parameters.tensors), set(map(id, self.leaves))

        def apart(x: Any) -> Any:
            return _copy(x) if isinstance(x, Tensor) and id(x) not in own and memory.meets(x) else x

        return pytree.tree_map(apart, inputs)

    def _read_past(self, nodes: set[Any]) -> str:
        """What to say of parameters that a function reads by itself, past the mapping; "" if there are none."""
        named = {} if self._direct else self.parameters.named()
        read = [name for name, p in named.items() if p.requires_grad and source_of(p) in nodes]
        what = f": {_name(self.model)} reads {', '.join(read)} by itself, in place of its first argument's"
        return f"{what}; for a module write lambda p, *x: torch.func.functional_call(module, p, x)" if read else ""

    def _check_history(self) -> None:
        """Raise ValueError where an input is computed by the parameters: products would see that, and no trial."""
        mine = dict(zip(map(id, self.leaves), self.parameters.names))
        given = (x for x in pytree.tree_leaves(self._inputs) if isinstance(x, Tensor) and x.grad_fn is not None)
        nodes = set().union(*map(graph_nodes, given))
        if found := [mine[i] for i in leaves_of(nodes) if i in mine]:
            raise ValueError(
                f"inputs are computed by {', '.join(sorted(found))}, which are parameters of {_name(self.model)}: give "
                "inputs.detach(), or a model that computes them itself"
            )

    @torch.no_grad()
    def _repeats(self) -> bool:
        """Whether a forward pass over copies of the inputs gives the same outputs."""
        copies = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self._inputs)
        with self.as_before():
            return same_outputs(self.outputs, self.forward(self.leaves, copies), self.precision)

    def check_repeats(self) -> None:
        """Raise RuntimeError if a second forward pass here gives other outputs: then there is no trial of a step.

        It costs a forward pass at the 1st, 2nd, 4th, 8th, … call for a model.
        """
        told = _told_of(self.model)
        told.checks += 1
        due = told.checks & (told.checks - 1) == 0
        if (self._other_outputs or due) and not self._repeats():
            raise RuntimeError(_OTHERWISE)

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Repeat the forward pass inside: with the same buffers, random numbers and autocast, and moving nothing."""
        device, buffers = self.parameters.device, Buffers(self.model)
        self._buffers.restore()
        autocast = nullcontext() if self._autocast is None else torch.autocast(device.type, dtype=self._autocast)
        try:
            with (
                without_autocast(device),
                cast(Any, autocast),
                frozen_statistics(self.model),
                replayed_randomness(self.random_state, device),
            ):
                yield
        finally:
            buffers.restore()

    @contextmanager
    def recomputed(self, *, recorded: bool = False) -> Iterator[None]:
        """Where to differentiate: `torch.utils.checkpoint` repeats its part of the forward pass, which moves nothing.

        It is repeated as it was in `record`, or, if ``recorded``, in the construction.
        """
        if not self._buffers:
            yield
        elif not (recorded and self._statistics_move):
            with frozen_statistics(self.model):
                yield
        else:
            buffers = Buffers(self.model)
            try:
                yield
            finally:
                buffers.restore()

    def _call(self, parameters: Mapping[str, Tensor], *inputs: Any, padding: bool = True) -> Any:
        """The outputs; without ``padding``, embeddings pass no forward derivative of their row of padding either."""
        inputs = inputs or self._inputs
        if isinstance(self.model, nn.Module):
            values = by_slot(self.model, parameters)
            if not padding:
                values |= {
                    name: _resting(values[name], row) for name, row in padding_rows(self.model) if name in values
                }
            return functional_call(self.model, values, inputs, tie_weights=False)
        return self.model(parameters, *inputs)

    def as_function(self) -> Function:
        """η as a function of tensors alone: the parameters, buffers, frozen parameters and inputs."""
        model = self.model
        flat, spec = pytree.tree_flatten(self._inputs)
        tensors = [x for x in flat if isinstance(x, Tensor)]
        others = tuple(None if isinstance(x, Tensor) else x for x in flat)
        buffers, mine = self._buffers.named(), set(self.parameters.names)
        named = model.named_parameters() if isinstance(model, nn.Module) else ()
        constants = {**buffers, **{name: p.detach() for name, p in named if name not in mine}}
        n, c = len(mine), len(constants)
        this = proxy(self)  # which is held by nothing that it holds: it and its graph go with the last reference

        def call(*values: Tensor) -> Tensor:
            rest, given = dict(zip(constants, values[n : n + c])), iter(values[n + c :])
            inputs = pytree.tree_unflatten([next(given) if isinstance(x, Tensor) else x for x in flat], spec)
            moving = {name: rest[name].clone() for name in buffers}  # a forward pass may write to them
            named = {**this.parameters.named(values[:n]), **rest, **moving}
            return _at_least_float(this._call(named, *inputs, padding=False))

        return Function(
            call,
            [*self._values, *constants.values(), *(x.detach() for x in tensors)],
            (
                tuple(self.parameters.names),
                tuple(x for x in others if isinstance(x, (int, float, str, bool))),
                str(spec),
                tuple(m.training for m in model.modules()) if isinstance(model, nn.Module) else (),
                self._autocast,
            ),
        )

    def _present_versions(self) -> list[Any]:
        parameters = self.parameters.tensors
        return [*[(p._version, p.data_ptr()) for p in parameters], *[x._version for x in self._others]]

    def _check(self, *, values: bool = False) -> None:
        """Raise RuntimeError if what was linearised is no more what it was.

        A change through ``.data`` is not counted by PyTorch: to see it, the ``values`` have to be compared. That is
        done while products depend on the parameters' own memory, at the first push forward and with the recorded
        graph. A program has copies of the trained parameters. Frozen parameters and inputs are not compared: their
        changes through ``.data`` are not seen.
        """
        now, tensors = self._present_versions(), self.parameters.tensors
        if self._graph is not None and not all(p.requires_grad for p in self.leaves):
            frozen = [name for name, p in zip(self.parameters.names, self.leaves) if not p.requires_grad]
            raise RuntimeError(
                f"{frozen} were frozen after they were linearised here: make a new Fisher (or Linearization)"
            )
        n, replaced = len(tensors), any(held.get(name) is not x for held, name, x in self._places)
        own = replaced or now[:n] != self._versions[:n]
        if not own and now == self._versions:
            own = values and not all(map(_same, tensors, self._values))
            if not own:
                return
        what = "parameters" if own else "inputs or frozen parameters"
        raise RuntimeError(
            f"the {what} have changed since they were linearised here: make a new Fisher (or Linearization) at the "
            f"present {what}"
        )

    # ------------------------------------------------------------------------------------------------ the two maps

    def pull_back(self, u: Tensor) -> Tensor:
        """Jᵀ u; (…, D) → (P,), or (K, …, D) → (P, K)."""
        p = self.parameters
        if is_autocast(p.device):
            with without_autocast(p.device):
                return self.pull_back(u)
        self._check(values=self._graph is not None and p.device.type == "cpu")  # elsewhere the host would wait
        u = u.to(self.outputs.dtype).contiguous()  # see `npg.acceleration.program.dense`
        if not self._half:
            return self._pull_back(u)
        # A sum over events must not overflow, nor may its many small terms underflow.
        unit = power_of_two(u.reshape(*u.shape[: u.ndim - self.outputs.ndim], -1).abs().sum(-1)) / 256
        return self._pull_back(u / unit.view(*unit.shape, *[1] * self.outputs.ndim)) * unit

    def _pull_back(self, u: Tensor) -> Tensor:
        p = self.parameters
        pull = self._by_autograd() if self._maps is None else torch.no_grad()(self._maps.pull)
        if u.ndim == self.outputs.ndim + 1:
            columns = self._block("pull", pull if self._maps is None else self._maps.plain_pull, pull, u)
            return torch.cat([c.reshape(len(u), -1).to(p.dtype) for c in columns], 1).T
        pulled = p.flatten(pull(u))
        if self._maps is None and self._seen is None:
            self._seen = (u.clone(), pulled.clone())
        return pulled

    @torch.no_grad()
    def push_forward(self, v: Tensor) -> Tensor:
        """J v; (P,) → (…, D), or (P, K) → (K, …, D).

        Raises:
            RuntimeError: if the parameters or the model have changed, or if the network's backward pass is not a linear
                map that PyTorch can differentiate.
        """
        if is_autocast(self.parameters.device):
            with without_autocast(self.parameters.device):
                return self.push_forward(v)
        self._check(values=self._graph is not None)
        self.parameters.check(v)
        if self._maps is None:
            self._maps, self._graph = self._first_that_agrees()
            self._seen = None
        if not self._half:
            return self._push_forward(v)
        unit = power_of_two(v.abs().amax(0))
        return self._push_forward(v / unit) * unit.view(*unit.shape, *[1] * self.outputs.ndim)

    def _push_forward(self, v: Tensor) -> Tensor:
        assert self._maps is not None
        push, plain_push, unflatten = self._maps.push, self._maps.plain_push, self.parameters.unflatten
        if v.ndim == 1:
            return push(unflatten(v.contiguous()))
        plain, single = (lambda x, f=f: [f(unflatten(x.contiguous()))] for f in (plain_push, push))
        return self._block("push", plain, single, v.T)[0]

    def _block(self, direction: str, plain: _Map, single: _Map, block: Tensor) -> Sequence[Tensor]:
        """``single`` of each row of ``block``, stacked: by ``plain`` at once where `torch.vmap` is right.

        It is not for each operation (PyTorch 2.13: the backward of `torch.cdist`), so that every block is compared with
        ``single`` of a sum of its rows.
        """
        if len(block) > 1 and direction not in self._row_by_row:
            try:
                results = torch.vmap(plain)(block)
                if sums_agree(results, block, single, self.precision):
                    return results
            except Exception:  # a backward in NumPy, layers of mixed types under autocast
                pass
            self._row_by_row.add(direction)
        return [torch.stack(results) for results in zip(*map(single, block))]

    # ------------------------------------------------------------------------------------ how the push forward is had

    def _by_autograd(self) -> Callable[[Tensor], Sequence[Tensor]]:
        """U ↦ Jᵀu over the recorded forward pass."""
        assert self._graph is not None
        graph, leaves, this = self._graph, self.leaves, proxy(self)

        def pull(u: Tensor) -> Sequence[Tensor]:
            with this.recomputed(recorded=True):
                return _pull(graph, leaves, u)

        return pull

    def _first_that_agrees(self) -> tuple[Maps, Tensor | None]:
        """The two maps in the first way that is right, and the graph that they read, if any."""
        recorded = Recorded(self.parameters, self.outputs, self._by_autograd(), self._seen, self.precision)
        ways = {
            "program": self._by_program,
            "forward mode": self._by_forward_mode,
            "double backward": self._by_double_backward,
            "double backward, with plain attention": self._by_plain_double_backward,
            "row by row": self._by_rows,
        }
        reasons: dict[str, str] = {}
        for way, make in ways.items():
            try:
                made = make(recorded)
                if made is None:
                    continue
                if way != "program" and (difference := recorded.difference(made[0])):
                    raise RuntimeError(difference)
            except Exception as error:  # whatever an exotic operation raises, the next way may do without it
                reasons[way] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                continue
            told = [way for way, reason in reasons.items() if reason.startswith(OTHER_OUTPUTS)]
            if told and self._repeats():  # where dropout's memory is in another order, its mask is drawn in another
                reasons |= dict.fromkeys(told, "torch.func draws other random numbers there")
                told = []
            self._other_outputs = "forward mode" in told
            if reasons:
                _say_once(self.model, way, reasons)
            return made
        raise RuntimeError(
            f"{_name(self.model)} has no products J v: "
            + "; ".join(f"{way}: {reason}" for way, reason in reasons.items())
            + ". Give its autograd.Function a jvp, or a backward of differentiable operations (no once_differentiable, "
            "no_grad, NumPy); or use what needs Jᵀu alone: Fisher.diagonal(probes=1), DiagonalNGD, OnlineNGD"
        )

    def _by_program(self, recorded: Recorded) -> tuple[Maps, None] | None:
        """By a traced program, which has its own residuals; None where there is none."""
        maps = accelerate(self, recorded)
        return None if maps is None else (maps, None)

    def _by_forward_mode(self, recorded: Recorded) -> tuple[Maps, Tensor | None]:
        """J v by a forward pass that takes v along, and Jᵀu over the recorded one."""
        network, arguments, _ = self.as_function()
        primals, rest = tuple(arguments[: len(self.leaves)]), arguments[len(self.leaves) :]
        same_outputs, this = recorded.same_outputs, proxy(self)
        derivative = jvp if getattr(self.model, "traceable", True) else _by_dual_numbers

        def push(tangents: Sequence[Tensor]) -> Tensor:
            with this.as_before(), plain_attention():
                outputs, moved = cast(Any, derivative(lambda *p: network(*p, *rest), primals, tuple(tangents)))
            if not same_outputs(outputs):
                raise RuntimeError(_OTHERWISE)
            return moved

        pull = self._by_autograd()
        return Maps(push, pull, push, pull), self._graph

    def _by_double_backward(self, recorded: Recorded, graph: Tensor | None = None) -> tuple[Maps, Tensor]:
        """J v as the derivative of the linear map u ↦ Jᵀu, applied to v, and Jᵀu over the recorded forward pass."""
        recorded_first, this, leaves = graph is None, proxy(self), self.leaves
        graph = self._graph if graph is None else graph
        assert graph is not None

        def pull(u: Tensor, create_graph: bool = False) -> Sequence[Tensor]:
            with this.recomputed(recorded=recorded_first):
                return _pull(graph, leaves, u, create_graph)

        with torch.enable_grad():
            u = torch.zeros_like(graph, requires_grad=True)
            pulled = pull(u, create_graph=True)
        used = [i for i, c in enumerate(pulled) if c.requires_grad]

        def push(tangents: Sequence[Tensor]) -> Tensor:
            with this.recomputed(recorded=recorded_first):
                (moved,) = torch.autograd.grad(
                    [pulled[i] for i in used],
                    u,
                    [tangents[i] for i in used],
                    retain_graph=True,
                    materialize_grads=True,
                )
            return moved

        return Maps(push, pull, push, pull), graph

    def _by_plain_double_backward(self, recorded: Recorded) -> tuple[Maps, Tensor]:
        """The same over a forward pass in which attention is its plain formula: a fused kernel has no second backward.

        It is the same function, and only here is it worth the memory.
        """
        with plain_attention():
            graph = self.record()
        return self._by_double_backward(recorded, graph)

    def _by_rows(self, recorded: Recorded) -> tuple[Maps, None]:
        """Both maps by J itself, a backward pass for each of its rows."""
        p, shape, dtype = self.parameters, self.outputs.shape, self.outputs.dtype
        rows = self.outputs.numel()
        if rows * p.numel > _ELEMENTS:
            raise RuntimeError(f"{rows} outputs times {p.numel} parameters are too many")
        units = self.outputs.new_zeros(rows)
        J = torch.empty(rows, p.numel, dtype=torch.promote_types(p.dtype, units.dtype), device=p.device)
        by_autograd = self._by_autograd()
        for i in range(rows):
            units[i] = 1.0
            J[i] = p.flatten(by_autograd(units.view(shape)))
            units[i] = 0.0

        def push(tangents: Sequence[Tensor]) -> Tensor:
            return (J @ p.flatten(tangents).to(J.dtype)).view(shape).to(dtype)

        def pull(u: Tensor) -> Sequence[Tensor]:
            return p.unflatten(J.T @ u.reshape(-1).to(J.dtype))

        return Maps(push, pull, push, pull), None


@dataclass
class _Told:
    """What is known of a model: the ways that it was said to use, and how often its repetition was asked for."""

    ways: set[str] = field(default_factory=set)
    checks: int = 0


_told: WeakKeyDictionary[Any, _Told] = WeakKeyDictionary()
_OTHERWISE = (
    f"{OTHER_OUTPUTS}: the model has changed since it was linearised here (make a new Fisher, or Linearization), or it "
    "is not the same function each time: keep a state that moves from pass to pass in a buffer (register_buffer), and "
    "draw random numbers from PyTorch's own generator"
)
_ELEMENTS = 2**24  # of the largest J that is formed row by row


def _as_tuple(inputs: Any) -> tuple[Any, ...]:
    """The model's arguments; a named tuple, such as a packed sequence, is one of them."""
    return inputs if isinstance(inputs, tuple) and not hasattr(inputs, "_fields") else (inputs,)


def _counted(x: Any) -> Any:
    """A copy of a tensor whose changes PyTorch does not count: in NumPy's memory, or another process's, or inference's.

    An environment that writes each observation into the same array would change what was linearised.
    """
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        return x
    if x.is_inference() or not x.untyped_storage().resizable():
        return _copy(x)
    return x


def _copy(x: Tensor) -> Tensor:
    """A tensor's values in memory of their own, without its history."""
    return x.detach().clone().requires_grad_(x.requires_grad)


def _at_least_float(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or outputs.ndim < 1:
        kind = f"a {outputs.dtype} tensor" if isinstance(outputs, Tensor) else type(outputs).__name__
        remedy = "" if isinstance(outputs, Tensor) else ": wrap it in a module whose forward returns that tensor alone"
        raise TypeError(
            "model must return one floating-point tensor whose last axis holds the parameters of a distribution, "
            f"got {kind}{remedy}"
        )
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


def _pull(graph: Tensor, leaves: Sequence[Tensor], u: Tensor, create_graph: bool = False) -> Sequence[Tensor]:
    """Jᵀu over a recorded forward pass."""
    return torch.autograd.grad(
        graph, leaves, u, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def _places(model: Model) -> list[tuple[dict[str, Any], str, Any]]:
    """Where a module holds its parameters and parts: the dictionary, the name in it, and what is there now."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    plain = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]
    holders = [held for m in plain for held in (m._parameters, m._modules)]
    return [(cast(dict[str, Any], held), name, x) for held in holders for name, x in held.items()]


def _check_mode() -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError("torch.inference_mode() records no derivatives: linearise a model outside of it")


def _check_cache(model: Model) -> None:
    """Raise RuntimeError where reparametrised weights are cached: what is tried would then have the old ones."""
    cached = getattr(parametrize, "_cache_enabled", 0) and isinstance(model, nn.Module)
    if cached and any(map(parametrize.is_parametrized, cast(nn.Module, model).modules())):
        raise RuntimeError(
            f"{_name(model)} has parametrized weights, and torch.nn.utils.parametrize.cached() is active: it would "
            "give their old values after a step. Leave it before this call, or enter it in the model's forward"
        )


def _lowest(nodes: Iterable[Any], autocast: torch.dtype | None) -> torch.dtype | None:
    """The type that rounds most among those that a graph computes in; None where they are float64 alone."""
    used = {x.dtype for node in nodes for x in node._input_metadata if x.dtype.is_floating_point}
    used |= set() if autocast is None else {autocast}
    return max(used, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def _check_checkpoints(nodes: Iterable[Any], model: Model) -> None:
    """Raise ValueError where the graph hides parameters, whose derivatives would be zeros."""
    if any(type(node).__name__ == "CheckpointFunctionBackward" for node in nodes):
        raise ValueError(
            f"{_name(model)} calls torch.utils.checkpoint with use_reentrant=True, which hides the parameters inside "
            "from torch.autograd.grad: pass use_reentrant=False (gradient_checkpointing_enable("
            'gradient_checkpointing_kwargs={"use_reentrant": False}) in transformers)'
        )


def _resting(weight: Tensor, row: int) -> Tensor:
    """``weight`` with one row that has no derivative."""
    keep = torch.arange(len(weight), device=weight.device) != row
    return torch.where(keep.view(-1, 1), weight, weight.detach())


def _by_dual_numbers(function: Callable[..., Tensor], primals: Any, tangents: Any) -> tuple[Tensor, Tensor]:
    """As ``torch.func.jvp``, which wraps every operation of a rule of one's own, and a long loop has many."""
    with fwAD.dual_level():
        outputs, moved = fwAD.unpack_dual(function(*map(fwAD.make_dual, primals, tangents)))
    return outputs, torch.zeros_like(outputs) if moved is None else moved


def _name(model: Model) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", repr(model))


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def _told_of(model: Model) -> _Told:
    owner = model.__self__ if isinstance(model, MethodType) else model
    try:
        return _told.setdefault(owner, _Told())
    except TypeError:  # it cannot be hashed or weakly referenced
        return _Told()


def _say_once(model: Model, way: str, reasons: Mapping[str, str]) -> None:
    """That ``way`` is used, and why none of those before it."""
    told = _told_of(model).ways
    if way in told:
        return
    told.add(way)
    name, products = _name(model), "its Fisher-vector products use"
    if way == "forward mode":
        said = f"no traced program for {name} ({reasons['program']}); {products} plain forward mode, which is exact"
        warnings.warn(f"{said} and slower", stacklevel=6)
        return
    forward = reasons.get("program", reasons["forward mode"])
    if way == "row by row":
        means = (
            f"nor can its backward pass be differentiated ({reasons['double backward']}); {products} J, formed row by "
            "row with one backward pass for each output, which is exact and slow"
        )
    else:
        means = f"{products} double backward, which is exact and slower"
        if forward.startswith(OTHER_OUTPUTS):
            means += (
                ". Keep a state that moves from pass to pass in a buffer (register_buffer): no trial has it otherwise"
            )
    warnings.warn(f"no forward mode for {name} ({forward}); {means}", stacklevel=6)
