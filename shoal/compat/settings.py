"""Ray's environment variables, read as shoal's own."""

from __future__ import annotations

import functools
import os
from collections.abc import MutableMapping
from typing import Any, Final

from shoal.api import initialize

SHARED: Final = (
    "ADDRESS", "NAMESPACE", "LOG_TO_DRIVER", "ENABLE_AUTO_CONNECT", "IGNORE_UNHANDLED_ERRORS", "DEDUP_LOGS",
    "DEDUP_LOGS_AGG_WINDOW_S", "DEDUP_LOGS_ALLOW_REGEX", "DEDUP_LOGS_SKIP_REGEX", "COLOR_PREFIX", "TMPDIR",
)  # fmt: skip
"""Variables that mean the same after RAY_ and after SHOAL_."""


def adopt(environ: MutableMapping[str, str]) -> None:
    """Give each shared SHOAL_ variable that is not set the value of its RAY_ counterpart."""
    for name in SHARED:
        value = environ.get(f"RAY_{name}")
        if value is not None:
            environ.setdefault(f"SHOAL_{name}", value)


@functools.wraps(initialize.init)
def init(*args: Any, **options: Any) -> initialize.ClusterContext:
    adopt(os.environ)  # a program may have set them since it began
    return initialize.init(*args, **options)
