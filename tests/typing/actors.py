"""What a type checker knows of actors, with the plugin for mypy. As in functions.py, refusals must be needed."""

from __future__ import annotations

from typing import Any, Generic, TypeVar, assert_type

import shoal
from shoal import ActorClass, ActorHandle, ObjectRef
from shoal.api.actor import ActorProxy

T = TypeVar("T")


@shoal.remote
class Counter:
    def __init__(self, start: int = 0, *, step: int = 1) -> None:
        self.value = start
        self.step = step

    def add(self, n: int) -> int:
        self.value += n
        return self.value

    async def later(self, name: str, loud: bool = False) -> str:
        return name.upper() if loud else name

    @shoal.method(num_returns=2)
    def pair(self, by: int) -> tuple[int, int]:
        return self.value, self.value * by

    @staticmethod
    def static(x: bytes) -> bytes:
        return x

    @classmethod
    def named(cls, n: int) -> str:
        return cls.__name__ * n

    @property
    def half(self) -> float:
        return self.value / 2

    def untyped(self, x):  # type: ignore[no-untyped-def]
        return x


@shoal.remote(num_cpus=1)
class Child:
    pass


class Base:
    def hello(self, name: str) -> str:
        return name


class Plain(Base):
    def __init__(self, size: int) -> None:
        self.size = size


number = shoal.put(1)
text = shoal.put("x")

# A decorated class starts actors; its constructor's arguments are checked, and may be references.
counter = Counter.remote(1)
assert_type(counter, ActorHandle[Counter])
assert_type(Counter.remote(), ActorHandle[Counter])
assert_type(Counter.remote(number, step=number), ActorHandle[Counter])
assert_type(Counter.options(name="c").remote(1), ActorHandle[Counter])
assert_type(Child.remote(), ActorHandle[Child])
Counter.remote("no")  # type: ignore[arg-type]
Counter.remote(1, 2)  # type: ignore[call-arg]
Counter.options(name="c").remote("no")  # type: ignore[arg-type]
Child.remote(1)  # type: ignore[call-arg]

# So does a class that was wrapped.
PlainActor = shoal.remote(Plain)
assert_type(PlainActor, ActorClass[Plain])
plain = PlainActor.remote(3)
assert_type(plain, ActorHandle[Plain])
assert_type(plain.hello.remote("x"), ObjectRef[str])
PlainActor.remote("no")  # type: ignore[arg-type]

# Methods keep their types.
assert_type(counter.add.remote(1), ObjectRef[int])
assert_type(shoal.get(counter.add.remote(1)), int)
assert_type(counter.later.remote("x", loud=True), ObjectRef[str])
assert_type(counter.pair.remote(2), ObjectRef[tuple[int, int]])
assert_type(counter.static.remote(b"x"), ObjectRef[bytes])
assert_type(counter.named.remote(2), ObjectRef[str])
assert_type(counter.add.options(name="n").remote(1), ObjectRef[int])
assert_type(counter.add.options(concurrency_group="io", max_task_retries=2).remote(1), ObjectRef[int])
assert_type(counter.untyped.remote(1), ObjectRef[Any])
counter.__ray_ready__.remote()

# References stand for their values, by keyword too.
assert_type(counter.add.remote(number), ObjectRef[int])
assert_type(counter.add.remote(n=number), ObjectRef[int])
assert_type(counter.later.remote(text, loud=True), ObjectRef[str])
assert_type(counter.add.remote(counter.add.remote(1)), ObjectRef[int])

# Mistakes are found.
counter.add.remote("no")  # type: ignore[call-overload]
counter.add.remote(text)  # type: ignore[arg-type]
counter.add.remote()  # type: ignore[call-overload]
counter.ad.remote(1)  # type: ignore[misc]
counter.value.remote()  # type: ignore[misc]
counter.half.remote()  # type: ignore[misc]


# Handles travel as what they are.
@shoal.remote
def use(handle: ActorHandle[Counter], n: int) -> int:
    return shoal.get(handle.add.remote(n))


assert_type(use.remote(counter, 1), ObjectRef[int])
use.remote(plain, 1)  # type: ignore[arg-type]

# Ray's name for the same, and classes as values.
proxy: ActorProxy[Counter] = counter
assert_type(proxy.add.remote(1), ObjectRef[int])


def start(cls: ActorClass[Plain]) -> ActorHandle[Plain]:
    return cls.options(max_pending_calls=10, max_concurrency=2).remote(1)


assert_type(start(PlainActor).hello.remote("x"), ObjectRef[str])


# Options keep the types: of the class with groups, of inherited and generic methods.
class Store(Generic[T]):
    def __init__(self, first: T) -> None:
        self.item = first

    def swap(self, item: T) -> T:
        self.item, item = item, self.item
        return item


@shoal.remote(concurrency_groups={"io": 2}, max_restarts=1)
class Words(Store[str], Base):
    @shoal.method(concurrency_group="io", max_task_retries=3)
    def length(self, extra: int = 0) -> int:
        return len(self.item) + extra


words = Words.remote("a")
assert_type(words.length.remote(1), ObjectRef[int])
assert_type(words.swap.remote("b"), ObjectRef[str])
assert_type(words.hello.remote("b"), ObjectRef[str])
words.swap.remote(1)  # type: ignore[call-overload]
words.length.remote("no")  # type: ignore[call-overload]

# A handle that was looked up by name has any method.
assert_type(shoal.get_actor("c").whatever.remote(1), ObjectRef[Any])


# Without the plugin, and in every other checker: methods under @method, seen through typed().
class Typed:
    @shoal.method
    def add(self, n: int) -> int:
        return n

    @shoal.method
    async def later(self, name: str) -> str:
        return name + str(self.add(1))


typed = shoal.typed(shoal.remote(Typed).remote())
assert_type(typed.add.remote(1), ObjectRef[int])
assert_type(typed.add.remote(number), ObjectRef[int])
assert_type(typed.later.remote("x"), ObjectRef[str])
typed.add.remote("no")  # type: ignore[call-overload]
