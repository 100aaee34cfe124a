"""Objects as this process knows them: their states, who in this process refers to them, and their bytes in the store.

A ref that never leaves its process costs no message: its value lives in the ref. Once it leaves, is borrowed, or has
bytes in the store, this process is one of its counted users at the home agent, and `LastUse` says when it is no more.
Whoever unpickles a ref in this process finds the instance that is here already, through `_known`.
"""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from shoal import exceptions
from shoal.node.messages import (
    ERROR,
    INLINE,
    LOST,
    PENDING,
    STORED,
    Allocate,
    Allocated,
    BeginUses,
    CancelResolve,
    ObjectState,
    Publish,
    ReadStates,
    Release,
    Resolve,
    Resolved,
    Seal,
    Unpin,
    Unuse,
)
from shoal.objects.serialization import Serialized, deserialize, serialize
from shoal.rpc.messages import Failed, Reply
from shoal.runtime.actor_client import Client
from shoal.runtime.connection import Answer, NodeConnection
from shoal.runtime.last_uses import LastUse, LastUses
from shoal.runtime.object_ref import ObjectRef

if TYPE_CHECKING:
    from shoal.runtime.waiting import Waiter

INLINE_BYTES: Final = 100 * 1024
"""Larger values live in the store."""
BATCH_FROM: Final = 16
BATCH: Final = 5000
"""Objects in one message: some 300 KB of ids."""
PUT_INDEX: Final = bytes(4)


