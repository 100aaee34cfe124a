"""`Pool`: the standard library's `multiprocessing.Pool`, with actors of the cluster for its processes.

The names, arguments and results are those of the standard library. Better: functions and arguments need not be
importable (lambdas, closures), a worker that dies fails what it was doing instead of leaving everybody waiting, and so
does an initializer that raises; `imap` reads its iterable as results are taken and gives what is behind an error.
"""

from __future__ import annotations

import builtins
import collections
import logging
import multiprocessing
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from types import TracebackType
from typing import Any, Final, NoReturn, Self

from shoal.api.actor import ActorClass
from shoal.api.calls import put
from shoal.api.cluster import cluster_resources
from shoal.api.initialize import connect_if_needed, init, is_initialized
from shoal.exceptions import TaskError
from shoal.util.functions import is_importable, pack
from shoal.util.pool_workers import Batch, Crew, Outcome, PoolWorker

logger = logging.getLogger(__name__)

BATCHES_PER_PROCESS: Final = 4
"""`map` without a chunksize cuts so many, as the standard library does: some slack for calls of unequal length."""
MOST_CHUNKS_AHEAD: Final = 1000
"""How far `imap` runs ahead of who takes the results, until the pool is closed: an iterable may be endless."""


class TimeoutError(multiprocessing.TimeoutError, builtins.TimeoutError):  # noqa: A001 # its name there
    """A result is not there yet."""


