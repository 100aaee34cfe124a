"""A mypy plugin that keeps the types of actors: add `plugins = ["shoal.api.mypy_plugin"]` to mypy's configuration.

Two things cannot be said in annotations. mypy ignores what a class decorator returns, so to it a class under `@remote`
has no `remote`; and no annotation derives the attributes of a handle from those of the class behind it. With the plugin

    @shoal.remote
    class Counter:
        def __init__(self, start: int) -> None: ...
        def add(self, n: int = 1) -> int: ...

gives `Counter.remote("x")` an error, `counter.add.remote(2)` the type `ObjectRef[int]`, and `counter.ad` an error, and
lets a reference be passed for any argument, by keyword too. Nothing of this is loaded when a program runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mypy.expandtype import expand_type_by_instance
from mypy.maptype import map_instance_to_supertype
from mypy.nodes import (
    ARG_STAR,
    ARG_STAR2,
    MDEF,
    Decorator,
    FuncDef,
    OverloadedFuncDef,
    SymbolTableNode,
    TypeInfo,
    Var,
)
from mypy.plugin import AttributeContext, ClassDefContext, MethodContext, MethodSigContext, Plugin
from mypy.typeops import bind_self
from mypy.types import (
    AnyType,
    CallableType,
    FunctionLike,
    Instance,
    Parameters,
    ParamSpecType,
    Type,
    TypeOfAny,
    UnionType,
    UnpackType,
    get_proper_type,
)

REMOTE: Final = "shoal.api.decorator.remote"
ACTOR_CLASS: Final = "shoal.api.actor.ActorClass"
ACTOR_HANDLE: Final = "shoal.api.actor.ActorHandle"
ACTOR_METHOD: Final = "shoal.api.actor.ActorMethod"
TYPED_METHOD: Final = "shoal.api.actor.TypedMethod"
REMOTE_CALL: Final = "shoal.api.remote_call.RemoteCall"
REMOTE_FUNCTION: Final = "shoal.api.remote_function.RemoteFunction"
OBJECT_REF: Final = "shoal.runtime.object_ref.ObjectRef"
_CALLS: Final = {f"{REMOTE_FUNCTION}.remote", f"{ACTOR_METHOD}.remote", f"{REMOTE_CALL}.remote"}
_GENERATORS: Final = {f"typing.{kind}" for kind in ("Iterator", "Generator", "AsyncIterator", "AsyncGenerator")}
_HIDDEN: Final = {"__ray_ready__", "__ray_call__", "__ray_terminate__"}


class ShoalPlugin(Plugin):
    """See the module."""

    def get_class_decorator_hook_2(self, fullname: str) -> Callable[[ClassDefContext], bool] | None:
        return _decorated if fullname == REMOTE else None

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        owner, _, name = fullname.rpartition(".")
        if owner != ACTOR_HANDLE or name.startswith("_shoal") or name == "_actor_id":
            return None
        return lambda context: _handle_attribute(context, name)

    def get_method_hook(self, fullname: str) -> Callable[[MethodContext], Type] | None:
        return _streamed if fullname in _CALLS else None

    def get_method_signature_hook(self, fullname: str) -> Callable[[MethodSigContext], FunctionLike] | None:
        return _actor_class_remote if fullname == f"{ACTOR_CLASS}.remote" else None


def _decorated(context: ClassDefContext) -> bool:
    """Give a class under `@remote` the `remote` and `options` that its ActorClass has."""
    info = context.cls.info
    handle = context.api.named_type_or_none(ACTOR_HANDLE, [Instance(info, [])])
    actor_class = context.api.named_type_or_none(ACTOR_CLASS, [Instance(info, [])])
    function = context.api.named_type_or_none("builtins.function")
    if handle is None or actor_class is None or function is None:
        return False
    anything = AnyType(TypeOfAny.explicit)
    start = _constructor(Instance(info, list(info.defn.type_vars)), handle, function)
    if start is None:
        start = CallableType([anything, anything], [ARG_STAR, ARG_STAR2], [None, None], handle, function)
    reference = context.api.named_type_or_none(OBJECT_REF, [anything])
    if reference is not None:
        start = _with_references(start, reference.type)
    options = CallableType([anything], [ARG_STAR2], ["options"], actor_class, function)
    for name, type_ in (("remote", start), ("options", options)):
        if name in info.names and not info.names[name].plugin_generated:
            continue
        variable = Var(name, type_)
        variable.info = info
        variable._fullname = f"{info.fullname}.{name}"
        variable.is_classvar = variable.is_staticmethod = variable.is_initialized_in_class = True
        info.names[name] = SymbolTableNode(MDEF, variable, plugin_generated=True)
    return True


def _constructor(made: Instance, returns: Type, fallback: Instance) -> CallableType | None:
    init = made.type.get("__init__")
    if init is None or not isinstance(init.node, FuncDef) or not isinstance(init.node.type, CallableType):
        return None
    if init.node.info.fullname == "builtins.object":
        return CallableType([], [], [], returns, fallback)
    signature = expand_type_by_instance(init.node.type, map_instance_to_supertype(made, init.node.info))
    if not signature.arg_types:
        return None
    return signature.copy_modified(
        arg_types=signature.arg_types[1:],
        arg_kinds=signature.arg_kinds[1:],
        arg_names=signature.arg_names[1:],
        ret_type=returns,
        is_bound=True,
    )


def _actor_class_remote(context: MethodSigContext) -> FunctionLike:
    """`ActorClass[T].remote` takes what the constructor of T takes."""
    owner, default = get_proper_type(context.type), context.default_signature
    if not isinstance(owner, Instance) or not owner.args:
        return default
    made = get_proper_type(owner.args[0])
    if not isinstance(made, Instance):
        return default
    start = _constructor(made, default.ret_type, default.fallback)
    reference = _reference(context)
    return default if start is None or reference is None else _with_references(start, reference)


def _handle_attribute(context: AttributeContext, name: str) -> Type:
    """`ActorHandle[T].name` is an ActorMethod with the parameters and result of T's method."""
    owner, default = get_proper_type(context.type), context.default_attr_type
    if not isinstance(owner, Instance) or owner.type.fullname != ACTOR_HANDLE or not owner.args:
        return default
    behind = get_proper_type(owner.args[0])
    if not isinstance(behind, Instance) or name in _HIDDEN or behind.type.fallback_to_any:
        return default
    symbol = behind.type.get(name)
    if symbol is None:
        if behind.type.get("__getattr__") is None:
            context.api.fail(f'Actor "{behind.type.name}" has no method "{name}"', context.context)
        return default
    if isinstance(symbol.node, Var) or (isinstance(symbol.node, Decorator) and symbol.node.var.is_property):
        if not symbol.plugin_generated:
            text = f'"{name}" of actor "{behind.type.name}" is not a method, and not visible from outside'
            context.api.fail(text, context.context)
        return default
    method = _method(symbol.node, behind)
    made = get_proper_type(default)
    reference = _reference(context)
    if method is None or reference is None or not isinstance(made, Instance) or made.type.fullname != ACTOR_METHOD:
        return default
    method = _with_references(method, reference)
    parameters = Parameters(
        method.arg_types, method.arg_kinds, method.arg_names, variables=list(method.variables), is_ellipsis_args=False
    )
    return Instance(made.type, [parameters, _awaited(method.ret_type)])


