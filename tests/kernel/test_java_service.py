"""Stacks of Java with frame pointers are whole, and named out of a map that it writes twice."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tracing import WORKLOADS, tracing

import latrace
from latrace.analysis.summary import summarise
from latrace.tracer.options import Options
from latrace.tracer.symbols.perfmap import perf_map_path

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(
        not all(map(shutil.which, ("java", "javac", "jcmd"))),
        reason="needs a JDK, 200 MB that scripts/test does not install for one test",
    ),
]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    subprocess.run(["javac", "-d", tmp_path, WORKLOADS / "Waits.java"], check=True)
    options = ["-XX:+PreserveFramePointer", "-Xmx128m", "-XX:CompileCommand=quiet"]
    options.append("-XX:CompileCommand=dontinline,Waits::*Once")
    with subprocess.Popen(
        ["java", *options, "-cp", tmp_path, "Waits"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    ) as process:
        try:
            assert process.stdout and process.stdout.readline() == b"ready\n"
            time.sleep(2.0)  # to be compiled
            yield process
        finally:
            assert process.stdin
            process.stdin.close()  # ends it; killed, it would leave its socket for jcmd in /tmp
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            Path(perf_map_path(process.pid)).unlink(missing_ok=True)


def write_map(process: subprocess.Popen[bytes]) -> None:
    asked = ["jcmd", str(process.pid), "Compiler.perfmap"]
    subprocess.run(asked, check=True, capture_output=True, timeout=30)


def test_stacks_go_through_compiled_code_and_the_interpreter_to_the_root(
    service: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    write_map(service)
    with tracing(Options(pids=(service.pid,), cpu_samples_hz=199), tmp_path / "c"):
        time.sleep(2.0)
        assert service.stdin
        service.stdin.write(b"x")
        time.sleep(3.0)
        write_map(service)
        time.sleep(1.0)
    capture = latrace.open(tmp_path / "c")
    frames = {row["id"]: row for row in capture.frames.to_pylist()}
    stacks = {row["id"]: row for row in capture.stacks.to_pylist()}
    for table in ("waits", "samples"):
        numbers = capture.table(table, columns=["stack"])["stack"].to_pylist()
        found = [stacks[number] for number in numbers if number >= 0]
        assert len(found) > 100, table
        whole = [stack for stack in found if stack["end"] == "whole"]
        assert len(whole) > 0.98 * len(found), table
        chains = [
            [frames[frame] for frame in stack["frames"][stack["kernel_frames"] :]]
            for stack in whole
        ]
        through = [
            [str(frame["symbol"]) for frame in chain]
            for chain in chains
            if any(frame["space"] == "jit" for frame in chain)
        ]
        assert len(through) > 0.7 * len(found), table
        for method in ("parkOnce", "contendOnce", "serveOnce", "computeOnce", "lateOnce"):
            assert any(f"Waits.{method}(" in name for names in through for name in names), method
        for names in through:
            # The interpreter calls what was compiled, a stub called it, and C++ the stub.
            assert "Interpreter" in names
            assert any(name.startswith("StubRoutines") for name in names)
            assert any(name.startswith("JavaCalls::call_helper(") for name in names)
    counts = summarise(capture)["quality"]["stacks"]
    assert counts["truncated"] <= 0.02 * counts["whole"]
