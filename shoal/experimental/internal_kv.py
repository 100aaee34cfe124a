"""The head's key-value store: small facts that all processes of a cluster share.

Keys and values are bytes (text is encoded as UTF-8). A namespace is a store of its own; it has nothing to do with the
namespaces of actors. Values stay until they are deleted or the cluster ends, and are bounded in size and in sum: large
data belongs into `put`, and its reference in here.
"""

from __future__ import annotations

from shoal.api.initialize import connected
from shoal.runtime import slot

__all__ = [
    "_internal_kv_del",
    "_internal_kv_exists",
    "_internal_kv_get",
    "_internal_kv_initialized",
    "_internal_kv_list",
    "_internal_kv_put",
]


def _internal_kv_initialized() -> bool:
    """Whether this process is connected, and can so use the store."""
    return slot.current is not None


def _internal_kv_get(key: str | bytes, *, namespace: str | bytes | None = None) -> bytes | None:
    """The value, or None when there is none."""
    return connected("_internal_kv_get()").kv_get(_space(namespace), _bytes("key", key))


def _internal_kv_exists(key: str | bytes, *, namespace: str | bytes | None = None) -> bool:
    return connected("_internal_kv_exists()").kv_get(_space(namespace), _bytes("key", key)) is not None


def _internal_kv_put(
    key: str | bytes, value: str | bytes, overwrite: bool = True, *, namespace: str | bytes | None = None
) -> bool:
    """Set the value; without `overwrite` one that exists stays.

    Returns:
        whether the key existed before.
    Raises:
        ShoalSystemError: the value, or the sum of all values, is too large.
    """
    runtime = connected("_internal_kv_put()")
    return runtime.kv_put(_space(namespace), _bytes("key", key), _bytes("value", value), overwrite=overwrite)


def _internal_kv_del(key: str | bytes, *, del_by_prefix: bool = False, namespace: str | bytes | None = None) -> int:
    """Delete a key, or all that begin with it; returns how many there were."""
    runtime = connected("_internal_kv_del()")
    return runtime.kv_delete(_space(namespace), _bytes("key", key), by_prefix=del_by_prefix)


def _internal_kv_list(prefix: str | bytes, *, namespace: str | bytes | None = None) -> list[bytes]:
    """The keys that begin with `prefix`, sorted."""
    return connected("_internal_kv_list()").kv_list(_space(namespace), _bytes("prefix", prefix))


def _bytes(what: str, text: str | bytes) -> bytes:
    if isinstance(text, str):
        return text.encode()
    if isinstance(text, bytes):
        return text
    raise TypeError(f"the {what} is bytes or a string, not {text!r}")


def _space(namespace: str | bytes | None) -> str:
    # With a prefix, so that no namespace of a user's is one of the head's own.
    return "user:" + ("" if namespace is None else _bytes("namespace", namespace).decode())
