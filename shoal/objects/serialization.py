"""Values to flat bytes and back: pickle protocol 5, with large buffers out of band.

The problem: a small value must cost about a microsecond, a large one a single memcpy into the arena and nothing at all
to read, and code typed at a prompt must travel too. The choice: three ways in, one format.

  1. Exact atoms, and small exact tuples, lists and dicts of atoms, hold no references and no code, so the plain C
     pickler takes them. A large `bytes` or `bytearray` is not pickled at all: a few fixed bytes of pickle rebuild it
     from a buffer.
  2. An ordinary numpy array goes through the plain C pickler, its data out of band.
  3. Everything else goes through a cloudpickle pickler whose `reducer_override` has been made cheap for what is common
     (instances of importable classes). cloudpickle is imported when it is first needed.

Rejected: trying the plain pickler first and falling back when its output names `__main__`, which runs user code in
`__reduce__` twice; and a serializer of our own for common types, which would be one more format to keep compatible.

The flat form of a value without out-of-band buffers is its pickle, whose first byte is 0x80. Otherwise:

    0        magic 0x01, three zero bytes, u32 number of buffers n       (all integers little-endian)
    8        u64 length of the pickle
    16       u64 length of each buffer, n times
    16 + 8n  the pickle
    ...      each buffer at the next multiple of 64

Offsets count from the start of the flat form. Arena extents are 64-aligned, so arrays come out aligned for SIMD.

References (and whatever else must be known to travel) report themselves through `note_ref` while they are pickled.
"""

from __future__ import annotations

import copyreg
import pickle
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final

from shoal.exceptions import UnserializableError
from shoal.objects import libraries, loading

if TYPE_CHECKING:
    from typing import Protocol

    class _ValuePickler(Protocol):
        def dump(self, value: object, /) -> None: ...


ALIGNMENT: Final = 64
OUT_OF_BAND_BYTES: Final = 64 * 1024
"""`bytes` and `bytearray` from this size on leave the pickle, so that storing them is one copy."""
UNLOCKED_COPY_BYTES: Final = 1024 * 1024
"""Copies from this size on run without the GIL: 50 us of memcpy, against 4 us for looking up the addresses."""

_PROTOCOL: Final = 5
_MAGIC_PLAIN: Final = 0x80  # the PROTO opcode, with which every pickle of protocol 2 or later begins
_MAGIC_BUFFERS: Final = 0x01
_HEADER: Final = struct.Struct("<B3xIQ")
_SMALL_CONTAINER: Final = 64  # elements; a longer one gains little from the fast path and costs a longer look
_ATOMS: Final = frozenset((type(None), bool, int, float, complex, str, bytes, bytearray))
_BYTES_LIKE: Final = frozenset((bytes, bytearray))

NONE_FLAT: Final = pickle.dumps(None, _PROTOCOL)
"""The flat form of None: what most tasks return."""

# What `pickle` writes for a call of `bytes` (`bytearray`) with the next out-of-band buffer:
# PROTO 5, GLOBAL, NEXT_BUFFER, TUPLE1, REDUCE, STOP.
_FROM_BUFFER: Final[dict[type, bytes]] = {
    kind: b"\x80\x05cbuiltins\n" + kind.__name__.encode() + b"\n\x97\x85R." for kind in _BYTES_LIKE
}


class Serialized:
    """A value ready to travel.

    Attributes:
        pickled: the pickle stream.
        buffers: its out-of-band buffers, one-dimensional contiguous views (format "B") of the value's own memory: until
            they are written, changes of the value show. Empty for most values.
        refs: what called `note_ref` meanwhile, in order; the same object can appear more than once.
    """

    __slots__ = ("buffers", "pickled", "refs")

    def __init__(self, pickled: bytes, buffers: Sequence[memoryview] = (), refs: Sequence[object] = ()) -> None:
        self.pickled = pickled
        self.buffers = buffers
        self.refs = refs

    @property
    def flat_size(self) -> int:
        """Length of the flat form in bytes."""
        if not self.buffers:
            return len(self.pickled)
        end = _HEADER.size + 8 * len(self.buffers) + len(self.pickled)
        for buffer in self.buffers:
            end = _aligned(end) + buffer.nbytes
        return end

    def flatten(self) -> bytes:
        """The flat form in memory of its own. Large values are better off in `write_into`."""
        if not self.buffers:
            return self.pickled
        flat = bytearray(self.flat_size)
        self.write_into(memoryview(flat))
        return bytes(flat)

    def write_into(self, target: memoryview) -> None:
        """Write the flat form; copies of `UNLOCKED_COPY_BYTES` or more run without the GIL.

        Args:
            target: writable, contiguous, exactly `flat_size` bytes; 64-aligned where arrays are to be.
        Raises:
            ValueError: `target` has another size.
        """
        if target.nbytes != self.flat_size:
            raise ValueError(f"the value takes {self.flat_size} bytes and the target has {target.nbytes}")
        if target.format != "B" or target.ndim != 1:
            target = target.cast("B")
        if not self.buffers:
            copy_bytes(target, self.pickled)
            return
        _HEADER.pack_into(target, 0, _MAGIC_BUFFERS, len(self.buffers), len(self.pickled))
        struct.pack_into(f"<{len(self.buffers)}Q", target, _HEADER.size, *[buffer.nbytes for buffer in self.buffers])
        start = _HEADER.size + 8 * len(self.buffers)
        end = start + len(self.pickled)
        copy_bytes(target[start:end], self.pickled)
        for buffer in self.buffers:
            start = _aligned(end)
            target[end:start] = _PADDING[: start - end]
            end = start + buffer.nbytes
            copy_bytes(target[start:end], buffer)


