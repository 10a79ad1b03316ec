"""After any end of a trace nothing of it is left in the kernel, and its capture can be read."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import latrace
from latrace.tracer.options import Options
from latrace.tracer.outputs import create_output_dir
from latrace.tracer.session import Snapshot, Tracer

pytestmark = pytest.mark.kernel

Objects = Callable[[], set[tuple[str, int, str]]]


@pytest.fixture
def busy(waits: Path) -> Iterator[int]:
    """A process whose two threads wake each other as fast as they can."""
    command = ["taskset", "-c", "0", waits, "pipe", "100000000"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0
    ) as process:
        assert process.stdin
        process.stdin.write(b"x")
        yield process.pid
        process.kill()


def freed(objects: Objects, before: set[tuple[str, int, str]]) -> bool:
    """The kernel frees what nobody holds a moment later."""
    deadline = time.monotonic() + 10
    while objects() - before:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_signals(number: signal.Signals, busy: int, tmp_path: Path, bpf_objects: Objects) -> None:
    before = bpf_objects()
    output = tmp_path / "c"
    command = [sys.executable, "-m", "latrace", "attach", "--pid", str(busy), "-o", str(output)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr
    assert "Tracing" in process.stderr.readline()
    assert {name for _, _, name in bpf_objects() - before} >= {"lat_waking", "lat_ring"}
    time.sleep(1.8)
    process.send_signal(number)
    process.stderr.read()
    process.stderr.close()
    killed = number == signal.SIGKILL
    assert process.wait(30) == (-number if killed else 0)
    assert freed(bpf_objects, before)
    capture = latrace.open(output)
    assert capture.complete != killed
    # What was flushed is there: rows, and the exact counters up to a moment before.
    recorded = capture.waits.column("run_ns").to_numpy()
    assert len(recorded) > 1000
    seconds = (int(recorded.max()) - capture.manifest["start_ns"]) / 1e9
    assert seconds > 1.0
    assert capture.hist.num_rows > 0
    assert sum(capture.hist.column("count").to_pylist()) > 1000


def test_an_exception_in_the_middle(busy: int, tmp_path: Path, bpf_objects: Objects) -> None:
    """A bug in what follows the trace: its capture is closed, readable and not complete."""
    before = bpf_objects()

    def broken(_snapshot: Snapshot) -> None:
        raise RuntimeError("a bug")

    def make() -> Tracer:
        return Tracer(
            Options(pids=(busy,)),
            lambda: create_output_dir(tmp_path / "c", force=False),
            command=[],
        )

    with pytest.raises(RuntimeError, match="a bug"), make() as tracer:
        tracer.run(stop=threading.Event(), on_tick=broken, tick_s=0.7)
    del tracer
    assert freed(bpf_objects, before)
    capture = latrace.open(tmp_path / "c")
    assert not capture.complete
    assert capture.waits.num_rows > 0
    assert capture.totals.num_rows == 1


def test_an_output_that_cannot_be_made(busy: int, bpf_objects: Objects) -> None:
    """The capture is opened after the probes are attached: they go again when that fails."""
    before = bpf_objects()

    def fail() -> latrace.tracer.outputs.OutputDir:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        Tracer(Options(pids=(busy,)), fail, command=[]).__enter__()
    assert freed(bpf_objects, before)


def test_no_descriptor_is_left(busy: int, tmp_path: Path) -> None:
    """Four traces in one process: descriptors and threads do not grow."""

    def once(number: int) -> tuple[int, int]:
        options = Options(pids=(busy,), duration_s=0.05)
        output = tmp_path / str(number)
        with Tracer(options, lambda: create_output_dir(output, force=False), command=[]) as tracer:
            tracer.run(stop=threading.Event())
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    first = once(0)
    assert [once(number) for number in range(1, 4)][-1] == first
