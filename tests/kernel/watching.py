"""Run `latrace watch` as a user does, and look at what it says and leaves."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tracing import build

import latrace
from latrace.analysis.capture import Capture

LATRACE = [sys.executable, "-m", "latrace"]
TIMEOUT_S = 60.0


@dataclass(slots=True)
class Steady:
    """The workload tests/workloads/steady.c: threads that sleep and work on one CPU."""

    process: subprocess.Popen[str]

    @property
    def pid(self) -> int:
        return self.process.pid

    def convoy(self, milliseconds: int) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"convoy {milliseconds}\n")
        self.process.stdin.flush()


def build_steady(directory: Path) -> Path:
    return build(directory, "steady")


@contextlib.contextmanager
def steady(
    program: Path, *, cpu: int = 1, threads: int = 4, period_us: int = 4000, work_us: int = 50
) -> Iterator[Steady]:
    """A service under steady load, some thousand waits a second."""
    words = [program, cpu, threads, period_us, work_us]
    process = subprocess.Popen(
        [str(word) for word in words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    try:
        yield Steady(process)
    finally:
        process.kill()
        process.communicate()


HOG = """
import time
open("/proc/self/comm", "w").write("batch-indexer")
end = time.monotonic() + {seconds}
while time.monotonic() < end:
    busy = time.monotonic() + 0.03
    while time.monotonic() < busy: pass
    time.sleep(0.003)
"""


def hog(seconds: float, *, cpu: int = 1) -> None:
    """Another, real-time, that has that CPU for 30 ms of every 33."""
    command = ["taskset", "-c", str(cpu), "chrt", "-f", "10", sys.executable, "-Sc"]
    subprocess.run([*command, HOG.format(seconds=seconds)], check=True, timeout=TIMEOUT_S)


@dataclass(slots=True)
class Watching:
    """A watch that runs."""

    process: subprocess.Popen[str]
    output: Path
    lines: list[str] = field(default_factory=list)
    """What it said so far, without the time of day."""
    said: threading.Condition = field(default_factory=threading.Condition)

    def read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            with self.said:
                self.lines.append(re.sub(r"^\d\d:\d\d:\d\d  ", "", line.rstrip("\n")))
                self.said.notify_all()

    def wait_for(self, beginning: str, *, count: int = 1, timeout_s: float = TIMEOUT_S) -> str:
        """The `count`-th line that begins so, when it has come."""
        deadline = time.monotonic() + timeout_s
        with self.said:
            while True:
                found = said(self, beginning)
                if len(found) >= count:
                    return found[count - 1]
                left = deadline - time.monotonic()
                assert left > 0 and self.process.poll() is None, (beginning, self.lines)
                self.said.wait(min(left, 0.5))

    def ended(self, timeout_s: float = TIMEOUT_S) -> int:
        """The exit code, when it has ended."""
        return self.process.wait(timeout_s)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.ended()

    @property
    def bundles(self) -> list[Path]:
        return sorted(self.output.glob("spike-*"))

    def bundle(self, number: int = 0) -> Bundle:
        return Bundle(self.bundles[number])


def said(watch: Watching, beginning: str) -> list[str]:
    """The lines so far that begin so."""
    return [line for line in watch.lines if line.startswith(beginning)]


@dataclass(slots=True)
class Bundle:
    """A bundle on disk."""

    path: Path

    @property
    def capture(self) -> Capture:
        return latrace.open(self.path)

    @property
    def spike(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "spike.json").read_text()))


@contextlib.contextmanager
def watching(output: Path, *arguments: object, **settings: Any) -> Iterator[Watching]:
    """Watch, from when its probes are attached and its rules are armed."""
    words = ["watch", "-o", output, *arguments]
    process = subprocess.Popen(
        [*LATRACE, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | settings.pop("env", {}),
        **settings,
    )
    watch = Watching(process, output)
    reader = threading.Thread(target=watch.read)
    reader.start()
    try:
        watch.wait_for("watching ")
        time.sleep(1.5)  # it is armed
        yield watch
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
        reader.join()
        assert process.stdout and process.stderr
        process.stdout.close()
        process.stderr.close()
