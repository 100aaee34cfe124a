"""What `@remote(...)`, `.options(...)` and `@method(...)` accept, and what they mean.

Each option is one row in a table: who may use it, and a check that returns the value in its settled form or raises.
Options are checked where they are written, and turned into a template at once, so that a call pays nothing for them.
An option that Ray has and shoal does not have yet is a row too: its default passes, anything else says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

from shoal.api.placement_group import PlacementGroup, check_fits
from shoal.api.signatures import ASYNC_GENERATOR, COROUTINE, GENERATOR, code_flags
from shoal.api.strategies import (
    PlacementGroupSchedulingStrategy,
    in_group,
    place,
    to_fallbacks,
    to_selector,
    to_strategy,
)
from shoal.api.words import did_you_mean, not_supported
from shoal.runtime.interface import ActorRules, ActorTemplate, MethodTemplate, StreamOptions, TaskTemplate
from shoal.runtime.messages import STREAMED
from shoal.scheduling.bundle_names import parse_name
from shoal.scheduling.resources import to_amounts
from shoal.scheduling.views import Amounts, Strategy

Check = Callable[[str, Any], Any]

DEFAULT_MAX_RETRIES: Final = 3
MAX_RETURNS: Final = 1_000_000
MAX_PRIORITY: Final = 1_000_000
STREAMING: Final = "streaming"
DYNAMIC: Final = "dynamic"
_ACCELERATOR_SHARE: Final = 0.001  # of `accelerator_type:<T>`, which every node of that type has 1 of


def _wrong(name: str, wanted: str, value: Any) -> NoReturn:
    raise TypeError(f"option {name!r} is {wanted}, not {value!r} of type {type(value).__name__}")


def _amount(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _wrong(name, "a number", value)
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"option {name!r} is a number that is 0 or more, not {value!r}")
    to_amounts({name: value})  # finer than the scheduler counts, or more than it can count
    return value


def _resources(name: str, value: Any) -> dict[str, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        _wrong(name, "a dict of resource names to amounts", value)
    for key in value:
        if key in ("CPU", "GPU"):
            raise ValueError(f"option 'resources' cannot have {key!r}; use num_{key.lower()}s={value[key]!r} instead")
        if key == "memory":
            raise ValueError(f"option 'resources' cannot have 'memory'; use memory={value[key]!r} (bytes) instead")
        if key == "object_store_memory":
            raise ValueError("option 'resources' cannot have 'object_store_memory'; tasks and actors do not reserve it")
        if isinstance(key, str) and parse_name(key) is not None:
            raise ValueError(
                f"option 'resources' cannot have {key!r}, a part of a placement group; "
                "use scheduling_strategy=PlacementGroupSchedulingStrategy(...)"
            )
    to_amounts(value)
    return dict(value)


def _text(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        _wrong(name, "a string or None", value)
    if value == "":
        raise ValueError(f"option {name!r} is a string that is not empty, or None")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        _wrong(name, "True or False", value)
    return value


def _optional_flag(name: str, value: Any) -> bool | None:
    return None if value is None else _flag(name, value)


def _seconds(name: str, value: Any) -> float:
    """0.0 for None."""
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _wrong(name, "a number of seconds, or None", value)
    if not 0 < value < math.inf:
        raise ValueError(f"option {name!r} is a number of seconds above 0, or None for no limit, not {value!r}")
    return float(value)


def _whole(least: int, meaning: str, most: int = 2**31 - 1) -> Check:
    def check(name: str, value: Any) -> int | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            _wrong(name, "a whole number", value)
        if not least <= value <= most:
            raise ValueError(f"option {name!r} is {meaning}, not {value}")
        return value

    return check


def _num_returns(name: str, value: Any) -> int | str | None:
    if isinstance(value, str):
        if value in (STREAMING, DYNAMIC):
            return value
        raise ValueError(f"option 'num_returns' is a whole number, {STREAMING!r} or {DYNAMIC!r}, not {value!r}")
    settled: int | None = _whole(0, f"between 0 and {MAX_RETURNS}", MAX_RETURNS)(name, value)
    return settled


def _backpressure(name: str, value: Any) -> int | None:
    """0: no limit. None: what the actor says."""
    if value == -1 and type(value) is int:
        return 0
    settled: int | None = _whole(1, "1 or more, or -1 for no limit")(name, value)
    return settled


def _retry_exceptions(name: str, value: Any) -> bool | tuple[type[BaseException], ...]:
    if value is None or isinstance(value, bool):
        return bool(value)
    if not isinstance(value, (list, tuple)):
        _wrong(name, "True, False or a list of exception classes", value)
    for item in value:
        if not (isinstance(item, type) and issubclass(item, BaseException)):
            raise TypeError(f"option 'retry_exceptions' lists exception classes, {item!r} is not one")
    return tuple(value)


def _groups(name: str, value: Any) -> dict[str, int]:
    if value is None or (isinstance(value, list) and not value):
        return {}
    if not isinstance(value, Mapping):
        _wrong(name, "a dict of names to how many calls run at a time", value)
    for group, size in value.items():
        if not isinstance(group, str) or not group:
            raise TypeError(f"option {name!r} has a name that is not a string, or empty: {group!r}")
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"option {name!r}: the size of {group!r} is a whole number, not {size!r}")
        if not 1 <= size < 2**31:
            raise ValueError(f"option {name!r}: the size of {group!r} is 1 or more, not {size}")
    return dict(value)


def _max_pending(name: str, value: Any) -> int:
    if value is None or (type(value) is int and value == -1):
        return -1
    return int(_whole(1, "-1 (no limit), 1 or more")(name, value) or -1)


def _lifetime(name: str, value: Any) -> str | None:
    if value not in (None, "detached", "non_detached"):
        raise ValueError(f"option 'lifetime' is None, 'detached' or 'non_detached', not {value!r}")
    settled: str | None = value
    return settled


def _strategy(name: str, value: Any) -> Any:
    to_strategy(value)
    return value


def _priority(name: str, value: Any) -> int | None:
    settled: int | None = _whole(-MAX_PRIORITY, f"between {-MAX_PRIORITY} and {MAX_PRIORITY}", MAX_PRIORITY)(
        name, value
    )
    return settled


def _placement_group(name: str, value: Any) -> Any:
    if value is not None and value != "default" and not isinstance(value, PlacementGroup):
        _wrong(name, "what placement_group() returned, 'default' or None", value)
    return value


def _runtime_env(name: str, value: Any) -> dict[str, str]:
    return check_runtime_env(value)


def _later(*neutral: Any) -> Check:
    """A row for an option that works only at its default so far."""

    def check(name: str, value: Any) -> None:
        if not any(value is one or (type(value) is type(one) and value == one) for one in neutral):
            raise not_supported(f"option {name!r}")

    return check


_RUNTIME_ENV_KEYS: Final = (
    "working_dir", "py_modules", "excludes", "pip", "uv", "conda", "env_vars", "py_executable", "image_uri",
    "container", "worker_process_setup_hook", "nsight", "rocprof_sys", "config", "mpi", "java_jars", "plugins",
)  # fmt: skip


def check_runtime_env(value: Any) -> dict[str, str]:
    """The environment variables of a runtime_env, the only part of it that exists so far.

    Raises:
        TypeError, ValueError: not a dict of known keys. NotImplementedError: a key that Ray has and shoal has not yet.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"runtime_env is a dict, not {type(value).__name__}")
    for key, part in value.items():
        if key not in _RUNTIME_ENV_KEYS:
            known = ", ".join(_RUNTIME_ENV_KEYS)
            raise ValueError(
                f"runtime_env has no key {key!r}.{did_you_mean(str(key), _RUNTIME_ENV_KEYS)} It knows {known}"
            )
        if key not in ("env_vars", "config") and part:
            raise not_supported(f"runtime_env[{key!r}]", "only env_vars is")
    env_vars = value.get("env_vars") or {}
    if not isinstance(env_vars, Mapping):
        raise TypeError(f"runtime_env['env_vars'] is a dict of strings to strings, not {type(env_vars).__name__}")
    for key, part in env_vars.items():
        if not isinstance(key, str) or not isinstance(part, str):
            raise TypeError(
                f"runtime_env['env_vars'] is a dict of strings to strings; {key!r}: {part!r} is not; quote the value"
            )
        if not key or "=" in key or "\0" in key + part:
            raise ValueError(f"runtime_env['env_vars'] has a name or value that no environment can hold: {key!r}")
    return dict(env_vars)


