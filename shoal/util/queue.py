"""`Queue`: a first-in, first-out queue that tasks, actors and drivers share.

An async actor holds the items. Whoever waits to put or get waits there, as a coroutine of the actor, in the order of
arrival. Items live in the actor: they outlive the process that put them. A reference that is put resolves on the way,
as an argument does, so what comes out is its value.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterable, Mapping
from typing import Any, Final

from shoal.api.actor import ActorClass, ActorHandle
from shoal.api.calls import get, kill, wait

MOST_WAITING: Final = 100_000
"""Calls that wait in the actor at a time; beyond that the one that everybody waits for might not get in."""


class Empty(queue.Empty):
    """There is no item, or none came in time."""


class Full(queue.Full):
    """There is no room, or none came free in time."""


class _QueueActor:
    def __init__(self, maxsize: int) -> None:
        self._maxsize = maxsize
        self._queue: asyncio.Queue[Any] = asyncio.Queue(maxsize)

    def qsize(self) -> int:
        return self._queue.qsize()

    async def put(self, item: Any, within_s: float | None) -> bool:
        try:
            async with asyncio.timeout(within_s):
                await self._queue.put(item)
        except TimeoutError:
            return False
        return True

    async def get(self, within_s: float | None) -> tuple[Any, ...]:
        """(item,), or () after the timeout."""
        try:
            async with asyncio.timeout(within_s):
                return (await self._queue.get(),)
        except TimeoutError:
            return ()

    def put_nowait(self, items: list[Any]) -> int:
        """How many there is room for. All are put, or none."""
        room = self._maxsize - self._queue.qsize() if self._maxsize > 0 else len(items)
        if room >= len(items):
            for item in items:
                self._queue.put_nowait(item)
        return room

    def put_one_nowait(self, item: Any) -> bool:
        return self.put_nowait([item]) >= 1

    def get_nowait(self, count: int) -> tuple[int, list[Any]]:
        """How many there are, and `count` of them, or none."""
        there = self._queue.qsize()
        return there, [self._queue.get_nowait() for _ in range(count)] if there >= count else []


class Queue:
    """A queue of the cluster; can be passed to tasks and actors. It ends with its last handle, or by `shutdown`.

    Args:
        maxsize: most items; 0 or less is no limit.
        actor_options: options of the actor that holds the items, such as {"name": "q", "num_cpus": 1}.
    """

    def __init__(self, maxsize: int = 0, actor_options: Mapping[str, Any] | None = None) -> None:
        if isinstance(maxsize, bool) or not isinstance(maxsize, int):
            raise TypeError(f"maxsize is a whole number, not {maxsize!r}")
        self.maxsize = maxsize
        options = {"max_concurrency": MOST_WAITING, **(actor_options or {})}
        self.actor: ActorHandle[Any] = ActorClass(_QueueActor, options).remote(maxsize)

    def __len__(self) -> int:
        return self.size()

    def size(self) -> int:
        """How many items are in it now."""
        count: int = get(self.actor.qsize.remote())
        return count

    def qsize(self) -> int:
        return self.size()

    def empty(self) -> bool:
        return self.size() == 0

    def full(self) -> bool:
        return self.maxsize > 0 and self.size() >= self.maxsize

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Raises: Full: there is no room, for `timeout` seconds with `block`. ValueError: a negative timeout."""
        if not block:
            self.put_nowait(item)
        elif not get(self.actor.put.remote(item, _check_timeout(timeout))):
            raise Full(f"no room came free in {timeout:g} s; the queue takes {self.maxsize} items")

    async def put_async(
        self,
        item: Any,
        block: bool = True,
        timeout: float | None = None,  # noqa: ASYNC109 # as `put`
    ) -> None:
        """As `put`, in a coroutine."""
        if not block:
            done = await self.actor.put_one_nowait.remote(item)
        else:
            done = await self.actor.put.remote(item, _check_timeout(timeout))
        if not done:
            raise Full(f"the queue is full: it takes {self.maxsize} items")

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Raises: Empty: there is no item, for `timeout` seconds with `block`. ValueError: a negative timeout."""
        if not block:
            return self.get_nowait()
        found = get(self.actor.get.remote(_check_timeout(timeout)))
        if not found:
            raise Empty(f"no item came in {timeout:g} s")
        return found[0]

    async def get_async(self, block: bool = True, timeout: float | None = None) -> Any:  # noqa: ASYNC109 # as `get`
        """As `get`, in a coroutine."""
        if not block:
            _, found = await self.actor.get_nowait.remote(1)
        else:
            found = await self.actor.get.remote(_check_timeout(timeout))
        if not found:
            raise Empty("the queue is empty")
        return found[0]

    def put_nowait(self, item: Any) -> None:
        """Raises: Full."""
        if not get(self.actor.put_one_nowait.remote(item)):
            raise Full(f"the queue is full: it takes {self.maxsize} items")

    def put_nowait_batch(self, items: Iterable[Any]) -> None:
        """Put all of them, or none.

        Raises: Full: there is no room for all.
        """
        if not isinstance(items, Iterable):
            raise TypeError(f"put_nowait_batch() takes an iterable of items, not {items!r}")
        batch = list(items)
        room = get(self.actor.put_nowait.remote(batch))
        if room < len(batch):
            raise Full(f"the queue has room for {room} items, not for {len(batch)}")

    def get_nowait(self) -> Any:
        """Raises: Empty."""
        return self._get_batch(1)[0]

    def get_nowait_batch(self, num_items: int) -> list[Any]:
        """The next `num_items`, or none.

        Raises: Empty: there are fewer.
        """
        if isinstance(num_items, bool) or not isinstance(num_items, int):
            raise TypeError(f"num_items is a whole number, not {num_items!r}")
        if num_items < 0:
            raise ValueError(f"num_items is 0 or more, not {num_items}")
        return self._get_batch(num_items)

    def _get_batch(self, count: int) -> list[Any]:
        there, found = get(self.actor.get_nowait.remote(count))
        if there < count:
            raise Empty(f"the queue has {there} items, not {count}" if there else "the queue is empty")
        items: list[Any] = found
        return items

    def shutdown(self, force: bool = False, grace_period_s: float = 5) -> None:
        """End the queue; items in it are lost, and who waits on it gets ActorDiedError.

        Args:
            force: at once. Otherwise calls that are under way may finish, for `grace_period_s` seconds.
        """
        if not force:
            wait([self.actor.__ray_terminate__.remote()], timeout=grace_period_s)
        kill(self.actor)


def _check_timeout(timeout: float | None) -> float | None:
    if timeout is not None and timeout < 0:
        raise ValueError(f"timeout is 0 or more seconds, or None, not {timeout}")
    return timeout
