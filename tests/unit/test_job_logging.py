"""`LoggingConfig`: what it accepts, and what the root logger then writes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from shoal import LoggingConfig
from shoal.runtime import job_logging
from shoal.runtime.interface import ContextData

PLACE = ContextData(b"\1", b"\2", b"\3", task_id=b"\4", task_name="work", function_name="m.work")


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield root
    root.setLevel(level)
    root.handlers[:] = handlers


def test_text_lines_say_where_they_come_from(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    config = LoggingConfig(log_level="warning", additional_log_standard_attrs=["name"])
    handler = job_logging.configure(job_logging.pack(config), lambda: PLACE)
    logger = logging.getLogger("app")
    logger.info("not this")
    logger.warning("hello %s", "you", extra={"shard": 3})
    job_logging.remove(handler)
    logger.error("not this either")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "hello" in line]
    before, _, after = line.partition(" -- ")
    assert before.endswith(f"WARNING {__name__.rpartition('.')[2]}.py:{before.rpartition(':')[2]}")
    fields = dict(part.split("=") for part in after.removeprefix("hello you ").split())
    assert fields.pop("timestamp_ns").isdigit()
    assert fields == {
        "job_id": "01", "worker_id": "03", "node_id": "02", "task_id": "04", "task_name": "work",
        "task_func_name": "m.work", "name": "app", "shard": "3",
    }  # fmt: skip


def test_json_lines_are_objects(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    def lost() -> ContextData:
        raise RuntimeError("not connected")

    packed = job_logging.pack(LoggingConfig(encoding="JSON"))
    assert job_logging.is_json(packed)
    job_logging.configure(packed, lost)
    try:
        raise KeyError("x")
    except KeyError:
        logging.getLogger("app").exception("it\nfailed", extra={"odd": {1}})
    entry = json.loads(capsys.readouterr().err)
    assert (entry["levelname"], entry["message"], entry["odd"]) == ("ERROR", "it\nfailed", "{1}")
    assert entry["exc_text"].endswith("KeyError: 'x'")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"encoding": "XML"}, ValueError, r"LoggingConfig\(encoding=...\) is one of TEXT, JSON, not 'XML'"),
        ({"log_level": "loud"}, ValueError, "no such log level: 'loud'"),
        ({"log_level": 10}, TypeError, "is the name of a level, not 10"),
        ({"additional_log_standard_attrs": ["nmae"]}, ValueError, "a log record has no 'nmae'"),
    ],
)
def test_wrong_arguments(options: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        LoggingConfig(**options)  # type: ignore[arg-type]


def test_nothing_is_packed_for_nothing() -> None:
    assert job_logging.pack(None) == ""
    assert not job_logging.is_json("")
