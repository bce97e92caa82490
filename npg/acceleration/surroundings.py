"""What a trace takes for constant though it is no tensor: attributes, closures, globals; and whether that has changed.

A program takes parameters, buffers and inputs as arguments. All else that a model's Python code reads is written into
it as it was. The numbers of the next batch show a large change. A small one, as in annealing a temperature, is within
what rounding may do, so it is looked for where it is made:

* in the attributes of modules and of the objects that they hold, lists and dicts among them;
* in the closures and globals that the model's own code names, and in its class attributes.

Numbers and strings are compared by value, all else by identity, and tensors by their version too. Installed packages
are taken for constant, and so are the elements of NumPy arrays.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from numbers import Number
from operator import itemgetter
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

__all__ = ["Surroundings"]

_PLAIN = (Number, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_LARGEST = 1000  # elements of a container that is compared by value
_PLACES = 5000  # that are looked at
_ARGUMENTS = {"_parameters", "_buffers"}  # of a module: what a program takes anew in every call
_nothing = object()


class Surroundings:
    """The attributes, closures and globals of a model as they are now. Nothing of it is kept alive.

    Args:
        model: a module, a function, a method, or any object that can be called.
        without: the paths of what has no part in the program.
    """

    def __init__(self, model: Any, without: frozenset[str] = frozenset()) -> None:
        self.without = without
        self._places: list[_Place] = []
        self._seen: set[int] = set()
        self._walk(type(model).__name__, model)

    def changes(self) -> frozenset[str]:
        """The paths of what is no more as it was."""
        found = frozenset(path for place in self._places for path in place.changes())
        return frozenset(path for path in found if not self._is_without(path)) if found else found

    def _is_without(self, path: str) -> bool:
        return any(path == other or path.startswith(f"{other}.") for other in self.without)

    def _walk(self, path: str, value: Any, get: Callable[[], Any] | None = None) -> None:
        """Look at what is behind ``value``: a container, where ``get`` finds it, or what holds itself."""
        if id(value) in self._seen or len(self._places) >= _PLACES:
            return
        self._seen.add(id(value))
        if isinstance(value, (list, tuple, dict)):
            if get is not None:
                self._look_at(path, get, value if isinstance(value, dict) else range(len(value)), whole=True)
        elif isinstance(value, MethodType):
            self._walk(path, value.__self__)
            self._walk(path, value.__func__)
        elif isinstance(value, partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._walk(path, part)
        elif isinstance(value, FunctionType):
            if _is_own(value.__module__, value.__code__.co_filename):
                self._function(value)
        elif not isinstance(value, (type, ModuleType)):
            own = _is_own_class(type(value))
            if isinstance(value, nn.Module) or (own and hasattr(value, "__dict__")):
                skipped = _ARGUMENTS if isinstance(value, nn.Module) else set()
                self._look_at(
                    path, partial(_attributes, ref(value)), [k for k in vars(value) if k not in skipped], whole=True
                )
            if own:
                self._class(type(value))

    def _function(self, function: FunctionType) -> None:
        names, there = set(_names(function.__code__)), ref(function)
        path = f"{function.__module__}.{function.__qualname__}"
        self._look_at(path, partial(_cells, there), _cells(there) or ())
        held = function.__globals__
        self._look_at(function.__module__, partial(_globals, there), names & held.keys())
        for name in names & held.keys():
            found = held[name]
            if isinstance(found, ModuleType) and _is_own(found.__name__, getattr(found, "__file__", None)):
                self._look_at(found.__name__, partial(_attributes, ref(found)), names & vars(found).keys())
            elif isinstance(found, type) and _is_own_class(found):
                self._look_at(found.__qualname__, partial(_attributes, ref(found)), names & vars(found).keys())

    def _class(self, cls: type) -> None:
        """Its functions that a call leads to, and the attributes that they name."""
        own = [base for base in cls.__mro__ if _is_own_class(base)]
        if id(cls) in self._seen:
            return
        self._seen.add(id(cls))
        names, new = set[str](), {"forward", "__call__"}
        while new:
            names |= new
            found = [vars(base)[name] for base in own for name in new & vars(base).keys()]
            functions = [getattr(f, "fget", None) or getattr(f, "__func__", f) for f in found]
            new = {n for f in functions if isinstance(f, FunctionType) for n in _names(f.__code__)} - names
        for base in own:
            self._look_at(base.__qualname__, partial(_attributes, ref(base)), names & vars(base).keys())

    def _look_at(self, path: str, get: Callable[[], Any], keys: Iterable[Any], *, whole: bool = False) -> None:
        """Remember a mapping or sequence, for a ``whole`` one its size too, and look at what is behind its elements."""
        held = get()
        plain: dict[Any, Any] = {}
        others: list[tuple[Any, Callable[[], Any], int | None]] = []
        for key in keys:
            value = held[key]
            if _is_plain(value):
                plain[key] = _copy(value)
            elif isinstance(value, (list, tuple, dict)):  # another one with the same elements is the same
                self._walk(f"{path}.{key}", value, partial(_element, get, key))
            else:
                counted = isinstance(value, Tensor) and not value.is_inference()
                others.append((key, _reference(value), value._version if counted else None))
                self._walk(f"{path}.{key}", value)
        if plain or others or whole:
            keys = [*plain, next(iter(plain))] if plain else []  # of one key alone the getter gives no tuple
            pick, values = (itemgetter(*keys) if keys else None), tuple(plain[key] for key in keys)
            self._places.append(_Place(path, get, len(held) if whole else None, pick, keys, values, others))


class _Place(NamedTuple):
    """A mapping or sequence that the model's code may read, and what is expected in it.

    Attributes:
        path: its name.
        get: it as it is now; None where it is no more.
        size: how many elements it has; None where others may come.
        pick: numbers, strings and the like out of it.
        keys: their keys, the first of which stands at the end once more.
        values: what they were.
        others: key, weak reference and version of all else.
    """

    path: str
    get: Callable[[], Any]
    size: int | None
    pick: Callable[[Any], Any] | None
    keys: list[Any]
    values: tuple[Any, ...]
    others: list[tuple[Any, Callable[[], Any], int | None]]

    def changes(self) -> Iterator[str]:
        """The paths of what is no more as it was."""
        held = self.get()
        if held is None:
            yield self.path
            return
        if self.size is not None and len(held) != self.size:
            yield f"{self.path}.*"
        try:
            if self.pick is not None and self.pick(held) != self.values:
                differ = (k for k, v in zip(self.keys, self.values) if held[k] is not v and held[k] != v)
                yield from (f"{self.path}.{key}" for key in differ)
            for key, there, version in self.others:
                now = held[key]
                if now is not there() or (version is not None and now._version != version):
                    yield f"{self.path}.{key}"
        except LookupError:  # it has fewer than it had
            yield f"{self.path}.*"


# ---------------------------------------------------------------------------------------------- how to get at it again


def _attributes(there: Callable[[], Any]) -> Mapping[str, Any] | None:
    owner = there()
    return None if owner is None else vars(owner)


def _globals(there: Callable[[], Any]) -> Mapping[str, Any] | None:
    function = there()
    return None if function is None else function.__globals__


def _cells(there: Callable[[], Any]) -> dict[str, Any] | None:
    """What a closure holds; an empty cell holds nothing."""
    function, found = there(), {}
    if function is None:
        return None
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            found[name] = cell.cell_contents
        except ValueError:
            continue
    return found


def _element(get: Callable[[], Any], key: Any) -> Any:
    """A container within another."""
    held = get()
    try:
        found = None if held is None else held[key]
    except LookupError:
        return None
    return found if isinstance(found, (list, tuple, dict)) else None


def _reference(value: Any) -> Callable[[], Any]:
    try:
        return ref(value)
    except TypeError:  # few have no weak references, functions written in C among them
        return lambda: value


# -------------------------------------------------------------------------------------------------------- what is what


def _is_plain(value: Any, most: int = _LARGEST) -> bool:
    """Whether it is a number, a string or the like, or a small container of such."""
    if isinstance(value, _PLAIN):
        return True
    if not isinstance(value, (list, tuple, dict, set, frozenset)) or len(value) > most:
        return False
    elements = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return all(_is_plain(element, most // 10) for element in elements)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(map(_copy, value))
    return value


def _names(code: CodeType) -> Iterator[str]:
    """The names of globals and attributes in a function, and in those within it."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


@cache
def _is_own(module: str | None, file: str | None) -> bool:
    """Whether code is neither Python's, nor of an installed package, nor of this one."""
    root = (module or "").partition(".")[0]
    if root == "__main__":
        return True
    installed = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    return (
        file is not None
        and root not in (__name__.partition(".")[0], *sys.stdlib_module_names)
        and not file.startswith((*installed, "<frozen"))
        and not {"site-packages", "dist-packages"} & set(Path(file).parts)
    )


def _is_own_class(cls: type) -> bool:
    return _is_own(cls.__module__, getattr(sys.modules.get(cls.__module__), "__file__", None))
