"""How values of well-known libraries travel, where their own pickling would copy too much.

numpy, pandas and pyarrow put their data out of band themselves, and only some of their values need help. torch does
not: it writes each tensor through a file format into the pickle, ten times slower than copying it. Here a tensor's
storage is one out-of-band buffer, shared by all tensors of one value that share it.

What comes out of an out-of-band buffer is read-only where the library knows that (numpy, pyarrow, pandas). torch does
not, so a tensor is copied once when it is read, and may be written to. With `SHOAL_ENABLE_ZERO_COPY_TORCH_TENSORS=1` in
the reader's environment it is not copied; whoever writes to it then changes everybody's copy.

The libraries are imported where such a value arrives, and never before.
"""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

COMPACT_BYTES: Final = 64 * 1024
"""A view takes all that it is a view of along, unless that is larger than itself by this and by half."""
ZERO_COPY_VARIABLE: Final = "SHOAL_ENABLE_ZERO_COPY_TORCH_TENSORS"

Memo = dict[Any, Any]
"""What one pickling has met so far: a library's own keys -> the stand-ins that are pickled for them."""


def reduce_array(array: Any, _memo: Memo) -> Any:
    """Help numpy where it would copy the data into the pickle, from which it comes out writable and unaligned."""
    if type(array).__name__ != "ndarray":
        return NotImplemented
    dtype = array.dtype
    if dtype.hasobject:
        return NotImplemented
    if dtype.kind in "mM":  # the buffer protocol has no dates: travel as integers
        return type(array).view, (array.view("i8"), dtype)
    if not array.flags.forc:
        return array.copy().__reduce_ex__(5)
    return NotImplemented


# ---------------------------------------------------------------------------------------------------------------- torch


class _Storage:
    """The memory of tensors; unpickled as a tensor of its bytes."""

    __slots__ = ("content", "owner")

    def __init__(self, owner: Any, content: Any) -> None:
        self.owner = owner  # the memo knows it by its address, so it must live
        self.content = content

    def __reduce__(self) -> tuple[Any, tuple[pickle.PickleBuffer]]:
        return _load_bytes, (pickle.PickleBuffer(self.content),)


def reduce_tensor(tensor: Any, memo: Memo) -> Any:
    """An ordinary tensor in the CPU's memory; all others travel torch's way."""
    torch: Any = sys.modules["torch"]
    if (
        type(tensor) is not torch.Tensor
        or tensor.device.type != "cpu"
        or tensor.layout is not torch.strided
        or tensor.is_quantized
        or tensor.is_conj()
        or tensor.is_neg()
        or tensor.__dict__
        or tensor._backward_hooks
        or not tensor.is_leaf
    ):
        return NotImplemented
    plain = tensor.detach()
    if plain.numel() * plain.element_size() * 2 + COMPACT_BYTES < plain.untyped_storage().nbytes():
        plain = plain.clone()
    storage = plain.untyped_storage()
    stand_in = memo.get(storage.data_ptr())
    if stand_in is None:
        try:
            content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        except (RuntimeError, TypeError):  # torch without numpy; memory that is not really there
            return NotImplemented
        stand_in = memo[storage.data_ptr()] = _Storage(storage, content)
    shape = (plain.storage_offset(), tuple(plain.shape), plain.stride())
    return _load_tensor, (stand_in, tensor.dtype, *shape, tensor.requires_grad)


def _load_bytes(buffer: Any) -> Any:
    torch = import_module("torch")

    view = memoryview(buffer)
    if not view.nbytes:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "not writable"
        shared = torch.frombuffer(view, dtype=torch.uint8)
    return shared if os.environ.get(ZERO_COPY_VARIABLE, "") in ("1", "true") else shared.clone()


def _load_tensor(
    content: Any, dtype: Any, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], requires_grad: bool
) -> Any:
    torch = import_module("torch")
    tensor = torch.empty(0, dtype=dtype).set_(content.untyped_storage(), offset, shape, stride)
    return tensor.requires_grad_() if requires_grad else tensor


# -------------------------------------------------------------------------------------------------------------- pyarrow


def reduce_arrow(value: Any, _memo: Memo) -> Any:
    """A slice of something much larger: pyarrow would send all of it, its stream format sends the slice alone."""
    arrow: Any = sys.modules["pyarrow"]
    try:
        if value.get_total_buffer_size() <= 2 * value.nbytes + COMPACT_BYTES:
            return NotImplemented
        if isinstance(value, arrow.Table):
            table, load = value, _load_table
        elif isinstance(value, arrow.RecordBatch):
            table, load = arrow.Table.from_batches([value]), _load_batch
        elif isinstance(value, arrow.ChunkedArray):
            table, load = arrow.table({"": value}), _load_chunked_array
        elif isinstance(value, arrow.Array):
            table, load = arrow.table({"": arrow.chunked_array([value])}), _load_arrow_array
        else:
            return NotImplemented
        sink = arrow.BufferOutputStream()
        with arrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    except (AttributeError, NotImplementedError, arrow.ArrowException):  # a schema, a scalar; a type without a format
        return NotImplemented
    return load, (pickle.PickleBuffer(sink.getvalue()),)


def _load_table(buffer: Any) -> Any:
    arrow = import_module("pyarrow")
    return arrow.ipc.open_stream(arrow.py_buffer(buffer)).read_all()


def _load_batch(buffer: Any) -> Any:
    return _load_table(buffer).combine_chunks().to_batches()[0]


def _load_chunked_array(buffer: Any) -> Any:
    return _load_table(buffer).column(0)


def _load_arrow_array(buffer: Any) -> Any:
    return _load_table(buffer).column(0).chunk(0)


REDUCERS: Final[dict[str, Callable[[Any, Memo], Any]]] = {
    "numpy": reduce_array,
    "pyarrow.lib": reduce_arrow,
    "torch": reduce_tensor,
}
"""Module of a class -> what to ask for its instances; NotImplemented leaves them to the library."""