_PADDING: Final = bytes(ALIGNMENT)
_NONE: Final = Serialized(NONE_FLAT)


def _aligned(offset: int) -> int:
    return (offset + ALIGNMENT - 1) & -ALIGNMENT


def copy_bytes(target: memoryview, source: bytes | memoryview) -> None:
    """Copy `source` into `target` at the speed of memcpy, without the GIL when it is large.

    Other threads run meanwhile: one that changes the source gets a mixture copied.

    Args:
        target: writable, one-dimensional, contiguous, format "B".
        source: contiguous bytes of the same length.
    """
    if len(source) < UNLOCKED_COPY_BYTES:
        target[:] = source
        return
    if len(source) != len(target):
        raise ValueError(f"{len(source)} bytes do not fit into {len(target)}")
    from shoal.objects.memory import copy_unlocked

    copy_unlocked(target, source)


# -------------------------------------------------------------------------------------------------------- references


class _Context(threading.local):
    """What the serialization that runs in this thread has met; None when none runs."""

    refs: list[object] | None = None


_context: Final = _Context()


def note_ref(ref: object) -> bool:
    """Report, from inside `__reduce__`, that `ref` is being pickled.

    Returns:
        True when a `serialize` of this thread took note: its caller now answers for the reference. False when somebody
        else pickles, whose bytes nobody counts.
    """
    refs = _context.refs
    if refs is None:
        return False
    refs.append(ref)
    return True


# ------------------------------------------------------------------------------------------------- custom serializers

_reducers: Final[dict[type, Callable[[Any], Any]]] = {}
"""How to reduce exact types that pickle cannot or should not: cloudpickle's own (once it is loaded) and users'."""
_replaced: Final[dict[type, Callable[[Any], Any] | None]] = {}
"""The types that users registered -> what `_reducers` had for them before."""
_registered: Final[dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]]] = {}
"""The same types -> (serializer, deserializer)."""


def register_serializer(cls: type, serializer: Callable[[Any], Any], deserializer: Callable[[Any], Any]) -> None:
    """From now on instances of exactly `cls` travel, from this process, as `serializer(instance)` and come back as
    `deserializer(that)`. The deserializer is sent along, so the other side needs no registration; workers are told of
    it with the code that they get (`with_serializers`).

    Raises:
        TypeError: `cls` is no class, or one that pickle never asks about (int, str, list ...).
    """
    if not isinstance(cls, type):
        raise TypeError(f"register_serializer needs a class, not {cls!r}")
    if cls in _ATOMS or cls in (tuple, list, dict, set, frozenset, type, FunctionType):
        raise TypeError(f"{cls.__name__} is always pickled natively; register a subclass or a wrapper instead")
    preload()

    def reduce(value: Any) -> tuple[Any, tuple[Any]]:
        return deserializer, (serializer(value),)

    if cls not in _replaced:
        _replaced[cls] = _reducers.get(cls)
    _reducers[cls] = reduce
    _registered[cls] = (serializer, deserializer)


def deregister_serializer(cls: type) -> None:
    """Undo `register_serializer`; nothing happens when there was none."""
    if cls not in _replaced:
        return
    before = _replaced.pop(cls)
    del _registered[cls]
    if before is None:
        del _reducers[cls]
    else:
        _reducers[cls] = before


class _CodeWithSerializers:
    """Unpickles as the code it was made with, after registering what this process had registered."""

    def __init__(self, code: object) -> None:
        self._code = code
        self._registered = [(cls, *functions) for cls, functions in _registered.items()]

    def __reduce__(self) -> tuple[Any, ...]:
        return _register_and_give, (self._registered, self._code)


