"""The reactor and its channels over real sockets: order, back-pressure, every way to end, and no lost wake-up."""

from __future__ import annotations

import gc
import os
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shoal.exceptions import AuthenticationError, ClusterConnectionError, ShoalError
from shoal.rpc import frames, reactor
from shoal.rpc.auth import ClientHandshake, ServerHandshake
from shoal.rpc.frames import encode_message, join_frame, make_decoder
from shoal.rpc.messages import Done, Failed, Hello, Message, Refused, Request, Welcome
from shoal.rpc.reactor import Acceptor, Channel, Reactor
from shoal.rpc.sockets import HANDOFF, read_handshake_message, send_handed_over, shake_hands

TOKEN = b"the-token-of-this-cluster"
LIMIT_S = 20.0


class Note(Message, frozen=True, tag=900):
    number: int = 0
    data: bytes = b""


class Ask(Request, frozen=True, tag=901):
    number: int = 0


decoder = make_decoder(Note | Ask | Done | Failed)


def wait_until(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.002)


def is_cut_off(sock: socket.socket) -> bool:
    """Whether the other side ends the connection without having said anything."""
    try:
        return sock.recv(100) == b""
    except ConnectionResetError:
        return True  # what we said was not even read to its end


class Side:
    """A channel and all that it was told."""

    def __init__(self, owner: Reactor) -> None:
        self.heard: list[Any] = []
        self.closings: list[Exception] = []
        self.channel = Channel(owner, decoder, self.on_message, lambda _, reason: self.closings.append(reason))

    def on_message(self, channel: Channel, message: Any) -> None:
        self.heard.append(message)
        if isinstance(message, Ask):
            channel.reply(message, Done())


def run(owner: Reactor, call: Callable[..., Any], *args: Any) -> Any:
    """The result of `call` on the reactor's thread."""
    done = threading.Event()
    box: list[Any] = []

    def on_thread() -> None:
        try:
            box.append(call(*args))
        except Exception as exc:
            box.append(exc)
        done.set()

    owner.call_soon(on_thread)
    assert done.wait(LIMIT_S), "the reactor does not answer"
    return box[0]


@pytest.fixture
def loop() -> Iterator[Reactor]:
    made = Reactor("test")
    made.start()
    yield made
    made.stop()
    made.thread.join(LIMIT_S)
    assert not made.thread.is_alive()


