"""The demonstration's victim, its client and the culprit: three small real programs.

The victim is a TCP service that does a little work for each request; its client asks at a fixed
rate and times each answer; the culprit computes without pause on the service's CPU. They run as
the calling user and end with the process that started them, however that ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from hashlib import sha256
from types import TracebackType
from typing import NoReturn, Self

from latrace.tracer.caller import Account, become
from latrace.tracer.errors import LatraceError

SERVICE, CLIENT, HOG = "demo-service", "demo-client", "demo-hog"
"""Names of the three, as the kernel and the report show them."""

REQUESTS_PER_S = 100
WORK_MS = 3
"""What a request costs the service in CPU time."""

_MESSAGE_BYTES = 16
_PAGE = bytes(16 << 10)
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_ANSWER_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """How long the client waited for its answers in one phase, in nanoseconds."""

    count: int
    p50_ns: int
    p99_ns: int
    max_ns: int


def answers_of(durations_ns: list[int]) -> Answers:
    """The figures of one phase; quantiles are the smallest value that so many do not exceed."""
    ordered = sorted(durations_ns)
    if not ordered:
        return Answers(count=0, p50_ns=0, p99_ns=0, max_ns=0)
    last = len(ordered) - 1
    return Answers(
        count=len(ordered),
        p50_ns=ordered[min(last, len(ordered) // 2)],
        p99_ns=ordered[min(last, len(ordered) * 99 // 100)],
        max_ns=ordered[last],
    )


class Cast:
    """The three programs, running within `with`; the culprit is silent until `provoke`.

    Raises `LatraceError` when one of them does not come up. All are killed on the way out.
    """

    def __init__(self, account: Account) -> None:
        self.cpu, self.client_cpu = _choose_cpus()
        self._account = account
        self._players = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as players:
            listener = players.enter_context(socket.create_server(("127.0.0.1", 0)))
            address = listener.getsockname()
            self.service = players.enter_context(
                Player(SERVICE, self._account, self.cpu, lambda _: _serve(listener))
            )
            self.hog = players.enter_context(Player(HOG, self._account, self.cpu, _compute))
            self.client = players.enter_context(
                Player(
                    CLIENT, self._account, self.client_cpu, lambda control: _ask(address, control)
                )
            )
            self._players = players.pop_all()
        # It is about the hog: where there is another CPU, latrace itself keeps off this one.
        if others := os.sched_getaffinity(0) - {self.cpu}:
            os.sched_setaffinity(0, others)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._players.close()

    def begin(self) -> None:
        """Let the client ask; its answers count from now on."""
        self.client.tell(b"b")

    def provoke(self) -> None:
        """Let the culprit compute; the client counts what follows apart."""
        self.client.tell(b"p")
        self.hog.tell(b"b")

    def finish(self) -> tuple[Answers, Answers]:
        """End the client and return what it saw before and after `provoke`."""
        self.client.tell(b"e")
        try:
            alone, beside = json.loads(self.client.hear())
        except ValueError:
            raise LatraceError(
                f"{CLIENT} gave no account of what it saw", hint="was it killed? try again"
            ) from None
        return Answers(**alone), Answers(**beside)


class Player:
    """One program of the demo in a child process, pinned to `cpu`; killed at the end of `with`."""

    def __init__(
        self, name: str, account: Account, cpu: int, play: Callable[[socket.socket], None]
    ) -> None:
        self.name = name
        self._control, theirs = socket.socketpair()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            self._control.close()
            _be_player(name, account, cpu, play, control=theirs, parent=parent)
        theirs.close()

    def __enter__(self) -> Self:
        try:
            self._control.settimeout(_ANSWER_TIMEOUT_S)
            if self._control.recv(1) != b"r":
                raise LatraceError(
                    f"{self.name} did not start", hint="may the calling user run processes?"
                )
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def tell(self, word: bytes) -> None:
        """Give the program its cue. Raises `LatraceError` when it has ended."""
        try:
            self._control.sendall(word)
        except OSError as error:
            raise LatraceError(f"{self.name} has ended", hint="was it killed? try again") from error

    def hear(self) -> bytes:
        """All that the program says until it ends or falls silent."""
        parts = []
        try:
            while part := self._control.recv(1 << 16):
                parts.append(part)
        except TimeoutError:
            pass
        return b"".join(parts)

    def _end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._control.close()


def _be_player(
    name: str,
    account: Account,
    cpu: int,
    play: Callable[[socket.socket], None],
    *,
    control: socket.socket,
    parent: int,
) -> NoReturn:
    """In the child: become the program `name` and play its part to the end."""
    try:
        os.setpgid(0, 0)  # Ctrl-C is for the tracer, which ends these itself
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        become(account)
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_NAME, name.encode("ascii"))
        # After the change of user, which clears it.
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            os.sched_setaffinity(0, {cpu})
            # Batch: waking up does not preempt. So the victim waits for its turn beside the
            # culprit, as a busy service does.
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            control.sendall(b"r")
            play(control)
    finally:
        os._exit(0)


def _serve(listener: socket.socket) -> None:
    """Answer requests of one client, one after the other."""
    connection, _ = listener.accept()
    while request := connection.recv(_MESSAGE_BYTES):
        _work()
        connection.sendall(request)


def _work() -> None:
    end_ns = time.thread_time_ns() + int(WORK_MS * 1e6)
    while time.thread_time_ns() < end_ns:
        sha256(_PAGE)


def _compute(control: socket.socket) -> None:
    """Wait for the cue, then never stop."""
    if control.recv(1):
        while True:
            sha256(_PAGE)


def _ask(address: tuple[str, int], control: socket.socket) -> None:
    """Ask at a fixed rate, time the answers, and tell them when the cue comes."""
    phases: tuple[list[int], list[int]] = ([], [])
    phase = 0
    period_ns = 1_000_000_000 // REQUESTS_PER_S
    with socket.create_connection(address) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        control.recv(1)
        due_ns = time.monotonic_ns()
        while True:
            pause_ns = max(0, due_ns - time.monotonic_ns())
            if select.select([control], [], [], pause_ns / 1e9)[0]:
                if control.recv(1) != b"p":
                    break
                phase = 1
                continue
            connection.sendall(bytes(_MESSAGE_BYTES))
            connection.recv(_MESSAGE_BYTES, socket.MSG_WAITALL)
            # From when it was due: a client that can not ask in time waits as well.
            phases[phase].append(time.monotonic_ns() - due_ns)
            due_ns = max(due_ns + period_ns, time.monotonic_ns())
    control.sendall(json.dumps([asdict(answers_of(phase)) for phase in phases]).encode())


def _choose_cpus() -> tuple[int, int]:
    """The CPU of victim and culprit, and one for the client: another one, if there is any."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[-1], allowed[0]
