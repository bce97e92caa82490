"""Hybrid actions, a Tuple or a Dict of spaces, as rows of one array: what buffers and policies of actions take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

__all__ = ["FlatActions", "HybridActions", "is_hybrid", "leaves"]

_LARGEST = float(np.finfo(np.float32).max)
_MOST = 2**24  # so many whole numbers float32 has one after the other


def is_hybrid(space: spaces.Space[Any]) -> bool:
    """Whether actions of this space are of several parts, flat or not."""
    return isinstance(space, spaces.Tuple | spaces.Dict | FlatActions)


def leaves(space: spaces.Space[Any], path: str = "action_space") -> Iterator[tuple[str, spaces.Space[Any]]]:
    """The spaces that a Tuple or Dict is made of in the end, in its order, and where they are."""
    if isinstance(space, spaces.Tuple):
        for i, part in enumerate(space.spaces):
            yield from leaves(part, f"{path}[{i}]")
    elif isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            yield from leaves(part, f"{path}[{key!r}]")
    else:
        yield path, space


def _assembled(space: spaces.Space[Any], values: Iterator[Any]) -> Any:
    """An action from its parts, in the order of `leaves`."""
    if isinstance(space, spaces.Tuple):
        return tuple([_assembled(part, values) for part in space.spaces])
    if isinstance(space, spaces.Dict):
        return {key: _assembled(part, values) for key, part in space.spaces.items()}
    return next(values)


def _parts(space: spaces.Space[Any], action: Any, path: str = "action") -> Iterator[Any]:
    """The parts of an action, in the order of `leaves`."""
    if isinstance(space, spaces.Tuple):
        if not isinstance(action, tuple | list) or len(action) != len(space.spaces):
            raise ValueError(f"{path} must be a tuple of {len(space.spaces)} parts for {space}, got {action!r}")
        for i, part in enumerate(space.spaces):
            yield from _parts(part, action[i], f"{path}[{i}]")
    elif isinstance(space, spaces.Dict):
        if not isinstance(action, dict) or action.keys() != space.spaces.keys():
            raise ValueError(f"{path} must be a dict with the keys {list(space.spaces)}, got {action!r}")
        for key, part in space.spaces.items():
            yield from _parts(part, action[key], f"{path}[{key!r}]")
    else:
        yield action


class _Leaf(NamedTuple):
    """A part of an action and the columns that it has."""

    path: str
    space: Any
    columns: slice

    def values(self, rows: NDArray[Any]) -> Any:
        """Of n rows, one value of the space each."""
        space, part = self.space, rows[:, self.columns]
        if isinstance(space, spaces.Discrete):
            return part[:, 0].astype(space.dtype) + space.start
        if isinstance(space, spaces.Box):
            part = np.clip(part, space.low.ravel(), space.high.ravel()).astype(space.dtype)
            return part.reshape(len(rows), *space.shape) if space.shape else [row.reshape(()) for row in part]
        part = part.astype(space.dtype).reshape(len(rows), *space.shape)
        return part + space.start if isinstance(space, spaces.MultiDiscrete) else part

    def row(self, value: Any) -> NDArray[Any]:
        """Its columns for a value of the space."""
        whole = isinstance(self.space, spaces.Discrete | spaces.MultiDiscrete)
        return np.ravel(np.asarray(value) - self.space.start if whole else value)


class FlatActions(spaces.Box):
    """The actions of a Tuple or Dict as vectors: first all choices by their index, then all bits, then all reals.

    A choice is a Discrete space or a component of a MultiDiscrete; it counts from 0, whatever the space's ``start``.
    Bits are those of MultiBinary spaces, and reals those of Boxes. Within each group the parts are in the order of the
    space. The bounds of an unbounded real are those of float32.

    Args:
        nested: a Tuple or Dict of Box, Discrete, MultiDiscrete and MultiBinary, or of such Tuples and Dicts.

    Attributes:
        sizes: how many values each choice has.
        bits: how many there are.
        reals: likewise.

    Raises:
        ValueError: if there is no part, or one of another kind.
    """

    def __init__(self, nested: spaces.Tuple[Any] | spaces.Dict) -> None:
        self.nested = nested
        found = list(leaves(nested))
        counts: list[tuple[int, int, int]] = []
        sizes: list[int] = []
        for path, space in found:
            n = int(np.prod(space.shape or ()))
            if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
                sizes += [int(m) for m in (space.nvec.flat if isinstance(space, spaces.MultiDiscrete) else [space.n])]
                counts.append((n, 0, 0))
            elif isinstance(space, spaces.MultiBinary):
                counts.append((0, n, 0))
            elif isinstance(space, spaces.Box) and space.dtype.kind == "f" and not isinstance(space, FlatActions):
                counts.append((0, 0, n))
            else:
                remedy = "MultiDiscrete" if isinstance(space, spaces.Box) else "one of these"
                raise ValueError(
                    f"{path} is {space}: the parts of an action are Discrete, MultiDiscrete, MultiBinary and Box of "
                    f"floating point, in a Tuple or Dict. Take {remedy}"
                )
            if max(sizes, default=0) > _MOST:
                raise ValueError(f"{path} is {space}: a choice has at most {_MOST} values. Split it in several")
        totals = [sum(column) for column in zip(*counts)] or [0, 0, 0]
        if not sum(totals):
            raise ValueError(f"action_space is {nested}, which has no part: give it one")
        self.sizes, self.bits, self.reals = tuple(sizes), totals[1], totals[2]
        self.leaves: list[_Leaf] = []
        begins = [0, totals[0], totals[0] + totals[1]]
        for (path, space), count in zip(found, counts):
            group = next((i for i, n in enumerate(count) if n), 0)
            self.leaves.append(_Leaf(path, space, slice(begins[group], begins[group] + count[group])))
            begins[group] += count[group]
        low, high = np.zeros(sum(totals), np.float32), np.ones(sum(totals), np.float32)
        high[: len(sizes)] = np.array(sizes, np.float32) - 1
        for leaf in self.leaves:
            if isinstance(leaf.space, spaces.Box):
                for bound, own in ((low, leaf.space.low), (high, leaf.space.high)):
                    bound[leaf.columns] = np.clip(own.ravel().astype(np.float64), -_LARGEST, _LARGEST)
        super().__init__(low, high, dtype=np.float32)

    def unflatten(self, rows: NDArray[Any]) -> list[Any]:
        """Rows (n, D) as n actions of the nested space: in its types, and within its bounds.

        Raises:
            ValueError: if a choice or a bit is none of its values.
        """
        whole = rows[:, : len(self.sizes) + self.bits]
        low, high = self.low[: whole.shape[1]], self.high[: whole.shape[1]]
        if not ((whole == np.rint(whole)) & (whole >= low) & (whole <= high)).all():
            raise ValueError(
                f"the first {whole.shape[1]} columns of flat actions must be whole numbers from {low} to {high}, got "
                f"{whole}"
            )
        values = zip(*[leaf.values(rows) for leaf in self.leaves])
        return [_assembled(self.nested, iter(parts)) for parts in values]

    def flatten(self, action: Any) -> NDArray[np.float32]:
        """An action of the nested space as a vector (D,).

        Raises:
            ValueError: if it has another structure.
        """
        row = np.zeros(self.shape, np.float32)
        for leaf, value in zip(self.leaves, _parts(self.nested, action), strict=True):
            row[leaf.columns] = leaf.row(value)
        return row

    def sample(self, mask: None = None, probability: None = None) -> NDArray[np.float32]:
        """A vector of a sample of the nested space, which depends on the seed of this one."""
        self.nested.seed(int(self.np_random.integers(2**31)))
        return self.flatten(self.nested.sample(mask, probability))

    def __reduce__(self) -> Any:
        return type(self), (self.nested,), {"_np_random": self._np_random}

    def __repr__(self) -> str:
        return f"FlatActions({self.nested})"

    def __eq__(self, other: object) -> bool:
        # Dicts are equal in any order of their keys, and the order is that of the columns.
        return (
            isinstance(other, FlatActions)
            and self.nested == other.nested
            and [leaf.path for leaf in self.leaves] == [leaf.path for leaf in other.leaves]
        )


class HybridActions(VecEnvWrapper):
    """Environments with Tuple or Dict actions, which take vectors of `FlatActions` too.

    Args:
        venv: the environments. They are given a list with an action for each, as Stable-Baselines3's take it.

    Raises:
        ValueError: if their actions are of one part, or have one that is not known; from `step_async`, for an array of
            another shape, or whose choices are none of the space.
    """

    action_space: FlatActions

    def __init__(self, venv: VecEnv) -> None:
        space = venv.action_space
        if not isinstance(space, spaces.Tuple | spaces.Dict):
            raise ValueError(f"the environments have the actions {space}, which are flat: HybridActions is for others")
        super().__init__(venv, action_space=FlatActions(space))

    def reset(self) -> Any:
        """Begin episodes."""
        return self.venv.reset()

    def step_async(self, actions: Any) -> None:
        """Begin a step, with an array (n, D) or n actions of the nested space."""
        if isinstance(actions, np.ndarray) and actions.dtype != object:
            if actions.shape != (self.num_envs, *self.action_space.shape):
                raise ValueError(
                    f"actions must have the shape {(self.num_envs, *self.action_space.shape)} for {self.num_envs} "
                    f"environments with {self.action_space}, got {actions.shape}"
                )
            actions = self.action_space.unflatten(actions)
        elif len(actions) != self.num_envs:
            raise ValueError(f"actions must be {self.num_envs}, one for each environment, got {len(actions)}")
        self.venv.step_async(actions)

    def step_wait(self) -> Any:
        """Finish the step."""
        return self.venv.step_wait()