class Pool:
    """See the module.

    Args:
        processes: how many workers; None is one for each CPU of the cluster.
        initializer, initargs: called once in each worker, before anything else.
        maxtasksperchild: batches (as in the standard library, not calls) after which a worker is replaced.
        context: accepted, as the standard library's has it; it changes nothing.
        address: of the cluster, when this process is not connected yet. Also under the name `ray_address`.
        remote_args: options of the actors, such as {"num_cpus": 1}. Also under the name `ray_remote_args`.
    Raises:
        ValueError, TypeError: as the standard library's.
    """

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] | None = None,
        maxtasksperchild: int | None = None,
        context: Any = None,
        ray_address: str | None = None,
        ray_remote_args: Mapping[str, Any] | None = None,
        *,
        address: str | None = None,
        remote_args: Mapping[str, Any] | None = None,
    ) -> None:
        self._crew: Crew | None = None  # for `__del__`, should the next lines raise
        if processes is not None and processes < 1:
            raise ValueError("Number of processes must be at least 1")
        if maxtasksperchild is not None and maxtasksperchild < 1:
            raise ValueError("maxtasksperchild must be a positive int or None")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        address = address or ray_address
        if address is not None and not is_initialized():
            init(address)
        connect_if_needed()
        self._processes = processes or max(1, int(cluster_resources().get("CPU", 1)))
        worker = ActorClass(PoolWorker, remote_args or ray_remote_args or {})
        arguments = (initializer, tuple(initargs or ()))
        self._crew = Crew(self._processes, lambda: worker.remote(*arguments), maxtasksperchild)
        self._is_open = True

    # ------------------------------------------------------------------------------------------------------- one call

    def apply(self, func: Callable[..., Any], args: Iterable[Any] = (), kwds: Mapping[str, Any] | None = None) -> Any:
        return self.apply_async(func, args, kwds).get()

    def apply_async(
        self,
        func: Callable[..., Any],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] | None = None,
        callback: Callable[[Any], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> AsyncResult:
        """`callback` gets the value, `error_callback` the exception, on a thread of the pool, before `get` returns."""
        crew = self._running()
        result = AsyncResult(self, 1, callback, error_callback, lambda parts: parts[0])
        crew.submit(Batch(result, 0, "one", pack(func), tuple(args or ()), dict(kwds or {})))
        return result

    # ------------------------------------------------------------------------------------------------------ many calls

    def map(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = None) -> list[Any]:
        """All results in order. When calls fail, the error of the first to fail is raised once all have ended."""
        values: list[Any] = self.map_async(func, iterable, chunksize).get()
        return values

    def map_async(
        self,
        func: Callable[[Any], Any],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[Any], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> AsyncResult:
        return self._map("each", func, iterable, chunksize, callback, error_callback)

    def starmap(
        self, func: Callable[..., Any], iterable: Iterable[Iterable[Any]], chunksize: int | None = None
    ) -> list[Any]:
        """As `map`, with `func(*item)`."""
        values: list[Any] = self.starmap_async(func, iterable, chunksize).get()
        return values

    def starmap_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callable[[Any], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> AsyncResult:
        return self._map("each_star", func, iterable, chunksize, callback, error_callback)

    def _map(
        self,
        method: str,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None,
        callback: Callable[[Any], object] | None,
        error_callback: Callable[[BaseException], object] | None,
    ) -> AsyncResult:
        crew = self._running()
        items = iterable if isinstance(iterable, (list, tuple, range)) else list(iterable)
        if chunksize is None:
            chunksize = -(-len(items) // (self._processes * BATCHES_PER_PROCESS)) or 1
        _check_chunksize(chunksize)
        chunks = [items[start : start + chunksize] for start in range(0, len(items), chunksize)]
        result = AsyncResult(self, len(chunks), callback, error_callback, lambda parts: [v for p in parts for v in p])
        function = _once(func, len(chunks))
        crew.submit(*(Batch(result, index, method, function, chunk) for index, chunk in enumerate(chunks)))
        return result

    def imap(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int = 1) -> IMapIterator:
        """An iterator over the results in order; an error comes out at its place, and the next `next` goes on."""
        return self._imap(func, iterable, chunksize, ordered=True)

    def imap_unordered(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int = 1) -> IMapIterator:
        """As `imap`, in the order in which the results come."""
        return self._imap(func, iterable, chunksize, ordered=False)

    def _imap(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int, ordered: bool) -> IMapIterator:
        crew = self._running()
        _check_chunksize(chunksize)
        result = IMapIterator(self, crew, ordered)
        crew.begin_feeding()
        feed = threading.Thread(
            target=_feed,
            args=(crew, result, _once(func), iter(iterable), chunksize),
            name="shoal-pool-feed",
            daemon=True,
        )
        feed.start()
        return result

    # -------------------------------------------------------------------------------------------------------- the end

    def close(self) -> None:
        """Take no more; the workers end when what was given is done."""
        if self._crew is not None and self._is_open:
            self._is_open = False
            self._crew.close()

    def terminate(self) -> None:
        """End the workers at once. What is not done fails with RuntimeError, instead of never ending."""
        self._is_open = False
        if self._crew is not None:
            self._crew.end(RuntimeError("the pool was terminated"), kill=True)

    def join(self) -> None:
        """Wait until all is done, after `close` or `terminate`."""
        if self._is_open:
            raise ValueError("Pool is still running")
        if self._crew is not None:
            self._crew.wait_done()

    def __enter__(self) -> Self:
        self._running()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.terminate()

    def __del__(self) -> None:
        # At the end of the interpreter its threads may have been stopped wherever they were, also with our lock.
        if self._crew is not None and self._is_open and not sys.is_finalizing():
            warnings.warn(f"unclosed running multiprocessing pool {self!r}", ResourceWarning, source=self, stacklevel=2)
            self._crew.end(RuntimeError("the pool was collected while it was running"), kill=False)

    def __reduce__(self) -> NoReturn:
        raise NotImplementedError("pool objects cannot be passed between processes or pickled")

    def __repr__(self) -> str:
        state = "RUN" if self._is_open else "CLOSE"
        return f"<{type(self).__module__}.{type(self).__qualname__} state={state} pool_size={self._processes}>"

    def _running(self) -> Crew:
        if self._crew is None or not self._is_open:
            raise ValueError("Pool not running")
        return self._crew


class AsyncResult:
    """What `apply_async`, `map_async` and `starmap_async` return."""

    def __init__(
        self,
        pool: Pool,
        parts: int,
        callback: Callable[[Any], object] | None,
        error_callback: Callable[[BaseException], object] | None,
        join: Callable[[list[Any]], Any],
    ) -> None:
        self._pool: Pool | None = pool  # who waits for a result needs the pool
        self._parts: list[Any] = [None] * parts
        self._missing = parts
        self._callback, self._error_callback = callback, error_callback
        self._join = join
        self._error: BaseException | None = None
        self._value: Any = None
        self._ended = threading.Event()
        self._lock = threading.Lock()
        if not parts:
            self._value = join([])
            self._finish()

    def ready(self) -> bool:
        return self._ended.is_set()

    def successful(self) -> bool:
        """Raises: ValueError: it has not ended yet."""
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return self._error is None

    def wait(self, timeout: float | None = None) -> None:
        self._ended.wait(timeout)

    def get(self, timeout: float | None = None) -> Any:
        """Raises: TimeoutError; else what a call raised."""
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the result was not ready after {timeout:g} s")
        if self._error is not None:
            raise self._error
        return self._value

    def settle(self, index: int, ok: bool, value: Any) -> None:
        """By the crew."""
        with self._lock:
            if ok:
                self._parts[index] = value
            elif self._error is None:
                self._error = value
            self._missing -= 1
            if self._missing:
                return
        try:
            if self._error is not None:
                if self._error_callback is not None:
                    self._error_callback(self._error)
            else:
                self._value = self._join(self._parts)
                if self._callback is not None:
                    self._callback(self._value)
        except Exception:
            logger.exception("a callback of a pool raised")
        self._finish()

    def _finish(self) -> None:
        self._parts.clear()
        self._pool = None
        self._callback = self._error_callback = None
        self._ended.set()


class IMapIterator(Iterator[Any]):
    """What `imap` and `imap_unordered` return."""

    def __init__(self, pool: Pool, crew: Crew, ordered: bool) -> None:
        self._pool: Pool | None = pool
        self._crew = crew
        self._ordered = ordered
        self._chunks: dict[int, list[Outcome]] = {}  # those that came, in the order in which they came
        self._current: collections.deque[Outcome] = collections.deque()
        self._taken = 0  # chunks
        self._length: int | None = None  # in chunks, once the iterable has ended

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return self.next()

    def next(self, timeout: float | None = None) -> Any:
        """Raises: StopIteration; TimeoutError; else what the call raised."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._crew.changed:
            while not self._current:
                if not self._take_chunk():
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0:
                        raise TimeoutError(f"the next result was not ready after {timeout:g} s")
                    self._crew.changed.wait(left)
            ok, value = self._current.popleft()
        if not ok:
            raise value.as_raisable() if type(value) is TaskError else value  # the former: out of a chunk
        return value

    def _take_chunk(self) -> bool:
        index = self._taken if self._ordered else next(iter(self._chunks), -1)
        chunk = self._chunks.pop(index, None)
        if chunk is None:
            if self._taken == self._length:
                self._pool = None
                raise StopIteration
            return False
        self._taken += 1
        self._current.extend(chunk)
        self._crew.changed.notify_all()  # there is room for one more
        return True

    def settle(self, index: int, ok: bool, value: Any) -> None:
        """By the crew, and for what the iterable itself raised."""
        with self._crew.changed:
            self._chunks[index] = value if ok else [(False, value)]
            self._crew.changed.notify_all()

    def wait_for_room(self, fed: int) -> None:
        crew = self._crew
        with crew.changed:
            crew.changed.wait_for(lambda: fed - self._taken < MOST_CHUNKS_AHEAD or crew.closed)

    def end(self, chunks: int) -> None:
        with self._crew.changed:
            self._length = chunks
            self._crew.changed.notify_all()


def _feed(crew: Crew, result: IMapIterator, function: Any, items: Iterator[Any], chunksize: int) -> None:
    """On a thread of its own, since the iterable may wait for whatever it likes, such as earlier results."""
    fed = 0
    error: BaseException | None = None
    try:
        while error is None:
            chunk: list[Any] = []
            try:
                chunk.extend(islice(items, chunksize))  # keeps what came before an error
            except Exception as exc:  # noqa: BLE001 # the iterable is the user's
                error = exc
            if not chunk:
                break
            result.wait_for_room(fed)
            if not crew.submit(Batch(result, fed, "outcomes", function, chunk)):
                fed += 1
                return
            fed += 1
    finally:
        if error is not None:
            result.settle(fed, False, error)
            fed += 1
        result.end(fed)
        crew.end_feeding()


def _once(function: Callable[..., Any], times: int = 2) -> Any:
    """What travels with each of several batches: something small that stands for the function."""
    packed = pack(function)
    return put(function) if packed is function and times > 1 and not is_importable(function) else packed


def _check_chunksize(chunksize: int) -> None:
    if chunksize < 1:
        raise ValueError(f"Chunksize must be 1+, not {chunksize}")


__all__ = ["AsyncResult", "IMapIterator", "Pool", "TimeoutError"]
