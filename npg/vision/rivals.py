"""Optimizers of others, to compare with: Muon of PyTorch, SOAP and Shampoo of the package pytorch-optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

try:
    pytorch_optimizer: Any = import_module("pytorch_optimizer")
except ImportError:
    pytorch_optimizer = None

__all__ = ["Muon", "check_installed", "shampoo", "soap"]


def check_installed(name: str) -> None:
    """Raise ValueError, with the remedy, if the package that the named optimizer is from is not installed."""
    if name in ("soap", "shampoo") and pytorch_optimizer is None:
        raise ValueError(f"{name} is of the package pytorch-optimizer: install it, with pip install -e '.[rivals]'")
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise ValueError(f"muon needs torch.optim.Muon, which PyTorch {torch.__version__} lacks: install a newer one")


class Muon(Optimizer):
    """`torch.optim.Muon` on weights, read as matrices by their leading axis, and `torch.optim.Adam` on all else.

    The first parameter group holds the weights, the second the rest; a scheduler moves the rates of both.

    Args:
        params: parameters.
        lr: of the weights.
        momentum: μ of the weights.
        weight_decay: decoupled, of the weights alone.
        nesterov: as in `torch.optim.Muon`.
        ns_steps: Newton–Schulz steps.
        adjust_lr_fn: how the rate depends on a weight's shape, as in `torch.optim.Muon`.
        vector_lr: Adam's rate.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.3,
        momentum: float = 0.6,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        vector_lr: float = 3e-3,
    ) -> None:
        params = list(params)
        weights, others = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
        groups: list[dict[str, Any]] = []
        self._parts: list[Optimizer] = []
        self._matrices = [nn.Parameter(p.detach().reshape(len(p), -1).clone()) for p in weights]
        if weights:
            groups.append({"params": weights, "lr": lr})
            options: dict[str, Any] = {"nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
            self._parts.append(torch.optim.Muon(self._matrices, lr, weight_decay, momentum, **options))
        if others:
            groups.append({"params": others, "lr": vector_lr})
            self._parts.append(torch.optim.Adam(others, vector_lr))
        super().__init__(groups, {})

    def __getstate__(self) -> dict[str, Any]:
        # without a scheduler's wrapper of this object's step
        return {name: value for name, value in self.__dict__.items() if name != "step"}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both with the gradients in `p.grad`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        weights = self.param_groups[0]["params"] if self._matrices else []
        for p, matrix in zip(weights, self._matrices, strict=True):
            matrix.copy_(p.reshape(matrix.shape))
            matrix.grad = None if p.grad is None else p.grad.reshape(matrix.shape)
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            part.step()
        for p, matrix in zip(weights, self._matrices, strict=True):
            p.copy_(matrix.view(p.shape))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of the two."""
        return {"parts": [part.state_dict() for part in self._parts], "lr": [g["lr"] for g in self.param_groups]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict` of the same parameters."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        for group, lr in zip(self.param_groups, state_dict["lr"], strict=True):
            group["lr"] = lr


def soap(
    params: Iterable[Any],
    lr: float = 3e-3,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.95, 0.95),
    *,
    precondition_frequency: int = 10,
    max_precondition_dim: int = 10000,
    merge_dims: bool = False,
    eps: float = 1e-8,
) -> Optimizer:
    """SOAP of pytorch-optimizer, with decoupled weight decay; see there."""
    return pytorch_optimizer.SOAP(
        params,
        lr,
        tuple(betas),
        weight_decay=weight_decay,
        precondition_frequency=precondition_frequency,
        max_precondition_dim=max_precondition_dim,
        merge_dims=merge_dims,
        eps=eps,
    )


def shampoo(
    params: Iterable[Any],
    lr: float = 0.3,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    *,
    weight_decouple: bool = True,
    preconditioning_compute_steps: int = 10,
    matrix_eps: float = 1e-6,
) -> Optimizer:
    """Shampoo of pytorch-optimizer, which sums its statistics over all steps; see there."""
    return pytorch_optimizer.Shampoo(
        params,
        lr,
        momentum,
        weight_decay,
        weight_decouple,
        preconditioning_compute_steps=preconditioning_compute_steps,
        matrix_eps=matrix_eps,
    )
