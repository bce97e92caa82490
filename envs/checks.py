"""Values that no environment means: NaN, infinite, or so large that a running statistic would never recover."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

__all__ = ["LARGEST", "check_arrays", "check_exact", "check_last", "check_values", "is_episode", "unusable"]

LARGEST = 1e18
"""What an observation or a reward has to stay below: the square of more would leave float32."""
_SQUARE = LARGEST**2


def unusable(rows: NDArray[Any]) -> str | None:
    """Which rows, one of each environment, hold such a value, in words; None if none does."""
    bad, what = _found(rows)
    return what and f"of environment {', '.join(map(str, np.flatnonzero(bad.any(1))))} {what}"


def _found(rows: NDArray[Any]) -> tuple[NDArray[np.bool_], str | None]:
    """Where such values are, (n, …), and what is wrong with them."""
    nowhere = np.zeros((len(rows), 1), dtype=np.bool_)
    if rows.dtype.kind not in "fc" or np.vdot(rows, rows) < _SQUARE:  # NaN is not: one pass for almost every step
        return nowhere, None
    flat = np.abs(rows.reshape(len(rows), -1))
    for bad, what in ((~np.isfinite(flat), "is not finite"), (flat >= LARGEST, f"is {flat.max():.1e} in size")):
        if bad.any():
            return bad, what
    return nowhere, None


def check_last(observation: Any, i: int, where: str, step: int) -> None:
    """Raise FloatingPointError if the last observation of an episode of environment ``i`` is `unusable`.

    Args:
        observation: an array, or a dictionary of arrays.
        i: the environment.
        where: the step is of what.
        step: its number.
    """
    for name, part in observation.items() if isinstance(observation, Mapping) else (("", observation),):
        if what := _found(np.asarray(part)[np.newaxis])[1]:
            raise FloatingPointError(
                f"the last observation{name and f' {name!r}'} of environment {i}, whose episode ended in step {step} "
                f"{where}, {what}: correct the environment, or wrap it"
            )


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


def check_exact(values: Any, dtype: np.dtype[Any], what: str) -> None:
    """Raise ValueError for values that a type of whole numbers or of truth values would change, such as 0.5 or 300.

    Args:
        values: of an observation.
        dtype: of its space.
        what: they are, for the message.
    """
    given = np.asarray(values)
    if dtype.kind not in "iub" or given.dtype == dtype:
        return
    with np.errstate(invalid="ignore"):
        kept = given.astype(dtype)
    if (changed := np.asarray(kept != given)).any():
        raise ValueError(
            f"{what} holds {given[changed].flat[0]}, and its space has the type {dtype}, which would make it "
            f"{kept[changed].flat[0]}: correct the observation space, or what is returned"
        )


def is_episode(value: Any) -> bool:
    """Whether ``info["episode"]`` tells of an episode, as Monitor does, or is something else of that name."""
    return isinstance(value, Mapping) and {"r", "l"} <= value.keys()


def check_arrays(space: spaces.Space[Any], who: str) -> None:
    """Refuse observations of which a part is no array of one shape, such as Text, Sequence, Graph or a second Dict.

    Args:
        space: of the observations.
        who: has them, in the plural.

    Raises:
        ValueError: it names the part.
    """
    for name, part in (space.spaces if isinstance(space, spaces.Dict) else {"": space}).items():
        if part is not space and isinstance(part, spaces.Dict | spaces.Tuple):
            raise ValueError(
                f"{who} have the observations {part} for {name!r}, and Stable-Baselines3 takes none of several parts "
                "within a Dict: name its parts in the Dict itself, or wrap the environment in "
                "gymnasium.wrappers.FlattenObservation"
            )
        if part.shape is None and not isinstance(part, spaces.Dict | spaces.Tuple):
            of = f" for {name!r}" if name else ""
            raise ValueError(
                f"{who} have the observations {part}{of}, which are no arrays of one shape: give a Box, Discrete, "
                "MultiDiscrete or MultiBinary, or a Dict of such"
            )
