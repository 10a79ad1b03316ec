"""The unprivileged child that fetches: `python -m …fetch_worker SOCKET NAMESPACE WORKERS PARENT`.

It starts with the tracer's rights, because the program may be installed where only root can read,
imports everything it will ever need, enters the target's network namespace, and then gives up
every right: nobody's uid and gid, no groups, no capabilities, no new privileges, no processes,
no files, bounded memory and CPU time. It dies with the tracer. What it fetches is hostile: every
answer is bounded in time and size, and no redirect, proxy or compression is followed or taken.
"""

from __future__ import annotations

import ctypes
import encodings.idna  # noqa: F401 - getaddrinfo() imports it at its first use
import http.client
import io
import json
import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any, Final, NoReturn

from latrace.tracer.unprivileged import drop_rights, limit, limit_request
from latrace.tracer.watch.exposition import ACCEPT, ExpositionError, Reader
from latrace.tracer.watch.fetch import FRAME, HELLO, MAX_JSON, MAX_WORDS

MEMORY_LIMIT: Final = 1 << 30
"""Address space, in bytes: several large answers at once, and their copies."""
REQUEST_CPU_S: Final = 20
LIFETIME_CPU_S: Final = 24 * 3600
NICENESS: Final = 10
"""The targets should not wait for us."""
LIMITS: Final = {
    resource.RLIMIT_AS: MEMORY_LIMIT,
    resource.RLIMIT_CPU: LIFETIME_CPU_S,
    resource.RLIMIT_NOFILE: 64,
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_CORE: 0,
}
STACK: Final = 512 << 10
MAX_PENDING: Final = 64
MAX_KEPT: Final = 8
MAX_HEADERS: Final = 256 << 10
READ_AT_ONCE: Final = 64 << 10
ERROR_BODY: Final = 4096

_PR_SET_PDEATHSIG: Final = 1
_CLONE_NEWNET: Final = 0x40000000


# --- rights ------------------------------------------------------------------------------------


def enter(namespace: int) -> None:
    """Enter a network namespace, for good. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET):  # os.setns: Python 3.12
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def die_with(parent: int) -> None:
    """End as soon as the process `parent` does. Raises OSError.

    To be asked for after the rights are given up: a change of ids takes it back.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:  # it died before we asked to be told
        os._exit(0)


# --- one answer --------------------------------------------------------------------------------


class FetchError(Exception):
    """What went wrong, in words that go behind the address."""


class _Unheard(TimeoutError):
    """The connection was not taken in time."""


class _TooMuch(Exception):
    """More bytes came than may."""


class _Socket(socket.socket):
    """A connection that ends at its deadline, however slowly it drips, and after so many bytes."""

    deadline_s = 0.0
    left = 0
    received = 0

    def arm(self, deadline_s: float, most: int) -> None:
        """Begin an exchange that ends then, or after so many bytes."""
        self.deadline_s, self.left, self.received = deadline_s, most, 0
        self.settimeout(_left_s(deadline_s))  # for sending

    def recv_into(self, *args: Any) -> int:
        self.settimeout(_left_s(self.deadline_s))
        count = super().recv_into(*args)
        self.left -= count
        self.received += count
        if self.left < 0:
            raise _TooMuch
        return count


def _left_s(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _connect(host: str, port: int, deadline_s: float) -> _Socket:
    """Connect to the first of a name's addresses that takes it. Raises OSError."""
    failed: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    )[:8]:
        connection = _Socket(family, kind, protocol)
        try:
            connection.settimeout(_left_s(deadline_s))
            connection.connect(address)
        except OSError as error:
            connection.close()
            failed = failed or error
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    if isinstance(failed, TimeoutError):
        raise _Unheard from failed
    raise failed or OSError("no address")