def _register_and_give(registered: list[tuple[Any, Any, Any]], code: object) -> object:
    for cls, serializer, deserializer in registered:
        register_serializer(cls, serializer, deserializer)
    return code


def with_serializers(code: object) -> object:
    """What to pickle in place of a function or class, so that whoever runs it knows this process's registrations."""
    return _CodeWithSerializers(code) if _registered else code


# ---------------------------------------------------------------------------------------------------- the general way

_Sink = Callable[[bytes], object]
_make_pickler: Callable[[Any, Callable[[pickle.PickleBuffer], bool]], _ValuePickler] | None = None


class _Chunks:
    """A file for the C pickler: large pieces arrive as the very objects that were pickled, and are not copied twice."""

    __slots__ = ("pieces", "write")

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.write: _Sink = self.pieces.append


def preload() -> None:
    """Import what the general way needs, so that the first value does not wait for it (10 to 20 ms)."""
    if _make_pickler is None:
        _define_pickler()


def _define_pickler() -> Callable[[Any, Callable[[pickle.PickleBuffer], bool]], _ValuePickler]:
    global _make_pickler
    import cloudpickle
    from cloudpickle import cloudpickle as internals

    base: type[Any] = cloudpickle.Pickler
    base_reducer_override = base.reducer_override
    # A live set, looked at for every class; without it (another cloudpickle) each class takes cloudpickle's own way.
    by_value_modules = getattr(internals, "_PICKLE_BY_VALUE_MODULES", frozenset(("unknown",)))
    for cls, reducer in base.dispatch_table.items():
        if copyreg.dispatch_table.get(cls) is not reducer:
            _reducers.setdefault(cls, reducer)
    get_reducer = _reducers.get
    get_foreign_reducer = libraries.REDUCERS.get
    modules = sys.modules

    class ValuePickler(base):  # type: ignore[misc] # its base is imported late, so it is `Any` for the checker
        # An exact dict is several times faster to miss in than cloudpickle's ChainMap, whose own entries we look up in
        # `reducer_override`, where the pickler comes anyway.
        dispatch_table = copyreg.dispatch_table

        def reducer_override(self, value: Any) -> Any:
            cls = type(value)
            reducer = get_reducer(cls)
            if reducer is not None:
                return reducer(value)
            if cls is FunctionType or issubclass(cls, type):
                name = value.__module__
                if name != "__main__" and not by_value_modules:
                    module = modules.get(name)
                    if module is not None and getattr(module, value.__qualname__, None) is value:
                        return NotImplemented  # importable by name, as the plain pickler will find as well
                return base_reducer_override(self, value)
            reduce_foreign = get_foreign_reducer(cls.__module__)
            if reduce_foreign is not None:
                return reduce_foreign(value, self.__dict__.setdefault("stand_ins", {}))
            return NotImplemented

    def make(file: Any, buffer_callback: Callable[[pickle.PickleBuffer], bool]) -> _ValuePickler:
        return ValuePickler(file, _PROTOCOL, buffer_callback)

    _make_pickler = make
    return make


def pickle_anything(value: object) -> tuple[bytes, list[memoryview], list[object]]:
    """The general way, without the fast paths and without explanations: what it raises is what pickling raised.

    Returns: (pickle, out-of-band buffers, references met).
    """
    make = _make_pickler or _define_pickler()
    chunks = _Chunks()
    buffers: list[memoryview] = []

    def take_buffer(buffer: pickle.PickleBuffer) -> bool:
        try:
            buffers.append(buffer.raw())
        except BufferError:  # not contiguous
            return True  # into the pickle with it
        return False

    outer = _context.refs  # a `__reduce__` may serialize in turn
    refs: list[object] = []
    _context.refs = refs
    try:
        make(chunks, take_buffer).dump(value)
    finally:
        _context.refs = outer
    return b"".join(chunks.pieces), buffers, refs


# ---------------------------------------------------------------------------------------------------------- the doors


