"""Small helpers of `shoal.util` and `shoal.experimental` between real processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

import shoal
from shoal.experimental import internal_kv
from shoal.util.metrics import Counter, Gauge, snapshot


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    """Look until it holds: for what no message announces."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


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


def test_metrics_of_all_processes_reach_the_head(local: object) -> None:
    @shoal.remote
    def work(n: int) -> None:
        calls.inc(n, tags={"kind": "task"})

    @shoal.remote
    class Worker:
        def work(self, n: int) -> str:
            calls.inc(tags={"kind": "actor"})
            level.set(n)
            return shoal.get_runtime_context().get_worker_id()

        def leave(self) -> None:
            calls.inc(tags={"kind": "last words"})
            shoal.actor.exit_actor()

    calls, level = Counter("calls", tag_keys=("kind",)), Gauge("level")
    shoal.get([work.remote(n) for n in (1, 2, 3)])
    one, two = Worker.remote(), Worker.remote()
    stays, _ = shoal.get([one.work.remote(8), two.work.remote(9)])
    with pytest.raises(shoal.exceptions.ActorDiedError):
        shoal.get(two.leave.remote())
    calls.inc(tags={"kind": "driver"})

    def there() -> bool:
        samples = snapshot()
        sums = {sample.tags["kind"]: sample.value for sample in samples if sample.name == "calls"}
        gauges = {sample.worker_id: sample.value for sample in samples if sample.name == "level"}
        assert sums["driver"] == 1  # what this process has recorded is there at once
        return sums == {"task": 6, "actor": 2, "last words": 1, "driver": 1} and gauges == {stays: 8}

    assert wait_until(there, 20)
