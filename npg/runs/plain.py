"""Plain data as JSON text and back: numbers, words, lists, mappings, arrays and random generators. It runs no code."""

from __future__ import annotations

import base64
import json
from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["from_text", "is_plain", "to_text"]

_SIMPLE = (bool, int, float, str, type(None))


def is_plain(value: Any) -> bool:
    """Whether `to_text` takes it."""
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind in "biufc"
    if type(value) in (dict, OrderedDict):
        return all(isinstance(key, str) and is_plain(inner) for key, inner in value.items())
    if type(value) in (list, tuple, deque):
        return all(map(is_plain, value))
    return type(value) in (*_SIMPLE, np.random.Generator)


def to_text(value: Any) -> str:
    """The text of plain data. Arrays keep their bytes and generators their states; a deque becomes a list,
    and an ordered mapping a mapping.

    Raises:
        TypeError: it holds anything else.
    """
    return json.dumps(_marked(value))


def from_text(text: str | bytes) -> Any:
    """The data of a text that `to_text` wrote.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return _unmarked(json.loads(text))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not what was written ({error})") from error


def _marked(value: Any) -> Any:
    if not is_plain(value):
        raise TypeError(f"{type(value).__name__} is not plain data: {value!r}")
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        content = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
        return {"array": content, "dtype": array.dtype.str, "shape": array.shape, "single": array is not value}
    if isinstance(value, np.random.Generator):
        return {"generator": _marked(value.bit_generator.state)}
    if isinstance(value, tuple):
        return {"tuple": [_marked(inner) for inner in value]}
    if isinstance(value, Mapping):
        return {"mapping": {key: _marked(inner) for key, inner in value.items()}}
    if isinstance(value, list | deque):
        return [_marked(inner) for inner in value]
    return value


def _unmarked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unmarked(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if "array" in value:
        dtype = np.dtype(value["dtype"])
        if dtype.kind not in "biufc":
            raise ValueError(f"arrays of {dtype} are not plain data")
        array = np.frombuffer(base64.b64decode(value["array"]), dtype).reshape(value["shape"]).copy()
        return array[()] if value["single"] else array
    if "generator" in value:
        state = _unmarked(value["generator"])
        if state["bit_generator"] not in _BIT_GENERATORS:
            raise ValueError(f"unknown generator {state['bit_generator']!r}")
        generator = np.random.Generator(_BIT_GENERATORS[state["bit_generator"]]())
        generator.bit_generator.state = state
        return generator
    if "tuple" in value:
        return tuple(_unmarked(inner) for inner in value["tuple"])
    return {key: _unmarked(inner) for key, inner in value["mapping"].items()}


_BIT_GENERATORS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
}
