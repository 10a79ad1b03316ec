"""The tracer's end of the unprivileged worker: start it, ask it, outlive it."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

from latrace.tracer.symbols import wire
from latrace.tracer.symbols.elf import Links
from latrace.tracer.symbols.table import Image

FILE_TIMEOUT_S: Final = 20.0
NAMES_TIMEOUT_S: Final = 5.0
START_TIMEOUT_S: Final = 10.0
MAX_FAILED_STARTS: Final = 3
MAX_DEADLY_NAMES: Final = 4
NAMES_PER_REQUEST: Final = 4096
_ENDS_WITHIN_S: Final = 5.0
_PING: Final = {"op": "demangle", "count": 0}

NICENESS: Final = 10
"""Names can wait, and the targets should not: what they wait for must not be this."""

T = TypeVar("T")


class WorkerError(Exception):
    """The worker died, was too slow, or talked nonsense; it has been ended."""


class _Patience:
    """How long names are tried one by one: for so many seconds, and until so many were deadly."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: float | None = None
        self.deadly = 0

    def begin(self) -> None:
        """The time runs from now on, if it did not."""
        self._until = self._until or time.monotonic() + self._seconds

    @property
    def lasts(self) -> bool:
        """Whether another name may be tried."""
        late = self._until is not None and time.monotonic() > self._until
        return not late and self.deadly < MAX_DEADLY_NAMES


