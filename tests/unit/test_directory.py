"""Reference counting across nodes: cases with a name, and a small cluster in which every connection has its own pace.

The cluster has real directories and processes that keep the runtime's rules: who submits a call keeps its arguments
until the reply; a reply waits until the refs that the call borrowed are counted; who returned refs keeps them until its
caller has counted them; the end of a use is told only when the uses begun before it are counted. All messages wait in
line, one line for each connection and direction, and hypothesis picks whose head arrives next. What must hold is said
by plain reachability: nothing is given up that somebody can still reach, and everything is gone when nobody can.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.node.directory import MAX_DROPPED, Directory, Effects
from shoal.node.messages import ERROR, INLINE, LOST, PENDING, STORED, ObjectState
from shoal.objects.ids import actor_object_id, make_object_id, task_prefix

HERE, THERE, ELSEWHERE = b"A" * 28, b"B" * 28, b"C" * 28
JOB = b"jjjj"
OWNER, OTHER = b"owner-process" + bytes(15), b"other-process" + bytes(15)


class Recorder(Effects):
    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    def delete_copy(self, node_id: bytes, object_id: bytes) -> None:
        self.said.append(("delete", node_id, object_id))

    def tell_home(self, home: bytes, object_id: bytes, holds: bool) -> None:
        self.said.append(("tell", home, object_id, holds))

    def actor_unreferenced(self, actor_id: bytes) -> None:
        self.said.append(("actor", actor_id))

    def take(self) -> list[tuple[Any, ...]]:
        said, self.said = self.said, []
        return said


class Desk:
    """A directory with what surrounds it."""

    def __init__(self) -> None:
        self.effects = Recorder()
        self.alive = {OWNER[:12], OTHER[:12]}
        self.gone: set[bytes] = set()
        self.directory = Directory(HERE, self.effects, self.alive.__contains__, self.gone.__contains__)

    def kill(self, process: bytes) -> None:
        self.alive.discard(process[:12])
        self.directory.process_gone(process)

    def state(self, object_id: bytes, node: bytes = HERE) -> ObjectState | None:
        """What a question gets now; None when it waits."""
        answers: list[ObjectState] = []
        self.directory.watch(object_id, (node, 99), answers.append)
        self.directory.unwatch(object_id, (node, 99))
        return answers[0] if answers else None


@pytest.fixture
def desk() -> Desk:
    return Desk()


def an_id(owner: bytes = OWNER, counter: int = 1, index: int = 0) -> bytes:
    return bytes(make_object_id(task_prefix(JOB, owner), counter, index))


X, Y = an_id(counter=1), an_id(counter=2)


def test_a_published_value_is_answered_and_freed_with_its_last_user(desk: Desk) -> None:
    directory = desk.directory
    directory.publish(X, OWNER, ObjectState(INLINE, b"v"))
    directory.use(X, HERE, OTHER)
    directory.unuse(X, HERE, OWNER)
    assert desk.state(X) == ObjectState(INLINE, b"v")
    directory.unuse(X, HERE, OTHER)
    assert len(directory) == 0


def test_a_use_that_overtakes_the_publish_waits_for_it(desk: Desk) -> None:
    directory = desk.directory
    directory.holder_changed(X, THERE, True)
    assert desk.state(X) is None
    directory.publish(X, OWNER, ObjectState(INLINE, b"v"))
    directory.unuse(X, HERE, OWNER)
    assert desk.state(X) == ObjectState(INLINE, b"v")
    directory.holder_changed(X, THERE, False)
    assert len(directory) == 0


def test_a_user_that_comes_and_goes_before_the_owner_speaks_leaves_no_trace(desk: Desk) -> None:
    directory = desk.directory
    directory.holder_changed(X, THERE, True)
    directory.holder_changed(X, THERE, False)
    assert len(directory) == 0
    directory.publish(X, OWNER, ObjectState(INLINE, b"v"))
    assert desk.state(X) == ObjectState(INLINE, b"v")


def test_uses_are_counted_so_that_two_words_may_cross(desk: Desk) -> None:
    directory = desk.directory
    directory.publish(X, OWNER, ObjectState(INLINE, b"v"))
    directory.use(X, HERE, OTHER)
    directory.use(X, HERE, OTHER)  # begun again before the end of the first was told
    directory.unuse(X, HERE, OTHER)
    directory.unuse(X, HERE, OWNER)
    assert desk.state(X) == ObjectState(INLINE, b"v")
    directory.unuse(X, HERE, OTHER)
    assert len(directory) == 0


def test_first_and_last_use_of_an_object_of_another_home_are_told(desk: Desk) -> None:
    directory, effects = desk.directory, desk.effects
    directory.use(X, THERE, OWNER)
    directory.use(X, THERE, OTHER)
    directory.unuse(X, THERE, OWNER)
    assert effects.take() == [("tell", THERE, X, True)]
    directory.unuse(X, THERE, OTHER)
    assert effects.take() == [("tell", THERE, X, False)]


def test_a_process_that_ends_uses_nothing_any_more(desk: Desk) -> None:
    directory, effects = desk.directory, desk.effects
    directory.use(X, THERE, OTHER)
    directory.use(X, THERE, OTHER)
    directory.publish(Y, OWNER, ObjectState(INLINE, b"v"))
    directory.use(Y, HERE, OTHER)
    directory.unuse(Y, HERE, OWNER)
    desk.kill(OTHER)
    assert effects.take() == [("tell", THERE, X, True), ("tell", THERE, X, False)]
    assert len(directory) == 0


def test_what_a_dead_owner_owed_is_lost_and_what_it_finished_lives_on(desk: Desk) -> None:
    directory = desk.directory
    ready, pending = an_id(counter=1, index=1), an_id(counter=2, index=1)
    directory.publish(ready, OWNER, ObjectState(INLINE, b"v"))
    directory.publish(pending, OWNER, ObjectState(PENDING))
    for object_id in (ready, pending):
        directory.holder_changed(object_id, THERE, True)
    desk.kill(OWNER)
    assert desk.state(ready) == ObjectState(INLINE, b"v")
    lost = desk.state(pending)
    assert lost is not None
    assert lost.state == LOST
    assert lost.payload.startswith(b"owner:")
    assert (desk.state(an_id(counter=9)) or ObjectState(PENDING)).state == LOST, "what it never spoke of"
    assert len(directory) == 2
    for object_id in (ready, pending):
        directory.holder_changed(object_id, THERE, False)
    assert len(directory) == 0


def test_who_waits_for_a_dead_owner_is_told(desk: Desk) -> None:
    answers: list[ObjectState] = []
    desk.directory.watch(X, (THERE, 1), answers.append)
    desk.kill(OWNER)
    assert [answer.state for answer in answers] == [LOST]
    assert len(desk.directory) == 0


def test_a_stored_value_is_ready_when_its_node_has_reported_the_copy(desk: Desk) -> None:
    directory, effects = desk.directory, desk.effects
    result = an_id(index=1)
    directory.publish(result, OWNER, ObjectState(STORED, b"", 5, [THERE]))
    assert desk.state(result) is None
    directory.copy_made(result, THERE, 5, OWNER, [])
    assert desk.state(result) == ObjectState(STORED, b"", 5, [THERE])
    directory.unuse(result, HERE, OWNER)
    assert effects.take() == [("delete", THERE, result)]
    assert len(directory) == 0


@pytest.mark.parametrize("told_first", [True, False])
def test_a_node_that_dies_before_it_reports_its_copy_is_not_waited_for(desk: Desk, told_first: bool) -> None:
    result = an_id(index=1)
    if told_first:
        desk.gone.add(THERE)
        desk.directory.node_gone(THERE)
    desk.directory.publish(result, OWNER, ObjectState(STORED, b"", 5, [THERE]))
    if not told_first:
        desk.gone.add(THERE)
        desk.directory.node_gone(THERE)
    state = desk.state(result)
    assert state is not None
    assert state.state == LOST
    assert state.payload.startswith(b"node:")


def test_a_copy_that_is_reported_after_everybody_dropped_the_object_is_told_to_go(desk: Desk) -> None:
    directory, effects = desk.directory, desk.effects
    result = an_id(index=1)
    directory.publish(result, OWNER, ObjectState(STORED, b"", 5, [THERE]))
    directory.unuse(result, HERE, OWNER)
    directory.copy_made(result, THERE, 5, OWNER, [])
    directory.copy_made(result, ELSEWHERE, 5, b"", [])  # a second copy, made while the first was asked for
    assert effects.take() == [("delete", THERE, result), ("delete", ELSEWHERE, result)]
    assert len(directory) == 0


def test_a_second_copy_of_something_unknown_is_told_to_go(desk: Desk) -> None:
    desk.directory.copy_made(X, THERE, 5, b"", [])
    assert desk.effects.take() == [("delete", THERE, X)]
    desk.directory.holder_changed(Y, THERE, True)
    desk.directory.copy_made(Y, THERE, 5, b"", [])
    assert desk.effects.take() == [("delete", THERE, Y)]


def test_another_copy_serves_when_one_is_gone_and_the_last_one_is_missed(desk: Desk) -> None:
    directory = desk.directory
    directory.copy_made(X, HERE, 5, OWNER, [])
    directory.copy_made(X, THERE, 5, b"", [])
    directory.copy_gone(X, HERE, "evicted")
    assert desk.state(X) == ObjectState(STORED, b"", 5, [THERE])
    directory.node_gone(THERE)
    state = desk.state(X)
    assert state is not None
    assert state.state == LOST
    directory.copy_made(X, ELSEWHERE, 5, b"", [])  # its word was on the way
    assert desk.state(X) == ObjectState(STORED, b"", 5, [ELSEWHERE])


def test_questions_of_a_dead_node_keep_nothing_alive(desk: Desk) -> None:
    directory = desk.directory
    directory.publish(X, OWNER, ObjectState(PENDING))
    answers: list[ObjectState] = []
    directory.watch(X, (THERE, 1), answers.append)
    directory.holder_changed(X, THERE, True)
    directory.unuse(X, HERE, OWNER)
    assert len(directory) == 1
    directory.node_gone(THERE)
    assert len(directory) == 0
    assert not answers


def test_a_value_keeps_what_is_inside_it_across_homes(desk: Desk) -> None:
    directory, effects = desk.directory, desk.effects
    inner, far = an_id(counter=5), an_id(OTHER, 6)
    directory.publish(inner, OWNER, ObjectState(INLINE, b"i"))
    directory.publish(X, OWNER, ObjectState(INLINE, b"v", contained=[(inner, HERE), (far, THERE)]))
    directory.unuse(inner, HERE, OWNER)
    assert desk.state(inner) == ObjectState(INLINE, b"i")
    assert effects.take() == [("tell", THERE, far, True)]
    directory.unuse(X, HERE, OWNER)
    assert effects.take() == [("tell", THERE, far, False)]
    assert len(directory) == 0


def test_a_long_chain_of_values_inside_values_is_freed(desk: Desk) -> None:
    directory = desk.directory
    ids = [an_id(counter=n) for n in range(1, 20_001)]
    for below, object_id in zip([None, *ids], ids, strict=False):
        contained = [(below, HERE)] if below is not None else []
        directory.publish(object_id, OWNER, ObjectState(INLINE, b"v", contained=contained))
        if below is not None:
            directory.unuse(below, HERE, OWNER)
    assert len(directory) == len(ids)
    directory.unuse(ids[-1], HERE, OWNER)
    assert len(directory) == 0


def test_an_actor_is_told_once_when_its_last_handle_is_gone(desk: Desk) -> None:
    actor = b"a" * 16
    handle = bytes(actor_object_id(actor))  # type: ignore[arg-type]
    desk.directory.holder_changed(handle, THERE, True)
    desk.directory.holder_changed(handle, THERE, False)
    assert desk.effects.take() == []
    desk.directory.publish(handle, OWNER, ObjectState(INLINE))
    desk.directory.holder_changed(handle, THERE, True)
    desk.directory.unuse(handle, HERE, OWNER)
    assert desk.effects.take() == []
    desk.directory.holder_changed(handle, THERE, False)
    assert desk.effects.take() == [("actor", actor)]


def test_remembering_dropped_ids_is_bounded(desk: Desk) -> None:
    for n in range(MAX_DROPPED + 100):
        desk.directory.unuse(an_id(counter=n + 1, index=1), HERE, OWNER)
    assert len(desk.directory._dropped) == MAX_DROPPED


# ------------------------------------------------------------------------------------- a cluster at its own pace

NODES = (HERE, THERE, ELSEWHERE)
MAX_OBJECTS = 40


class Ref:
    """A process's one record of an object, with the number of things in the process that hold it."""

    def __init__(self, object_id: bytes, home: bytes, owned: bool) -> None:
        self.object_id = object_id
        self.home = home
        self.owned = owned
        self.count = 0
        self.followed = not owned
        self.published = False
        self.state = PENDING
        self.contained: list[Ref] = []


