"""Checks of arguments and data: a mistake is named, with its value or its place, before it can do harm."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from numbers import Integral, Real
from types import UnionType
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from torch import Tensor

from envs.checks import unusable

__all__ = ["all_finite", "flag", "kind", "not_finite_in", "number", "one_of", "positive_or_none", "whole"]


def number(name: str, value: Any, low: float, high: float = inf, *, above: bool = False, below: bool = False) -> None:
    """Refuse what is not a finite number in [low, high]; without low itself if ``above``, without high if ``below``.

    Raises:
        TypeError: if ``value`` is not a real number; True and False are refused.
        ValueError: if it is out of the range, or NaN.
    """
    interval = f"{'(' if above else '['}{low}, {high}{')' if below or high == inf else ']'}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}): give one in {interval}")
    x = float(value)
    if not (x > low or (x == low and not above)) or not (x < high or (x == high < inf and not below)):
        raise ValueError(f"{name} must lie in {interval}, got {value}")


def positive_or_none(name: str, value: Any) -> None:
    """Refuse what is neither None nor a finite number above zero; raises as `number`."""
    if value is not None:
        number(name, value, 0, above=True)


def whole(name: str, value: Any, low: int, high: float = inf) -> None:
    """Refuse what is not an integer in [low, high]; a float is refused, even a whole one.

    Raises:
        TypeError: if ``value`` is not an integer.
        ValueError: if it is out of the range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        remedy = f"give {int(value)}" if isinstance(value, float) and value.is_integer() else f"give an int ≥ {low}"
        raise TypeError(f"{name} must be a whole number, got {value!r} ({type(value).__name__}): {remedy}")
    number(name, value, low, high)


def flag(name: str, value: Any) -> None:
    """Refuse what is not a truth value.

    Raises:
        TypeError: for anything else than True or False; the text ``"false"`` would count as true.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")


def kind(name: str, value: Any, kinds: type | UnionType, what: str) -> None:
    """Refuse what is neither None nor of these ``kinds``, which are ``what`` in words.

    Raises:
        TypeError: for anything else.
    """
    if not (value is None or isinstance(value, kinds)):
        raise TypeError(f"{name} must be {what}, or None, got {value!r} ({type(value).__name__})")


def one_of(name: str, value: Any, known: Sequence[Any]) -> None:
    """Refuse what is not one of a few values.

    Raises:
        ValueError: it names them all; also for a value that has no hash.
    """
    if not any(type(value) is type(k) and value == k for k in known):
        *first, last = map(repr, known)
        raise ValueError(f"{name} must be {', '.join(first)} or {last}, got {value!r}")


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