class References(NodeConnection):
    """See the module.

    Attributes:
        uses_begun: how many times this process began to use a borrowed ref.
        uses_counted: so many of those, from the first one on, have been counted by their homes.
        waiters: all that wait for objects now.
        on_unseen_error: called with the flat error of a failed object whose last ref is gone before anybody read it.
    """

    def __init__(self, *, worker_id: bytes, token: bytes, is_driver: bool, name: str) -> None:
        super().__init__(worker_id=worker_id, token=token, is_driver=is_driver, name=name)
        self.uses_begun = 0
        self.uses_counted = 0
        self.waiters: set[Waiter] = set()
        self.on_unseen_error: Callable[[bytes], None] | None = None
        self.counter = itertools.count(1)  # of this process's tasks and puts
        self._known: dict[bytes, LastUse] = {}  # changed under `_known_lock`; a ref that is in it is `followed`
        self._known_lock = threading.RLock()
        self._last_uses = LastUses()
        self._pins = LastUses()
        self._pinned: dict[int, LastUse] = {}  # by id(): a weak reference has the hash of what it refers to
        self._unasked: list[LastUse] = []  # borrowed ones whose homes will be asked in this round
        self._uses_told = 0
        self._uncounted: dict[int, None] = {}  # by the number of their first: uses that are not all counted, in order
        self._after_uses: collections.deque[tuple[int, Callable[[], None]]] = collections.deque()
        self._kept_for_good: list[Any] = []

    def open(self) -> None:
        super().open()
        for uses, hear in ((self._last_uses, self._hear_last_uses), (self._pins, self._hear_pins)):
            uses.open()
            self.reactor.call_soon(self.reactor.register, uses.fd, hear)

    def close_channels(self) -> None:
        super().close_channels()
        for uses in (self._last_uses, self._pins):
            self.reactor.unregister(uses.fd)
            uses.silence()

    def forget_in_child(self) -> None:
        super().forget_in_child()
        self._last_uses.silence()
        self._pins.silence()

    def fail_everything(self, error: Exception) -> None:
        state = error_state(error)
        for waiter in list(self.waiters):
            for ref in waiter.refs:
                if ref.state == PENDING:
                    self.learn(ref, state)

    # ---------------------------------------------------------------------------------------------------- states

    def learn(self, ref: ObjectRef[Any], state: ObjectState) -> None:
        """`ref` is not pending any more: take over its state and wake who waits."""
        if ref.state != PENDING and not (ref.state == STORED and state.state in (LOST, ERROR)):
            return
        ref.value, ref.size = state.payload, state.size
        if state.contained and ref.contained is None and ref.owned:
            ref.contained = [self.borrow(inner, home) for inner, home in state.contained]
        if state.state == STORED:
            ref.node = state.nodes[0] if state.nodes else b""
            ref.local = self.node_id in state.nodes
            self.follow(ref)
            ref.published = ref.owned  # the home must know which node to wait for, or not to wait for any more
        elif state.state == ERROR and self.on_unseen_error is not None and not (ref.watched or ref.published):
            self.follow(ref).note = state.payload
        ref.state = state.state
        if ref.published and ref.owned:
            self.agent.send(Publish(ref.binary(), self.state_of(ref)))
        if ref.waiters is not None:
            self.wake(ref)

    def wake(self, ref: ObjectRef[Any]) -> None:
        """Tell who waits for `ref` that it is not pending any more."""
        waiters, ref.waiters = ref.waiters, None
        for waiter in waiters or ():
            waiter.ready(ref)

    def state_of(self, ref: ObjectRef[Any]) -> ObjectState:
        contained = self.name_all(ref.contained) if ref.contained else []
        return ObjectState(ref.state, ref.value, ref.size, [ref.node] if ref.node else [], contained)

    def error_of(self, ref: ObjectRef[Any]) -> BaseException:
        """What to raise for a failed object. Any thread."""
        if ref.state == ERROR:
            self.seen(ref)
            error: BaseException = deserialize(ref.value)
            return error.as_raisable() if isinstance(error, exceptions.TaskError) else error
        kind, _, text = ref.value.decode(errors="replace").partition(":")
        if kind == "owner":
            return exceptions.OwnerDiedError(f"object {ref.hex()} is lost: {text}")
        return exceptions.ObjectLostError(
            f"object {ref.hex()} is lost: {text if kind == 'node' else ref.value.decode()}"
        )

    def seen(self, ref: ObjectRef[Any]) -> None:
        """Somebody knows of the error that `ref` failed with. Any thread."""
        use = self._known.get(ref.binary())
        if use is not None:
            use.note = b""

    def watch(self, ref: ObjectRef[Any], waiter: Any) -> bool:
        """Call `waiter.ready(ref)` when it is not pending any more. True when its home had to be asked just now."""
        if ref.waiters is None:
            ref.waiters = []
        ref.waiters.append(waiter)
        before, ref.watched = ref.watched, True
        if self.closed:
            self.learn(ref, error_state(exceptions.LocalAgentDiedError(self.closed)))
        elif not ref.owned:
            return not before and self._ask_home(ref)
        elif ref.task is None or ref.task.bound.runtime is not self:
            self.learn(ref, error_state(foreign(ref)))
        return False

    def _ask_home(self, ref: ObjectRef[Any]) -> bool:
        use = self._known.get(ref.binary())
        if use is None or use() is not ref:
            self.learn(ref, error_state(foreign(ref)))
            return False
        if not self._unasked:
            self.reactor.call_soon(self._ask_homes)
        self._unasked.append(use)
        return True

    def _ask_homes(self) -> None:
        """Very many may be asked for at once: what the agent of this node knows already comes in few answers."""
        uses, self._unasked = self._unasked, []
        here = [use for use in uses if use.home == self.node_id] if len(uses) >= BATCH_FROM else []
        for use in uses:
            if not here or use.home != self.node_id:
                self._ask_alone(use)
        for start in range(0, len(here), BATCH):
            part = here[start : start + BATCH]
            self.agent.request(ReadStates(object_ids=[use.key for use in part]), partial(self._states_read, part))

    def _states_read(self, uses: list[LastUse], reply: Any) -> None:
        if isinstance(reply, Failed):
            for use in uses:
                self._resolved(use, reply)
            return
        for use, state in zip(uses, reply.states, strict=True):
            ref = use()
            if ref is None:
                continue
            if state.state == PENDING:
                self._ask_alone(use)
            else:
                self.learn(ref, state)

    def _ask_alone(self, use: LastUse) -> None:
        request = Resolve(object_id=use.key, home=use.home, fetch=False)
        use.request = self.agent.request(request, lambda reply: self._resolved(use, reply))

    def _resolved(self, use: LastUse, reply: Any) -> None:
        use.request = 0
        ref = use()
        if ref is None:
            return
        if isinstance(reply, Failed):
            self.learn(ref, error_state(self.problem_of(ref, reply)))
        else:
            self.learn(ref, reply.state)

    def problem_of(self, ref: ObjectRef[Any], reply: Failed) -> Exception:
        """The exception for an agent that cannot bring an object here."""
        if reply.kind == "store_full":
            return exceptions.ObjectStoreFullError(f"cannot fetch {ref.hex()}: {reply.text}")
        if reply.kind == "closed":
            return exceptions.LocalAgentDiedError(self.closed or reply.text)
        return exceptions.ShoalSystemError(f"cannot fetch {ref.hex()}: {reply.text}")

    # ------------------------------------------------------------------------------------------------ references

    def follows(self, ref: ObjectRef[Any]) -> bool:
        """Whether `ref` is this runtime's record of an object that is known outside."""
        use = self._known.get(ref.binary())
        return use is not None and use() is ref

    def follow(self, ref: ObjectRef[Any]) -> LastUse:
        """From now on the end of `ref` is noticed, and whoever unpickles its id finds it. Any thread."""
        object_id = ref.binary()
        if ref.followed:
            use = self._known.get(object_id)
            if use is not None:
                return use
        with self._known_lock:
            use = self._known.get(object_id)
            if use is None or use() is not ref:
                use = self._known[object_id] = self._last_uses.follow(ref, object_id, ref.home)
                ref.followed = True
        return use

    def publish_all(self, refs: Sequence[ObjectRef[Any]]) -> None:
        for ref in refs:
            self.publish(ref)

    def publish(self, ref: ObjectRef[Any]) -> None:
        """A ref leaves this process: from now on its home agent knows the object."""
        if ref.published or not ref.owned:
            return
        ref.published = True
        self.follow(ref).note = b""  # from here on others may read it
        self.agent.send(Publish(ref.binary(), self.state_of(ref)))

    def name_all(self, refs: Sequence[ObjectRef[Any]]) -> list[tuple[bytes, bytes]]:
        """Publish what a value refers to, and name it as it travels: (object id, home)."""
        self.publish_all(refs)
        return [(ref.binary(), ref.home) for ref in refs]

    def contained_refs(self, serialized: Serialized) -> list[ObjectRef[Any]]:
        """The references inside a value that was just serialized, those of actors' handles included. Any thread.

        Whoever unpickles them in this process must find these instances, so they are known from here on.
        """
        refs: dict[bytes, ObjectRef[Any]] = {}
        for item in serialized.refs:
            if isinstance(item, Client):
                if item.ref is None:
                    continue  # a weak handle: nobody counts it
                item = item.ref
            assert isinstance(item, ObjectRef)
            self.follow(item)
            refs[item.binary()] = item
        return list(refs.values())

    def keep_for_good(self, refs: Sequence[ObjectRef[Any]]) -> None:
        """References that leave with code, which may be run whenever: they live as long as this process. Any thread."""
        if refs:
            self._kept_for_good.extend(refs)
            self.reactor.call_soon(self.publish_all, refs)

    def escaped_unseen(self, ref: ObjectRef[Any]) -> None:
        """Pickled by somebody else, who does not count: keep the object for this process's life. Any thread."""
        self.follow(ref)
        self.keep_for_good([ref])

    def borrow(self, object_id: bytes, home: bytes) -> ObjectRef[Any]:
        """The record of an object that somebody else made (or that this process did, if it comes back). Any thread."""
        use = self._known.get(object_id)
        ref: ObjectRef[Any] | None = use() if use is not None else None
        if ref is not None:
            return ref
        with self._known_lock:
            use = self._known.get(object_id)
            ref = use() if use is not None else None
            if ref is None:
                ref = ObjectRef(object_id, home, owned=False)
                self.follow(ref)
                self.uses_begun += 1
                self._last_uses.gone.append((object_id, home))
                self.reactor.call_soon(self._tell_uses)
        return ref

    def after_uses(self, call: Callable[[], None]) -> None:
        """Run `call` once every use that was begun so far is counted by its home."""
        if self.uses_counted >= self.uses_begun:
            call()
        else:
            self._after_uses.append((self.uses_begun, call))

    def _hear_last_uses(self, _events: int) -> None:
        self._last_uses.heard()
        self._tell_uses()

    def _tell_uses(self) -> None:
        """Tell the agent which uses ended and began, in the order in which that happened."""
        events, known = self._last_uses.gone, self._known
        if not events:
            return  # another call has told all
        ended: list[tuple[bytes, bytes]] = []
        begun: list[tuple[bytes, bytes]] = []
        unseen: list[bytes] = []
        for _ in range(len(events)):
            event = events.popleft()
            if isinstance(event, LastUse):
                with self._known_lock:
                    if known.get(event.key) is event:
                        del known[event.key]
                ended.append((event.key, event.home))
                if event.note:
                    unseen.append(event.note)
                if event.request and self.agent.forget(event.request):
                    self.agent.send(CancelResolve(event.request))
                continue
            if ended:
                self._end_uses(ended)
                ended = []
            begun.append(event)
        if begun:
            self._begin_uses(begun)
        if ended:
            self._end_uses(ended)
        for note in unseen:
            if self.on_unseen_error is not None:
                self.on_unseen_error(note)

    def _begin_uses(self, begun: list[tuple[bytes, bytes]]) -> None:
        for start in range(0, len(begun), BATCH):
            part = begun[start : start + BATCH]
            number = self._uses_told + 1
            self._uses_told += len(part)
            self._uncounted[number] = None
            self.agent.request(BeginUses(objects=part), partial(self._use_counted, number))

    def _end_uses(self, ended: list[tuple[bytes, bytes]]) -> None:
        """Told when the uses begun before are counted: a ref taken out of a value must be, before the value may go."""
        self.after_uses(partial(self.agent.send, Unuse(ended)))

    def _use_counted(self, number: int, _reply: Reply) -> None:
        del self._uncounted[number]
        first = next(iter(self._uncounted), self._uses_told + 1)
        self.uses_counted = first - 1
        while self._after_uses and self._after_uses[0][0] < first:
            self._after_uses.popleft()[1]()

    # ------------------------------------------------------------------------------------- bytes in the store: reading

    def fetch(self, ref: ObjectRef[Any], answered: Callable[[Any], None]) -> int:
        """Ask for a local, pinned copy; the answer is a `Resolved` or `Failed`."""
        return self.agent.request(Resolve(object_id=ref.binary(), home=ref.home, fetch=True), answered)

    def cancel_fetch(self, request: int) -> None:
        self.agent.send(CancelResolve(request))

    def view_of(self, ref: ObjectRef[Any], reply: Resolved) -> memoryview:
        """The pinned bytes; unpinned when the last view of them is gone. Any thread."""
        view, holder = self.arena.lend(reply.offset, reply.state.size)
        pin = self._pins.follow(holder, ref.binary())
        self._pinned[id(pin)] = pin
        return view

    def _hear_pins(self, _events: int) -> None:
        self._pins.heard()
        gone = self._pins.gone
        object_ids = []
        for _ in range(len(gone)):
            pin = gone.popleft()
            self._pinned.pop(id(pin), None)
            object_ids.append(pin.key)
        if object_ids:
            self.agent.send(Unpin(object_ids))

    # ------------------------------------------------------------------------------------- bytes in the store: writing

    def put(self, value: Any) -> ObjectRef[Any]:
        serialized = serialize(value)
        if serialized.flat_size > INLINE_BYTES:
            return self.put_serialized(serialized)
        if self.closed:
            self.check_open()
        ref: ObjectRef[Any] = ObjectRef(
            self.prefix + next(self.counter).to_bytes(8, "little") + PUT_INDEX, self.node_id
        )
        if serialized.refs:
            ref.contained = self.contained_refs(serialized)
        ref.value = serialized.flatten()
        ref.state = INLINE
        return ref

    def put_serialized(self, serialized: Serialized) -> ObjectRef[Any]:
        """Store a large value of this process. By a user's thread."""
        ref: ObjectRef[Any] = ObjectRef(
            self.prefix + next(self.counter).to_bytes(8, "little") + PUT_INDEX, self.node_id
        )
        if serialized.refs:
            ref.contained = self.contained_refs(serialized)
        self.follow(ref)  # first: if this thread is interrupted after the bytes are stored, they go with the ref
        self.store(serialized, ref.binary(), self.node_id, self.worker_id, ref.contained or ())
        ref.size, ref.node, ref.local = serialized.flat_size, self.node_id, True
        ref.state = STORED
        return ref

    def store(
        self, value: Serialized, object_id: bytes, home: bytes, owner: bytes, refs: Sequence[ObjectRef[Any]]
    ) -> None:
        """Copy a value into this node's store and seal it. By a user's thread.

        Raises:
            ObjectStoreFullError: no room, and none to be had.
        """
        self.check_open()
        self.check_may_block()
        room = _Room(self, value.flat_size)
        try:
            offset = room.wait()
            arena = self.arena
            arena.populate(offset, room.size)
            value.write_into(arena.view(offset, room.size))
            self.reactor.call_soon(room.seal, object_id, home, owner, refs)
        except BaseException:
            self.reactor.call_soon(room.leave)
            raise