class Served:
    """A listening socket with a side for each connection."""

    def __init__(self, owner: Reactor, path: str) -> None:
        self.owner, self.path = owner, path
        self.sides: list[Side] = []
        self.hellos: list[Hello] = []
        self.acceptor = Acceptor(owner, path, TOKEN, "server", self._make, lambda _, hello: self.hellos.append(hello))

    def _make(self) -> Channel:
        self.sides.append(Side(self.owner))
        return self.sides[-1].channel

    def connect(self, owner: Reactor, token: bytes = TOKEN, target: str = "worker") -> Side:
        side = Side(owner)
        owner.call_soon(side.channel.connect, f"unix:{self.path}", token, target, "client")
        return side

    def plain(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(LIMIT_S)
        sock.connect(self.path)
        return sock


@pytest.fixture
def served(loop: Reactor, tmp_path: Path) -> Iterator[Served]:
    made = Served(loop, str(tmp_path / "s"))
    yield made
    run(loop, made.acceptor.close)
    for side in made.sides:
        run(loop, side.channel.close)


def linked(loop: Reactor) -> tuple[Side, Side]:
    """Two channels over a socket pair, without a handshake."""
    left, right = Side(loop), Side(loop)
    for side, sock in zip((left, right), socket.socketpair(), strict=True):
        run(loop, side.channel.adopt, sock)
    return left, right


# --------------------------------------------------------------------------------------------------- calls and timers


def test_calls_run_in_order_on_its_thread(loop: Reactor) -> None:
    seen: list[tuple[int, bool]] = []
    for number in range(5000):
        loop.call_soon(lambda n: seen.append((n, threading.current_thread() is loop.thread)), number)
    wait_until(lambda: len(seen) == 5000)
    assert seen == [(number, True) for number in range(5000)]


def test_thousands_of_calls_from_many_threads_all_run_in_the_order_of_each(loop: Reactor) -> None:
    count, each = 8, 4000
    seen: list[list[int]] = [[] for _ in range(count)]

    def call(who: int) -> None:
        for number in range(each):
            loop.call_soon(seen[who].append, number)
            if number % 97 == 0:
                time.sleep(0)

    threads = [threading.Thread(target=call, args=(who,)) for who in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    wait_until(lambda: all(len(list_) == each for list_ in seen))
    assert all(list_ == list(range(each)) for list_ in seen)


def test_no_wake_up_is_lost(loop: Reactor) -> None:
    """Each call finds the reactor just going to sleep, or just about to: the place where a wake-up could be lost."""
    rng = random.Random(1)
    woken = threading.Event()
    deadline = time.monotonic() + 1.0
    rounds = 0
    while time.monotonic() < deadline:
        woken.clear()
        loop.call_soon(woken.set)
        assert woken.wait(5.0), f"lost after {rounds} rounds"
        for _ in range(rng.randrange(40)):
            pass
        rounds += 1
    assert rounds > 500


INTERRUPTED = """
import signal, threading
from shoal.rpc.reactor import Reactor

class Interrupt(Exception):
    pass

def raise_interrupt(*_):
    raise Interrupt

loop = Reactor("test")
loop.start()
signal.signal(signal.SIGALRM, raise_interrupt)
interrupts = 0
for number in range(300):
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0003 + number * 1e-6)
        for _ in range(20_000):
            loop.call_soon(int)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupt:
        interrupts += 1
    woken = threading.Event()
    loop.call_soon(woken.set)
    assert woken.wait(10.0), f"asleep after {interrupts} interrupts"
loop.stop()
loop.thread.join()
print(interrupts)
"""


def test_a_call_that_a_signal_handler_interrupts_leaves_nobody_asleep() -> None:
    """As a Ctrl-C does: the handler raises wherever the main thread is, also in the middle of `call_soon`."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=LIMIT_S * 2, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


# ---------------------------------------------------------------------------------------------------------- leading


def test_who_leads_does_the_work_on_its_own_thread_until_it_is_done(loop: Reactor) -> None:
    ran: list[int] = []
    for _ in range(100):  # the reactor's thread may be in a round just then, and would take the calls
        ran.clear()
        loop.calls.append((lambda: ran.append(threading.get_ident()), ()))
        loop.lead(lambda: ran)
        wait_until(lambda: ran)
        if ran == [threading.get_ident()]:
            break
    else:
        pytest.fail("this thread never led")
    assert not loop.is_here
    assert run(loop, lambda: loop.is_here)


def test_a_leader_hears_what_arrives(loop: Reactor) -> None:
    left, right = linked(loop)
    for number in range(300):
        loop.calls.append((left.channel.send, (Note(number),)))
        loop.lead(lambda: len(right.heard) > number)  # noqa: B023
        wait_until(lambda: len(right.heard) > number)  # noqa: B023
    assert [note.number for note in right.heard] == list(range(300))


def test_a_leader_that_waits_in_vain_hands_over(loop: Reactor) -> None:
    loop.lead(lambda: False)
    assert run(loop, threading.get_ident) == loop.thread.ident


def test_what_comes_after_a_leader_has_left_is_done_without_being_waited_for(loop: Reactor) -> None:
    left, right = linked(loop)
    for number in range(200):
        loop.lead(lambda: True)
        loop.call_soon(left.channel.send, Note(number))
        wait_until(lambda: len(right.heard) > number)  # noqa: B023
    assert run(loop, threading.get_ident) == loop.thread.ident


def test_only_one_leads_and_what_the_other_wanted_is_done(loop: Reactor) -> None:
    inside = threading.Event()
    release = threading.Event()

    def hold() -> bool:
        inside.set()
        return release.wait(LIMIT_S)

    leader = threading.Thread(target=loop.lead, args=(hold,))
    leader.start()
    assert inside.wait(LIMIT_S)
    box: list[int] = []
    loop.calls.append((box.append, (1,)))
    loop.lead(lambda: pytest.fail("two lead at once"))
    release.set()
    leader.join(LIMIT_S)
    wait_until(lambda: box)


def test_no_wake_up_is_lost_between_leaders(loop: Reactor) -> None:
    """Threads lead, call and wait in every order; each must get its answer."""
    problems: list[str] = []
    deadline = time.monotonic() + 1.5

    def live(seed: int) -> None:
        rng = random.Random(seed)
        rounds = 0
        while time.monotonic() < deadline and not problems:
            woken = threading.Event()
            if rng.random() < 0.5:
                loop.calls.append((woken.set, ()))
                loop.lead(woken.is_set)
            else:
                loop.call_soon(woken.set)
            if not woken.wait(5.0):
                problems.append(f"thread {seed} was forgotten in round {rounds}")
            for _ in range(rng.randrange(3000 if rng.random() < 0.1 else 30)):
                pass
            rounds += 1

    threads = [threading.Thread(target=live, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert problems == []


def test_a_leader_may_be_the_one_that_hears_of_the_end() -> None:
    for _ in range(50):
        made = Reactor("test")
        made.start()
        made.calls.append((made._end, ()))
        made.lead(lambda: False)
        made.wake()
        made.thread.join(LIMIT_S)
        assert not made.thread.is_alive()
        made.lead(lambda: pytest.fail("an ended reactor was led"))


LED_AND_INTERRUPTED = """
import signal, socket, threading
from shoal.rpc.reactor import Reactor

class Interrupt(Exception):
    pass

def raise_interrupt(*_):
    raise Interrupt

loop = Reactor("test")
loop.start()
signal.signal(signal.SIGALRM, raise_interrupt)
interrupts = begun = ended = 0

def step():
    global begun, ended
    begun += 1
    for _ in range(100):
        pass
    ended += 1

for number in range(500):
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0003 + number % 100 * 1e-6)
        while True:
            before = ended
            loop.calls.append((step, ()))
            loop.lead(lambda: ended > before)
    except Interrupt:
        interrupts += 1
    woken = threading.Event()
    loop.call_soon(woken.set)
    assert woken.wait(10.0), f"asleep after {interrupts} interrupts"
    assert begun == ended, "a step was cut in two"
loop.stop()
loop.thread.join()
print(interrupts)
"""


def test_no_step_of_a_leader_is_cut_in_two_by_a_signal_handler() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LED_AND_INTERRUPTED], capture_output=True, text=True, timeout=LIMIT_S * 2, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 500


def test_a_write_that_fails_leaves_the_reactor_to_be_woken(loop: Reactor, monkeypatch: pytest.MonkeyPatch) -> None:
    run(loop, lambda: None)
    wait_until(lambda: not loop.awake)

    def interrupted(fd: int, value: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "eventfd_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.call_soon(print)
    assert run(loop, lambda: "awake") == "awake"


def test_timers_fire_in_order_and_not_when_cancelled(loop: Reactor) -> None:
    seen: list[str] = []

    def plan() -> None:
        for delay, name in ((0.03, "c"), (0.01, "a"), (0.02, "b"), (0.0, "now")):
            loop.call_later(delay, lambda name=name: seen.append(name))  # type: ignore[misc]
        loop.call_later(0.015, lambda: seen.append("cancelled")).cancel()

    loop.call_soon(plan)
    wait_until(lambda: len(seen) == 4)
    assert seen == ["now", "a", "b", "c"]


def test_a_timer_is_not_late_and_an_idle_reactor_sleeps(loop: Reactor) -> None:
    fired: list[float] = []
    begin = time.monotonic()
    loop.call_soon(loop.call_later, 0.1, lambda: fired.append(time.monotonic()))
    cpu = time.thread_time()
    wait_until(lambda: fired)
    assert 0.1 <= fired[0] - begin < 1.0
    assert run(loop, time.thread_time) < 0.1
    assert cpu < 60


def test_a_handler_that_fails_harms_nobody_else(loop: Reactor, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("a bug")

    loop.call_soon(fail)
    loop.call_soon(loop.call_later, 0.0, fail)
    wait_until(lambda: len(caplog.records) == 2)
    assert run(loop, lambda: 7) == 7


def test_stopping_runs_what_was_called_before_and_drops_what_comes_after(tmp_path: Path) -> None:
    made = Reactor("test")
    made.start()
    ran: list[int] = []
    for number in range(1000):
        made.call_soon(ran.append, number)
    made.stop()
    made.thread.join(LIMIT_S)
    assert ran == list(range(1000))
    assert made.ended
    # The descriptor is not closed while anybody may still write into it: a file of the user's might get its number.
    with open(tmp_path / "users", "w+b") as file:
        made.call_soon(ran.append, 1000)
        made.wake()
        made.stop()
        assert file.read() == b""
    assert len(ran) == 1000


def test_threads_that_call_while_it_stops_get_an_answer_or_see_that_it_ended() -> None:
    for _ in range(30):
        made = Reactor("test")
        made.start()
        lost: list[int] = []

        def call(owner: Reactor = made, lost: list[int] = lost) -> None:
            while True:
                done = threading.Event()
                owner.call_soon(done.set)
                if owner.ended:
                    return
                if not done.wait(5.0):
                    lost.append(1)
                    return

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        made.stop()
        for thread in threads:
            thread.join(LIMIT_S)
        made.thread.join(LIMIT_S)
        assert not lost or made.ended


def test_a_reactor_that_ended_leaves_no_descriptor() -> None:
    def cycle() -> None:
        made = Reactor("test")
        made.start()
        left, right = linked(made)
        run(made, left.channel.close)
        run(made, right.channel.close)
        made.stop()
        made.thread.join(LIMIT_S)

    cycle()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        cycle()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


# ----------------------------------------------------------------------------------------------------------- messages


def test_what_is_sent_in_one_round_travels_together(loop: Reactor) -> None:
    ours, peer = socket.socketpair()
    side = Side(loop)
    run(loop, side.channel.adopt, ours)

    def burst() -> None:
        for number in range(500):
            side.channel.send(Note(number))

    run(loop, burst)
    peer.settimeout(LIMIT_S)
    with peer.makefile("rb") as stream:
        size = int.from_bytes(stream.read(4), "little")
        assert [note.number for note in decoder.decode(stream.read(size))] == list(range(500))
    peer.close()
    wait_until(lambda: side.closings)


def test_messages_arrive_in_order_also_those_sent_from_another_thread(loop: Reactor) -> None:
    left, right = linked(loop)
    for number in range(3000):
        left.channel.post(encode_message(Note(number)))
        if number % 7 == 0:
            left.channel.flush_here()
    left.channel.flush_here()
    wait_until(lambda: len(right.heard) == 3000)
    assert [note.number for note in right.heard] == list(range(3000))
    run(loop, left.channel.close)


def test_a_thread_and_the_reactor_may_send_at_once(loop: Reactor) -> None:
    left, right = linked(loop)
    data = os.urandom(3000)
    stop = threading.Event()

    def from_thread() -> None:
        for number in range(2000):
            left.channel.post(encode_message(Note(number, data)))
            left.channel.flush_here()
        stop.set()

    thread = threading.Thread(target=from_thread)
    thread.start()
    sent = 0
    while not stop.is_set():
        loop.call_soon(left.channel.send, Note(-1, data))
        sent += 1
        if sent % 50 == 0:
            time.sleep(0.001)
    thread.join(LIMIT_S)
    wait_until(lambda: len(right.heard) == 2000 + sent)
    assert [note.number for note in right.heard if note.number >= 0] == list(range(2000))
    assert all(note.data == data for note in right.heard)
    run(loop, left.channel.close)


def test_requests_are_answered_once_whatever_the_order(loop: Reactor) -> None:
    left, right = linked(loop)
    answers: list[tuple[int, Any]] = []

    def ask() -> None:
        for number in range(300):
            left.channel.request(Ask(0, number), lambda reply, n=number: answers.append((n, reply)))  # type: ignore[misc]

    run(loop, ask)
    wait_until(lambda: len(answers) == 300)
    assert [number for number, _ in answers] == list(range(300))
    assert all(isinstance(reply, Done) for _, reply in answers)
    run(loop, right.channel.send, Done(5))  # an answer to nothing
    assert run(loop, lambda: left.channel.closed) is False
    run(loop, left.channel.close)


def test_a_request_given_up_is_not_answered(loop: Reactor) -> None:
    left, _right = linked(loop)
    answers: list[Any] = []

    def ask_and_forget() -> bool:
        rid = left.channel.request(Ask(), answers.append)
        return left.channel.forget(rid)

    assert run(loop, ask_and_forget) is True
    assert run(loop, left.channel.forget, 1) is False
    run(loop, left.channel.request, Ask(), answers.append)
    wait_until(lambda: answers)
    assert len(answers) == 1
    run(loop, left.channel.close)


def test_a_handler_that_fails_costs_one_message_and_answers_its_request(loop: Reactor) -> None:
    left, right = linked(loop)
    heard: list[int] = []

    def picky(channel: Channel, message: Any) -> None:
        if message.number == 1:
            raise ValueError("not this one")
        heard.append(message.number)

    right.channel.on_message = picky
    answers: list[Any] = []

    def send() -> None:
        left.channel.send(Note(0))
        left.channel.request(Ask(0, 1), answers.append)
        left.channel.send(Note(2))

    run(loop, send)
    wait_until(lambda: heard == [0, 2] and answers)
    assert isinstance(answers[0], Failed)
    assert "not this one" in answers[0].text
    run(loop, left.channel.close)


def test_a_peer_that_stops_reading_blocks_nobody_and_gets_all_later(loop: Reactor) -> None:
    ours, peer = socket.socketpair()
    slow, (left, right) = Side(loop), linked(loop)
    run(loop, slow.channel.adopt, ours)
    data = os.urandom(1 << 20)

    def flood() -> None:
        for number in range(20):
            slow.channel.send(Note(number, data))

    for _ in range(2):
        run(loop, flood)
    run(loop, left.channel.send, Note(1))
    wait_until(lambda: right.heard)  # others are served
    cpu = run(loop, time.thread_time)
    slow.channel.post(encode_message(Note(77)))
    slow.channel.flush_here()  # does not block either
    time.sleep(0.05)
    assert run(loop, time.thread_time) - cpu < 0.04, "it spins on a socket that is full"
    peer.settimeout(LIMIT_S)
    numbers: list[int] = []
    with peer.makefile("rb") as stream:
        while not numbers or numbers[-1] != 77:
            size = int.from_bytes(stream.read(4), "little")
            numbers += [note.number for note in decoder.decode(stream.read(size))]
    assert numbers == [*range(20), *range(20), 77]
    peer.close()
    wait_until(lambda: slow.closings)


def test_a_peer_that_ends_in_the_middle_of_a_frame_closes_the_channel(loop: Reactor) -> None:
    ours, peer = socket.socketpair()
    side = Side(loop)
    run(loop, side.channel.adopt, ours)
    frame = join_frame([encode_message(Note(1, b"x" * 1000))])
    peer.sendall(frame + frame[:500])
    peer.close()
    wait_until(lambda: side.closings)
    assert side.heard == [Note(1, b"x" * 1000)]
    assert isinstance(side.closings[0], ClusterConnectionError)
    assert len(side.closings) == 1


@pytest.mark.parametrize("garbage", [b"\xff" * 64, b"\x03\0\0\0abc", join_frame([b"\x92\xcd\x03\x84"])])
def test_a_peer_that_breaks_the_protocol_is_cut_off(loop: Reactor, garbage: bytes) -> None:
    ours, peer = socket.socketpair()
    side = Side(loop)
    run(loop, side.channel.adopt, ours)
    answers: list[Any] = []
    run(loop, side.channel.request, Ask(), answers.append)
    peer.sendall(garbage)
    wait_until(lambda: side.closings)
    assert isinstance(answers[0], Failed)
    assert answers[0].kind == "closed"
    peer.close()


def test_requests_fail_when_the_connection_ends_and_at_once_after(loop: Reactor) -> None:
    ours, peer = socket.socketpair()
    side = Side(loop)
    run(loop, side.channel.adopt, ours)
    answers: list[Any] = []
    for _ in range(3):
        run(loop, side.channel.request, Ask(), answers.append)
    peer.close()
    wait_until(lambda: len(answers) == 3)
    run(loop, side.channel.request, Ask(), answers.append)
    wait_until(lambda: len(answers) == 4)
    assert {answer.kind for answer in answers} == {"closed"}
    run(loop, side.channel.send, Note(1))
    run(loop, side.channel.close)
    assert len(side.closings) == 1


def test_what_is_too_long_for_a_frame_fails_alone(loop: Reactor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_MESSAGE_BYTES", 300_000)
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 300_005)
    left, right = linked(loop)

    class LongAsk(Request, frozen=True, tag=902):
        data: bytes = b""

    answers: list[Any] = []
    run(loop, left.channel.request, LongAsk(0, b"x" * 300_001), answers.append)
    wait_until(lambda: answers)
    assert answers[0].kind == "too_large"
    error = run(loop, left.channel.send, Note(1, b"x" * 300_001))
    assert isinstance(error, frames.FrameError)

    def several() -> None:  # together too long for one frame, each alone not
        for number in range(5):
            left.channel.send(Note(number, b"x" * 200_000))

    run(loop, several)
    wait_until(lambda: len(right.heard) == 5)
    assert [note.number for note in right.heard] == list(range(5))
    run(loop, left.channel.close)


def test_a_write_cut_short_by_a_signal_handler_ends_the_connection(loop: Reactor) -> None:
    """Nobody knows how much was sent: to go on would be to send a part twice."""

    class Interrupt(Exception):
        pass

    left, right = linked(loop)

    class Torn:
        def send(self, data: Any) -> int:
            raise Interrupt

        def __getattr__(self, name: str) -> Any:
            return getattr(sock, name)

    sock = left.channel._sock
    left.channel._sock = Torn()  # type: ignore[assignment]
    left.channel.post(encode_message(Note(1)))
    with pytest.raises(Interrupt):
        left.channel.flush_here()
    wait_until(lambda: left.closings and right.closings)
    assert right.heard == []


# ---------------------------------------------------------------------------------------------- connecting, handshakes


def test_first_messages_ride_behind_the_proof(served: Served, loop: Reactor) -> None:
    client = served.connect(loop, target="worker:12")
    loop.call_soon(client.channel.send, Note(1))
    wait_until(lambda: served.sides and served.sides[0].heard)
    assert served.sides[0].heard == [Note(1)]
    assert served.hellos[0].target == "worker:12"
    assert served.hellos[0].name == "client"
    wait_until(lambda: client.channel.peer_name == "server")


def test_many_clients_at_once(served: Served, loop: Reactor) -> None:
    clients = [served.connect(loop) for _ in range(200)]
    for number, client in enumerate(clients):
        loop.call_soon(client.channel.send, Note(number))
    wait_until(lambda: sum(len(side.heard) for side in served.sides) == 200)
    for client in clients:
        run(loop, client.channel.close)
    wait_until(lambda: all(side.closings for side in served.sides))


def test_a_wrong_token_is_told_and_nothing_is_delivered(served: Served, loop: Reactor) -> None:
    client = served.connect(loop, token=b"not the token of it")
    answers: list[Any] = []
    loop.call_soon(client.channel.request, Ask(), answers.append)
    wait_until(lambda: client.closings and answers)
    assert isinstance(client.closings[0], AuthenticationError)
    assert "SHOAL_TOKEN" in str(client.closings[0])
    assert answers[0].kind == "closed"
    wait_until(lambda: served.sides[0].closings)
    assert served.sides[0].heard == []
    assert served.hellos == []


def test_nobody_there_is_told(loop: Reactor, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        for address, text in (
            (f"unix:{tmp_path}/nothing", f"{tmp_path}/nothing: No such file"),
            (f"127.0.0.1:{port}", f"127.0.0.1:{port}: Connection refused"),
            ("no-port", "no-port"),
            ("no.such.host.invalid:1", "no.such.host.invalid:1"),
        ):
            side = Side(loop)
            answers: list[Any] = []
            run(loop, side.channel.connect, address, TOKEN, "agent", "test")
            run(loop, side.channel.request, Ask(), answers.append)
            wait_until(lambda side=side, answers=answers: side.closings and answers)  # type: ignore[misc]
            assert isinstance(side.closings[0], ShoalError)
            assert "cannot connect to" in str(side.closings[0])
            assert text in str(side.closings[0])


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reactor, "_HANDSHAKE_TIMEOUT_S", 0.1)


@pytest.mark.usefixtures("hurried")
def test_a_server_that_never_answers_is_given_up(loop: Reactor, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        side = Side(loop)
        run(loop, side.channel.connect, f"unix:{tmp_path}/silent", TOKEN, "agent", "test")
        wait_until(lambda: side.closings)
        assert "handshake" in str(side.closings[0])


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("said", [b"", b"\x10", b"\x10\0\0\0half"])
def test_a_client_that_stops_in_the_middle_of_the_handshake_is_given_up(served: Served, said: bytes) -> None:
    with served.plain() as sock:
        sock.sendall(said)
        assert is_cut_off(sock)
    assert served.sides[0].heard == []


def test_half_a_message_of_a_handshake_is_waited_for_without_spinning(served: Served, loop: Reactor) -> None:
    handshake = ClientHandshake(TOKEN, "worker", "slow")
    with served.plain() as sock:
        cpu = run(loop, time.thread_time)
        for byte in handshake.start():
            sock.sendall(bytes([byte]))
        proof = handshake.receive(read_handshake_message(sock))
        sock.sendall(proof[:9])
        time.sleep(0.2)
        assert run(loop, time.thread_time) - cpu < 0.1
        sock.sendall(proof[9:] + join_frame([encode_message(Note(3))]))
        handshake.receive(read_handshake_message(sock))
        assert handshake.done
        wait_until(lambda: served.sides[0].heard)
        assert served.sides[0].heard == [Note(3)]


@pytest.mark.parametrize(
    "said",
    [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\x05\0\0\0\xdd\xff\xff\xff\xff"],
)
def test_strangers_are_cut_off_without_an_answer(served: Served, loop: Reactor, said: bytes) -> None:
    with served.plain() as sock:
        sock.sendall(said)
        assert is_cut_off(sock)
    client = served.connect(loop)
    loop.call_soon(client.channel.send, Note(1))
    wait_until(lambda: any(side.heard for side in served.sides))


def test_a_server_that_only_says_welcome_is_not_believed(loop: Reactor, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as fake:
        fake.bind(str(tmp_path / "fake"))
        fake.listen()
        side = Side(loop)
        run(loop, side.channel.connect, f"unix:{tmp_path}/fake", TOKEN, "agent", "test")
        theirs, _ = fake.accept()
        theirs.sendall(join_frame([encode_message(Welcome("me"))]) + join_frame([encode_message(Note(1))]))
        wait_until(lambda: side.closings)
        assert side.heard == []
        assert not side.channel.open
        theirs.close()


def test_a_refusal_reaches_a_client_that_has_sent_more_already(loop: Reactor) -> None:
    """Closing a socket with unread bytes in it resets the connection; the reason must be readable all the same."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        side = Side(loop)
        run(loop, side.channel.connect, f"127.0.0.1:{listener.getsockname()[1]}", TOKEN, "worker:00", "test")
        run(loop, side.channel.send, Note(1, b"x" * 10_000))
        theirs, _ = listener.accept()
        theirs.settimeout(LIMIT_S)
        handshake = ServerHandshake(TOKEN, "node", lambda _: Refused("no_target", "that worker is not on this node"))
        while handshake.refused is None:
            theirs.sendall(handshake.receive(read_handshake_message(theirs)))
        theirs.close()
        wait_until(lambda: side.closings)
        assert "that worker is not on this node" in str(side.closings[0])


def test_a_listener_whose_queue_is_full_is_waited_for(loop: Reactor, tmp_path: Path) -> None:
    path = str(tmp_path / "busy")
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(path)
        busy.listen(0)
        fillers = []
        while True:
            filler = socket.socket(socket.AF_UNIX)
            filler.setblocking(False)
            fillers.append(filler)
            if filler.connect_ex(path):
                break
        side = Side(loop)
        run(loop, side.channel.connect, f"unix:{path}", TOKEN, "worker", "late")
        run(loop, side.channel.send, Note(1))
        assert not side.closings
        busy.settimeout(LIMIT_S)
        for _ in range(len(fillers) - 1):
            busy.accept()[0].close()
        theirs, _ = busy.accept()
        theirs.settimeout(LIMIT_S)
        handshake = ServerHandshake(TOKEN, "node", lambda _: None)
        while not handshake.done:
            theirs.sendall(handshake.receive(read_handshake_message(theirs)))
        assert not side.closings
        theirs.close()
        for filler in fillers:
            filler.close()
        wait_until(lambda: side.closings)


def test_a_worker_out_of_descriptors_recovers_and_does_not_spin(served: Served, loop: Reactor) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    waiting = [socket.socket(socket.AF_UNIX) for _ in range(5)]
    for sock in waiting:
        sock.settimeout(LIMIT_S)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 3, hard))
    try:
        while True:
            try:
                held.append(os.dup(0))
            except OSError:
                break
        cpu = run(loop, time.thread_time)
        for sock in waiting:
            sock.connect(served.path)
        time.sleep(0.2)
        spent = run(loop, time.thread_time) - cpu
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert spent < 0.1
    for sock in waiting:
        assert shake_hands(sock, TOKEN, "worker", "patient") == "server"
        sock.close()


