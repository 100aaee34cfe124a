"""What a type checker knows of tasks. Every line that must be refused says so; an unused refusal is an error."""

from __future__ import annotations

from typing import assert_type

import shoal
from shoal import ObjectRef


@shoal.remote
def scale(x: int, factor: float = 1.0, *, name: str = "") -> float:
    return x * factor


@shoal.remote(num_cpus=2)
def join(parts: list[str], separator: str) -> str:
    return separator.join(parts)


@shoal.remote
def nothing() -> None: ...


def plain(a: int, b: str, c: bytes) -> dict[str, bytes]:
    return {b: c * a}


number: ObjectRef[int] = shoal.put(1)
text = shoal.put("x")
assert_type(text, ObjectRef[str])

# Results keep their types.
assert_type(scale.remote(1), ObjectRef[float])
assert_type(shoal.get(scale.remote(1)), float)
assert_type(shoal.get([scale.remote(1), scale.remote(2)]), list[float])
assert_type(shoal.get([scale.remote(x) for x in range(3)], timeout=1), list[float])
assert_type(join.remote(["a"], "-"), ObjectRef[str])
assert_type(nothing.remote(), ObjectRef[None])
assert_type(shoal.wait([number], timeout=0), tuple[list[ObjectRef[int]], list[ObjectRef[int]]])

# Keywords and defaults are those of the function.
assert_type(scale.remote(1, 2.0, name="n"), ObjectRef[float])
assert_type(scale.remote(x=1, factor=2.0), ObjectRef[float])
assert_type(scale.options(num_cpus=2, name="s").remote(1), ObjectRef[float])
assert_type(scale._function(1), float)

# References stand for their values.
assert_type(scale.remote(number), ObjectRef[float])
assert_type(scale.remote(number, scale.remote(2)), ObjectRef[float])
assert_type(scale.remote(number, factor=2.0), ObjectRef[float])
assert_type(scale.remote(number, name="n"), ObjectRef[float])
assert_type(scale.remote(1, scale.remote(2), name="n"), ObjectRef[float])
assert_type(join.remote(shoal.put(["a"]), text), ObjectRef[str])

remote_plain = shoal.remote(plain)
assert_type(remote_plain.remote(1, "b", b"c"), ObjectRef[dict[str, bytes]])
assert_type(remote_plain.remote(number, text, shoal.put(b"c")), ObjectRef[dict[str, bytes]])

# Mistakes are found.
scale.remote()  # type: ignore[call-overload]
scale.remote("no")  # type: ignore[call-overload]
scale.remote(1, 2.0, 3)  # type: ignore[call-overload]
scale.remote(1, nam="n")  # type: ignore[call-overload]
scale.remote(text)  # type: ignore[arg-type]
join.remote(text, text)  # type: ignore[arg-type]
nothing.remote(1)  # type: ignore[call-arg]
shoal.get(1)  # type: ignore[call-overload]
shoal.get((number,))  # type: ignore[call-overload]
shoal.kill(number)  # type: ignore[arg-type]


async def wait_for_it() -> None:
    assert_type(await scale.remote(1), float)
