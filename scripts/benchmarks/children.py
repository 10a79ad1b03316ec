"""Loads and tools as child processes: started, watched and ended by their id, whatever happens."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from .errors import BenchError

# Without what scripts/bench set for itself: tools are to run as a user's do.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

OUR_ENVIRONMENT = ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}

_READY_TIMEOUT_S, _END_TIMEOUT_S, _LOAD_TIMEOUT_S = 20.0, 60.0, 300.0
_STEADY_S, _POLL_S = 0.3, 0.02
_ATTACHED = re.compile(r"bpf[-_]link|\[perf_event\]")


def python(module: str, *arguments: str) -> list[str]:
    """The command of one of our own modules as a process of its own, in OUR_ENVIRONMENT."""
    return [sys.executable, "-P", "-m", f"{__package__}.{module}", *arguments]


@dataclass(frozen=True, slots=True)
class Load:
    """Something to slow down: a command that does `operations` and prints how long they took."""

    argv: tuple[str, ...]
    comm: str
    """The name that its threads have, for tools that can only filter on names."""
    operations: int


BYSTANDER = Load(("true",), "sh", 1)
"""While it is held, a process that sleeps: a target for tracers of somebody else."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run of a load took, per operation."""

    wall_ns: float
    """By the load's own clock."""
    cpu_ns: float
    """CPU time of all its threads: does not see other processes, but no tracer's reader either."""


class HeldLoad:
    """A load that has its process id already and begins when told to."""

    def __init__(self, load: Load) -> None:
        self._load = load
        # The shell waits for a line and then becomes the load: the id stays.
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r go && exec "$@"', "sh", *load.argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
        )
        self._input = cast(IO[bytes], self._process.stdin)
        self._output = cast(IO[bytes], self._process.stdout)
        self.pid = self._process.pid

    def begin(self) -> None:
        """Let it run."""
        self._input.write(b"go\n")
        self._input.close()

    def finish(self) -> Cost:
        """Wait for its end. Raises BenchError when it failed."""
        text = self._output.read().decode(errors="replace")
        _, status, usage = os.wait4(self.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        if self._process.returncode:
            raise BenchError(f"{self._load.argv[0]} failed: {text.strip()[-200:]}")
        return Cost(
            reported_s(text) * 1e9 / self._load.operations,
            (usage.ru_utime + usage.ru_stime) * 1e9 / self._load.operations,
        )

    def end(self) -> None:
        """Make sure that it is gone."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._process.wait()
        for pipe in (self._input, self._output):
            with contextlib.suppress(OSError):
                pipe.close()


@contextlib.contextmanager
def held(load: Load) -> Iterator[HeldLoad]:
    """Start a load, held, and see to its end."""
    process = HeldLoad(load)
    try:
        yield process
    finally:
        process.end()


def reported_s(text: str) -> float:
    """The time that `perf bench` says its operations took. Raises BenchError."""
    found = re.search(r"Total time:\s*([\d.]+) \[sec\]", text)
    if not found or not float(found[1]):
        raise BenchError(f"no time in what the load printed: {text.strip()[-200:]!r}")
    # The pipe benchmark has more digits on another line.
    finer = re.search(r"([\d.]+) usecs/op\s+(\d+) ops/sec", text)
    done = re.search(r"Executed (\d+) ", text)
    return float(finer[1]) * 1e-6 * int(done[1]) if finer and done else float(found[1])


@contextlib.contextmanager
def tool(argv: Sequence[str], *, ready_text: str | None, folder: Path) -> Iterator[Running]:
    """Start a tracer and wait until it traces; interrupt it and wait for its end.

    Ready is: it printed `ready_text`, or where a tool says nothing useful, it holds a BPF link or a
    perf event and has opened nothing more for 0.3 s. Raises BenchError with its last words.
    """
    with tempfile.TemporaryFile(dir=folder) as words:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
            cwd=folder,
        )
        running = Running(process, words)
        try:
            running.wait_until_ready(ready_text)
            yield running
            running.interrupt()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


class Running:
    """A tracer that runs."""

    def __init__(self, process: subprocess.Popen[bytes], words: IO[bytes]) -> None:
        self.process = process
        self._words = words

    def said(self) -> str:
        """Everything it printed so far."""
        size = os.fstat(self._words.fileno()).st_size
        return os.pread(self._words.fileno(), size, 0).decode(errors="replace")

    def wait_until_ready(self, ready_text: str | None) -> None:
        """Wait until it traces. Raises BenchError."""
        deadline = time.monotonic() + _READY_TIMEOUT_S
        opened, since = "", time.monotonic()
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise BenchError(f"it ended at once: {self._last_words()}")
            if ready_text is not None:
                if ready_text in self.said():
                    return
            else:
                now, before = _open_files(self.process.pid), opened
                if now != before:
                    opened, since = now, time.monotonic()
                elif _ATTACHED.search(now) and time.monotonic() - since > _STEADY_S:
                    return
            time.sleep(_POLL_S)
        raise BenchError(f"it was not ready within {_READY_TIMEOUT_S:.0f} s: {self._last_words()}")

    def interrupt(self) -> None:
        """Ctrl-C, if it still runs, and wait for its end. Raises BenchError."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        self.wait()

    def wait(self) -> None:
        """Wait for its end. Raises BenchError when it does not come, or is a failure."""
        try:
            code = self.process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise BenchError(f"it did not end within {_END_TIMEOUT_S:.0f} s") from None
        if code not in (0, -signal.SIGINT, 128 + signal.SIGINT):
            raise BenchError(f"exit code {code}: {self._last_words()}")

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.said().splitlines() if line.strip()]
        return " / ".join(lines[-3:])[-300:] or "without a word"


def _open_files(pid: int) -> str:
    """What a process has open, as text to compare; "" when it is gone."""
    try:
        found = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return ""
    return "\n".join(sorted(found))
