"""The first-order model of a network: η(θ + v) ≈ η + J v, formed once and applied as often as a solver asks.

A Fisher-vector product is Jᵀ M J v. Here are its two outer maps:

* **push forward**, v ↦ J v, in forward mode;
* **pull back**, u ↦ Jᵀu, in reverse mode.

The gradient of a step is pulled back over the recorded forward pass, by PyTorch's autograd. A solver asks for many more
products, and gets them from a straight-line `Program` of both maps, traced once per network and batch shape. No
derivative is written here by hand: the program is what PyTorch's own forward and reverse mode executed.

The recorded pull back is the truth. A program is only ever used after its outputs were seen to equal those of the
network itself on this very batch, its pull back to equal the recorded one in every parameter, and its push forward to
be the adjoint of that; a network whose control flow or constants changed is traced again. Where an operation has no
forward rule, the push forward falls back to differentiating the recorded pull back, u ↦ Jᵀu, in u (the double-backward
trick), and says so once. That too must be the adjoint: a custom ``autograd.Function`` whose backward is
``once_differentiable``, or computes without a graph, has no second derivative. Of such a network J is formed row by
row if it is small, and refused by name if not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import hypot, isfinite
from types import MethodType
from typing import Any, NamedTuple, Protocol, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from npg.parameters import Parameters
from npg.program import Maps, Program

__all__ = ["Buffers", "Linearization", "Model", "by_slot", "frozen_statistics", "replayed_randomness", "uncompiled"]


class FunctionalModel(Protocol):
    """A network as a function of its parameters: ``f(parameters, *inputs) → outputs``."""

    def __call__(self, parameters: Mapping[str, Tensor], /, *inputs: Any) -> Tensor: ...


Model = nn.Module | FunctionalModel
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class Buffers:
    """The buffers of a model, running statistics among them, as they are now."""

    def __init__(self, model: Model) -> None:
        modules = model.named_modules() if isinstance(model, nn.Module) else ()
        self._copies = [
            (module, path, name, buffer, buffer.detach().clone())
            for path, module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def named(self) -> dict[str, Tensor]:
        """Their values as they were, by name."""
        return {f"{path}.{name}" if path else name: copy for _, path, name, _, copy in self._copies}

    @torch.no_grad()
    def restore(self, keep: Tensor | None = None) -> None:
        """Put them back as they were, bit for bit; all but where ``keep``, (), is true."""
        for module, _, name, buffer, copy in self._copies:
            now = module._buffers[name]
            if keep is not None and now is not None and now.shape == copy.shape:
                copy = torch.where(keep, now, copy)
            module._buffers[name] = buffer
            buffer.data.copy_(copy)  # not counted as a change: a recorded forward pass may hold it

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Put them back if an error, or an interrupt, leaves the block."""
        try:
            yield
        except BaseException:
            self.restore()
            raise


@contextmanager
def frozen_statistics(model: Model) -> Iterator[None]:
    """Normalise with the batch's own statistics, as in training, without moving the running ones or any other buffer.

    Dropping ``track_running_stats`` is the one switch that BatchNorm looks at in training mode; InstanceNorm looks at
    none, and so has its running statistics taken away meanwhile.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    buffers = Buffers(model)
    moved = [
        m for m in modules if m.training and getattr(m, "track_running_stats", False) and hasattr(m, "running_mean")
    ]
    hidden = [(m, m.running_mean, m.running_var) for m in moved if isinstance(m, _INSTANCE_NORMS)]
    for m in moved:
        m.track_running_stats = False  # type: ignore[assignment]
    for norm, *_ in hidden:
        norm.running_mean = norm.running_var = None
    try:
        yield
    finally:
        for m in moved:
            m.track_running_stats = True  # type: ignore[assignment]
        for norm, mean, variance in hidden:
            norm.running_mean, norm.running_var = mean, variance
        buffers.restore()


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def replayed_randomness(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Draw the same random numbers (dropout masks) as the forward pass that began at ``state``; leave no trace."""
    after = _random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(after, device)


