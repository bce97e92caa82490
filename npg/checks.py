"""Checks of arguments: a mistake is named, with its value and the remedy, before it can do harm."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from numbers import Integral, Real
from types import UnionType
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["flag", "kind", "number", "one_of", "positive_or_none", "require", "whole"]


def require(ok: bool, name: str, value: object, wanted: str) -> None:
    """Raise ValueError, "``name`` must be ``wanted``; got ``value``", unless ``ok``."""
    if not ok:
        raise ValueError(f"{name} must be {wanted}; got {value!r}")


def number(name: str, value: Any, low: float, high: float = inf, *, above: bool = False, below: bool = False) -> None:
    """Refuse what is not a finite number in [low, high]; without low itself if ``above``, without high if ``below``.

    A tensor of one element is a number.

    Raises:
        TypeError: if ``value`` is not a real number; True and False are refused.
        ValueError: if it is out of the range, or NaN.
    """
    interval = f"{'(' if above else '['}{low}, {high}{')' if below or high == inf else ']'}"
    scalar = isinstance(value, Tensor) and value.numel() == 1
    if isinstance(value, bool) or not (scalar or isinstance(value, Real)):
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
    if high == inf and value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
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
