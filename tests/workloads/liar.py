"""A server that lies: `liar.py` prints the port it listens on, at 127.0.0.1, and serves for ever.

The path's first part chooses how an answer goes wrong, `each` does so by the profile that is asked
for; what is asked for is printed, one a line.
"""

import gzip
import socket
import sys
import threading
import time

PAGE = b"""\
# TYPE took_seconds histogram
took_seconds_bucket{le="0.1"} 90
took_seconds_bucket{le="1"} 100
took_seconds_bucket{le="+Inf"} 100
took_seconds_sum 9
took_seconds_count 100
"""


def head(*lines: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


def whole(body: bytes, *lines: str, status: str = "200 OK") -> bytes:
    return head(f"Content-Length: {len(body)}", *lines, status=status) + body


def html(text: str) -> bytes:
    return whole(f"<html>{text}</html>".encode(), "Content-Type: text/html")


ANSWERS = {
    "/good": whole(PAGE, "Content-Type: text/plain; version=0.0.4"),
    "/chunked": head("Transfer-Encoding: chunked") + b"%x\r\n%s\r\n0\r\n\r\n" % (len(PAGE), PAGE),
    "/redirect": head("Location: /stolen\x1b[2J", "Content-Length: 0", status="302 Found"),
    "/html": html("hello"),
    "/json": whole(b'{"took_seconds": 1}', "Content-Type: application/json"),
    "/binary": whole(bytes(range(256)) * 16),
    "/empty": whole(b""),
    "/failing": whole(b"profiling \x1b[31mis in use\nmore\n", status="500 Internal Server Error"),
    "/gzip": whole(gzip.compress(PAGE), "Content-Encoding: gzip"),
    "/short": head("Content-Length: 1000000") + PAGE,
    "/short-chunk": head("Transfer-Encoding: chunked") + b"fff\r\n" + PAGE,
    "/bad-chunk": head("Transfer-Encoding: chunked") + b"zz\r\n" + PAGE,
    "/huge": head("Content-Length: 1000000000000") + PAGE,
    "/junk": b"\x00\xff\x15\x03\x01 SSH-2.0-nothing\r\n" * 10,
    "/old": b"just a line\n",
    "/nothing": b"",
    "/negative": head("Content-Length: -1") + PAGE,
    "/long-line": b"HTTP/1.1 200 " + b"x" * 100_000 + b"\r\n\r\n",
}
# What is sent first, then again and again, and how often.
STREAMS = {
    "/silent": (b"", b"", 0.05),
    "/drip": (head("Content-Length: 100000"), b"#", 0.05),
    "/drip-head": (b"HTTP/1.1 200 OK\r\nX: ", b"x", 0.05),
    "/endless": (head(), b"# nothing at all\n" * 4096, 0),
    "/endless-chunks": (head("Transfer-Encoding: chunked"), b"1\r\n#\r\n" * 4096, 0),
    "/endless-heads": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 512, 0),
    "/endless-waits": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 512, 0),
}

EACH = {"profile": "/silent", "trace": "/huge", "goroutine": "/failing", "heap": "/junk"}

CHANGED: list[str] = []


def serve(connection: socket.socket) -> None:
    with connection:
        try:
            path = connection.recv(65536).split(b" ")[1].decode().partition("?")[0]
            asked = "/" + path.split("/")[1]
            if asked == "/each":
                asked = EACH[path.rpartition("/")[2]]
            print(asked, flush=True)
            if asked in STREAMS:
                first, then, pause_s = STREAMS[asked]
                connection.sendall(first)
                while True:
                    connection.sendall(then)
                    time.sleep(pause_s)
                    if pause_s and not _is_open(connection):
                        return
            if asked == "/changing":  # other buckets each time
                CHANGED.append(asked)
                page = PAGE.replace(b'"0.1"', b'"0.%d"' % (1 + len(CHANGED) % 2))
                connection.sendall(whole(page))
                return
            connection.sendall(ANSWERS.get(asked, whole(b"no\n", status="404 Not Found")))
        except (OSError, IndexError):
            pass


def _is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return bool(connection.recv(1))
    except BlockingIOError:
        return True
    finally:
        connection.setblocking(True)


def main() -> None:
    listener = socket.create_server((sys.argv[1] if sys.argv[1:] else "127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
