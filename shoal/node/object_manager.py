"""Objects as the processes of this node meet them: room, sealing, reading, counting; here and across nodes.

The shell around two books: `Directory` (who refers to what, for objects whose home is here) and `Store` (what lies
where in this node's arena). It moves copies, answers waiting processes, and passes on what other homes must know.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

from shoal.exceptions import ShoalError
from shoal.node.directory import Directory, Effects
from shoal.node.messages import (
    LOST,
    PENDING,
    STORED,
    Allocate,
    Allocated,
    AskState,
    BeginUses,
    CancelResolve,
    CopyGone,
    CopyMade,
    DeleteCopy,
    HolderChanged,
    ObjectState,
    Publish,
    ReadStates,
    Release,
    Resolve,
    Resolved,
    Seal,
    StateReply,
    States,
    Unpin,
    Unuse,
)
from shoal.node.peers import Peers
from shoal.node.spill_files import SpilledLostError, SpillFiles, Spot
from shoal.node.spiller import Spiller
from shoal.node.store import Copy, Store, StoreFullError
from shoal.node.transfer import PIECE_BYTES, Puller, Readable, SourceLostError
from shoal.objects.arena import Arena
from shoal.rpc.aio import Connection, ConnectionClosedError
from shoal.rpc.messages import Done, Failed

logger = logging.getLogger(__name__)

TRANSFER: Final = b"transfer"
"""Owner, in the store's books, of room that a pull fills and of pins while a copy is sent."""
MAX_ATTEMPTS: Final = 3
STATES_BYTES: Final = 8 << 20
"""Of the values in one answer to `ReadStates`."""
_NOT_TOLD: Final = ObjectState(PENDING)
NEWS_S: Final = 1.0
"""When a source fails, control is often about to tell that its node died: how long to wait for that and ask again."""


class _Pull:
    """A copy on its way here, and the processes that wait for it: it is pinned for each the moment it is sealed."""

    __slots__ = ("askers", "task")

    def __init__(self) -> None:
        self.askers: list[bytes] = []
        self.task: asyncio.Task[Copy]


