"""Checks of arguments and data: a mistake is named, with its value or its place, before it can do harm."""

from __future__ import annotations

from math import inf
from numbers import Integral, Real
from types import UnionType
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["flag", "kind", "not_finite", "number", "whole"]


def number(name: str, value: Any, low: float, high: float = inf, *, above: bool = False) -> None:
    """Refuse what is not a finite number in [low, high], or with ``above`` in (low, high].

    Raises:
        TypeError: if ``value`` is not a real number; a truth value is none.
        ValueError: if it is out of the range, or NaN.
    """
    interval = f"{'(' if above else '['}{low}, {high}{')' if high == inf else ']'}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}): give one in {interval}")
    x = float(value)
    if not (x > low or (x == low and not above)) or not (x < high or x == high < inf):
        raise ValueError(f"{name} must lie in {interval}, got {value}")


def whole(name: str, value: Any, low: int, high: float = inf) -> None:
    """Refuse what is not an integer in [low, high]; a float is none, even without a fraction.

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


def not_finite(rows: NDArray[Any]) -> list[int]:
    """The indices of the rows that have an element which is infinite or NaN."""
    if not np.issubdtype(rows.dtype, np.inexact):
        return []
    return np.flatnonzero(~np.isfinite(rows).reshape(len(rows), -1).all(1)).tolist()
