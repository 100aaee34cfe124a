"""The home agent's book of objects: what is known of each, who refers to it, and who waits for it. Pure.

Every object has one home, the agent of the node where its owner (the process that submitted the task or put the value)
runs; no user code runs in an agent, so it always answers. Counting has two levels: a process tells its own agent about
each use it begins and ends, and an agent tells the home agent about its node's first and last use. Here both levels
meet: `_entries` are the objects whose home is this node, `_uses` those whose home is elsewhere.

A value keeps the references inside it alive: while an entry lives, the entry itself is a user of what it contains.

Messages of one connection arrive in order, those of different connections in any. So about one object
- a borrower's use may arrive before the owner's `publish`: the entry is made without an owner and waits for it; when
  the borrower leaves first, the entry is forgotten as if it had never been;
- a process may end a use and begin another at once, and the two words may cross: uses are counted, not listed;
- the owner may know that a value is stored before its copy is reported: the entry stays pending and remembers which
  node it expects to speak, so that a death of that node is not waited for in vain;
- a copy may be reported after everybody dropped the object: a second copy of what is not known here is always told to
  go, a first one when its id is among the `_dropped` (bounded) or its owner is dead.

An entry without an owner knows nothing: whoever could tell it something (a publish, a copy) settles the owner as well.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final

from shoal.node.messages import LOST, PENDING, STORED, ObjectState
from shoal.objects.ids import ObjectId, actor_of_object, process_of

MAX_DROPPED: Final = 16_384
"""Each waits for a message that is late by no more than the difference between two connections."""

Answer = Callable[[ObjectState], None]
WaiterKey = tuple[bytes, int]
"""Node that asks, and a number of its own."""

Contained = list[tuple[bytes, bytes]]


class Effects:
    """What the directory asks its shell to do; each is carried out in order.

    delete_copy(node_id, object_id): that node (maybe this one) drops its copy.
    tell_home(home, object_id, holds): this node began or ceased to use an object of `home`.
    actor_unreferenced(actor_id): nobody holds a handle any more.
    """

    def delete_copy(self, node_id: bytes, object_id: bytes) -> None:
        raise NotImplementedError

    def tell_home(self, home: bytes, object_id: bytes, holds: bool) -> None:
        raise NotImplementedError

    def actor_unreferenced(self, actor_id: bytes) -> None:
        raise NotImplementedError


class Entry:
    """One object whose home is here."""

    __slots__ = ("contained", "expected", "holders", "nodes", "owned", "payload", "size", "state", "users", "waiters")

    def __init__(self) -> None:
        self.state = PENDING
        self.payload = b""
        self.size = 0
        self.nodes: list[bytes] = []
        self.expected = b""  # the node whose copy the owner knows of, until that node reports it
        self.contained: Contained = []
        self.users = 0  # uses by processes of this node, and by objects that contain this one
        self.holders: set[bytes] = set()  # other nodes
        self.owned = False  # the owner has spoken (and is counted among the users until it says otherwise), or is dead
        self.waiters: dict[WaiterKey, Answer] = {}

    def view(self) -> ObjectState:
        return ObjectState(self.state, self.payload, self.size, list(self.nodes), self.contained)


class _Use:
    """This node's use of an object whose home is elsewhere."""

    __slots__ = ("home", "users")

    def __init__(self, home: bytes) -> None:
        self.home = home
        self.users = 0