def _as_tuple(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _at_least_float(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or outputs.ndim < 1:
        kind = f"a {outputs.dtype} tensor" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TypeError(
            "model must return one floating-point tensor whose last axis holds the parameters of a distribution, "
            f"got {kind}"
        )
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


def uncompiled(model: Model) -> Model:
    """The module behind one of ``torch.compile``, through which no forward mode passes."""
    return cast(Model, getattr(model, "_orig_mod", model))


def _is_autocast(device: torch.device) -> bool:
    return torch.is_autocast_enabled(device.type)


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """For derivatives, which run in the types that the forward pass chose; autocast would choose for them again."""
    return torch.autocast(device.type, enabled=False) if _is_autocast(device) else nullcontext()


def by_slot(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``values`` once for every place in the model that holds the tensor so named.

    `functional_call` ties names by itself, but where one module is registered under two names it swaps the same place
    twice, and then puts the stand-in back for good.
    """
    held = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    return {
        f"{path}.{name}" if path else name: values[held[id(t)]]
        for path, module in model.named_modules()
        for name, t in (*module._parameters.items(), *module._buffers.items())
        if t is not None and held.get(id(t)) in values
    }


class Linearization:
    """η(θ + v) ≈ η + J v around the present parameters.

    Args:
        model: a module, or a function ``f(parameters, *inputs)`` of a mapping of parameters.
        inputs: a tensor, or a tuple of positional arguments.
        parameters: the parameters to differentiate, by name: needed for a function; for a module, all that are
            trainable by default.
        move_statistics: let this forward pass move running statistics, as one training step does.

    Attributes:
        model: the model; what is behind a compiled one.
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
        if torch.is_inference_mode_enabled():
            raise RuntimeError("torch.inference_mode() records no derivatives: linearise a model outside of it")
        model = uncompiled(model)
        self.model = model
        self._inputs = _as_tuple(inputs)
        if isinstance(model, nn.Module):
            own = dict(model.named_parameters())
            if unknown := [name for name in parameters or () if name not in own]:
                raise ValueError(f"parameters has {unknown}, which the model has not: it has {list(own)}")
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
        self._direct = direct
        device = self.parameters.device
        self.random_state = _random_state(device)
        self._autocast = torch.get_autocast_dtype(device.type) if _is_autocast(device) else None
        self._buffers = Buffers(model)
        self._values = self.parameters.copy()
        mine = set(map(id, self.parameters.tensors))
        frozen = [p for p in model.parameters() if id(p) not in mine] if isinstance(model, nn.Module) else []
        others = [x for x in (*pytree.tree_leaves(self._inputs), *frozen) if isinstance(x, Tensor)]
        self._fixed = [x for x in others if not x.is_inference()]  # which have no versions
        self._versions = self._present_versions()
        with torch.enable_grad(), nullcontext() if move_statistics else frozen_statistics(model):
            self._graph: Tensor | None = self.forward(self.leaves)
        self.outputs = self._graph.detach()
        if not self._graph.requires_grad:
            raise ValueError("the outputs of model do not depend on any trainable parameter")
        self._maps: Maps | None = None
        self._seen: tuple[Tensor, Tensor] | None = None  # (u, Jᵀu) of the first pull back, see _reference

    def forward(self, values: Sequence[Tensor] | None = None) -> Tensor:
        """η at the given values of the parameters, by default at the present ones; (…, D)."""
        values = self.parameters.tensors if values is None else values
        if self._direct and values is self.parameters.tensors:
            return _at_least_float(cast(nn.Module, self.model)(*self._inputs))
        return _at_least_float(self._call(self.parameters.named(values)))

    def record(self) -> Tensor:
        """The forward pass once more, as a graph over ``leaves``: with the same dropout, and moving nothing."""
        self._check()
        with torch.enable_grad(), self._as_before():
            return self.forward(self.leaves)

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """Repeat the forward pass inside: with the same buffers, random numbers and autocast, and moving nothing."""
        device, buffers = self.parameters.device, Buffers(self.model)
        self._buffers.restore()
        autocast = nullcontext() if self._autocast is None else torch.autocast(device.type, dtype=self._autocast)
        try:
            with (
                _without_autocast(device),
                cast(AbstractContextManager[Any], autocast),
                frozen_statistics(self.model),
                replayed_randomness(self.random_state, device),
            ):
                yield
        finally:
            buffers.restore()

    def _call(self, parameters: Mapping[str, Tensor], *inputs: Any) -> Any:
        inputs = inputs or self._inputs
        if isinstance(self.model, nn.Module):
            return functional_call(self.model, by_slot(self.model, parameters), inputs, tie_weights=False)
        return self.model(parameters, *inputs)

    def _present_versions(self) -> tuple[list[tuple[int, int]], list[int]]:
        return [(p._version, p.data_ptr()) for p in self.parameters.tensors], [x._version for x in self._fixed]

    def _check(self, *, values: bool = False) -> None:
        """Raise RuntimeError if what was linearised is no more what it was.

        A change through ``.data`` is not counted by PyTorch: to see it, the ``values`` have to be compared.
        """
        now = self._present_versions()
        if now[0] != self._versions[0] or (values and not all(map(_same, self.parameters.tensors, self._values))):
            what = "parameters"
        elif now[1] != self._versions[1]:
            what = "inputs or frozen parameters"
        else:
            return
        raise RuntimeError(
            f"the {what} have changed since they were linearised here: make a new Fisher (or Linearization) at the "
            f"present {what}"
        )

    # ------------------------------------------------------------------------------------------------ the two maps

    def pull_back(self, u: Tensor) -> Tensor:
        """Jᵀ u; (…, D) → (P,), or (K, …, D) → (P, K)."""
        p = self.parameters
        self._check(values=self._graph is not None and p.device.type == "cpu")  # elsewhere the host would wait
        u = u.to(self.outputs.dtype).contiguous()  # see `npg.program._dense`
        with _without_autocast(p.device):
            if u.ndim == self.outputs.ndim + 1:
                columns = _each(self._reverse if self._maps is None else self._maps.plain_pull, u)
                return torch.cat([c.reshape(len(u), -1).to(p.dtype) for c in columns], 1).T
            if self._maps is None:
                pulled = p.flatten(self._reverse(u))
                if self._seen is None:
                    self._seen = (u.clone(), pulled.clone())
                return pulled
            with torch.no_grad():
                return p.flatten(self._maps.pull(u))

    def _reverse(self, u: Tensor) -> Sequence[Tensor]:
        """Jᵀ u over the recorded forward pass."""
        assert self._graph is not None
        return torch.autograd.grad(
            self._graph, self.leaves, u, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    @torch.no_grad()
    def push_forward(self, v: Tensor) -> Tensor:
        """J v; (P,) → (…, D), or (P, K) → (K, …, D).

        Raises:
            RuntimeError: if the parameters have changed, or if the network's backward pass is not a linear map that
                PyTorch can differentiate.
        """
        self._check(values=self._graph is not None)
        self.parameters.check(v)
        with _without_autocast(self.parameters.device):
            if self._maps is None:
                self._maps = self._first_that_agrees()
                self._seen = None
            if v.ndim == 1:
                return self._maps.push(self.parameters.unflatten(v.contiguous()))
            push = self._maps.plain_push
            return _each(lambda column: [push(self.parameters.unflatten(column))], v.T)[0]

    # ------------------------------------------------------------------------------------ how the push forward is had

    def _first_that_agrees(self) -> Maps:
        """The two maps in the first way that is right."""
        reference = self._reference()
        ways = {
            "forward mode": self._by_program,
            "double backward": self._by_double_backward,
            "double backward, with plain attention": self._by_plain_double_backward,
            "row by row": self._by_rows,
        }
        reasons = {}
        for way, make in ways.items():
            try:
                maps = make(reference)
            except Exception as error:  # whatever an exotic operation raises, the next way may do without it
                reasons[way] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                continue
            if way != "forward mode":
                _say_once(self.model, way, reasons)
            return maps
        raise RuntimeError(
            f"{_name(self.model)} has no products J v: "
            + "; ".join(f"{way}: {reason}" for way, reason in reasons.items())
            + ". Give its autograd.Function a jvp, or a backward of differentiable operations (no once_differentiable, "
            "no_grad, NumPy); or use what needs Jᵀu alone: Fisher.diagonal(probes=1), DiagonalNGD, OnlineNGD"
        )

    def _by_program(self, reference: _Reference) -> Maps:
        """By the traced program."""
        model, device = self.model, self.parameters.device
        flat, spec = pytree.tree_flatten(self._inputs)
        buffers = self._buffers.named()
        frozen = (
            {n: p for n, p in model.named_parameters() if n not in set(self.parameters.names)}
            if isinstance(model, nn.Module)
            else {}
        )
        constants = [*buffers.values(), *frozen.values()]
        names = [*buffers, *frozen]
        is_tensor = [isinstance(x, Tensor) for x in flat]
        primals = self._values
        arguments = [
            *primals,
            *(c.detach() for c in constants),
            *(x.detach() for x in flat if isinstance(x, Tensor)),
        ]

        def first_order(*values: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
            n, c = len(primals), len(constants)
            rest = dict(zip(names, values[n : n + c]))
            tensors = iter(values[n + c : len(arguments)])
            inputs = pytree.tree_unflatten([next(tensors) if t else x for t, x in zip(is_tensor, flat)], spec)

            def network(*p: Tensor) -> Tensor:
                moving = {name: rest[name].clone() for name in buffers}  # a forward pass may write to them
                return _at_least_float(self._call({**self.parameters.named(p), **rest, **moving}, *inputs))

            def moved(*p: Tensor) -> Any:  # (η, J v): reverse mode over η takes J v along
                return jvp(network, p, values[len(arguments) : -1])

            outputs, pull, tangent = vjp(moved, *values[:n], has_aux=True)  # type: ignore[misc]  # its stub forgets aux
            with _without_autocast(device):
                return outputs, tangent, pull(values[-1])

        owner, method = (model.__self__, model.__func__) if isinstance(model, MethodType) else (model, None)
        key = (
            method,
            tuple((t.shape, t.dtype, t.device) for t in arguments),
            tuple(self.parameters.names),
            tuple(x for x, t in zip(flat, is_tensor) if not t and isinstance(x, (int, float, str, bool))),
            str(spec),
            tuple(m.training for m in model.modules()) if isinstance(model, nn.Module) else (),
            self._autocast,
            torch.backends.mkldnn.enabled,
        )
        try:
            programs = _programs.setdefault(owner, {})
        except TypeError:  # a callable that cannot be hashed or weakly referenced: nothing is kept of it
            programs = {}
        for fresh in (False, True):
            if fresh:
                with self._as_before(), _plain_attention(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tangents = [torch.zeros_like(p) for p in primals]
                    programs[key] = Program(first_order, arguments, tangents, torch.zeros_like(self.outputs))
                while len(programs) > _PROGRAMS_PER_MODEL:
                    programs.pop(next(iter(programs)))
            elif key not in programs:
                continue
            with replayed_randomness(self.random_state, device):
                outputs, maps = programs[key].linearize(arguments)
            difference = self._difference(reference, maps, outputs)
            if not difference:
                self._graph = None  # the program has its own residuals
                return maps
        raise RuntimeError(difference)

    def _by_double_backward(self, reference: _Reference) -> Maps:
        """J v as the derivative of the linear map u ↦ Jᵀu, applied to v, and Jᵀu over the recorded forward pass."""
        assert self._graph is not None
        with torch.enable_grad():
            u = torch.zeros_like(self._graph, requires_grad=True)
            pulled = torch.autograd.grad(
                self._graph, self.leaves, u, create_graph=True, allow_unused=True, materialize_grads=True
            )
        used = [i for i, c in enumerate(pulled) if c.requires_grad]

        def push(tangents: Sequence[Tensor]) -> Tensor:
            (moved,) = torch.autograd.grad(
                [pulled[i] for i in used],
                u,
                [tangents[i] for i in used],
                retain_graph=True,
                materialize_grads=True,
            )
            return moved

        maps = Maps(push, self._reverse, push, self._reverse)
        if difference := self._difference(reference, maps):
            raise RuntimeError(difference)
        return maps

    def _by_plain_double_backward(self, reference: _Reference) -> Maps:
        """The same over a forward pass in which attention is its plain formula: a fused kernel has no second backward.

        It is the same function, and only here is it worth the memory.
        """
        recorded = self._graph
        with _plain_attention():
            self._graph = self.record()
        try:
            if difference := self._other_outputs(self._graph.detach()):
                raise RuntimeError(difference)
            return self._by_double_backward(reference)
        except BaseException:
            self._graph = recorded
            raise

    def _by_rows(self, reference: _Reference) -> Maps:
        """Both maps by J itself, a backward pass for each of its rows."""
        p, shape, dtype = self.parameters, self.outputs.shape, self.outputs.dtype
        rows = self.outputs.numel()
        if rows * p.numel > _ELEMENTS:
            raise RuntimeError(f"{rows} outputs times {p.numel} parameters are too many")
        units = self.outputs.new_zeros(rows)
        J = torch.empty(rows, p.numel, dtype=torch.promote_types(p.dtype, units.dtype), device=p.device)
        for i in range(rows):
            units[i] = 1.0
            J[i] = p.flatten(self._reverse(units.view(shape)))
            units[i] = 0.0

        def push(tangents: Sequence[Tensor]) -> Tensor:
            return (J @ p.flatten(tangents).to(J.dtype)).view(shape).to(dtype)

        def pull(u: Tensor) -> Sequence[Tensor]:
            return p.unflatten(J.T @ u.reshape(-1).to(J.dtype))

        maps = Maps(push, pull, push, pull)
        if difference := self._difference(reference, maps):
            raise RuntimeError(difference)
        self._graph = None
        return maps

    # -------------------------------------------------------------------------------------------------- what is right

    def _reference(self) -> _Reference:
        """A cotangent u and Jᵀu by autograd: of the first pull back (the gradient of a step is there already)."""
        seen = self._seen
        if seen is None or not bool(((seen[0] != 0) & torch.isfinite(seen[0])).all()):
            u = _generic(self.outputs)  # zeros would leave something unchecked
            seen = u, self.parameters.flatten(self._reverse(u))
        size = seen[0].abs().amax()
        u, pulled = (x / size for x in seen)
        return _Reference(u, pulled, self._norms(pulled))

    def _norms(self, vector: Tensor) -> list[float]:
        """Of each parameter's part."""
        parts = list(vector.split(self.parameters.sizes))
        return torch.stack(torch._foreach_norm(parts, dtype=torch.float64)).tolist()

    def _other_outputs(self, outputs: Tensor) -> str:
        """In what the outputs of a second forward pass differ from η."""
        finite = torch.isfinite(self.outputs)
        if outputs.shape == self.outputs.shape and torch.equal(torch.isfinite(outputs), finite):
            mine, theirs = (torch.where(finite, x, 0.0) for x in (self.outputs, outputs))
            scale = mine.abs().amax().clamp(min=torch.finfo(outputs.dtype).tiny)
            if bool((theirs - mine).abs().amax() <= min(self._precision() ** 0.5, 0.03) * scale):
                return ""
        return "a second forward pass gives other outputs than the first"

    def _precision(self) -> float:
        """The relative rounding error ε of one operation."""
        p = self.parameters
        if self._autocast is not None:
            return torch.finfo(self._autocast).eps
        epsilon = max(torch.finfo(t.dtype).eps for t in p.tensors)
        return epsilon if p.device.type == "cpu" or p.dtype is torch.float64 else max(epsilon, 2.0**-10)  # TF32

    def _difference(self, reference: _Reference, maps: Maps, outputs: Tensor | None = None) -> str:
        """In what two maps, and the outputs of the program they are of, differ from the recorded ones.

        1. Each parameter's part of Jᵀu must be the recorded one, relative to its own size: to 10√ε, since of E
           activations rounding puts some εE on the other side of a kink, each with a share of 1/√E; or to what rounding
           does to the recorded one, as before a normalisation that takes all of it out.
        2. The push forward must be the adjoint of that, ⟨u, J v⟩ = ⟨Jᵀu, v⟩, up to rounding, which kinks have no part
           in. Each parameter has its share of the sum: v is its part of Jᵀu by its square.

        It costs one product.
        """
        if outputs is not None and (difference := self._other_outputs(outputs)):
            return difference
        p, epsilon = self.parameters, self._precision()
        u, expected, norms = reference
        if not all(map(isfinite, norms)):
            return ""  # no product will be finite, whoever computes it
        pulled = p.flatten(maps.pull(u))
        errors = self._norms(pulled - expected)
        tolerance = min(10 * epsilon**0.5, 0.03)
        wrong = [i for i, error in enumerate(errors) if not error <= tolerance * norms[i]]
        if wrong:
            jitter = _generic(u).mul_(2 * epsilon).add_(1)
            noise = self._norms(p.flatten(self._reverse(u * jitter)) - expected)
            wrong = [i for i in wrong if not errors[i] <= 8 * noise[i]]
        if wrong:
            return f"its derivative along {p.names[wrong[0]]} is not that of autograd"
        size = hypot(*norms)
        scales = [max(norm, 1e-3 * size) or 1.0 for norm in norms]
        shares = [(1 + i % 7 / 7) * size for i in range(len(norms))]  # unequal: errors must not cancel
        parts = expected.split(p.sizes)
        v = torch.cat([part / scale * (share / scale) for part, scale, share in zip(parts, scales, shares)])
        moved = maps.push(p.unflatten(v if size > 0 else _generic(v)))
        pairs = (u * moved).flatten().double(), (pulled * v).double()
        value, expected_value = (terms.sum() for terms in pairs)
        rounding = _ROUNDINGS * epsilon * (pairs[0].norm() + pairs[1].norm())
        if not bool((value - expected_value).abs() <= rounding + min(1000 * epsilon, 0.01) * expected_value.abs()):
            return "J v is not the adjoint of Jᵀu"
        return ""


_PROGRAMS_PER_MODEL = 8
_programs: WeakKeyDictionary[Any, dict[Any, Program]] = WeakKeyDictionary()
_told: WeakSet[Any] = WeakSet()
_ELEMENTS = 2**24  # of the largest J that is formed row by row
_ROUNDINGS = 6  # standard deviations, about, of the rounding errors of a sum


class _Reference(NamedTuple):
    """What autograd gives over the recorded forward pass."""

    u: Tensor  #: a cotangent with a largest entry of 1
    pulled: Tensor  #: Jᵀu
    norms: list[float]  #: of each parameter's part of it


def _name(model: Model) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", repr(model))


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def _each(function: Callable[[Tensor], Sequence[Tensor]], block: Tensor) -> Sequence[Tensor]:
    """``function`` of each row of ``block``, stacked; at once where ``torch.vmap`` knows how."""
    try:
        return torch.vmap(function)(block)
    except Exception:  # a backward in NumPy, layers of mixed types under autocast
        return [torch.stack(results) for results in zip(*map(function, block))]


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention by its plain formula: the fused kernels have no forward rule, nor a backward to differentiate."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _say_once(model: Model, way: str, reasons: Mapping[str, str]) -> None:
    owner = model.__self__ if isinstance(model, MethodType) else model
    try:
        if owner in _told:
            return
        _told.add(owner)
    except TypeError:  # it cannot be hashed or weakly referenced
        pass
    first, *others = reasons.values()
    if way == "row by row":
        means = (
            f"nor can its backward pass be differentiated ({others[0]}); its Fisher-vector products use J, formed row "
            "by row with one backward pass for each output, which is exact and slow"
        )
    else:
        means = "its Fisher-vector products use double backward, which is exact and slower"
    warnings.warn(f"no forward mode for {_name(model)} ({first}); {means}", stacklevel=6)


def _generic(like: Tensor) -> Tensor:
    """A fixed vector that is orthogonal to nothing by accident; no random number is drawn for it."""
    return torch.arange(like.numel(), device=like.device).remainder_(1009).to(like.dtype).cos_().view(like.shape)
