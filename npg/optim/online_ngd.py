"""Kaldi's online low-rank natural gradient as an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from npg.checks import number, whole
from npg.curvature.online import OnlinePreconditioner
from npg.optim.base import UPDATE_PERIOD, is_due
from npg.optim.gradients import GradientOptimizer, Plan

__all__ = ["OnlineNGD"]


class _OnlinePlan(Plan):
    """`Plan` with the online factors of every axis."""

    def __init__(
        self, params: list[Tensor], states: list[dict[str, Tensor]], step: int, options: dict[str, Any]
    ) -> None:
        self.preconditioner = OnlinePreconditioner(params, states, **options)
        self._factors = [tensor for factors in self.preconditioner.factors.values() for tensor in factors]
        super().__init__(params, states, step, options)

    def propose(self, gradients: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Precondition the gradients, and work out the momenta with them; the factors move, and can be put back."""
        update = is_due(self.count, group["update_period"])
        if update:
            self.moves = [(live, live, live.clone()) for live in self._factors]
        self.directions = self.preconditioner(gradients, update=update, first=self.count == 0)
        if momentum := group["momentum"]:
            for new, old in zip(self.directions, self.momenta, strict=True):
                new.add_(old, alpha=momentum)
        self.moves += [(live, new, live) for live, new in zip(self.momenta, self.directions, strict=True)]


class OnlineNGD(GradientOptimizer):
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

    _of_plan, _fixed, _plan_type = ("alpha", "rank", "eta"), "rank", _OnlinePlan

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
        super().__init__(params, defaults)

    @staticmethod
    def _validate(group: dict[str, Any], named: dict[str, Tensor]) -> None:
        GradientOptimizer._validate(group, named)
        rank, alpha = group["rank"], group["alpha"]
        number("alpha", alpha, 0)
        whole("rank", rank, 0)
        number("eta", group["eta"], 0, 0.9, above=True)
