"""What the optimizers share: checks, an exact resume, and a model that is linearised by the optimizer itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import chain
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from npg.checks import number, one_of
from npg.curvature.online import OnlinePreconditioner
from npg.families import Family, Product
from npg.families.base import check_events, check_outputs
from npg.families.mistakes import ANY_FAMILY, family_of
from npg.fisher import Kind
from npg.model import unwrapped
from npg.parallel import equal
from npg.parameters import Parameters

__all__ = [
    "BURN_IN",
    "MISSING",
    "UPDATE_PERIOD",
    "ExactResume",
    "Held",
    "ModelOptimizer",
    "Tensors",
    "TrackedFactors",
    "check_shapes",
    "decay_matrices",
    "dense_gradients",
    "flat",
    "is_due",
    "split",
]

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]

#: Steps at the start on which online factors are always updated.
BURN_IN = 10
#: And after them on every so many.
UPDATE_PERIOD = 4


def is_due(step: int, period: int) -> bool:
    """Whether factors are updated on this step, counted from 0."""
    return step < BURN_IN or step % period == 0


MISSING: Any = object()

#: The entries of the state that have the shape of their parameter.
_SHAPED = frozenset({"momentum_buffer", "solution", "fisher", "diagonal_values"})


def _shapes(state: Mapping[str, Any], p: Tensor) -> dict[str, tuple[Any, Any]]:
    """What entries of a state tell of the shape of their parameter, and what they would for ``p``."""
    told: dict[str, tuple[Any, Any]] = {
        key: (tuple(state[key].shape), tuple(p.shape)) for key in _SHAPED.intersection(state) if state[key].numel()
    }
    axes = {key.removeprefix("weight_"): value for key, value in state.items() if key.startswith("weight_")}
    if online := {int(axis): value.shape[-1] for axis, value in axes.items() if axis.isdecimal()}:
        told["online factors"] = online, {axis: n for axis, n in enumerate(p.shape) if n > 1}
    return told


def dense_gradients(params: Iterable[Tensor]) -> None:
    """Raise ValueError if a gradient is sparse."""
    for p in params:
        if p.grad is not None and p.grad.is_sparse:
            raise ValueError(
                f"the gradient of a parameter of shape {tuple(p.shape)} is sparse; "
                "this optimizer needs dense gradients (for an embedding: sparse=False)"
            )


def decay_matrices(params: Iterable[Tensor], amount: float | Tensor) -> None:
    """Decoupled weight decay of all parameters but biases and those of normalisation."""
    matrices = [p for p in params if p.ndim > 1]
    if matrices and (isinstance(amount, Tensor) or amount):
        torch._foreach_mul_(matrices, 1 - amount)


@cache
def _options(cls: type) -> frozenset[str]:
    """The arguments of its constructor; schedulers and users put entries of other names into a parameter group."""
    return frozenset(inspect.signature(cls).parameters)


def _subclasses(cls: type) -> Iterator[type]:
    """Those of this package, of whatever depth."""
    each: type
    for each in cls.__subclasses__():
        if each.__module__.startswith("npg."):
            yield each
            yield from _subclasses(each)


def check_shapes(name: str, p: Tensor, state: Mapping[str, Any]) -> None:
    """Raise ValueError where a state is of a parameter of another shape."""
    for key, (was, now) in _shapes(state, p).items():
        if was != now:
            raise ValueError(
                f"parameter {name!r} has the shape {tuple(p.shape)} now, and its {key} the shape {was}: make a new "
                "optimizer, or clear its state"
            )


class ExactResume(Optimizer):
    """An optimizer whose state comes back from a checkpoint of the same model with the dtype it was saved with.

    `Optimizer.load_state_dict` casts state to the dtype of its parameter, which rounds the float32 state of
    half-precision parameters, and may share memory with the checkpoint.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict` of the same optimizer over parameters of the same shapes.

        Raises:
            ValueError: if it is of another optimizer, or of parameters of other shapes; nothing is loaded then.
        """
        # `torch.distributed.checkpoint` puts {} where a flattened state lacks an entry.
        kept = {i: {k: v for k, v in state.items() if v != {}} for i, state in state_dict["state"].items()}
        loaded: list[tuple[Tensor, dict[str, Any]]] = []

        # Users' hooks may change what is loaded, and what was: this one comes after theirs, and `restore` before.
        def look(_: Optimizer, hooked: dict[str, Any]) -> None:
            due = self.defaults.keys() - {"differentiable"}  # PyTorch adds that to a copy's defaults, and at a load
            if lacking := sorted({key for group in hooked["param_groups"] for key in due - group.keys()}):
                raise ValueError(
                    f"state_dict is not of {type(self).__name__}, its parameter groups lack {lacking}: load a state "
                    f"that {type(self).__name__} saved, or begin without one"
                )
            others = {name for cls in _subclasses(ExactResume) for name in _options(cast(Any, cls))}
            others -= {"params", *_options(cast(Any, type(self)))}
            if foreign := sorted({key for group in hooked["param_groups"] for key in others & group.keys()}):
                raise ValueError(
                    f"state_dict is not of {type(self).__name__}, its parameter groups have {foreign} of another "
                    f"optimizer: load a state that {type(self).__name__} saved, or begin without one"
                )
            saved = chain.from_iterable(group["params"] for group in hooked["param_groups"])
            params = chain.from_iterable(group["params"] for group in self.param_groups)
            loaded.extend((p, hooked["state"].get(i, {})) for i, p in zip(saved, params, strict=False))
            for p, state in loaded:
                for key, (saved_shape, shape) in _shapes(state, p).items():
                    if saved_shape != shape:
                        raise ValueError(
                            f"the {key} that was saved has the shape {saved_shape}, and its parameter {shape}: load "
                            "the state of an optimizer of the same model"
                        )

        def restore(_: Optimizer) -> None:
            for p, state in loaded:
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        # counts are for the host; what is added to the parameter goes by its precision now
                        at = p.device if value.is_floating_point() else "cpu"
                        dtype = torch.promote_types(p.dtype, torch.float32) if key in _SHAPED else value.dtype
                        self.state[p][key] = value.to(at, dtype, copy=True)

        hooks = [
            self.register_load_state_dict_pre_hook(look),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict({**state_dict, "state": kept})
        finally:
            for hook in hooks:
                hook.remove()


class ModelOptimizer(ExactResume):
    """An optimizer that linearises the model itself; one parameter group, all that is trainable."""

    def __new__(cls, model: Any = MISSING, family: Any = MISSING, *args: Any, **options: Any) -> Any:
        """Refuse other optimizers' arguments before Python counts them, whose error would not say what to write."""
        own = cls.__init__.__module__.startswith("npg.")  # a subclass may have another constructor
        if own and model is not MISSING:  # as it is for copy and pickle
            if not isinstance(model, nn.Module):
                raise TypeError(
                    f"{cls.__name__} needs the model itself, whose outputs it differentiates, got model of type "
                    f"{type(model).__name__}: write {cls.__name__}(model, families.Categorical(), …)"
                )
            if family is MISSING:
                raise TypeError(
                    f"{cls.__name__} needs a family after the model, which says what its outputs mean: {ANY_FAMILY}"
                )
            family_of(family)
        return super().__new__(cls)

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        defaults: dict[str, Any],
        fisher: Kind,
        process_group: dist.ProcessGroup | None,
        damping_metric: str,
        alpha: float,
    ) -> None:
        behind, process_group = unwrapped(model, process_group)
        model = cast(nn.Module, behind)
        one_of("fisher", fisher, ("exact", "sampled", "empirical"))
        number("alpha", alpha, 0)
        self.model, self.family, self.fisher, self.process_group = model, family, fisher, process_group
        self.damping_metric, self.alpha = damping_metric, alpha
        self._factors: TrackedFactors | None = None
        self._compared = process_group is None
        super().__init__(Parameters(model).tensors, defaults)

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler puts its wrapper of this object's step among the attributes: a copy would step this one's model.
        return {name: value for name, value in {**self.__dict__, "_factors": None}.items() if name != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._factors = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise ValueError for a second group: the parameters are those of the model."""
        if self.param_groups:
            raise ValueError(
                f"{type(self).__name__} has one parameter group, that of its model: put all parameters into the model"
            )
        super().add_param_group(param_group)

    def _trainable(self) -> list[Tensor]:
        """What the model trains; all of it is in the parameter group."""
        held = {id(p) for p in self.param_groups[0]["params"]}
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if new := [name for name, p in named.items() if id(p) not in held]:
            raise ValueError(
                f"{new} became trainable, or part of the model, after this {type(self).__name__} was made: "
                f"make a new {type(self).__name__}"
            )
        return list(named.values())

    def _has_batch(self, inputs: Any, targets: Any, closure: Any) -> bool:
        """Whether there is a mini-batch to take a step on; False where the state is to be made, and nothing else.

        `torch.distributed.checkpoint` calls ``step(closure=None)`` for that.
        """
        if inputs is MISSING and targets is MISSING and closure is None:
            self._make_state(self._trainable())
            return False
        if inputs is MISSING or targets is MISSING or closure not in (None, MISSING):
            raise TypeError(
                f"{type(self).__name__} differentiates the model itself, without loss.backward() or a closure: "
                "call step(inputs, targets)"
            )
        if strange := sorted(_options(cast(Any, type(self))) & (self.param_groups[0].keys() - self.defaults.keys())):
            name = strange[0]
            raise ValueError(
                f"{name} is no part of the parameter group, where it would change nothing: "
                + (f"set optimizer.{name}" if name == "max_kl" else f"give it to a new {type(self).__name__}")
            )
        # of a families.Product they are a tuple, with those of each part
        for part in (pytree.tree_leaves(targets) if isinstance(self.family, Product) else None) or [targets]:
            if not isinstance(part, Tensor) or part.ndim == 0:
                kind = "a tensor without axes" if isinstance(part, Tensor) else type(part).__name__
                raise ValueError(f"targets must be a tensor whose leading axis is that of the mini-batch, got {kind}")
        if not self._compared:  # once: equal steps keep equal parameters equal
            if not equal(self.param_groups[0]["params"], self.process_group):
                raise ValueError(
                    "the parameters of model are not the same in all processes of process_group, or not finite: make "
                    "or load the same model in each, or let DistributedDataParallel(model) send the first one to all"
                )
            self._compared = True
        return True

    def _make_state(self, params: list[Tensor]) -> None:
        """Make every entry of the state that steps would make, with what it has before the first of them."""
        raise NotImplementedError

    def _log_likelihood(self, outputs: Tensor, targets: Any) -> Tensor:
        """Log p(targets | outputs) of each event."""
        check_outputs(outputs)
        if outputs.device.type == "cpu" and outputs.numel():
            self.family.check_targets(outputs, targets)
        return check_events(self.family.log_likelihood(outputs, targets), outputs, targets)

    def _steps(self, params: Iterable[Tensor]) -> int:
        """The number of steps that were taken: the largest, where some of the parameters were frozen for a while."""
        return max(int(self.state[p].get("step", 0)) for p in params if p in self.state) if self.state else 0

    def _count_to(self, steps: int, params: Iterable[Tensor]) -> None:
        count = torch.tensor(steps, device="cpu")
        for p in params:
            self.state[p]["step"] = count

    def _online_factors(self) -> TrackedFactors | None:
        """The factors of the metric C; None if the damping does not use it."""
        if self.damping_metric != "online":
            return None
        params = self._trainable()
        if self._factors is None or not self._factors.cover(params, self.state):
            self._factors = TrackedFactors(params, self.state, self.alpha)
        return self._factors

    def _states(self, key: str, params: Iterable[Tensor]) -> list[Tensor]:
        """One state tensor of each parameter, zero at first, of its dtype and at least float32."""
        for p in params:
            dtype = torch.promote_types(p.dtype, torch.float32)
            if key not in self.state[p]:
                self.state[p][key] = torch.zeros_like(p, dtype=dtype)
            elif self.state[p][key].dtype is not dtype:  # the model was converted since
                self.state[p][key] = self.state[p][key].to(dtype)
        return [self.state[p][key] for p in params]


class Held:
    """Whether a state is still what it was: users clear it, replace entries, or convert the model in place.

    Args:
        params: whose entries.
        states: of all parameters.
        passing: entries that are replaced anyway.
    """

    def __init__(
        self, params: Iterable[Tensor], states: Mapping[Tensor, dict[str, Any]], passing: Iterable[str] = ()
    ) -> None:
        self._entries = [
            (p, p.shape, p.dtype, p.device, {key: states[p][key] for key in states[p].keys() - {*passing}})
            for p in params
        ]

    def by(self, states: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether ``states`` has every entry, as the same object, of parameters of the same shape, dtype and device."""
        return all(
            (state := states.get(p)) is not None
            and (p.shape, p.dtype, p.device) == (shape, dtype, device)
            and all(state.get(key) is value for key, value in entries.items())
            for p, shape, dtype, device, entries in self._entries
        )


class TrackedFactors:
    """`OnlineNGD`'s factors of the gradients of a model, with its defaults; the optimizer's state is views of them.

    Gradients are the same on all processes, and so are the factors.
    """

    def __init__(self, params: list[Tensor], states: Mapping[Tensor, dict[str, Any]], alpha: float) -> None:
        self.params = [p for p in params if p.numel() > 0]
        self.preconditioner = OnlinePreconditioner(self.params, [states[p] for p in self.params], alpha=alpha)
        self._held = Held(self.params, states, passing=["step"])

    def cover(self, params: list[Tensor], states: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether these are the parameters, empty ones aside, and the state is still that of the factors."""
        return {*self.params} == {p for p in params if p.numel() > 0} and self._held.by(states)

    def update(self, gradient: Tensor, step: int) -> None:
        """Take in the gradient of a step, (P,), where it is due; steps are counted from 0."""
        if is_due(step, UPDATE_PERIOD):
            self.preconditioner(split(gradient, self.params), update=True, first=step == 0)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors → one vector, (P,)."""
    return torch.cat([t.flatten() for t in tensors])


def split(vector: Tensor, like: Tensors) -> list[Tensor]:
    """(P,) → views shaped like the tensors."""
    parts = vector.split([t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]
