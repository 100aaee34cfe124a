"""The machine's own yardsticks: what sockets, memory and loopback give when nothing is in between."""

from __future__ import annotations

import os
import socket
import time

import worker
from workloads import GIB, MEMCPY, MIB, PING_PONG, TCP_COPY


def ping_pong(timing: worker.Timing) -> float:
    """Round trips per second of a 100-byte message between two processes over a Unix socket."""
    ours, theirs = socket.socketpair()
    if (child := os.fork()) == 0:
        ours.close()
        while message := theirs.recv(4096):
            theirs.sendall(message)
        os._exit(0)
    theirs.close()

    def once() -> None:
        ours.sendall(b"x" * 100)
        ours.recv(4096)

    rate = timing.rate(once)
    ours.close()
    os.waitpid(child, 0)
    return rate


def memcpy(timing: worker.Timing) -> float:
    return worker.memcpy_rate(timing, 100 * MIB)


def tcp_copy(timing: worker.Timing) -> float:
    """GB/s from one process's warm memory into another's, both 1 GiB; the better of two copies."""
    server = socket.create_server(("127.0.0.1", 0))
    if (child := os.fork()) == 0:
        with socket.create_connection(server.getsockname()) as out:
            server.close()
            data = memoryview(bytearray(b"x") * GIB)
            for _ in range(2):
                out.recv(1)
                out.sendall(data)
        os._exit(0)
    connection, _ = server.accept()
    server.close()
    buffer = memoryview(bytearray(b"x") * GIB)
    best = 0.0
    with connection:
        for _ in range(2):
            start = time.perf_counter()
            connection.sendall(b"g")
            received = 0
            while received < GIB:
                received += connection.recv_into(buffer[received:], min(8 * MIB, GIB - received))
            best = max(best, GIB / 1e9 / (time.perf_counter() - start))
    os.waitpid(child, 0)
    return best


if __name__ == "__main__":
    worker.main({PING_PONG: ping_pong, MEMCPY: memcpy, TCP_COPY: tcp_copy})
