"""Run a program with a known answer under a trace, on the live kernel."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import latrace
from latrace.analysis.capture import Capture
from latrace.tracer.options import Options
from latrace.tracer.outputs import create_output_dir
from latrace.tracer.session import Tracer

WORKLOADS = Path(__file__).parent.parent / "workloads"


def build(directory: Path, name: str = "waits") -> Path:
    """Compile a workload with frame pointers."""
    program = directory / name
    flags = ["-O2", "-fno-omit-frame-pointer", "-pthread", "-Wall"]
    subprocess.run(["cc", *flags, "-o", program, WORKLOADS / f"{name}.c"], check=True)
    return program


@dataclass(frozen=True, slots=True)
class Traced:
    """A finished trace and what the program said of itself."""

    capture: Capture
    facts: dict[str, float]
    pid: int

    @property
    def quality(self) -> dict[str, Any]:
        return dict(self.capture.manifest["quality"])


@contextlib.contextmanager
def tracing(options: Options, output: Path) -> Iterator[None]:
    """Trace processes that run already, while the block does."""
    stop = threading.Event()
    with Tracer(options, lambda: create_output_dir(output, force=False), command=[]) as tracer:
        runner = threading.Thread(target=tracer.run, kwargs={"stop": stop})
        runner.start()
        try:
            yield
        finally:
            stop.set()
            runner.join(30)


def trace_running(options: Options, output: Path) -> Traced:
    """Trace processes that run already, for the options' duration."""
    with Tracer(options, lambda: create_output_dir(output, force=False), command=[]) as tracer:
        tracer.run(stop=threading.Event())
    return Traced(latrace.open(output), {}, *options.pids)


def trace(
    command: list[str | Path],
    output: Path,
    *,
    make_options: Callable[[int], Options],
    meanwhile: Callable[[int], None] = lambda _pid: None,
    stop_first: bool = False,
) -> Traced:
    """Start `command`, attach, let it go by a byte on its standard input, trace to its end.

    `meanwhile(pid)` runs after the program was let go; with `stop_first` the trace is ended after
    it, while the program lives on to its own end.
    """
    program = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert program.stdin and program.stdout
    stop = threading.Event()
    try:
        options = make_options(program.pid)
        with Tracer(options, lambda: create_output_dir(output, force=False), command=[]) as tracer:
            runner = threading.Thread(target=tracer.run, kwargs={"stop": stop})
            runner.start()
            program.stdin.write("x")
            program.stdin.close()
            meanwhile(program.pid)
            if stop_first:
                stop.set()
            else:
                program.wait(60)
            if options.comms or options.cgroups or options.tids:
                stop.set()
            runner.join(30)
            assert not runner.is_alive(), "the trace did not end with its target"
        program.wait(60)
        text = program.stdout.read()
    finally:
        program.kill()
        program.wait()
        program.stdout.close()
    facts = {}
    for line in text.splitlines():
        name, value = line.split()
        facts[name] = float(value)
    return Traced(latrace.open(output), facts, program.pid)
