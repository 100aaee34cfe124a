"""Noticing that a program passes the same large value again and again, and saying what is better. Pure.

Each such call stores one more copy. The value is known again by its size and by samples of its bytes, not by its
identity: lists and bytes cannot be watched, and an equal value made anew is stored anew as well.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from shoal.objects.serialization import Serialized

LARGE_BYTES: Final = 1 << 20
"""Of one buffer, or of a pickle."""
TIMES: Final = 10
"""A loop, and not a handful of calls that happen to share something."""
REMEMBERED: Final = 64
_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 64

_Print = tuple[int, int]


class RepeatedArguments:
    """The large arguments of a process's last calls. Any thread: a race costs a count, not more."""

    def __init__(self) -> None:
        self._seen: OrderedDict[_Print, int] = OrderedDict()

    def look(self, name: str, value: Serialized) -> str:
        """What to tell the user of the arguments of a call of `name`; "" mostly, and for each value at most once."""
        for part in value.buffers or (value.pickled,):
            if len(part) < LARGE_BYTES:
                continue
            print_ = _print_of(part)
            times = self._seen.pop(print_, 0) + 1
            self._seen[print_] = times
            if len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
            if times == TIMES:
                return (
                    f"{name} was given the same value of {len(part) >> 20} MiB for the {TIMES}th time, and each call "
                    f"stores a copy of its own; put() it once and pass the reference"
                )
        return ""


def _print_of(part: bytes | memoryview) -> _Print:
    """Not of the ends: a small argument before or after the large one may be another one each time."""
    size = len(part)
    step = size // (_SAMPLES + 1)
    samples = b"".join(bytes(part[at : at + _SAMPLE_BYTES]) for at in range(step, step * (_SAMPLES + 1), step))
    return size >> 12, hash(samples)
