"""Say a thing once: `if log_once("no-gpu"): logger.warning(...)`."""

from __future__ import annotations

import threading
import time

__all__ = ["disable_log_once_globally", "enable_periodic_logging", "log_once"]

_lock = threading.Lock()
_said: dict[str, float] = {}
_disabled = False
_period_s: float | None = None


def log_once(key: str) -> bool:
    """True the first time that this process asks for `key`; again after a period where `enable_periodic_logging()`
    set one."""
    if _disabled:
        return False
    now = time.monotonic()
    with _lock:
        last = _said.get(key)
        if last is None or (_period_s is not None and now - last > _period_s):
            _said[key] = now
            return True
    return False


def disable_log_once_globally() -> None:
    """From now on `log_once` is always False in this process."""
    global _disabled
    _disabled = True


def enable_periodic_logging(period_s: float = 60.0) -> None:
    """From now on `log_once` is True again for a key that was asked for more than `period_s` seconds ago."""
    global _disabled, _period_s
    _disabled = False
    _period_s = period_s
