"""What users write in options, turned into values. Pure; a mistake is a one-line ValueError that names the option."""

from __future__ import annotations

import json
import re
from typing import Any, Final

_SIZE: Final = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kmgt]?)(?P<binary>i?)b?", re.IGNORECASE)
_LABEL_PART: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]*[A-Za-z0-9])?")


def parse_size(text: str, option: str) -> int:
    """Bytes: "1073741824", "1.5GiB", "200 MB" (decimal units count thousands, as the disk's label does)."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{option} is a number of bytes, such as 1073741824, 1GiB or 500MB, not {text!r}")
    base = 1024 if found["binary"] else 1000
    size = int(float(found["number"]) * base ** " kmgt".index(found["unit"].lower() or " "))
    if size <= 0:
        raise ValueError(f"{option} must be more than 0 bytes")
    return size


def parse_resources(text: str, option: str = "--resources") -> dict[str, float]:
    """A JSON object of names and amounts: '{"shelf": 2, "license": 0.5}'."""
    try:
        found: Any = json.loads(text)
    except ValueError as exc:
        raise ValueError(f"{option} is a JSON object, such as '{{\"shelf\": 2}}', not {text!r}: {exc}") from exc
    if not isinstance(found, dict):
        raise ValueError(f"{option} is a JSON object, such as '{{\"shelf\": 2}}', not {text!r}")
    for name, amount in found.items():
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < float("inf"):
            raise ValueError(
                f"{option}: the amount of {name!r} is {json.dumps(amount)}, but must be a number from 0 on"
            )
        if name in ("CPU", "GPU", "memory", "object_store_memory"):
            flag = {"CPU": "--num-cpus", "GPU": "--num-gpus"}.get(name, "--" + name.replace("_", "-"))
            raise ValueError(f"{option}: say {flag} instead of {name!r}")
    return {name: float(amount) for name, amount in found.items()}


def parse_labels(text: str, option: str = "--labels") -> dict[str, str]:
    """ "zone=a,disk=ssd"."""
    labels: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not _LABEL_PART.fullmatch(key) or (value and not _LABEL_PART.fullmatch(value)):
            raise ValueError(
                f"{option}: {part!r} is not KEY=VALUE with letters, digits and, in between, '.', '_', '-' or '/'"
            )
        if key in labels:
            raise ValueError(f"{option}: {key!r} is given twice")
        labels[key] = value
    return labels


def size_text(size: float) -> str:
    """ "1.5 GiB" for a number of bytes."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size == int(size) else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def span_text(seconds: float) -> str:
    """ "12 s", "5 min", "3.2 h", "2.0 d": how long something has lasted."""
    if seconds < 100:
        return f"{max(seconds, 0.0):.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"
