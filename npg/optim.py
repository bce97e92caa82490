"""Natural-gradient optimizers: `torch.optim.Optimizer` faces over the core and over `npg.curvature`."""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from npg.curvature.online import OnlinePreconditioner

_Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]

#: Steps at the start on which OnlineNGD always updates its factors.
BURN_IN = 10


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


class _ExactResume(Optimizer):
    """An optimizer whose state comes back from a checkpoint with the dtype it was saved with.

    `Optimizer.load_state_dict` casts state to the dtype of its parameter, which rounds the float32 state of
    half-precision parameters, and may share memory with the checkpoint.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict` of the same optimizer over parameters of the same shapes."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for i, p in zip(saved, params, strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    device = value.device if key == "step" else p.device
                    self.state[p][key] = value.to(device, copy=True)


class OnlineNGD(_ExactResume):
    r"""Kaldi's online low-rank natural gradient, applied to every axis of every parameter in turn.

    For each axis of dimension D > 1 the gradient is read as N rows of length D and multiplied by the inverse of
    G = F + (α/D) tr(F) I, where F = Rᵀ D R + ρ I tracks the rows' second moment; the result is rescaled to the norm
    of the gradient (`npg.curvature.online` has the formulas). With the preconditioned gradient ĝ,

        m ← μ m + ĝ,    θ ← (1 − lr · weight_decay) θ − lr · m.

    The state depends on the gradients alone: under DistributedDataParallel, which averages them, it is the same on
    all ranks without any communication of its own. A constant that scales all gradients scales ĝ and nothing else.

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
        ValueError: if an option is out of its range or a gradient is sparse; no parameter has changed then.

    Source: Povey, Zhang and Khudanpur (2015), arXiv 1410.7455, appendix B.
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
        update_period: int = 4,
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
        _check(group["lr"] >= 0, "lr", group["lr"], "0 or above")
        _check(0 <= group["momentum"] < 1, "momentum", group["momentum"], "in [0, 1)")
        _check(group["weight_decay"] >= 0, "weight_decay", group["weight_decay"], "0 or above")
        _check(group["alpha"] >= 0, "alpha", group["alpha"], "0 or above (4 is usual)")
        rank, period, limit = group["rank"], group["update_period"], group["max_change"]
        _check(isinstance(rank, int) and rank >= 0, "rank", rank, "an integer, 0 or above")
        _check(isinstance(period, int) and period >= 1, "update_period", period, "an integer, 1 or above")
        _check(0 < group["eta"] <= 0.9, "eta", group["eta"], "above 0 and at most 0.9")
        _check(limit is None or limit > 0, "max_change", limit, "None or above 0")
        for p in group["params"]:
            _check(p.is_floating_point(), "params", p.dtype, "of real floating-point tensors")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}

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
        for index, group in enumerate(self.param_groups):
            self._step_group(index, group)
        return loss

    def _step_group(self, index: int, group: dict[str, Any]) -> None:
        active = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
        if not active:
            return
        plans = self._plans.get(index, [])
        if {p for plan in plans for p in plan.params} != set(active):
            plans = self._plans[index] = self._plan(active, group)

        lr, decay, limit = group["lr"], group["weight_decay"], group["max_change"]
        decoupled = group["decoupled_weight_decay"]
        for plan in plans:
            gradients: _Tensors = [p.grad for p in plan.params if p.grad is not None]
            if decay and not decoupled:
                gradients = torch._foreach_add(gradients, plan.params, alpha=decay)
            plan.accumulate(gradients, group["momentum"], group["update_period"])

        if decay and decoupled and (matrices := [p for p in active if p.ndim > 1]):
            torch._foreach_mul_(matrices, 1 - lr * decay)
        params = [p for plan in plans for p in plan.params]
        changes: _Tensors = [buffer for plan in plans for buffer in plan.buffers]
        if limit is not None:
            norms = torch._foreach_norm(changes)
            norm = lr * torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]))
            changes = torch._foreach_mul(changes, limit / norm.clamp_min(limit))
        torch._foreach_add_(params, changes, alpha=-lr)

    def _plan(self, params: list[Tensor], group: dict[str, Any]) -> list["_OnlinePlan"]:
        """One plan for each number of steps that parameters have behind them: one, unless some were skipped."""
        runs: dict[int, list[Tensor]] = {}
        for p in params:
            runs.setdefault(int(self.state[p].get("step", 0)), []).append(p)
        options = {name: group[name] for name in ("alpha", "rank", "eta")}
        return [_OnlinePlan(run, [self.state[p] for p in run], step, options) for step, run in runs.items()]


class _OnlinePlan:
    """The stacked state of the parameters that step together; their optimizer state is views of it."""

    def __init__(
        self, params: list[Tensor], states: list[dict[str, Tensor]], step: int, options: dict[str, Any]
    ) -> None:
        self.params = params
        self.count, self.step = step, torch.tensor(step)
        self.preconditioner = OnlinePreconditioner(params, states, **options)
        self.momenta = []
        self.buffers = [torch.empty(0)] * len(params)
        for block in self.preconditioner.blocks:
            first = params[block.indices[0]]
            stacked = torch.zeros(len(block.indices), *first.shape, dtype=block.dtype, device=first.device)
            self.momenta.append(stacked)
            for i, view in zip(block.indices, stacked.unbind(), strict=True):
                if "momentum_buffer" in states[i]:
                    view.copy_(states[i]["momentum_buffer"])
                self.buffers[i] = states[i]["momentum_buffer"] = view
        for state in states:
            state["step"] = self.step

    def accumulate(self, gradients: Sequence[Tensor], momentum: float, update_period: int) -> None:
        """Precondition the gradients and add them to the momentum buffers; count the step."""
        update = self.count < BURN_IN or self.count % update_period == 0
        directions = self.preconditioner(gradients, update=update, first=self.count == 0)
        for buffer, direction in zip(self.momenta, directions, strict=True):
            if momentum:
                buffer.mul_(momentum).add_(direction)
            else:
                buffer.copy_(direction)
        self.count += 1
        self.step.fill_(self.count)
