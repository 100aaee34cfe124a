"""Small helpers of `shoal.util` and `shoal.experimental` between real processes."""

from __future__ import annotations

import threading

import shoal
from shoal.experimental import internal_kv


class Locked:
    def __init__(self, text: str) -> None:
        self.lock = threading.Lock()
        self.text = text


def test_a_registered_serializer_acts_in_workers_too(local: object) -> None:
    shoal.util.register_serializer(Locked, serializer=lambda one: one.text, deserializer=Locked)
    try:

        @shoal.remote
        def make(text: str) -> Locked:
            return Locked(text)

        @shoal.remote
        class Keeper:
            def echo(self, one: Locked) -> list[Locked]:
                return [one, Locked(one.text + "!")]

        made = make.remote("a")
        assert shoal.get(made).text == "a"
        keeper = Keeper.remote()
        assert [one.text for one in shoal.get(keeper.echo.remote(made))] == ["a", "a!"]
        assert [one.text for one in shoal.get(keeper.echo.remote(Locked("b")))] == ["b", "b!"]
    finally:
        shoal.util.deregister_serializer(Locked)


def test_the_key_value_store_is_shared(local: object) -> None:
    @shoal.remote
    def swap(key: str, value: bytes) -> bytes | None:
        before = internal_kv._internal_kv_get(key, namespace="test")
        internal_kv._internal_kv_put(key, value, namespace="test")
        return before

    internal_kv._internal_kv_put("color", b"red", namespace="test")
    assert shoal.get(swap.remote("color", b"blue")) == b"red"
    assert internal_kv._internal_kv_get("color", namespace="test") == b"blue"
    assert internal_kv._internal_kv_del("", del_by_prefix=True, namespace="test") == 1
