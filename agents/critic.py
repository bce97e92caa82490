"""How the critic is fitted to the returns of a rollout: by Adam, or by natural steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import isfinite, nan
from typing import Any

import torch
import torch.distributed as dist
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from agents.buffer import random_part, rows
from agents.checks import all_finite
from agents.heads import CriticHead
from agents.networks import Networks
from agents.standard import telling
from npg.families import Gaussian
from npg.model import frozen_statistics, overwrite
from npg.parallel import average_, mean_, moments, size
from npg.solvers import conjugate_gradient
from npg.step import natural_step
from npg.trust_region import LevenbergMarquardt, TrustRegion

__all__ = ["AdamCritic", "NaturalCritic", "fixed_statistics_of_the_actor", "training_mode"]


@dataclass
class AdamCritic:
    """Epochs of shuffled mini-batches.

    Attributes:
        head: the critic as a network.
        parameters: those that are trained, by name.
        optimizer: of at least these; of all others it sees no gradient.
        epochs: passes over the rollout.
        batch_size: rows of a mini-batch, of all processes together.
        process_group: gradients are averaged over its processes, each with its own rollout.
    """

    head: CriticHead
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    epochs: int
    batch_size: int
    process_group: dist.ProcessGroup | None = None

    def fit(self, observations: Any, returns: Tensor) -> float:
        """Fit to the returns (N,), or (E, T) of sequences, of which a mini-batch takes whole ones.

        Returns:
            The mean of the mean squared errors of the last epoch's mini-batches, whatever their size;
            NaN where something is not finite.
        """
        inputs, parameters = self.head.prepare(observations), list(self.parameters.values())
        self.optimizer.zero_grad()  # without gradients the optimizer passes over all other parameters
        steps = returns[0].numel()  # of a row: one, or those of a sequence
        batch_size = max(1, self.batch_size // size(self.process_group) // steps)
        gradients_of: dict[int, Callable[[Any, Tensor], Sequence[Tensor]]] = {}  # by the rows of a mini-batch
        losses: list[Tensor] = []
        for _ in range(self.epochs):
            losses = []
            order = torch.randperm(len(returns), device=returns.device)
            shuffled, targets = rows(inputs, order), returns[order]
            for start in range(0, len(returns), batch_size):
                part = slice(start, start + batch_size)
                x, y = rows(shuffled, part), targets[part]
                if len(y) not in gradients_of:
                    gradients_of[len(y)] = self.head.loss_and_gradients(parameters, x, y)
                loss, *gradients = gradients_of[len(y)](x, y)
                average_(gradients, self.process_group)
                for p, gradient in zip(parameters, gradients):
                    p.grad = gradient
                self.optimizer.step()
                losses.append(loss)
        if not losses:
            return nan
        loss = torch.stack(losses).mean() if all_finite(self.optimizer, parameters) else losses[0] * nan
        return float(mean_(loss, self.process_group))


@dataclass
class NaturalCritic:
    """Gauss–Newton steps on the whole rollout: the natural gradient of a Gaussian likelihood over the returns.

    Each is cut where the values would move by more than the returns' own spread. The damping follows Levenberg and
    Marquardt's rule, and does not fall below where it would begin to fit the noise of one rollout.

    F = E[JᵀJ] / σ², with the derivatives J of the values and the variance σ² of the returns, falls as one over the
    square of the returns' unit, while λ and its range do not know that unit. They are made for returns with a deviation
    of about 1: normalise rewards. Where σ is 100, λ outweighs F, and steps become short ones along the gradient.

    Attributes:
        head: the critic as a network.
        parameters: those that are trained, by name.
        steps: natural steps.
        products: conjugate-gradient iterations of each.
        fisher_fraction: the part of the rows, drawn at random for every step, on which the Fisher is taken.
        damping: λ, in the units of F: nats per square of a parameter. `fit` adapts it, within the range of `CONTROL`.
        process_group: the processes that learn together.
    """

    head: CriticHead
    parameters: Mapping[str, nn.Parameter]
    steps: int
    products: int
    fisher_fraction: float = 1.0
    damping: float = 0.1
    process_group: dist.ProcessGroup | None = None

    REGION = TrustRegion(radius=0.5, shrink=0.5, max_trials=4)
    CONTROL = LevenbergMarquardt(factor=2.0, minimum=0.05, maximum=1e3)

    def fit(self, observations: Any, returns: Tensor) -> float:
        """Fit to the returns (N,), or (E, T) of sequences.

        Returns:
            The mean squared error after the last step, NaN where something is not finite.
        """
        inputs = self.head.prepare(observations)
        targets = returns.unsqueeze(-1).double()  # so that a small gain keeps its digits
        # In units of the returns' own variance the objective and the radius are the same for every task; λ is not.
        variance = float(moments(returns, self.process_group)[1].clamp(min=1e-8))
        loss = nan
        if not isfinite(variance):
            return loss
        for _ in range(self.steps):
            report = natural_step(
                self.head,
                inputs,
                Gaussian(variance),
                lambda outputs: -0.5 * (outputs - targets).square().mean() / variance,
                learning_rate=1.0,
                trust_region=self.REGION,
                damping=self.damping,
                solver=partial(conjugate_gradient, max_iterations=self.products, rtol=1e-2),
                curvature_inputs=random_part(inputs, self.fisher_fraction),
                objective_curvature=1.0,
                parameters=self.parameters,
                process_group=self.process_group,
            )
            self.damping = self.CONTROL.update(
                report.damping, report.predicted_gain, report.actual_gain, report.accepted
            )
            loss = -2 * variance * (report.objective + (report.actual_gain if report.accepted else 0.0))
        return loss


@contextmanager
def fixed_statistics_of_the_actor(networks: Networks, observations: Any, *, moving: bool) -> Iterator[list[nn.Module]]:
    """Put back at the end all buffers that the actor's outputs depend on, unless they may be ``moving``.

    A policy that is evaluated with other statistics of BatchNorm, or with other vectors of a spectral norm, is another
    policy than the one whose KL was bounded.

    Yields:
        The modules that have them, which belong in evaluation mode while the critic is fitted.
    """
    fixed = [] if moving else _buffers_of_the_actor(networks, observations)
    try:
        yield [module for module, *_ in fixed]
    finally:
        for module, name, buffer, before in fixed:
            overwrite(buffer, before)
            setattr(module, name, buffer)


@contextmanager
def training_mode(policy: ActorCriticPolicy, but: list[nn.Module]) -> Iterator[None]:
    """The policy in training mode, except for some modules; afterwards in evaluation mode."""
    policy.set_training_mode(True)
    for module in but:
        module.training = False
    try:
        yield
    finally:
        policy.set_training_mode(False)


def _buffers_of_the_actor(networks: Networks, observations: Any) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """Module, name, buffer and value of every buffer that the actor's outputs depend on."""
    actor, policy = networks.actor, networks.actor.policy
    if next(policy.buffers(), None) is None:
        return []
    with torch.no_grad(), frozen_statistics(actor), _Reads() as reads:
        actor(actor.prepare(telling(policy, observations)))
    return [
        (module, name, buffer, buffer.clone())
        for module in policy.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        if buffer.numel() and reads.memory.intersection(_memory(buffer))
    ]


def _memory(tensor: Tensor) -> set[int]:
    """Where its elements are; a sparse tensor, which has several places, is taken for one that is read."""
    return {tensor.untyped_storage().data_ptr()} if tensor.layout is torch.strided else {0}


class _Reads(TorchDispatchMode):
    """Notes the memory of every tensor that an operation takes."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: set[int] = {0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = (t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        self.memory.update(*map(_memory, tensors))
        return func(*args, **(kwargs or {}))
