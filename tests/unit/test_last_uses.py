"""Ends of references are noticed in order, wherever they happen, and nobody is rung after `silence`."""

from __future__ import annotations

import gc
import os
import select
import signal
import threading
from typing import Any

from shoal.runtime.last_uses import LastUse, LastUses


class Thing:
    pass


def opened() -> LastUses:
    uses = LastUses()
    uses.open()
    return uses


def rang(uses: LastUses) -> bool:
    return bool(select.select([uses.fd], [], [], 0)[0])


def test_the_end_is_noticed_once_and_named() -> None:
    uses = opened()
    thing = Thing()
    use = uses.follow(thing, b"key", b"home")
    assert use() is thing
    assert not rang(uses)
    del thing
    assert rang(uses)
    uses.heard()
    assert not rang(uses)
    assert list(uses.gone) == [use]
    assert (use.key, use.home) == (b"key", b"home")
    assert use() is None


def test_the_end_is_recorded_before_the_bell_rings() -> None:
    """Whoever hears the bell must find what it rang for."""
    uses = opened()
    order: list[Any] = []
    uses._alarm.ring = staticmethod(lambda: order.append(len(uses.gone)))
    thing = Thing()
    use = uses.follow(thing, b"key")
    del thing
    assert order == [1]
    assert use.key == b"key"


def test_ends_in_a_collection_and_in_threads() -> None:
    uses = opened()
    kept: list[LastUse] = []

    def make(number: int) -> None:
        for i in range(100):
            thing: Any = Thing()
            thing.me = thing
            kept.append(uses.follow(thing, b"%d-%d" % (number, i)))

    threads = [threading.Thread(target=make, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert len(uses.gone) == 400
    assert {use.key for use in uses.gone} == {use.key for use in kept}


def test_silence() -> None:
    uses = opened()
    thing = Thing()
    use = uses.follow(thing, b"key")
    uses.silence()
    os.close(uses.fd)
    uses.fd = os.open(os.devnull, os.O_RDWR)
    del thing
    assert use() is None


def test_no_interrupt_is_swallowed() -> None:
    """A SIGINT that arrives while thousands of references end is raised, by the code that drops them."""
    uses = opened()
    raised = 0
    rounds = 20
    for _ in range(rounds):
        kept = []
        things: list[Any] = [Thing() for _ in range(20_000)]
        kept = [uses.follow(thing, b"key") for thing in things]
        timer = threading.Timer(0.001, signal.raise_signal, [signal.SIGINT])
        try:
            timer.start()
            while True:
                if things:
                    things.pop()
        except KeyboardInterrupt:
            raised += 1
        timer.join()
        kept.clear()
    assert raised == rounds