class Run:
    """A call that a process submitted and has not seen the end of."""

    def __init__(self, result: Ref, keep: list[Ref]) -> None:
        self.result = result
        self.keep = keep


class Proc:
    """A driver or worker that keeps the runtime's rules."""

    def __init__(self, cluster: Cluster, node: Node, worker_id: bytes) -> None:
        self.cluster = cluster
        self.node = node
        self.worker_id = worker_id
        self.prefix = task_prefix(JOB, worker_id)
        self.alive = True
        self.counter = itertools.count(1)
        self.known: dict[bytes, Ref] = {}
        self.mine: list[Ref] = []  # what the user's variables hold
        self.runs: dict[tuple[bytes, int], Run] = {}  # (worker, number)
        self.handover: dict[tuple[bytes, int], list[Ref]] = {}  # (caller, number)
        self.begun = self.counted = 0
        self.early: set[int] = set()
        self.after: list[tuple[int, Callable[[], None]]] = []

    # references

    def hold(self, ref: Ref) -> Ref:
        ref.count += 1
        return ref

    def let_go(self, ref: Ref) -> None:
        ref.count -= 1
        if ref.count or not self.alive:
            return
        if self.known.get(ref.object_id) is ref:
            del self.known[ref.object_id]
        if ref.followed:
            self.after_uses(lambda: self.tell("unuse", ref.object_id, ref.home))
        for inner in ref.contained:
            self.let_go(inner)

    def follow(self, ref: Ref) -> None:
        ref.followed = True
        self.known[ref.object_id] = ref

    def borrow(self, object_id: bytes, home: bytes) -> Ref:
        ref = self.known.get(object_id)
        if ref is None:
            ref = Ref(object_id, home, owned=False)
            self.known[object_id] = ref
            self.begun += 1
            self.tell("use", object_id, home, self.begun)
        return self.hold(ref)

    def publish(self, ref: Ref) -> None:
        if ref.owned and not ref.published:
            ref.published = True
            self.follow(ref)
            self.tell("publish", ref.object_id, self.state_of(ref))

    def name_all(self, refs: list[Ref]) -> list[tuple[bytes, bytes]]:
        for ref in refs:
            self.publish(ref)
        return [(ref.object_id, ref.home) for ref in refs]

    def state_of(self, ref: Ref) -> ObjectState:
        nodes = [self.node.node_id] if ref.state == STORED else []
        return ObjectState(ref.state, b"", 1, nodes, self.name_all(ref.contained))

    def after_uses(self, call: Callable[[], None]) -> None:
        if self.counted >= self.begun:
            call()
        else:
            self.after.append((self.begun, call))

    def use_counted(self, number: int) -> None:
        self.early.add(number)
        while self.counted + 1 in self.early:
            self.counted += 1
            self.early.discard(self.counted)
        while self.after and self.after[0][0] <= self.counted:
            self.after.pop(0)[1]()

    def tell(self, *message: Any) -> None:
        self.cluster.say(("process", self.worker_id, self.node.node_id), message)

    # what user code does

    def put(self, contained: list[Ref], stored: bool) -> None:
        ref = Ref(bytes(make_object_id(self.prefix, next(self.counter), 0)), self.node.node_id, owned=True)
        ref.contained = [self.hold(inner) for inner in contained]
        for inner in contained:
            self.follow(inner)
        ref.state = STORED if stored else INLINE
        self.cluster.new_object(ref, contained)
        if stored:
            self.follow(ref)
            self.tell("seal", ref.object_id, ref.home, self.worker_id, self.name_all(contained))
        self.mine.append(self.hold(ref))

    def submit(self, worker: Proc, args: list[Ref], plan: tuple[bool, bool, int]) -> None:
        number = next(self.counter)
        result = Ref(bytes(make_object_id(self.prefix, number, 1)), self.node.node_id, owned=True)
        self.cluster.new_object(result, [])
        keep = [self.hold(ref) for ref in args]
        for ref in args:
            self.follow(ref)
        self.hold(result)
        self.runs[worker.worker_id, number] = Run(result, keep)
        self.mine.append(self.hold(result))
        self.cluster.say(("call", self.worker_id, worker.worker_id), ("run", number, self.name_all(args), plan))

    def run(self, caller: bytes, number: int, args: list[tuple[bytes, bytes]], plan: tuple[bool, bool, int]) -> None:
        keep_args, stored, picks = plan
        frame = [self.borrow(*arg) for arg in args]
        if keep_args:
            self.mine += [self.hold(ref) for ref in frame]
        owner = self.cluster.procs[caller]
        object_id = bytes(make_object_id(owner.prefix, number, 1))
        # Values that contain each other in a circle would keep each other for ever: counting cannot see that.
        candidates = [ref for ref in (*frame, *self.mine) if object_id not in self.cluster.reach([ref.object_id])]
        returned = list(dict.fromkeys(ref for n, ref in enumerate(candidates) if picks >> n & 1))
        for ref in returned:
            self.follow(ref)
        kind = STORED if stored else INLINE
        self.cluster.inside[object_id] = [ref.object_id for ref in returned]
        names = self.name_all(returned)
        if not owner.alive:
            self.cluster.excused |= self.cluster.reach([object_id])  # nobody takes this over
        if stored:
            self.tell("seal", object_id, owner.node.node_id, caller, names)
        if returned:
            self.handover[caller, number] = [self.hold(ref) for ref in returned]
        ended = ("ended", number, kind, names, self.node.node_id)
        self.after_uses(lambda: self.cluster.say(("call", self.worker_id, caller), ended))
        for ref in frame:
            self.let_go(ref)

    def ended(self, worker: bytes, number: int, kind: int, names: list[tuple[bytes, bytes]], node_id: bytes) -> None:
        run = self.runs.pop((worker, number), None)
        if run is None:
            return
        result = run.result
        result.contained = [self.borrow(*name) for name in names]
        result.state = kind
        if kind == STORED:
            result.published = True
            self.follow(result)
            self.tell("publish", result.object_id, ObjectState(STORED, b"", 1, [node_id], names))
        elif result.published:
            self.tell("publish", result.object_id, ObjectState(kind, b"", 0, [], names))
        if names:
            self.after_uses(lambda: self.cluster.say(("call", self.worker_id, worker), ("taken", number)))
        for ref in [*run.keep, result]:
            self.let_go(ref)

    def read(self, ref: Ref) -> None:
        """Get the value, which is on this node or in this process, and keep what is inside."""
        for object_id in self.cluster.inside[ref.object_id]:
            self.mine.append(self.borrow(object_id, self.cluster.home[object_id]))

    def heard(self, sender: bytes, message: Any) -> None:
        match message:
            case ("run", number, args, plan):
                self.run(sender, number, args, plan)
            case ("ended", number, kind, names, node_id):
                self.ended(sender, number, kind, names, node_id)
            case ("taken", number):
                for ref in self.handover.pop((sender, number), ()):
                    self.let_go(ref)
            case ("closed",):
                for worker, number in [key for key in self.runs if key[0] == sender]:
                    self.follow(self.runs[worker, number].result)  # it may have been stored: its end must be told
                    self.ended(worker, number, ERROR, [], b"")
                for key in [key for key in self.handover if key[0] == sender]:
                    for ref in self.handover.pop(key):
                        self.let_go(ref)


