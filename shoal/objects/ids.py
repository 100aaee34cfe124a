"""Identifiers: plain `bytes` with a name for the type checker, laid out so that one id tells its parents.

    JobId     4   counter given by control
    ActorId  16   JobId + 12 random bytes
    TaskId   24   JobId + first 12 bytes of the submitting process's WorkerId + its 8-byte counter
    ObjectId 28   TaskId + 4-byte index: 0 for a `put`, 1..n for the returns of a task
    NodeId, WorkerId, FunctionId  28

A task's counter is unique within the process that submitted it, so two processes that already know
each other name a task by its counter alone.
"""

from __future__ import annotations

import hashlib
import os
from typing import NewType

JobId = NewType("JobId", bytes)
ActorId = NewType("ActorId", bytes)
TaskId = NewType("TaskId", bytes)
ObjectId = NewType("ObjectId", bytes)
NodeId = NewType("NodeId", bytes)
WorkerId = NewType("WorkerId", bytes)
FunctionId = NewType("FunctionId", bytes)

JOB_BYTES, ACTOR_BYTES, TASK_BYTES, OBJECT_BYTES, UNIQUE_BYTES = 4, 16, 24, 28, 28
PROCESS_BYTES = 12
NIL_JOB = JobId(bytes(JOB_BYTES))


def new_node_id() -> NodeId:
    return NodeId(os.urandom(UNIQUE_BYTES))


def new_worker_id() -> WorkerId:
    return WorkerId(os.urandom(UNIQUE_BYTES))


def new_actor_id(job: JobId) -> ActorId:
    return ActorId(job + os.urandom(ACTOR_BYTES - JOB_BYTES))


def task_prefix(job: bytes, worker: bytes) -> bytes:
    """The first 16 bytes shared by every task and object id that one process makes."""
    return job + worker[:PROCESS_BYTES]


def process_of(object_id: bytes) -> bytes:
    """The first 12 bytes of the WorkerId of the process that made the object's id, its owner."""
    return object_id[JOB_BYTES : JOB_BYTES + PROCESS_BYTES]


def counter_of(object_id: bytes) -> int:
    """What its owner called the task, or the `put`, that made the object."""
    return int.from_bytes(object_id[TASK_BYTES - 8 : TASK_BYTES], "little")


def make_task_id(prefix: bytes, counter: int) -> TaskId:
    return TaskId(prefix + counter.to_bytes(8, "little"))


def make_object_id(prefix: bytes, counter: int, index: int) -> ObjectId:
    return ObjectId(prefix + counter.to_bytes(8, "little") + index.to_bytes(4, "little"))


def task_of_object(object_id: ObjectId) -> TaskId:
    return TaskId(object_id[:TASK_BYTES])


def job_of(any_id: ActorId | TaskId | ObjectId) -> JobId:
    return JobId(any_id[:JOB_BYTES])


def function_id(blob: bytes) -> FunctionId:
    """Content address of a pickled function or class: equal code is shipped once."""
    return FunctionId(hashlib.blake2b(blob, digest_size=UNIQUE_BYTES).digest())


def actor_object_id(actor_id: ActorId) -> ObjectId:
    """The pseudo-object whose references are the handles of an actor: counting one counts the other."""
    return ObjectId(actor_id + b"\xff" * (OBJECT_BYTES - ACTOR_BYTES))


def actor_of_object(object_id: ObjectId) -> ActorId | None:
    """The actor that `object_id` stands for, or None for an ordinary object."""
    if object_id[ACTOR_BYTES:] == b"\xff" * (OBJECT_BYTES - ACTOR_BYTES):
        return ActorId(object_id[:ACTOR_BYTES])
    return None
