"""`@remote` on a class: actor classes, handles and methods.

An `ActorClass` holds one settled `ActorTemplate`. A handle holds the process's one `ActorClient` of the actor (the
runtime counts the actor as used while some handle holds it) and a description of the methods, which travels with every
pickled handle and with the actor's record in control as msgpack, never as pickle. A method is made when it is first
looked up and then stays in the handle's `__dict__`, so that a later `handle.method.remote(x)` is two attribute loads
and one call into the client. Methods hold the client, not the handle, so that no cycle keeps an actor alive.

Types: `Counter.remote()` gives `ActorHandle[Counter]`. Type checkers have no way to derive the attributes of one class
from those of another, so without help each method is `ActorMethod[..., Any]`; `shoal.api.mypy_plugin` gives mypy the
rest, and `@method` plus `typed()` do it in every checker.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import astuple
from types import FunctionType
from typing import TYPE_CHECKING, Any, Concatenate, Final, Generic, Literal, NoReturn, ParamSpec, TypeVar, overload

from shoal.api.options import (
    ACTOR_OPTIONS,
    CALL_OPTIONS,
    DYNAMIC,
    METHOD_OPTIONS,
    STREAMING,
    actor_rules,
    actor_template,
    check_options,
    default_returns,
    qualified_name,
    returns_of,
    variant_key,
)
from shoal.api.remote_call import RemoteCall
from shoal.api.signatures import ANYTHING, ASYNC_GENERATOR, COROUTINE, Shape, code_flags, shape_of
from shoal.api.words import did_you_mean, no_graphs
from shoal.runtime import slot
from shoal.runtime.interface import ActorClient, ActorRules, ActorTemplate, MethodTemplate, StreamOptions
from shoal.runtime.retrying import names_of

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
S = TypeVar("S")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_MAX_VARIANTS: Final = 64  # as for remote functions
_METHOD_MARK: Final = "__shoal_method__"
_NO_GROUPS: Final[Mapping[str, int]] = {}


class ActorClassInheritanceException(TypeError):
    """A class was derived from an actor class. Derive plain classes, and decorate the last one."""


# -------------------------------------------------------------------------------------------------- what a handle knows


class MethodInfo:
    """One method as handles know it: its template, the shape of its parameters (None: unknown), and the class's
    concurrency groups."""

    __slots__ = ("groups", "shape", "template")

    def __init__(self, template: MethodTemplate, shape: Shape | None, groups: Mapping[str, int] = _NO_GROUPS) -> None:
        self.template = template
        self.shape = shape
        self.groups = groups


_READY: Final = MethodInfo(MethodTemplate("__ray_ready__", "__ray_ready__"), Shape(0, 0, 0, (), {}, False))
_CALL: Final = MethodInfo(MethodTemplate("__ray_call__", "__ray_call__"), ANYTHING)
_TERMINATE: Final = MethodInfo(MethodTemplate("__ray_terminate__", "__ray_terminate__"), Shape(0, 0, 0, (), {}, False))


class ClassInfo:
    """What a handle needs to know of its class: a name, the methods, the concurrency groups, and what callers keep to
    (None: nothing but the order)."""

    __slots__ = ("class_name", "groups", "methods", "packed", "rules")

    def __init__(
        self,
        class_name: str,
        methods: Mapping[str, MethodInfo],
        groups: Mapping[str, int] = _NO_GROUPS,
        rules: ActorRules | None = None,
    ) -> None:
        self.class_name = class_name
        self.methods = dict(methods)
        for builtin in (_READY, _CALL, _TERMINATE):
            self.methods.setdefault(builtin.template.name, MethodInfo(builtin.template, builtin.shape, groups))
        self.groups = groups
        self.rules = rules
        self.packed = self._pack()

    def _pack(self) -> bytes:
        import msgspec

        rows = [
            [
                name,
                template.num_returns,
                template.max_task_retries,
                info.shape and info.shape.pack(),
                template.retry_on,
                template.timeout_s,
                template.group,
                template.stream and astuple(template.stream),
            ]
            for name, info in self.methods.items()
            for template in (info.template,)
            if template not in (_READY.template, _CALL.template, _TERMINATE.template)
        ]
        rules = self.rules and [self.rules.any_order, self.rules.max_pending_calls]
        return msgspec.msgpack.encode([self.class_name, rows, self.groups, rules])

    @classmethod
    def unpack(cls, packed: bytes) -> ClassInfo:
        found = _unpacked.get(packed)
        if found is None:
            import msgspec

            class_name, rows, groups, rules = msgspec.msgpack.decode(packed)
            methods = {
                name: MethodInfo(
                    MethodTemplate(
                        name,
                        f"{class_name}.{name}",
                        num_returns,
                        retries,
                        tuple(retry_on),
                        timeout_s,
                        group,
                        groups.get(group, 0),
                        None if stream is None else StreamOptions(*stream),
                    ),
                    None if shape is None else Shape.unpack(shape),
                    groups,
                )
                for name, num_returns, retries, shape, retry_on, timeout_s, group, stream in rows
            }
            found = cls(class_name, methods, groups, rules and ActorRules(*rules))
            if len(_unpacked) >= _MAX_VARIANTS:
                _unpacked.clear()
            _unpacked[packed] = found
        return found


_unpacked: Final[dict[bytes, ClassInfo]] = {}  # handles of one class arrive often: share what they know


def describe_class(cls: type, options: Mapping[str, Any]) -> tuple[ClassInfo, bool]:
    """The methods of a user's class, private ones included, and whether any of them is `async def`.

    Raises:
        ValueError: the checked `options` contradict each other, or a method names a concurrency group that is not one.
    """
    methods: dict[str, MethodInfo] = {}
    max_task_retries = options.get("max_task_retries") or 0
    groups = options.get("concurrency_groups") or _NO_GROUPS
    streams = StreamOptions(options.get("_actor_generator_backpressure_num_objects") or 0)
    is_async = False
    for name in dir(cls):
        if name == "__init__" or name in vars(object):
            continue
        raw = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
        function = raw.__func__ if isinstance(raw, (staticmethod, classmethod)) else raw
        if isinstance(function, (type, property)) or not callable(function):
            continue
        marked: Mapping[str, Any] = getattr(function, _METHOD_MARK, {})
        flags = code_flags(function)
        is_async = is_async or bool(flags & (COROUTINE | ASYNC_GENERATOR))
        num_returns, stream = returns_of(marked, default_returns(function), streams)
        retries = marked.get("max_task_retries")
        wanted = marked.get("concurrency_group")
        group = _group(wanted, groups, f"{cls.__name__}.{name}") if wanted else ("", 0)
        template = MethodTemplate(
            name,
            f"{cls.__name__}.{name}",
            num_returns,
            max_task_retries if retries is None else retries,
            names_of(marked.get("retry_exceptions", False)),
            marked.get("timeout_s", 0.0),
            *group,
            stream,
        )
        methods[name] = MethodInfo(template, shape_of(function, bound=not isinstance(raw, staticmethod)), groups)
    rules = actor_rules(options, is_async=is_async)
    return ClassInfo(cls.__name__, methods, groups, None if rules == ActorRules() else rules), is_async


def _group(name: str, groups: Mapping[str, int], where: str) -> tuple[str, int]:
    """A concurrency group and its size.

    Raises:
        ValueError: the class has no such group.
    """
    size = groups.get(name)
    if size is None:
        known = f"It has {', '.join(map(repr, groups))}" if groups else "It has none: @remote(concurrency_groups={...})"
        hint = did_you_mean(name, groups)
        raise ValueError(f"{where}: the actor class has no concurrency group {name!r}.{hint} {known}")
    return name, size


# ----------------------------------------------------------------------------------------------------------- methods


class ActorMethod(RemoteCall[P, R_co]):
    """A method of a handle: `handle.add.remote(1)` sends a call and returns a reference to its result."""

    __slots__ = ("_call", "_client", "_info", "_least", "_most", "_template")

    def __init__(self, client: ActorClient, info: MethodInfo) -> None:
        self._client = client
        self._call = client.call
        self._info = info
        self._template = info.template
        self._least, self._most = (0, 1 << 30) if info.shape is None else info.shape.plain_range()

    if not TYPE_CHECKING:

        def remote(self, *args, **kwargs):
            """Send one call, in order after those that this process sent before.

            Raises:
                TypeError: the arguments do not fit the parameters.
                ActorDiedError, ActorUnavailableError: come out of `get`, not from here.
            """
            if kwargs or not self._least <= len(args) <= self._most:
                self._check(args, kwargs)
            return self._call(self._template, args, kwargs)

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        template, shape = self._template, self._info.shape
        if shape is not None and not shape.accepts(args, kwargs):
            raise TypeError(f"{template.label}.remote(): {shape.complaint(args, kwargs)}")

    def options(self, **options: Any) -> ActorMethod[P, R_co]:
        """The same method with other options for the calls made through what this returns."""
        template = self._template
        settled = check_options(CALL_OPTIONS, options, where=f"{template.label}.options()")
        retries, before = settled.get("max_task_retries"), template.stream
        default = template.num_returns if before is None else DYNAMIC if before.dynamic else STREAMING
        num_returns, stream = returns_of(settled, default, before or StreamOptions())
        group = template.group, template.group_size
        if settled.get("concurrency_group"):
            group = _group(settled["concurrency_group"], self._info.groups, f"{template.label}.options()")
        changed = MethodTemplate(
            template.name,
            settled.get("name") or template.label,
            num_returns,
            template.max_task_retries if retries is None else retries,
            names_of(settled["retry_exceptions"]) if "retry_exceptions" in settled else template.retry_on,
            settled.get("timeout_s", template.timeout_s),
            *group,
            stream,
        )
        return ActorMethod(self._client, MethodInfo(changed, self._info.shape, self._info.groups))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> NoReturn:
        name = self._template.name
        raise TypeError(f"a method of an actor cannot be called directly: write {name}.remote(...), not {name}(...)")

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            if name == "bind":
                raise no_graphs(self._template.label)
            raise AttributeError(f"a method of an actor has .remote() and .options(), no {name!r}")

    def __repr__(self) -> str:
        return f"ActorMethod({self._template.label})"


class TypedMethod(Generic[S, P, R_co]):
    """What type checkers see of a method under `@method`: on an instance it can be called and has `remote`."""

    if TYPE_CHECKING:

        @overload
        def __get__(self, instance: None, owner: type) -> Callable[Concatenate[S, P], R_co]: ...
        @overload
        def __get__(self, instance: object, owner: type) -> ActorMethod[P, R_co]: ...
        def __get__(self, instance: object, owner: type) -> Any: ...


class _MethodDecorator:
    if TYPE_CHECKING:

        @overload
        def __call__(self, method: Callable[Concatenate[S, P], Coroutine[Any, Any, R]], /) -> TypedMethod[S, P, R]: ...
        @overload
        def __call__(self, method: Callable[Concatenate[S, P], R], /) -> TypedMethod[S, P, R]: ...
        def __call__(self, method: Any, /) -> Any: ...


@overload
def method(function: Callable[Concatenate[S, P], Coroutine[Any, Any, R]], /) -> TypedMethod[S, P, R]: ...
@overload
def method(function: Callable[Concatenate[S, P], R], /) -> TypedMethod[S, P, R]: ...
@overload
def method(
    *,
    num_returns: int | Literal["streaming", "dynamic"] | None = None,
    max_task_retries: int | None = None,
    retry_exceptions: bool | list[type[BaseException]] | None = None,
    timeout_s: float | None = None,
    concurrency_group: str | None = None,
    enable_task_events: bool = True,
    tensor_transport: str | None = None,
    _generator_backpressure_num_objects: int | None = None,
    _num_objects_per_yield: int | None = None,
) -> _MethodDecorator: ...
def method(function: Any = None, /, **options: Any) -> Any:
    """Options of one method of an actor class: `@method(num_returns=2)`. The method itself stays as it is."""
    settled = check_options(METHOD_OPTIONS, options, where="@method")

    def mark(function: Any) -> Any:
        if not callable(function) and not isinstance(function, (staticmethod, classmethod)):
            raise TypeError(f"@method belongs on a method, not on {function!r}")
        target = function.__func__ if isinstance(function, (staticmethod, classmethod)) else function
        setattr(target, _METHOD_MARK, settled)
        return function

    return mark if function is None else mark(function)


# ----------------------------------------------------------------------------------------------------------- handles


class ActorHandle(Generic[T_co]):
    """A way to reach one actor. Handles of the same actor are equal, in any process; when all are gone it ends."""

    _shoal_client: ActorClient
    _shoal_class: ClassInfo

    def __init__(self, client: ActorClient, info: ClassInfo) -> None:
        self.__dict__["_shoal_client"] = client
        self.__dict__["_shoal_class"] = info
        if info.rules is not None:
            client.set_rules(info.rules)

    def __getattr__(self, name: str) -> ActorMethod[..., Any]:
        # Only what is not in __dict__ comes here: the first use of a method, or a mistake.
        known = self.__dict__.get("_shoal_class")
        if known is None:  # an empty handle, as copy and pickle make them
            raise AttributeError(name)
        info = known.methods.get(name)
        if info is None:
            names = [method for method in known.methods if not method.startswith("_")]
            hint = did_you_mean(name, names)
            raise AttributeError(
                f"actor {known.class_name} has no method {name!r}.{hint} "
                f"It has {', '.join(sorted(names)) or 'none'}; attributes are not visible from outside"
            )
        made: ActorMethod[..., Any] = ActorMethod(self._shoal_client, info)
        self.__dict__[name] = made
        return made

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"attribute {name!r} of an actor cannot be set from outside; give it a method that does")

    @property
    def _actor_id(self) -> bytes:
        return self._shoal_client.actor_id

    def __dir__(self) -> list[str]:
        return [*object.__dir__(self), *self._shoal_class.methods]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ActorHandle):
            return NotImplemented
        return self._shoal_client.actor_id == other._shoal_client.actor_id

    def __hash__(self) -> int:
        return hash(self._shoal_client.actor_id)

    def __repr__(self) -> str:
        return f"Actor({self._shoal_class.class_name}, {self._shoal_client.actor_id.hex()})"

    def __reduce__(self) -> tuple[Any, ...]:
        from shoal.objects.serialization import note_ref

        # The runtime sees the client itself: it registers the coming user before the bytes leave this process.
        note_ref(self._shoal_client)
        return _borrow, (*self._shoal_client.location(), self._shoal_class.packed)


ActorProxy = ActorHandle
"""Ray's name for a handle whose methods a type checker knows, which here every handle is."""