def serialize(value: Any, what: str | None = None) -> Serialized:
    """Make `value` ready to travel.

    Args:
        what: what the value is, for the error ("argument 2 of f"); "value" when not given.
    Raises:
        UnserializableError: names the part that cannot be pickled and where it sits.
    """
    if value is None:
        return _NONE
    kind = type(value)
    if kind in _ATOMS:
        if kind in _BYTES_LIKE and len(value) >= OUT_OF_BAND_BYTES:
            return Serialized(_FROM_BUFFER[kind], (memoryview(value),))
        return Serialized(pickle.dumps(value, _PROTOCOL))
    if kind is tuple or kind is list:
        if len(value) <= _SMALL_CONTAINER and _ATOMS.issuperset(map(type, value)):
            return _serialize_atoms(value, value)
    elif kind is dict:
        if len(value) <= _SMALL_CONTAINER and _ATOMS.issuperset(map(type, chain(value, value.values()))):
            return _serialize_atoms(value, value.values())
    elif kind.__module__ == "numpy":
        fast = _serialize_array(value)
        if fast is not None:
            return fast
    try:
        return Serialized(*pickle_anything(value))
    except (MemoryError, UnserializableError):
        raise
    except Exception as exc:  # the boundary to users' `__reduce__` and `__getstate__`
        from shoal.objects.diagnose import explain

        raise explain(value, exc, what or "value", pickle_anything) from exc


def _serialize_atoms(container: Any, values: Iterable[Any]) -> Serialized:
    for item in values:
        if type(item) in _BYTES_LIKE and len(item) >= OUT_OF_BAND_BYTES:
            break
    else:
        return Serialized(pickle.dumps(container, _PROTOCOL))
    # Nothing in it can refer back to the container, so stand-ins for the large ones change no identities that matter.
    items: Any
    if type(container) is dict:
        items = {key: _stand_in(item) for key, item in container.items()}
    else:
        items = type(container)(map(_stand_in, container))
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(items, _PROTOCOL, buffer_callback=buffers.append)
    return Serialized(pickled, [buffer.raw() for buffer in buffers])


class _OutOfBand:
    """Pickles as a `bytes` or `bytearray` whose content is an out-of-band buffer."""

    __slots__ = ("content",)

    def __init__(self, content: bytes | bytearray) -> None:
        self.content = content

    def __reduce__(self) -> tuple[type, tuple[pickle.PickleBuffer]]:
        return type(self.content), (pickle.PickleBuffer(self.content),)


def _stand_in(item: Any) -> Any:
    return _OutOfBand(item) if type(item) in _BYTES_LIKE and len(item) >= OUT_OF_BAND_BYTES else item


def _serialize_array(value: Any) -> Serialized | None:
    """The plain pickler's result for an exact ndarray that it puts out of band; None for all else."""
    numpy = sys.modules.get("numpy")
    if numpy is None or type(value) is not numpy.ndarray or type(value) in _replaced:
        return None
    dtype = value.dtype
    if dtype.kind not in "biufcSU" or dtype.metadata is not None or not value.flags.forc:
        return None
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(value, _PROTOCOL, buffer_callback=buffers.append)
    return Serialized(pickled, [buffer.raw() for buffer in buffers])


def deserialize(flat: bytes | memoryview) -> Any:
    """Rebuild a value from its flat form without copying its buffers.

    Args:
        flat: the flat form; bytes after its end are ignored when it has out-of-band buffers. Kept alive by the value
            as long as the value uses it.
    Returns:
        The value. What it was given as out-of-band buffers is read-only; `bytes` and `bytearray` are copies.
    Raises:
        ValueError: these bytes are no flat form, or not all of it.
        Exception: what unpickling raises (a module that this node does not have, for one), with a note on what it was.
    """
    if not flat:
        raise ValueError("no bytes to deserialize")
    if type(flat) is not bytes:
        flat = memoryview(flat)
        if flat.format != "B" or flat.ndim != 1:
            flat = flat.cast("B")
    if flat[0] == _MAGIC_PLAIN:
        try:
            return pickle.loads(flat)  # noqa: S301 # only authenticated peers get this far
        except Exception as exc:
            loading.add_culprit(exc, flat, ())
            raise
    if flat[0] != _MAGIC_BUFFERS:
        raise ValueError(f"not a serialized value: it begins with byte {flat[0]:#04x}")
    view = memoryview(flat).toreadonly()
    size = len(view)
    if size < _HEADER.size:
        raise ValueError(f"a serialized value was cut off after {size} bytes")
    _, count, pickle_bytes = _HEADER.unpack_from(view)
    start = _HEADER.size + 8 * count
    end = start + pickle_bytes
    if size < end:
        raise ValueError(f"a serialized value was cut off after {size} bytes; its pickle ends at {end}")
    stream = view[start:end]
    buffers: list[memoryview] = []
    for length in struct.unpack_from(f"<{count}Q", view, _HEADER.size):
        start = _aligned(end)
        end = start + length
        buffers.append(view[start:end])
    if size < end:
        raise ValueError(f"a serialized value was cut off after {size} bytes; it has {end}")
    try:
        return pickle.loads(stream, buffers=buffers)  # noqa: S301 # as above
    except Exception as exc:
        loading.add_culprit(exc, stream, buffers)
        raise
