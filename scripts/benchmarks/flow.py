"""A load: TCP through the loopback device, with nothing lost. Prints its time as `perf bench` does.

flow.py stream N      sends N pieces of 64 KiB to a child that throws them away
flow.py requests N    sends N requests of one byte to a child that sends each one back
"""

from __future__ import annotations

import os
import socket
import sys
import time

PIECE = 1 << 16


def main(mode: str, count: int) -> None:
    """Run it: `count` operations."""
    server = socket.create_server(("127.0.0.1", 0))
    child = os.fork()
    if not child:
        peer, _ = server.accept()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := peer.recv(4 * PIECE):
            if mode == "requests":
                peer.sendall(data)
        os._exit(0)
    with socket.create_connection(server.getsockname()) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        piece = bytes(PIECE if mode == "stream" else 1)
        began = time.monotonic()
        for _ in range(count):
            connection.sendall(piece)
            if mode == "requests":
                connection.recv(1)
        took = time.monotonic() - began
    os.waitpid(child, 0)
    sys.stdout.write(f"     Total time: {took:.6f} [sec]\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
