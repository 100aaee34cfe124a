"""The home agent's book of objects: what is known of each, who refers to it, and who waits for it. Pure.

Every object has one home, the agent of the node where its owner (the process that submitted the task or put the value)
runs; no user code runs in an agent, so it always answers. Counting has two levels: a process tells its own agent about
its first and last use of an object, and an agent tells the home agent about its node's first and last use. Here both
levels meet: `_entries` are the objects whose home is this node, `_uses` those whose home is elsewhere.

A value keeps the references inside it alive: while an entry lives, the entry itself is a user of what it contains.

Messages about one object may overtake each other, since they travel over different connections:
- a borrower's use may arrive before the owner's `publish`: the entry is made without an owner and waits for it;
- the owner's last word may arrive before a remote copy reports: the id is kept among the `_dropped` (bounded) and the
  late copy is told to go.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final

from shoal.node.messages import ERROR, LOST, PENDING, STORED, ObjectState
from shoal.objects.ids import ObjectId, actor_of_object, process_of

MAX_DROPPED: Final = 100_000
"""Each waits for at most one late message, so the oldest of very many have long been answered."""

Answer = Callable[[ObjectState], None]


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

    __slots__ = ("contained", "holders", "nodes", "owned", "payload", "size", "state", "users", "waiters")

    def __init__(self) -> None:
        self.state = PENDING
        self.payload = b""
        self.size = 0
        self.nodes: list[bytes] = []
        self.contained: list[tuple[bytes, bytes]] = []
        self.users: set[bytes] = set()  # worker ids of this node, and ids of objects that contain this one
        self.holders: set[bytes] = set()  # other nodes
        self.owned = False  # the owner has spoken: it published the object, or a copy of it was sealed for it
        self.waiters: dict[object, Answer] = {}

    def view(self) -> ObjectState:
        return ObjectState(self.state, self.payload, self.size, list(self.nodes), self.contained)


class _Use:
    """This node's use of an object whose home is elsewhere."""

    __slots__ = ("home", "users")

    def __init__(self, home: bytes) -> None:
        self.home = home
        self.users: set[bytes] = set()


