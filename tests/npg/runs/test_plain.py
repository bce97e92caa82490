import json
import math
import pickle
from collections import deque
from typing import Any

import numpy as np
import pytest

from npg.runs.plain import from_text, is_plain, to_text


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 2**127 - 1, 0.1, math.inf, "ä", [1, [2.5]], (1, (2, [3])), {"array": 1, "b": {"tuple": ()}}],
)
def test_plain_values_come_back(value: Any) -> None:
    again = from_text(to_text(value))
    assert again == value
    assert type(again) is type(value)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint64", "bool", "uint8", ">f4", "complex64"])
def test_arrays_come_back_bit_for_bit(dtype: str) -> None:
    values = np.arange(12).reshape(3, 4).astype(dtype)
    for array in (values, values.T, values[0, 0], np.asarray(values[0, 0]), values[:0]):
        again = from_text(to_text(array))
        assert type(again) is type(array)
        assert again.dtype == array.dtype
        np.testing.assert_array_equal(again, array)
    assert from_text(to_text(np.array([np.nan, -0.0]))).tobytes() == np.array([np.nan, -0.0]).tobytes()


def test_generators_go_on() -> None:
    for kind in (np.random.PCG64, np.random.MT19937, np.random.Philox):
        generator = np.random.Generator(kind(3))
        generator.random(5)
        again = from_text(to_text([generator]))[0]
        np.testing.assert_array_equal(again.random(9), generator.random(9))
    assert from_text(to_text(deque([1, 2]))) == [1, 2]


class Code:
    pass


def test_anything_else_is_refused() -> None:
    for value in (Code(), {1: 2}, [print], np.array([None]), np.array(["x"]), {"a": {Code}}):
        assert not is_plain(value)
        with pytest.raises(TypeError, match="is not plain data"):
            to_text(value)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "\x00",
        '{"unknown": 1}',
        '{"array": "", "dtype": "O", "shape": [], "single": false}',
        '{"array": "AAAA", "dtype": "f8", "shape": [1], "single": false}',
        '{"generator": {"mapping": {"bit_generator": "Popen"}}}',
        json.dumps({"array": pickle.dumps(print).hex(), "dtype": "|V1", "shape": [1], "single": False}),
    ],
)
def test_damaged_text_is_refused_with_one_kind_of_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        from_text(text)