# ------------------------------------------------------------------------------------------------------- handed over


def hand_over(served: Served, sock: socket.socket, hello: Hello) -> None:
    with served.plain() as carrier, sock:
        shake_hands(carrier, TOKEN, HANDOFF, hello.name)
        send_handed_over(carrier, sock, hello)


def test_a_connection_is_handed_over_with_what_was_sent_on_it(served: Served, loop: Reactor) -> None:
    ours, theirs = socket.socketpair()
    ours.sendall(join_frame([encode_message(Note(5))]))
    hand_over(served, theirs, Hello(1, "1", b"", "worker:aa", "from afar"))
    wait_until(lambda: any(side.heard for side in served.sides))
    side = next(side for side in served.sides if side.heard)
    assert side.heard == [Note(5)]
    assert side.channel.peer_name == "from afar"
    assert served.hellos[-1].target == "worker:aa"
    assert run(loop, lambda: os.get_inheritable(side.channel._sock.fileno())) is False  # type: ignore[union-attr]
    run(loop, side.channel.send, Note(6))
    ours.settimeout(LIMIT_S)
    assert ours.recv(1000).endswith(encode_message(Note(6)))
    ours.close()
    wait_until(lambda: side.closings)


def test_a_handoff_without_a_socket_or_a_hello_harms_nobody(served: Served, loop: Reactor) -> None:
    for said in (b"nothing", join_frame([encode_message(Hello(1, "1", b"", "worker"))]), b"\xff\xff\xff\xff"):
        with served.plain() as carrier:
            shake_hands(carrier, TOKEN, HANDOFF, "agent")
            carrier.sendall(said)
    pair = socket.socketpair()
    with served.plain() as carrier:
        shake_hands(carrier, TOKEN, HANDOFF, "agent")
        socket.send_fds(carrier, [b"no hello"], [pair[1].fileno()])
    pair[1].close()
    pair[0].settimeout(LIMIT_S)
    assert pair[0].recv(10) == b"", "the socket that came with no Hello must be closed"
    pair[0].close()
    with served.plain() as carrier:
        shake_hands(carrier, TOKEN, HANDOFF, "agent")  # and ends without a word
    client = served.connect(loop)
    loop.call_soon(client.channel.send, Note(1))
    wait_until(lambda: any(side.heard for side in served.sides))


def test_nobody_is_handed_over_without_the_token(served: Served) -> None:
    with served.plain() as carrier:
        handshake = ClientHandshake(b"a guess of the token", HANDOFF, "agent")
        carrier.sendall(handshake.start())
        with pytest.raises(AuthenticationError):
            handshake.receive(read_handshake_message(carrier))
        pair = socket.socketpair()
        try:
            send_handed_over(carrier, pair[1], Hello(1, "1", b"", "worker"))
            assert carrier.recv(4096)[:4] != b""  # a refusal
        except OSError:
            pass
        for sock in pair:
            sock.close()
    assert served.hellos == []


def test_messages_are_never_decoded_into_more_than_what_was_asked_for() -> None:
    """The decoder of a connection knows its messages and nothing else; there is no way to name a class."""
    with pytest.raises(msgspec.ValidationError):
        decoder.decode(b"\x91\x92\xa9os.system\xa4true")
