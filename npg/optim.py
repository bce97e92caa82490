"""Natural-gradient optimizers: `torch.optim.Optimizer` faces over the core and over `npg.curvature`.

`OnlineNGD` takes gradients from ``p.grad`` like any optimizer. `NGD` and `DiagonalNGD` need the model and what its
outputs mean, because the Fisher information is a property of the predictive distribution: ``step(inputs, targets)``.
"""

from __future__ import annotations

import copy
import warnings
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from functools import partial
from itertools import chain
from math import ceil, inf, nan
from typing import Any, Literal, TypeAlias, cast, overload

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.utils import _pytree as pytree

from npg.curvature.kronecker import Block, KroneckerFisher, Multiple
from npg.curvature.online import OnlinePreconditioner
from npg.families import Family, Geometry
from npg.fisher import Fisher, Kind
from npg.linearize import Buffers, Linearization, uncompiled
from npg.parallel import mean_
from npg.parameters import Parameters, check_dtypes
from npg.solvers import Solution, Solver, conjugate_gradient, dense_solve, solve_in_metric
from npg.step import StepReport, natural_step
from npg.transport import geometry
from npg.trust_region import LevenbergMarquardt, TrustRegion

__all__ = ["NGD", "DiagonalNGD", "OnlineNGD"]

_Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]

#: Steps at the start on which online factors are always updated.
BURN_IN = 10
#: And after them on every so many.
UPDATE_PERIOD = 4


def _is_due(step: int, period: int) -> bool:
    """Whether factors are updated on this step, counted from 0."""
    return step < BURN_IN or step % period == 0


_MISSING: Any = object()


def _check(ok: bool, name: str, value: object, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} is not usable: it must be {wanted}")


def _dense_gradients(params: Iterable[Tensor]) -> None:
    for p in params:
        if p.grad is not None and p.grad.is_sparse:
            raise ValueError(
                f"the gradient of a parameter of shape {tuple(p.shape)} is sparse; "
                "this optimizer needs dense gradients (for an embedding: sparse=False)"
            )


def _decay(params: Iterable[Tensor], amount: float | Tensor) -> None:
    """Decoupled weight decay of all parameters but biases and those of normalisation."""
    matrices = [p for p in params if p.ndim > 1]
    if matrices and (isinstance(amount, Tensor) or amount):
        torch._foreach_mul_(matrices, 1 - amount)


