"""Kaldi's online low-rank natural gradient as an optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from math import inf
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from npg.curvature.online import OnlinePreconditioner
from npg.optim.base import UPDATE_PERIOD, ExactResume, Tensors, check, decay_matrices, dense_gradients, is_due
from npg.parameters import check_dtypes

__all__ = ["OnlineNGD"]


def _either(finite: bool | Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The new values if they are finite; by a mask where only the device knows."""
    if isinstance(finite, bool):
        return new if finite else old
    return torch.where(finite.to(new.device), new, old)


class OnlineNGD(ExactResume):
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
        check(0 <= group["lr"] < inf, "lr", group["lr"], "a finite number, 0 or above")
        check(0 <= group["momentum"] < 1, "momentum", group["momentum"], "in [0, 1)")
        decay, alpha = group["weight_decay"], group["alpha"]
        check(0 <= decay < inf, "weight_decay", decay, "a finite number, 0 or above")
        check(0 <= alpha < inf, "alpha", alpha, "a finite number, 0 or above (4 is usual)")
        rank, period, limit = group["rank"], group["update_period"], group["max_change"]
        check(isinstance(rank, int) and rank >= 0, "rank", rank, "an integer, 0 or above")
        check(isinstance(period, int) and period >= 1, "update_period", period, "an integer, 1 or above")
        check(0 < group["eta"] <= 0.9, "eta", group["eta"], "above 0 and at most 0.9")
        check(limit is None or 0 < limit < inf, "max_change", limit, "None or a finite number above 0")
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
        dense_gradients(p for group in self.param_groups for p in group["params"])
        self._settle()
        parts = [_GroupStep(group, self._active(i, group)) for i, group in enumerate(self.param_groups)]
        if plans := [plan for part in parts for plan in part.plans]:
            finite = torch.stack([part.propose().to(plans[0].device) for part in parts if part.plans]).all()
            known = finite.device.type == "cpu"
            for part in parts:
                part.take(bool(finite) if known else finite)
            self._untold = _Outcome(finite, plans)
            if known:
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
            gradients: Tensors = [p.grad for p in plan.params if p.grad is not None]
            if self._l2:
                gradients = torch._foreach_add(gradients, plan.params, alpha=self._l2)
            plan.propose(gradients, self._momentum, self._period)
        if self._limit is not None:
            device = self.plans[0].device
            norms = [torch.linalg.vector_norm(m, dtype=torch.float64) for plan in self.plans for m in plan.proposed]
            norm = self._lr * torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]))
            self._lr = self._lr * self._limit / norm.clamp_min(self._limit)
        return torch.stack([plan.is_finite(self._lr, self._decay) for plan in self.plans]).all()

    def take(self, finite: bool | Tensor) -> None:
        """Move momenta, factors and parameters, if ``finite``."""
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
        update = is_due(self.count, update_period)
        self._former = [tensor.clone() for tensor in self._factors] if update else []
        self.proposed = self.preconditioner(gradients, update=update, first=self.count == 0)
        if momentum:
            for new, old in zip(self.proposed, self.momenta, strict=True):
                new.add_(old, alpha=momentum)

    def is_finite(self, lr: float | Tensor, decay: float) -> Tensor:
        """Whether the proposed momenta, and the parameters after a step along them, are finite, ()."""
        changes = [m.reshape(len(m), -1).abs().amax(1) for m in self.proposed]
        change = torch.cat([c.to(self.device) for c in changes]).double()
        sizes = torch._foreach_max(torch._foreach_abs(self._stacked))
        size = torch.stack([n.to(self.device) for n in sizes]).double()
        # A parameter that is not finite before the step is none of its making.
        size = torch.where(torch.isfinite(size), size, 0.0)
        size = size * torch.where(self._shrinks, abs(1 - decay), 1.0) + lr * change
        return (torch.isfinite(change) & (size <= self._largest)).all()

    def take(self, finite: bool | Tensor, lr: float | Tensor, decay: float) -> None:
        """Count the step, and move momenta, factors and parameters, if ``finite``; the host need not know."""
        changes: list[Tensor] = []
        for old, new in zip(self.momenta, self.proposed, strict=True):
            old.copy_(_either(finite, new, old))
            changes += _either(finite, new.mul_(lr), new.new_zeros(()).expand_as(new)).unbind()
        for tensor, former in zip(self._factors, self._former):
            tensor.copy_(_either(finite, tensor, former))
        if decay:
            for device in {p.device for p in self._stacked}:
                taken = torch.as_tensor(finite, dtype=torch.float64, device=device)
                decay_matrices((p for p in self._stacked if p.device == device), decay * taken)
        torch._foreach_sub_(self._stacked, changes)
        self.proposed, self._former = [], []
        self.count_to(self.count + 1)

    def count_to(self, count: int) -> None:
        """Set the number of steps."""
        self.count = count
        self.step.fill_(count)
