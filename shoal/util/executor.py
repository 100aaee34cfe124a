"""`ShoalExecutor`: the interface of `concurrent.futures`, with tasks of the cluster behind it.

At most `max_workers` calls are handed to the cluster at a time; the others wait here, where `Future.cancel` can still
take them back. So, as with the standard library's executors, a future that is `running()` can not be cancelled.
"""

from __future__ import annotations

import atexit
import collections
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from functools import partial
from itertools import chain, islice
from types import FunctionType
from typing import Any, Final, TypeVar

from shoal.api.cluster import cluster_resources
from shoal.api.initialize import connect_if_needed
from shoal.api.remote_function import RemoteFunction
from shoal.api.signatures import ASYNC_GENERATOR, COROUTINE, GENERATOR, code_flags
from shoal.rpc.held_signals import HeldSignals
from shoal.runtime.object_ref import ObjectRef
from shoal.util.completions import Completions, Read

T = TypeVar("T")

CALLS_PER_CPU: Final = 16
"""How many are handed out for each CPU when `max_workers` is not given: the next one should be there already."""
_MOST_FUNCTIONS: Final = 64


def _call(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _call_each(function: Callable[..., T], calls: list[tuple[Any, ...]]) -> list[T]:
    return [function(*args) for args in calls]


class ShoalExecutor(Executor):
    """Runs each call as a task.

    Args:
        max_workers: most calls that the cluster is given at a time; None: a few for each CPU that it has now.
        remote_args: options of the tasks, such as {"num_cpus": 2, "max_retries": 0}.
    """

    def __init__(self, max_workers: int | None = None, *, remote_args: Mapping[str, Any] | None = None) -> None:
        if max_workers is not None and (isinstance(max_workers, bool) or not isinstance(max_workers, int)):
            raise TypeError(f"max_workers is a whole number or None, not {max_workers!r}")
        if max_workers is not None and max_workers < 1:
            raise ValueError(f"max_workers is 1 or more, not {max_workers}")
        runtime = connect_if_needed()
        if max_workers is None:
            max_workers = CALLS_PER_CPU * max(1, int(cluster_resources().get("CPU", 1)))
        self._desk = _Desk(max_workers, dict(remote_args or {}))
        if runtime.context().is_driver:
            _wait_for_at_exit(self._desk)
        # Without `shutdown`, as with the standard library's: what was submitted still runs, then the thread ends.
        self._finalizer = weakref.finalize(self, self._desk.close)
        self._finalizer.atexit = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Raises: RuntimeError: after `shutdown`. What else goes wrong comes out of the future."""
        if not callable(fn):
            raise TypeError(f"submit() takes a function and its arguments, not {fn!r}")
        return self._desk.submit(fn, args, kwargs)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        **options: Any,
    ) -> Iterator[T]:
        """As `concurrent.futures.Executor.map`; `chunksize` calls make one task."""
        if chunksize < 1:
            raise ValueError(f"chunksize must be >= 1, not {chunksize}")
        if chunksize == 1:
            return super().map(fn, *iterables, timeout=timeout, **options)
        calls = zip(*iterables, strict=False)
        chunks = iter(lambda: list(islice(calls, chunksize)), [])
        return chain.from_iterable(super().map(partial(_call_each, fn), chunks, timeout=timeout, **options))

    def terminate_workers(self) -> None:
        """As `shutdown`, and calls that run are interrupted, too: their futures end with TaskCancelledError."""
        self._desk.close(cancel_futures=True)
        self._desk.interrupt()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._desk.close(cancel_futures)
        if wait:
            self._desk.wait_idle()


class _Desk:
    """What an executor owns; its own object, so that the thread behind it does not keep the executor alive."""

    def __init__(self, limit: int, options: dict[str, Any]) -> None:
        self._limit = limit
        self._options = options
        self._general = RemoteFunction(_call, options)
        self._functions: dict[FunctionType, RemoteFunction[..., Any]] = {}
        self._completions = Completions("shoal-executor")
        self._changed = threading.Condition(threading.RLock())
        self._waiting: collections.deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]]
        self._waiting = collections.deque()
        self._begun = 0  # calls that count against the limit
        self._running: dict[Future[Any], ObjectRef[Any]] = {}
        self._closed = False

    def submit(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._waiting.append((future, function, args, kwargs))
        self._start_waiting()
        return future

    def close(self, cancel_futures: bool = False) -> None:
        with self._changed:
            self._closed = True
            cancelled = list(self._waiting) if cancel_futures else []
            if cancel_futures:
                self._waiting.clear()
        for future, *_ in cancelled:
            if future.cancel():
                future.set_running_or_notify_cancel()
        self._end_when_idle()

    def wait_idle(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._begun)

    def interrupt(self) -> None:
        with self._changed:
            running = list(self._running.values())
        for ref in running:
            self._completions.cancel(ref)

    def _end_when_idle(self) -> None:
        with self._changed:
            if not self._waiting and not self._begun:
                self._changed.notify_all()
                if self._closed:
                    self._completions.finish()

    def _start_waiting(self) -> None:
        """Hand out what may run now. Futures are settled outside of the lock: that runs callbacks of the user."""
        more = True
        while more:
            with HeldSignals():  # a Ctrl-C in the middle must not lose a future
                more, unsent = self._start_next()
            if unsent is not None:
                self._settle(*unsent, None)
        self._end_when_idle()

    def _start_next(self) -> tuple[bool, tuple[Future[Any], Exception] | None]:
        """Whether there may be more to start, and the future of a call that could not be sent."""
        with self._changed:
            if not self._waiting or self._begun >= self._limit:
                return False, None
            future, function, args, kwargs = self._waiting.popleft()
            if not future.set_running_or_notify_cancel():
                return True, None
            self._begun += 1
            try:
                self._completions.check_connected()
                ref = self._remote(function)(*args, **kwargs)
            except Exception as exc:  # noqa: BLE001 # wrong arguments, or some that cannot be pickled
                return True, (future, exc)
            self._running[future] = ref
            self._completions.watch(ref, partial(self._done, future))
            return True, None

    def _done(self, future: Future[Any], read: Read) -> None:
        try:
            value = read()
        except BaseException as exc:  # noqa: BLE001 # whatever the task raised
            self._settle(future, exc, None)
        else:
            self._settle(future, None, value)
        self._start_waiting()

    def _settle(self, future: Future[Any], error: BaseException | None, value: Any) -> None:
        with self._changed:
            self._begun -= 1
            self._running.pop(future, None)
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)

    def _remote(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What submits calls of `function`; a plain one, whose code stays the same, is pickled only once."""
        if not isinstance(function, FunctionType) or function.__closure__:
            return partial(self._general.remote, function)
        if code_flags(function) & (COROUTINE | GENERATOR | ASYNC_GENERATOR):
            return partial(self._general.remote, function)
        made = self._functions.get(function)
        if made is None:
            if len(self._functions) >= _MOST_FUNCTIONS:
                self._functions.clear()
            made = self._functions[function] = RemoteFunction(function, self._options)
        remote: Callable[..., Any] = made.remote
        return remote


_desks: Final[weakref.WeakSet[_Desk]] = weakref.WeakSet()


def _wait_for_at_exit(desk: _Desk) -> None:
    """A program does not end before its futures, as with the standard library's executors."""
    if not _desks:
        # After `init` has registered its own hook, so before that one runs, which disconnects.
        atexit.unregister(_finish_all)
        atexit.register(_finish_all)
    _desks.add(desk)


def _finish_all() -> None:
    for desk in list(_desks):
        desk.close()
        desk.wait_idle()