class Worker:
    """One child process, started at the first request and again after each failure.

    Not thread-safe. `starts`, `deaths` and `timeouts` count since the beginning.
    """

    def __init__(
        self,
        *,
        command: Sequence[str] | None = None,
        file_timeout_s: float = FILE_TIMEOUT_S,
        names_timeout_s: float = NAMES_TIMEOUT_S,
    ) -> None:
        # Isolated mode: neither the working directory nor the environment chooses the code.
        default = (sys.executable, "-I", "-m", "latrace.tracer.symbols.worker")
        self._command = tuple(command or default)
        self._file_timeout_s = file_timeout_s
        self._names_timeout_s = names_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._served = False
        self._abandoned = False
        self._failed_starts = 0
        self._niceness = NICENESS
        self.starts = 0
        self.deaths = 0
        self.timeouts = 0

    def start(self) -> None:
        """Start the child without waiting for it. Does nothing when it runs."""
        if self._abandoned:
            raise WorkerError("the worker was given up")
        if self._process is not None:
            return
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise WorkerError("the worker does not start")
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [*self._command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                cwd="/",
                # BLAS would start a thread for each CPU, for nothing.
                env={"LC_ALL": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            self._failed_starts += 1
            raise WorkerError("the worker does not start") from error
        finally:
            theirs.close()
        self._connection = ours
        self._served = False
        self.starts += 1
        self._set_niceness()

    @property
    def hurried(self) -> bool:
        """Whether the child is as nice as we are."""
        return self._niceness == 0

    def hurry(self) -> None:
        """Let the child, and those that come after it, wait for nobody. From any thread."""
        self._niceness = 0
        self._set_niceness()

    def _set_niceness(self) -> None:
        process = self._process
        if process is not None:
            with suppress(OSError):  # it has ended, or we may not make it less nice
                ours = os.getpriority(os.PRIO_PROCESS, 0)
                os.setpriority(os.PRIO_PROCESS, process.pid, ours + self._niceness)

    def elf(self, fd: int) -> Image | int:
        """Parse the file behind `fd`. An int is a status of `wire`. Raises WorkerError."""
        return self._ask({"op": "elf"}, b"", (fd,), self._file_timeout_s, wire.read_image)

    def debug(self, fd: int, *, build_id: bytes, crc: int) -> Image | int:
        """As `elf`, for a separate debug file that must belong to that build."""
        request = {"op": "debug", "build_id": build_id.hex(), "crc": crc}
        return self._ask(request, b"", (fd,), self._file_timeout_s, wire.read_image)

    def links(self, fd: int) -> Links | int:
        """Which build the file behind `fd` is of, and what else there may be of it.

        An int is a status of `wire`. Raises WorkerError.
        """
        return self._ask({"op": "links"}, b"", (fd,), self._file_timeout_s, wire.read_links)

    def chains(
        self, fd: int, addresses: Sequence[int], *, alt: int | None, build_id: bytes
    ) -> tuple[list[list[int]], list[bytes]] | int:
        """The functions at ELF virtual addresses by the DWARF behind `fd`, innermost first.

        As places in a list of names (mangled). `alt`: what dwz put aside. Raises WorkerError.
        """
        count = len(addresses)
        return self._ask(
            {"op": "chains", "count": count, "build_id": build_id.hex()},
            struct.pack(f"={count}Q", *addresses),
            (fd,) if alt is None else (fd, alt),
            self._file_timeout_s,
            lambda read: wire.read_chains(read, count),
        )

    def section(self, fd: int) -> tuple[bytes, bytes] | int:
        """Where the file behind `fd` has call frame information (JSON), and the sections' bytes.

        Both are empty where it has none. An int is a status of `wire`. Raises WorkerError.
        """
        return self._ask({"op": "section"}, b"", (fd,), self._file_timeout_s, wire.read_blobs)

    def unwind_table(self, fields: list[dict[str, int]], sections: bytes) -> bytes | int:
        """The table made of such sections. An int is a status of `wire`. Raises WorkerError."""
        request = {"op": "unwind", "places": fields}
        answer = self._ask(request, sections, (), self._file_timeout_s, wire.read_blobs)
        return answer if isinstance(answer, int) else answer[1]

    def demangle(self, names: Sequence[bytes]) -> list[bytes]:
        """Readable forms, the name itself where there is none. Never raises.

        A name that kills the worker stays mangled and does not take its neighbours along, unless
        there are many such names, or slow ones: then the rest stays mangled.
        """
        result: list[bytes] = []
        patience = _Patience(self._names_timeout_s)
        for begin in range(0, len(names), NAMES_PER_REQUEST):
            batch = list(names[begin : begin + NAMES_PER_REQUEST])
            try:
                result += self._demangle(batch) if patience.lasts else batch
            except WorkerError:
                # What an ordinary request may take besides, for all of them together.
                patience.begin()
                result += self._demangle_singly(batch, patience)
        return result

    def _demangle_singly(self, names: list[bytes], patience: _Patience) -> list[bytes]:
        result = []
        for name in names:
            try:
                result += self._demangle([name]) if patience.lasts else [name]
            except WorkerError:
                patience.deadly += 1
                result.append(name)
        return result

    def _demangle(self, names: list[bytes]) -> list[bytes]:
        return self._ask(
            {"op": "demangle", "count": len(names)},
            wire.names_payload(names),
            (),
            self._names_timeout_s,
            lambda read: wire.read_names(read, len(names)),
        )

    def _ask(
        self,
        request: dict[str, Any],
        payload: bytes,
        fds: Sequence[int],
        timeout_s: float,
        reply: Callable[[wire.Read], T],
    ) -> T:
        self.start()
        if not self._served and request is not _PING:
            # One that its first file or name ends must not look like one that does not start.
            self._ask(_PING, b"", (), timeout_s, lambda read: wire.read_names(read, 0))
        connection = self._connection
        if connection is None:
            raise WorkerError("the worker does not run")
        # The child imports numpy before it answers its first request.
        deadline = time.monotonic() + timeout_s + (0.0 if self._served else START_TIMEOUT_S)

        def remaining() -> float:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            return left

        def read(length: int) -> bytes:
            data = bytearray(length)
            view, have = memoryview(data), 0
            while have < length:
                connection.settimeout(remaining())
                count = connection.recv_into(view[have:])
                if not count:
                    raise ConnectionError("the worker hung up")
                have += count
            return bytes(data)

        text = json.dumps(request).encode()
        header = wire.REQUEST.pack(wire.MAGIC, len(text), len(payload))
        try:
            connection.settimeout(remaining())
            message = header + text + payload
            sent = socket.send_fds(connection, [message], fds)
            connection.sendall(message[sent:])
            answer = reply(read)
        except TimeoutError as error:
            self.timeouts += 1
            self._end()
            raise WorkerError("the worker took too long") from error
        except (OSError, wire.WireError) as error:
            self.deaths += 1
            self._failed_starts += not self._served
            self._end()
            raise WorkerError("the worker died") from error
        self._served = True
        self._failed_starts = 0
        return answer

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return None if self._process is None else self._process.pid

    def _end(self) -> None:
        process, self._process = self._process, None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if process is not None:
            with suppress(PermissionError):  # it is nobody's, and we lack CAP_KILL
                process.kill()
            with suppress(subprocess.TimeoutExpired):  # hung up on, it ends by itself
                process.wait(_ENDS_WITHIN_S)

    def abandon(self) -> None:
        """End the child for good; may be called by another thread than the one that asks it.

        That one gets a WorkerError at once, and so does whoever asks from now on.
        """
        self._abandoned = True
        connection = self._connection
        if connection is not None:
            with suppress(OSError):  # closed meanwhile
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the child."""
        self._end()
