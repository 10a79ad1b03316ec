"""HTTP answers of a target, fetched by an unprivileged child in the target's network namespace.

The tracer is root and what answers is hostile, so root opens the namespace and nothing else: a
child (`fetch_worker`) enters it, gives up every right, and then serves requests over a socket for
as long as the watch runs. Nothing here waits: `submit` hands a request over, `poll` takes what has
come, and a child that is late, dies or talks nonsense is ended and replaced.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

from latrace.analysis import words
from latrace.tracer.errors import HostError, NoTargetError, UsageError

FRAME: Final = struct.Struct(">IIQ")
"""Before each message, both ways: request number, bytes of JSON, bytes of body."""
MAX_JSON: Final = 256 << 10
HELLO: Final = 0
"""The request number of the child's first message: it is ready, or why it can't be."""

GRACE_S: Final = 2.0
"""The child keeps the deadlines; when it is so late, it is stuck (in a name's resolution)."""
START_TIMEOUT_S: Final = 10.0
BODY_TIMEOUT_S: Final = 10.0
REQUESTS_PER_CHILD: Final = 10_000
"""Then a new child takes over, so that nothing in it can grow for weeks."""
RESTART_MAX_S: Final = 60.0
READ_AT_ONCE: Final = 8 << 20
SOCKET_BUFFER: Final = 4 << 20
MAX_WORDS: Final = 300
MAX_URL: Final = 2048

_SO_SNDBUFFORCE: Final = 32  # include/uapi/asm-generic/socket.h
_NAME: Final = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?", re.ASCII)
_URL: Final = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<target>[^#]*)(?P<fragment>#.*)?",
    re.ASCII | re.IGNORECASE,
)
_AUTHORITY: Final = re.compile(
    r"(?:\[(?P<v6>[^\]]*)\]|(?P<name>[^:\[\]]*))(?::(?P<port>[0-9]{0,5}))?", re.ASCII
)


# --- addresses ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Url:
    """An http address that was checked."""

    host: str
    """A name, or a numeric address (IPv6 without its brackets)."""
    port: int
    target: str
    """Path and query."""

    def __str__(self) -> str:
        return f"http://{words.endpoint(self.host, self.port)}{self.target}"

    def at(self, target: str) -> Url:
        """Another path (with its query) of the same server."""
        return replace(self, target=target)


def parse_url(text: str, option: str = "--metrics", *, path: str = "/") -> Url:
    """Check an address that `option` was given; `path` is taken where it has none.

    A host name is resolved later, by the child: inside the target's network namespace, but with
    the host's own /etc/hosts and /etc/resolv.conf.

    Raises UsageError when it is no plain http address.
    """

    def wrong(why: str, hint: str = "") -> UsageError:
        shown = words.fit(words.visible(text), 100)
        example = f"such as {option} http://127.0.0.1:8080{path}"
        return UsageError(f"{option} {shown}: {why}", hint=hint or example)

    if len(text) > MAX_URL:
        raise wrong(f"longer than {MAX_URL} characters")
    if not all("!" <= char <= "~" for char in text):
        raise wrong("an address has no blanks and only ASCII characters (others as %XX)")
    whole = _URL.fullmatch(text)
    if whole is None:
        raise wrong("is no address")
    scheme = whole["scheme"].lower()
    if scheme == "https":
        raise wrong(
            "https is not spoken here",
            "give the plain http address: it is fetched on this host, in the target's own network",
        )
    if scheme != "http":
        raise wrong(f"the scheme {scheme} is not known here, only http")
    if "@" in whole["authority"]:
        raise wrong("user names and passwords are not sent")
    if whole["fragment"] is not None:
        raise wrong("a fragment (#...) is never sent")
    server = _AUTHORITY.fullmatch(whole["authority"])
    if server is None:
        raise wrong("host and port are not readable", "an IPv6 address goes in brackets: [::1]:80")
    target = whole["target"] or path
    return Url(
        host=_host(server, wrong),
        port=_port(server["port"], wrong),
        target=target if target.startswith("/") else "/" + target,
    )


def _host(server: re.Match[str], wrong: Any) -> str:
    if server["v6"] is not None:
        try:
            address = ipaddress.IPv6Address(server["v6"])
        except ValueError:
            address = None
        if address is None or address.scope_id:  # whose interfaces are other ones in there
            raise wrong(f"[{server['v6']}] is no IPv6 address")
        return str(address)
    name = server["name"]
    if not name:
        raise wrong("the host is missing")
    if re.fullmatch(r"[0-9.]+", name):
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError:
            raise wrong(f"{name} is no IPv4 address") from None
    if not _NAME.fullmatch(name) or ".." in name:
        raise wrong(f"{name} is no host name")
    return str(name)


def _port(text: str | None, wrong: Any) -> int:
    if not text:
        return 80
    if not 0 < int(text) < 1 << 16:
        raise wrong(f"there is no port {text}")
    return int(text)


# --- fetches -----------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Fetch:
    """One request and, once it is `done`, its answer: `body` and the like, or `error`."""

    url: Url
    timeout_s: float
    """For all of it: name, connection, answer, and reading what is to be read in it."""
    max_bytes: int
    metric: Mapping[str, Any] | None = None
    """What the child is to read out of the answer (`exposition.Reader`) instead of returning it."""
    done: bool = False
    error: str | None = None
    """What went wrong, in words that go behind the address: `refuses the connection`."""
    body: bytes = b""
    content_type: str = ""
    reading: Mapping[str, Any] | None = None
    """As the child says; it is to be checked like everything that comes from there."""
    cpu_s: float = 0.0
    """CPU time of the child for this one."""
    _deadline_s: float = field(default=0.0, repr=False)

    def _fail(self, error: str) -> None:
        self.done, self.error = True, error


class _Nonsense(Exception):
    """The child does not keep to the protocol."""


class Fetcher:
    """The tracer's end of one child, which serves up to `workers` requests at once.

    The network namespace is the one of process `pid` now; it is held until `close`. A child dies
    with the thread that started it (`start`, `submit` and `poll` do), and is started again when
    it is needed. Not thread-safe.

    Raises NoTargetError when there is no such process, HostError when its namespace is closed to
    us.
    """

    def __init__(self, pid: int, *, workers: int = 1) -> None:
        self._workers = workers
        self._namespace = _open_namespace(pid)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._dying: list[subprocess.Popen[bytes]] = []
        self._waiting: dict[int, Fetch] = {}
        self._last = HELLO
        self._served = 0
        self._ready = self._closed = False
        self._start_at_s = 0.0
        self._pause_s = 0.0
        self._header = bytearray(FRAME.size)
        self._message = bytearray()
        self._have = 0
        self.starts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return None if self._process is None else self._process.pid

    def fileno(self) -> int:
        """What becomes readable when `poll` has something to do; -1 while no child runs."""
        return -1 if self._connection is None else self._connection.fileno()

    def start(self) -> None:
        """Start the child without waiting for it, so that a first fetch finds it ready."""
        waits = time.monotonic() < self._start_at_s
        if self._process is not None or self._closed or waits:
            return
        # Twice as long after each child that did not come up; none at all after one that did.
        self._pause_s = min(max(2 * self._pause_s, 1.0), RESTART_MAX_S)
        self._start_at_s = time.monotonic() + self._pause_s
        ours, theirs = socket.socketpair()
        _widen(theirs)
        passed = [theirs.fileno()]
        if self._namespace is not None:
            passed.append(self._namespace)
        arguments = (theirs.fileno(), passed[1] if passed[1:] else -1, self._workers, os.getpid())
        try:
            self._process = subprocess.Popen(
                # Isolated mode: neither the working directory nor the environment chooses the code.
                [
                    *(sys.executable, "-I", "-m", "latrace.tracer.watch.fetch_worker"),
                    *map(str, arguments),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=passed,
                cwd="/",
                # No proxies, for one. A heap for each thread would use up the address space, and
                # a name server that does not answer should not hold up for long.
                env={
                    "LC_ALL": "C.UTF-8",
                    "MALLOC_ARENA_MAX": "1",
                    "RES_OPTIONS": "timeout:1 attempts:2",
                },
                start_new_session=True,
            )
        except OSError:
            ours.close()
            return
        finally:
            theirs.close()
        ours.setblocking(False)
        self._connection = ours
        self._ready, self._served, self._have, self._message = False, 0, 0, bytearray()
        self.starts += 1

    def submit(
        self,
        url: Url,
        *,
        timeout_s: float,
        max_bytes: int,
        metric: Mapping[str, Any] | None = None,
    ) -> Fetch:
        """Ask for one answer of at most `max_bytes`, all within `timeout_s`. Never raises."""
        fetch = Fetch(url, timeout_s, max_bytes, metric)
        if self._served >= REQUESTS_PER_CHILD and not self._waiting:
            self._end()
        self.start()
        if self._connection is None:
            fetch._fail("not fetched: the process for it does not start")
            return fetch
        late_s = timeout_s + GRACE_S + (0.0 if self._ready else START_TIMEOUT_S)
        fetch._deadline_s = time.monotonic() + late_s
        self._last = self._last % 0xFFFF_FFFF + 1
        request = {
            "host": url.host,
            "port": url.port,
            "target": url.target,
            "timeout_s": timeout_s,
            "max_bytes": max_bytes,
            "metric": metric,
        }
        text = json.dumps(request).encode()
        message = FRAME.pack(self._last, len(text), 0) + text
        try:
            sent = self._connection.send(message)
        except OSError:  # it is gone, or takes nothing any more
            sent = 0
        self._waiting[self._last] = fetch
        self._served += 1
        if sent != len(message):
            self._abandon("not fetched: the process for it died")
        return fetch

    def poll(self) -> None:
        """Take what has come, without waiting; ends and replaces a child that is stuck."""
        for process in self._dying[:]:
            if process.poll() is not None:
                self._dying.remove(process)
        if self._connection is None:
            return
        try:
            self._take(self._connection)
        except BlockingIOError:
            pass
        except (OSError, EOFError):
            self._abandon("not fetched: the process for it died")
        except (_Nonsense, ValueError, RecursionError):  # of json, too
            self._abandon("not fetched: the process for it talked nonsense")
        now_s = time.monotonic()
        late = [each for each in self._waiting.values() if now_s > each._deadline_s]
        if late:
            self._abandon(f"no answer within {late[0].timeout_s:g} s")

    def close(self) -> None:
        """End the child, for good; what was not fetched stays so, with an error."""
        self._closed = True
        self._abandon("not fetched: the trace ended")
        for process in self._dying:
            process.wait()
        self._dying.clear()
        if self._namespace is not None:
            os.close(self._namespace)
            self._namespace = None

    # --- what comes ---

    def _take(self, connection: socket.socket) -> None:
        """Read messages until there are none. Raises BlockingIOError then, EOFError, _Nonsense."""
        budget = READ_AT_ONCE
        while budget > 0:
            if not self._message:
                budget -= self._fill(connection, self._header)
                if self._have < FRAME.size:
                    continue
                self._message, self._have = bytearray(self._expect()), 0
            budget -= self._fill(connection, self._message)
            if self._have == len(self._message):
                message, self._message, self._have = self._message, bytearray(), 0
                self._answer(message)

    def _fill(self, connection: socket.socket, buffer: bytearray) -> int:
        count = connection.recv_into(memoryview(buffer)[self._have :])
        if not count:
            raise EOFError
        self._have += count
        return count

    def _expect(self) -> int:
        """Length of the message behind the header that was read. Raises _Nonsense."""
        number, text, body = FRAME.unpack(self._header)
        fetch = self._waiting.get(number)
        most = 0 if fetch is None or fetch.metric is not None else fetch.max_bytes
        known = fetch is not None or (number == HELLO and not self._ready)
        if not known or not 0 < text <= MAX_JSON or body > most:
            raise _Nonsense
        if fetch is not None:  # it has kept its deadline; now it is we who must read
            fetch._deadline_s = max(fetch._deadline_s, time.monotonic() + BODY_TIMEOUT_S)
        return int(text + body)

    def _answer(self, message: bytearray) -> None:
        number, length, _body = FRAME.unpack(self._header)
        with memoryview(message) as view:
            answer = json.loads(bytes(view[:length]))
            if not isinstance(answer, dict):
                raise _Nonsense
            error = answer.get("error")
            if error is not None:
                error = _words(error)
            if number == HELLO:
                if error is not None:
                    self._abandon(f"not fetched: {error}")
                else:
                    self._ready, self._pause_s, self._start_at_s = True, 0.0, 0.0
                return
            fetch = self._waiting.pop(number)
            reading = answer.get("reading")
            fetch.cpu_s = _seconds(answer.get("cpu_s"))
            if error is not None:
                fetch._fail(error)
                return
            fetch.content_type = _words(answer.get("content_type"))
            fetch.reading = reading if isinstance(reading, dict) else None
            fetch.body = bytes(view[length:])
            fetch.done = True

    # --- the end of a child ---

    def _abandon(self, error: str) -> None:
        waiting, self._waiting = self._waiting, {}
        self._end()
        for fetch in waiting.values():
            fetch._fail(error)

    def _end(self) -> None:
        process, self._process = self._process, None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if process is not None:
            process.kill()
            # Under full load it takes a while to die; nobody needs to wait for that.
            self._dying.append(process)
        self._message, self._have = bytearray(), 0


def _open_namespace(pid: int) -> int | None:
    """The network namespace of a process; None when it is our own, which needs no entering."""
    try:
        namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NoTargetError(f"there is no process {pid}") from error
    except OSError as error:
        raise HostError(
            f"the network namespace of process {pid} cannot be opened: {error.strerror}",
            hint="run it with sudo",
        ) from error
    there, here = os.fstat(namespace), Path("/proc/self/ns/net").stat()
    if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
        return namespace
    os.close(namespace)
    return None


def _widen(theirs: socket.socket) -> None:
    """Let the child hand over much at once: we read only now and then."""
    for option in (_SO_SNDBUFFORCE, socket.SO_SNDBUF):  # the first needs CAP_NET_ADMIN
        with suppress(OSError):
            theirs.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
            return


def _words(text: object) -> str:
    """What the child says, and what it quotes, for a terminal: one bounded line."""
    return words.visible(str(text)[:MAX_WORDS]) if isinstance(text, str) else ""


def _seconds(value: object) -> float:
    """A time that the child tells; 0 for nonsense."""
    return value if isinstance(value, float) and 0 <= value < 3600 else 0.0
