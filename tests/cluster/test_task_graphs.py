"""Random graphs of tasks give what a sequential interpreter gives, also where some fail, some are tried again, and some
are cancelled while they wait, run or end.

A cancelled task may have been done already, so that nobody can foretell its outcome. The interpreter therefore goes
through the graph in order and computes each node from the outcomes that its inputs turned out to have.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shoal
from shoal.exceptions import TaskCancelledError

pytestmark = pytest.mark.usefixtures("local")

LIMIT_S = 60.0
CANCELLED = ("cancelled",)


class Boom(Exception):
    pass


Kind = Literal["sum", "two", "fail", "flaky", "nested", "fan", "slow"]
Outcome = tuple[Any, ...]


@dataclass(frozen=True)
class Node:
    """`inputs`: (index of an earlier node, whether it is passed inside a list, where only `get` finds it)."""

    kind: Kind
    inputs: tuple[tuple[int, bool], ...]
    cancel: tuple[int, ...]  # earlier nodes, or this one, that are cancelled when this one has been submitted


@st.composite
def graphs(draw: st.DrawFn) -> list[Node]:
    nodes: list[Node] = []
    kinds: list[Kind] = ["sum", "sum", "two", "fail", "flaky", "nested", "fan", "slow"]
    for index in range(draw(st.integers(1, 14))):
        earlier = st.integers(0, index - 1)
        inputs = draw(st.lists(st.tuples(earlier, st.booleans()), max_size=4)) if index else []
        cancel = draw(st.lists(st.integers(0, index), max_size=2)) if draw(st.integers(0, 4)) == 0 else []
        nodes.append(Node(draw(st.sampled_from(kinds)), tuple(inputs), tuple(cancel)))
    return nodes


# ------------------------------------------------------------------------------------------------------------- to run


def work(kind: Kind, number: int, values: list[int], folder: str) -> Any:
    """What a node computes from the values of its inputs."""
    total = number + sum(values)
    match kind:
        case "fail":
            raise Boom(number)
        case "flaky":
            try:
                os.close(os.open(os.path.join(folder, str(number)), os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return total
            raise Boom("the first time")
        case "two":
            return total, -total
        case "slow":
            for step in range(2000):
                total += step % 2
            return total
        case "nested":
            return shoal.get(run.remote("sum", number, values, [], folder))
        case "fan":
            parts = [run.remote("sum", value, [], [], folder) for value in values]
            return shoal.get(run.remote("sum", number, [], parts, folder))
    return total


@shoal.remote
def run(kind: Kind, number: int, values: list[int], inside: list[Any], folder: str, *direct: int) -> Any:
    return work(kind, number, [*values, *shoal.get(inside), *direct], folder)


def submit(nodes: list[Node], folder: str) -> list[list[shoal.ObjectRef[Any]]]:
    """The references of each node's results."""
    made: list[list[shoal.ObjectRef[Any]]] = []
    for number, node in enumerate(nodes):
        direct = [made[index][0] for index, inside in node.inputs if not inside]
        inside = [made[index][0] for index, inside in node.inputs if inside]
        chosen = run.options(retry_exceptions=node.kind == "flaky", num_returns=2 if node.kind == "two" else 1)
        refs: Any = chosen.remote(node.kind, number, [], inside, folder, *direct)  # type: ignore[arg-type]
        made.append(list(refs) if node.kind == "two" else [refs])
        for index in node.cancel:
            shoal.cancel(made[index][-1])
    return made


def outcome(ref: shoal.ObjectRef[Any]) -> Outcome:
    try:
        return ("value", shoal.get(ref, timeout=LIMIT_S))
    except TaskCancelledError:
        return CANCELLED
    except Boom as boom:
        return ("boom", *boom.args)


# ------------------------------------------------------------------------------------------------------- to be expected


def interpret(node: Node, number: int, inputs: list[Outcome]) -> tuple[list[Outcome], set[Outcome]]:
    """The outcomes of a node's results if nobody cancels it, or instead the errors that all of them may have."""
    failed = {one for one in inputs if one[0] != "value"}
    if failed:
        return [], failed  # which of them is found first is not promised
    if node.kind == "fail":
        return [], {("boom", number)}
    total = number + sum(one[1] for one in inputs)
    if node.kind == "two":
        return [("value", total), ("value", -total)], set()
    return [("value", total + (1000 if node.kind == "slow" else 0))], set()


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(graphs())
def test_a_graph_gives_what_an_interpreter_gives(nodes: list[Node]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = submit(nodes, folder)
        outcomes = [[outcome(ref) for ref in refs] for refs in made]
    cancelled = {index for node in nodes for index in node.cancel}
    for number, (node, seen) in enumerate(zip(nodes, outcomes, strict=True)):
        values, errors = interpret(node, number, [outcomes[index][0] for index, _ in node.inputs])
        if number in cancelled:
            errors = errors | {CANCELLED, ("boom", "the first time")}  # what it had come to, and is not tried again
        allowed = [values] if values else []
        allowed += [[error] * len(seen) for error in errors]
        assert seen in allowed, f"node {number}: {node}"
