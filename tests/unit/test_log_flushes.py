"""The last lines of a program: the driver is answered when every node has spoken, or cannot any more."""

from __future__ import annotations

import msgspec

from shoal.control.log_flushes import LogFlushes
from shoal.control.mail import Outbox, Send
from shoal.control.messages import FlushLogs, FlushNodeLogs, ProcessReply, RelayReply
from shoal.control.processes import Origin
from shoal.rpc.messages import Done

DRIVER = Origin(1, b"driver")


def answers(sends: list[Send]) -> list[int]:
    """The `rid`s that were answered."""
    found = []
    for send in sends:
        if isinstance(send.message, RelayReply):
            assert send.peer == DRIVER.peer
            reply = msgspec.msgpack.decode(send.message.body, type=ProcessReply)
            assert isinstance(reply, Done)
            found.append(reply.rid)
    return found


def begin(flushes: LogFlushes, outbox: Outbox, peers: list[int], rid: int = 5) -> list[Send]:
    flushes.begin(DRIVER, b"job1", FlushLogs(rid=rid), peers)
    return outbox.take()


def test_the_driver_is_answered_after_the_last_node() -> None:
    outbox = Outbox(0.0, 0.0)
    flushes = LogFlushes(outbox)
    assert begin(flushes, outbox, [2, 1]) == [Send(1, FlushNodeLogs(b"job1", 1)), Send(2, FlushNodeLogs(b"job1", 1))]
    flushes.flushed(2, 1)
    flushes.flushed(2, 1)
    assert outbox.take() == []
    flushes.flushed(1, 1)
    assert answers(outbox.take()) == [5]
    flushes.flushed(1, 1)  # late, or a lie
    assert outbox.take() == []
    assert len(flushes) == 0


def test_a_cluster_without_nodes_answers_at_once() -> None:
    outbox = Outbox(0.0, 0.0)
    flushes = LogFlushes(outbox)
    assert answers(begin(flushes, outbox, [])) == [5]


def test_a_node_that_dies_is_not_waited_for() -> None:
    outbox = Outbox(0.0, 0.0)
    flushes = LogFlushes(outbox)
    begin(flushes, outbox, [1, 2])
    flushes.flushed(1, 1)
    flushes.node_gone(2)
    assert answers(outbox.take()) == [5]


def test_who_has_left_is_not_answered() -> None:
    outbox = Outbox(0.0, 0.0)
    flushes = LogFlushes(outbox)
    begin(flushes, outbox, [1, 2])
    flushes.process_gone(Origin(1, b"other"))
    assert len(flushes) == 1
    flushes.process_gone(DRIVER)
    assert len(flushes) == 0
    begin(flushes, outbox, [2])
    flushes.node_gone(DRIVER.peer)
    assert len(flushes) == 0
    flushes.flushed(2, 2)
    assert outbox.take() == []
