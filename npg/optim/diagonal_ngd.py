"""The natural gradient with the diagonal of the Fisher information."""

from __future__ import annotations

from collections.abc import Iterable
from math import nan
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn

from npg.checks import number, one_of
from npg.constraint import value_and_slope
from npg.curvature.base import check_average
from npg.families import Family
from npg.fisher import Fisher, Kind
from npg.linearize import Linearization
from npg.model import Buffers
from npg.optim.base import MISSING, ModelOptimizer, decay_matrices, flat, split
from npg.parallel import mean_, mean_of_shares

__all__ = ["DiagonalNGD"]


class DiagonalNGD(ModelOptimizer):
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
        process_group: average gradient, diagonal and loss over these processes, each of which holds the same
            parameters, which is looked at before the first step, and an equal share of the mini-batch. A model in
            DistributedDataParallel brings its own.

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
        number("lr", lr, 0)
        number("damping", damping, 0, above=True)
        check_average(decay, probes)
        number("momentum", momentum, 0, 1, below=True)
        number("weight_decay", weight_decay, 0)
        one_of("damping_metric", damping_metric, ("identity", "online"))
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
        self, inputs: Any = MISSING, targets: Any = MISSING, *, closure: None = MISSING
    ) -> Tensor:
        """Take one step on a mini-batch; returns its mean negative log-likelihood before the step, ().

        Where that, the gradient, the diagonal, or what the step would make of momentum and parameters is not finite,
        the step is refused: parameters, running average and momentum stay as they were, and NaN is returned. The host
        waits to know with ``damping_metric="online"`` or several processes.

        Args:
            inputs: a tensor, or a tuple of the model's positional arguments (a named tuple is one).
            targets: in the form that ``family.log_likelihood`` takes.
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

    def _step(self, inputs: Any, targets: Any, params: list[Tensor], buffers: Buffers) -> Tensor:
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
        value, slope = value_and_slope(
            lambda outputs: self._log_likelihood(outputs, targets).mean(), linearization, "the log-likelihood"
        )
        loss = mean_of_shares(-value, fisher.events, self.process_group)
        slope = mean_(linearization.pull_back(slope), self.process_group)
        factors = self._online_factors()
        root = None if factors is None else factors.preconditioner.inverse_root()
        diagonal = fisher.diagonal(self.probes, self.generator, root=root)

        gain, lr = 1 - group["decay"], group["lr"]
        averages, momenta = self._states("fisher", params), self._states("momentum_buffer", params)
        weights = self._weights(params)
        new_averages = torch._foreach_mul(averages, 1 - gain)
        torch._foreach_add_(new_averages, torch._foreach_mul(split(diagonal, averages), gain))
        new_weights = torch._foreach_add(torch._foreach_mul(weights, 1 - gain), gain)
        denominators = torch._foreach_div(new_averages, new_weights)
        torch._foreach_add_(denominators, group["damping"])
        new_momenta = torch._foreach_mul(momenta, group["momentum"])
        if root is None:
            torch._foreach_addcdiv_(new_momenta, split(slope, momenta), denominators)
        else:
            step = root(root(slope) / torch.cat([x.flatten() for x in denominators]))
            torch._foreach_add_(new_momenta, split(step, momenta))
        new_params = [p.clone() for p in params]
        decay_matrices(new_params, lr * group["weight_decay"])
        torch._foreach_add_(new_params, new_momenta, alpha=lr)

        # Each is looked at, since one may hide in the next: g / ∞ is 0. All ranks agree: the first three are averaged.
        finite = torch.isfinite(loss)
        for values in (slope, diagonal, flat(new_momenta), flat(new_params)):
            finite = finite & torch.isfinite(values.abs().amax())
        for old, new in (
            (averages, new_averages), (weights, new_weights), (momenta, new_momenta), (params, new_params)
        ):  # fmt: skip
            torch._foreach_copy_(old, split(torch.where(finite, flat(new), flat(old)), old))
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