def _borrow(actor_id: bytes, home: bytes, weak: bool, packed: bytes) -> ActorHandle[Any]:
    return ActorHandle(_runtime().borrow_actor(actor_id, home, weak), ClassInfo.unpack(packed))


def typed(handle: ActorHandle[T]) -> T:
    """The handle itself, which type checkers take for an instance of the class.

    So methods under `@method` keep their types: `typed(counter).add.remote(1)` is an `ObjectRef[int]`.
    """
    return handle  # type: ignore[return-value]  # that is the point


# ----------------------------------------------------------------------------------------------------------- classes


class ActorClass(Generic[T]):
    """A class whose instances are actors: `Counter.remote(...)` starts one and returns a handle at once."""

    __name__: str
    __qualname__: str

    def __init__(self, cls: type[T], options: Mapping[str, Any]) -> None:
        """`options` are as the user gave them.

        Raises:
            ValueError, TypeError, NotImplementedError: see `check_options`.
        """
        if issubclass(cls, BaseException):
            raise TypeError(f"{cls.__qualname__} is an exception class and cannot be an actor")
        self._options = dict(options)
        self._bind(cls, check_options(ACTOR_OPTIONS, options, where=f"@remote on class {cls.__qualname__}"))

    def _bind(self, cls: type[T], settled: Mapping[str, Any]) -> None:
        self._info, is_async = describe_class(cls, settled)
        methods = {name: info.template for name, info in self._info.methods.items()}
        self._template: ActorTemplate = actor_template(
            cls, methods, settled, is_async=is_async, handle=self._info.packed
        )
        init = cls.__init__
        self._shape = shape_of(init, bound=True) if isinstance(init, FunctionType) else None
        if init is object.__init__ and cls.__new__ is object.__new__:
            self._shape = Shape(0, 0, 0, (), {}, False)
        self._variants: dict[object, ActorClass[T]] = {}
        self.__module__ = cls.__module__
        self.__name__ = cls.__name__
        self.__qualname__ = cls.__qualname__
        self.__doc__ = cls.__doc__
        self.__wrapped__ = cls

    @property
    def _class(self) -> type[T]:
        """The plain class: what the actor is an instance of, and what a test may use."""
        return self._template.cls

    def remote(self, *args: Any, **kwargs: Any) -> ActorHandle[T]:
        """Start an actor. Returns at once: what its constructor raises comes out of the first call.

        Raises:
            TypeError: the arguments do not fit the constructor.
            ActorAlreadyExistsError: the name is taken.
        """
        shape = self._shape
        if shape is not None and not shape.accepts(args, kwargs):
            raise TypeError(f"{qualified_name(self._class)}.remote(): {shape.complaint(args, kwargs)}")
        client, packed = _runtime().create_actor(self._template, args, kwargs)
        # With get_if_exists the actor may be an older one, with other methods.
        info = self._info if packed == self._info.packed else ClassInfo.unpack(packed)
        return ActorHandle(client, info)

    def options(self, **options: Any) -> ActorClass[T]:
        """The same class with other options; those not named stay as they are. The original does not change."""
        key = variant_key(options)
        variant = None if key is None else self._variants.get(key)
        if variant is None:
            check_options(ACTOR_OPTIONS, options, where=f"{qualified_name(self._class)}.options()")
            variant = ActorClass(self._class, {**self._options, **options})
            if key is not None:
                if len(self._variants) >= _MAX_VARIANTS:
                    self._variants.clear()
                self._variants[key] = variant
        return variant

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        name = self.__name__
        raise TypeError(f"an actor class cannot be called directly: write {name}.remote(...), not {name}(...)")

    def __mro_entries__(self, bases: tuple[object, ...]) -> NoReturn:
        raise ActorClassInheritanceException(
            f"{self.__name__} is an actor class and cannot be derived from; derive from the plain class, "
            "and put @remote on the derived one"
        )

    def __repr__(self) -> str:
        return f"ActorClass({self.__name__})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (), (self._class, self._options)

    def __setstate__(self, state: tuple[type[T], dict[str, Any]]) -> None:
        # A class that refers to itself through its methods' globals is half built now: look at it at the first use.
        self.__dict__["_pending"] = state

    def __getattr__(self, name: str) -> Any:
        state = self.__dict__.pop("_pending", None)
        if state is not None:
            cls, self._options = state
            self._bind(cls, check_options(ACTOR_OPTIONS, self._options, where="@remote"))
            return getattr(self, name)
        if name.startswith("__") or "_template" not in self.__dict__:
            raise AttributeError(name)
        if name == "bind":
            raise no_graphs(f"actor class {self.__name__}")
        if hasattr(self._class, name):
            raise AttributeError(
                f"{name!r} of actor class {self.__name__} is reached through a handle: "
                f"{self.__name__}.remote(...).{name}.remote(...)"
            )
        raise AttributeError(f"actor class {self.__name__} has no attribute {name!r}")


def _blank() -> ActorClass[Any]:
    return ActorClass.__new__(ActorClass)


def _runtime() -> Any:
    runtime = slot.current
    if runtime is None:
        from shoal.api.initialize import connect_if_needed

        runtime = connect_if_needed()
    return runtime


def exit_actor() -> NoReturn:
    """Inside an actor: end it on purpose once the current call has returned. It is not restarted.

    Raises:
        TypeError: not called inside an actor.
    """
    runtime = slot.current
    if runtime is None or not runtime.context().actor_id:
        raise TypeError("exit_actor() works only inside an actor")
    runtime.exit_actor()
    raise AssertionError("the runtime's exit_actor() returned")
