"""The key-value store: small shared facts, and the pickled functions and classes of all jobs.

Values are opaque. Each space is its own dictionary; a value is bounded, and so is the sum, because this process holds
the cluster's state and must not be the one that runs out of memory.

Code (space FUNCTIONS) is put by whoever needs it first and is content-addressed, so several jobs may share a key; a key
leaves when the last job that put it is over. Other spaces are the users' own: they delete what they put.
"""

from __future__ import annotations

from shoal.control.messages import FUNCTIONS
from shoal.objects.ids import JobId

ENTRY_OVERHEAD_BYTES = 200
"""What a dictionary entry and two bytes objects cost beside their contents, roughly; counted so that a million tiny
keys are bounded as well."""


class KeyLimitError(Exception):
    """A value does not go in; the text is for the user who wanted to put it."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind, self.text = kind, text


class KeyStore:
    def __init__(self, max_value_bytes: int, max_total_bytes: int) -> None:
        self._max_value_bytes = max_value_bytes
        self._max_total_bytes = max_total_bytes
        self._spaces: dict[str, dict[bytes, bytes]] = {}
        self._bytes = 0
        self._code_users: dict[bytes, set[JobId]] = {}
        self._code_of_job: dict[JobId, set[bytes]] = {}

    @property
    def size_bytes(self) -> int:
        return self._bytes

    def put(self, space: str, key: bytes, value: bytes, *, overwrite: bool, job_id: JobId) -> bool:
        """Returns whether the key existed before; without `overwrite` an existing value stays.

        Raises:
            KeyLimitError: kind "too_large" (this value) or "store_full" (all values together).
        """
        held = self._spaces.get(space, {}).get(key)
        if held is None or overwrite:
            self._check(space, key, value, 0 if held is None else _cost(key, held))
            self._spaces.setdefault(space, {})[key] = value
            self._bytes += _cost(key, value) - (0 if held is None else _cost(key, held))
        if space == FUNCTIONS and job_id:
            self._code_users.setdefault(key, set()).add(job_id)
            self._code_of_job.setdefault(job_id, set()).add(key)
        return held is not None

    def _check(self, space: str, key: bytes, value: bytes, freed: int) -> None:
        size = len(key) + len(value)
        if size > self._max_value_bytes:
            raise KeyLimitError(
                "too_large",
                f"a value of {size:,} bytes is too large for the key-value store (at most {self._max_value_bytes:,}); "
                "put large data into the object store with put() and store the reference",
            )
        if self._bytes - freed + _cost(key, value) > self._max_total_bytes:
            raise KeyLimitError(
                "store_full",
                f"the key-value store holds {self._bytes:,} of at most {self._max_total_bytes:,} bytes and cannot take "
                f"{size:,} more in space {space!r}; delete keys that are not needed",
            )

    def find(self, space: str, key: bytes) -> bytes | None:
        return self._spaces.get(space, {}).get(key)

    def list_keys(self, space: str, prefix: bytes) -> list[bytes]:
        return sorted(key for key in self._spaces.get(space, ()) if key.startswith(prefix))

    def delete(self, space: str, key: bytes) -> int:
        held = self._spaces.get(space, {}).pop(key, None)
        if held is None:
            return 0
        self._bytes -= _cost(key, held)
        if not self._spaces[space]:
            del self._spaces[space]
        if space == FUNCTIONS:
            for job_id in self._code_users.pop(key, ()):
                self._drop_link(job_id, key)
        return 1

    def delete_prefix(self, space: str, prefix: bytes) -> int:
        return sum(self.delete(space, key) for key in self.list_keys(space, prefix))

    def forget_code_of(self, job_id: JobId) -> int:
        """The job is over for good: delete the code that only it used. Returns the number of keys deleted."""
        deleted = 0
        for key in self._code_of_job.pop(job_id, ()):
            users = self._code_users[key]
            users.discard(job_id)
            if not users:
                deleted += self.delete(FUNCTIONS, key)
        return deleted

    def _drop_link(self, job_id: JobId, key: bytes) -> None:
        keys = self._code_of_job.get(job_id)
        if keys is not None:
            keys.discard(key)
            if not keys:
                del self._code_of_job[job_id]

    def check_invariants(self) -> None:
        assert self._bytes == sum(_cost(k, v) for space in self._spaces.values() for k, v in space.items())
        assert all(self._spaces.values())
        code = self._spaces.get(FUNCTIONS, {})
        assert {(k, j) for k, jobs in self._code_users.items() for j in jobs} == {
            (k, j) for j, keys in self._code_of_job.items() for k in keys
        }
        assert set(self._code_users) <= set(code)


def _cost(key: bytes, value: bytes) -> int:
    return len(key) + len(value) + ENTRY_OVERHEAD_BYTES
