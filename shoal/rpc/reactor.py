"""The one thread of a driver or worker that speaks to other processes, beside the thread that runs the user's code.

All state of a runtime belongs to this thread. Other threads enter by one door, `call_soon`, which is an append to a
deque and, only when the reactor is asleep, one write to an eventfd. So a Ctrl-C in user code can never cut a protocol
step in two, a burst of calls from user code is answered in one batch, and no lock is held by two threads for long.

A hand-over between threads costs more than all of our work on a call, since it wakes a sleeper on another core. So a
thread that would only wait for what the reactor brings takes its place for a moment (`lead`): it runs the rounds
itself, with signal handlers held off, and the reactor's own thread stands by. When the moment was too short, or the
user's code goes on for longer than `STAND_BY_S`, that thread is back. "The reactor's thread" is whoever leads.

Why not asyncio: importing and running it costs every driver and worker ~50 ms and several MB, and the user's own event
loop must not be ours. Rejected too: sending from the user's thread (saves ~5 us of a 60 us round trip, costs a lock on
every send and makes Ctrl-C unsafe).
"""

from __future__ import annotations

import collections
import errno
import heapq
import itertools
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec

from shoal.exceptions import AuthenticationError, ClusterConnectionError, ShoalError
from shoal.rpc.auth import Admit, ClientHandshake, ServerHandshake, handshake_decoder
from shoal.rpc.frames import FrameError, FrameReader, check_size, decode_frame, encode_message, join_frame
from shoal.rpc.held_signals import HeldSignals
from shoal.rpc.messages import MAX_HANDSHAKE_BYTES, Failed, Hello, Message, Reply, Request
from shoal.rpc.sockets import HANDOFF, listen_unix, receive_handed_over, split_address, tune

logger = logging.getLogger(__name__)

_READ_BYTES: Final = 1 << 18
_READS_PER_ROUND: Final = 16
"""So that one busy peer cannot keep the others waiting for long."""
_CALLS_PER_ROUND: Final = 10_000
_HANDSHAKE_TIMEOUT_S = 10.0
LEAD_S: Final = 0.001
"""How long a thread of the user's takes the reactor's place, at most: signals are held off meanwhile."""
SPIN_S: Final = 0.00015 if len(os.sched_getaffinity(0)) > 1 else 0.0
"""How long a leader looks again and again before it sleeps, when sleeps have lately been shorter than that: to sleep
and be woken costs as much as our work on a call. An exchange of single calls never sleeps then, and nobody else
spins."""
QUICK_S: Final = 2 * SPIN_S
"""A sleep that was shorter might have been a spin: without it, both sides would have been there sooner."""
MAX_SLEEPS_BEFORE_SPIN: Final = 64
"""Short sleeps in a row before the next spin, after spins in vain: then cores are scarce, and spinning keeps the one
from running that would bring what is waited for."""
STAND_BY_S: Final = 0.0005
"""How long after that the reactor's own thread looks whether anything is to be done. What a thread that has just led
appends without waiting for it waits twice that, at most."""
_AGAIN_S: Final = 0.02
"""Between attempts where the kernel has no signal: a listener's full queue, and no descriptors left."""
IN, OUT = select.EPOLLIN, select.EPOLLOUT


