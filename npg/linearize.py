"""The first-order model of a network: η(θ + v) ≈ η + J v, formed once and applied as often as a solver asks.

A Fisher-vector product is Jᵀ M J v. Here are its two outer maps:

* **push forward**, v ↦ J v, in forward mode;
* **pull back**, u ↦ Jᵀu, in reverse mode.

The gradient of a step is pulled back over the recorded forward pass, by PyTorch's autograd. A solver asks for many more
products, and gets them from a straight-line `Program` of both maps, traced once per network and batch shape. No
derivative is written here by hand: the program is what PyTorch's own forward and reverse mode executed.

A program is only ever used after its outputs were seen to equal those of the network itself on this very batch, and
its maps to be each other's adjoints and to give the recorded gradient; a network whose control flow or constants
changed is traced again. Where an operation has no forward rule, the push forward falls back to differentiating the
recorded pull back, u ↦ Jᵀu, in u (the double-backward trick), and says so once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

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
        modules = model.modules() if isinstance(model, nn.Module) else ()
        self._copies = [
            (module, name, buffer, buffer.detach().clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def restore(self, keep: Tensor | None = None) -> None:
        """Put them back as they were, bit for bit; all but where ``keep``, (), is true."""
        for module, name, buffer, copy in self._copies:
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
        self.random_state = _random_state(self.parameters.device)
        self._versions = self._present_versions()
        with torch.enable_grad(), nullcontext() if move_statistics else frozen_statistics(model):
            self._graph: Tensor | None = self.forward(self.leaves)
        self.outputs = self._graph.detach()
        if not self._graph.requires_grad:
            raise ValueError("the outputs of model do not depend on any trainable parameter")
        self._maps: Maps | None = None
        self._seen: tuple[Tensor, Tensor] | None = None  # (u, ⟨Jᵀu, v⟩) of the first pull back, see _difference

    def forward(self, values: Sequence[Tensor] | None = None) -> Tensor:
        """η at the given values of the parameters, by default at the present ones; (…, D)."""
        values = self.parameters.tensors if values is None else values
        if self._direct and values is self.parameters.tensors:
            return _at_least_float(cast(nn.Module, self.model)(*self._inputs))
        return _at_least_float(self._call(self.parameters.named(values)))

    def record(self) -> Tensor:
        """The forward pass once more, as a graph over ``leaves``: with the same dropout, and moving nothing."""
        self._check()
        with (
            torch.enable_grad(),
            frozen_statistics(self.model),
            replayed_randomness(self.random_state, self.parameters.device),
        ):
            return self.forward(self.leaves)

    def _call(self, parameters: Mapping[str, Tensor], *inputs: Any) -> Any:
        inputs = inputs or self._inputs
        if isinstance(self.model, nn.Module):
            return functional_call(self.model, by_slot(self.model, parameters), inputs, tie_weights=False)
        return self.model(parameters, *inputs)

    def _present_versions(self) -> list[tuple[int, int]]:
        return [(p._version, p.data_ptr()) for p in self.parameters.tensors]

    def _check(self) -> None:
        if self._versions != self._present_versions():
            raise RuntimeError(
                "the parameters have changed since they were linearised here: make a new Fisher (or Linearization) "
                "at the present parameters"
            )

    # ------------------------------------------------------------------------------------------------ the two maps

    def pull_back(self, u: Tensor) -> Tensor:
        """Jᵀ u; (…, D) → (P,), or (K, …, D) → (P, K)."""
        self._check()
        u = u.to(self.outputs.dtype).contiguous()  # see `npg.program._dense`
        if u.ndim == self.outputs.ndim + 1:
            columns = torch.vmap(self._reverse if self._maps is None else self._maps.plain_pull)(u)
            return torch.cat([c.reshape(len(u), -1).to(self.parameters.dtype) for c in columns], 1).T
        if self._maps is None:
            pulled = self.parameters.flatten(self._reverse(u))
            if self._seen is None:
                self._seen = (u, torch.dot(pulled, _generic(pulled)))
            return pulled
        with torch.no_grad():
            return self.parameters.flatten(self._maps.pull(u))

    def _reverse(self, u: Tensor) -> Sequence[Tensor]:
        """Jᵀ u over the recorded forward pass."""
        assert self._graph is not None
        return torch.autograd.grad(
            self._graph, self.leaves, u, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    @torch.no_grad()
    def push_forward(self, v: Tensor) -> Tensor:
        """J v; (P,) → (…, D), or (P, K) → (K, …, D)."""
        self._check()
        self.parameters.check(v)
        if self._maps is None:
            self._maps = self._trace() or self._double_backward()
        if v.ndim == 1:
            return self._maps.push(self.parameters.unflatten(v.contiguous()))
        push = self._maps.plain_push
        return torch.vmap(lambda column: push(self.parameters.unflatten(column)))(v.T)

    # ------------------------------------------------------------------------------------ how the push forward is had

    def _trace(self) -> Maps | None:
        """The two maps by the traced program; None if this network has none."""
        flat, spec = pytree.tree_flatten(self._inputs)
        with frozen_statistics(self.model):
            buffers = dict(self.model.named_buffers()) if isinstance(self.model, nn.Module) else {}
        frozen = (
            {n: p for n, p in self.model.named_parameters() if n not in set(self.parameters.names)}
            if isinstance(self.model, nn.Module)
            else {}
        )
        constants = [*buffers.values(), *frozen.values()]
        names = [*buffers, *frozen]
        is_tensor = [isinstance(x, Tensor) for x in flat]
        primals = [p.detach() for p in self.leaves]
        arguments = [
            *primals,
            *(c.detach() for c in constants),
            *(x.detach() for x in flat if isinstance(x, Tensor)),
        ]

        def first_order(*values: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
            n, c = len(primals), len(constants)
            fixed = dict(zip(names, values[n : n + c]))
            tensors = iter(values[n + c : len(arguments)])
            inputs = pytree.tree_unflatten([next(tensors) if t else x for t, x in zip(is_tensor, flat)], spec)

            def moved(*p: Tensor) -> Any:  # (η, J v): reverse mode over η takes J v along
                return jvp(
                    lambda *p: _at_least_float(self._call({**self.parameters.named(p), **fixed}, *inputs)),
                    p,
                    values[len(arguments) : -1],
                )

            outputs, pull, tangent = vjp(moved, *values[:n], has_aux=True)  # type: ignore[misc]  # its stub forgets aux
            return outputs, tangent, pull(values[-1])

        key = (
            tuple((t.shape, t.dtype, t.device) for t in arguments),
            tuple(self.parameters.names),
            tuple(x for x, t in zip(flat, is_tensor) if not t and isinstance(x, (int, float, str, bool))),
            str(spec),
            tuple(m.training for m in self.model.modules()) if isinstance(self.model, nn.Module) else (),
            torch.is_autocast_enabled(self.parameters.device.type)
            and torch.get_autocast_dtype(self.parameters.device.type),
            torch.backends.mkldnn.enabled,
        )
        try:
            programs = _programs.setdefault(self.model, {})
        except TypeError:  # a callable that cannot be hashed or weakly referenced: nothing is kept of it
            programs = {}
        for fresh in (False, True):
            if fresh or key not in programs:
                try:
                    with self._tracing():
                        tangents = [torch.zeros_like(p) for p in primals]
                        programs[key] = Program(first_order, arguments, tangents, torch.zeros_like(self.outputs))
                except Exception as error:  # whatever an exotic operation raises, the other mode is exact too
                    _say_once(self.model, error)
                    return None
                while len(programs) > _PROGRAMS_PER_MODEL:
                    programs.pop(next(iter(programs)))
                fresh = True
            with replayed_randomness(self.random_state, self.parameters.device):
                outputs, maps = programs[key].linearize(arguments)
            difference = self._difference(outputs, maps)
            if not difference:
                self._graph = None  # the program has its own residuals
                return maps
            if fresh:
                break
        _say_once(self.model, RuntimeError(difference))
        return None

    def _difference(self, outputs: Tensor, maps: Maps) -> str:
        """In what a program differs from η and the recorded pull back, ⟨u, J v⟩ = ⟨Jᵀu, v⟩, for both of its maps.

        The second notices what leaves the outputs as they are, such as a ``detach`` that came or went. v is generic,
        and u the first that was pulled back (the gradient of a step is there already), so it costs one product.
        """
        p = self.parameters
        plain = not torch.is_autocast_enabled(p.device.type) and (p.device.type == "cpu" or p.dtype is torch.float64)
        epsilon = max(torch.finfo(t.dtype).eps for t in p.tensors)
        tolerance = epsilon**0.5 if plain else 1e-2  # TF32 and autocast round in their own way from kernel to kernel
        other_outputs = "a second forward pass gives other outputs than the first"
        if outputs.shape != self.outputs.shape:
            return other_outputs
        scale = self.outputs.abs().amax().clamp(min=torch.finfo(outputs.dtype).tiny)
        if bool((outputs - self.outputs).abs().amax() > tolerance * scale):
            return other_outputs
        if self._seen is None or bool((self._seen[0] == 0).any()):  # zeros would leave something unchecked
            self._seen = None
            self.pull_back(_generic(self.outputs))
        assert self._seen is not None
        u, expected = self._seen
        v = _generic(torch.empty(p.numel, dtype=p.dtype, device=p.device))
        moved, pulled = maps.push(p.unflatten(v)), p.flatten(maps.pull(u))
        errors = torch.stack([(u * moved).sum() - expected, torch.dot(pulled, v) - expected]).abs()
        agree = not bool((errors > tolerance * u.norm() * moved.norm()).any())
        return "" if agree else "its traced derivatives are not those of autograd"

    @contextmanager
    def _tracing(self) -> Iterator[None]:
        fastpath = torch.backends.mha.get_fastpath_enabled()
        # The fused attention kernels have no forward rule; the plain formula, which is the same function, has.
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with (
                sdpa_kernel(SDPBackend.MATH),
                frozen_statistics(self.model),
                replayed_randomness(self.random_state, self.parameters.device),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)

    def _double_backward(self) -> Maps:
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

        return Maps(push, self._reverse, push, self._reverse)


_PROGRAMS_PER_MODEL = 8
_programs: WeakKeyDictionary[Any, dict[Any, Program]] = WeakKeyDictionary()
_told: set[str] = set()


def _say_once(model: Model, error: Exception) -> None:
    name = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", repr(model))
    if name not in _told:
        _told.add(name)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"no forward mode for {name} ({reason}); its Fisher-vector products use double backward, "
            "which is exact and slower",
            stacklevel=6,
        )


def _generic(like: Tensor) -> Tensor:
    """A fixed vector that is orthogonal to nothing by accident; no random number is drawn for it."""
    return torch.arange(like.numel(), device=like.device).remainder_(1009).to(like.dtype).cos_().view(like.shape)
