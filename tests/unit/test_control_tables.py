"""The small tables: keys, names, jobs, processes, nodes, and what is remembered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.control.jobs import JobTable
from shoal.control.keys import ENTRY_OVERHEAD_BYTES, KeyLimitError, KeyStore
from shoal.control.messages import FUNCTIONS, JobInfo, NodeInfo, NodeReport
from shoal.control.names import NameTable
from shoal.control.nodes import NodeTable
from shoal.control.processes import Origin, ProcessTable
from shoal.control.remembered import Remembered
from shoal.objects.ids import ActorId, JobId

A, B = ActorId(b"a" * 16), ActorId(b"b" * 16)
J1, J2 = JobId(b"0001"), JobId(b"0002")
NO_JOB = JobId(b"")


# ------------------------------------------------------------------------------------------------------------ keys


def test_put_get_list_delete() -> None:
    keys = KeyStore(1000, 100_000)
    assert not keys.put("a", b"k1", b"v1", overwrite=True, job_id=NO_JOB)
    assert keys.put("a", b"k1", b"v2", overwrite=False, job_id=NO_JOB)
    assert keys.find("a", b"k1") == b"v1"
    assert keys.put("a", b"k1", b"v3", overwrite=True, job_id=NO_JOB)
    assert keys.find("a", b"k1") == b"v3"
    assert keys.find("b", b"k1") is None
    keys.put("a", b"k0", b"", overwrite=True, job_id=NO_JOB)
    keys.put("a", b"x", b"", overwrite=True, job_id=NO_JOB)
    assert keys.list_keys("a", b"k") == [b"k0", b"k1"]
    assert keys.delete_prefix("a", b"k") == 2
    assert keys.delete("a", b"k0") == 0
    assert keys.list_keys("a", b"") == [b"x"]
    keys.check_invariants()


def test_a_value_and_the_sum_are_bounded() -> None:
    keys = KeyStore(100, 1000)
    with pytest.raises(KeyLimitError, match="too large for the key-value store") as too_large:
        keys.put("a", b"k", b"x" * 100, overwrite=True, job_id=NO_JOB)
    assert too_large.value.kind == "too_large"
    for number in range(1000 // (ENTRY_OVERHEAD_BYTES + 2 + 20)):
        keys.put("a", b"%2d" % number, b"x" * 20, overwrite=True, job_id=NO_JOB)
    with pytest.raises(KeyLimitError, match="delete keys that are not needed") as full:
        keys.put("a", b"one more", b"x" * 90, overwrite=True, job_id=NO_JOB)
    assert full.value.kind == "store_full"
    assert keys.put("a", b" 0", b"y" * 20, overwrite=True, job_id=NO_JOB)  # replacing needs no more room
    keys.check_invariants()


def test_code_leaves_with_the_last_job_that_put_it() -> None:
    keys = KeyStore(1000, 100_000)
    for job_id in (J1, J2):
        keys.put(FUNCTIONS, b"shared", b"code", overwrite=False, job_id=job_id)
    keys.put(FUNCTIONS, b"own", b"code", overwrite=True, job_id=J1)
    keys.put("data", b"own", b"stays", overwrite=True, job_id=J1)
    assert keys.forget_code_of(J1) == 1
    assert keys.list_keys(FUNCTIONS, b"") == [b"shared"]
    assert keys.forget_code_of(J1) == 0
    assert keys.forget_code_of(J2) == 1
    assert keys.find("data", b"own") == b"stays"
    keys.check_invariants()


KEY_STEPS = st.tuples(
    st.sampled_from(["put", "delete", "prefix", "forget"]),
    st.sampled_from([FUNCTIONS, "a"]),
    st.sampled_from([b"k", b"k1", b"k2", b"x"]),
    st.sampled_from([J1, J2, NO_JOB]),
    st.booleans(),
)


@given(st.lists(KEY_STEPS, max_size=60))
def test_the_books_agree_whatever_is_put_and_deleted(steps: list[tuple[str, str, bytes, JobId, bool]]) -> None:
    keys = KeyStore(1000, 1000)
    for what, space, key, job_id, overwrite in steps:
        if what == "put":
            try:
                keys.put(space, key, key * 10, overwrite=overwrite, job_id=job_id)
            except KeyLimitError:
                assert keys.size_bytes > 500
        elif what == "delete":
            keys.delete(space, key)
        elif what == "prefix":
            keys.delete_prefix(space, key)
        else:
            keys.forget_code_of(job_id)
        keys.check_invariants()


# ----------------------------------------------------------------------------------------------- names and memories


def test_a_name_is_unique_in_its_namespace() -> None:
    names = NameTable()
    names.bind("n1", "x", A)
    names.bind("n2", "x", B)
    with pytest.raises(KeyError, match="namespace 'n1'"):
        names.bind("n1", "x", B)
    assert (names.find("n1", "x"), names.find("n2", "x"), names.find("n3", "x")) == (A, B, None)
    assert names.namespaces_with("x") == ["n1", "n2"]
    names.release("n1", "x", B)  # not the holder
    assert names.find("n1", "x") == A
    names.release("n1", "x", A)
    assert names.actors() == [B]


def test_the_oldest_is_forgotten_first() -> None:
    memory: Remembered[int, str] = Remembered(3, max_bytes=10)
    for key in (1, 2, 3):
        assert memory.add(key, str(key), 1) == []
    assert memory.add(1, "one", 1) == []  # the newest now
    assert memory.add(4, "4", 1) == ["2"]
    assert memory.add(5, "5", 9) == ["3", "one"]
    assert memory.add(6, "6", 11) == ["4", "5", "6"]
    assert (len(memory), memory.size_bytes, list(memory.values()), memory.find(6)) == (0, 0, [], None)


# ------------------------------------------------------------------------------------------------------------ jobs


def test_jobs_count_from_one_and_get_a_namespace() -> None:
    jobs = JobTable(max_ended=2)
    first = jobs.add(JobInfo(b"", "", b"driver", b""), 1, namespace="fresh", node_id=b"node", unix_s=5.0)
    second = jobs.add(JobInfo(b"", "mine", b"driver", b"else"), 1, namespace="fresh", node_id=b"node", unix_s=6.0)
    assert (first.info.job_id, first.info.namespace, first.info.driver_node) == (b"\0\0\0\1", "fresh", b"node")
    assert (second.info.job_id, second.info.namespace, second.info.driver_node) == (b"\0\0\0\2", "mine", b"else")
    assert first.info.started_unix_s == 5.0
    assert [job.info.job_id[-1] for job in jobs] == [1, 2]
    assert [job.info.job_id[-1] for job in jobs.at(1)] == [1, 2]


def test_an_ended_job_stays_while_an_actor_of_it_lives_and_is_forgotten_later() -> None:
    jobs = JobTable(max_ended=2)
    records = [jobs.add(JobInfo(b"", "n", b"d", b""), 1, namespace="", node_id=b"", unix_s=1.0) for _ in range(4)]
    records[0].actors.add(A)
    for record in records:
        jobs.end(record, 9.0)
        assert jobs.settle(record) is (record is not records[0])
        assert not jobs.settle(record)
    assert [job.info.job_id[-1] for job in jobs] == [1, 3, 4]
    assert jobs.running() == []
    records[0].actors.clear()
    assert jobs.settle(records[0])
    assert [job.info.job_id[-1] for job in jobs] == [1, 4]


# ------------------------------------------------------------------------------------------------------- processes


def test_a_process_that_is_gone_names_what_it_owned_and_watches_nothing() -> None:
    table = ProcessTable()
    worker, other = Origin(1, b"w"), Origin(1, b"o")
    table.own(worker, B)
    table.own(worker, A)
    table.watch(worker, A)
    table.watch(other, A)
    assert table.watchers(A) == [worker, other]
    table.check_invariants()
    assert table.drop(worker) == [A, B]
    assert table.drop(worker) == []
    assert table.watchers(A) == [other]
    table.unwatch(other, A)
    table.unwatch(other, A)
    assert len(table) == 0
    table.check_invariants()


def test_all_processes_of_a_connection_go_with_it() -> None:
    table = ProcessTable()
    table.own(Origin(1, b"w"), A)
    table.own(Origin(1, b""), B)
    table.watch(Origin(2, b"w"), A)
    assert sorted(table.drop_peer(1)) == [A, B]
    assert table.watchers(A) == [Origin(2, b"w")]
    table.forget_actor(A, Origin(1, b"w"))
    assert len(table) == 0
    table.check_invariants()


# ------------------------------------------------------------------------------------------------------------ nodes


def node_info(name: bytes, cpus: int = 4) -> NodeInfo:
    total = {"CPU": cpus * 10_000}
    return NodeInfo(name, "10.0.0.1:1", "host", total, dict(total))


def test_a_booking_is_free_again_when_the_actor_leaves_or_the_node_reports() -> None:
    nodes = NodeTable(max_dead=10)
    node = nodes.add(node_info(b"n1"), peer=1, now=0.0)
    nodes.place(node, A, {"CPU": 10_000})
    nodes.place(node, B, {})
    assert (node.free, node.light) == ({"CPU": 30_000}, 1)
    assert nodes.views[0].available == {"CPU": 30_000}
    assert nodes.leave(node, A, {"CPU": 10_000})
    assert not nodes.leave(node, B, {})
    assert (node.free, node.light) == ({"CPU": 40_000}, 0)
    nodes.place(node, A, {"CPU": 10_000})
    assert nodes.report(node, NodeReport({"CPU": 30_000}, 0, []))  # the agent counts it itself now
    assert node.free == {"CPU": 30_000}
    assert not nodes.leave(node, A, {"CPU": 10_000})
    nodes.check_invariants()


def test_the_last_node_takes_the_index_of_one_that_dies() -> None:
    nodes = NodeTable(max_dead=1)
    records = [nodes.add(node_info(b"n%d" % number), peer=number, now=0.0) for number in range(4)]
    nodes.bury(records[1], "silent")
    nodes.check_invariants()
    nodes.bury(records[3], "closed")
    nodes.check_invariants()
    assert [node.node_id for node in nodes] == [b"n0", b"n2"]
    dead = nodes.find_dead(b"n3")
    assert dead is not None
    assert (dead.alive, dead.death_reason) == (False, "closed")
    assert nodes.find_dead(b"n1") is None  # remembered: one
    assert [info.node_id for info in nodes.infos(dead=True)] == [b"n0", b"n2", b"n3"]
