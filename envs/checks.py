"""Values that no environment means: NaN, infinite, or so large that a running statistic would never recover."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

__all__ = ["LARGEST", "check_arrays", "check_values", "unusable"]

LARGEST = 1e18
"""What an observation or a reward has to stay below: the square of more would leave float32."""
_SQUARE = LARGEST**2


def unusable(rows: NDArray[Any]) -> str | None:
    """Which rows, one of each environment, hold such a value, in words; None if none does."""
    if rows.dtype.kind not in "fc" or np.vdot(rows, rows) < _SQUARE:  # NaN is not: one pass for almost every step
        return None
    flat = np.abs(rows.reshape(len(rows), -1))
    for bad, what in ((~np.isfinite(flat), "is not finite"), (flat >= LARGEST, f"is {flat.max():.1e} in size")):
        if bad.any():
            return f"of environment {', '.join(map(str, np.flatnonzero(bad.any(1))))} {what}"
    return None


def check_values(observations: Any, rewards: NDArray[Any] | None, where: str, step: int) -> None:
    """Raise FloatingPointError, which names the environment, for observations or rewards that are `unusable`.

    Args:
        observations: (n, …), or a dictionary of such arrays.
        rewards: (n,), if there are any.
        where: the step is of what.
        step: its number.
    """
    named = observations.items() if isinstance(observations, dict) else (("observation", observations),)
    for name, rows in (*named, ("reward", rewards)):
        if rows is not None and (found := unusable(rows)):
            raise FloatingPointError(f"{name} {found} in step {step} {where}: correct the environment, or wrap it")


def check_arrays(space: spaces.Space[Any], who: str) -> None:
    """Refuse observations of which a part is no array of one shape, such as Text, Sequence or Graph.

    Args:
        space: of the observations.
        who: has them, in the plural.

    Raises:
        ValueError: it names the part.
    """
    for name, part in (space.spaces if isinstance(space, spaces.Dict) else {"": space}).items():
        if part.shape is None and not isinstance(part, spaces.Dict | spaces.Tuple):
            of = f" for {name!r}" if name else ""
            raise ValueError(
                f"{who} have the observations {part}{of}, which are no arrays of one shape: give a Box, Discrete, "
                "MultiDiscrete or MultiBinary, or a Dict of such"
            )