def _streamed(context: MethodContext) -> Type:
    """A call of a generator gives its items also where an argument is a reference, which the overloads leave out."""
    given = context.default_return_type
    reference = get_proper_type(given)
    if not isinstance(reference, Instance) or reference.type.fullname != OBJECT_REF or not reference.args:
        return given
    result = get_proper_type(reference.args[0])
    if not isinstance(result, Instance) or result.type.fullname not in _GENERATORS:
        return given
    stream = _symbol(context, "shoal.runtime.generators", "ObjectRefGenerator")
    return given if stream is None else Instance(stream, [result.args[0]])


def _method(node: object, behind: Instance) -> CallableType | None:
    """The method as its callers see it, or None when it is nothing simple (overloads, other decorators)."""
    static = False
    if isinstance(node, Decorator):
        static, type_, definer = node.func.is_static, node.var.type, node.func.info
    elif isinstance(node, (FuncDef, OverloadedFuncDef)):
        type_, definer = node.type, node.info
    else:
        return None
    if type_ is not None and behind.type.has_base(definer.fullname):
        # A generic base is seen with the types that the class gives to its variables.
        type_ = expand_type_by_instance(type_, map_instance_to_supertype(behind, definer))
    proper = get_proper_type(type_) if type_ is not None else None
    if (
        isinstance(proper, Instance) and proper.type.fullname == TYPED_METHOD
    ):  # under @method: [self, parameters, result]
        parameters, result = get_proper_type(proper.args[1]), proper.args[2]
        if not isinstance(parameters, Parameters):
            return None
        return CallableType(
            list(parameters.arg_types), parameters.arg_kinds, parameters.arg_names, result, proper, is_bound=True
        )
    if not isinstance(proper, CallableType):
        return None
    if static:
        return proper
    return bind_self(proper, behind) if proper.arg_types else None


def _awaited(result: Type) -> Type:
    """What a coroutine gives: callers of an `async def` method get its result."""
    proper = get_proper_type(result)
    if isinstance(proper, Instance) and proper.type.fullname == "typing.Coroutine" and len(proper.args) == 3:
        return proper.args[2]
    return result


def _reference(context: AttributeContext | MethodSigContext) -> TypeInfo | None:
    return _symbol(context, "shoal.runtime.object_ref", "ObjectRef")


def _symbol(context: AttributeContext | MethodSigContext | MethodContext, module: str, name: str) -> TypeInfo | None:
    node = context.api.modules.get(module)  # type: ignore[attr-defined]  # the checker has it
    symbol = node.names.get(name) if node is not None else None
    return symbol.node if symbol is not None and isinstance(symbol.node, TypeInfo) else None


def _with_references(signature: CallableType, reference: TypeInfo) -> CallableType:
    """Each argument may be a reference to what it wants."""
    arguments: list[Type] = []
    for wanted in signature.arg_types:
        if isinstance(wanted, (UnpackType, ParamSpecType)) or isinstance(get_proper_type(wanted), AnyType):
            arguments.append(wanted)
        else:
            arguments.append(UnionType([wanted, Instance(reference, [wanted])]))
    return signature.copy_modified(arg_types=arguments)


def plugin(version: str) -> type[Plugin]:
    """What mypy asks for."""
    return ShoalPlugin