class Directory:
    """See the module.

    Args:
        alive: whether the process with that 12-byte id prefix lives on this node.
        node_is_gone: whether `node_gone` was called for that node (one that is not known here yet is not gone).
    """

    def __init__(
        self,
        node_id: bytes,
        effects: Effects,
        alive: Callable[[bytes], bool],
        node_is_gone: Callable[[bytes], bool],
    ) -> None:
        self._node = node_id
        self._effects = effects
        self._alive = alive
        self._node_is_gone = node_is_gone
        self._entries: dict[bytes, Entry] = {}
        self._uses: dict[bytes, _Use] = {}
        self._held: dict[bytes, dict[bytes, int]] = {}  # process of this node -> object -> uses
        self._awaited: dict[bytes, set[bytes]] = {}  # owner's id prefix -> entries it may say more about
        self._dropped: OrderedDict[bytes, None] = OrderedDict()
        self._unused: list[bytes] = []  # entries that may have lost their last user
        self._sweeping = False

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, object_id: bytes) -> Entry | None:
        return self._entries.get(object_id)

    def entries(self) -> Iterator[tuple[bytes, Entry]]:
        return iter(self._entries.items())

    def uses_of_home(self, home: bytes) -> list[bytes]:
        """Objects of another home that this node uses."""
        return [object_id for object_id, use in self._uses.items() if use.home == home]

    # --------------------------------------------------------------------------------- objects of this home

    def publish(self, object_id: bytes, owner: bytes, state: ObjectState) -> None:
        """The owner, a process of this node, says what it knows. It uses the object until it says otherwise.

        STORED names the node whose store was given the value; the entry becomes ready with that node's own word.
        """
        entry = self._entries.get(object_id)
        if entry is None:
            entry = self._make(object_id)
        if not entry.owned:
            self._own(object_id, entry, owner)
        self._adopt(entry, state.contained)
        if state.state != STORED:
            self._learn(object_id, entry, state)
        elif not entry.nodes and entry.state == PENDING:
            node_id = state.nodes[0] if state.nodes else b""
            if node_id and not self._node_is_gone(node_id):
                entry.expected = node_id
            else:
                self._learn(object_id, entry, ObjectState(LOST, _died(node_id)))

    def copy_made(self, object_id: bytes, node_id: bytes, size: int, owner: bytes, contained: Contained) -> None:
        """A sealed copy exists on `node_id` (maybe this node). `owner` is empty for a second copy."""
        entry = self._entries.get(object_id)
        if entry is None:
            if not owner or object_id in self._dropped or not self._alive(process_of(object_id)):
                self._effects.delete_copy(node_id, object_id)
                return
            entry = self._make(object_id)
        if not entry.owned:
            if not owner:  # of a time before everybody dropped it
                self._effects.delete_copy(node_id, object_id)
                return
            self._own(object_id, entry, owner)
        if node_id not in entry.nodes:
            entry.nodes.append(node_id)
        entry.expected = b""
        self._adopt(entry, contained)
        if entry.state in (PENDING, LOST):
            self._learn(object_id, entry, ObjectState(STORED, b"", size))

    def copy_gone(self, object_id: bytes, node_id: bytes, why: str) -> None:
        entry = self._entries.get(object_id)
        if entry is not None and node_id in entry.nodes:
            entry.nodes.remove(node_id)
            if not entry.nodes and entry.state == STORED:
                entry.state = LOST
                entry.payload = why.encode()

    def holder_changed(self, object_id: bytes, node_id: bytes, holds: bool) -> None:
        """Another node began or ceased to use an object of this home."""
        entry = self._entries.get(object_id)
        if holds:
            if entry is None:
                entry = self._make_unowned(object_id)
            entry.holders.add(node_id)
        elif entry is not None:
            entry.holders.discard(node_id)
            self._free_if_unused(object_id)

    def watch(self, object_id: bytes, key: WaiterKey, answer: Answer) -> None:
        """Call `answer` with the state once it is not PENDING: now, or later unless `unwatch` comes first."""
        entry = self._entries.get(object_id)
        if entry is None:
            if object_id in self._dropped or self._never_comes(object_id):
                answer(_ALL_DROPPED if object_id in self._dropped else _OWNER_DIED)
                return
            entry = self._make(object_id)
        if entry.state != PENDING:
            answer(entry.view())
        else:
            entry.waiters[key] = answer

    def find_state(self, object_id: bytes) -> ObjectState | None:
        """The state if it is known and not PENDING."""
        entry = self._entries.get(object_id)
        return entry.view() if entry is not None and entry.state != PENDING else None

    def unwatch(self, object_id: bytes, key: WaiterKey) -> None:
        entry = self._entries.get(object_id)
        if entry is not None and entry.waiters.pop(key, None) is not None:
            self._free_if_unused(object_id)

    # ------------------------------------------------------------------------------------------------- uses

    def use(self, object_id: bytes, home: bytes, process: bytes) -> None:
        """A process of this node refers to the object once more."""
        held = self._held.setdefault(process, {})
        held[object_id] = held.get(object_id, 0) + 1
        self._begin(object_id, home)

    def unuse(self, object_id: bytes, home: bytes, process: bytes) -> None:
        """A process of this node refers to the object once less."""
        held = self._held.get(process)
        count = held.get(object_id, 0) if held is not None else 0
        if held is not None and count:
            if count > 1:
                held[object_id] = count - 1
            else:
                del held[object_id]
                if not held:
                    del self._held[process]
            self._end(object_id, home)
        elif home == self._node and process_of(object_id) == process[:12]:
            # The owner's first word is its last: what arrives late must not wait for another.
            entry = self._entries.get(object_id)
            if entry is None:
                self._drop(object_id)
            elif not entry.owned:
                entry.owned = True
                self._free_if_unused(object_id)

    def process_gone(self, worker_id: bytes) -> None:
        """A process of this node ended: it uses nothing any more, and what it still owed fails."""
        for object_id in self._awaited.pop(worker_id[:12], set()):
            entry = self._entries.get(object_id)
            if entry is None:
                continue  # it was inside one of the others
            entry.owned = True
            if entry.state == PENDING and not entry.expected:
                self._learn(object_id, entry, _OWNER_DIED)
            self._free_if_unused(object_id)
        for object_id, count in self._held.pop(worker_id, {}).items():
            home = self._home_of(object_id)
            for _ in range(count):
                self._end(object_id, home)

    def node_gone(self, node_id: bytes) -> None:
        """Another node ended: its copies, its uses and its questions are gone, and so are the objects of its home."""
        for object_id, entry in list(self._entries.items()):
            self.copy_gone(object_id, node_id, _died(node_id).decode())
            if entry.expected == node_id:
                entry.expected = b""
                if entry.state == PENDING:
                    self._learn(object_id, entry, ObjectState(LOST, _died(node_id)))
            asked = [key for key in entry.waiters if key[0] == node_id]
            for key in asked:
                del entry.waiters[key]
            if asked or node_id in entry.holders:
                entry.holders.discard(node_id)
                self._free_if_unused(object_id)
        for object_id in self.uses_of_home(node_id):
            del self._uses[object_id]

    # -------------------------------------------------------------------------------------------- internals

    def _home_of(self, object_id: bytes) -> bytes:
        use = self._uses.get(object_id)
        return use.home if use is not None else self._node

    def _begin(self, object_id: bytes, home: bytes) -> None:
        if home == self._node:
            entry = self._entries.get(object_id)
            if entry is None:
                entry = self._make_unowned(object_id)
            entry.users += 1
            return
        use = self._uses.get(object_id)
        if use is None:
            use = self._uses[object_id] = _Use(home)
            self._effects.tell_home(home, object_id, True)
        use.users += 1

    def _end(self, object_id: bytes, home: bytes) -> None:
        if home == self._node:
            entry = self._entries.get(object_id)
            if entry is not None:  # else its home was another node, which died
                entry.users -= 1
                self._free_if_unused(object_id)
            return
        use = self._uses.get(object_id)
        if use is not None:  # else its home died
            use.users -= 1
            if not use.users:
                del self._uses[object_id]
                self._effects.tell_home(home, object_id, False)

    def _never_comes(self, object_id: bytes) -> bool:
        """The owner of an object that nothing is known of is dead. (Whose an actor is cannot be told from its id.)"""
        return actor_of_object(ObjectId(object_id)) is None and not self._alive(process_of(object_id))

    def _make(self, object_id: bytes) -> Entry:
        entry = self._entries[object_id] = Entry()
        if actor_of_object(ObjectId(object_id)) is None:
            self._awaited.setdefault(process_of(object_id), set()).add(object_id)
        return entry

    def _make_unowned(self, object_id: bytes) -> Entry:
        """An entry that somebody refers to before its owner spoke; if that owner is gone already it never will."""
        entry = self._make(object_id)
        gone = _ALL_DROPPED if object_id in self._dropped else _OWNER_DIED if self._never_comes(object_id) else None
        if gone is not None:
            entry.owned = True
            entry.state, entry.payload = gone.state, gone.payload
            self._not_awaited(object_id)
        return entry

    def _own(self, object_id: bytes, entry: Entry, owner: bytes) -> None:
        entry.owned = True
        held = self._held.setdefault(owner, {})
        held[object_id] = held.get(object_id, 0) + 1
        entry.users += 1
        if entry.state != PENDING:
            self._not_awaited(object_id)

    def _adopt(self, entry: Entry, contained: Contained) -> None:
        """The value keeps what it refers to from the moment that is known, which may be before the value is here."""
        if contained and not entry.contained:
            entry.contained = contained
            for inner, home in contained:
                self._begin(inner, home)

    def _learn(self, object_id: bytes, entry: Entry, state: ObjectState) -> None:
        if state.state == PENDING or entry.state not in (PENDING, LOST):
            return
        entry.state, entry.payload, entry.size = state.state, state.payload, state.size
        if entry.owned:
            self._not_awaited(object_id)
        waiters, entry.waiters = entry.waiters, {}
        view = entry.view()
        for answer in waiters.values():
            answer(view)
        self._free_if_unused(object_id)

    def _not_awaited(self, object_id: bytes) -> None:
        awaited = self._awaited.get(process_of(object_id))
        if awaited is not None:
            awaited.discard(object_id)
            if not awaited:
                del self._awaited[process_of(object_id)]

    def _free_if_unused(self, object_id: bytes) -> None:
        """A chain of values inside values is walked in a loop: it may be longer than Python's stack is deep."""
        self._unused.append(object_id)
        if self._sweeping:
            return
        self._sweeping = True
        try:
            while self._unused:
                self._free_one_if_unused(self._unused.pop())
        finally:
            self._sweeping = False

    def _free_one_if_unused(self, object_id: bytes) -> None:
        entry = self._entries.get(object_id)
        if entry is None or entry.users or entry.holders or entry.waiters:
            return
        del self._entries[object_id]
        self._not_awaited(object_id)
        if not entry.owned:
            return  # nothing is known of it: its owner's word will make it anew
        self._drop(object_id)
        for node_id in entry.nodes:
            self._effects.delete_copy(node_id, object_id)
        for inner, home in entry.contained:
            self._end(inner, home)
        actor_id = actor_of_object(ObjectId(object_id))
        if actor_id is not None:
            self._effects.actor_unreferenced(actor_id)

    def _drop(self, object_id: bytes) -> None:
        self._dropped[object_id] = None
        if len(self._dropped) > MAX_DROPPED:
            self._dropped.popitem(last=False)

    def check_invariants(self) -> None:
        users: dict[bytes, int] = {}
        for held in self._held.values():
            assert held
            for object_id, count in held.items():
                assert count > 0
                users[object_id] = users.get(object_id, 0) + count
        for entry in self._entries.values():
            for inner, _ in entry.contained:
                users[inner] = users.get(inner, 0) + 1
        for object_id, entry in self._entries.items():
            assert entry.users == users.get(object_id, 0), object_id.hex()
            assert entry.users or entry.holders or entry.waiters, object_id.hex()
            assert len(set(entry.nodes)) == len(entry.nodes), object_id.hex()
            assert not (entry.waiters and entry.state != PENDING), object_id.hex()
            assert entry.owned or (entry.state == PENDING and not entry.nodes and not entry.contained), object_id.hex()
            awaited = object_id in self._awaited.get(process_of(object_id), ())
            may_speak = actor_of_object(ObjectId(object_id)) is None and self._alive(process_of(object_id))
            assert awaited == (may_speak and (not entry.owned or entry.state == PENDING)), object_id.hex()
            assert object_id not in self._uses, object_id.hex()
        for prefix, ids in self._awaited.items():
            assert ids
            assert all(process_of(object_id) == prefix and object_id in self._entries for object_id in ids)
        for object_id, use in self._uses.items():
            assert 0 < use.users <= users.get(object_id, 0), object_id.hex()


def _died(node_id: bytes) -> bytes:
    return f"node:node {node_id.hex()[:12] or 'unknown'}, which held its last copy, is gone".encode()


_ALL_DROPPED: Final = ObjectState(LOST, b"its owner and all its users had dropped it")
_OWNER_DIED: Final = ObjectState(LOST, b"owner:the process that would have produced it ended")
