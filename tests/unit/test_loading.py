"""Errors of unpickling say what was being rebuilt; repeated large arguments are noticed."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from shoal.objects.loading import MOST_BYTES
from shoal.objects.serialization import deserialize, serialize
from shoal.runtime.repeated_arguments import LARGE_BYTES, TIMES, RepeatedArguments


class BadState:
    def __init__(self) -> None:
        self.x = 1

    def __setstate__(self, state: Any) -> None:
        raise LookupError("no such state")


class BadCall:
    def __init__(self, payload: bytes = b"") -> None:
        self.payload = payload

    def __reduce__(self) -> Any:
        return _refuse, (self.payload,)


def _refuse(_payload: bytes) -> None:
    raise RuntimeError("I do not load")


def notes_of(value: Any) -> str:
    flat = serialize(value).flatten()
    with pytest.raises(Exception) as caught:  # each has its own
        deserialize(flat)
    return " ".join(getattr(caught.value, "__notes__", []))


def test_the_object_that_fails_is_named() -> None:
    assert "BadState, whose state is restored" in notes_of([1, {"k": BadState()}])
    assert "test_loading._refuse, which is called" in notes_of((BadCall(), "more"))


def test_it_is_named_in_a_value_with_buffers() -> None:
    assert "_refuse" in notes_of([bytes(1 << 20), BadCall()])


def test_a_module_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ghost: Any = types.ModuleType("ghost")
    ghost.Casper = type("Casper", (), {"__module__": "ghost"})
    monkeypatch.setitem(sys.modules, "ghost", ghost)
    flat = serialize({"boo": ghost.Casper()}).flatten()
    monkeypatch.delitem(sys.modules, "ghost")
    with pytest.raises(ModuleNotFoundError, match="ghost") as caught:
        deserialize(flat)
    assert caught.value.__notes__ == ["unpickling failed at ghost.Casper, which is looked up by name"]


def test_what_is_too_long_to_be_read_twice_keeps_its_error() -> None:
    flat = serialize([list(range(MOST_BYTES // 4)), BadCall()]).flatten()
    assert len(flat) > MOST_BYTES
    with pytest.raises(RuntimeError, match="I do not load") as caught:
        deserialize(flat)
    assert not hasattr(caught.value, "__notes__")


def test_advice_comes_once_and_only_for_what_is_repeated() -> None:
    repeated = RepeatedArguments()
    numbers = list(range(LARGE_BYTES))
    said = [repeated.look("f", serialize(((i, numbers), {}))) for i in range(3 * TIMES)]
    assert [text for text in said if text] == [said[TIMES - 1]]
    assert "put() it once" in said[TIMES - 1]
    for i in range(3 * TIMES):
        assert repeated.look("f", serialize(bytes([i % 256]) * LARGE_BYTES)) == ""
    small = bytes(LARGE_BYTES - 1)
    assert all(repeated.look("f", serialize(small)) == "" for _ in range(3 * TIMES))
