"""Checks of data: what is not finite is named, with its place, before it can do harm."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from stable_baselines3.common.buffers import RolloutBuffer
from torch import Tensor

from envs.checks import unusable

__all__ = ["all_finite", "device_of", "not_finite_in"]


def device_of(name: str, value: Any) -> torch.device:
    """The device that an option means, whether this machine has it or not; ``"auto"`` is the processor here.

    Raises:
        ValueError: if PyTorch knows none of that name.
    """
    try:
        return torch.device("cpu" if value == "auto" else value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name} must be auto, cpu, cuda or cuda:<number>, got {value!r}") from error


def not_finite_in(buffer: RolloutBuffer, newest: Any) -> str | None:
    """Which rewards or observations of a rollout are not finite or absurdly large, and where; None if none is.

    Args:
        buffer: the rollout, as far as it is filled.
        newest: the observations after it, or None.
    """

    def named(observations: Any) -> list[tuple[str, Any]]:
        return [*observations.items()] if isinstance(observations, dict) else [("observation", observations)]

    # Stable-Baselines3's buffers are flattened once they were read: their steps are not known any more.
    grids = [
        (name, array)
        for name, array in [*named(buffer.observations), ("reward", buffer.rewards)]
        if array.shape[:2] == (buffer.buffer_size, buffer.n_envs)
    ]
    places = [(name, step, array[step]) for step in range(buffer.pos) for name, array in grids]
    if newest is not None:
        places += [(name, buffer.pos, values) for name, values in named(newest)]
    for name, step, values in places:
        if found := unusable(values):
            return f"{name} {found} in step {step} of the rollout: correct the environment, or wrap it"
    return None


def all_finite(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> bool:
    """Whether the parameters, and what the optimizer remembers of them, are finite.

    A gradient whose square overflows leaves finite parameters, which Adam never moves again.
    """
    kept = [t for p in parameters for t in (p, *optimizer.state[p].values()) if isinstance(t, Tensor)]
    here = parameters[0].device  # on a GPU, Adam's step counts are not
    norms = torch._foreach_norm([t.detach() for t in kept if t.is_floating_point() and t.device == here], inf)
    return bool(torch.stack(norms).isfinite().all())
