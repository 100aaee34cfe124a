"""What has ended and is kept for people who ask: bounded in count and bytes, the oldest out first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Remembered(Generic[K, V]):
    """A mapping that forgets. Adding a key again makes it the newest."""

    def __init__(self, max_count: int, max_bytes: int = 0) -> None:
        """`max_bytes` 0: only the count is bounded."""
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._items: dict[K, tuple[V, int]] = {}
        self._bytes = 0

    def add(self, key: K, value: V, size_bytes: int = 0) -> list[V]:
        """Returns what was forgotten to make room (possibly the new value itself, when it alone is too large)."""
        self.pop(key)
        self._items[key] = (value, size_bytes)
        self._bytes += size_bytes
        out: list[V] = []
        while len(self._items) > self._max_count or (self._max_bytes and self._bytes > self._max_bytes):
            oldest = next(iter(self._items))
            gone = self.pop(oldest)
            assert gone is not None
            out.append(gone)
        return out

    def find(self, key: K) -> V | None:
        item = self._items.get(key)
        return item[0] if item is not None else None

    def pop(self, key: K) -> V | None:
        item = self._items.pop(key, None)
        if item is None:
            return None
        self._bytes -= item[1]
        return item[0]

    def values(self) -> Iterator[V]:
        return (value for value, _ in self._items.values())

    @property
    def size_bytes(self) -> int:
        return self._bytes

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: K) -> bool:
        return key in self._items