class Timer:
    """A call that is due; `cancel()` may be called from the reactor's thread at any time."""

    __slots__ = ("call", "due")

    def __init__(self, due: float, call: Callable[[], None]) -> None:
        self.due = due
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class Reactor:
    """An epoll loop on a thread of its own. Unless said otherwise, methods belong to that thread.

    It opens nothing before `start`, so that one may be made in a process from which others are forked that start it.
    """

    _epoll: select.epoll

    def __init__(self, name: str) -> None:
        self._name = name
        self._wake_fd = -1
        self._io: dict[int, Callable[[int], None]] = {}
        self.calls: collections.deque[tuple[Callable[..., object], tuple[Any, ...]]] = collections.deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self.awake = True  # until it starts, which it does with a look at its calls
        self._stopped = False
        self.ended = False  # what comes in by `call_soon` from now on is dropped
        self.dirty: list[Channel] = []
        self._lead = threading.Lock()  # who holds it runs rounds
        self._leader = 0  # ident of that thread
        self._rounds = 0
        self._led_until = 0.0
        self._quick_sleeps = 0  # in a row: spinning would have been enough
        self._sleeps_before_spin = 1
        self._standing_by = False
        self._resume = threading.Lock()  # released to end a stand-by
        self._resume.acquire()
        self.thread = self._make_thread()

    def _make_thread(self) -> threading.Thread:
        return threading.Thread(target=self._run, name=self._name, daemon=True)

    def start(self) -> None:
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, IN)
        self.awake = False
        self.thread = self._make_thread()  # after a fork, one that was made before counts as ended
        self.thread.start()

    def call_soon(self, call: Callable[..., object], *args: Any) -> None:
        """Run `call(*args)` on the reactor's thread, in the order of the appends. From any thread, and from `__del__`.

        Dropped when the reactor has ended: who waits for an answer looks at `ended` after calling this.
        """
        self.calls.append((call, args))
        if not self.awake:
            self.wake()

    @property
    def is_here(self) -> bool:
        """Whether the calling thread is the reactor's now."""
        return self._leader == threading.get_ident()

    def wake(self) -> None:
        """Make the reactor look at its calls. From any thread."""
        try:
            self.awake = True
            os.eventfd_write(self._wake_fd, 1)
            if self._standing_by and not self._leader:
                self._end_stand_by()
        except BaseException:  # a Ctrl-C in between: nobody would ever wake a reactor that seems to be awake
            self.awake = False
            raise

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        timer = Timer(time.monotonic() + delay_s, call)
        heapq.heappush(self._timers, (timer.due, next(self._order), timer))
        return timer

    def stop(self) -> None:
        """End the loop when what was called before this is done, and close what it holds. From any thread."""
        self.call_soon(self._end)

    def _end(self) -> None:
        self._stopped = True

    def descriptors(self) -> list[int]:
        """All that are open in here, for a forked child that must let go of them."""
        return [] if self.ended or self._wake_fd < 0 else [self._wake_fd, self._epoll.fileno(), *self._io]

    def register(self, fd: int, handler: Callable[[int], None], events: int = IN) -> None:
        self._io[fd] = handler
        self._epoll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        if self._io.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def lead(self, done: Callable[[], object]) -> None:
        """Do the reactor's work on the calling thread until `done()`, for `LEAD_S` at most.

        For a thread that would otherwise sleep until the reactor wakes it, after appending to `calls` whatever it waits
        for. Returns at once when another thread is at it; that one has been told then. Any thread.

        Args:
            done: called between two rounds, as the reactor.
        """
        with HeldSignals():
            if self._lead.acquire(blocking=False):
                try:
                    self._lead_rounds(done)
                finally:
                    self._leader = 0
                    self._led_until = time.monotonic()
                    hand_over = self._stopped or not done()
                    self.awake = self._standing_by  # its thread will look, now or in a moment
                    self._lead.release()
                    if hand_over:
                        self._end_stand_by()
        if self.calls and not self.awake:
            self.wake()

    def _lead_rounds(self, done: Callable[[], object]) -> None:
        self._leader = threading.get_ident()
        begin = now = time.monotonic()
        while now < begin + LEAD_S:
            self._round(self._await_events(begin + LEAD_S - now))
            if self._stopped:
                os.eventfd_write(self._wake_fd, 1)  # for its own thread, which will close it
                return
            if done():
                return
            now = time.monotonic()

    def _await_events(self, at_most_s: float) -> list[tuple[int, int]]:
        """Look, spin where that promises to be enough, sleep."""
        poll = self._epoll.poll
        events = poll(0.0)
        if events or self.calls or self.dirty:
            return events
        begin = now = time.monotonic()
        if self._quick_sleeps >= self._sleeps_before_spin:
            while now < begin + SPIN_S:
                events = poll(0.0)
                if events or self.calls:
                    self._sleeps_before_spin = 1
                    return events
                now = time.monotonic()
            self._sleeps_before_spin = min(2 * self._sleeps_before_spin, MAX_SLEEPS_BEFORE_SPIN)
            self._quick_sleeps = 0
            at_most_s -= now - begin
        events = poll(self._time_to_sleep(at_most_s))
        if time.monotonic() - now < QUICK_S:
            self._quick_sleeps += 1
        else:
            self._quick_sleeps = 0
        return events

    def _time_to_sleep(self, at_most_s: float = -1.0) -> float:
        """Seconds until the next round is due; -1: until something comes."""
        if self.calls or self.dirty:
            return 0.0
        if self._timers:
            due_s = max(0.0, self._timers[0][0] - time.monotonic())
            return due_s if at_most_s < 0 else min(due_s, at_most_s)
        return at_most_s

    def _run(self) -> None:
        """The life of its own thread."""
        while not self._stopped:
            before = self._rounds
            # An append that saw `awake` set after the last look at `calls` is caught by a time of 0.
            events = self._epoll.poll(self._time_to_sleep())
            self._standing_by = True  # first: whoever leads must see it, or must have let go
            if not self._lead.acquire(blocking=False):
                self._stand_by()
            self._standing_by = False
            self._leader = threading.get_ident()
            if self._rounds != before:  # of another leader, who took these events
                events = self._epoll.poll(0.0)
            self._round(events)
            self._leader = 0
            self._lead.release()
        self._lead.acquire()  # and never let go
        self._leader = threading.get_ident()
        self._close()

    def _stand_by(self) -> None:
        """Somebody leads. Sleep until nobody has for a moment, or it is time to take over; then lead."""
        while True:
            told = self._resume.acquire(timeout=STAND_BY_S)
            if self._lead.acquire(blocking=False):
                if told or time.monotonic() - self._led_until > STAND_BY_S:
                    return
                self._lead.release()

    def _end_stand_by(self) -> None:
        try:
            self._resume.release()
        except RuntimeError:  # it was told already
            pass

    def _round(self, events: list[tuple[int, int]]) -> None:
        """Take in what has come, run what was asked for, and send what is to be sent."""
        calls, io, dirty = self.calls, self._io, self.dirty
        self._rounds += 1
        self.awake = True  # whoever appends from here on is seen in this round: no need for a system call
        for fd, mask in events:
            if fd == self._wake_fd:
                os.eventfd_read(fd)
                continue
            handler = io.get(fd)
            if handler is not None:
                self._guard(handler, mask)
        for _ in range(_CALLS_PER_ROUND):  # those that these add are part of this round, within reason
            if not calls:
                break
            call, args = calls.popleft()
            self._guard(call, *args)
            del call, args  # a sleeping loop must not keep alive what it called last
        if self._timers:
            self._run_timers()
        while dirty:
            channel = dirty.pop()
            channel.marked = False
            self._guard(channel.flush)
        self.awake = False

    def __del__(self) -> None:
        # Not when the loop ends: a thread on its way into `wake` would write into whatever file got the number next.
        if self._wake_fd >= 0:
            os.close(self._wake_fd)

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, _, timer = heapq.heappop(self._timers)
            if timer.call is not None:
                self._guard(timer.call)

    def _guard(self, call: Callable[..., object], *args: Any) -> None:
        try:
            call(*args)
        except Exception:
            # The boundary of this thread: a bug in one handler must not silence every other connection.
            logger.exception("reactor=%s handler failed", self._name)

    def _close(self) -> None:
        self.ended = self.awake = True
        while self.calls:  # of threads that did not know yet; whoever waits for an answer gets it
            call, args = self.calls.popleft()
            self._guard(call, *args)
        for fd in list(self._io):
            self.unregister(fd)
        self._epoll.close()
        self._timers.clear()


