"""Small helpers of `shoal.util` and `shoal.experimental` that need no processes."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

import shoal
from shoal.exceptions import ShoalSystemError
from shoal.experimental import internal_kv
from shoal.objects.serialization import deserialize, serialize, with_serializers
from shoal.runtime import slot
from shoal.runtime.fake import FakeRuntime
from shoal.util import inspect_serializability, logging_once


def test_all_names_of_util_are_there() -> None:
    for name in shoal.util.__all__:
        assert getattr(shoal.util, name) is not None
    assert set(shoal.util.__all__) <= set(dir(shoal.util))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = shoal.util.nothing  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------- serializers


class Holder:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.text = "held"


def test_what_travels_is_said_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_serializability([1, 2], name="numbers") == (True, [])
    assert capsys.readouterr().out == "numbers can be pickled\n"


def test_what_does_not_travel_is_found_with_its_holder() -> None:
    holder, out = Holder(), io.StringIO()
    travels, failures = inspect_serializability({"a": holder}, name="config", print_file=out)
    assert not travels
    (failure,) = failures
    assert failure.obj is holder.lock
    assert failure.parent is holder
    assert failure.name == "config['a'].lock (type Holder)"
    assert "_thread.lock" in out.getvalue()
    assert failure.name in out.getvalue()


def test_registered_serializers_travel_with_code() -> None:
    shoal.util.register_serializer(
        Holder, serializer=lambda holder: holder.text, deserializer=lambda text: text.upper()
    )
    try:
        assert deserialize(serialize(Holder()).flatten()) == "HELD"
        code = serialize(with_serializers(len)).flatten()
        shoal.util.deregister_serializer(Holder)
        with pytest.raises(TypeError, match="lock"):
            serialize(Holder())
        assert with_serializers(len) is len
        assert deserialize(code) is len  # as in a worker, which knows it from now on
        assert deserialize(serialize(Holder()).flatten()) == "HELD"
    finally:
        shoal.util.deregister_serializer(Holder)
    shoal.util.deregister_serializer(Holder)


# ------------------------------------------------------------------------------------------------------------- once


@pytest.fixture
def fresh_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging_once, "_said", {})
    monkeypatch.setattr(logging_once, "_disabled", False)
    monkeypatch.setattr(logging_once, "_period_s", None)


@pytest.mark.usefixtures("fresh_once")
def test_log_once() -> None:
    assert [shoal.util.log_once("a"), shoal.util.log_once("b"), shoal.util.log_once("a")] == [True, True, False]
    shoal.util.disable_log_once_globally()
    assert not shoal.util.log_once("c")
    shoal.util.enable_periodic_logging(0.0)
    assert shoal.util.log_once("c")
    assert shoal.util.log_once("a")


# -------------------------------------------------------------------------------------------------------- key-value


@pytest.fixture
def runtime() -> Iterator[FakeRuntime]:
    slot.current = fake = FakeRuntime()
    yield fake
    slot.current = None


@pytest.mark.usefixtures("runtime")
def test_internal_kv() -> None:
    kv = internal_kv
    assert kv._internal_kv_initialized()
    assert not kv._internal_kv_put("key", "one")
    assert kv._internal_kv_put(b"key", b"two", overwrite=False)
    assert kv._internal_kv_get("key") == b"one"
    assert kv._internal_kv_put("key", b"two")
    assert kv._internal_kv_get(b"key") == b"two"
    assert kv._internal_kv_get("key", namespace="other") is None
    assert not kv._internal_kv_put("key/2", "x", namespace=b"other")
    assert not kv._internal_kv_put("key/1", "x", namespace="other")
    assert kv._internal_kv_list("key", namespace="other") == [b"key/1", b"key/2"]
    assert kv._internal_kv_exists("key/1", namespace="other")
    assert not kv._internal_kv_exists("key/1")
    assert kv._internal_kv_del("key", namespace="other") == 0
    assert kv._internal_kv_del("key", namespace="other", del_by_prefix=True) == 2
    assert kv._internal_kv_del("key") == 1
    with pytest.raises(TypeError, match="the key is bytes or a string, not 3"):
        kv._internal_kv_get(3)  # type: ignore[arg-type]


def test_internal_kv_without_a_connection() -> None:
    assert not internal_kv._internal_kv_initialized()
    with pytest.raises(ShoalSystemError, match=r"call shoal\.init\(\) first"):
        internal_kv._internal_kv_get("key")


def test_modules_of_helpers_are_there_when_asked_for_and_not_before() -> None:
    program = """
import sys, shoal.util
before = [name for name in sys.modules if name.startswith("shoal.util.")]
assert before == ["shoal.util.placement_group"], before
shoal.util.queue.Queue, shoal.util.scheduling_strategies.NodeAffinitySchedulingStrategy
assert callable(shoal.util.placement_group) and not hasattr(shoal.util, "no_such_module")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
