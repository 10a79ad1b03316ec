"""Programs that nobody here wrote, under loads that nobody here wrote."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_known_answers import check_invariants
from tracing import Traced, trace_running

from latrace.flamegraphs import build_profile, render
from latrace.tracer.options import Options
from latrace.tracer.symbols.perfmap import perf_map_path

pytestmark = pytest.mark.kernel

NODE_SERVICE = """
const http = require('http');
function renderPage(n) {
  let s = 0;
  for (let i = 0; i < n; i++) s += Math.sqrt(i);
  return String(s);
}
const server = http.createServer((q, r) => r.end(renderPage(5e6)));
server.listen(0, '127.0.0.1', () => {
  console.log('ready');
  const next = () => http.get({ port: server.address().port, agent: false }, r => {
    r.resume(); r.on('end', next); });
  next(); next();
});
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def traced(pid: int, output: Path, seconds: float) -> Traced:
    return trace_running(Options(pids=(pid,), duration_s=seconds), output)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """A redis-server: its pid and port."""
    server = shutil.which("redis-server")
    assert server, "scripts/test installs redis-server"
    port = free_port()
    arguments = ["--port", str(port), "--save", "", "--bind", "127.0.0.1", "--dir", str(tmp_path)]
    with subprocess.Popen([server, *arguments], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 10
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process.pid, port
        process.terminate()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # sockets that only ask whether it is up
def test_redis_under_its_benchmark(redis: tuple[int, int], tmp_path: Path) -> None:
    pid, port = redis
    load = ["redis-benchmark", "-p", str(port), "-q", "-t", "set,get", "-n", "100000000"]
    with subprocess.Popen(load, stdout=subprocess.DEVNULL) as benchmark:
        result = traced(pid, tmp_path / "c", 3.0)
        benchmark.kill()
    check_invariants(result)
    calls = set(result.capture.waits.column("syscall").to_pylist())
    assert "epoll_wait" in calls
    for kind in ("wait", "offcpu", "waker"):
        profile = build_profile(result.capture, kind=kind)
        assert sum(weight for _, weight in profile.stacks) > 0
        assert b"redis-server" in render(profile, "x.folded")
        assert render(profile, "x.svg").startswith(b"<")
    stacks = [
        [frame.name for frame in stack]
        for stack, _ in build_profile(result.capture, kind="offcpu").stacks
    ]
    callers = {names[names.index("-") - 1] for names in stacks if "do_epoll_wait" in names}
    # glibc 2.41 makes the call in a helper that its stripped library does not name.
    assert any(name == "epoll_wait" or name.startswith("libc.so.6+0x") for name in callers)


@contextmanager
def running_node(script: str, folder: Path, *options: str) -> Iterator[int]:
    """The pid of a node that runs this script and has printed that it is ready."""
    node = shutil.which("node")
    assert node, "scripts/test installs node"
    path = folder / "service.js"
    path.write_text(script)
    command = ["taskset", "-c", "1", node, "--perf-basic-prof", *options, str(path)]
    # Some versions leave an isolate-*-v8.log where they are started.
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=folder) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            process.kill()
            Path(perf_map_path(process.pid)).unlink(missing_ok=True)


def test_node_with_a_perf_map(tmp_path: Path) -> None:
    """JIT frames have names: a wait in the middle of JavaScript shows which function it was."""
    hog = subprocess.Popen(["taskset", "-c", "1", "sh", "-c", "while :; do :; done"])
    try:
        with running_node(NODE_SERVICE, tmp_path) as pid:
            time.sleep(1.0)
            result = traced(pid, tmp_path / "c", 4.0)
    finally:
        hog.kill()
        hog.wait()
    check_invariants(result)
    profile = build_profile(result.capture, kind="wait")
    jit = {frame.name for stack, _ in profile.stacks for frame in stack if frame.kind == "jit"}
    assert any("renderPage" in name for name in jit), sorted(jit)[:20]
    summed = sum(
        weight
        for stack, weight in profile.stacks
        if any("renderPage" in frame.name for frame in stack)
    )
    # It computes nearly all of its time there, beside a hog: there it is preempted. (On a host that
    # switches threads a lot many a stack is of the kernel alone.)
    whole = sum(
        weight
        for stack, weight in profile.stacks
        if any(frame.kind in ("user", "jit") for frame in stack)
    )
    assert summed > 0.3 * whole


NODE_INTERPRETED = """
const cell = new Int32Array(new SharedArrayBuffer(4));
function sleepInside() { Atomics.wait(cell, 0, 0, 1); }
function seldomCalled() { sleepInside(); }
console.log('ready');
function tick() { seldomCalled(); setTimeout(tick, 1); }
tick();
"""


def test_functions_that_node_interprets_have_names(tmp_path: Path) -> None:
    options = ["--interpreted-frames-native-stack", "--no-opt", "--no-sparkplug"]
    with running_node(NODE_INTERPRETED, tmp_path, *options) as pid:
        result = traced(pid, tmp_path / "c", 3.0)
    symbols = {row["id"]: str(row["symbol"]) for row in result.capture.frames.to_pylist()}
    stacks = [
        [symbols[frame] for frame in row["frames"]]
        for row in result.capture.stacks.to_pylist()
        if row["end"] == "whole"
    ]
    waiting = [names for names in stacks if any("Builtin_AtomicsWait" in name for name in names)]
    assert waiting
    for names in waiting:
        found = [re.match(r"(JS|LazyCompile):~(\w+) ", name) for name in names]
        ours = [match[2] for match in found if match][:3]
        assert ours == ["sleepInside", "seldomCalled", "tick"]
        assert names[-1] == "_start"
