"""Remote functions, actors and the calls around them, over a runtime that runs everything at once."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import pickle
from collections.abc import Iterator
from typing import Any

import cloudpickle
import pytest

import shoal
from shoal.api.actor import ActorClassInheritanceException, ClassInfo
from shoal.api.signatures import shape_of
from shoal.exceptions import ActorAlreadyExistsError, ActorDiedError, ShoalSystemError, TaskError
from shoal.runtime import slot
from shoal.runtime.fake import JOB, NODE, FakeActor, FakeRuntime
from shoal.runtime.interface import ContextData
from shoal.util import get_node_ip_address, list_named_actors


@pytest.fixture(autouse=True)
def runtime() -> Iterator[FakeRuntime]:
    fake = FakeRuntime()
    slot.current = fake  # type: ignore[assignment]
    yield fake
    slot.current = None


@shoal.remote
def add(x: int, y: int = 10) -> int:
    """Adds."""
    return x + y


@shoal.remote(num_returns=2, num_cpus=0.5)
def pair(x: int) -> tuple[int, int]:
    return x, x + 1


@shoal.remote
def fail(text: str) -> None:
    raise ValueError(text)


@shoal.remote
def fib(n: int, base: int = 1) -> int:
    if n < 2:
        return base
    return sum(shoal.get([fib.remote(n - 1), fib.remote(n - 2)]))


class PlainCounter:
    """Counts."""

    unit = "things"

    def __init__(self, start: int = 0) -> None:
        if start < 0:
            raise ValueError("negative")
        self.value = start

    def add(self, n: int = 1) -> int:
        self.value += n
        return self.value

    @shoal.method(num_returns=2)
    def both(self) -> tuple[int, int]:
        return self.value, -self.value

    @staticmethod
    def static(x: int) -> int:
        return x

    @classmethod
    def of_class(cls) -> str:
        return cls.__name__

    def _private(self) -> int:
        return self.value

    def stream(self) -> Iterator[int]:
        yield 1

    def who(self) -> str | None:
        return shoal.get_runtime_context().get_actor_id()

    def leave(self) -> None:
        shoal.actor.exit_actor()

    @property
    def prop(self) -> int:
        return 1


Counter = shoal.remote(PlainCounter)


class PlainAsync:
    async def work(self, x: int) -> int:
        await asyncio.sleep(0)
        return x + 1


# ---------------------------------------------------------------------------------------------------------- functions


def test_a_task() -> None:
    assert shoal.get(add.remote(1)) == 11
    assert shoal.get(add.remote(1, y=2)) == 3
    assert shoal.get([add.remote(x) for x in range(3)]) == [10, 11, 12]


def test_references_are_resolved_at_the_top_only() -> None:
    ref = add.remote(1)
    assert shoal.get(add.remote(ref, y=ref)) == 22
    inside = shoal.remote(lambda refs: refs)
    assert shoal.get(inside.remote([ref])) == [ref]


def test_recursion() -> None:
    assert shoal.get(fib.remote(10)) == 89


def test_num_returns() -> None:
    first, second = shoal.get(pair.remote(3))
    assert (first, second) == (3, 4)
    assert pair.options(num_returns=0).remote(3) is None
    with pytest.raises(ValueError, match="returned 2 values"):
        shoal.get(pair.options(num_returns=3).remote(3)[0])


def test_an_error_is_the_users_and_a_task_error() -> None:
    with pytest.raises(ValueError, match="no good") as info:
        shoal.get(fail.remote("no good"))
    assert isinstance(info.value, TaskError)
    with pytest.raises(ValueError, match="no good"):
        shoal.get(add.remote(fail.remote("no good")))


def test_options_do_not_change_the_original(runtime: FakeRuntime) -> None:
    other = pair.options(num_cpus=3, name="other")
    other.remote(1)
    pair.remote(1)
    assert [template.resources["CPU"] for template in runtime.submitted] == [30_000, 5_000]
    assert [template.name for template in runtime.submitted] == ["other", "pair"]
    assert runtime.submitted[0].num_returns == 2  # options add up
    assert pair.options(num_cpus=3, name="other") is other  # and are prepared once


def test_variants_are_bounded() -> None:
    for index in range(300):
        add.options(name=f"n{index}")
    assert len(add._variants) <= 64


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((1,), {"z": 1}), ((1,), {"x": 1})])
def test_wrong_arguments_fail_at_the_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"add.remote\(\): "):
        add.remote(*args, **kwargs)


def test_direct_call() -> None:
    with pytest.raises(TypeError, match=r"add.remote\(\.\.\.\)"):
        add(1)
    with pytest.raises(TypeError, match=r"Counter.remote\(\.\.\.\)"):
        Counter(1)
    with pytest.raises(TypeError, match=r"add.remote\(\.\.\.\)"):
        Counter.remote().add(1)
    assert add._function(1) == 11


def test_metadata() -> None:
    assert (add.__name__, add.__doc__, add.__module__) == ("add", "Adds.", __name__)
    assert list(inspect.signature(add).parameters) == ["x", "y"]
    assert "add" in repr(add)
    assert (Counter.__name__, Counter.__doc__) == ("PlainCounter", "Counts.")


def test_what_cannot_be_remote() -> None:
    async def coroutine() -> None: ...

    def generator() -> Iterator[int]:
        yield 1
        yield 2

    with pytest.raises(ValueError, match="async def"):
        shoal.remote(coroutine)
    assert shoal.get(list(shoal.remote(generator).remote())) == [1, 2]
    assert shoal.get(shoal.remote(num_returns=2)(generator).remote()) == [1, 2]
    with pytest.raises(TypeError, match="remote already"):
        shoal.remote(add)
    with pytest.raises(TypeError, match="remote already"):
        shoal.remote(Counter)
    with pytest.raises(TypeError, match="a function or a class"):
        shoal.remote(3)
    with pytest.raises(TypeError, match="by keyword"):
        shoal.remote(add._function, 3)
    with pytest.raises(ValueError, match="Did you mean 'num_cpus'"):
        shoal.remote(num_cpu=3)
    with pytest.raises(TypeError, match="exception class"):
        shoal.remote(KeyError)


def test_callables_of_other_kinds() -> None:
    assert shoal.get(shoal.remote(len).remote([1, 2])) == 2
    assert shoal.get(shoal.remote(functools.partial(add._function, 1)).remote(y=1)) == 2
    assert shoal.get(shoal.remote(lambda: 3).remote()) == 3
    assert shoal.get(shoal.remote()(add._function).remote(1)) == 11


def test_a_remote_function_pickles_with_its_options(runtime: FakeRuntime) -> None:
    back = pickle.loads(cloudpickle.dumps(pair.options(name="p")))
    assert shoal.get(back.remote(1)[1]) == 2
    assert runtime.submitted[0].name == "p"


def test_a_recursive_function_pickles_by_value() -> None:
    space: dict[str, Any] = {"shoal": shoal, "__name__": "__main__"}
    exec(  # noqa: S102 - the function must belong to a module that cannot be imported
        "@shoal.remote\ndef down(n, step=1):\n    return n if n <= 0 else shoal.get(down.remote(n - step))\n", space
    )
    for what in (space["down"], space["down"]._function):
        back = pickle.loads(cloudpickle.dumps(what))
        back = back if hasattr(back, "remote") else shoal.remote(back)
        assert shoal.get(back.remote(3)) == 0
        with pytest.raises(TypeError, match="too many"):
            back.remote(1, 2, 3)


def test_a_class_that_uses_itself_pickles_by_value() -> None:
    space: dict[str, Any] = {"shoal": shoal, "__name__": "__main__"}
    exec(  # noqa: S102 - as above
        "@shoal.remote\nclass Node:\n    def grow(self, n):\n"
        "        return 0 if n == 0 else 1 + shoal.get(Node.remote().grow.remote(n - 1))\n",
        space,
    )
    for what in (space["Node"], space["Node"]._class):
        back = pickle.loads(cloudpickle.dumps(what))
        back = back if hasattr(back, "remote") else shoal.remote(back)
        assert shoal.get(back.remote().grow.remote(3)) == 3
        assert back.__name__ == "Node"


# ------------------------------------------------------------------------------------------------------------- actors


def test_an_actor() -> None:
    counter = Counter.remote(5)
    assert shoal.get(counter.add.remote()) == 6
    assert shoal.get(counter.add.remote(n=4)) == 10
    assert shoal.get(counter.both.remote()) == [10, -10]
    assert shoal.get(counter.static.remote(3)) == 3
    assert shoal.get(counter.of_class.remote()) == "PlainCounter"
    assert shoal.get(counter._private.remote()) == 10
    assert counter.add is counter.add  # made once


def test_hidden_methods() -> None:
    counter = Counter.remote(5)
    assert shoal.get(counter.__ray_ready__.remote()) is True
    assert shoal.get(counter.__ray_call__.remote(lambda self, by: self.value * by, 3)) == 15
    counter.__ray_terminate__.remote()
    with pytest.raises(ActorDiedError):
        shoal.get(counter.add.remote())


def test_async_actors() -> None:
    actor_class = shoal.remote(PlainAsync)
    assert actor_class._template.is_async
    assert not Counter._template.is_async
    assert shoal.get(actor_class.remote().work.remote(1)) == 2


def test_method_options(runtime: FakeRuntime) -> None:
    counter: Any = Counter.remote(5)
    assert counter.add.options(num_returns=0).remote() is None
    counter.add.options(name="label", max_task_retries=3).remote()
    last = counter._shoal_client.calls[-1]
    assert (last.label, last.max_task_retries, last.name) == ("label", 3, "add")
    counter.add.options(retry_exceptions=[ValueError], timeout_s=2).options(max_task_retries=1).remote()
    last = counter._shoal_client.calls[-1]
    assert (last.retry_on, last.timeout_s, last.max_task_retries) == (("builtins.ValueError",), 2.0, 1)
    counter.add.options(retry_exceptions=True, timeout_s=2).options(retry_exceptions=False, timeout_s=None).remote()
    last = counter._shoal_client.calls[-1]
    assert (last.retry_on, last.timeout_s) == ((), 0.0)
    with pytest.raises(ValueError, match="no option 'num_cpus'"):
        counter.add.options(num_cpus=1)
    with pytest.raises(ValueError, match="no option 'num_cpus'"):
        shoal.method(num_cpus=1)  # type: ignore[call-overload]


def test_the_nearest_option_counts() -> None:
    """For a call's retries: the call's own, then the method's, then the actor's, then 0. For its group likewise."""

    class Plain:
        def bare(self) -> None: ...

        @shoal.method(max_task_retries=5, concurrency_group="io")
        def marked(self) -> None: ...

    def sent(call: Any) -> tuple[int, str, int]:
        call.remote()
        last = actor._shoal_client.calls[-1]
        return last.max_task_retries, last.group, last.group_size

    classes = shoal.remote(concurrency_groups={"io": 2, "disk": 1})(Plain)
    actor: Any = classes.remote()
    assert sent(actor.bare) == (0, "", 0)
    assert sent(actor.marked) == (5, "io", 2)
    actor = classes.options(max_task_retries=3, max_restarts=1).remote()
    assert sent(actor.bare) == (3, "", 0)
    assert sent(actor.marked) == (5, "io", 2)
    assert sent(actor.marked.options(max_task_retries=0)) == (0, "io", 2)
    assert sent(actor.bare.options(concurrency_group="disk", max_task_retries=-1)) == (-1, "disk", 1)
    with pytest.raises(ValueError, match="only in the decorator"):
        classes.options(concurrency_groups={"io": 3})


def test_what_callers_keep_to_travels_with_the_handle(runtime: FakeRuntime) -> None:
    class Plain:
        def f(self) -> None: ...

    cls: Any = shoal.remote(max_concurrency=2, concurrency_groups={"io": 2})(Plain)
    packed = cls.options(max_pending_calls=7)._info.packed
    info = ClassInfo.unpack(packed)
    assert info.groups == {"io": 2}
    assert info.packed == packed
    assert info.rules is not None
    assert (info.rules.any_order, info.rules.max_pending_calls) == (True, 7)
    assert shoal.remote(Plain)._info.rules is None  # nothing to keep to but the order
    handle = cls.options(max_pending_calls=7).remote()
    assert runtime.actors[handle._actor_id].rules == info.rules


def test_unknown_methods() -> None:
    counter = Counter.remote()
    with pytest.raises(AttributeError, match="Did you mean 'static'"):
        counter.statc  # noqa: B018
    with pytest.raises(AttributeError, match="not visible"):
        counter.value  # noqa: B018
    with pytest.raises(AttributeError, match="has no method 'prop'"):
        counter.prop  # noqa: B018
    with pytest.raises(AttributeError, match="cannot be set"):
        counter.value = 3  # type: ignore[assignment]
    with pytest.raises(AttributeError, match="through a handle"):
        Counter.add  # noqa: B018
    assert not hasattr(counter, "nothing")
    assert "add" in dir(counter)


def test_wrong_arguments_of_methods() -> None:
    with pytest.raises(TypeError, match=r"PlainCounter.remote\(\): too many"):
        Counter.remote(1, 2)
    with pytest.raises(TypeError, match=r"PlainAsync.remote\(\): too many"):
        shoal.remote(PlainAsync).remote(1)
    with pytest.raises(TypeError, match=r"PlainCounter.add.remote\(\): "):
        Counter.remote().add.remote(1, 2)


def test_a_failed_constructor_shows_at_the_first_call() -> None:
    counter = Counter.remote(-1)
    with pytest.raises(ActorDiedError, match="negative"):
        shoal.get(counter.add.remote())


def test_handles_are_equal_by_actor() -> None:
    first, second = Counter.remote(), Counter.remote()
    again = pickle.loads(pickle.dumps(first))
    assert again == first != second
    assert len({first, again, second}) == 2
    assert first != 3
    assert repr(first) == f"Actor(PlainCounter, {first._actor_id.hex()})"
    assert shoal.get(again.add.remote()) == 1
    assert shoal.get(again.both.remote()) == [1, -1]
    with pytest.raises(AttributeError):
        again.nothing  # noqa: B018
    with pytest.raises(TypeError):
        again.add.remote(1, 2)


def test_pickling_a_handle_is_noted() -> None:
    from shoal.objects.serialization import serialize

    counter = Counter.remote()
    assert serialize([counter]).refs == [counter._shoal_client]


def test_a_handle_in_a_task() -> None:
    bump = shoal.remote(lambda counter: shoal.get(counter.add.remote()))
    assert shoal.get(bump.remote(Counter.remote(1))) == 2


def test_named_actors() -> None:
    named = Counter.options(name="c").remote(1)
    assert shoal.get_actor("c") == named
    assert shoal.get(shoal.get_actor("c").add.remote()) == 2
    with pytest.raises(ActorAlreadyExistsError):
        Counter.options(name="c").remote()
    assert Counter.options(name="c", get_if_exists=True).remote() == named
    other = Counter.options(name="c", namespace="other").remote()
    assert shoal.get_actor("c", namespace="other") == other != named
    with pytest.raises(ValueError, match="no actor named"):
        shoal.get_actor("d")
    with pytest.raises(ValueError, match="not empty"):
        shoal.get_actor("")
    assert list_named_actors() == ["c"]
    assert list_named_actors(all_namespaces=True) == [
        {"name": "c", "namespace": "other"},
        {"name": "c", "namespace": "space"},
    ]


def test_get_if_exists_of_another_class() -> None:
    first = Counter.options(name="c").remote()
    other = shoal.remote(PlainAsync).options(name="c", get_if_exists=True).remote()
    assert other == first
    assert shoal.get(other.add.remote()) == 1


def test_inheritance() -> None:
    with pytest.raises(ActorClassInheritanceException, match="derive from the plain class"):

        class Derived(Counter):  # type: ignore[misc, valid-type]
            pass

    class Fine(PlainCounter):
        def twice(self) -> int:
            return 2 * self.value

    assert shoal.get(shoal.remote(Fine).remote(2).twice.remote()) == 4


def test_kill_and_exit() -> None:
    counter = Counter.remote()
    shoal.kill(counter)
    with pytest.raises(ActorDiedError, match="killed"):
        shoal.get(counter.add.remote())
    leaving = Counter.remote()
    with pytest.raises(ActorDiedError):
        shoal.get(leaving.leave.remote())
    with pytest.raises(ValueError, match="handle of an actor"):
        shoal.kill(add.remote(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="inside an actor"):
        shoal.actor.exit_actor()


def test_class_info_travels_as_data() -> None:
    info = ClassInfo.unpack(bytes(Counter._info.packed))
    assert info.methods.keys() == Counter._info.methods.keys()
    assert info.methods["both"].template == Counter._info.methods["both"].template
    assert info.packed == Counter._info.packed


# ------------------------------------------------------------------------------------------------- get, put, wait ...


def test_get_and_put() -> None:
    ref = shoal.put({"a": 1})
    assert shoal.get(ref) == {"a": 1}
    assert shoal.get([ref, ref], timeout=1) == [{"a": 1}] * 2
    assert shoal.get([]) == []
    with pytest.raises(TypeError, match="reference already"):
        shoal.put(ref)


@pytest.mark.parametrize(
    ("refs", "error", "text"),
    [
        (lambda ref: (ref,), ValueError, "list"),
        (lambda ref: {ref}, ValueError, "list"),
        (lambda ref: (one for one in [ref]), ValueError, "list"),
        (lambda ref: None, ValueError, "num_returns=0"),
        (lambda ref: 3, ValueError, "a reference or a list"),
        (lambda ref: [ref, 3], TypeError, "element 1"),
        (lambda ref: [[ref]], TypeError, "do not nest"),
        (lambda ref: add, ValueError, "was not called"),
        (lambda ref: Counter.remote(), ValueError, "call a method"),
    ],
)
def test_wrong_references(refs: Any, error: type[Exception], text: str) -> None:
    ref = shoal.put(1)
    with pytest.raises(error, match=text):
        shoal.get(refs(ref))
    with pytest.raises(error, match=text):
        shoal.wait(refs(ref))


@pytest.mark.parametrize(("timeout", "error"), [(-1, ValueError), ("1", TypeError), (float("nan"), ValueError)])
def test_wrong_timeouts(timeout: Any, error: type[Exception]) -> None:
    ref = shoal.put(1)
    with pytest.raises(error, match="timeout"):
        shoal.get(ref, timeout=timeout)
    with pytest.raises(error, match="timeout"):
        shoal.wait([ref], timeout=timeout)


def test_wait(runtime: FakeRuntime) -> None:
    refs = [shoal.put(index) for index in range(4)]
    runtime.pending.add(refs[1].binary())
    assert shoal.wait(refs, num_returns=2) == ([refs[0], refs[2]], [refs[1], refs[3]])
    assert shoal.wait([]) == ([], [])
    with pytest.raises(ValueError, match="each reference once"):
        shoal.wait([refs[0], refs[0]])
    for number in (0, 5):
        with pytest.raises(ValueError, match="between 1 and"):
            shoal.wait(refs, num_returns=number)
    with pytest.raises(TypeError, match="whole number"):
        shoal.wait(refs, num_returns=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"wait\(\[ref\]\)"):
        shoal.wait(refs[0])  # type: ignore[arg-type]


def test_cancel(runtime: FakeRuntime) -> None:
    ref = add.remote(1)
    shoal.cancel(ref, force=True)
    assert runtime.cancelled == [(ref, True, True)]
    with pytest.raises(TypeError, match="reference"):
        shoal.cancel(3)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ cluster


def test_nodes_and_resources() -> None:
    first, second, dead = shoal.nodes()
    assert (first["NodeID"], first["Alive"], first["Resources"]) == (NODE.hex(), True, {"CPU": 2.0})
    assert (second["NodeManagerAddress"], second["NodeManagerPort"]) == ("::1", 2)
    assert (dead["alive"], dead["Resources"], dead["DeathReasonMessage"]) == (False, {}, "gone")
    assert shoal.cluster_resources() == {"CPU": 6.0, "GPU": 1.0}
    assert shoal.available_resources() == {"CPU": 5.0}


def test_what_does_not_connect_by_itself() -> None:
    slot.current = None
    for call in (shoal.nodes, shoal.cluster_resources, shoal.available_resources, list_named_actors):
        with pytest.raises(ShoalSystemError, match=r"shoal.init\(\)"):
            call()
    assert get_node_ip_address()


def test_context(runtime: FakeRuntime) -> None:
    context = shoal.get_runtime_context()
    assert context.get_job_id() == JOB.hex()
    assert context.get_node_id() == NODE.hex()
    assert context.get_task_id() is None
    assert context.get_actor_id() is None
    assert context.get_actor_name() is None
    assert context.namespace == "space"
    assert context.gcs_address == "127.0.0.1:1"
    assert context.get_accelerator_ids() == {"GPU": []}
    assert context.get_placement_group_id() is None
    assert shoal.get_gpu_ids() == []
    with pytest.raises(RuntimeError, match="inside an actor"):
        context.current_actor  # noqa: B018
    with pytest.raises(RuntimeError, match="inside an actor"):
        context.was_current_actor_reconstructed  # noqa: B018
    inside = ContextData(
        JOB, NODE, b"w", b"t", "name", "func", env_vars={"A": "1"}, assigned={"CPU": 5_000}, devices={"GPU": [2]}
    )
    with runtime.inside(inside):
        assert (context.get_task_id(), context.get_task_name()) == (b"t".hex(), "name")
        assert context.get_task_function_name() == "func"
        assert context.get_assigned_resources() == {"CPU": 0.5}
        assert context.get_accelerator_ids() == {"GPU": ["2"]}
        assert shoal.get_gpu_ids() == [2]
        assert context.runtime_env == {"env_vars": {"A": "1"}}
        assert context.get_runtime_env_string() == '{"env_vars": {"A": "1"}}'
        assert context.get()["task_id"] == b"t".hex()


def test_context_in_an_actor(runtime: FakeRuntime) -> None:
    counter = Counter.remote()
    assert shoal.get(counter.who.remote()) == counter._actor_id.hex()
    packed = counter._shoal_class.packed
    data = ContextData(JOB, NODE, b"w", actor_id=counter._actor_id, restarts=1, actor_handle=packed)
    with runtime.inside(data):
        context = shoal.get_runtime_context()
        assert context.current_actor == counter
        assert context.was_current_actor_reconstructed
        assert context.get_actor_name() == ""


# --------------------------------------------------------------------------------------------------------- signatures


def samples() -> list[Any]:
    def none() -> None: ...
    def one(a): ...
    def default(a, b=1): ...
    def only(a, /, b, *, c, d=2): ...
    def rest(a, *args, k=1): ...
    def words(a, b=1, **kw): ...
    def hidden(a, /, **kw): ...
    def everything(*args, **kw): ...

    return [none, one, default, only, rest, words, hidden, everything]


CALLS = [
    (args, dict.fromkeys(names, 0))
    for args in [(), (1,), (1, 2), (1, 2, 3)]
    for names in [(), ("a",), ("b",), ("c",), ("b", "c"), ("a", "b"), ("k",), ("z",), ("a", "b", "c", "d"), ("c", "d")]
]


@pytest.mark.parametrize("function", samples(), ids=lambda function: function.__name__)
def test_shapes_agree_with_python(function: Any) -> None:
    shape = shape_of(function, bound=False)
    assert shape is not None
    least, most = shape.plain_range()
    for args, kwargs in CALLS:
        try:
            inspect.signature(function).bind(*args, **kwargs)
            right = True
        except TypeError:
            right = False
        assert shape.accepts(args, kwargs) is right, (args, kwargs)
        if not kwargs:
            assert (least <= len(args) <= most) is right
        if not right:
            assert shape.complaint(args, kwargs) != "the arguments do not fit its parameters"


def test_a_fork_starts_without_a_connection(runtime: FakeRuntime) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        told = b"clean"
        try:
            if slot.current is not None or shoal.is_initialized():
                told = b"inherited"
            shoal.shutdown()
            if runtime.is_shut_down:
                told = b"torn down"
        finally:
            os.write(write, told)
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 20) == b"clean"
    assert slot.current is runtime  # type: ignore[comparison-overlap]
    os.close(read)
    os.close(write)


def test_the_fake_actor_is_what_a_client_is() -> None:
    client = Counter.remote()._shoal_client
    assert isinstance(client, FakeActor)
    assert client.location() == (client.actor_id, NODE, False)