class _ExactResume(Optimizer):
    """An optimizer whose state comes back from a checkpoint with the dtype it was saved with.

    `Optimizer.load_state_dict` casts state to the dtype of its parameter, which rounds the float32 state of
    half-precision parameters, and may share memory with the checkpoint.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict` of the same optimizer over parameters of the same shapes."""
        # `torch.distributed.checkpoint` puts {} where a flattened state lacks an entry.
        kept = {i: {k: v for k, v in state.items() if v != {}} for i, state in state_dict["state"].items()}
        state_dict = {**state_dict, "state": kept}
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for i, p in zip(saved, params, strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    # counts are for the host
                    self.state[p][key] = value.to(p.device if value.is_floating_point() else "cpu", copy=True)


class OnlineNGD(_ExactResume):
    r"""Kaldi's online low-rank natural gradient, applied to every axis of every parameter in turn.

    For each axis of dimension D > 1 the gradient is read as N rows of length D and multiplied by the inverse of
    G = F + (α/D) tr(F) I, where F = Rᵀ D R + ρ I tracks the rows' second moment; the result is rescaled to the norm
    of the gradient (`npg.curvature.online` has the formulas). With the preconditioned gradient ĝ,

        m ← μ m + ĝ,    θ ← (1 − lr · weight_decay) θ − lr · m.

    The state depends on the gradients alone: under DistributedDataParallel, which averages them, it is the same on
    all ranks without any communication of its own. A constant that scales all gradients scales ĝ and nothing else; a
    power of two changes no digit, as long as ĝ and m are neither infinite nor subnormal.

    A step by which m or θ would not be finite, as with a gradient that is not, is refused: everything stays as it was,
    and a warning says so. On CUDA the host does not wait for that: it learns of it, and warns, at the next step.

    Args:
        params: parameters, or dicts that define parameter groups; every option below can be set for each group.
        lr: step size.
        momentum: μ, in [0, 1).
        weight_decay: decoupled by default: θ shrinks by the factor 1 − lr · weight_decay per step, if it has two axes
            or more (biases and normalisation parameters are left alone).
        decoupled_weight_decay: with False, weight_decay · θ is added to the gradient of every parameter before it is
            preconditioned: L2 regularisation, as in ``torch.optim.SGD`` and in the report.
        alpha: smoothing of F towards a multiple of the identity; larger is closer to SGD.
        rank: largest rank of F; an axis of dimension D gets min((D + 1) // 2, rank). 0 turns preconditioning off.
        update_period: F is updated on each of the first 10 steps and on every ``update_period``-th step after them.
        eta: weight of the new gradient in F, in (0, 0.9]. A history of h updates is eta = 1 / h.
        max_change: largest ‖lr · m‖ over a parameter group; a longer step is shortened to it. None: no limit.

    Raises:
        ValueError: if an option is out of its range, a parameter is not a dense real floating-point tensor or a
            gradient is sparse; no parameter has changed then.

    Source: Povey, Zhang and Khudanpur (2015), arXiv 1410.7455.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = True,
        alpha: float = 4.0,
        rank: int = 80,
        update_period: int = UPDATE_PERIOD,
        eta: float = 0.1,
        max_change: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "alpha": alpha,
            "rank": rank,
            "update_period": update_period,
            "eta": eta,
            "max_change": max_change,
        }
        self._plans: dict[int, list[_OnlinePlan]] = {}
        self._untold: _Outcome | None = None
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; options that it does not set have the values given to the constructor."""
        super().add_param_group(param_group)
        try:
            self._validate(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise

    @staticmethod
    def _validate(group: dict[str, Any]) -> None:
        _check(0 <= group["lr"] < inf, "lr", group["lr"], "a finite number, 0 or above")
        _check(0 <= group["momentum"] < 1, "momentum", group["momentum"], "in [0, 1)")
        decay, alpha = group["weight_decay"], group["alpha"]
        _check(0 <= decay < inf, "weight_decay", decay, "a finite number, 0 or above")
        _check(0 <= alpha < inf, "alpha", alpha, "a finite number, 0 or above (4 is usual)")
        rank, period, limit = group["rank"], group["update_period"], group["max_change"]
        _check(isinstance(rank, int) and rank >= 0, "rank", rank, "an integer, 0 or above")
        _check(isinstance(period, int) and period >= 1, "update_period", period, "an integer, 1 or above")
        _check(0 < group["eta"] <= 0.9, "eta", group["eta"], "above 0 and at most 0.9")
        _check(limit is None or 0 < limit < inf, "max_change", limit, "None or a finite number above 0")
        names = group.get("param_names", range(len(group["params"])))
        check_dtypes({str(name): p for name, p in zip(names, group["params"], strict=True)})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans, self._untold = {}, None

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return super().__getstate__()

    def state_dict(self) -> dict[str, Any]:
        """The state as of the last step, which the host waits for."""
        self._settle()
        return super().state_dict()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with the gradients in `p.grad`; a parameter without a gradient stays as it is."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _dense_gradients(p for group in self.param_groups for p in group["params"])
        self._settle()
        parts = [_GroupStep(group, self._active(i, group)) for i, group in enumerate(self.param_groups)]
        if plans := [plan for part in parts for plan in part.plans]:
            finite = torch.stack([part.propose().to(plans[0].device) for part in parts if part.plans]).all()
            for part in parts:
                part.take(finite)
            self._untold = _Outcome(finite, plans)
            if finite.device.type == "cpu":
                self._settle()
        return loss

    def _settle(self) -> None:
        """Take back the counts of the last step if it was refused."""
        outcome, self._untold = self._untold, None
        if outcome is not None and not outcome.taken():
            for plan in outcome.plans:
                plan.count_to(plan.count - 1)
            warnings.warn(
                "OnlineNGD refused a step: a gradient, or what the step would make of momentum or parameters, is not "
                "finite. All is as it was before the step; if this goes on, lower lr",
                RuntimeWarning,
                stacklevel=4,
            )

    def _active(self, index: int, group: dict[str, Any]) -> list[_OnlinePlan]:
        """The plans of a group's parameters that have a gradient."""
        active = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
        if not active:
            return []
        plans = self._plans.get(index, [])
        options = {name: group[name] for name in ("alpha", "rank", "eta")}
        if any(plan.options["rank"] != options["rank"] for plan in plans):
            raise ValueError(f"rank must stay {plans[0].options['rank']}, that of the factors; got {options['rank']}")
        if {p for plan in plans for p in plan.params} != set(active) or plans[0].options != options:
            plans = self._plans[index] = self._plan(active, options)
        return plans

    def _plan(self, params: list[Tensor], options: dict[str, Any]) -> list[_OnlinePlan]:
        """One plan for each number of steps that parameters have behind them: one, unless some were skipped."""
        runs: dict[int, list[Tensor]] = {}
        for p in params:
            runs.setdefault(int(self.state[p].get("step", 0)), []).append(p)
        return [_OnlinePlan(run, [self.state[p] for p in run], step, options) for step, run in runs.items()]


class _Outcome:
    """Whether a step was taken: known on its device, and on its way to the host."""

    def __init__(self, finite: Tensor, plans: list[_OnlinePlan]) -> None:
        self.plans, self._finite, self._event = plans, finite, None
        if finite.is_cuda:
            self._finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            self._event = torch.cuda.current_stream(finite.device).record_event()

    def taken(self) -> bool:
        """Wait for the step, but for nothing that was queued after it."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._finite)


class _GroupStep:
    """A step of one parameter group: worked out first, and taken where that of every group is finite."""

    def __init__(self, group: dict[str, Any], plans: list[_OnlinePlan]) -> None:
        self.plans = plans
        self._momentum, self._period, self._limit = group["momentum"], group["update_period"], group["max_change"]
        self._lr: float | Tensor = group["lr"]  # what the momentum is multiplied by, once it is known
        decoupled = group["decoupled_weight_decay"]
        self._l2 = 0.0 if decoupled else group["weight_decay"]
        self._decay = group["lr"] * group["weight_decay"] if decoupled else 0.0

    def propose(self) -> Tensor:
        """Work out the new momenta; whether those and the new parameters will be finite, ()."""
        for plan in self.plans:
            gradients: _Tensors = [p.grad for p in plan.params if p.grad is not None]
            if self._l2:
                gradients = torch._foreach_add(gradients, plan.params, alpha=self._l2)
            plan.propose(gradients, self._momentum, self._period)
        if self._limit is not None:
            device = self.plans[0].device
            norms = [torch.linalg.vector_norm(m, dtype=torch.float64) for plan in self.plans for m in plan.proposed]
            norm = self._lr * torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]))
            self._lr = self._lr * self._limit / norm.clamp_min(self._limit)
        return torch.stack([plan.is_finite(self._lr, self._decay) for plan in self.plans]).all()

    def take(self, finite: Tensor) -> None:
        """Move momenta, factors and parameters, where ``finite``, ()."""
        for plan in self.plans:
            plan.take(finite, self._lr, self._decay)


class _OnlinePlan:
    """The stacked state of the parameters that step together; their optimizer state is views of it."""

    def __init__(
        self, params: list[Tensor], states: list[dict[str, Tensor]], step: int, options: dict[str, Any]
    ) -> None:
        self.params, self.options = params, options
        self.count, self.step = step, torch.tensor(step, device="cpu")
        self.preconditioner = OnlinePreconditioner(params, states, **options)
        self.momenta: list[Tensor] = []
        self.proposed: list[Tensor] = []
        self._factors = [tensor for factors in self.preconditioner.factors.values() for tensor in factors]
        self._former: list[Tensor] = []
        for block in self.preconditioner.blocks:
            first = params[block.indices[0]]
            stacked = torch.zeros(len(block.indices), *first.shape, dtype=block.dtype, device=first.device)
            self.momenta.append(stacked)
            for i, view in zip(block.indices, stacked.unbind(), strict=True):
                if "momentum_buffer" in states[i]:
                    view.copy_(states[i]["momentum_buffer"])
                states[i]["momentum_buffer"] = view
        for state in states:
            state["step"] = self.step
        self.device = self.momenta[0].device
        self._stacked = [params[i] for block in self.preconditioner.blocks for i in block.indices]
        self._shrinks = torch.tensor([p.ndim > 1 for p in self._stacked], device=self.device)
        largest = [torch.finfo(p.dtype).max for p in self._stacked]
        self._largest = torch.tensor(largest, dtype=torch.float64, device=self.device)

    def propose(self, gradients: Sequence[Tensor], momentum: float, update_period: int) -> None:
        """Precondition the gradients, and work out the momenta with them; the factors move, and can be put back."""
        update = _is_due(self.count, update_period)
        self._former = [tensor.clone() for tensor in self._factors] if update else []
        self.proposed = self.preconditioner(gradients, update=update, first=self.count == 0)
        if momentum:
            for new, old in zip(self.proposed, self.momenta, strict=True):
                new.add_(old, alpha=momentum)

    def is_finite(self, lr: float | Tensor, decay: float) -> Tensor:
        """Whether the proposed momenta, and the parameters after a step along them, are finite, ()."""
        changes = [torch.linalg.vector_norm(m.reshape(len(m), -1), inf, 1) for m in self.proposed]
        change = torch.cat([c.to(self.device, torch.float64) for c in changes])
        sizes = torch._foreach_norm(self._stacked, inf)
        size = torch.stack([n.to(self.device, torch.float64) for n in sizes])
        # A parameter that is not finite before the step is none of its making.
        size = torch.where(torch.isfinite(size), size, 0.0)
        size = size * torch.where(self._shrinks, abs(1 - decay), 1.0) + lr * change
        return (torch.isfinite(change) & (size <= self._largest)).all()

    def take(self, finite: Tensor, lr: float | Tensor, decay: float) -> None:
        """Count the step, and move momenta, factors and parameters, where ``finite``, ()."""
        where = {device: finite.to(device) for device in {m.device for m in self.momenta}}
        changes: list[Tensor] = []
        for old, new in zip(self.momenta, self.proposed, strict=True):
            ok = where[old.device]
            old.copy_(torch.where(ok, new, old))
            changes += torch.where(ok, new.mul_(lr), 0.0).unbind()
        for tensor, former in zip(self._factors, self._former):
            tensor.copy_(torch.where(where[tensor.device], tensor, former))
        if decay:
            for device, ok in where.items():
                _decay((p for p in self._stacked if p.device == device), decay * ok.double())
        torch._foreach_sub_(self._stacked, changes)
        self.proposed, self._former = [], []
        self.count_to(self.count + 1)

    def count_to(self, count: int) -> None:
        """Set the number of steps."""
        self.count = count
        self.step.fill_(count)


class _ModelOptimizer(_ExactResume):
    """An optimizer that linearises the model itself; one parameter group, all that is trainable."""

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
        if isinstance(model, DistributedDataParallel):
            # Forward mode cannot pass through the wrapper; the reduction is done here, once per product.
            process_group = process_group or model.process_group
            model = model.module
        model = cast(nn.Module, uncompiled(model))
        _check(fisher in ("exact", "sampled", "empirical"), "fisher", fisher, "'exact', 'sampled' or 'empirical'")
        _check(0 <= alpha < inf, "alpha", alpha, "a finite number, 0 or above (4 is usual)")
        self.model, self.family, self.fisher, self.process_group = model, family, fisher, process_group
        self.damping_metric, self.alpha = damping_metric, alpha
        self._factors: _TrackedFactors | None = None
        super().__init__(Parameters(model).tensors, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_factors": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._factors = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise ValueError for a second group: the parameters are those of the model."""
        if self.param_groups:
            raise ValueError(
                f"{type(self).__name__} has one parameter group, that of its model: put all into the model"
            )
        super().add_param_group(param_group)

    def _trainable(self) -> list[Tensor]:
        """What the model trains; all of it is in the parameter group."""
        held = {id(p) for p in self.param_groups[0]["params"]}
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if new := [name for name, p in named.items() if id(p) not in held]:
            raise ValueError(
                f"{new} became trainable, or part of the model, after this {type(self).__name__} was made: make it anew"
            )
        return list(named.values())

    def _has_batch(self, inputs: Any, targets: Any, closure: Any) -> bool:
        """Whether there is a mini-batch to take a step on; False where the state is to be made, and nothing else.

        `torch.distributed.checkpoint` calls ``step(closure=None)`` for that.
        """
        if inputs is _MISSING and targets is _MISSING and closure is None:
            self._make_state(self._trainable())
            return False
        if inputs is _MISSING or targets is _MISSING or closure not in (None, _MISSING):
            raise TypeError(
                f"{type(self).__name__} differentiates the model itself, without loss.backward() or a closure: "
                "call step(inputs, targets)"
            )
        if not isinstance(targets, Tensor) or targets.ndim == 0:
            kind = "a tensor without axes" if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(f"targets must be a tensor whose leading axis is that of the mini-batch, got {kind}")
        return True

    def _make_state(self, params: list[Tensor]) -> None:
        """Make every entry of the state that steps would make, with what it has before the first of them."""
        raise NotImplementedError

    def _log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Log p(targets | outputs) of each event."""
        if outputs.ndim == 1:
            raise ValueError(
                f"the model returns outputs of shape {tuple(outputs.shape)}: that is one event of {len(outputs)} "
                "components, and a mini-batch has its events on the leading axis. Return "
                f"({len(outputs)}, 1) for {len(outputs)} events, without squeeze(-1); (1, {len(outputs)}) for one"
            )
        return self.family.log_likelihood(outputs, targets)

    def _steps(self, params: Iterable[Tensor]) -> int:
        """The number of steps that were taken: the largest, where some of the parameters were frozen for a while."""
        return max(int(self.state[p].get("step", 0)) for p in params if p in self.state) if self.state else 0

    def _count_to(self, steps: int, params: Iterable[Tensor]) -> None:
        count = torch.tensor(steps)
        for p in params:
            self.state[p]["step"] = count

    def _online_factors(self) -> _TrackedFactors | None:
        """The factors of the metric C; None if the damping does not use it."""
        if self.damping_metric != "online":
            return None
        params = self._trainable()
        if self._factors is None or not self._factors.cover(params):
            self._factors = _TrackedFactors(params, self.state, self.alpha)
        return self._factors

    def _states(self, key: str, params: Iterable[Tensor]) -> list[Tensor]:
        """One state tensor of each parameter, zero at first, at least float32."""
        for p in params:
            if key not in self.state[p]:
                self.state[p][key] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        return [self.state[p][key] for p in params]


class DiagonalNGD(_ModelOptimizer):
    r"""Natural gradient with the diagonal of the Fisher information.

    With g the gradient of the mean negative log-likelihood and f an estimate of diag F on the same mini-batch,

        v ← γ v + (1−γ) f,    m ← μ m + g / (v / (1−γᵗ) + λ),    θ ← (1 − lr · weight_decay) θ − lr · m.

    With ``damping_metric="online"`` that happens in the coordinates C^{1/2} θ: f estimates diag LFL for L = C^{−1/2},
    and m ← μ m + L (v / (1−γᵗ) + λ)⁻¹ L g.

    diag F is estimated by backward passes with random signs ε, one per event and output: with F = JᵀMJ/N and M = LLᵀ,
    E[(JᵀLε)²]/N = diag F for any model, batch normalisation in training mode included. It is the mean of squares over
    events; the square of the mean gradient, which Adam tracks, is another quantity that shrinks with the batch.

    Args:
        model: all its trainable parameters are optimised.
        family: what the outputs of ``model`` mean.
        lr: step size.
        damping: λ > 0, added to the diagonal.
        damping_metric: ``"identity"``, or ``"online"`` for the diagonal in the coordinates in which the metric C of
            the gradients so far (`npg.curvature.online`) is the identity.
        alpha: smoothing of the online factors, as in `OnlineNGD`.
        fisher: ``"exact"`` (expectation over labels), ``"sampled"`` (one label drawn from the model per event) or
            ``"empirical"`` (the labels of the data: the mean of squared per-event gradients).
        decay: γ, in [0, 1).
        momentum: μ, in [0, 1).
        weight_decay: decoupled; parameters of one axis (biases, most normalisation) are left alone.
        probes: backward passes per estimate; None computes the diagonal itself, at one backward pass per event (or
            per event and output if ``fisher="exact"``).
        generator: the source of signs and sampled labels, by default torch's global one, which a checkpoint has to
            hold anyway.
        process_group: average gradient, diagonal and loss over these processes. A model in DistributedDataParallel
            brings its own.

    Raises:
        ValueError: if an option is out of its range.

    Source: Amari (1998), Natural gradient works efficiently in learning; Martens (2020), arXiv 1412.1193.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        lr: float,
        damping: float = 1e-3,
        *,
        damping_metric: Literal["identity", "online"] = "identity",
        alpha: float = 4.0,
        fisher: Kind = "exact",
        decay: float = 0.95,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        probes: int | None = 1,
        generator: Generator | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        _check(0 <= lr < inf, "lr", lr, "a finite number, 0 or above")
        _check(0 < damping < inf, "damping", damping, "a finite number above 0")
        _check(0 <= decay < 1, "decay", decay, "in [0, 1)")
        _check(0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        _check(0 <= weight_decay < inf, "weight_decay", weight_decay, "a finite number, 0 or above")
        _check(probes is None or probes >= 1, "probes", probes, "None or at least 1")
        _check(damping_metric in ("identity", "online"), "damping_metric", damping_metric, "'identity' or 'online'")
        defaults = {
            "lr": lr,
            "damping": damping,
            "decay": decay,
            "momentum": momentum,
            "weight_decay": weight_decay,
        }
        super().__init__(model, family, defaults, fisher, process_group, damping_metric, alpha)
        self.probes, self.generator = probes, generator

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, inputs: Any = _MISSING, targets: Tensor = _MISSING, *, closure: None = _MISSING
    ) -> Tensor:
        """Take one step on a mini-batch; returns its mean negative log-likelihood before the step, ().

        Where that, the gradient, the diagonal, or what the step would make of momentum and parameters is not finite,
        the step is refused: parameters, running average and momentum stay as they were, and NaN is returned. The host
        waits to know with ``damping_metric="online"`` alone.

        Args:
            inputs: a tensor, or a tuple of the model's positional arguments.
            targets: in the shape that ``family.log_likelihood`` takes.
            closure: there is none; ``step(closure=None)`` makes the state, as `torch.distributed.checkpoint` asks for.

        Raises:
            TypeError: without inputs and targets, or with a closure.
        """
        if not self._has_batch(inputs, targets, closure):
            return torch.tensor(nan)
        params = self._trainable()
        buffers = Buffers(self.model)
        with buffers.restored_on_error():
            return self._step(inputs, targets, params, buffers)

    def _step(self, inputs: Any, targets: Tensor, params: list[Tensor], buffers: Buffers) -> Tensor:
        group = self.param_groups[0]
        linearization = Linearization(self.model, inputs, move_statistics=True)
        fisher = Fisher(
            self.model,
            inputs,
            self.family,
            kind=self.fisher,
            targets=targets if self.fisher == "empirical" else None,
            generator=self.generator if self.fisher == "sampled" else None,
            process_group=self.process_group,
            linearization=linearization,
        )
        outputs = linearization.outputs
        loss = mean_(-self._log_likelihood(outputs, targets).mean(), self.process_group)
        slope = linearization.pull_back(self.family.score(outputs, targets) / fisher.events)
        slope = mean_(slope, self.process_group)
        factors = self._online_factors()
        root = None if factors is None else factors.preconditioner.inverse_root()
        diagonal = fisher.diagonal(self.probes, self.generator, root=root)

        gain, lr = 1 - group["decay"], group["lr"]
        averages, momenta = self._states("fisher", params), self._states("momentum_buffer", params)
        weights = self._weights(params)
        new_averages = torch._foreach_mul(averages, 1 - gain)
        torch._foreach_add_(new_averages, torch._foreach_mul(_split(diagonal, averages), gain))
        new_weights = torch._foreach_add(torch._foreach_mul(weights, 1 - gain), gain)
        denominators = torch._foreach_div(new_averages, new_weights)
        torch._foreach_add_(denominators, group["damping"])
        new_momenta = torch._foreach_mul(momenta, group["momentum"])
        if root is None:
            torch._foreach_addcdiv_(new_momenta, _split(slope, momenta), denominators)
        else:
            step = root(root(slope) / torch.cat([x.flatten() for x in denominators]))
            torch._foreach_add_(new_momenta, _split(step, momenta))
        new_params = [p.clone() for p in params]
        _decay(new_params, lr * group["weight_decay"])
        torch._foreach_add_(new_params, new_momenta, alpha=lr)

        # Each is looked at, since one may hide in the next: g / ∞ is 0. All ranks agree: the first three are averaged.
        finite = torch.isfinite(loss)
        for values in (slope, diagonal, _flat(new_momenta), _flat(new_params)):
            finite = finite & torch.isfinite(values).all()
        for old, new in (
            (averages, new_averages), (weights, new_weights), (momenta, new_momenta), (params, new_params)
        ):  # fmt: skip
            torch._foreach_copy_(old, _split(torch.where(finite, _flat(new), _flat(old)), old))
        if factors is not None and finite:
            count = self._steps(params)
            factors.update(slope, count)
            self._count_to(count + 1, params)
        torch.clear_autocast_cache()
        buffers.restore(keep=finite)
        return torch.where(finite, loss, nan)

    def _weights(self, params: Iterable[Tensor]) -> list[Tensor]:
        """What each parameter's running average has to be divided by, Σ (1−γ)γᵏ over its steps: 1−γᵗ; (), float64."""
        for p in params:
            if "weight" not in self.state[p]:
                self.state[p]["weight"] = torch.zeros((), dtype=torch.float64, device=p.device)
        return [self.state[p]["weight"] for p in params]

    def _make_state(self, params: list[Tensor]) -> None:
        self._states("fisher", params)
        self._states("momentum_buffer", params)
        self._weights(params)
        if self._online_factors() is not None:
            self._count_to(self._steps(params), params)


class NGD(_ModelOptimizer):
    r"""Natural gradient descent with the exact Fisher information, F s = g solved by conjugate gradients.

    Every step is one `natural_step` that maximises the mean log-likelihood:

        d = β (F + λI)⁻¹ ∇ mean log p(targets | inputs),    θ ← (1 − lr · weight_decay) (θ + d + μ m),    m ← d + μ m.

    β is ``lr``, or with ``max_kl`` the smaller of that and the length at which the model moves by KL ≤ ``max_kl``.

    Args:
        model: all its trainable parameters are optimised.
        family: what the outputs of ``model`` mean.
        lr: step size; 1 is the full natural (Gauss–Newton) step.
        damping: λ ≥ 0. It has to be positive where F is singular to working precision and the gradient is noisy: with
            batch normalisation, for one.
        max_kl: a KL radius δ in nats per event; steps are then shortened until the true KL and the loss agree.
        momentum: μ, in [0, 1); 0 with ``max_kl``, since momentum would carry the model out of the radius.
        weight_decay: decoupled; parameters of one axis (biases, most normalisation) are left alone.
        solver: ``"cg"``; ``"kfac"`` or ``"ekfac"``, which take the Kronecker-factored F̂ + λI for F + λI and its inverse
            for the solution (`npg.curvature.kronecker`); or ``"dense"`` for the report's Algorithm 1 as printed: F as a
            matrix, and its inverse (its pseudo-inverse where λ = 0 and F is singular), for up to some thousands of
            parameters.
        preconditioner: None, ``"kfac"`` or ``"ekfac"``, for conjugate gradients. One iteration is K-FAC's direction at
            the length that is best for F; more of them lead from there to the solution.
        max_iterations: of conjugate gradients, each about the cost of one gradient.
        rtol: conjugate gradients stop where the residual is below ``rtol`` · ‖g‖.
        factor_decay: γ, in [0, 1): F̂ is an average over mini-batches, that of k updates ago with the weight γᵏ.
        update_period: F̂ is updated on each of the first 10 steps and on every ``update_period``-th step after them.
        probes: backward passes per update of F̂; None takes one for each output.
        generator: the source of their signs, and of sampled labels, by default torch's global one, which a checkpoint
            has to hold anyway.
        warm_start: start the solver from this multiple of the last solution; 0 starts from zero.
        damping_metric: ``"identity"``; for ``"cg"`` without a preconditioner or a warm start ``"online"``: solve
            (F + λC) s = g with the metric C that the gradients so far define (`npg.curvature.online`), which also
            preconditions the solver then; for ``"kfac"`` and ``"ekfac"`` ``"factors"``: share λ out to the factors of
            each layer, in proportion to their size (`npg.curvature.kronecker`).
        alpha: smoothing of the online factors, as in `OnlineNGD`.
        curvature_fraction: the leading part of each mini-batch that F is taken on, in (0, 1].
        fisher: ``"exact"``, ``"sampled"`` or ``"empirical"``.
        metric: ``"fisher"``, or another geometry in its place: ``"wasserstein"`` is that of `npg.transport`, and
            ``wasserstein(family, graph)`` that with classes on a graph of your own. ``max_kl`` then bounds ½W₂², and
            the gain that ``damping_control`` compares with is that of the linear model.
        damping_control: adapts λ after each step, which then costs one more forward pass.
        process_group: average over these processes, each of which holds an equal share of the mini-batch. A model in
            DistributedDataParallel brings its own.

    Raises:
        ValueError: if an option is out of its range.
        TypeError: if the family has no Wasserstein metric.

    Source: Amari (1998), Natural gradient works efficiently in learning; Martens (2010), Deep learning via
    Hessian-free optimization.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        lr: float = 1.0,
        damping: float = 1e-3,
        *,
        max_kl: float | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        solver: Literal["cg", "kfac", "ekfac", "dense"] = "cg",
        preconditioner: Literal["kfac", "ekfac"] | None = None,
        max_iterations: int = 10,
        rtol: float = 1e-3,
        factor_decay: float = 0.95,
        update_period: int = 10,
        probes: int | None = 1,
        generator: Generator | None = None,
        warm_start: float = 0.0,
        damping_metric: Literal["identity", "online", "factors"] = "identity",
        alpha: float = 4.0,
        curvature_fraction: float = 1.0,
        fisher: Kind = "exact",
        metric: Literal["fisher", "wasserstein"] | Geometry = "fisher",
        damping_control: LevenbergMarquardt | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        _check(0 <= lr < inf, "lr", lr, "a finite number, 0 or above")
        _check(0 <= damping < inf, "damping", damping, "a finite number, 0 or above")
        _check(max_kl is None or 0 < max_kl < inf, "max_kl", max_kl, "None or a positive KL in nats")
        _check(0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        _check(not (momentum and max_kl), "momentum", momentum, "0 with max_kl, whose radius it would break")
        _check(0 <= weight_decay < inf, "weight_decay", weight_decay, "a finite number, 0 or above")
        _check(solver in ("cg", "kfac", "ekfac", "dense"), "solver", solver, "'cg', 'kfac', 'ekfac' or 'dense'")
        _check(preconditioner in (None, "kfac", "ekfac"), "preconditioner", preconditioner, "None, 'kfac' or 'ekfac'")
        _check(preconditioner is None or solver == "cg", "preconditioner", preconditioner, "None without solver='cg'")
        _check(max_iterations >= 1, "max_iterations", max_iterations, "at least 1")
        _check(rtol >= 0, "rtol", rtol, "0 or above")
        _check(0 <= warm_start <= 1, "warm_start", warm_start, "in [0, 1]")
        _check(not warm_start or solver == "cg", "warm_start", warm_start, f"0 with solver={solver!r}")
        _check(0 <= factor_decay < 1, "factor_decay", factor_decay, "in [0, 1)")
        _check(update_period >= 1, "update_period", update_period, "at least 1")
        _check(probes is None or probes >= 1, "probes", probes, "None or at least 1")
        approximation = solver if solver in ("kfac", "ekfac") else preconditioner
        metrics = ("identity", "online", "factors")
        _check(damping_metric in metrics, "damping_metric", damping_metric, "'identity', 'online' or 'factors'")
        if damping_metric == "factors":
            _check(solver in ("kfac", "ekfac"), "solver", solver, "'kfac' or 'ekfac' with damping_metric='factors'")
        if damping_metric == "online":
            _check(solver == "cg", "solver", solver, "'cg' with damping_metric='online'")
            _check(preconditioner is None, "preconditioner", preconditioner, "None with damping_metric='online'")
            _check(not warm_start, "warm_start", warm_start, "0 with damping_metric='online'")
        _check(0 < curvature_fraction <= 1, "curvature_fraction", curvature_fraction, "in (0, 1]")
        self.metric = geometry(metric, family)
        _check(fisher == "exact" or self.metric is None, "fisher", fisher, "'exact' with another metric")
        _check(approximation is None or self.metric is None, "metric", metric, f"'fisher' with {approximation}")
        defaults = {"lr": lr, "damping": damping, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(model, family, defaults, fisher, process_group, damping_metric, alpha)
        self.trust_region = None if max_kl is None else TrustRegion(max_kl)
        self.damping_control = damping_control
        self.warm_start, self.curvature_fraction = warm_start, curvature_fraction
        self.solver, self.preconditioner, self.probes, self.generator = solver, preconditioner, probes, generator
        self.factor_decay, self.update_period = factor_decay, update_period
        self._solver: Solver = partial(dense_solve, method="eigh")
        if solver == "cg":
            self._solver = partial(conjugate_gradient, max_iterations=max_iterations, rtol=rtol)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, inputs: Any = _MISSING, targets: Tensor = _MISSING, *, closure: None = _MISSING
    ) -> StepReport:
        """Take one step on a mini-batch; a step that is refused leaves everything as it was but the damping.

        Args:
            inputs: a tensor, or a tuple of the model's positional arguments.
            targets: in the shape that ``family.log_likelihood`` takes.
            closure: there is none; ``step(closure=None)`` makes the state, as `torch.distributed.checkpoint` asks for,
                and returns None.

        Raises:
            TypeError: without inputs and targets, or with a closure; with ``curvature_fraction`` also for inputs in
                which no rows can be found.
            ValueError: with ``curvature_fraction``, where it is not clear which tensors have the batch's rows.
        """
        if not self._has_batch(inputs, targets, closure):
            return cast(StepReport, None)
        group = self.param_groups[0]
        params = self._trainable()
        # A scheduler may have set it since: OneCycleLR does, unless cycle_momentum=False.
        momentum = group["momentum"]
        _check(not (momentum and self.trust_region), "momentum", momentum, "0 with max_kl, whose radius it would break")
        solver, x0, fraction = self._solver, None, self.curvature_fraction
        count = self._steps(params)
        kronecker = _Kronecker(self, params, count) if self._kronecker else None
        if kronecker is not None and self.preconditioner is None:
            solver = kronecker.solve
            fraction = fraction if kronecker.due else 1.0  # no F is looked at, so that none is linearised for itself
        rows = ceil(fraction * len(targets))
        curvature_inputs = _first_rows(inputs, rows, len(targets)) if rows < len(targets) else None
        if (factors := self._online_factors()) is not None:
            solver = partial(solve_in_metric, root=factors.preconditioner.inverse_root(), solver=self._solver)
        if self.warm_start:
            x0 = self.warm_start * torch.cat([s.flatten() for s in self._states("solution", params)])
        decay = group["lr"] * group["weight_decay"]
        theta, buffers = Parameters(self.model), Buffers(self.model)
        origin = theta.copy() if momentum or decay else []
        report = natural_step(
            self.model,
            inputs,
            self.family,
            lambda outputs: self._log_likelihood(outputs, targets).mean(),
            trust_region=self.trust_region,
            learning_rate=group["lr"],
            damping=group["damping"],
            solver=solver,
            fisher=partial(
                Fisher,
                kind=self.fisher,
                targets=targets[:rows] if self.fisher == "empirical" else None,
                generator=self.generator,
            ),
            metric=self.metric,
            curvature_inputs=curvature_inputs,
            preconditioner=None if self.preconditioner is None else kronecker,
            x0=x0,
            # the Hessian of the loss is about the Fisher information, and about no other metric
            objective_curvature=1.0 if self.metric is None else 0.0,
            evaluate=self.damping_control is not None,
            process_group=self.process_group,
        )
        if report.accepted and origin:
            if momentum:
                torch._foreach_add_(params, self._states("momentum_buffer", params), alpha=momentum)
            _decay(params, decay)
            torch.clear_autocast_cache()
            if not theta.is_finite():
                theta.restore(origin)
                buffers.restore()
                report = replace(report, accepted=False, step=torch.zeros_like(report.step), step_norm=0.0, scale=0.0)
        if report.accepted:
            if momentum:
                momenta = self._states("momentum_buffer", params)
                torch._foreach_mul_(momenta, momentum)
                torch._foreach_add_(momenta, _split(report.step, momenta))
            if self.warm_start:
                torch._foreach_copy_(self._states("solution", params), _split(report.solution, params))
            if factors is not None:
                factors.update(report.gradient, count)
            if kronecker is not None:
                kronecker.keep()
            self._count_to(count + 1, params)
        if self.damping_control is not None:
            group["damping"] = self.damping_control.update(
                group["damping"], report.predicted_gain, report.actual_gain, report.accepted
            )
        return report

    @property
    def _kronecker(self) -> bool:
        """Whether F̂ is the solver or the preconditioner."""
        return bool({self.solver, self.preconditioner} & {"kfac", "ekfac"})

    def _make_state(self, params: list[Tensor]) -> None:
        self._count_to(self._steps(params), params)
        self._online_factors()
        if self.param_groups[0]["momentum"]:
            self._states("momentum_buffer", params)
        if self.warm_start:
            self._states("solution", params)
        if self._kronecker:  # which parameters will hold a block is not known before the first step
            for name in {"key", *Block._fields, *Multiple._fields}:
                for p in params:
                    self.state[p].setdefault(f"kfac_{name}", torch.empty(0))


class _TrackedFactors:
    """`OnlineNGD`'s factors of the gradients of a model, with its defaults; the optimizer's state is views of them.

    Gradients are the same on all processes, and so are the factors.
    """

    def __init__(self, params: list[Tensor], states: Mapping[Tensor, dict[str, Any]], alpha: float) -> None:
        self.params = [p for p in params if p.numel() > 0]
        self.preconditioner = OnlinePreconditioner(self.params, [states[p] for p in self.params], alpha=alpha)

    def cover(self, params: list[Tensor]) -> bool:
        """Whether these are the parameters, empty ones aside."""
        return {*self.params} == {p for p in params if p.numel() > 0}

    def update(self, gradient: Tensor, step: int) -> None:
        """Take in the gradient of a step, (P,), where it is due; steps are counted from 0."""
        if _is_due(step, UPDATE_PERIOD):
            self.preconditioner(_split(gradient, self.params), update=True, first=step == 0)


class _Kronecker:
    """F̂ of a step of `NGD`, its solver or preconditioner: updated where that is due, kept if the step is taken."""

    def __init__(self, optimizer: NGD, params: list[Tensor], step: int) -> None:
        self.optimizer, self.params, self.step = optimizer, params, step
        # The state names parameters by their places in the group, which do not change when some are frozen.
        places = {id(p): place for place, p in enumerate(optimizer.param_groups[0]["params"])}
        self.places = [places[id(p)] for p in params]
        index = {place: i for i, place in enumerate(self.places)}
        self.blocks: dict[tuple[int, ...], Block | Multiple] = {}
        for state in (optimizer.state[p] for p in params if "kfac_key" in optimizer.state[p]):
            key = state["kfac_key"].tolist()
            if key and all(place in index for place in key):
                kind = Block if "kfac_inputs" in state and state["kfac_inputs"].numel() else Multiple
                fields = {name: state[f"kfac_{name}"] for name in kind._fields}
                self.blocks[tuple(index[place] for place in key)] = kind(**fields)

    def __call__(self, fisher: Fisher, damping: float) -> Callable[[Tensor], Tensor]:
        """R ↦ (F̂ + λI)⁻¹ r."""
        return self._approximation(fisher).inverse(damping)

    def solve(self, A: Fisher, b: Tensor, /, *, x0: Tensor | None = None, damping: float = 0.0) -> Solution:
        """(F̂ + λI)⁻¹ b."""
        shared = self.optimizer.damping_metric == "factors"
        return self._approximation(A).solve(b, damping=damping, shared=shared)

    @property
    def due(self) -> bool:
        """Whether this step updates F̂; it does where F̂ does not have each parameter once."""
        covered = sorted(i for key in self.blocks for i in key)
        return covered != list(range(len(self.params))) or _is_due(self.step, self.optimizer.update_period)

    def _approximation(self, fisher: Fisher) -> KroneckerFisher:
        optimizer = self.optimizer
        if not self.due:
            return KroneckerFisher.of(fisher.parameters, self.blocks)
        approximation = KroneckerFisher(
            fisher,
            corrected="ekfac" in (optimizer.solver, optimizer.preconditioner),
            probes=optimizer.probes,
            generator=optimizer.generator,
            previous=self.blocks,
            decay=optimizer.factor_decay,
        )
        self.blocks = approximation.blocks
        return approximation

    def keep(self) -> None:
        """Put F̂ into the optimizer's state."""
        states = [self.optimizer.state[p] for p in self.params]
        for state in states:
            for name in [name for name in state if name.startswith("kfac_")]:
                del state[name]
        for key, block in self.blocks.items():
            fields = {f"kfac_{name}": value for name, value in block._asdict().items()}
            states[key[0]].update({"kfac_key": torch.tensor([self.places[i] for i in key]), **fields})


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _split(vector: Tensor, like: _Tensors) -> list[Tensor]:
    """(P,) → views shaped like the tensors."""
    parts = vector.split([t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]


_PLAIN = (bool, int, float, complex, str, bytes, type(None), Enum, torch.dtype, torch.device, torch.Size)


def _first_rows(inputs: Any, rows: int, batch: int) -> Any:
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

        return pytree.tree_map_with_path(leaf, tree)

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