class Node(Effects):
    """An agent."""

    def __init__(self, cluster: Cluster, node_id: bytes) -> None:
        self.cluster = cluster
        self.node_id = node_id
        self.alive = True
        self.living: set[bytes] = set()
        self.gone: set[bytes] = set()
        self.copies: set[bytes] = set()
        self.directory = Directory(node_id, self, self.living.__contains__, self.gone.__contains__)
        self.rids = itertools.count(1)
        self.telling: dict[bytes, list[tuple[int, list[tuple[bytes, int]]]]] = {}  # object -> (rid, who is answered)

    def delete_copy(self, node_id: bytes, object_id: bytes) -> None:
        if node_id == self.node_id:
            self.copies.discard(object_id)
        else:
            self.to_agent(node_id, "delete", object_id)

    def tell_home(self, home: bytes, object_id: bytes, holds: bool) -> None:
        if home in self.gone:
            return
        rid = next(self.rids) if holds else 0
        if holds:
            self.telling.setdefault(object_id, []).append((rid, []))
        self.to_agent(home, "holder", object_id, holds, rid)

    def actor_unreferenced(self, actor_id: bytes) -> None:
        raise AssertionError("there are no actors here")

    def to_agent(self, node_id: bytes, *message: Any) -> None:
        if node_id not in self.gone:
            self.cluster.say(("agent", self.node_id, node_id), message)

    def from_process(self, process: bytes, message: Any) -> None:
        directory = self.directory
        match message:
            case ("publish", object_id, state):
                directory.publish(object_id, process, state)
            case ("seal", object_id, home, owner, contained):
                self.copies.add(object_id)
                if home == self.node_id:
                    directory.copy_made(object_id, self.node_id, 1, owner, contained)
                elif home in self.gone:
                    self.copies.discard(object_id)
                else:
                    self.to_agent(home, "copy", object_id, owner, contained)
            case ("use", object_id, home, number):
                directory.use(object_id, home, process)
                waiting = self.telling.get(object_id)
                if waiting:
                    waiting[-1][1].append((process, number))
                else:
                    self.cluster.say(("answer", self.node_id, process), ("counted", number))
            case ("unuse", object_id, home):
                directory.unuse(object_id, home, process)
            case ("gone",):
                self.living.discard(process[:12])
                directory.process_gone(process)

    def from_agent(self, sender: bytes, message: Any) -> None:
        if sender in self.gone:
            return
        match message:
            case ("holder", object_id, holds, rid):
                self.directory.holder_changed(object_id, sender, holds)
                if rid:
                    self.cluster.say(("reply", self.node_id, sender), ("counted", object_id, rid))
            case ("copy", object_id, owner, contained):
                self.directory.copy_made(object_id, sender, 1, owner, contained)
            case ("delete", object_id):
                self.copies.discard(object_id)

    def counted(self, object_id: bytes, rid: int) -> None:
        waiting = self.telling.get(object_id, [])
        for entry in [entry for entry in waiting if entry[0] == rid]:
            waiting.remove(entry)
            for process, number in entry[1]:
                self.cluster.say(("answer", self.node_id, process), ("counted", number))
        if not waiting:
            self.telling.pop(object_id, None)

    def node_gone(self, node_id: bytes) -> None:
        self.gone.add(node_id)
        self.directory.node_gone(node_id)
        for object_id in [o for o in self.copies if self.cluster.home[o] == node_id]:
            self.copies.discard(object_id)
        for object_id in list(self.telling):
            if self.cluster.home[object_id] == node_id:
                for rid, _ in list(self.telling[object_id]):
                    self.counted(object_id, rid)


