"""The socket by which root asks a running watch for a bundle: `latrace trigger`.

Each watch listens on /run/latrace/watch-PID.sock, a SOCK_SEQPACKET socket in a directory that is
root's alone; who is at the other end is asked of the kernel (SO_PEERCRED). One packet with one line
of JSON is the request, one is the answer:

    {"trigger": "p99 alarm of the shop", "by": "alice"}
    {"ok": true, "message": "..."}

and `{"list": true}` is answered with what the watch is for. Nothing here waits: the watch's loop
calls `ControlSocket.poll`, and who is slow or silent is dropped.
"""

from __future__ import annotations

import errno
import json
import os
import re
import select
import socket
import stat
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latrace.analysis.words import visible
from latrace.tracer.errors import LatraceError, UsageError

DIRECTORY = Path("/run/latrace")
REASON_CHARACTERS = 500

_NAME = re.compile(r"watch-([1-9][0-9]{0,9})\.sock")
_TEMPORARY = re.compile(r"\.watch-([1-9][0-9]{0,9})\.tmp")
_MOST_BYTES = 8192
_MOST_CLIENTS = 8
_MOST_WATCHES = 100
_SILENT_S, _UNANSWERED_S = 2.0, 30.0
_PATIENCE_S = 10.0
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid

_HINT_NONE = (
    "start one with `latrace watch`; to one that runs where the socket can not be seen, send"
    " SIGUSR2: kill -USR2 PID"
)


# --- the watch's end -----------------------------------------------------------------------------


