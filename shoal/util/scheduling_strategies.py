"""Strategies for the option `scheduling_strategy`, where Ray users look for them."""

from __future__ import annotations

from shoal.api.strategies import NodeAffinitySchedulingStrategy

__all__ = ["NodeAffinitySchedulingStrategy"]
