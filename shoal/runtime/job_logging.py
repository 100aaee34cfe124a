"""`init(logging_config=LoggingConfig(...))`: what the root loggers of a driver and of its workers write, and how.

Each record says where it was made: the ids of the job, worker and node, and of the actor and task if there is one. They
are asked for when the record is written, in the thread that logs.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from shoal.log_config import parse_level

if TYPE_CHECKING:
    from shoal.runtime.interface import ContextData

ENCODINGS: Final = ("TEXT", "JSON")
_STANDARD: Final = frozenset(
    ("name", "msg", "args", "levelname", "levelno", "pathname", "filename", "module", "exc_info", "exc_text",
     "stack_info", "lineno", "funcName", "created", "msecs", "relativeCreated", "thread", "threadName", "processName",
     "process", "taskName", "message", "asctime")
)  # fmt: skip


class LoggingConfig(msgspec.Struct, frozen=True):
    """How the root loggers of the driver and of its workers write.

    Args:
        encoding: "TEXT", or "JSON" for one object per line; lines of workers are then shown as they are.
        log_level: of the root loggers.
        additional_log_standard_attrs: further attributes of `logging.LogRecord` to write ("name", "thread").
    """

    encoding: str = "TEXT"
    log_level: str = "INFO"
    additional_log_standard_attrs: Sequence[str] = []

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise ValueError(f"LoggingConfig(encoding=...) is one of {', '.join(ENCODINGS)}, not {self.encoding!r}")
        if not isinstance(self.log_level, str):
            raise TypeError(f"LoggingConfig(log_level=...) is the name of a level, not {self.log_level!r}")
        parse_level(self.log_level)
        unknown = [name for name in self.additional_log_standard_attrs if name not in _STANDARD]
        if unknown:
            raise ValueError(f"LoggingConfig(additional_log_standard_attrs=...): a log record has no {unknown[0]!r}")


def pack(config: LoggingConfig | None) -> str:
    """For the way to the workers; "" for None."""
    return "" if config is None else msgspec.json.encode(config).decode()


def is_json(packed: str) -> bool:
    return bool(packed) and msgspec.json.decode(packed, type=LoggingConfig).encoding == "JSON"


def configure(packed: str, context: Callable[[], ContextData]) -> logging.Handler:
    """Give the root logger a handler on stderr, and its level; returns the handler, for `remove`."""
    config = msgspec.json.decode(packed, type=LoggingConfig)
    root = logging.getLogger()
    handler = _ToStderr()
    handler.setFormatter((_Json if config.encoding == "JSON" else _Text)(config, context))
    root.addHandler(handler)
    root.setLevel(config.log_level.upper())
    return handler


def remove(handler: logging.Handler) -> None:
    root = logging.getLogger()
    root.removeHandler(handler)
    root.setLevel(logging.WARNING)


class _ToStderr(logging.StreamHandler[Any]):
    """Writes to whatever sys.stderr is at the moment."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


class _Formatter(logging.Formatter):
    def __init__(self, config: LoggingConfig, context: Callable[[], ContextData]) -> None:
        super().__init__()
        self._more = tuple(config.additional_log_standard_attrs)
        self._context = context

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """What a record has besides its time, level, place and message."""
        found: dict[str, Any] = _place(self._context)
        found["timestamp_ns"] = int(record.created * 1e9)
        found |= {name: getattr(record, name, None) for name in self._more}
        found |= {name: value for name, value in vars(record).items() if name not in _STANDARD}  # `extra=` of the user
        return found


class _Text(_Formatter):
    def __init__(self, config: LoggingConfig, context: Callable[[], ContextData]) -> None:
        super().__init__(config, context)
        self._style = logging.PercentStyle("%(asctime)s %(levelname)s %(filename)s:%(lineno)d -- %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        fields = " ".join(f"{name}={value}" for name, value in self.fields(record).items())
        return f"{super().formatMessage(record)} {fields}"


class _Json(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "asctime": self.formatTime(record),
            "levelname": record.levelname,
            "message": record.getMessage(),
            "filename": record.filename if hasattr(record, "filename") else "",
            "lineno": record.lineno,
        }
        if record.exc_info:
            entry["exc_text"] = self.formatException(record.exc_info)
        entry |= self.fields(record)
        return json.dumps(entry, default=str)


def _place(context: Callable[[], ContextData]) -> dict[str, Any]:
    try:
        at = context()
    except Exception:  # noqa: BLE001 - a record must not be lost because its place is not known
        return {}
    found: dict[str, Any] = {"job_id": at.job_id.hex(), "worker_id": at.worker_id.hex(), "node_id": at.node_id.hex()}
    if at.actor_id:
        found |= {"actor_id": at.actor_id.hex(), "actor_name": at.actor_name}
    if at.task_id:
        found |= {"task_id": at.task_id.hex(), "task_name": at.task_name, "task_func_name": at.function_name}
    return found
