"""What is done with a bundle that is on disk: it is explained, and the user's program is told.

Both run beside the watch, as the user whom the bundle belongs to. The explanation reads names that
a target chose and draws pictures: nothing for a process that is root, or that drains a ring.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from latrace.tracer.caller import calling_account, environment_of

EXPLAIN_TIMEOUT_S: Final = 1800.0
"""It only runs where nobody else wants to: on a busy host it takes its time."""
_MOST_WORDS: Final = 2000
_PROGRAM_S: Final = 1.0
"""So long the end of a watch waits for what becomes of the user's program."""


@dataclass(frozen=True, slots=True)
class Explained:
    """A bundle that is done; `trouble` says why its explanation is missing."""

    path: Path
    headline: str
    trouble: str


@dataclass(slots=True)
class _Running:
    path: Path
    process: subprocess.Popen[bytes]
    began_s: float


class Explainer:
    """Explains one bundle after the other, each in a process of its own.

    `on_spike`: a program to be started with the path of each; `say` gets lines for people.
    """

    def __init__(self, *, on_spike: Sequence[str], say: Callable[[str], None]) -> None:
        self._on_spike = tuple(on_spike)
        self._say = say
        self._todo: deque[Path] = deque()
        self._running: _Running | None = None
        self._program: subprocess.Popen[bytes] | None = None

    def add(self, path: Path) -> None:
        """Explain this bundle when the ones before it are done."""
        self._todo.append(path)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to be explained."""
        return self._running is None and not self._todo

    def poll(self) -> list[Explained]:
        """Go on; returns the bundles that are done. Never waits."""
        self._look_at_program()
        done = []
        if self._running is not None and (explained := self._ended(self._running)) is not None:
            self._running = None
            done.append(explained)
            self._tell(explained.path)
        if self._running is None and self._todo:
            path = self._todo.popleft()
            try:
                self._start(path)
            except OSError as error:  # no process is to be had
                done.append(Explained(path, "", (error.strerror or str(error)).lower()))
                self._tell(path)
        return done

    def _look_at_program(self) -> None:
        if self._program is not None and self._program.poll() is not None:
            if self._program.returncode:
                self._say(f"!!! the --on-spike program ended with {self._program.returncode}")
            self._program = None

    def _start(self, path: Path) -> None:
        process = subprocess.Popen(
            # Isolated mode: neither the working directory nor the environment chooses the code.
            [sys.executable, "-I", "-m", "latrace.tracer.watch.analysis", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            start_new_session=True,
        )
        # Even a nice program keeps one that wakes up waiting for a slice; an idle one does not.
        with contextlib.suppress(OSError):
            os.sched_setscheduler(process.pid, os.SCHED_IDLE, os.sched_param(0))
        self._running = _Running(path, process, time.monotonic())

    @staticmethod
    def _ended(running: _Running) -> Explained | None:
        process = running.process
        if process.poll() is None:
            if time.monotonic() - running.began_s < EXPLAIN_TIMEOUT_S:
                return None
            process.kill()
            process.communicate()
            return Explained(running.path, "", "it took too long")
        out, err = (_last_line(stream) for stream in process.communicate())
        if process.returncode:
            cause = err.removeprefix("latrace: ") or f"it ended with {process.returncode}"
            return Explained(running.path, "", cause)
        return Explained(running.path, out, "")

    def _tell(self, path: Path) -> None:
        """Start the user's program, as the user; one at a time."""
        if not self._on_spike:
            return
        if self._program is not None:
            self._say("!!! the --on-spike program still runs; not started again")
            return
        account = calling_account()
        identity = (
            {"user": account.uid, "group": account.gid, "extra_groups": list(account.groups)}
            if account.switched
            else {}
        )
        try:
            self._program = subprocess.Popen(  # type: ignore[call-overload]
                [*self._on_spike, str(path)],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                env=environment_of(account),
                start_new_session=True,
                **identity,
            )
        except (OSError, ValueError) as error:
            self._say(f"!!! the --on-spike program does not start: {error}")

    def finish(self, timeout_s: float) -> list[Explained]:
        """Wait for what is under way, at most so long; then end it."""
        done, deadline = [], time.monotonic() + timeout_s
        if self._running is not None:  # somebody waits for it now
            with contextlib.suppress(OSError):
                os.sched_setscheduler(self._running.process.pid, os.SCHED_OTHER, os.sched_param(0))
        while not self.is_idle and time.monotonic() < deadline:
            done += self.poll()
            time.sleep(0.05)
        left = [] if self._running is None else [self._running.path]
        done += [Explained(path, "", "the watch has ended") for path in (*left, *self._todo)]
        deadline = time.monotonic() + _PROGRAM_S
        while self._program is not None and time.monotonic() < deadline:
            self._look_at_program()
            time.sleep(0.05)
        self.close()
        return done

    def close(self) -> None:
        """End the explanation under way; the user's program is the user's. Safe to call again."""
        running, self._running = self._running, None
        self._todo.clear()
        if running is not None:
            running.process.kill()
            running.process.communicate()


def _last_line(data: bytes) -> str:
    lines = data[-_MOST_WORDS:].decode("utf-8", "backslashreplace").strip().splitlines()
    return lines[-1] if lines else ""