class ObjectManager(Effects):
    """See the module. `send(worker_id, message)` reaches a process of this node, if it is still there."""

    def __init__(
        self,
        node_id: bytes,
        arena: Arena,
        capacity: int,
        peers: Peers,
        puller: Puller,
        address_of: Callable[[bytes], str | None],
        alive: Callable[[bytes], bool],
        actor_unreferenced: Callable[[bytes], None],
        spill_files: SpillFiles,
    ) -> None:
        self._node = node_id
        self._arena = arena
        self._peers = peers
        self._puller = puller
        self._address_of = address_of
        self._tell_unreferenced = actor_unreferenced
        self._loop = asyncio.get_running_loop()
        self.directory = Directory(node_id, self, alive, peers.is_gone)
        self.store = Store(capacity, self._evicted, self._forget_spot)
        self.spiller = Spiller(self.store, arena, spill_files)
        self._pulls: dict[bytes, _Pull] = {}
        self._resolves: dict[tuple[bytes, int], Callable[[], object]] = {}  # (process, rid) -> how to withdraw it
        self._telling: dict[bytes, asyncio.Future[Any]] = {}  # first uses that their home has not counted yet
        self._watches = itertools.count()
        self._news: asyncio.Future[None] = self._loop.create_future()  # done when the next node is gone
        peers.on_lost = self._say_again

    # -------------------------------------------------------------------------------------------- room, sealing

    def allocate(self, process: bytes, connection: Connection, message: Allocate) -> None:
        def done(result: int | StoreFullError) -> None:
            if isinstance(result, StoreFullError):
                connection.reply(message, Failed(kind="store_full", text=str(result)))
            else:
                connection.reply(message, Allocated(offset=result))

        self.store.allocate(process, message.size, self._loop.time(), done)
        self.spiller.look()

    def release(self, process: bytes, message: Release) -> None:
        self.store.release(process, message.offset)

    def seal(self, process: bytes, message: Seal) -> None:
        self.store.seal(
            process, message.object_id, message.offset, message.size, message.home, message.owner_id,
            primary=True, contained=message.contained,
        )  # fmt: skip
        self._report_copy(message.object_id, message.home, message.size, message.owner_id, message.contained)
        self.spiller.look()

    def _report_copy(
        self, object_id: bytes, home: bytes, size: int, owner: bytes, contained: list[tuple[bytes, bytes]]
    ) -> None:
        if home == self._node:
            self.directory.copy_made(object_id, self._node, size, owner, contained)
        elif self._peers.is_gone(home):
            self.store.delete(object_id)  # nobody will ever ask for it
        else:
            self._peers.send(home, CopyMade(object_id, size, owner, contained))

    def _evicted(self, object_id: bytes, copy: Copy, why: str) -> None:
        if copy.home == self._node:
            self.directory.copy_gone(object_id, self._node, why)
        else:
            self._peers.send(copy.home, CopyGone(object_id, why))

    def _forget_spot(self, spot: Spot) -> None:
        self.spiller.forget(spot)

    # ------------------------------------------------------------------------------------------------ reading

    def resolve(self, process: bytes, connection: Connection, message: Resolve) -> None:
        copy = self.store.find(message.object_id) if message.fetch else None
        if copy is not None and copy.in_memory:
            self._answer_copy(process, connection, message, copy)
        elif message.fetch:
            self._resolve_in_a_task(process, connection, message)
        elif message.home == self._node:
            self._resolve_here(process, connection, message)
        else:
            self._resolve_there(process, connection, message)

    def cancel_resolve(self, process: bytes, message: CancelResolve) -> None:
        withdraw = self._resolves.pop((process, message.request), None)
        if withdraw is not None:
            withdraw()

    def _resolve_here(self, process: bytes, connection: Connection, message: Resolve) -> None:
        """The state alone, of an object of this home. Without a task: a process may ask for very many at once."""
        watch = (self._node, next(self._watches))
        key = (process, message.rid)
        self._resolves[key] = partial(self.directory.unwatch, message.object_id, watch)

        def answer(state: ObjectState) -> None:
            del self._resolves[key]
            connection.reply(message, Resolved(object_id=message.object_id, state=state))

        self.directory.watch(message.object_id, watch, answer)

    def _resolve_there(self, process: bytes, connection: Connection, message: Resolve) -> None:
        """As `_resolve_here`, for an object of another home."""
        key = (process, message.rid)
        asked = self._peers.start_request(message.home, AskState(object_id=message.object_id))
        self._resolves[key] = asked.cancel

        def answered(done: asyncio.Future[Any]) -> None:
            self._resolves.pop(key, None)
            if done.cancelled():
                return
            if done.exception() is not None:
                self._resolve_in_a_task(process, connection, message)  # which tries again where that makes sense
            else:
                connection.reply(message, Resolved(object_id=message.object_id, state=done.result().state))

        asked.add_done_callback(answered)

    def _resolve_in_a_task(self, process: bytes, connection: Connection, message: Resolve) -> None:
        key = (process, message.rid)
        task = self._loop.create_task(self._resolve(process, connection, message), name="resolve")
        self._resolves[key] = task.cancel
        task.add_done_callback(lambda _: self._resolves.pop(key, None))

    def _answer_copy(self, process: bytes, connection: Connection, message: Resolve, copy: Copy) -> None:
        self.store.pin(message.object_id, process)
        self._answer_pinned(connection, message, copy)

    def _answer_pinned(self, connection: Connection, message: Resolve, copy: Copy) -> None:
        state = ObjectState(STORED, b"", copy.size, [self._node], copy.contained)
        connection.reply(message, Resolved(object_id=message.object_id, state=state, offset=copy.offset))

    async def _resolve(self, process: bytes, connection: Connection, message: Resolve) -> None:
        try:
            for attempt in range(MAX_ATTEMPTS):
                news = self._news
                state = await self.wait_state(message.object_id, message.home)
                if state.state != STORED or not message.fetch:
                    break
                copy = self.store.find(message.object_id)
                if copy is not None and copy.in_memory:
                    self._answer_copy(process, connection, message, copy)
                    return
                try:
                    copy = await self._fetch(process, message.object_id, message.home, state)
                except SpilledLostError:
                    continue  # its home knows, and whether another node has a copy
                except SourceLostError as exc:
                    state = ObjectState(LOST, f"node:{exc}".encode())
                    logger.info("fetch failed object=%s attempt=%s: %s", message.object_id.hex(), attempt, exc)
                    if attempt + 1 < MAX_ATTEMPTS:
                        await asyncio.wait([news], timeout=NEWS_S)
                    continue
                self._answer_pinned(connection, message, copy)
                return
            connection.reply(message, Resolved(object_id=message.object_id, state=state))
        except StoreFullError as exc:
            connection.reply(message, Failed(kind="store_full", text=str(exc)))

    async def wait_state(self, object_id: bytes, home: bytes) -> ObjectState:
        """The object's state once it is known to its home; LOST when the home is gone."""
        if home == self._node:
            future: asyncio.Future[ObjectState] = self._loop.create_future()
            key = (self._node, next(self._watches))
            self.directory.watch(object_id, key, lambda state: None if future.done() else future.set_result(state))
            try:
                return await future
            finally:
                self.directory.unwatch(object_id, key)
        while True:
            try:
                reply: StateReply = await self._peers.request(home, AskState(object_id=object_id))
            except ConnectionClosedError as exc:
                if self._peers.is_gone(home):
                    return _home_gone(home, exc)
                # Else the connection broke, or control has not told of the node's end yet, which ends the next attempt.
            except ShoalError as exc:
                return _home_gone(home, exc)
            else:
                return reply.state

    async def _fetch(self, process: bytes, object_id: bytes, home: bytes, state: ObjectState) -> Copy:
        """Pull a copy, from another node or this node's disk, pinned for `process` when this returns. Several askers
        share one pull."""
        pull = self._pulls.get(object_id)
        if pull is None:
            pull = self._pulls[object_id] = _Pull()
            pull.task = self._loop.create_task(self._bring(pull, object_id, home, state), name="pull")
            pull.task.add_done_callback(lambda task: self._pulled(object_id, task))
        pull.askers.append(process)
        try:
            return await asyncio.shield(pull.task)
        except asyncio.CancelledError:
            if process in pull.askers:
                pull.askers.remove(process)
            else:
                self.store.unpin(object_id, process)  # it came in this very moment
            raise

    def _pulled(self, object_id: bytes, task: asyncio.Task[Copy]) -> None:
        del self._pulls[object_id]
        if not task.cancelled() and task.exception() is not None:
            logger.debug("a pull failed object=%s: %s", object_id.hex(), task.exception())

    async def _bring(self, pull: _Pull, object_id: bytes, home: bytes, state: ObjectState) -> Copy:
        if self.store.find(object_id) is not None:
            copy = await self.spiller.restore(object_id, pull.askers)
            if copy is not None:
                return copy
        return await self._pull(pull, object_id, home, state)

    async def _pull(self, pull: _Pull, object_id: bytes, home: bytes, state: ObjectState) -> Copy:
        nodes = [node for node in state.nodes if node != self._node and self._address_of(node) is not None]
        names = " and ".join(node.hex()[:12] for node in nodes or state.nodes)
        if not nodes:
            raise SourceLostError(f"node {names}, which had a copy, is gone")
        random.shuffle(nodes)  # many may want it at once: each that has it serves its share
        sources = [address for node in nodes if (address := self._address_of(node)) is not None]
        offset = await self.spiller.room(TRANSFER, state.size)
        try:
            await self._puller.pull(object_id, self._arena.view(offset, state.size), sources)
        except SourceLostError as exc:
            self.store.release(TRANSFER, offset)
            raise SourceLostError(f"it could not be fetched from node {names}: {exc}") from exc
        except BaseException:
            self.store.release(TRANSFER, offset)
            raise
        copy = self.store.seal(
            TRANSFER, object_id, offset, state.size, home, b"", primary=False, contained=state.contained
        )
        askers, pull.askers = pull.askers, []
        for process in askers:
            self.store.pin(object_id, process)
        logger.debug("pulled object=%s bytes=%s", object_id.hex(), state.size)
        self._report_copy(object_id, home, state.size, b"", state.contained)
        return copy

    def unpin(self, process: bytes, message: Unpin) -> None:
        for object_id in message.object_ids:
            self.store.unpin(object_id, process)
        self.spiller.look()

    def pin_for_transfer(self, object_id: bytes) -> Readable | None:
        """A copy on disk is sent from there: it takes no room here."""
        copy = self.store.find(object_id)
        if copy is None:
            return None
        self.store.pin(object_id, TRANSFER)
        if not copy.in_memory:
            return Readable(copy.size, partial(self.spiller.pieces, copy.spot))
        return Readable(copy.size, partial(self._pieces, self._arena.view(copy.offset, copy.size)))

    @staticmethod
    def _pieces(view: memoryview, start: int, length: int) -> Iterator[memoryview]:
        for at in range(start, start + length, PIECE_BYTES):
            yield view[at : min(at + PIECE_BYTES, start + length)]

    def unpin_from_transfer(self, object_id: bytes) -> None:
        self.store.unpin(object_id, TRANSFER)

    # ------------------------------------------------------------------------------------------------ counting

    def publish(self, process: bytes, message: Publish) -> None:
        self.directory.publish(message.object_id, process, message.state)

    def begin_uses(self, process: bytes, connection: Connection, message: BeginUses) -> None:
        telling = []
        for object_id, home in message.objects:
            self.directory.use(object_id, home, process)
            if self._telling and object_id in self._telling:
                telling.append(self._telling[object_id])
        left = len(telling)

        def told(_: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                connection.reply(message, Done())

        for future in telling:
            future.add_done_callback(told)
        if not telling:
            connection.reply(message, Done())

    def read_states(self, connection: Connection, message: ReadStates) -> None:
        states = []
        size = 0
        for object_id in message.object_ids:
            state = self.directory.find_state(object_id)
            size += len(state.payload) if state is not None else 0
            states.append(state if state is not None and size <= STATES_BYTES else _NOT_TOLD)
        connection.reply(message, States(states=states))

    def unuse(self, process: bytes, message: Unuse) -> None:
        for object_id, home in message.objects:
            self.directory.unuse(object_id, home, process)

    def process_gone(self, process: bytes) -> None:
        for key in [key for key in self._resolves if key[0] == process]:
            self._resolves.pop(key)()
        self.store.process_gone(process)
        self.directory.process_gone(process)
        self.spiller.look()

    def tick(self) -> None:
        """About every second: tell those who waited for room too long, unless room is being made."""
        now = self._loop.time()
        if self.spiller.makes_progress:
            self.store.be_patient(now)
        self.store.expire(now)
        self.spiller.look()

    def node_gone(self, node_id: bytes) -> None:
        self.directory.node_gone(node_id)
        self._news.set_result(None)
        self._news = self._loop.create_future()
        for object_id in self.store.copies_of_home(node_id):
            self.store.delete(object_id)

    def _say_again(self, node_id: bytes) -> None:
        """The connection to another home broke. If that node is dead, this goes nowhere; else it must not forget us."""
        for object_id in self.directory.uses_of_home(node_id):
            self.tell_home(node_id, object_id, True)
        for object_id in self.store.copies_of_home(node_id):
            copy = self.store.find(object_id)
            if copy is not None:
                self._report_copy(object_id, node_id, copy.size, copy.owner, copy.contained)

    # ---------------------------------------------------------------------------------- effects of the directory

    def delete_copy(self, node_id: bytes, object_id: bytes) -> None:
        if node_id == self._node:
            self.store.delete(object_id)
        else:
            self._peers.send(node_id, DeleteCopy(object_id))

    def tell_home(self, home: bytes, object_id: bytes, holds: bool) -> None:
        if not holds:
            self._peers.send(home, HolderChanged(object_id=object_id, holds=False))
            return
        telling = self._peers.start_request(home, HolderChanged(object_id=object_id, holds=True))
        self._telling[object_id] = telling
        telling.add_done_callback(partial(self._told, home, object_id))

    def _told(self, home: bytes, object_id: bytes, telling: asyncio.Future[Any]) -> None:
        if self._telling.get(object_id) is telling:
            del self._telling[object_id]
        if not telling.cancelled() and (exc := telling.exception()) is not None:
            logger.info("cannot count a use at home=%s object=%s: %s", home.hex()[:12], object_id.hex(), exc)

    def actor_unreferenced(self, actor_id: bytes) -> None:
        self._tell_unreferenced(actor_id)

    # ------------------------------------------------------------------------------------------ other agents

    def from_agent(self, node_id: bytes, connection: Connection, message: Any) -> None:
        """A message of another agent."""
        if self._peers.is_gone(node_id):
            return  # said before its end: all that it had or used is written off
        match message:
            case HolderChanged():
                self.directory.holder_changed(message.object_id, node_id, message.holds)
                connection.reply(message, Done())
            case CopyMade():
                self.directory.copy_made(message.object_id, node_id, message.size, message.owner_id, message.contained)
            case CopyGone():
                self.directory.copy_gone(message.object_id, node_id, message.why)
            case DeleteCopy():
                self.store.delete(message.object_id)
            case AskState():
                answer = partial(self._answer_state, connection, message)
                self.directory.watch(message.object_id, (node_id, message.rid), answer)
            case _:
                logger.warning("unexpected message of an agent: %s", type(message).__name__)

    def _answer_state(self, connection: Connection, message: AskState, state: ObjectState) -> None:
        connection.reply(message, StateReply(state=state))


def _home_gone(home: bytes, exc: ShoalError) -> ObjectState:
    return ObjectState(LOST, f"node:its home node {home.hex()[:12]} is gone: {exc}".encode())
