"""Names of actors: unique in their namespace among actors that live.

A name is bound when control accepts the actor (not when it starts), so that two creators at once never both win, and it
is free again as soon as the actor is dead or on its way out (its last handle is gone: nobody could have wanted it).
"""

from __future__ import annotations

import random
import uuid

from shoal.objects.ids import ActorId


def anonymous_namespace(rng: random.Random) -> str:
    """That of a driver which named none: nobody else can know it."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def is_anonymous(namespace: str) -> bool:
    """Whether a namespace is one that `anonymous_namespace` made (or looks like it)."""
    try:
        return str(uuid.UUID(namespace)) == namespace
    except ValueError:
        return False


class NameTable:
    def __init__(self) -> None:
        self._actors: dict[tuple[str, str], ActorId] = {}

    def find(self, namespace: str, name: str) -> ActorId | None:
        return self._actors.get((namespace, name))

    def bind(self, namespace: str, name: str, actor_id: ActorId) -> None:
        """Raises KeyError when the name is taken: ask `find` first."""
        if self._actors.setdefault((namespace, name), actor_id) != actor_id:
            raise KeyError(f"{name!r} in namespace {namespace!r}")

    def release(self, namespace: str, name: str, actor_id: ActorId) -> None:
        """Does nothing when the name belongs to somebody else by now."""
        if self._actors.get((namespace, name)) == actor_id:
            del self._actors[namespace, name]

    def namespaces_with(self, name: str) -> list[str]:
        """Where else a name exists: for the message to somebody who looked in the wrong place."""
        return sorted(space for space, bound in self._actors if bound == name)

    def actors(self) -> list[ActorId]:
        return list(self._actors.values())

    def __len__(self) -> int:
        return len(self._actors)