class Channel:
    """One connection of a reactor. All methods belong to the reactor's thread, except `post` and `flush_here`.

    Args:
        messages: decoder of what may arrive.
        on_message: called for each message that is not an answer.
        on_close: called once with the reason.
    """

    def __init__(
        self,
        reactor: Reactor,
        messages: msgspec.msgpack.Decoder[list[Any]],
        on_message: Callable[[Channel, Any], None],
        on_close: Callable[[Channel, Exception], None],
        peer_name: str = "",
    ) -> None:
        self.reactor = reactor
        self.peer_name = peer_name
        self.on_message = on_message
        self.on_close = on_close
        self.context: Any = None  # whatever the owner of the connection wants to find again
        self.open = False
        self.closed = False
        self.marked = False  # listed in the reactor's `dirty`
        self._decoder = messages
        self._reader = FrameReader()
        self._sock: socket.socket | None = None
        self._outbox: list[bytes] = []
        self._unsent: memoryview | None = None
        self._requests: dict[int, Callable[[Any], None]] = {}
        self._rids = itertools.count(1)
        self._write_lock = threading.Lock()
        self._handshake: ClientHandshake | ServerHandshake | None = None
        self._opened: Callable[[Channel, Hello | None], None] | None = None
        self._deadline: Timer | None = None
        self._address = ""  # where `connect` was told to go
        self._failed: OSError | None = None  # of a write
        self._shaken = bytearray()  # of the handshake's next message

    # ------------------------------------------------------------------------------------------------- opening

    def connect(self, address: str, token: bytes, target: str, name: str) -> None:
        """Begin to connect; messages may be sent at once, and leave when it is open. Failure comes to `on_close`."""
        handshake = ClientHandshake(token, target, name)
        self._address = address.removeprefix("unix:")
        try:
            if address.startswith("unix:"):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                where: Any = address[5:]
            else:
                host, port = split_address(address)
                info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
                sock, where = socket.socket(info[0], socket.SOCK_STREAM), info[4]
        except (OSError, ShoalError) as exc:
            # Not at once: the caller is not ready to hear it.
            self.reactor.call_soon(self.close, self._unreachable(exc))
            return
        tune(sock)
        self._set_deadline()
        self._try_connect(sock, where, handshake)

    def _try_connect(self, sock: socket.socket, where: Any, handshake: ClientHandshake) -> None:
        result = sock.connect_ex(where) if not self.closed else errno.ECANCELED
        if result == errno.EAGAIN:  # a Unix socket whose queue of connections is full: nothing has begun
            self.reactor.call_later(_AGAIN_S, lambda: self._try_connect(sock, where, handshake))
        elif result in (0, errno.EINPROGRESS):
            self._start(sock, handshake)
            self._unsent = memoryview(handshake.start())
            self.flush()
        else:
            sock.close()
            self.reactor.call_soon(self.close, self._unreachable(OSError(result, os.strerror(result))))

    def _unreachable(self, error: Exception | str) -> ClusterConnectionError:
        text = error.strerror if isinstance(error, OSError) and error.strerror else error
        return ClusterConnectionError(f"cannot connect to {self._address or 'a peer'}: {text}")

    def accept(
        self,
        sock: socket.socket,
        token: bytes,
        name: str,
        admit: Admit,
        opened: Callable[[Channel, Hello | None], None],
    ) -> None:
        """Begin the server's side of a handshake; `opened(self, hello)` is called when the peer is authentic."""
        tune(sock)
        self._opened = opened
        self._set_deadline()
        self._start(sock, ServerHandshake(token, name, admit))

    def adopt(self, sock: socket.socket) -> None:
        """Speak over a socket whose handshake another process of this node made."""
        tune(sock)
        self._start(sock, None)
        self.open = True

    def _start(self, sock: socket.socket, handshake: ClientHandshake | ServerHandshake | None) -> None:
        self._sock = sock
        self._handshake = handshake
        self.reactor.register(sock.fileno(), self._ready, IN)

    def _set_deadline(self) -> None:
        who = f" with {self._address}" if self._address else ""
        late = ClusterConnectionError(f"the handshake{who} was not done within {_HANDSHAKE_TIMEOUT_S:.0f} s")
        self._deadline = self.reactor.call_later(_HANDSHAKE_TIMEOUT_S, lambda: self.close(late))

    def take_socket(self) -> socket.socket:
        """Stop speaking and give the socket away (it carries something else from now on)."""
        sock = self._sock
        assert sock is not None
        if self._deadline is not None:
            self._deadline.cancel()
        self.reactor.unregister(sock.fileno())
        self._sock, self.closed = None, True
        return sock

    # ------------------------------------------------------------------------------------------------- sending

    def send(self, message: Message) -> None:
        self.send_encoded(encode_message(message))

    def send_encoded(self, message: bytes) -> None:
        """Queue one encoded message; it leaves at the end of the reactor's round. Dropped when closed.

        Raises:
            FrameError: it is longer than any frame may be; nothing was sent.
        """
        if self.closed:
            return
        if len(message) > _READ_BYTES:
            check_size(message)
        self._outbox.append(message)
        if not self.marked:
            self.marked = True
            self.reactor.dirty.append(self)

    def request(self, message: Request, answered: Callable[[Any], None]) -> int:
        """Send; `answered(reply)` is called once, with `Failed` (kind "closed") if the connection ends first, or (kind
        "too_large") if the message is longer than any frame may be."""
        rid = next(self._rids)
        msgspec.structs.force_setattr(message, "rid", rid)
        if self.closed:
            self.reactor.call_soon(answered, Failed(rid, "closed", "the connection is closed"))
            return rid
        self._requests[rid] = answered
        try:
            self.send(message)
        except FrameError as exc:
            del self._requests[rid]
            self.reactor.call_soon(answered, Failed(rid, "too_large", str(exc)))
        return rid

    def forget(self, rid: int) -> bool:
        """Give up on a request; False when it was answered already."""
        return self._requests.pop(rid, None) is not None

    def reply(self, request: Request, answer: Reply) -> None:
        if request.rid:
            msgspec.structs.force_setattr(answer, "rid", request.rid)
            self.send(answer)

    def post(self, message: bytes) -> None:
        """Queue one encoded message from any thread, without waking anybody: `flush_here` or the reactor sends it."""
        if len(message) > _READ_BYTES:
            check_size(message)
        self._outbox.append(message)

    def flush_here(self) -> None:
        """Write what is queued from the calling thread, if the socket takes it and nobody else is writing."""
        if self._unsent is None and self.open and not self.closed:
            self.flush()
        else:
            self.reactor.call_soon(self.flush)

    def flush(self) -> None:
        while (self._unsent is not None or (self._outbox and self.open)) and self._write_lock.acquire(blocking=False):
            try:
                if not self._write():
                    return
            except BaseException:
                # A signal handler of the user's raised here: nobody knows how much of the frame was sent.
                reason = ClusterConnectionError("interrupted in the middle of a write")
                self.reactor.call_soon(self.close, reason)
                raise
            finally:
                self._write_lock.release()

    def _write(self) -> bool:
        """Write one frame. False when the socket is full or gone: the reactor goes on when it is writable."""
        sock = self._sock
        if sock is None or self.closed:
            return False
        if self._unsent is None:
            count = len(self._outbox)
            messages = self._outbox[:count]
            del self._outbox[:count]
            try:
                self._unsent = memoryview(join_frame(messages))
            except FrameError:  # too much for one frame; each alone fits
                self._outbox[:0] = messages[1:]
                self._unsent = memoryview(join_frame(messages[:1]))
        try:
            sent = sock.send(self._unsent)
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            self._failed = exc
            self._unsent = None
            self.reactor.call_soon(self._ready, IN)  # reading finds out why, on the reactor's thread
            return False
        if sent == len(self._unsent):
            self._unsent = None
            return True
        self._unsent = self._unsent[sent:]
        self.reactor.call_soon(self._want_write)
        return False

    def _want_write(self) -> None:
        if self._sock is not None:
            self.reactor.modify(self._sock.fileno(), IN | OUT if self._unsent is not None else IN)

    # ----------------------------------------------------------------------------------------------- receiving

    def _ready(self, events: int) -> None:
        if self.closed:
            return
        if events & OUT:
            self.flush()
            self._want_write()
        if events & ~OUT:
            self._read()

    def _read(self) -> None:
        for _ in range(_READS_PER_ROUND):
            sock = self._sock
            if sock is None:
                return
            if self._handshake is not None:
                # Exactly one message at a time: what follows the handshake may be for somebody else.
                if not self._shake(sock):
                    return
                continue
            try:
                data = sock.recv(_READ_BYTES)
            except BlockingIOError:
                return
            except OSError as exc:
                self.close(exc)
                return
            if not data:
                self.close(ClusterConnectionError(f"{self.peer_name or 'the peer'} closed the connection"))
                return
            self._take(data)
            if len(data) < _READ_BYTES:
                return

    def _take(self, data: bytes) -> None:
        try:
            for body in self._reader.feed(data):
                for message in decode_frame(self._decoder, body):
                    try:
                        if isinstance(message, Reply):
                            answered = self._requests.pop(message.rid, None)
                            if answered is not None:
                                answered(message)
                        else:
                            self.on_message(self, message)
                    except Exception as exc:  # noqa: BLE001 - the boundary of every handler
                        self._handler_failed(message, exc)
                    if self.closed:
                        return
        except FrameError as exc:
            logger.error("closing a connection that broke the protocol peer=%s error=%s", self.peer_name, exc)
            self.close(exc)

    def _handler_failed(self, message: Any, exc: Exception) -> None:
        """A bug in one handler must not swallow the messages that came behind this one."""
        logger.error("handler failed peer=%s message=%s", self.peer_name, type(message).__name__, exc_info=exc)
        if isinstance(message, Request):
            self.reply(message, Failed(kind="internal", text=f"{type(exc).__name__}: {exc}"))

    def _shake(self, sock: socket.socket) -> bool:
        """Take one handshake message if it is there. False when there is nothing more to read now."""
        handshake = self._handshake
        assert handshake is not None
        head = self._shaken
        try:
            size = int.from_bytes(head[:4], "little") if len(head) >= 4 else 0
            if size > MAX_HANDSHAKE_BYTES:
                raise FrameError("the peer does not speak shoal's protocol")
            wanted = 4 + size - len(head)
            data = sock.recv(wanted)
            if not data:
                self.close(self._unreachable(self._failed or "it closed the connection during the handshake"))
                return False
            head += data
            if len(data) < wanted or len(head) == 4:
                return True  # more may be there
            self._shaken = bytearray()
            [message] = decode_frame(handshake_decoder, head[4:])
            answer = handshake.receive(message)
        except BlockingIOError:
            return False
        except (FrameError, ValueError, ShoalError) as exc:  # ValueError: not exactly one message
            self.close(exc)
            return False
        except OSError as exc:
            self.close(self._unreachable(exc))
            return False
        if answer:
            self._unsent = memoryview(answer if self._unsent is None else bytes(self._unsent) + answer)
            if isinstance(handshake, ClientHandshake) and handshake.proved:
                self.open = True  # the first messages need not wait for the welcome
            self.flush()
        if isinstance(handshake, ServerHandshake) and handshake.refused is not None:
            self.close(AuthenticationError(handshake.refused.text))
            return False
        if handshake.done:
            self._finish(handshake)
        return True

    def _finish(self, handshake: ClientHandshake | ServerHandshake) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._handshake = None
        self.open = True
        if isinstance(handshake, ClientHandshake):
            self.peer_name = self.peer_name or handshake.peer_name
        else:
            assert handshake.hello is not None
            self.peer_name = handshake.hello.name
            if self._opened is not None:
                self._opened(self, handshake.hello)
        self.flush()

    # ------------------------------------------------------------------------------------------------- closing

    def close(self, reason: Exception | None = None) -> None:
        """Close at once; requests fail and `on_close` is called (also when the reason is ours)."""
        if self.closed:
            return
        reason = reason or ClusterConnectionError("closed on this side")
        self.closed, self.open = True, False
        if self._deadline is not None:
            self._deadline.cancel()
        if self._sock is not None:
            self.reactor.unregister(self._sock.fileno())
            self._sock.close()
            self._sock = None
        requests, self._requests = self._requests, {}
        for rid, answered in requests.items():
            answered(Failed(rid, "closed", str(reason)))
        self.on_close(self, reason)