class _Room:
    """Bytes of the store on their way to be an object. Whatever interrupts its thread, what is not sealed goes back."""

    __slots__ = ("_answer", "_left", "_offset", "_runtime", "_sealed", "size")

    def __init__(self, runtime: References, size: int) -> None:
        self.size = size
        self._runtime = runtime
        self._answer = Answer()
        self._offset = -1
        self._sealed = self._left = False

    def wait(self) -> int:
        """The offset. By the thread that writes."""
        runtime = self._runtime
        reply = runtime.have_answered(self._answer, self._ask)
        if not isinstance(reply, Failed):
            return self._offset
        if reply.kind == "store_full":
            raise exceptions.ObjectStoreFullError(reply.text)
        raise exceptions.LocalAgentDiedError(runtime.closed or reply.text)

    def _ask(self) -> None:
        self._runtime.agent.request(Allocate(size=self.size), self._answered)

    def _answered(self, reply: Reply) -> None:
        if isinstance(reply, Allocated):
            self._offset = reply.offset
            if self._left:
                self._give_back()
        self._answer.set(reply)

    def seal(self, object_id: bytes, home: bytes, owner: bytes, refs: Sequence[ObjectRef[Any]]) -> None:
        self._sealed = True
        runtime = self._runtime
        runtime.agent.send(Seal(object_id, self._offset, self.size, home, owner, runtime.name_all(refs)))

    def leave(self) -> None:
        self._left = True
        if self._offset >= 0 and not self._sealed:
            self._give_back()

    def _give_back(self) -> None:
        self._runtime.agent.send(Release(self._offset, self.size))


def foreign(ref: ObjectRef[Any]) -> exceptions.ObjectLostError:
    """What to say of a reference that another runtime made, whose objects this one cannot reach."""
    made = "by this process before it left that cluster, or by the process that this one was forked from"
    return exceptions.ObjectLostError(f"{ref!r} was made {made}")


def error_state(error: BaseException) -> ObjectState:
    """What an object is that failed with `error`."""
    return ObjectState(ERROR, serialize(error).flatten())