_BOTH: Final[Mapping[str, Check]] = {
    "num_cpus": _amount,
    "num_gpus": _amount,
    "memory": _amount,
    "resources": _resources,
    "accelerator_type": _text,
    "name": _text,
    "runtime_env": _runtime_env,
    "scheduling_strategy": _strategy,
    "enable_task_events": _flag,
    "label_selector": to_selector,
    "fallback_strategy": to_fallbacks,
    "priority": _priority,
    "placement_group": _placement_group,
    "placement_group_bundle_index": _whole(-1, "-1 (any bundle) or the number of one"),
    "placement_group_capture_child_tasks": _optional_flag,
    "_labels": _later(None, {}),
}

_STREAM: Final[Mapping[str, Check]] = {
    "_generator_backpressure_num_objects": _backpressure,
    "_num_objects_per_yield": _whole(1, "1 or more"),
}

TASK_OPTIONS: Final[Mapping[str, Check]] = {
    **_BOTH,
    "num_returns": _num_returns,
    "max_calls": _whole(0, "0 (no limit) or more"),
    "max_retries": _whole(-1, "-1 (no limit), 0 or more"),
    "retry_exceptions": _retry_exceptions,
    "timeout_s": _seconds,
    **_STREAM,
}

ACTOR_OPTIONS: Final[Mapping[str, Check]] = {
    **_BOTH,
    "lifetime": _lifetime,
    "namespace": _text,
    "get_if_exists": _flag,
    "max_restarts": _whole(-1, "-1 (no limit), 0 or more"),
    "max_task_retries": _whole(-1, "-1 (no limit), 0 or more"),
    "max_concurrency": _whole(1, "1 or more"),
    "max_pending_calls": _max_pending,
    "concurrency_groups": _groups,
    "allow_out_of_order_execution": _optional_flag,
    "object_store_memory": _later(None, 0),
    "enable_tensor_transport": _later(None, False),
    "_actor_generator_backpressure_num_objects": _backpressure,
}

