"""The table of an actor's life: every row, every pair that is missing from it, and what a record keeps."""

from __future__ import annotations

from typing import get_args

import pytest

from shoal.control.actors import (
    PLACED,
    STEPS,
    WAITING,
    ActorRecord,
    ActorState,
    Ended,
    Event,
    Fell,
    IllegalStepError,
    Placed,
    Recycled,
    Refused,
    Retired,
    Started,
)
from shoal.control.messages import ActorSpec
from shoal.control.processes import Origin

EVENTS: dict[type, Event] = {
    Placed: Placed(b"n", "10.0.0.1:6380", "host"),
    Refused: Refused("full"),
    Started: Started(b"w", "/run/w", 7),
    Recycled: Recycled("kill"),
    Retired: Retired("no handles"),
    Fell: Fell("segfault"),
    Ended: Ended("killed", "kill"),
}


def record_in(state: ActorState, **fields: object) -> ActorRecord:
    spec = ActorSpec(b"a" * 16, b"j", b"o", b"n", "Counter", b"c", b"", {}, {}, **fields)  # type: ignore[arg-type]
    record = ActorRecord(spec, Origin(1, b"o"), 0.0)
    record.state = state
    return record


def test_the_events_are_the_ones_of_the_table() -> None:
    assert set(get_args(Event)) == set(EVENTS) == {event for _, event in STEPS}


@pytest.mark.parametrize(("state", "event"), sorted(STEPS, key=str))
def test_each_row_leads_where_it_says(state: ActorState, event: type[Event]) -> None:
    record = record_in(state)
    assert record.can(event)
    assert record.apply(EVENTS[event], 5.0) is state
    assert record.state is STEPS[state, event]
    assert record.since == 5.0


@pytest.mark.parametrize(
    ("state", "event"), [(s, e) for s in ActorState for e in EVENTS if (s, e) not in STEPS], ids=str
)
def test_each_pair_that_is_missing_is_refused_and_changes_nothing(state: ActorState, event: type[Event]) -> None:
    record = record_in(state)
    before = record.info()
    with pytest.raises(IllegalStepError, match=f"is {state.value} and cannot take {event.__name__}"):
        record.apply(EVENTS[event], 5.0)
    assert (record.state, record.since, record.info()) == (state, 0.0, before)


def test_every_state_but_dead_can_end_and_dead_is_final() -> None:
    for state in ActorState:
        assert ((state, Ended) in STEPS) == (state is not ActorState.DEAD)
    assert not [pair for pair in STEPS if pair[0] is ActorState.DEAD]


def test_a_state_either_waits_or_has_a_place_or_is_dead() -> None:
    assert not (WAITING & PLACED)
    assert WAITING | PLACED | {ActorState.DEAD} == set(ActorState)


def test_incarnations_count_placements_and_restarts_count_falls() -> None:
    record = record_in(ActorState.PENDING)
    for event in (Placed, Refused, Placed, Started, Fell, Placed, Started):
        record.apply(EVENTS[event], 1.0)
    assert (record.incarnation, record.restarts, record.public_state()) == (3, 1, "alive")


@pytest.mark.parametrize(("limit", "lives"), [(0, 1), (1, 2), (3, 4)])
def test_max_restarts_limits_lives(limit: int, lives: int) -> None:
    record = record_in(ActorState.ALIVE, max_restarts=limit)
    begun = 1
    while record.may_restart:
        for event in (Fell, Placed, Started):
            record.apply(EVENTS[event], 1.0)
        begun += 1
    assert begun == lives


def test_unlimited_restarts() -> None:
    record = record_in(ActorState.ALIVE, max_restarts=-1)
    record.restarts = 10**6
    assert record.may_restart


def test_callers_see_four_states() -> None:
    seen = {}
    for state in ActorState:
        record = record_in(state)
        fresh = record.public_state()
        record.restarts, record.worker_id = 1, b"w"
        seen[state.value] = (fresh, record.public_state())
    assert seen == {
        "pending": ("pending", "restarting"),
        "starting": ("pending", "restarting"),
        "alive": ("alive", "alive"),
        "recycling": ("restarting", "restarting"),
        "stopping": ("pending", "alive"),
        "restarting": ("pending", "restarting"),
        "reviving": ("pending", "restarting"),
        "dead": ("dead", "dead"),
    }


def test_a_fall_forgets_the_place_and_an_end_keeps_the_cause() -> None:
    record = record_in(ActorState.PENDING)
    for event in (Placed, Started, Fell):
        record.apply(EVENTS[event], 1.0)
    info = record.info()
    assert (info.node_id, info.worker_id, info.address, info.socket_path, info.pid) == (b"", b"", "", "", 0)
    record.apply(Ended("job_ended", "over", b"pickled"), 2.0)
    info = record.info()
    assert (info.state, info.kind, info.cause, info.error, info.reason) == (
        "dead",
        "job_ended",
        "over",
        b"pickled",
        None,
    )


def test_the_story_is_short_and_readable() -> None:
    record = record_in(ActorState.PENDING)
    assert record.tell_story(0.0) == "nothing happened yet"
    for _ in range(20):
        record.apply(EVENTS[Placed], 1.0)
        record.apply(EVENTS[Refused], 2.0)
    assert len(record.story) == 8
    assert record.tell_story(3.0).endswith("2.0 s ago Placed -> starting, 1.0 s ago Refused -> pending")