def get(
    request: dict[str, Any], deadline_s: float, kept: dict[tuple[str, int], _Socket]
) -> tuple[bytes, str]:
    """One answer's body and content type. Raises FetchError.

    `kept`: connections that stand from the last time, for requests that come again and again: the
    target has less to do, and a capture of it does not fill with connections that are ours.
    """
    try:
        return _exchange(request, deadline_s, kept)
    except socket.gaierror as error:
        raise FetchError(f"the host's name is not known here: {error.strerror}") from error
    except TimeoutError as error:
        unheard = isinstance(error, _Unheard)
        what = "does not take the connection" if unheard else "does not end its answer"
        raise FetchError(f"{what} within {request['timeout_s']:g} s") from error
    except ConnectionRefusedError as error:
        raise FetchError("refuses the connection: nobody listens there") from error
    except _TooMuch as error:
        raise FetchError(_too_much(request["max_bytes"])) from error
    except http.client.IncompleteRead as error:
        raise FetchError("hung up in the middle of its answer") from error
    except http.client.RemoteDisconnected as error:
        raise FetchError("hung up without an answer") from error
    except ConnectionError as error:
        raise FetchError("broke the connection off") from error
    except (http.client.HTTPException, ValueError) as error:
        raise FetchError("does not speak HTTP there") from error
    except OSError as error:
        raise FetchError(f"cannot be reached: {error.strerror or error}") from error


def _exchange(
    request: dict[str, Any], deadline_s: float, kept: dict[tuple[str, int], _Socket]
) -> tuple[bytes, str]:
    """Ask over a connection that stands, or over a new one."""
    where = (request["host"], request["port"])
    connection = kept.pop(where, None) if request["metric"] else None
    if connection is not None:
        try:
            return _get(connection, request, deadline_s, kept)
        except ConnectionError:
            if connection.received:
                raise
            # Nobody answers there any more; that says nothing of a new connection.
        finally:
            if kept.get(where) is not connection:
                connection.close()
    connection = _connect(*where, deadline_s)
    try:
        return _get(connection, request, deadline_s, kept)
    finally:
        if kept.get(where) is not connection:
            connection.close()


def _get(
    connection: _Socket,
    request: dict[str, Any],
    deadline_s: float,
    kept: dict[tuple[str, int], _Socket],
) -> tuple[bytes, str]:
    most, where = int(request["max_bytes"]), (request["host"], request["port"])
    # Chunks have heads.
    connection.arm(deadline_s, most + most // 4 + MAX_HEADERS)
    client = http.client.HTTPConnection(*where)
    client.sock = connection
    client.auto_open = 0  # what it would connect on its own knows no deadline
    client.request(
        "GET",
        request["target"],
        headers={
            "Accept": ACCEPT if request["metric"] else "*/*",
            "Accept-Encoding": "identity",
            "Connection": "keep-alive" if request["metric"] else "close",
            "User-Agent": "latrace",
        },
    )
    response = client.getresponse()
    try:
        if response.status != http.client.OK:
            raise FetchError(_refusal(response))
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        if encoding not in ("", "identity"):
            raise FetchError(f"answers in {_short(encoding)}, which was not asked for")
        if response.length is not None and response.length > most:
            raise FetchError(_too_much(most))
        body = _body(connection, response, most)
        if request["metric"] and not response.will_close and len(kept) < MAX_KEPT:
            kept[where] = connection
        return body, response.headers.get("Content-Type", "")
    finally:
        response.close()


def _body(connection: _Socket, response: http.client.HTTPResponse, most: int) -> bytes:
    body = io.BytesIO()
    while piece := response.read(READ_AT_ONCE):
        if body.tell() + len(piece) > most:
            raise _TooMuch
        body.write(piece)
        # Chunks of a byte each would take all the CPU time that we may use.
        if connection.received - body.tell() > MAX_HEADERS + body.tell() // 4:
            raise FetchError("answers in too small pieces")
    if response.length:  # http.client does not say so when it reads in pieces
        raise http.client.IncompleteRead(b"")
    return body.getvalue()


def _refusal(response: http.client.HTTPResponse) -> str:
    """Words for an answer that is no success."""
    told = f"answers {response.status} {_short(response.reason)}".rstrip()
    if 300 <= response.status < 400:
        where = _short(response.headers.get("Location", ""))
        return f"{told}, a redirect to {where or 'nowhere'}, which is not followed"
    try:
        text = response.read(ERROR_BODY).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException, ValueError, _TooMuch):
        text = ""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{told}: {_short(first)}" if first and not first.startswith("<") else told


def _short(text: str) -> str:
    return text[:100]


def _too_much(most: int) -> str:
    return f"answers with more than {most / 1e6:.3g} MB"


# --- serving -----------------------------------------------------------------------------------