METHOD_OPTIONS: Final[Mapping[str, Check]] = {
    "num_returns": _num_returns,
    "max_task_retries": _whole(-1, "-1 (no limit), 0 or more"),
    "retry_exceptions": _retry_exceptions,
    "timeout_s": _seconds,
    "enable_task_events": _flag,
    "concurrency_group": _text,
    "tensor_transport": _later(None, "object_store"),
    **_STREAM,
}

CALL_OPTIONS: Final[Mapping[str, Check]] = {**METHOD_OPTIONS, "name": _text, "_labels": _later(None, {})}

# Set once, in the decorator: they belong to the code, not to a call.
_DECORATOR_ONLY: Final = {"max_calls", "concurrency_groups"}


def check_options(table: Mapping[str, Check], given: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Every option in its settled form.

    Args:
        where: how the user wrote it, for the message: "@remote on a task", "Counter.options()".
    Raises:
        ValueError: an option that the table does not have, or a value out of range. TypeError: a value of a wrong type.
        NotImplementedError: one that shoal does not have yet.
    """
    settled: dict[str, Any] = {}
    for name, value in given.items():
        check = table.get(name)
        if check is None:
            other = " (it is an option of actors)" if name in ACTOR_OPTIONS else ""
            other = other or (" (it is an option of tasks)" if name in TASK_OPTIONS else "")
            known = ", ".join(sorted(option for option in table if not option.startswith("_")))
            hint = did_you_mean(name, table)
            raise ValueError(f"{where}: there is no option {name!r} here{other}.{hint} It knows {known}")
        if name in _DECORATOR_ONLY and where.endswith("options()"):
            raise ValueError(f"{where}: {name!r} can be set only in the decorator")
        settled[name] = check(name, value)
    return settled


def variant_key(given: Mapping[str, Any]) -> object | None:
    """Something hashable that is equal for equal options, or None: then no variant is remembered."""
    key = []
    for name, value in sorted(given.items()):
        if isinstance(value, Mapping):
            value = tuple(value.items())
        elif isinstance(value, list):
            value = tuple(value)
        key.append((name, type(value), value))
    result = tuple(key)
    try:
        hash(result)
    except TypeError:
        return None
    return result


def _amounts(options: Mapping[str, Any], *, cpus: float) -> Amounts:
    """All resources of one task or actor; `cpus` when num_cpus was not given."""
    wanted: dict[str, float] = dict(options.get("resources") or {})
    num_cpus = options.get("num_cpus")
    wanted["CPU"] = cpus if num_cpus is None else num_cpus
    wanted["GPU"] = options.get("num_gpus") or 0
    wanted["memory"] = options.get("memory") or 0
    if options.get("accelerator_type"):
        wanted[f"accelerator_type:{options['accelerator_type']}"] = _ACCELERATOR_SHARE
    return to_amounts({name: amount for name, amount in wanted.items() if amount})


def _where(options: Mapping[str, Any], needs: Amounts) -> tuple[Strategy, bool]:
    """The strategy, and whether it is inherited: nothing was said, so a placement group that captures does.

    Raises:
        ValueError: options that contradict each other, or no bundle of the group could ever hold `needs`.
    """
    chosen = options.get("scheduling_strategy")
    group, index = options.get("placement_group", "default"), _or(options.get("placement_group_bundle_index"), -1)
    if isinstance(group, PlacementGroup) and not group.is_empty:
        if chosen is not None:
            raise ValueError("give scheduling_strategy or placement_group, not both; the second one is deprecated")
        strategy = in_group(group, index, options.get("placement_group_capture_child_tasks"))
    elif index >= 0:
        raise ValueError(f"placement_group_bundle_index={index} needs placement_group=..., which has the bundle")
    elif isinstance(chosen, PlacementGroupSchedulingStrategy):
        group, strategy = chosen.placement_group, to_strategy(chosen)
    else:
        strategy = place(to_strategy(chosen), options)
        return strategy, chosen is None and group == "default" and not strategy.labels
    check_fits(group, strategy.bundle, needs)
    return place(strategy, options), False


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def returns_of(
    options: Mapping[str, Any], default: int | str, before: StreamOptions = StreamOptions()
) -> tuple[int, StreamOptions | None]:
    """What the checked `options` say of the results of a call: `num_returns`, and how they stream when they do.

    Args:
        default: num_returns where the options have none. before: the same for what is said of streams.
    """
    wanted = _or(options.get("num_returns"), default)
    if wanted not in (STREAMING, DYNAMIC):
        return wanted, None
    limit = _or(options.get("_generator_backpressure_num_objects"), before.limit)
    per_yield = _or(options.get("_num_objects_per_yield"), before.per_yield)
    dynamic = wanted == DYNAMIC
    return STREAMED, StreamOptions(0 if dynamic else limit, per_yield, dynamic)


def default_returns(function: object) -> int | str:
    """The num_returns of a function that does not say."""
    return STREAMING if code_flags(function) & (GENERATOR | ASYNC_GENERATOR) else 1


def task_template(function: Callable[..., Any], options: Mapping[str, Any]) -> TaskTemplate:
    """Settle the checked `options` of a remote function."""
    label = qualified_name(function)
    num_returns, stream = returns_of(options, default_returns(function))
    max_calls = _or(options.get("max_calls"), 1 if options.get("num_gpus") else 0)
    resources = _amounts(options, cpus=1)
    strategy, inherits = _where(options, resources)
    return TaskTemplate(
        function,
        name=options.get("name") or label,
        num_returns=num_returns,
        stream=stream,
        resources=resources,
        strategy=strategy,
        inherits=inherits,
        priority=options.get("priority"),
        max_retries=_or(options.get("max_retries"), DEFAULT_MAX_RETRIES),
        retry_exceptions=options.get("retry_exceptions", False),
        max_calls=max_calls,
        timeout_s=options.get("timeout_s") or 0.0,
        env_vars=options.get("runtime_env"),
    )


def actor_rules(options: Mapping[str, Any], *, is_async: bool) -> ActorRules:
    """What callers of an actor keep to, from its checked `options`.

    Raises:
        ValueError: options that contradict each other.
    """
    any_order = is_async or _or(options.get("max_concurrency"), 1) > 1
    if any_order and options.get("allow_out_of_order_execution") is False:
        raise ValueError("an actor that runs several calls at a time cannot keep their order: leave it unset, or True")
    return ActorRules(
        any_order or bool(options.get("allow_out_of_order_execution")), options.get("max_pending_calls", -1)
    )


def actor_template(
    cls: type, methods: Mapping[str, MethodTemplate], options: Mapping[str, Any], *, is_async: bool, handle: bytes
) -> ActorTemplate:
    """Settle the checked `options` of an actor class.

    Raises:
        ValueError: options that contradict each other.
    """
    if options.get("get_if_exists") and not options.get("name"):
        raise ValueError("get_if_exists=True needs a name to look for; give name=...")
    asked = any(options.get(name) is not None for name in ("num_cpus", "num_gpus", "memory", "accelerator_type"))
    asked = asked or bool(options.get("resources"))
    # An actor that asks for nothing needs a CPU to be placed, which keeps thousands of them off one node, but holds
    # none, so that idle actors do not block tasks.
    resources = _amounts(options, cpus=1) if asked else {}
    placement = resources if asked else to_amounts({"CPU": 1})
    lifetime = options.get("lifetime")
    strategy, inherits = _where(options, resources)
    return ActorTemplate(
        cls,
        methods=methods,
        resources=resources,
        placement=placement,
        strategy=strategy,
        inherits=inherits,
        priority=options.get("priority"),
        name=options.get("name"),
        namespace=options.get("namespace"),
        detached=None if lifetime is None else lifetime == "detached",
        get_if_exists=bool(options.get("get_if_exists")),
        max_restarts=_or(options.get("max_restarts"), 0),
        max_task_retries=_or(options.get("max_task_retries"), 0),
        max_concurrency=_or(options.get("max_concurrency"), 0),
        groups=options.get("concurrency_groups"),
        rules=actor_rules(options, is_async=is_async),
        is_async=is_async,
        env_vars=options.get("runtime_env"),
        handle=handle,
    )


def check_task_function(function: Callable[..., Any]) -> None:
    """Raises: ValueError: the function cannot be a task as it is written."""
    if code_flags(function) & (COROUTINE | ASYNC_GENERATOR):
        label = qualified_name(function)
        raise ValueError(
            f"{label} is an 'async def' function, which cannot be a task; use an async actor, "
            "or a plain function that calls asyncio.run()"
        )


def qualified_name(function: object) -> str:
    """For people: "Outer.inner", without the "<locals>" that says nothing."""
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", None) or type(function).__qualname__
    return str(name).replace("<locals>.", "")
