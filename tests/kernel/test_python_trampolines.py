"""Stacks of `python3 -X perf` are whole, through trampolines that tell nothing of themselves."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_whole_stacks import sampled, user_stacks
from tracing import WORKLOADS, Traced, trace_running

from latrace.tracer.options import Options

pytestmark = pytest.mark.kernel

FRAMES = 20
"""Stacks of a kind that there are at least."""

PROGRAM = """
import time

def inner():
    time.sleep(0.001)
    return sum(range(20000))

def outer():
    return inner() + 1

print("ready", flush=True)
while True:
    outer()
"""


@contextmanager
def running(command: Sequence[str | Path]) -> Iterator[int]:
    with subprocess.Popen(["taskset", "-c", "1", *command], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout and process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            process.kill()


def trace(pid: int, output: Path) -> Traced:
    with subprocess.Popen(["taskset", "-c", "1", "sh", "-c", "while :; do :; done"]) as hog:
        try:
            options = Options(pids=(pid,), duration_s=2.0, cpu_samples_hz=499)
            return trace_running(options, output)
        finally:
            hog.kill()


@pytest.mark.parametrize("endbr64", [False, True], ids=["plain", "endbr64"])
def test_trampolines(tmp_path: Path, endbr64: bool) -> None:
    program = tmp_path / "trampolines"
    flags = ["-O2", "-fomit-frame-pointer", "-Wall"]
    subprocess.run(["cc", *flags, "-o", program, WORKLOADS / "trampolines.c"], check=True)
    with running([program, *(["x"] if endbr64 else [])]) as pid:
        traced = trace(pid, tmp_path / "c")
    stacks = user_stacks(traced)
    for table in ("waits", "samples"):
        found = [stacks[number] for number in sampled(traced, table)]
        within = [(symbols, end) for symbols, end in found if "inner" in symbols]
        assert len(within) > FRAMES, table
        for symbols, end in within:
            assert end == "whole", symbols
            # Trampolines have no names here.
            start = symbols.index("inner")
            assert symbols[start : start + 5] == ["inner", None, "outer", None, "main"]
            assert symbols[-1] == "_start"


def pythons() -> list[Path]:
    """Those that are here and have `-X perf`."""
    found = [shutil.which(f"python3.{minor}") for minor in range(12, 16)]
    paths = [Path(path) for path in found if path]
    paths += Path.home().glob(".pyenv/versions/3.1[2-9]*/bin/python3")
    has = "sysconfig.get_config_var('PY_HAVE_PERF_TRAMPOLINE')"
    code = f"import sys, sysconfig; sys.exit(not {has})"
    return [
        path
        for path in paths
        if subprocess.run([path, "-c", code], capture_output=True, check=False).returncode == 0
    ]


def test_python(tmp_path: Path) -> None:
    found = pythons()
    if not found:
        pytest.skip("no Python 3.12 or newer that can tell perf of its functions")
    for number, python in enumerate(found):
        with running([python, "-X", "perf", "-c", PROGRAM]) as pid:
            traced = trace(pid, tmp_path / f"c{number}")
            Path(f"/tmp/perf-{pid}.map").unlink()  # noqa: S108 - where Python puts it
        stacks = user_stacks(traced)
        found_here = [stacks[number] for number in sampled(traced, "waits")]
        assert len(found_here) > FRAMES
        whole = [symbols for symbols, end in found_here if end == "whole"]
        assert len(whole) >= 0.98 * len(found_here), python
        named = [symbols for symbols in whole if "py::inner:<string>" in symbols]
        assert len(named) > FRAMES
        for symbols in named:
            assert "py::outer:<string>" in symbols[symbols.index("py::inner:<string>") :]
