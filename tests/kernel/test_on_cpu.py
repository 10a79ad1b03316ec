"""On-CPU samples of programs whose use of the CPU is known, on the live kernel."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tracing import Traced, build, trace

import latrace
from latrace.tracer import sampling
from latrace.tracer.options import Options
from latrace.tracer.outputs import create_output_dir
from latrace.tracer.session import Tracer

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def oncpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workload tests/workloads/oncpu.c, compiled."""
    return build(tmp_path_factory.mktemp("oncpu"), "oncpu")


@pytest.fixture
def hog() -> Iterator[int]:
    """Someone else who computes: no target."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield process.pid
    process.kill()
    process.wait()


def stacks(traced: Traced) -> list[list[str]]:
    """The symbols of each sample, leaf first."""
    capture = traced.capture
    names = {row["id"]: row["symbol"] or "" for row in capture.frames.to_pylist()}
    frames = {
        row["id"]: [names[id_] for id_ in row["frames"]] for row in capture.stacks.to_pylist()
    }
    return [frames.get(number, []) for number in capture.samples["stack"].to_pylist()]


def weights(traced: Traced) -> dict[str, int]:
    """Sampled nanoseconds by the innermost of the functions that compute."""
    found = {"spin_long": 0, "spin_short": 0, "elsewhere": 0}
    sampled = traced.capture.samples["weight_ns"].to_pylist()
    for frames, weight_ns in zip(stacks(traced), sampled, strict=True):
        found[next((name for name in frames if name in found), "elsewhere")] += weight_ns
    return found


def test_time_on_the_cpu_by_function(oncpu: Path, hog: int, tmp_path: Path) -> None:
    """Both the whole and its parts agree with the thread's own CPU clock."""
    traced = trace(
        [oncpu, "3000"],
        tmp_path / "c",
        make_options=lambda pid: Options(pids=(pid,), cpu_samples_hz=997),
    )
    rows = traced.capture.samples.to_pylist()
    assert traced.quality["samples"] == len(rows)
    assert traced.quality["samples_refused"] == ""
    assert {row["tgid"] for row in rows} == {traced.pid}
    assert hog not in {row["tid"] for row in rows}
    found = weights(traced)
    # The thread's own clock leaves out interrupts and stolen time; ours is that of the CPU.
    assert 0.97 * 3e9 < sum(found.values()) < 1.08 * 3e9
    # A sample every ms of 3 s: a share of three quarters is known to about 1 %, and to less where
    # others keep the thread from the CPU in step with the clock.
    long_ms, short_ms = traced.facts["long_ms"], traced.facts["short_ms"]
    share = found["spin_long"] / (found["spin_long"] + found["spin_short"])
    assert share == pytest.approx(long_ms / (long_ms + short_ms), abs=0.06)
    # The other thread sleeps: it is on the CPU for some microseconds in five milliseconds.
    asleep = [row for row in rows if row["tid"] == int(traced.facts["sleeper"])]
    assert len(asleep) < 0.03 * len(rows)


def test_frames_begin_where_the_clock_interrupted(oncpu: Path, tmp_path: Path) -> None:
    """The interrupt itself is no part of what the thread did."""
    traced = trace([oncpu, "1500"], tmp_path / "c", make_options=lambda pid: Options(pids=(pid,)))
    found = stacks(traced)
    leaves = [frames[0] for frames in found if frames]
    assert len(leaves) >= 0.95 * len(found) > 50
    assert sum(leaf in {"spin_long", "spin_short"} for leaf in leaves) > 0.9 * len(leaves)
    assert not {name for frames in found for name in frames if "perf_swevent" in name}


def test_too_many_samples_for_the_budget(oncpu: Path, tmp_path: Path) -> None:
    """The clock slows down; each sample stands for its own period, so the sum still holds."""
    traced = trace(
        [oncpu, "3000"],
        tmp_path / "c",
        make_options=lambda pid: Options(pids=(pid,), cpu_samples_hz=400, stack_budget_per_s=100),
    )
    rows = traced.capture.samples.to_pylist()
    assert traced.quality["samples_lowest_hz"] <= 100
    assert len({row["weight_ns"] for row in rows}) >= 3
    used_ns = 1e6 * (traced.facts["long_ms"] + traced.facts["short_ms"])
    assert sum(row["weight_ns"] for row in rows) == pytest.approx(used_ns, rel=0.1)


def test_switched_off(oncpu: Path, tmp_path: Path) -> None:
    traced = trace(
        [oncpu, "300"],
        tmp_path / "c",
        make_options=lambda pid: Options(pids=(pid,), cpu_samples_hz=0),
    )
    assert traced.capture.samples.num_rows == 0
    assert traced.quality["samples_lowest_hz"] == 0


def test_a_host_that_refuses(oncpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits are traced all the same, and the capture says what it lacks."""

    def refuse(_cpu: int, _period_ns: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(sampling, "_open_clock", refuse)
    traced = trace([oncpu, "300"], tmp_path / "c", make_options=lambda pid: Options(pids=(pid,)))
    assert traced.quality["samples_refused"] == "Operation not permitted"
    assert traced.capture.samples.num_rows == 0
    assert traced.quality["waits"] > 0


def test_nothing_is_left(
    oncpu: Path, tmp_path: Path, bpf_objects: Callable[[], set[tuple[str, int, str]]]
) -> None:
    """The clocks end with the trace: no descriptor, no program."""
    before = bpf_objects()
    output = tmp_path / "c"
    process = subprocess.Popen([oncpu, "60000"], stdin=subprocess.PIPE, bufsize=0)
    try:
        assert process.stdin
        process.stdin.write(b"x")
        process.stdin.close()
        options = Options(pids=(process.pid,), duration_s=0.4)
        with Tracer(options, lambda: create_output_dir(output, force=False), command=[]) as tracer:
            tracer.run(stop=threading.Event())
    finally:
        process.kill()
        process.wait()
    assert latrace.open(output).samples.num_rows > 5
    held = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [link for link in held if "perf_event" in str(link)]
    assert not [name for *_, name in bpf_objects() - before if name == "lat_on_cpu"]
