"""The one process-wide slot: the runtime that this process's API calls go to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.runtime.interface import Runtime

current: Runtime | None = None