Line = tuple[str, bytes, bytes]
PAIRS: list[Line] = [("agent", one, two) for one, two in itertools.permutations(NODES, 2)]


class Cluster(RuleBasedStateMachine):
    """See the module."""

    deaths_allowed = False

    def __init__(self) -> None:
        super().__init__()
        self.nodes = {node_id: Node(self, node_id) for node_id in NODES}
        self.procs: dict[bytes, Proc] = {}
        self.lines: dict[Line, deque[Any]] = {}
        self.home: dict[bytes, bytes] = {}
        self.inside: dict[bytes, list[bytes]] = {}
        self.anybody_died = False
        self.excused: set[bytes] = set()
        for n in range(5):
            node = self.nodes[NODES[n % 3]]
            worker_id = f"process-{n:04d}".encode() + bytes(16)
            node.living.add(worker_id[:12])
            self.procs[worker_id] = Proc(self, node, worker_id)
        self.first = next(iter(self.procs.values()))  # somebody must be left to use things

    # lines

    def say(self, line: Line, message: Any) -> None:
        self.lines.setdefault(line, deque()).append(message)

    def new_object(self, ref: Ref, contained: list[Ref]) -> None:
        self.home[ref.object_id] = ref.home
        self.inside[ref.object_id] = [inner.object_id for inner in contained]

    def open_lines(self) -> list[Line]:
        return sorted(line for line, messages in self.lines.items() if messages)

    def deliver_from(self, line: Line) -> None:
        message = self.lines[line].popleft()
        kind, sender, receiver = line
        before = self.owned_entries()
        if kind == "process" and self.nodes[receiver].alive:
            self.nodes[receiver].from_process(sender, message)
        elif kind == "agent" and self.nodes[receiver].alive:
            self.nodes[receiver].from_agent(sender, message)
        elif kind == "reply" and self.nodes[receiver].alive and sender not in self.nodes[receiver].gone:
            self.nodes[receiver].counted(*message[1:])
        elif kind == "control" and self.nodes[receiver].alive:
            self.nodes[receiver].node_gone(sender)
        elif kind == "answer" and self.procs[receiver].alive:
            self.procs[receiver].use_counted(message[1])
        elif kind == "call" and self.procs[receiver].alive:
            self.procs[receiver].heard(sender, message)
        given_up = before - self.owned_entries()
        unjust = (given_up & self.reachable()) - self.excused
        names = [object_id.hex() for object_id in unjust]
        assert not unjust, f"{names} was given up while somebody refers to it, after {line} {message}"

    def owned_entries(self) -> set[bytes]:
        return {
            object_id
            for node in self.nodes.values() if node.alive
            for object_id, entry in node.directory.entries() if entry.owned
        }  # fmt: skip

    def reachable(self) -> set[bytes]:
        """All objects that some living process holds or could get out of what it holds."""
        return self.reach([ref.object_id for proc in self.procs.values() if proc.alive for ref in proc_refs(proc)])

    def reach(self, todo: list[bytes]) -> set[bytes]:
        found: set[bytes] = set()
        while todo:
            object_id = todo.pop()
            if object_id not in found:
                found.add(object_id)
                todo += self.inside[object_id]
        return found

    # rules

    def pick(self, choice: int) -> Proc:
        living = [proc for proc in self.procs.values() if proc.alive]
        return living[choice % len(living)]

    def some(self, proc: Proc, mask: int) -> list[Ref]:
        """Up to three of what the process's variables hold."""
        refs = list(dict.fromkeys(proc.mine))
        return [ref for n, ref in enumerate(refs) if mask >> (n % 8) & 1][:3]

    @precondition(lambda self: len(self.home) < MAX_OBJECTS)
    @rule(who=st.integers(0, 7), mask=st.integers(0, 255), stored=st.booleans())
    def put(self, who: int, mask: int, stored: bool) -> None:
        proc = self.pick(who)
        proc.put(self.some(proc, mask), stored)

    @precondition(lambda self: len(self.home) < MAX_OBJECTS)
    @rule(
        who=st.integers(0, 7), whom=st.integers(0, 7), mask=st.integers(0, 255),
        plan=st.tuples(st.booleans(), st.booleans(), st.integers(0, 31)),
    )  # fmt: skip
    def submit(self, who: int, whom: int, mask: int, plan: tuple[bool, bool, int]) -> None:
        caller, worker = self.pick(who), self.pick(whom)
        if caller is not worker:
            caller.submit(worker, self.some(caller, mask), plan)

    @rule(who=st.integers(0, 7), which=st.integers(0, 31))
    def drop(self, who: int, which: int) -> None:
        proc = self.pick(who)
        if proc.mine:
            proc.let_go(proc.mine.pop(which % len(proc.mine)))

    @rule(who=st.integers(0, 7))
    def drop_all(self, who: int) -> None:
        proc = self.pick(who)
        while proc.mine:
            proc.let_go(proc.mine.pop())

    @rule(who=st.integers(0, 7), which=st.integers(0, 31), then_drop=st.booleans())
    def read(self, who: int, which: int, then_drop: bool) -> None:
        """Only what is ready: else it would have waited."""
        proc = self.pick(who)
        if not proc.mine:
            return
        ref = proc.mine[which % len(proc.mine)]
        state = ref.state
        if not ref.owned:
            entry = self.nodes[ref.home].directory.find(ref.object_id) if self.nodes[ref.home].alive else None
            state = entry.state if entry is not None else PENDING
        if state in (INLINE, STORED):
            proc.read(ref)
            if then_drop:
                proc.mine.remove(ref)
                proc.let_go(ref)

    @precondition(lambda self: self.open_lines())
    @rule(which=st.integers(0, 1000), count=st.integers(1, 4))
    def deliver(self, which: int, count: int) -> None:
        lines = self.open_lines()
        line = lines[which % len(lines)]
        for _ in range(min(count, len(self.lines[line]))):
            self.deliver_from(line)

    @rule(slow=st.integers(0, 20), slower=st.integers(0, 20))
    def deliver_all_but(self, slow: int, slower: int) -> None:
        """Two connections between two of the agents, if those are chosen, make everybody else wait."""
        held = {line for line, n in zip(PAIRS, range(6), strict=True) if n in (slow, slower)}
        self.settle(held)

    @precondition(lambda self: self.deaths_allowed and sum(proc.alive for proc in self.procs.values()) > 2)
    @rule(who=st.integers(0, 7), unlucky=st.integers(0, 3))
    def kill_process(self, who: int, unlucky: int) -> None:
        proc = self.pick(who)
        if not unlucky and proc is not self.first:
            self.anybody_died = True
            self.end_process(proc)

    @precondition(lambda self: self.deaths_allowed and sum(node.alive for node in self.nodes.values()) > 1)
    @rule(which=st.integers(1, 2), unlucky=st.integers(0, 7))
    def kill_node(self, which: int, unlucky: int) -> None:
        node = self.nodes[NODES[which]]
        if unlucky or not node.alive:
            return
        self.anybody_died = True
        node.alive = False
        for proc in self.procs.values():
            if proc.node is node and proc.alive:
                self.end_process(proc)
        for other in self.nodes.values():
            if other.alive:
                self.say(("control", node.node_id, other.node_id), ("gone",))

    def end_process(self, proc: Proc) -> None:
        """What it wrote still arrives; then its connections close. What it was handing on may be lost on the way."""
        self.excused |= self.reach([ref.object_id for ref in proc_refs(proc)])
        proc.alive = False
        proc.tell("gone")
        for other in self.procs.values():
            if other is not proc:
                self.say(("call", proc.worker_id, other.worker_id), ("closed",))

    # what must hold

    @invariant()
    def the_books_are_consistent(self) -> None:
        for node in self.nodes.values():
            if node.alive:
                node.directory.check_invariants()

    @invariant()
    def nothing_is_lost_while_all_live(self) -> None:
        if not self.anybody_died:
            for node in self.nodes.values():
                for object_id, entry in node.directory.entries():
                    assert entry.state != LOST, object_id.hex()

    def teardown(self) -> None:
        self.settle()
        if not self.anybody_died:
            self.everything_reachable_can_be_had()
        for proc in self.procs.values():
            while proc.alive and proc.mine:
                proc.let_go(proc.mine.pop())
        self.settle()
        for node in self.nodes.values():
            if node.alive:
                node.directory.check_invariants()
                left = {object_id.hex(): vars_of(entry) for object_id, entry in node.directory.entries()}
                assert not left, f"nobody refers to it, and its entry is still here: {left}"
                assert not node.directory._uses
                assert not node.directory._held
                assert not node.directory._awaited
                assert not node.copies, "nobody refers to it, and a copy is still here"

    def settle(self, held: Collection[Line] = ()) -> None:
        while lines := [line for line in self.open_lines() if line not in held]:
            for line in lines:
                self.deliver_from(line)

    def everything_reachable_can_be_had(self) -> None:
        for object_id in self.reachable():
            home = self.nodes[self.home[object_id]]
            entry = home.directory.find(object_id)
            if entry is not None and entry.state == STORED:
                assert any(object_id in self.nodes[node_id].copies for node_id in entry.nodes), object_id.hex()
            if entry is None:
                holders = [p for p in self.procs.values() for ref in proc_refs(p) if ref.object_id == object_id]
                known = [p.known[object_id] for p in holders if object_id in p.known]
                assert all(ref.owned for ref in known), object_id.hex()


