"""What the lease scheduler decides, as values for the shell that carries it out."""

from __future__ import annotations

import msgspec

from shoal.node.messages import LeaseSpec
from shoal.scheduling.views import WaitReason


class Grant(msgspec.Struct, frozen=True):
    """The lease holds its resources from now on. `devices`: resource name -> device numbers."""

    owner: bytes
    class_id: int
    lease_id: int
    spec: LeaseSpec
    devices: dict[str, list[int]]


class Redirect(msgspec.Struct, frozen=True):
    """`count` leases of the class should be asked for at `node_id`; they no longer count in the demand here."""

    owner: bytes
    class_id: int
    count: int
    node_id: bytes


class Wait(msgspec.Struct, frozen=True):
    """Why the rest of the demand is not met; only when that changed. `granted`: leases that the class has."""

    owner: bytes
    class_id: int
    reason: WaitReason
    granted: int = 0


class Reclaim(msgspec.Struct, frozen=True):
    """Others wait for what this owner's leases hold: it should return those for work of no more than `priority`."""

    owner: bytes
    priority: int


Decision = Grant | Redirect | Wait | Reclaim
