"""Values that no environment means: NaN, infinite, or so large that a running statistic would never recover."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LARGEST", "check_values", "unusable"]

LARGEST = 1e18
"""What an observation or a reward has to stay below: the square of more would leave float32."""


def unusable(rows: NDArray[Any]) -> str | None:
    """Which rows, one of each environment, hold such a value, in words; None if none does."""
    if not np.issubdtype(rows.dtype, np.inexact) or np.vdot(rows, rows) < LARGEST**2:  # NaN is not
        return None
    flat = np.abs(rows.reshape(len(rows), -1))
    for bad, what in ((~np.isfinite(flat), "is not finite"), (flat >= LARGEST, f"is {flat.max():.1e} in size")):
        if bad.any():
            return f"of environment {', '.join(map(str, np.flatnonzero(bad.any(1))))} {what}"
    return None


def check_values(values: Any, where: str) -> None:
    """Raise FloatingPointError, which names the environment, for observations or named arrays that are `unusable`."""
    for name, rows in values.items() if isinstance(values, dict) else [("observation", values)]:
        if found := unusable(rows):
            raise FloatingPointError(f"{name} {found} in {where}: correct the environment, or wrap it")