class Request:
    """Somebody wants a bundle. `answer` has to be called once; further calls do nothing."""

    def __init__(self, connection: socket.socket, *, reason: str, asked_by: str) -> None:
        self._connection: socket.socket | None = connection
        self.since_s = time.monotonic()
        self.reason = reason
        """Why, in the words of who asked; "" without. Escape it before printing."""
        self.asked_by = asked_by
        """The user, as the client told: `root`, or who typed sudo. Escape it, too."""

    def answer(self, message: str, *, ok: bool = True) -> None:
        """Say what came of it; `ok` False makes the command fail with this message."""
        connection, self._connection = self._connection, None
        if connection is not None:
            _reply(connection, {"ok": ok, "message": message})

    @property
    def is_answered(self) -> bool:
        """Whether nobody waits for an answer any more."""
        return self._connection is None

    def drop(self) -> None:
        """Hang up without an answer."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


@dataclass(slots=True)
class _Client:
    connection: socket.socket
    since_s: float


class ControlSocket:
    """Listens for requests to this process. `description` says what it watches, for the list.

    Raises LatraceError when `directory` is not safe or the socket cannot be made. `owner` is the
    uid that the directory belongs to and that every client must have.
    """

    def __init__(self, description: str, *, directory: Path = DIRECTORY, owner: int = 0) -> None:
        self._description = description
        self._owner = owner
        self._clients: dict[int, _Client] = {}
        self._requests: list[Request] = []
        self._name = f"watch-{os.getpid()}.sock"
        self.path = directory / self._name
        self._directory = _open_directory(directory, owner=owner, make=True)
        try:
            _remove_stale(self._directory)
            self._listener = self._listen()
        except OSError as error:
            os.close(self._directory)
            raise LatraceError(
                f"cannot listen on {self.path}: {(error.strerror or str(error)).lower()}",
                hint="`latrace trigger` needs it; SIGUSR2 does the same",
            ) from error
        self._inode = os.stat(self._name, dir_fd=self._directory).st_ino
        self._epoll = select.epoll()
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)

    def _listen(self) -> socket.socket:
        # It gets its name when it listens: one that does not is taken for a dead one's.
        temporary = f".watch-{os.getpid()}.tmp"
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=self._directory)
        listener = _new_socket()
        try:
            listener.bind(_path_of(self._directory, temporary))
            listener.listen(_MOST_CLIENTS)
            os.rename(temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except BaseException:
            listener.close()
            with suppress(OSError):
                os.unlink(temporary, dir_fd=self._directory)
            raise
        return listener

    def fileno(self) -> int:
        """A descriptor that can be read when there is something for `poll`."""
        return self._epoll.fileno()

    def poll(self) -> list[Request]:
        """Take in what has come, without waiting; the requests that the caller has to answer."""
        found = []
        ready = [fd for fd, _ in self._epoll.poll(0)]
        if self._listener.fileno() in ready:
            self._accept()
            ready = [fd for fd, _ in self._epoll.poll(0)]  # who comes has most often asked already
        for fd in ready:
            if fd in self._clients and (request := self._read(self._clients[fd])) is not None:
                found.append(request)
        if self._clients or self._requests:
            self._drop_slow()
        self._requests += found
        return found

    def _accept(self) -> None:
        for _ in range(2 * _MOST_CLIENTS):  # whoever knocks faster waits for the next time
            try:
                connection, _address = self._listener.accept()
            except OSError:  # nobody left, or gone again
                return
            crowded = len(self._clients) + len(self._requests) >= _MOST_CLIENTS
            if crowded or self._peer_uid(connection) != self._owner:
                connection.close()
                continue
            connection.setblocking(False)
            self._clients[connection.fileno()] = _Client(connection, time.monotonic())
            self._epoll.register(connection.fileno(), select.EPOLLIN)

    @staticmethod
    def _peer_uid(connection: socket.socket) -> int:
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        uid: int = _CREDENTIALS.unpack(raw)[1]
        return uid

    def _read(self, client: _Client) -> Request | None:
        """What a client wants; None when it is answered already, or has gone."""
        try:
            raw = client.connection.recv(_MOST_BYTES + 1)
        except BlockingIOError:
            return None
        except OSError:
            raw = b""
        self._forget(client)
        if not raw:
            client.connection.close()
            return None
        document = _parsed(raw)
        if document.get("list") is True:
            told = {"ok": True, "pid": os.getpid(), "description": self._description}
            _reply(client.connection, told)
            return None
        reason, asked_by = document.get("trigger"), document.get("by", "")
        if not isinstance(reason, str) or not isinstance(asked_by, str):
            _reply(client.connection, {"ok": False, "message": "the request was not understood"})
            return None
        return Request(
            client.connection,
            reason=_plain(reason)[:REASON_CHARACTERS],
            asked_by=_plain(asked_by)[:REASON_CHARACTERS] or "root",
        )

    def _forget(self, client: _Client) -> None:
        self._epoll.unregister(client.connection.fileno())
        del self._clients[client.connection.fileno()]

    def _drop_slow(self) -> None:
        now = time.monotonic()
        for client in list(self._clients.values()):
            if now - client.since_s > _SILENT_S:
                self._forget(client)
                client.connection.close()
        for request in self._requests:
            if now - request.since_s > _UNANSWERED_S:
                request.drop()
        self._requests = [request for request in self._requests if not request.is_answered]

    def close(self) -> None:
        """Hang up, and remove the socket. Safe to call again."""
        if self._directory < 0:
            return
        for request in self._requests:
            request.answer("the watch has ended", ok=False)
        for client in list(self._clients.values()):
            self._forget(client)
            client.connection.close()
        self._epoll.close()
        with suppress(OSError):
            if os.stat(self._name, dir_fd=self._directory).st_ino == self._inode:
                os.unlink(self._name, dir_fd=self._directory)
        self._listener.close()
        os.close(self._directory)
        self._directory = -1


# --- the command's end ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """A watch that runs on this host."""

    pid: int
    description: str
    """What it watches, in its own words; escape it before printing."""


def send(
    reason: str = "",
    *,
    pid: int | None = None,
    asked_by: str = "",
    directory: Path = DIRECTORY,
    owner: int = 0,
    patience_s: float = _PATIENCE_S,
) -> dict[str, Any]:
    """Ask a watch for a bundle, the only one that runs or the process `pid`; returns its answer.

    The answer has `ok` (bool) and `message` (text, to be escaped). Raises UsageError when several
    run and none was named, or the reason is too long; LatraceError when there is none, or it does
    not answer within `patience_s`.
    """
    reason = _plain(reason)
    if len(reason) > REASON_CHARACTERS:
        raise UsageError(
            f"the reason has {len(reason)} characters", hint=f"use at most {REASON_CHARACTERS}"
        )
    if pid is None:
        pid = _the_only_one(directory, owner)
    fd = _directory_of_watches(directory, owner)
    try:
        request = {"trigger": reason, "by": _plain(asked_by)[:REASON_CHARACTERS]}
        answer = _ask(fd, f"watch-{pid}.sock", request, patience_s=patience_s)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        others = list_watches(directory=directory, owner=owner)
        raise LatraceError(
            f"no watch runs as process {pid}",
            hint=f"there is: {_listed(others)}" if others else _HINT_NONE,
        ) from error
    except OSError as error:
        raise LatraceError(
            f"the watch, process {pid}, does not answer",
            hint=f"is it stopped, or busy? `kill -USR2 {pid}` asks it for a bundle, too",
        ) from error
    finally:
        os.close(fd)
    if not isinstance(answer.get("message"), str) or not isinstance(answer.get("ok"), bool):
        raise LatraceError(
            f"the watch, process {pid}, sent an answer that makes no sense",
            hint="is it another version of latrace?",
        )
    return answer


def list_watches(*, directory: Path = DIRECTORY, owner: int = 0) -> list[Watch]:
    """The watches that run on this host, by process id. Raises LatraceError."""
    try:
        fd = _directory_of_watches(directory, owner)
    except FileNotFoundError:
        return []
    found = []
    try:
        for pid, name in _sockets_in(fd):
            try:
                told = _ask(fd, name, {"list": True}, patience_s=_SILENT_S).get("description")
            except (FileNotFoundError, ConnectionRefusedError):  # it has ended, or was killed
                continue
            except OSError:
                told = None
            found.append(
                Watch(pid=pid, description=told if isinstance(told, str) else "does not answer")
            )
    finally:
        os.close(fd)
    return sorted(found, key=lambda watch: watch.pid)


def _the_only_one(directory: Path, owner: int) -> int:
    watches = list_watches(directory=directory, owner=owner)
    if not watches:
        raise LatraceError("no watch is running on this host", hint=_HINT_NONE)
    if len(watches) > 1:
        raise UsageError(
            f"{len(watches)} watches are running: say which one is meant",
            hint=f"--watch PID, one of: {_listed(watches)}",
        )
    return watches[0].pid


def _listed(watches: list[Watch]) -> str:
    shown = [f"{watch.pid} ({visible(watch.description)[:60]})" for watch in watches[:10]]
    return ", ".join(shown) + (f" and {len(watches) - 10} more" if len(watches) > 10 else "")


def _ask(
    directory: int, name: str, request: Mapping[str, Any], *, patience_s: float
) -> dict[str, Any]:
    with closing(_new_socket()) as connection:
        connection.settimeout(patience_s)
        connection.connect(_path_of(directory, name))
        connection.send(_packet(request))
        raw = connection.recv(_MOST_BYTES + 1)
    if not raw:
        raise TimeoutError(errno.ETIMEDOUT, "hung up")
    return _parsed(raw)


# --- both ends -----------------------------------------------------------------------------------


def _new_socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    made.setblocking(False)
    return made


def _path_of(directory: int, name: str) -> str:
    # There is no bindat(2): this way the directory is the one that was looked at, all the same.
    return f"/proc/self/fd/{directory}/{name}"


def _directory_of_watches(path: Path, owner: int) -> int:
    try:
        return _open_directory(path, owner=owner, make=False)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise LatraceError(
            f"cannot look into {path}: {(error.strerror or str(error)).lower()}",
            hint="the watches of this host have their sockets there",
        ) from error


def _open_directory(path: Path, *, owner: int, make: bool) -> int:
    """Open the directory of the sockets, whose only user is `owner`. OSError without `make`."""
    try:
        if make:
            with suppress(FileExistsError):
                path.mkdir(mode=0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if not make and error.errno == errno.ENOENT:
            raise
        link = error.errno in (errno.ENOTDIR, errno.ELOOP)
        told = "it is a link or no directory" if link else (error.strerror or "").lower()
        raise LatraceError(
            f"cannot use {path}: {told}",
            hint="it has to be a directory of root's, mode 0700; remove what is there"
            if link
            else "the sockets of `latrace watch` are there; is this root on the host itself?",
        ) from error
    status = os.fstat(fd)
    if status.st_uid != owner or status.st_mode & 0o022:
        os.close(fd)
        raise LatraceError(
            f"cannot use {path}: others than root could have put something there",
            hint=f"look at it and remove it: ls -la {path}",
        )
    if make and stat.S_IMODE(status.st_mode) != 0o700:
        os.fchmod(fd, 0o700)
    return fd


def _sockets_in(directory: int) -> Iterator[tuple[int, str]]:
    for name in sorted(os.listdir(directory))[:_MOST_WATCHES]:
        if found := _NAME.fullmatch(name):
            yield int(found[1]), name


def _remove_stale(directory: int) -> None:
    """Remove what watches that were killed have left behind: sockets that nobody listens on."""
    for name in os.listdir(directory):
        if (found := _TEMPORARY.fullmatch(name)) and not Path(f"/proc/{found[1]}").exists():
            with suppress(OSError):
                os.unlink(name, dir_fd=directory)
    for _pid, name in _sockets_in(directory):
        with closing(_new_socket()) as connection:
            try:
                connection.connect(_path_of(directory, name))
            except ConnectionRefusedError:
                with suppress(OSError):
                    os.unlink(name, dir_fd=directory)
            except OSError:  # its queue is full, or it is none of ours
                continue


def _packet(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=True).encode("ascii") + b"\n"


def _reply(connection: socket.socket, document: Mapping[str, Any]) -> None:
    """Send an answer and hang up; whoever does not take it at once goes without."""
    with connection, suppress(OSError):
        connection.send(_packet(document), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def _parsed(raw: bytes) -> dict[str, Any]:
    """A packet's document; an empty one for what is none, or too long."""
    if len(raw) > _MOST_BYTES:
        return {}
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _plain(text: str) -> str:
    """Text without what no encoding can write: bytes of a command line that were not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
