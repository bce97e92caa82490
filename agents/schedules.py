"""Settings that change with the remaining progress of a training, which falls from 1 to 0.

A setting is a number, a function of the remaining progress, or RL Zoo's word for one: ``"linear_1e-3"`` falls in a
straight line from 0.001 to 0.

A training is one call of `learn`. What remains is counted after each rollout, up to the end of that call, as
Stable-Baselines3 does: a call with ``reset_num_timesteps=False`` begins with the part of all steps that it adds, and
one of a single rollout is over when its update comes. For a training in pieces take constants, or set the attribute
between the calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor

__all__ = ["first_value", "is_named", "named", "schedule", "value_at"]

_LINEAR = "linear_"


def is_named(value: Any) -> bool:
    """Whether this is the name of a schedule, such as ``"linear_1e-3"``."""
    return isinstance(value, str) and value.startswith(_LINEAR)


def named(first: float) -> str:
    """The name of the schedule that falls from this value to 0: ``"linear_0.001"``."""
    return f"{_LINEAR}{first!r}"


def first_value(name: str, value: Any) -> Any:
    """The value with which the schedule of this name begins; anything else as it is.

    Raises:
        ValueError: as `schedule`.
    """
    return value_at(schedule(name, value), 1.0) if is_named(value) else value


def schedule(name: str, value: Any) -> Any:
    """The function behind the name of a schedule; anything else as it is.

    Raises:
        ValueError: if what follows ``linear_`` is no number.
    """
    if not is_named(value):
        return value
    try:
        return LinearSchedule(float(value.removeprefix(_LINEAR)), 0.0, 1.0)
    except ValueError:
        raise ValueError(
            f"{name} must be a number, or linear_ and a number, such as linear_1e-3, got {value!r}"
        ) from None


def value_at(given: float | Callable[[float], Any], remaining: float) -> Any:
    """The number that a setting, or its schedule, is at this remaining progress."""
    value = given(remaining) if callable(given) else given
    return value.item() if isinstance(value, Tensor) else value