class _Server:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._jobs: queue.SimpleQueue[tuple[int, dict[str, Any], float]] = queue.SimpleQueue()
        self._readers: dict[str, Reader] = {}
        self._kept: dict[tuple[str, int], _Socket] = {}
        self._threads = 0

    def start(self, workers: int) -> None:
        """Make the threads for several requests at once; for one, the main thread will do."""
        threading.stack_size(STACK)
        for _ in range(workers if workers > 1 else 0):
            threading.Thread(target=self._work, daemon=True).start()
            self._threads += 1

    def say(self, number: int, answer: dict[str, Any], body: bytes = b"") -> None:
        text = json.dumps(answer).encode()
        with self._sending:
            self._connection.sendall(FRAME.pack(number, len(text), len(body)) + text)
            self._connection.sendall(body)

    def receive(self) -> None:
        """Take requests for ever. Raises EOFError when the tracer hangs up."""
        while True:
            number, length, _ = FRAME.unpack(self._read(FRAME.size))
            if length > MAX_JSON:
                raise EOFError
            request = json.loads(self._read(length))
            limit_request(REQUEST_CPU_S)
            deadline_s = time.monotonic() + request["timeout_s"]
            if not self._threads:
                self._handle(number, request, deadline_s)
                continue
            if self._jobs.qsize() >= MAX_PENDING:
                self.say(number, {"error": "not fetched: too many at once"})
                continue
            self._jobs.put((number, request, deadline_s))

    def _read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            piece = self._connection.recv(length - len(data))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def _work(self) -> NoReturn:
        while True:
            try:
                self._handle(*self._jobs.get())
            except OSError:
                os._exit(0)

    def _handle(self, number: int, request: dict[str, Any], deadline_s: float) -> None:
        """Answer one request. Raises OSError when the tracer is gone."""
        before_s = time.thread_time()
        answer, body = self._serve(request, deadline_s)
        answer["cpu_s"] = time.thread_time() - before_s
        self.say(number, answer, body)

    def _serve(self, request: dict[str, Any], deadline_s: float) -> tuple[dict[str, Any], bytes]:
        try:
            body, content_type = get(request, deadline_s, self._kept)
            if request["metric"] is None:
                return {"content_type": content_type[:MAX_WORDS]}, body
            return {"reading": self._reader(request["metric"]).read(body, content_type)}, b""
        except (FetchError, ExpositionError) as error:
            return {"error": str(error)[:MAX_WORDS]}, b""
        except MemoryError:
            return {"error": "takes more memory than it may"}, b""
        except Exception as error:  # a bug of ours; here is no place for a traceback
            return {"error": f"not fetched: {type(error).__name__}"}, b""

    def _reader(self, metric: dict[str, Any]) -> Reader:
        """One reader for each metric, which remembers the page's shape."""
        key = json.dumps(metric, sort_keys=True)
        if key not in self._readers:
            if len(self._readers) >= MAX_PENDING:
                self._readers.clear()
            self._readers[key] = Reader(metric["name"], metric["labels"], metric["quantile"])
        return self._readers[key]


REHEARSAL: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'18\r\na_bucket{le="+Inf"} 1\n# \r\n0\r\n\r\n'
)


def rehearse() -> None:
    """Do once what requests will ask for: what is imported late, nobody may be able to read."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(REHEARSAL)
        connection = _Socket(fileno=ours.detach())
        request = {"host": "localhost", "port": 80, "target": "/", "metric": {}}
        request["max_bytes"] = 1 << 20
        with connection:
            body, content_type = _get(connection, request, time.monotonic() + 60, {})
    for kind in (content_type, "application/openmetrics-text"):
        with suppress(ExpositionError):
            Reader("a", {}, 0.5).read(body + b"EOF\n", kind)
    socket.getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)


def main() -> int:
    """Serve until the tracer hangs up or dies."""
    os.nice(NICENESS)
    number, namespace, workers, parent = map(int, sys.argv[1:5])
    connection = socket.socket(fileno=number)
    server = _Server(connection)
    try:
        rehearse()
        if namespace >= 0:
            enter(namespace)
        drop_rights(number, limits=LIMITS)
        die_with(parent)
        server.start(workers)
        limit(resource.RLIMIT_NPROC, 0)  # threads count, too
    except (OSError, RuntimeError) as error:
        server.say(HELLO, {"error": f"the child cannot give up its rights: {error}"})
        return 1
    try:
        server.say(HELLO, {})
        server.receive()
    except (EOFError, OSError):
        pass
    # Without waiting for the fetches that are under way.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
