"""What control must undo or stop telling when a process is gone: the actors that it owns and those that it watches.

A process is named by its origin: the connection it speaks through and its worker id (b"" for a tool, which has the
connection for itself). Only processes that own or watch something are kept, so the table is as large as that.
"""

from __future__ import annotations

from typing import NamedTuple

from shoal.objects.ids import ActorId


class Origin(NamedTuple):
    peer: int
    worker_id: bytes


class _Process:
    __slots__ = ("owned", "watched")

    def __init__(self) -> None:
        self.owned: set[ActorId] = set()
        self.watched: set[ActorId] = set()


class ProcessTable:
    def __init__(self) -> None:
        self._peers: dict[int, dict[Origin, _Process]] = {}
        self._watchers: dict[ActorId, dict[Origin, None]] = {}

    def own(self, origin: Origin, actor_id: ActorId) -> None:
        self._open(origin).owned.add(actor_id)

    def watch(self, origin: Origin, actor_id: ActorId) -> None:
        self._open(origin).watched.add(actor_id)
        self._watchers.setdefault(actor_id, {})[origin] = None

    def unwatch(self, origin: Origin, actor_id: ActorId) -> None:
        process = self._peers.get(origin.peer, {}).get(origin)
        if process is not None and actor_id in process.watched:
            process.watched.discard(actor_id)
            self._drop_watcher(origin, actor_id)
            self._tidy(origin, process)

    def watchers(self, actor_id: ActorId) -> list[Origin]:
        """In the order in which they began to watch."""
        return list(self._watchers.get(actor_id, ()))

    def forget_actor(self, actor_id: ActorId, owner: Origin) -> None:
        """It is dead: nothing more will be told about it, and nobody owns it."""
        for origin in self._watchers.pop(actor_id, ()):
            watcher = self._peers[origin.peer][origin]
            watcher.watched.discard(actor_id)
            self._tidy(origin, watcher)
        process = self._peers.get(owner.peer, {}).get(owner)
        if process is not None:
            process.owned.discard(actor_id)
            self._tidy(owner, process)

    def drop(self, origin: Origin) -> list[ActorId]:
        """The process is gone. Returns the actors that it owned, in order of their ids."""
        processes = self._peers.get(origin.peer, {})
        process = processes.pop(origin, None)
        if process is None:
            return []
        if not processes:
            del self._peers[origin.peer]
        for actor_id in process.watched:
            self._drop_watcher(origin, actor_id)
        return sorted(process.owned)

    def drop_peer(self, peer: int) -> list[ActorId]:
        """All processes behind this connection are gone. Returns the actors that they owned."""
        return [actor_id for origin in list(self._peers.get(peer, ())) for actor_id in self.drop(origin)]

    def _open(self, origin: Origin) -> _Process:
        processes = self._peers.setdefault(origin.peer, {})
        process = processes.get(origin)
        if process is None:
            process = processes[origin] = _Process()
        return process

    def _drop_watcher(self, origin: Origin, actor_id: ActorId) -> None:
        watchers = self._watchers[actor_id]
        del watchers[origin]
        if not watchers:
            del self._watchers[actor_id]

    def _tidy(self, origin: Origin, process: _Process) -> None:
        if not process.owned and not process.watched:
            processes = self._peers[origin.peer]
            del processes[origin]
            if not processes:
                del self._peers[origin.peer]

    def __len__(self) -> int:
        return sum(map(len, self._peers.values()))

    def check_invariants(self) -> None:
        pairs = {(a, o) for ps in self._peers.values() for o, p in ps.items() for a in p.watched}
        assert pairs == {(actor_id, origin) for actor_id, origins in self._watchers.items() for origin in origins}
        for peer, processes in self._peers.items():
            assert processes
            for origin, process in processes.items():
                assert origin.peer == peer
                assert process.owned or process.watched
