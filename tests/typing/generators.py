"""What a type checker knows of generators: calls give an `ObjectRefGenerator` of what they yield."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator
from typing import Any, assert_type

import shoal
from shoal import ObjectRef, ObjectRefGenerator


@shoal.remote
def count(n: int, start: int = 0) -> Iterator[int]:
    yield from range(start, n)


@shoal.remote(_generator_backpressure_num_objects=2)
def words(text: str, *, loud: bool = False) -> Generator[str, None, None]:
    yield from text.split()


@shoal.remote
def untyped(x):  # type: ignore[no-untyped-def]
    return x


@shoal.remote
def anything(x: int) -> Any:
    return x


@shoal.remote
class Maker:
    def upto(self, n: int) -> Iterator[int]:
        yield from range(n)

    async def later(self, n: int) -> AsyncIterator[str]:
        yield str(n)

    @shoal.method(num_returns="streaming")
    def marked(self, n: int) -> Iterator[bytes]:
        yield bytes(n)


number = shoal.put(1)
stream = count.remote(3)
assert_type(stream, ObjectRefGenerator[int])
assert_type(next(stream), ObjectRef[int])
assert_type([shoal.get(ref) for ref in stream], list[int])
assert_type(shoal.get(stream), ObjectRefGenerator[int])
assert_type(shoal.get(stream.completed()), None)
assert_type(words.remote("a b", loud=True), ObjectRefGenerator[str])
assert_type(count.options(name="c").remote(1), ObjectRefGenerator[int])
assert_type(count.remote(number), ObjectRefGenerator[int])
assert_type(count.remote(number, start=1), ObjectRefGenerator[int])
assert_type(untyped.remote(1), ObjectRef[Any])
assert_type(anything.remote(1), ObjectRef[Any])
count.remote("no")  # type: ignore[call-overload]

maker = Maker.remote()
assert_type(maker.upto.remote(1), ObjectRefGenerator[int])
assert_type(maker.upto.remote(number), ObjectRefGenerator[int])
assert_type(maker.later.remote(1), ObjectRefGenerator[str])
assert_type(maker.marked.remote(1), ObjectRefGenerator[bytes])

both: list[ObjectRef[int] | ObjectRefGenerator[int]] = [number, stream]
ready, rest = shoal.wait(both)
assert_type(ready, list[ObjectRef[int] | ObjectRefGenerator[int]])
shoal.cancel(stream)


async def read() -> None:
    async for ref in count.remote(3):
        assert_type(await ref, int)