class Acceptor:
    """A listening Unix socket of a worker: peers of this node connect, and its agent hands over those of others."""

    def __init__(
        self,
        reactor: Reactor,
        path: str,
        token: bytes,
        name: str,
        make_channel: Callable[[], Channel],
        opened: Callable[[Channel, Hello], None],
    ) -> None:
        self._reactor = reactor
        self._token = token
        self._name = name
        self._make_channel = make_channel
        self._notify = opened
        self._sock = listen_unix(path)
        reactor.call_soon(reactor.register, self._sock.fileno(), self._accept)

    def _accept(self, _events: int) -> None:
        while True:
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as exc:  # out of file descriptors, or the peer went away in the queue
                logger.warning("cannot accept connections at %s: %s", self._name, exc)
                self._pause()
                return
            self._make_channel().accept(sock, self._token, self._name, lambda _: None, self._opened)

    def _pause(self) -> None:
        """The listener stays readable as long as somebody waits: look away for a moment instead of spinning."""
        self._reactor.unregister(self._sock.fileno())
        self._reactor.call_later(_AGAIN_S, self._resume)

    def _resume(self) -> None:
        if self._sock.fileno() >= 0:
            self._reactor.register(self._sock.fileno(), self._accept)

    def _opened(self, channel: Channel, hello: Hello | None) -> None:
        assert hello is not None
        if hello.target != HANDOFF:
            self._notify(channel, hello)
            return
        carrier = channel.take_socket()
        self._reactor.register(carrier.fileno(), lambda _: self._receive(carrier))

    def _receive(self, carrier: socket.socket) -> None:
        try:
            sock, hello = receive_handed_over(carrier)
        except BlockingIOError:
            return  # an event of this round that was for a descriptor with the same number before
        except (OSError, FrameError) as exc:
            logger.warning("a connection was lost while it was handed over: %s", exc)
            self._drop(carrier)
            return
        self._drop(carrier)
        channel = self._make_channel()
        channel.peer_name = hello.name
        channel.adopt(sock)
        self._notify(channel, hello)

    def _drop(self, carrier: socket.socket) -> None:
        self._reactor.unregister(carrier.fileno())
        carrier.close()

    def close(self) -> None:
        self._reactor.unregister(self._sock.fileno())
        self._sock.close()
