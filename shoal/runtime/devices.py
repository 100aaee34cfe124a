"""Which accelerators a worker may see: the environment variables that tell CUDA, HIP and Level Zero. Pure.

An agent gives out numbers from 0 on; a node that was itself started with a list of visible devices has names for them.
All variables are set: the library of another vendor does not look at them. One is left alone when its
`SHOAL_EXPERIMENTAL_NOSET_<variable>` (or Ray's `RAY_...`) is 1, and all are where a call was given no devices, unless
`SHOAL_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO` is 1, which hides the node's devices from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

VARIABLES: Final = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")


def settings_for(numbers: Sequence[int] | None, environment: Mapping[str, str]) -> dict[str, str]:
    """What to set in the environment of a worker that has these GPUs (None or empty: it has none)."""
    if not numbers and not _is_on("ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", environment):
        return {}
    return {
        variable: ",".join(map(str, names_of(numbers or (), environment.get(variable))))
        for variable in VARIABLES
        if not _is_on(f"EXPERIMENTAL_NOSET_{variable}", environment)
    }


def names_of(numbers: Sequence[int], allowed: str | None) -> list[int | str]:
    """The names that the node has for these devices: numbers, where they are numbers.

    Args:
        allowed: the node's own list of visible devices ("2,3" or UUIDs), if it has one.
    """
    names = [name.strip() for name in (allowed or "").split(",") if name.strip()]
    chosen = [names[number] if number < len(names) else str(number) for number in numbers]
    return [int(name) if name.isdecimal() else name for name in chosen]


def _is_on(name: str, environment: Mapping[str, str]) -> bool:
    return any(environment.get(f"{prefix}_{name}", "").lower() in ("1", "true") for prefix in ("SHOAL", "RAY"))
