"""What the optimizers of `p.grad` share: stacked state, and a step that is worked out, and taken if it is finite."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from npg.checks import number, positive_or_none, whole
from npg.curvature.stacks import stacks
from npg.model import undone_on_error
from npg.optim.base import ExactResume, Held, Tensors, check_shapes, decay_matrices, dense_gradients
from npg.parameters import check_dtypes

__all__ = ["GradientOptimizer", "Plan"]


def _either(finite: bool | Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The new values if they are finite; by a mask where only the device knows."""
    if isinstance(finite, bool):
        return new if finite else old
    return torch.where(finite.to(new.device), new, old)


def _on(device: torch.device, x: float | Tensor) -> float | Tensor:
    return x.to(device) if isinstance(x, Tensor) else x


class GradientOptimizer(ExactResume):
    """An optimizer that steps along a direction which it makes of the gradients in `p.grad`.

    A step by which the state or a parameter would not be finite is refused: everything stays as it was, and a warning
    says so. On CUDA the host does not wait for that: it learns of it, and warns, at the next step.
    """

    #: The options that a plan is made with, and the one of them that its factors' shapes depend on.
    _of_plan: ClassVar[tuple[str, ...]] = ()
    _fixed: ClassVar[str] = ""
    _plan_type: ClassVar[type[Plan]]

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        if isinstance(params, nn.Module):
            raise TypeError(
                f"params must be parameters, got the model: write {type(self).__name__}(model.parameters(), …)"
            )
        self._plans: dict[int, list[Plan]] = {}
        self._untold: _Outcome | None = None
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; options that it does not set have the values given to the constructor."""
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            self._validate(group, {name: p for name, p in _named(group).items() if p.requires_grad})
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise

    @staticmethod
    def _validate(group: dict[str, Any], named: dict[str, Tensor]) -> None:
        """Raise ValueError for an option out of its range, or a parameter that cannot be trained."""
        number("lr", group["lr"], 0)
        number("momentum", group["momentum"], 0, 1, below=True)
        decay, period, limit = group["weight_decay"], group["update_period"], group["max_change"]
        number("weight_decay", decay, 0)
        whole("update_period", period, 1)
        positive_or_none("max_change", limit)
        check_dtypes(named)

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
        plans = [plan for part in parts for plan in part.plans]
        if plans and not self._only_makes_its_state(plans):
            with undone_on_error(partial(_put_back, plans)):
                finite = torch.stack([part.propose().to(plans[0].device) for part in parts if part.plans]).all()
            known = finite.device.type == "cpu"
            for part in parts:
                part.take(bool(finite) if known else finite)
            self._untold = _Outcome(finite, plans)
            if known:
                self._settle()
        return loss

    def _only_makes_its_state(self, plans: list[Plan]) -> bool:
        """Whether this is the step of zeros by which `torch.distributed.checkpoint` has a state made."""
        if any(plan.count for plan in plans) or any(float(group["lr"]) for group in self.param_groups):
            return False  # the rate, which may be a tensor, is not read from the device but before the first step
        return not any(bool(p.grad.any()) for plan in plans for p in plan.params if p.grad is not None)

    def _settle(self) -> None:
        """Take back the counts of the last step if it was refused."""
        outcome, self._untold = self._untold, None
        if outcome is not None and not outcome.taken():
            for plan in outcome.plans:
                plan.count_to(plan.count - 1)
            warnings.warn(
                f"{type(self).__name__} refused a step: a gradient, or what the step would make of momentum or "
                "parameters, is not finite. All is as it was before the step; if this goes on, lower lr",
                RuntimeWarning,
                stacklevel=4,
            )

    def _active(self, index: int, group: dict[str, Any]) -> list[Plan]:
        """The plans of a group's parameters that have a gradient."""
        active = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
        if not active:
            return []
        plans, fixed = self._plans.get(index, []), self._fixed
        planned = {p for plan in plans for p in plan.params}
        if planned.isdisjoint(active):
            plans = []  # they are of a group that was here before
        if not all(plan.held.by(self.state) for plan in plans):
            plans = []  # the state was cleared, an entry replaced, or the model converted
        options = {name: group[name] for name in self._of_plan}
        if any(plan.options[fixed] != options[fixed] for plan in plans):
            former = plans[0].options[fixed]
            raise ValueError(f"{fixed} must stay {former}, that of the factors; got {options[fixed]}")
        if not plans or planned != set(active) or plans[0].options != options:
            named = {name: p for name, p in _named(group).items() if p.grad is not None}
            check_dtypes(named)  # frozen ones thaw
            for name, p in named.items():
                check_shapes(name, p, self.state[p])
            plans = self._plans[index] = self._plan(active, options)
        return plans

    def _plan(self, params: list[Tensor], options: dict[str, Any]) -> list[Plan]:
        """One plan for each number of steps that parameters have behind them: one, unless some were skipped."""
        runs: dict[int, list[Tensor]] = {}
        for p in params:
            runs.setdefault(int(self.state[p].get("step", 0)), []).append(p)
        plans = [self._plan_type(run, [self.state[p] for p in run], step, options) for step, run in runs.items()]
        for plan in plans:
            plan.held = Held(plan.params, self.state)
        return plans


