"""The one cache of traced programs, and the one rule of when a shape is worth a trace."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

__all__ = ["Cache"]

P = TypeVar("P")
R = TypeVar("R")

_PROGRAMS = 8  # kept for each owner
_SHAPES = 64  # counted for each owner
_IN_A_ROW = 3  # the same shape so often, one after the other, is here to stay
_FUNCTIONS = (FunctionType, partial)
_PAYS = 32  # a trace takes about as long as so many steps without one


@dataclass
class _Shape(Generic[P]):
    """What is known of one shape: its program, if any, and how often it must come until the next trace."""

    wait: int
    step: int  # the unit of the next waits
    program: P | None = None
    traces: int = 0


@dataclass
class _History(Generic[P]):
    """The shapes that came to one owner, the one used last at the end."""

    shapes: dict[Hashable, _Shape[P]] = field(default_factory=dict)
    last: Hashable = None
    times: int = 0  # that the last one came in a row


class Cache(Generic[P]):
    """Programs by owner (a model) and key (the shapes of its tensors, and all else that a trace depends on).

    **When a shape is traced.** A trace costs some tens of steps, so its shape must come often enough to pay for it. The
    first shape of an owner is traced at once; that of a function when it comes for the second time, since many a
    function, such as a lambda, is made anew in each step. Another one is traced when it comes for the third time in a
    row, or for the 32nd time in all: a new batch size is here to stay, one length among many is not. A program that was
    found wrong is dropped, and traced anew at once; for the trace after that the shape has to come 2 times more, then
    6, 14, … times (32 times as often for one that had to come 32 times): what changes in every step has few traces. A
    trace that gives the same program again does not count: then what looked wrong was rounding.

    The 8 programs used most recently are kept for each owner, and the counts of 64 shapes. Owners are not kept alive.
    What cannot be hashed or weakly referenced has no programs.

    Args:
        confirms: whether a program, its first argument, shows that one which was just dropped was right all the same.
            Such a trace does not count.
        every_shape: trace each shape when it first comes, since what is asked for once is used many times.
    """

    def __init__(self, confirms: Callable[[P, P], bool] | None = None, *, every_shape: bool = False) -> None:
        self._confirms, self._every_shape = confirms, every_shape
        self._owners: WeakKeyDictionary[Any, dict[Any, _History[P]]] = WeakKeyDictionary()

    def kept(self, owner: Any) -> list[P]:
        """The programs of an owner and its methods, the one used last at the end."""
        histories = self._owners.get(owner, {}).values()
        return [s.program for history in histories for s in history.shapes.values() if s.program is not None]

    def use(self, owner: Any, key: Hashable, trace: Callable[[], P], attempt: Callable[[P], tuple[R, str]]) -> R | None:
        """What ``attempt`` makes of the kept program, or of a new one; None where there is none yet.

        Args:
            owner: what the programs belong to, an object or one method of it.
            key: all that a program depends on.
            trace: makes a program.
            attempt: program ↦ result, and in what it differs from what is right: "" if in nothing. A program is used
                after it differed in nothing, here and now.

        Raises:
            RuntimeError: with the difference, if it is that of a program traced just now.
            Exception: whatever ``trace`` and ``attempt`` raise.
        """
        held, method = (owner.__self__, owner.__func__) if isinstance(owner, MethodType) else (owner, None)
        try:
            history = self._owners.setdefault(held, {}).setdefault(method, _History())
        except TypeError:
            return None
        history.times = history.times + 1 if key == history.last else 1
        history.last = key
        shapes, in_a_row = history.shapes, history.times >= _IN_A_ROW
        shape = shapes.pop(key, None)
        if shape is None:
            at_once = self._every_shape or not (shapes or isinstance(held, _FUNCTIONS))
            shape = _Shape(0, 1) if at_once else _Shape(_PAYS - 1, _PAYS) if shapes else _Shape(1, 1)
        shapes[key] = shape
        while len(shapes) > _SHAPES:
            del shapes[next(iter(shapes))]
        if in_a_row and not shape.traces:
            shape.wait, shape.step = 0, 1
        due = shape.wait <= 0
        shape.wait -= 1
        former = shape.program
        if former is not None:
            result, difference = attempt(former)
            if not difference:
                return result
            shape.program = None
        if not due:
            return None
        shape.traces += 1
        shape.wait = shape.step * (2**shape.traces - 2)
        program = trace()
        result, difference = attempt(program)
        if difference:
            raise RuntimeError(difference)
        if former is not None and self._confirms is not None and self._confirms(program, former):
            shape.traces -= 1
            shape.wait = 0
        shape.program = program
        for other in [s for s in shapes.values() if s.program is not None][:-_PROGRAMS]:
            other.program = None
        return result
