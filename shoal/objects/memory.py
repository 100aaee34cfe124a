"""Raw memory, for the few things Python has no words for: copies and page population without the GIL.

Kept apart because it needs ctypes (some milliseconds to import), which a process that never handles a large value
spares itself. Addresses are only ever taken of buffers that are held meanwhile.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE_BYTES: Final = mmap.PAGESIZE

MADV_POPULATE_READ: Final = 22  # Linux 5.14 and later
MADV_POPULATE_WRITE: Final = 23


class _PyBuffer(ctypes.Structure):
    """`Py_buffer` of the stable ABI (Python 3.11 and later)."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)
_get_buffer.restype = ctypes.c_int
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_PyBuffer),)
_release_buffer.restype = None

_libc = ctypes.CDLL(None, use_errno=True)
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_madvise.restype = ctypes.c_int


@contextmanager
def address_of(buffer: bytes | bytearray | memoryview | mmap.mmap) -> Iterator[int]:
    """The address of a contiguous buffer, read-only ones included, valid inside the `with`.

    Raises:
        BufferError: it is not contiguous.
    """
    held = _PyBuffer()
    _get_buffer(buffer, ctypes.byref(held), 0)  # PyBUF_SIMPLE; a failure comes back as the exception that it set
    try:
        yield held.buf or 0
    finally:
        _release_buffer(ctypes.byref(held))


def copy_unlocked(target: memoryview, source: bytes | memoryview) -> None:
    """memcpy without the GIL. The buffers have equal length (the caller has looked) and do not overlap."""
    with address_of(target) as to, address_of(source) as origin:
        ctypes.memmove(to, origin, len(source))


def populate(address: int, size: int, advice: int) -> bool:
    """Have the kernel map the pages of [address, address + size), page-aligned, now and in one go, without the GIL.

    Args:
        advice: `MADV_POPULATE_WRITE` makes pages that nobody has touched ready for writing; `MADV_POPULATE_READ` maps
            pages that exist several at a time.

    Returns:
        False when this kernel does not know how (before Linux 5.14).
    Raises:
        OSError: the kernel could not, for lack of memory for one.
    """
    if _madvise(address, size, advice) == 0:
        return True
    code = ctypes.get_errno()
    if code == 22:  # EINVAL
        return False
    raise OSError(code, f"cannot populate {size} bytes of shared memory: {os.strerror(code)}")