def _named(group: dict[str, Any]) -> dict[str, Tensor]:
    """The parameters of a group by their names, or their places in ``params``."""
    params = group["params"]
    names = group.get("param_names", [f"params[{i}]" for i in range(len(params))])
    return dict(zip(names, params, strict=True))


def _put_back(plans: list[Plan]) -> None:
    for plan in plans:
        plan.put_back()


class _Outcome:
    """Whether a step was taken: known on its device, and on its way to the host."""

    def __init__(self, finite: Tensor, plans: list[Plan]) -> None:
        self.plans, self._finite, self._event = plans, finite, None
        if finite.is_cuda:
            self._finite = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True).copy_(
                finite, non_blocking=True
            )
            self._event = torch.cuda.current_stream(finite.device).record_event()

    def taken(self) -> bool:
        """Wait for the step, but for nothing that was queued after it."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._finite)


class _GroupStep:
    """A step of one parameter group: worked out first, and taken where that of every group is finite."""

    def __init__(self, group: dict[str, Any], plans: list[Plan]) -> None:
        self.plans, self._group, self._limit = plans, group, group["max_change"]
        self._lr: float | Tensor = group["lr"]  # what the directions are multiplied by, once it is known
        decoupled = group.get("decoupled_weight_decay", True)
        self._l2 = 0.0 if decoupled else group["weight_decay"]
        self._decay = group["lr"] * group["weight_decay"] if decoupled else 0.0

    def propose(self) -> Tensor:
        """Work out the directions; whether what the step makes of everything will be finite, ()."""
        for plan in self.plans:
            gradients: Tensors = [p.grad for p in plan.params if p.grad is not None]
            if self._l2:
                gradients = torch._foreach_add(gradients, plan.params, alpha=self._l2)
            plan.propose(gradients, self._group)
        if self._limit is not None:
            device = self.plans[0].device
            norms = [torch.linalg.vector_norm(d, dtype=torch.float64) for plan in self.plans for d in plan.directions]
            norm = self._lr * torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]))
            self._lr = self._lr * self._limit / norm.clamp_min(self._limit)
        return torch.stack([plan.is_finite(self._lr, self._decay) for plan in self.plans]).all()

    def take(self, finite: bool | Tensor) -> None:
        """Move state and parameters, if ``finite``."""
        for plan in self.plans:
            plan.take(finite, self._lr, self._decay)


class Plan:
    """The stacked state of the parameters that step together; their optimizer state is views of it.

    Args:
        params: none of them empty.
        states: of the parameters; their ``momentum_buffer`` and ``step`` become those of the plan.
        step: how many steps they have behind them.
        options: those that the plan is made with.
    """

    #: The state that the plan is of.
    held: Held

    def __init__(
        self, params: list[Tensor], states: list[dict[str, Tensor]], step: int, options: dict[str, Any]
    ) -> None:
        self.params, self.options = params, options
        self.count, self.step = step, torch.tensor(step, device="cpu")
        self.stacks = stacks(params)
        self.momenta: list[Tensor] = []
        for stack in self.stacks:
            stacked = torch.zeros(len(stack.indices), *stack.shape, dtype=stack.dtype, device=stack.device)
            self.momenta.append(stacked)
            for i, view in zip(stack.indices, stacked.unbind(), strict=True):
                if "momentum_buffer" in states[i]:
                    view.copy_(states[i]["momentum_buffer"])
                states[i]["momentum_buffer"] = view
        for state in states:
            state["step"] = self.step
        #: What is multiplied by −lr and added, (n, *shape) for each of the stacks.
        self.directions: list[Tensor] = []
        #: What moves with the step: the live tensor, its value if the step is taken, and if it is refused.
        self.moves: list[tuple[Tensor, Tensor, Tensor]] = []
        self.device = self.momenta[0].device
        self._stacked = [params[i] for stack in self.stacks for i in stack.indices]
        self._shrinks = torch.tensor([p.ndim > 1 for p in self._stacked], device=self.device)
        largest = [torch.finfo(p.dtype).max for p in self._stacked]
        self._largest = torch.tensor(largest, dtype=torch.float64, device=self.device)

    def propose(self, gradients: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Work out `directions` and `moves` with the options of the group."""
        raise NotImplementedError

    def put_back(self) -> None:
        """Undo what `propose` has moved."""
        for live, _, old in self.moves:
            if old is not live:
                live.copy_(old)
        self.directions, self.moves = [], []

    def state_is_finite(self) -> Tensor:
        """Whether the state will be finite after the proposed step, (), as far as the directions do not tell."""
        return torch.ones((), dtype=torch.bool, device=self.device)

    def is_finite(self, lr: float | Tensor, decay: float) -> Tensor:
        """Whether the directions, the state, and the parameters after the step, are finite, ()."""
        changes = [torch.linalg.vector_norm(d.reshape(len(d), -1), inf, 1) for d in self.directions]
        change = torch.cat([c.to(self.device) for c in changes]).double()
        sizes = torch._foreach_norm(self._stacked, inf)
        size = torch.stack([n.to(self.device) for n in sizes]).double()
        # A parameter that is not finite before the step is none of its making.
        size = torch.where(torch.isfinite(size), size, 0.0)
        size = size * torch.where(self._shrinks, abs(1 - decay), 1.0) + _on(self.device, lr) * change
        return (torch.isfinite(change) & (size <= self._largest)).all() & self.state_is_finite()

    def take(self, finite: bool | Tensor, lr: float | Tensor, decay: float) -> None:
        """Count the step, and move state and parameters, if ``finite``; the host need not know."""
        moved = [(live, _either(finite, new, old)) for live, new, old in self.moves]
        moved = [(live, value) for live, value in moved if value is not live]
        if moved:
            torch._foreach_copy_([live for live, _ in moved], [value for _, value in moved])
        changes: list[Tensor] = []
        for direction in self.directions:
            change = direction.mul_(_on(direction.device, lr))
            changes += _either(finite, change, change.new_zeros(()).expand_as(change)).unbind()
        if decay:
            for device in {p.device for p in self._stacked}:
                # A choice and no product: a refused step may have a rate of NaN, or ∞.
                amount = torch.full((), decay, dtype=torch.float64, device=device)
                amount = torch.where(torch.as_tensor(finite, device=device), amount, torch.zeros_like(amount))
                decay_matrices((p for p in self._stacked if p.device == device), amount)
        torch._foreach_sub_(self._stacked, changes)
        self.directions, self.moves = [], []
        self.count_to(self.count + 1)

    def count_to(self, count: int) -> None:
        """Set the number of steps."""
        self.count = count
        self.step.fill_(count)
