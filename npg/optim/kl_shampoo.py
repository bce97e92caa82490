"""The two-sided natural gradient, KL-Shampoo, as an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from npg.checks import number, whole
from npg.curvature.two_sided import TwoSidedCurvature
from npg.optim.base import BURN_IN, is_due
from npg.optim.gradients import GradientOptimizer, Plan

__all__ = ["KLShampoo"]

#: Out of the first `BURN_IN` steps, those on which the powers are worked out, from exact eigenvectors; counted from 0.
EXACT = (0, 1, 3, 9)


class _TwoSidedPlan(Plan):
    """`Plan` with the two-sided curvature."""

    def __init__(
        self, params: list[Tensor], states: list[dict[str, Tensor]], step: int, options: dict[str, Any]
    ) -> None:
        self.curvature = TwoSidedCurvature(params, states, **options)
        super().__init__(params, states, step, options)
        self._is_matrix = [sum(size > 1 for size in stack.shape) > 1 for stack in self.stacks]
        self._finite = torch.ones((), dtype=torch.bool, device=self.device)

    def propose(self, gradients: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Let the factors take in the gradients and move the momenta; both can be put back."""
        with torch.autocast(self.device.type, enabled=False):
            self._propose([stack(gradients) for stack in self.stacks], group)

    def _propose(self, gradients: list[Tensor], group: dict[str, Any]) -> None:
        young, period, momentum = self.count < BURN_IN, group["update_period"], group["momentum"]
        due = self.count in EXACT if young and period > 1 else is_due(self.count, period)
        self.moves = [(live, live, live.clone()) for live in self.curvature.moving(due)]
        self._finite = self.curvature.update(gradients)
        if due:
            self.curvature.inverse(exact=young)
        means = torch._foreach_lerp(self.momenta, gradients, 1 - momentum)
        self.moves += [(live, new, live) for live, new in zip(self.momenta, means, strict=True)]
        if group["nesterov"]:
            means = torch._foreach_lerp(gradients, means, momentum)
        self.directions = self.curvature.apply(means, longest=1.0)
        for direction, is_matrix in zip(self.directions, self._is_matrix, strict=True):
            if not is_matrix:
                direction.mul_(group["vector_scale"])

    def state_is_finite(self) -> Tensor:
        """Whether every gradient was finite."""
        return self._finite


class KLShampoo(GradientOptimizer):
    r"""The two-sided natural gradient with factors that minimise a KL divergence (KL-Shampoo).

    The gradient of a weight is read as a matrix G (m × n), the leading axis against all others, and taken for matrix
    normal with covariance L ⊗ R: an empirical Fisher, of mini-batch gradients, in Kronecker form. L and R minimise the
    KL divergence to that (`npg.curvature.two_sided` has the formulas). With the mean M of the gradients,

        L ← β L + (1 − β) G R⁻¹ Gᵀ / n,    R ← β R + (1 − β) Gᵀ L⁻¹ G / m,
        M ← μ M + (1 − μ) G,    M̃ = (1 − μ) G + μ M,    θ ← (1 − lr · weight_decay) θ − lr · L^(−p) M̃ R^(−p).

    M̃ is shortened where ‖L^(−½) M̃ R^(−½)‖ > √(mn), the size of one gradient in the mean, which the average of several
    hardly reaches: so no gradient of another size, which powers of some steps ago do not know, makes a long step.

    p = 1 is the natural gradient; p = ½, its square root, whitens: a step has the same size however large the gradients
    are, and at most lr √(mn). Both are the same in any rotated basis of either side of a weight. What is no matrix
    (biases, normalisation, 1 × n) has a diagonal in place of L ⊗ R, and the rate lr · vector_scale; with p = ½ that is
    Adam with a relative damping and without corrections of its averages: M begins at 0, and the diagonal at the mean
    square of the first gradient, so that with ``nesterov`` the first step has 1 − μ² of its length.

    The state depends on the gradients alone: under DistributedDataParallel, which averages them, it is the same on all
    ranks without any communication of its own. If a constant c scales all gradients, c^(1 − 2p) scales the steps; a
    power of two changes no digit.

    A step by which the state or θ would not be finite, as with a gradient that is not, is refused: everything stays as
    it was, and a warning says so. On CUDA the host does not wait for that: it learns of it, and warns, at the next
    step.

    Args:
        params: parameters, or dicts that define parameter groups; every option below can be set for each group.
        lr: step size.
        momentum: μ, in [0, 1).
        weight_decay: decoupled: θ shrinks by the factor 1 − lr · weight_decay per step, if it has two axes or more
            (biases and normalisation parameters are left alone).
        nesterov: step along M̃; without, along M.
        power: p, above 0 and at most 1.
        average: β, in [0, 1): the factors remember about 1 / (1 − β) steps.
        damping: δ > 0: L is taken for L + δ (tr L / m) I, and R likewise.
        update_period: the powers of L and R, which take in every gradient, are worked out on the steps 0, 1, 3 and 9,
            and from step 10 on every ``update_period``-th step.
        max_axis: a weight with a longer side is cut into tiles, each with factors of its own.
        vector_scale: the learning rate of what is no matrix, as a multiple of lr.
        max_change: largest norm of the step of a parameter group; a longer one is shortened to it. None: no limit.

    Raises:
        ValueError: if an option is out of its range, a parameter is not a dense real floating-point tensor, a weight
            has an axis of length 0, or a gradient is sparse; no parameter has changed then.

    Source: Lin et al. (2025), "Understanding and improving Shampoo and SOAP via Kullback–Leibler minimization", arXiv
    2509.03378.
    """

    _of_plan, _fixed, _plan_type = ("power", "average", "damping", "max_axis"), "max_axis", _TwoSidedPlan

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.03,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = True,
        power: float = 0.5,
        average: float = 0.95,
        damping: float = 1e-3,
        update_period: int = 10,
        max_axis: int = 1024,
        vector_scale: float = 0.1,
        max_change: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "power": power,
            "average": average,
            "damping": damping,
            "update_period": update_period,
            "max_axis": max_axis,
            "vector_scale": vector_scale,
            "max_change": max_change,
        }
        super().__init__(params, defaults)

    @staticmethod
    def _validate(group: dict[str, Any], named: dict[str, Tensor]) -> None:
        GradientOptimizer._validate(group, named)
        damping, longest, scale = group["damping"], group["max_axis"], group["vector_scale"]
        number("power", group["power"], 0, 1, above=True)
        number("average", group["average"], 0, 1, below=True)
        number("damping", damping, 0, above=True)
        whole("max_axis", longest, 1)
        number("vector_scale", scale, 0)
        for name, p in named.items():
            if p.ndim > 1 and p.numel() == 0:
                raise ValueError(
                    f"parameter {name!r} has the shape {tuple(p.shape)}, without an entry: no curvature can be made of "
                    "it; leave it out of params, or give the layer at least one input and one output"
                )
