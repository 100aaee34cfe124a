"""The handle of a placement group: resources set aside on one or many nodes, for tasks and actors to run in.

Making, removing and finding groups is in `shoal.util.placement_group`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, Self

from shoal.exceptions import GetTimeoutError, ShoalSystemError
from shoal.objects.ids import JOB_BYTES
from shoal.objects.serialization import serialize
from shoal.runtime import slot
from shoal.runtime.object_ref import ObjectRef
from shoal.scheduling.resources import describe, fits, to_amounts, to_floats
from shoal.scheduling.views import Amounts

if TYPE_CHECKING:
    from shoal.runtime.interface import Runtime

GROUP_BYTES: Final = 18


class PlacementGroupID(bytes):
    """18 bytes: the id of the job that made the group, and chance."""

    __slots__ = ()

    SIZE: Final = GROUP_BYTES

    @classmethod
    def from_binary(cls, binary: bytes) -> Self:
        return cls(binary)

    @classmethod
    def from_hex(cls, hex_id: str) -> Self:
        return cls(bytes.fromhex(hex_id))

    @classmethod
    def from_random(cls) -> Self:
        return cls(os.urandom(GROUP_BYTES))

    @classmethod
    def of(cls, job_id: bytes) -> Self:
        """A new one."""
        return cls(job_id + os.urandom(GROUP_BYTES - JOB_BYTES))

    @classmethod
    def nil(cls) -> Self:
        return cls(b"\xff" * GROUP_BYTES)

    @classmethod
    def size(cls) -> int:
        return GROUP_BYTES

    def is_nil(self) -> bool:
        return self == b"\xff" * GROUP_BYTES

    def binary(self) -> bytes:
        return bytes(self)

    def __repr__(self) -> str:
        return f"PlacementGroupID({self.hex()})"


class PlacementGroup:
    """A handle to a placement group. Handles do not keep a group: it ends with its job, or when it is removed.

    Picklable; equal and hashable by id.
    """

    __slots__ = ("_bundles", "id")

    def __init__(self, id: PlacementGroupID, bundle_cache: list[dict[str, float]] | None = None) -> None:
        """`bundle_cache`: the bundles, if they are known; else they are asked for when needed."""
        self.id = id
        self._bundles = bundle_cache

    @staticmethod
    def empty() -> PlacementGroup:
        """A handle to no group."""
        return PlacementGroup(PlacementGroupID.nil())

    @property
    def is_empty(self) -> bool:
        return self.id.is_nil()

    @property
    def bundle_specs(self) -> list[dict[str, float]]:
        """What each bundle has.

        Raises:
            ValueError: the group does not exist, and it is too long ago that it did.
        """
        if self._bundles is None:
            if self.is_empty:
                return []
            info = _runtime().groups.find(bytes(self.id))
            self._bundles = [to_floats(bundle) for bundle in info.spec.bundles]
        return [dict(bundle) for bundle in self._bundles]

    @property
    def bundle_count(self) -> int:
        return len(self.bundle_specs)

    @property
    def known_bundle_count(self) -> int | None:
        """None: it would have to be asked for."""
        return None if self._bundles is None else len(self._bundles)

    def ready(self) -> ObjectRef[PlacementGroup]:
        """A reference that is ready when all bundles have their places; its value is this group.

        `get` of it raises TaskPlacementGroupRemoved when the group is removed before that.
        """
        ref: ObjectRef[PlacementGroup] = _runtime().groups.ready(bytes(self.id), serialize(self).flatten())
        return ref

    def wait(self, timeout_seconds: float = 30) -> bool:
        """Wait until all bundles have their places; False when they have not after `timeout_seconds`.

        Raises:
            TaskPlacementGroupRemoved: it was removed.
        """
        given: object = timeout_seconds
        if isinstance(given, bool) or not isinstance(given, (int, float)) or given < 0:
            raise ValueError(f"timeout_seconds is 0 or more seconds, not {given!r}")
        runtime = _runtime()
        if runtime.groups.is_created(bytes(self.id)):
            return True
        try:
            runtime.get((self.ready(),), timeout_seconds)
        except GetTimeoutError:
            return False
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlacementGroup) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"PlacementGroup({self.id.hex()})"

    def __reduce__(self) -> tuple[type, tuple[PlacementGroupID, list[dict[str, float]] | None]]:
        return PlacementGroup, (self.id, self._bundles)


def check_fits(group: PlacementGroup, index: int, needs: Amounts) -> None:
    """Raises ValueError: no bundle (or not the one that is named) could ever hold `needs`.

    Bundles that would have to be asked for are not looked at: who does not fit waits, with that reason.
    """
    if group.known_bundle_count is None:
        return
    bundles = [to_amounts(bundle) for bundle in group.bundle_specs]
    chosen = bundles if index < 0 else [bundles[index]]
    if not any(fits(needs, bundle) for bundle in chosen):
        which = f"bundle {index}" if index >= 0 else "any bundle"
        raise ValueError(
            f"{describe(needs)} does not fit into {which} of {group!r}, which has {group.bundle_specs}; "
            "ask for less, or make larger bundles"
        )


def _runtime() -> Runtime:
    if slot.current is None:
        raise ShoalSystemError("this process has no cluster (any more); call init() first")
    return slot.current
