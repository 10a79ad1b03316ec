"""A program that is started but held before its first instruction, until tracing is in place."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from latrace.analysis.words import visible
from latrace.tracer.caller import Account, become, environment_of
from latrace.tracer.errors import LatraceError

_ERRNO = struct.Struct("=i")
_POLL_S = 0.02
# Python ignores these two for itself; a program expects their default action.
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
_HANDLED_BY_US = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class HeldProgram:
    """`command` in a child process that runs as `account`.

    The constructor returns when the child has taken on the user's rights and found the program.
    `release` lets it begin. Raises `LatraceError` when it can not be started.
    """

    def __init__(self, command: Sequence[str], *, account: Account) -> None:
        self._command = list(command)
        self._status: int | None = None
        gate_read, self._gate = os.pipe()
        self._report, report_write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._gate)
            os.close(self._report)
            _be_program(self._command, account, gate=gate_read, report=report_write)
        os.close(gate_read)
        os.close(report_write)
        try:
            self._raise_reported(ready=b"\0")
        except BaseException:
            self.close()
            raise

    def release(self) -> None:
        """Let the program begin; returns when it has, or raises `LatraceError`."""
        try:
            os.write(self._gate, b"\0")
        except BrokenPipeError:
            raise self._ended_early() from None
        self._raise_reported(ready=b"")  # nothing: execve closed the pipe

    def terminate(self) -> None:
        """Ask the program to end (SIGTERM), if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def poll(self) -> int | None:
        """The program's wait status if it has ended, else None."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = status
        return self._status

    def wait(self, *, timeout_s: float) -> int | None:
        """The wait status once the program has ended; None if it has not within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return self._status

    def close(self) -> None:
        """Let go of the child; one that was never released ends."""
        for fd in (self._gate, self._report):
            if fd >= 0:
                os.close(fd)
        held, self._gate, self._report = self._gate >= 0, -1, -1
        if held and self._status is None:
            self.wait(timeout_s=0.2)

    def _raise_reported(self, *, ready: bytes) -> None:
        """Read what the child reports: `ready`, or the errno that stopped it."""
        data = os.read(self._report, _ERRNO.size)
        if data == ready:
            return
        self.wait(timeout_s=1.0)
        if len(data) != _ERRNO.size:
            raise self._ended_early()
        code = _ERRNO.unpack(data)[0]
        name = visible(self._command[0])
        raise LatraceError(f"can not start {name}: {os.strerror(code)}", hint=_hint(code))

    def _ended_early(self) -> LatraceError:
        name = visible(self._command[0])
        return LatraceError(f"{name} ended before it began", hint="was it interrupted or killed?")


def _hint(code: int) -> str:
    if code == errno.ENOENT:
        return "sudo sets its own PATH: give the full path of the program"
    if code == errno.EACCES:
        return "it is started as the user who typed sudo: may that user execute it?"
    if code == errno.ENOEXEC:
        return "it is no program: a script needs a first line such as #!/bin/sh"
    return "try to start it without latrace"


def _be_program(command: list[str], account: Account, *, gate: int, report: int) -> NoReturn:
    """In the child: become `account`, find the program, wait for the gate, execute."""
    try:
        for number in (*_IGNORED_BY_PYTHON, *_HANDLED_BY_US):
            if number in _IGNORED_BY_PYTHON or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        # The name it will have: the tracer sees it before the program begins.
        Path("/proc/self/comm").write_bytes(os.fsencode(Path(command[0]).name)[:15])
        become(account)
        env = environment_of(account)
        path = _find(command[0], env.get("PATH", os.defpath))
        os.write(report, b"\0")
        if os.read(gate, 1):
            os.execve(path, command, env)  # noqa: S606 - no shell is what we want
    except OSError as error:
        os.write(report, _ERRNO.pack(error.errno or errno.EINVAL))
    finally:
        os._exit(127)


def _find(name: str, search: str) -> str:
    """The program's file; raises `OSError` as execvp(3) would."""
    found = shutil.which(name, path=search)
    if found is not None:
        return found
    if os.sep in name:
        if not os.path.exists(name):  # noqa: PTH110 - a path of the user's, taken as it is
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
