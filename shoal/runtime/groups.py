"""Placement groups as this process knows them: making and removing them, and waiting until they have their places.

Control owns a group's life and tells who watches it. Who creates a group watches it, and so does who uses it: its tasks
here must end when it is removed, and with a better word than that their worker is gone.

A group without a name is created and removed without waiting for control: its id is made here, and what this process
says arrives in order. `ready()` is an object of this process's own, which nobody computes: control's news settles it.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any, Final

from shoal import exceptions
from shoal.control import messages as control
from shoal.control.messages import GroupChanged, GroupInfo, GroupSpec
from shoal.rpc.messages import Failed
from shoal.runtime.object_ref import ObjectRef
from shoal.runtime.task_run import Bound, TaskRun

if TYPE_CHECKING:
    from shoal.runtime.core import CoreRuntime

MAX_REMOVED: Final = 10_000
"""Removed groups that are remembered here; the oldest leave. Control remembers them too."""


class GroupManager:
    """See the module. State belongs to the reactor's thread; users' threads ask through the methods that say so.

    Attributes:
        owner_actor: the detached actor that this process is: groups that it makes end with it. Else b"".
    """

    def __init__(self, runtime: CoreRuntime) -> None:
        self._runtime = runtime
        self.owner_actor = b""
        self._news: dict[bytes, GroupChanged] = {}  # of watched groups that exist; a state of "" until control says one
        self._removed: collections.OrderedDict[bytes, str] = collections.OrderedDict()
        self._waiting: dict[bytes, dict[TaskRun, bytes]] = {}  # group -> what `ready()` returned -> its value
        self._group_of: dict[TaskRun, bytes] = {}
        self._ready = Bound(runtime, "PlacementGroup.ready", "PlacementGroup.ready", 1)

    # --------------------------------------------------------------------------------------- what users' threads ask

    def create(self, spec: GroupSpec) -> None:
        """Raises ValueError: the name is taken. ShoalSystemError: control said no."""
        runtime = self._runtime
        runtime.check_open()
        if not spec.name:
            runtime.reactor.call_soon(self._create, spec)
            return
        runtime.reactor.call_soon(self._follow, spec.group_id)
        reply = runtime.try_control(control.CreateGroup(spec=spec))
        if isinstance(reply, Failed):
            if reply.kind == "name_taken":
                raise ValueError(reply.text)
            raise exceptions.ShoalSystemError(f"cannot create the placement group {spec.name!r}: {reply.text}")

    def remove(self, group_id: bytes) -> None:
        """Does not wait. Tasks of this process in it fail at once, others when their owners and agents hear of it."""
        self._runtime.check_open()
        self._runtime.reactor.call_soon(self._remove, group_id)

    def find(self, group_id: bytes, name: str = "", namespace: str | None = None) -> GroupInfo:
        """By id, or by name in a namespace (None: this job's). Raises ValueError: there is none."""
        space = self._runtime.job.namespace if namespace is None else namespace
        reply = self._runtime.try_control(control.FindGroup(group_id=group_id, name=name, namespace=space))
        if isinstance(reply, Failed):
            raise ValueError(reply.text)
        info: GroupInfo = reply.group
        return info

    def all(self) -> list[GroupInfo]:
        groups: list[GroupInfo] = self._runtime.ask_control(control.ListGroups()).groups
        return groups

    def is_created(self, group_id: bytes) -> bool:
        """As far as is known here."""
        news = self._news.get(group_id)
        return news is not None and news.state == "CREATED"

    def ready(self, group_id: bytes, value: bytes) -> ObjectRef[Any]:
        """A reference that gets `value` (flat) when all bundles have their places, or an error if that will not be."""
        ref = self._runtime.new_promise(self._ready, self)
        self._runtime.reactor.call_soon(self._await, group_id, ref.task, value)
        return ref

    # ------------------------------------------------------------------------------------------ the reactor's thread

    def _create(self, spec: GroupSpec) -> None:
        self._follow(spec.group_id)
        self._runtime.tell_control(control.CreateGroup(spec=spec))

    def _remove(self, group_id: bytes) -> None:
        self._runtime.tell_control(control.RemoveGroup(group_id=group_id))
        self.heard(GroupChanged(group_id, "REMOVED", "it was removed with remove_placement_group()"))

    def _follow(self, group_id: bytes) -> None:
        """Control tells of this group from now on."""
        self._news.setdefault(group_id, GroupChanged(group_id, ""))

    def watch(self, group_id: bytes) -> str:
        """This process uses the group. Returns why it is gone, if it is."""
        gone = self._removed.get(group_id, "")
        if not gone and group_id not in self._news:
            self._follow(group_id)
            self._runtime.tell_control(control.WatchGroup(group_id))
        return gone

    def _await(self, group_id: bytes, run: TaskRun, value: bytes) -> None:
        gone = self.watch(group_id)
        if gone:
            self._runtime.fail_with(run, exceptions.TaskPlacementGroupRemoved(gone))
        elif self._news[group_id].state == "CREATED":
            self._runtime.finish_inline(run, value)
        else:
            self._waiting.setdefault(group_id, {})[run] = value
            self._group_of[run] = group_id

    def heard(self, news: GroupChanged) -> None:
        """Control's news of a group."""
        group_id = news.group_id
        if group_id in self._removed:
            return  # by this process, and what control says was on its way
        if news.state == "REMOVED":
            self._news.pop(group_id, None)
            self._removed[group_id] = news.text
            if len(self._removed) > MAX_REMOVED:
                self._removed.popitem(last=False)
            self._runtime.tasks.group_removed(group_id, news.text)
        else:
            self._news[group_id] = news
        if news.state in ("CREATED", "REMOVED"):
            for run, value in self._waiting.pop(group_id, {}).items():
                self._group_of.pop(run, None)
                if news.state == "CREATED":
                    self._runtime.finish_inline(run, value)
                else:
                    self._runtime.fail_with(run, exceptions.TaskPlacementGroupRemoved(news.text))

    # What a run asks of its client: here, what `ready()` returned.

    pending: Final = None  # their number is not limited

    def why(self, run: TaskRun) -> str:
        news = self._news.get(self._group_of.get(run, b""))
        group = f"placement group {news.group_id.hex()[:12]}" if news is not None else "the placement group"
        return f"{group} has no place yet" + (f": {news.text}" if news is not None and news.text else "")

    def withdraw(self, run: TaskRun) -> None:
        """Nobody waits for it any more."""
        group_id = self._group_of.pop(run, b"")
        self._waiting.get(group_id, {}).pop(run, None)
