"""Where our own processes write what they have to say: one rotated file per process in the node's log folder.

A process of ours (supervisor, control, agent) owns its root logger; a driver or worker runs somebody else's program,
whose logging is not ours to touch: there only the logger "shoal" gets a handler, and its records stay out of the root.
Files are opened by one process each: rotation by two processes of one file loses lines.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from typing import Any, Final

MAX_FILE_BYTES: Final = 64 << 20
FILES_KEPT: Final = 3
"""Per process at most 4 x 64 MiB: days of INFO lines, and little against what workers print."""

FORMAT: Final = "%(asctime)s.%(msecs)03d %(levelname)-7s %(process)d %(name)s: %(message)s"
TIME_FORMAT: Final = "%Y-%m-%d %H:%M:%S"


def configure(
    process_name: str,
    folder: str | os.PathLike[str],
    level: int | str = logging.INFO,
    *,
    own_process: bool = True,
) -> logging.Handler:
    """Send log records to `<folder>/<process_name>.log`; a second call replaces what the first one set.

    Args:
        process_name: file name without suffix; "agent", "control", "driver-<pid>".
        level: of the messages that are written, as `logging` names them ("info", "DEBUG", 20).
        own_process: the process is one of ours, so its root logger is too; False for drivers and workers.
    Returns:
        The handler, for `remove` at shutdown.
    Raises:
        ValueError: there is no such level.
    """
    number = parse_level(level)
    root = logging.getLogger()
    logger = root if own_process else logging.getLogger("shoal")
    for old in [handler for handler in {*root.handlers, *logger.handlers} if isinstance(handler, _ProcessLog)]:
        remove(old)  # a worker was forked by a process of ours, whose file is not for what user code logs
    handler = _ProcessLog(
        os.path.join(folder, f"{process_name}.log"), maxBytes=MAX_FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8",
        delay=not own_process, errors="backslashreplace",
    )  # fmt: skip
    handler.setFormatter(logging.Formatter(FORMAT, TIME_FORMAT))
    handler.setLevel(number)
    logger.addHandler(handler)
    logger.setLevel(number)
    if not own_process:
        # Warnings of ours that a driver's user shall see are printed by name, not through the user's root handlers.
        logger.propagate = False
    return handler


def name_forks(process_name: Callable[[], str]) -> None:
    """What forks of this process have to say goes to files of their own, named when they say something."""
    for handler in logging.getLogger("shoal").handlers:
        if isinstance(handler, _ProcessLog):
            handler.name_fork = process_name


def remove(handler: logging.Handler) -> None:
    """Undo `configure`: the user's process goes on without us."""
    for logger in (logging.getLogger(), logging.getLogger("shoal")):
        if handler in logger.handlers:
            logger.removeHandler(handler)
            if logger.name == "shoal":
                logger.propagate = True
            logger.setLevel(logging.NOTSET if logger.name == "shoal" else logging.WARNING)
    handler.close()


def parse_level(level: int | str) -> int:
    """Raises ValueError, naming the levels there are."""
    if isinstance(level, int):
        return level
    number = logging.getLevelNamesMapping().get(level.strip().upper())
    if number is None:
        raise ValueError(f"no such log level: {level!r}; one of debug, info, warning, error, critical")
    return number


class _ProcessLog(RotatingFileHandler):
    """Ours, so that `configure` recognises it."""

    name_fork: Callable[[], str] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pid = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        if self.name_fork is not None and os.getpid() != self._pid:
            self._pid = os.getpid()
            if self.stream is not None:
                self.stream.close()
                self.stream = None  # as FileHandler does: it opens the file when it is needed
            self.baseFilename = os.path.join(os.path.dirname(self.baseFilename), f"{self.name_fork()}.log")
        super().emit(record)
