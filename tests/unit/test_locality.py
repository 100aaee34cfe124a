from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.scheduling.locality import WORTH_BYTES, best_place, near
from shoal.scheduling.views import Strategy

MIB = 1 << 20
HERE, A, B = b"here", b"a", b"b"


@pytest.mark.parametrize(
    ("stored", "place"),
    [
        ([], None),
        ([(MIB, [])], None),
        ([(MIB - 1, [A])], None),
        ([(MIB, [A])], A),
        ([(5 * MIB, [A, HERE])], None),
        ([(5 * MIB, [A]), (9 * MIB // 2, [HERE])], None),
        ([(5 * MIB, [A]), (3 * MIB, [B]), (3 * MIB, [B])], B),
        ([(5 * MIB, [A, B]), (MIB, [B])], B),
    ],
)
def test_where_most_bytes_are(stored: list[tuple[int, list[bytes]]], place: bytes | None) -> None:
    assert best_place(stored, HERE) == place


@given(st.lists(st.tuples(st.integers(0, 10 * MIB), st.lists(st.sampled_from([HERE, A, B]), unique=True))))
def test_nowhere_are_more_bytes_than_there(stored: list[tuple[int, Sequence[bytes]]]) -> None:
    def held(node: bytes) -> int:
        return sum(size for size, nodes in stored if node in nodes)

    place = best_place(stored, HERE)
    most = max(held(node) for node in (HERE, A, B))
    assert held(place or HERE) >= most - (WORTH_BYTES if place is None else 0)
    assert place != HERE


def test_labels_still_hold() -> None:
    wants = near(Strategy(labels={"zone": "eu"}), A)
    assert wants == Strategy("node", A, True, {"zone": "eu"}, when_busy="spill")