def proc_refs(proc: Proc) -> list[Ref]:
    """All that the process's variables, calls under way and results on their way hold, and what hangs on that."""
    refs = [*proc.mine, *(ref for kept in proc.handover.values() for ref in kept)]
    for run in proc.runs.values():
        refs += [run.result, *run.keep]
    seen: list[Ref] = []
    while refs:
        ref = refs.pop()
        if ref not in seen:
            seen.append(ref)
            refs += ref.contained
    return seen


def vars_of(entry: Any) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in entry.__slots__}


class MortalCluster(Cluster):
    """Processes and nodes die, too."""

    deaths_allowed = True


def test_a_ref_that_is_taken_out_of_a_value_outlives_the_value() -> None:
    """The borrower is the value's last user, and its word to the value's home is faster than that to the ref's home."""
    cluster = Cluster()
    keeper, owner, borrower, *_ = cluster.procs.values()
    owner.put([], False)
    owner.submit(keeper, [owner.mine[0]], (True, False, 0))
    cluster.settle()
    cluster.drop_all(1)
    keeper.put([keeper.mine[0]], False)
    keeper.submit(borrower, [keeper.mine[1]], (True, False, 0))
    cluster.settle()
    cluster.drop_all(0)
    cluster.settle()
    value = borrower.mine[0]
    borrower.read(value)
    borrower.mine.remove(value)
    borrower.let_go(value)
    cluster.settle({("agent", borrower.node.node_id, owner.node.node_id)})
    cluster.teardown()


TestReferencesWhileAllLive = Cluster.TestCase
TestReferencesWhenSomeDie = MortalCluster.TestCase
_settings = settings(max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
TestReferencesWhileAllLive.settings = TestReferencesWhenSomeDie.settings = _settings
