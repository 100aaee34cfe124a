"""What an operator may choose about control, read once at start and passed down."""

from __future__ import annotations

import platform

import msgspec

from shoal.version import __version__


class ControlSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds, sizes in bytes. Every limit says what it protects.

    Attributes:
        version: of shoal, as agents must match it in major.minor.
        python: of this interpreter, as agents must match it in major.minor: pickled code does not travel further.
        node_timeout_s: a node that says nothing for so long is dead.
        coalesce_s: availability changes of all nodes travel at most this often.
        coalesce_per_node_s: added per node, since each change is told to every node: the traffic is quadratic.
        recheck_s: reasons of everything that waits are worked out anew at most this often.
        notice_after_s: a driver hears of an actor or placement group that waits for so long.
        notice_again_s: first interval of repeats while an actor is infeasible; doubles each time.
        notice_most_s: longest interval of repeats.
        quick_fall_s: an actor that ends sooner after its start is in a crash loop; the fourth such start waits.
        grace_s: for calls that an actor has accepted when its last handle goes away.
        max_dead_nodes, max_ended_jobs, max_dead_actors: remembered for people who ask; the oldest leave.
        max_dead_bytes: of the errors and causes that dead actors keep.
        max_actors: that are not dead; more than an operating system will bear, but not more than memory does.
        max_groups: placement groups that are not removed; max_removed_groups: remembered for people who ask.
        max_value_bytes: of one value in the key-value store; about half of what one frame carries.
        max_store_bytes: of all keys and values.
        max_series: of users' metrics; each costs about 1 KB.
    """

    version: str = __version__
    python: str = platform.python_version()
    node_timeout_s: float = 10.0
    coalesce_s: float = 0.05
    coalesce_per_node_s: float = 0.001
    recheck_s: float = 0.25
    notice_after_s: float = 5.0
    notice_again_s: float = 30.0
    notice_most_s: float = 600.0
    quick_fall_s: float = 1.0
    grace_s: float = 30.0
    max_dead_nodes: int = 1_000
    max_ended_jobs: int = 1_000
    max_dead_actors: int = 10_000
    max_dead_bytes: int = 64 << 20
    max_actors: int = 500_000
    max_groups: int = 100_000
    max_removed_groups: int = 1_000
    max_value_bytes: int = 512 << 20
    max_store_bytes: int = 4 << 30
    max_series: int = 20_000
