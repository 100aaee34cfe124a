"""Users' metrics: what is recorded, what is refused, and how the head adds it up."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

from shoal.control.messages import MetricRow
from shoal.control.metrics import MAX_LABEL_CHARS, MetricTable
from shoal.runtime import slot
from shoal.runtime.fake import FakeRuntime
from shoal.util import metrics
from shoal.util.metrics import Counter, Gauge, Histogram, snapshot


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRuntime]:
    monkeypatch.setattr(metrics, "_recorder", metrics._Recorder())
    slot.current = fake = FakeRuntime()
    yield fake
    slot.current = None


@pytest.mark.usefixtures("runtime")
def test_what_is_recorded_is_added_up() -> None:
    calls = Counter("calls", "how many", tag_keys=("route", "code"))
    calls.set_default_tags({"code": "200"})
    for route in ("/a", "/a", "/b"):
        calls.inc(tags={"route": route})
    calls.inc(2.5, tags={"route": "/a", "code": "500"})
    size = Gauge("size")
    size.set(3)
    size.set(-1)
    times = Histogram("times", boundaries=[0.1, 1])
    for value in (0.05, 0.1, 0.5, 7):
        times.observe(value)
    rows = snapshot()
    assert [(row.kind, row.name, row.tags, row.value) for row in rows] == [
        ("counter", "calls", {"route": "/a", "code": "200"}, 2),
        ("counter", "calls", {"route": "/b", "code": "200"}, 1),
        ("counter", "calls", {"route": "/a", "code": "500"}, 2.5),
        ("gauge", "size", {}, -1),
        ("histogram", "times", {}, 7.65),
    ]
    assert (rows[4].boundaries, rows[4].buckets) == ([0.1, 1.0], [2, 1, 1])
    assert rows[3].worker_id == b"me".hex()
    calls.inc(tags={"route": "/b"})
    times.observe(1)
    again = {(row.name, *row.tags.values()): row for row in snapshot()}
    assert again["calls", "/b", "200"].value == 2
    assert again["times",].buckets == [2, 2, 1]


def test_what_is_recorded_before_a_connection_is_reported_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_recorder", metrics._Recorder())
    early = Counter("early")
    early.inc()
    slot.current = FakeRuntime()
    try:
        early.inc()
        assert [row.value for row in snapshot()] == [2]
    finally:
        slot.current = None


def test_a_process_keeps_a_bounded_number_of_series(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_PENDING", 2)
    many = Counter("many", tag_keys=("n",))
    for n in ("1", "2", "3", "1"):
        many.inc(tags={"n": n})
    assert [(row.tags["n"], row.value) for row in snapshot()] == [("1", 2), ("2", 1)]


@pytest.mark.usefixtures("runtime")
def test_metrics_travel() -> None:
    gauge = Gauge("g", "text", tag_keys=("a",))
    gauge.set_default_tags({"a": "b"})
    for metric in (gauge, Histogram("h", "text", [1, 2], ("k",)), Counter("c")):
        assert pickle.loads(pickle.dumps(metric)).info == metric.info
    assert gauge.info == {"name": "g", "description": "text", "tag_keys": ("a",), "default_tags": {"a": "b"}}


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Counter(3), TypeError, "the name of a metric is a string, not 3"),
        (lambda: Counter(""), ValueError, "not empty"),
        (lambda: Counter("c", 3), TypeError, "the description of metric c is a string"),
        (lambda: Counter("c", tag_keys="abc"), TypeError, "tag_keys of metric c is a tuple of strings"),
        (lambda: Counter("c", tag_keys=(1,)), TypeError, "tag_keys of metric c is a tuple of strings"),
        (lambda: Counter("c").inc(0), ValueError, "counter c grows by numbers above 0, not by 0"),
        (lambda: Counter("c").inc(-1), ValueError, "not by -1"),
        (lambda: Counter("c").inc("x"), TypeError, "metric c takes a number, not 'x'"),
        (lambda: Counter("c").inc(tags={"a": "b"}), ValueError, "metric c has no tag 'a'; it has no tags"),
        (lambda: Counter("c", tag_keys=("a",)).inc(), ValueError, "metric c needs a value for its tag 'a'"),
        (lambda: Counter("c", tag_keys=("a",)).inc(tags={"a": 1}), TypeError, "tag 'a' of metric c is a string"),
        (lambda: Counter("c", tag_keys=("a",)).set_default_tags({"b": ""}), ValueError, "no tag 'b'; it has a"),
        (lambda: Gauge("g").set(None), TypeError, "metric g takes a number"),
        (lambda: Histogram("h"), ValueError, "histogram h needs boundaries"),
        (lambda: Histogram("h", boundaries=[0, 1]), ValueError, "above 0 and ascending"),
        (lambda: Histogram("h", boundaries=[2, 1]), ValueError, "above 0 and ascending"),
        (lambda: Histogram("h", boundaries=[1, "x"]), TypeError, "metric h takes a number"),
    ],
)
def test_what_is_wrong_is_said(make: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()  # type: ignore[operator]


# ---------------------------------------------------------------------------------------------------------- the head


def test_the_head_adds_up_processes_and_forgets_the_gauges_of_those_that_are_gone() -> None:
    table = MetricTable(10)
    for worker in (b"a", b"b"):
        table.report(1, worker, [MetricRow("counter", "c", value=1), MetricRow("gauge", "g", value=5)])
    table.report(2, b"c", [MetricRow("gauge", "g", value=7)])
    assert [(row.name, row.value, row.worker_id) for row in table.rows()] == [
        ("c", 2, b""), ("g", 5, b"a"), ("g", 5, b"b"), ("g", 7, b"c"),
    ]  # fmt: skip
    table.process_gone(1, b"a")
    table.process_gone(1, b"unknown")
    table.node_gone(2)
    assert [(row.name, row.value, row.worker_id) for row in table.rows()] == [("c", 2, b""), ("g", 5, b"b")]


def test_the_head_is_bounded() -> None:
    table = MetricTable(2)
    table.report(1, b"w", [MetricRow("counter", f"c{i}", value=1) for i in range(5)])
    table.report(1, b"w", [MetricRow("counter", "c1", value=1)])
    assert (len(table), table.dropped) == (2, 3)
    assert [row.value for row in table.rows()] == [1, 2]
    other = MetricTable(2)
    other.report(1, b"w", [MetricRow("counter", "c" * (MAX_LABEL_CHARS + 1))])
    assert (len(other), other.dropped) == (0, 1)


def test_a_histogram_of_another_shape_is_another_series() -> None:
    table = MetricTable(10)
    table.report(1, b"w", [MetricRow("histogram", "h", boundaries=[1.0], buckets=[1, 0], value=1)])
    table.report(1, b"w", [MetricRow("histogram", "h", boundaries=[2.0], buckets=[0, 1], value=3)])
    table.report(1, b"w", [MetricRow("histogram", "h", boundaries=[2.0], buckets=[1, 1], value=3)])
    table.report(1, b"w", [MetricRow("histogram", "h", boundaries=[2.0], buckets=[1], value=3)])  # makes no sense
    assert [row.buckets for row in table.rows()] == [[1, 0], [1, 2]]
