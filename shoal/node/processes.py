"""Small facts about processes that the supervisor, the zygote and the agent share. Linux first; elsewhere best effort.

How a node ends without leaving anything, whatever is killed: a worker leads a process group, which is killed with it.
The zygote and above it the supervisor adopt orphans, so that what left its group is still below one of them, and kill
everything below them when they end. If the supervisor itself is killed, the kernel tells zygote and agent, who then
end in order.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Iterable
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_PR_SET_CHILD_SUBREAPER: Final = 36

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def die_with_parent(parent_pid: int, sig: int = signal.SIGKILL) -> None:
    """Have the kernel send `sig` to this process the moment its parent's main thread ends, however that ends.

    Call it right after fork; `parent_pid` guards against a parent that ended before the call took effect.
    """
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, sig, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def set_title(title: str) -> None:
    """Name shown by `ps` and `top` for this process's thread (at most 15 bytes are kept by the kernel)."""
    if _libc is not None:
        _libc.prctl(_PR_SET_NAME, title.encode()[:15], 0, 0, 0)


def allow_open_files() -> None:
    """Let this process open as many files as it may: one per connection, in a process that has thousands of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # some kernels say "unlimited" and mean less
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def kill_group(pid: int, sig: int = signal.SIGKILL) -> None:
    """Signal a worker and the processes it started (a worker leads its own process group)."""
    try:
        os.killpg(pid, sig)
    except ProcessLookupError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sig)  # it had not become a leader yet


def adopt_orphans() -> None:
    """From now on processes below this one whose parents end become children of this one, so that none gets lost."""
    if _libc is not None:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> list[int]:
    """Pids of this process's children, adopted ones and zombies included. It must have one thread only."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []  # not Linux, or a kernel without this file: process groups must do


def end_children(limit_s: float) -> None:
    """SIGKILL and reap all children, then theirs, which become ours, until there are none; for `limit_s` at most."""
    deadline = time.monotonic() + limit_s
    while pids := children():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in pids:
            if not _reap(pid, deadline):
                return


def _reap(pid: int, deadline: float) -> bool:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return False
    finally:
        os.close(handle)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    return True


def reset_after_fork(caught: Iterable[signal.Signals]) -> None:
    """Give a forked child the signal handling of a fresh Python program.

    Args:
        caught: what its parent handles, besides SIGINT.
    """
    signal.set_wakeup_fd(-1)
    for number in caught:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def describe_status(status: int) -> tuple[int, int, str]:
    """A `waitpid` status as (exit code, signal number, text). One of the numbers is 0."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return 0, number, f"killed by {name}"
    code = os.waitstatus_to_exitcode(status)
    return code, 0, f"exit code {code}"