class Directory:
    """See the module. `alive(process)` says whether the process with that 12-byte id prefix lives on this node."""

    def __init__(self, node_id: bytes, effects: Effects, alive: Callable[[bytes], bool]) -> None:
        self._node = node_id
        self._effects = effects
        self._alive = alive
        self._entries: dict[bytes, Entry] = {}
        self._uses: dict[bytes, _Use] = {}
        self._dropped: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, object_id: bytes) -> Entry | None:
        return self._entries.get(object_id)

    def entries(self) -> Iterator[tuple[bytes, Entry]]:
        return iter(self._entries.items())

    # --------------------------------------------------------------------------------- objects of this home

    def publish(self, object_id: bytes, owner: bytes, state: ObjectState) -> None:
        """The owner, a process of this node, says what it knows. It uses the object until it says otherwise."""
        entry = self._entries.get(object_id)
        if entry is None:
            entry = self._entries[object_id] = Entry()
        if not entry.owned:
            entry.owned = True
            entry.users.add(owner)
        self._learn(object_id, entry, state)

    def copy_made(
        self, object_id: bytes, node_id: bytes, size: int, owner: bytes, contained: list[tuple[bytes, bytes]]
    ) -> None:
        """A sealed copy exists on `node_id` (maybe this node)."""
        entry = self._entries.get(object_id)
        if entry is None:
            if object_id in self._dropped or not self._alive(process_of(object_id)):
                self._dropped.pop(object_id, None)
                self._effects.delete_copy(node_id, object_id)
                return
            entry = self._entries[object_id] = Entry()
        if not entry.owned and self._alive(process_of(object_id)):
            entry.owned = True
            entry.users.add(owner)
        if node_id not in entry.nodes:
            entry.nodes.append(node_id)
        if entry.state in (PENDING, LOST):
            self._learn(object_id, entry, ObjectState(STORED, b"", size, list(entry.nodes), contained))

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
            self._free_if_unused(object_id, entry)

    def watch(self, object_id: bytes, key: object, answer: Answer) -> None:
        """Call `answer` with the state once it is not PENDING: now, or later unless `unwatch(object_id, key)` comes first."""
        entry = self._entries.get(object_id)
        if entry is None:
            if object_id in self._dropped:
                answer(ObjectState(LOST, b"its owner and all its users had dropped it"))
                return
            entry = self._make_unowned(object_id)
        if entry.state != PENDING:
            answer(entry.view())
        else:
            entry.waiters[key] = answer

    def unwatch(self, object_id: bytes, key: object) -> None:
        entry = self._entries.get(object_id)
        if entry is not None:
            entry.waiters.pop(key, None)
            self._free_if_unused(object_id, entry)

    # ------------------------------------------------------------------------------------ uses by processes

    def use(self, object_id: bytes, home: bytes, user: bytes) -> bool:
        """`user` (a worker id, or the id of an object that contains this one) refers to the object from now on.

        Returns:
            True when `home` must be told and has not acknowledged it yet (see `Effects.tell_home`).
        """
        if home == self._node:
            entry = self._entries.get(object_id)
            if entry is None:
                entry = self._make_unowned(object_id)
            entry.users.add(user)
            return False
        use = self._uses.get(object_id)
        first = use is None
        if use is None:
            use = self._uses[object_id] = _Use(home)
        use.users.add(user)
        return first

    def unuse(self, object_id: bytes, home: bytes, user: bytes) -> None:
        if home != self._node:
            use = self._uses.get(object_id)
            if use is not None:
                use.users.discard(user)
                if not use.users:
                    del self._uses[object_id]
                    self._effects.tell_home(home, object_id, False)
            return
        entry = self._entries.get(object_id)
        if entry is not None:
            if process_of(object_id) == user[:12]:
                entry.owned = True  # it will not speak again: what arrives late must not wait for it
            entry.users.discard(user)
            self._free_if_unused(object_id, entry)
        elif process_of(object_id) == user[:12]:
            self._drop(object_id)

    def process_gone(self, worker_id: bytes) -> None:
        """A process of this node ended: it uses nothing any more, and what it still owed fails."""
        for object_id, entry in list(self._entries.items()):
            entry.users.discard(worker_id)
            if process_of(object_id) == worker_id[:12]:
                entry.owned = True
                if entry.state == PENDING:
                    text = b"the process that would have produced it ended"
                    self._learn(object_id, entry, ObjectState(LOST, b"owner:" + text))
            self._free_if_unused(object_id, entry)
        for object_id, use in list(self._uses.items()):
            if worker_id in use.users:
                self.unuse(object_id, use.home, worker_id)

    def node_gone(self, node_id: bytes, why: str) -> None:
        """Another node ended: its copies and its uses are gone."""
        for object_id, entry in list(self._entries.items()):
            self.copy_gone(object_id, node_id, why)
            if node_id in entry.holders:
                entry.holders.discard(node_id)
                self._free_if_unused(object_id, entry)
        for object_id in [o for o, use in self._uses.items() if use.home == node_id]:
            del self._uses[object_id]

    # -------------------------------------------------------------------------------------------- internals

    def _make_unowned(self, object_id: bytes) -> Entry:
        """An entry that somebody refers to before its owner spoke; if that owner is gone already it never will."""
        entry = self._entries[object_id] = Entry()
        if actor_of_object(ObjectId(object_id)) is None and not self._alive(process_of(object_id)):
            entry.owned = True
            entry.state = LOST
            entry.payload = b"owner:the process that would have produced it ended"
        return entry

    def _learn(self, object_id: bytes, entry: Entry, state: ObjectState) -> None:
        if state.state == PENDING or entry.state not in (PENDING, LOST):
            return
        entry.state, entry.payload, entry.size = state.state, state.payload, state.size
        for node_id in state.nodes:
            if node_id not in entry.nodes:
                entry.nodes.append(node_id)
        if state.contained and not entry.contained:
            entry.contained = state.contained
            for inner, home in state.contained:
                if self.use(inner, home, object_id):
                    self._effects.tell_home(home, inner, True)
        waiters, entry.waiters = entry.waiters, {}
        view = entry.view()
        for answer in waiters.values():
            answer(view)
        self._free_if_unused(object_id, entry)

    def _free_if_unused(self, object_id: bytes, entry: Entry) -> None:
        if entry.users or entry.holders or entry.waiters or not entry.owned or object_id not in self._entries:
            return
        del self._entries[object_id]
        if entry.state in (PENDING, ERROR, LOST) or not entry.nodes:
            self._drop(object_id)  # a copy may still be reported
        for node_id in entry.nodes:
            self._effects.delete_copy(node_id, object_id)
        for inner, home in entry.contained:
            self.unuse(inner, home, object_id)
        actor_id = actor_of_object(ObjectId(object_id))
        if actor_id is not None:
            self._effects.actor_unreferenced(actor_id)

    def _drop(self, object_id: bytes) -> None:
        self._dropped[object_id] = None
        if len(self._dropped) > MAX_DROPPED:
            self._dropped.popitem(last=False)

    def check_invariants(self) -> None:
        for object_id, entry in self._entries.items():
            assert entry.users or entry.holders or entry.waiters or not entry.owned, object_id.hex()
            assert len(set(entry.nodes)) == len(entry.nodes), object_id.hex()
            assert not (entry.waiters and entry.state != PENDING), object_id.hex()
            assert object_id not in self._uses, object_id.hex()
        for object_id, use in self._uses.items():
            assert use.users, object_id.hex()
