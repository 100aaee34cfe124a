"""Functions that are pickled once for many calls."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest

from shoal.util.functions import is_importable, pack


def travel(value: Any) -> Any:
    return pickle.loads(cloudpickle.dumps(value))


def in_main(function: Callable[..., Any]) -> Callable[..., Any]:
    """As if it stood in the user's script: no process can import it."""
    function.__module__ = "__main__"
    return function


def test_a_function_of_main_is_pickled_once_and_unpickled_once() -> None:
    function = in_main(lambda x, y=2: x + y)
    packed = pack(function)
    assert packed is not function
    assert pack(function) is packed
    assert travel(packed)(1) == 3
    assert travel(packed) is travel(packed)


@pytest.mark.parametrize("function", [len, Counter, Counter.most_common, cloudpickle.dumps, "x".join])
def test_what_has_a_name_or_holds_something_travels_as_it_is(function: Callable[..., Any]) -> None:
    assert pack(function) is function


def test_closures_and_large_functions_are_not_kept() -> None:
    def make(n: int) -> Callable[[], int]:
        return lambda: n

    closure = make(1)
    assert pack(closure) is closure
    large = in_main(lambda x=bytes(range(256)) * 400: x)
    assert pack(large) is large


def test_what_is_importable() -> None:
    assert is_importable(len)
    assert is_importable(Counter.most_common)
    assert not is_importable(in_main(lambda: None))
    assert not is_importable(lambda: 1)
    assert not is_importable("x".join)
