"""Handlers are held off and lose nothing, wherever and however often the signals come."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from shoal.rpc.held_signals import HeldSignals


def raise_inside(*numbers: signal.Signals, then: Callable[[], object] = lambda: None) -> None:
    with HeldSignals():
        for number in numbers:
            signal.raise_signal(number)
        then()


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[str]]:
    """SIGUSR1 and SIGUSR2 take notes; SIGINT is Python's own again afterwards."""
    came: list[str] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)}
    signal.signal(signal.SIGUSR1, lambda *_: came.append("one"))
    signal.signal(signal.SIGUSR2, lambda *_: came.append("two"))
    yield came
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_are_heard_when_it_is_over(handlers: list[str]) -> None:
    with HeldSignals():
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR2)
        assert handlers == []
    assert sorted(handlers) == ["one", "two"]


def test_a_signal_that_came_twice_is_heard_once_as_from_the_kernel(handlers: list[str]) -> None:
    with HeldSignals():
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
    assert handlers == ["one"]


def test_a_ctrl_c_is_raised_at_the_end() -> None:
    inside: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        raise_inside(signal.SIGINT, then=lambda: inside.append(True))
    assert inside
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_that_raises_costs_the_others_nothing(handlers: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        raise_inside(signal.SIGUSR1, signal.SIGINT, signal.SIGUSR2)
    assert sorted(handlers) == ["one", "two"]


def test_handlers_set_meanwhile_by_earlier_users_are_found(handlers: list[str]) -> None:
    def another(_number: int, _frame: FrameType | None) -> None:
        handlers.append("another")

    with HeldSignals():
        pass
    signal.signal(signal.SIGUSR1, another)
    with HeldSignals():
        signal.raise_signal(signal.SIGUSR1)
        assert handlers == []
    assert handlers == ["another"]
    assert signal.getsignal(signal.SIGUSR1) is another


def test_what_is_ignored_or_default_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with HeldSignals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_hold_nothing(handlers: list[str]) -> None:
    def elsewhere() -> None:
        with HeldSignals():
            seen.append(signal.getsignal(signal.SIGUSR1))

    seen: list[object] = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGUSR1)]


HAMMERED = """
import signal
from shoal.rpc.held_signals import HeldSignals

class Alarm(Exception):
    pass

def raise_alarm(*_):
    raise Alarm

signal.signal(signal.SIGALRM, raise_alarm)
signal.signal(signal.SIGUSR1, lambda *_: None)
raised = begun = ended = 0
while raised < 2000:
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.00005 + raised % 100 * 1e-6)
        while True:
            with HeldSignals():
                begun += 1
                for _ in range(20):
                    pass
                ended += 1
    except Alarm:
        raised += 1
    assert begun == ended, "interrupted inside"
    assert signal.getsignal(signal.SIGALRM) is raise_alarm, "a handler was lost"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "a handler was lost"
print(begun)
"""


def test_no_moment_is_interrupted_and_no_handler_lost() -> None:
    """An alarm whose handler raises comes at every moment, also while handlers are exchanged."""
    done = subprocess.run([sys.executable, "-c", HAMMERED], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 2000
