"""Which errors are tried again, and what is said of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.exceptions import TaskError, TaskTimeoutError
from shoal.runtime.retrying import MAX_REASON_CHARS, covers, describe, names_of


class Base(ValueError):
    pass


class Derived(Base):
    pass


class Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


def from_task(error: BaseException) -> TaskError:
    return TaskError.from_exception(error, function_name="f", pid=1, ip="", node_id="").as_raisable()


@pytest.mark.parametrize(
    ("option", "error", "wanted"),
    [
        (False, Derived(), False),
        ((), Derived(), False),
        (True, Derived(), True),
        (True, KeyboardInterrupt(), True),
        ((Derived,), Derived(), True),
        ((Base,), Derived(), True),
        ((ValueError,), Derived(), True),
        ((KeyError, Exception), Derived(), True),
        ((Derived,), Base(), False),
        ((KeyError,), Derived(), False),
        ((Base,), from_task(Derived()), True),
        ((KeyError,), from_task(Derived()), False),
        ((TaskError,), from_task(Derived()), True),
        ((TimeoutError,), TaskTimeoutError("f", 1.0), True),
    ],
)
def test_which_errors_are_covered(
    option: bool | tuple[type[BaseException], ...], error: Exception, wanted: bool
) -> None:
    assert covers(names_of(option), error) is wanted


EXCEPTIONS = [ValueError, KeyError, LookupError, OSError, TimeoutError, Exception, Base, Derived, ArithmeticError]


@given(st.lists(st.sampled_from(EXCEPTIONS), min_size=1), st.sampled_from(EXCEPTIONS))
def test_names_say_what_isinstance_says(classes: list[type[Exception]], raised: type[Exception]) -> None:
    assert covers(names_of(tuple(classes)), raised()) is isinstance(raised(), tuple(classes))


def test_descriptions_are_one_short_line() -> None:
    assert describe(Base("why")) == "Base: why"
    assert describe(Base()) == "Base"
    assert describe(Silent()) == "Silent"
    assert describe(Base("one\ntwo")) == "Base: one ..."
    assert len(describe(Base("x" * 10_000))) < MAX_REASON_CHARS + 20
    assert describe(from_task(Base("why"))) == "Base: why"
