"""Who else used the host: held against loads and clocks that are known otherwise."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latrace.tracer.watch import host
from latrace.tracer.watch.host import TICK_NS, HostUsage

SPIN = "while True: pass"


@pytest.fixture
def usage() -> Iterator[HostUsage]:
    taken = HostUsage(before_s=10, after_s=5, target_pid=os.getpid())
    yield taken
    taken.close()


@contextlib.contextmanager
def python(program: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program of Python's that says a line when it is ready."""
    command = [sys.executable, "-c", f"print(flush=True)\n{program}"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def cpu_clock_ns(pid: int) -> int:
    """A process's CPU time as its POSIX clock has it (clock_getcpuclockid(3))."""
    return time.clock_gettime_ns((~pid << 3) | 2)


def user(told: dict[str, Any], pid: int) -> dict[str, Any]:
    (found,) = (one for one in told["top_cpu"] if one["pid"] == pid)
    return dict(found)


def measure(
    usage: HostUsage, pid: int, seconds: float = 0.5
) -> tuple[dict[str, Any], tuple[int, int]]:
    """What is told of a window, and between which bounds the process's CPU time in it lies."""
    clocks = [cpu_clock_ns(pid)]
    start = usage.snapshot(now=True).at_ns
    clocks.append(cpu_clock_ns(pid))
    time.sleep(seconds)
    clocks.append(cpu_clock_ns(pid))
    end = usage.snapshot(now=True).at_ns
    clocks.append(cpu_clock_ns(pid))
    told = usage.between(start, end, top=1000)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    return told, (clocks[2] - clocks[1], clocks[3] - clocks[0])


# --- the CPU time of processes -------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_a_spinning_process_is_found_with_its_cpu_time(usage: HostUsage, threads: int) -> None:
    """Right within a tick of user and one of system time for each of the two looks."""
    others = (
        f"import threading\nfor _ in range({threads - 1}):\n threading.Thread(target=spin).start()"
    )
    with python(f"def spin():\n {SPIN}\n{others}\nspin()") as spinner:
        told, (least, most) = measure(usage, spinner.pid)
    found = user(told, spinner.pid)
    assert least - 2 * TICK_NS <= found["cpu_ns"] <= most + 2 * TICK_NS
    assert found["cpu_ns"] >= 5 * TICK_NS
    window = told["processes"]["until_ns"] - told["processes"]["since_ns"]
    assert found["cpu_percent"] == 100 * found["cpu_ns"] / window
    assert not found["started"] and not found["ended"] and not found["kernel_thread"]
    assert found["comm"].startswith("python")


def test_one_that_started_meanwhile_has_all_its_time(usage: HostUsage) -> None:
    start = usage.snapshot(now=True).at_ns
    with python(SPIN) as spinner:
        time.sleep(0.3)
        before = cpu_clock_ns(spinner.pid)
        end = usage.snapshot(now=True).at_ns
        after = cpu_clock_ns(spinner.pid)
    found = user(usage.between(start, end, top=1000), spinner.pid)
    assert found["started"] and not found["ended"]
    assert before - 2 * TICK_NS <= found["cpu_ns"] <= after


def test_one_that_ended_meanwhile_is_not_counted_twice(usage: HostUsage) -> None:
    """Its parent has inherited its time: what was seen as its own is taken off there."""
    program = (
        "import os, resource\n"
        "input()\n"
        "if not (child := os.fork()):\n"
        "    import time\n"
        "    while time.process_time() < 0.4: pass\n"
        "    os._exit(0)\n"
        "print(child, flush=True); os.wait()\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime, flush=True); input()\n"
    )
    with python(program) as parent:
        assert parent.stdin and parent.stdout
        start = usage.snapshot(now=True).at_ns
        parent.stdin.write("\n")
        parent.stdin.flush()
        child = int(parent.stdout.readline())
        while cpu_clock_ns(child) < 150_000_000:
            time.sleep(0.01)
        usage.snapshot(now=True)
        used_ns = float(parent.stdout.readline()) * 1e9
        end = usage.snapshot(now=True).at_ns
        told = usage.between(start, end, top=1000)
    of_child, of_parent = user(told, child), user(told, parent.pid)
    assert of_child["ended"] and of_child["started"]
    assert of_child["cpu_ns"] >= 150_000_000 - 2 * TICK_NS
    assert of_parent["ended_children_ns"] > 0
    together = of_child["cpu_ns"] + of_parent["ended_children_ns"]
    assert abs(together - used_ns) <= 2 * TICK_NS


def test_those_that_were_never_seen_are_their_parents(usage: HostUsage) -> None:
    program = (
        "import os, resource, time\n"
        "input()\n"
        "for _ in range(5):\n"
        "    if not os.fork():\n"
        "        while time.process_time() < 0.1: pass\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime, flush=True); input()\n"
    )
    with python(program) as parent:
        assert parent.stdin and parent.stdout
        start = usage.snapshot(now=True).at_ns
        parent.stdin.write("\n")
        parent.stdin.flush()
        used_ns = float(parent.stdout.readline()) * 1e9
        end = usage.snapshot(now=True).at_ns
        found = user(usage.between(start, end, top=1000), parent.pid)
    assert abs(found["ended_children_ns"] - used_ns) <= 2 * TICK_NS
    assert not found["ended"]


@pytest.mark.parametrize("name", [b"a) S 1 (b", b"\xff\x1b[2J\n)", b")))))", b"("])
def test_hostile_names_are_names(usage: HostUsage, name: bytes) -> None:
    program = f"open('/proc/self/comm', 'wb').write({name!r})\nprint(flush=True)\n{SPIN}"
    with python(program) as spinner:
        assert spinner.stdout
        spinner.stdout.readline()
        told, (least, most) = measure(usage, spinner.pid, 0.2)
    found = user(told, spinner.pid)
    assert found["comm"] == name.decode("utf-8", "backslashreplace")
    assert least - 2 * TICK_NS <= found["cpu_ns"] <= most + 2 * TICK_NS


def test_kernel_threads_are_named_as_such(usage: HostUsage) -> None:
    usage.snapshot(now=True)
    rows = usage._processes.newest()
    threads = {int(row["pid"]) for row in rows if row["kernel"]}
    assert 2 in threads or not Path("/proc/2").exists()  # kthreadd
    assert os.getpid() not in threads
    for row in rows:
        if row["pid"] == 2:
            assert row["comm"] == b"kthreadd"


def look(*rows: tuple[int, int, int, int, int]) -> host._Processes:
    """Processes at one moment: pid, parent, start, CPU time, that of its ended children."""
    return np.array([(*row, False, b"x") for row in rows], host._PROCESS)


def test_a_pid_that_is_given_again_is_another_process() -> None:
    users = host._cpu_users([look((7, 1, 100, 50, 0)), look((7, 1, 900, 5, 0))])
    assert [(one["cpu_ns"] // TICK_NS, one["started"], one["ended"]) for one in users] == [
        (5, True, False),
        (0, False, True),
    ]


@given(data=st.data())
def test_no_time_is_counted_twice_or_lost(data: st.DataObject) -> None:
    """A parent and its children over several looks: what is told is what their clocks gained."""
    some = st.integers(0, 20)
    alive: dict[int, int] = {}
    inherited = data.draw(some)
    looks, clocks = [], []
    for first in range(100, 100 + 10 * data.draw(st.integers(1, 5)), 10):
        for pid in range(first, first + data.draw(st.integers(0, 3))):
            alive[pid] = 0
        for pid in list(alive):
            alive[pid] += data.draw(some)
            if data.draw(st.booleans()):  # it ends, and its parent waits for it
                inherited += alive.pop(pid)
        looks.append(look((1, 0, 1, 7, inherited), *((pid, 1, 5, alive[pid], 0) for pid in alive)))
        clocks.append(7 + inherited + sum(alive.values()))
    told = host._cpu_users(looks)
    used = sum(one["cpu_ns"] + one["ended_children_ns"] for one in told)
    assert used == TICK_NS * (clocks[-1] - clocks[0])
    assert {one["pid"] for one in told if not one["ended"]} == {1, *alive}


# --- the CPUs ------------------------------------------------------------------------------------


def test_the_shares_are_all_of_the_cpus_time(usage: HostUsage) -> None:
    with python(SPIN) as spinner:
        told, _ = measure(usage, spinner.pid, 1.0)
    cpu = told["cpu"]
    kinds = [key for key in cpu if key.endswith("_percent")]
    assert len(kinds) == 8
    for one in (cpu, *cpu["by_cpu"]):
        assert sum(one[kind] for kind in kinds) == pytest.approx(100)
        assert all(one[kind] >= 0 for kind in kinds)
    assert len(cpu["by_cpu"]) == cpu["cpus"] == len(os.sched_getaffinity(1))
    elapsed_ns = cpu["until_ns"] - cpu["since_ns"]
    # Of each CPU each kind is cut to whole ticks, at both looks.
    assert abs(cpu["time_ns"] - cpu["cpus"] * elapsed_ns) <= 2 * len(kinds) * cpu["cpus"] * TICK_NS
    busy_ns = cpu["time_ns"] * (100 - cpu["idle_percent"] - cpu["iowait_percent"]) / 100
    assert busy_ns >= 0.5 * elapsed_ns
    assert cpu["context_switches_per_s"] > 0


def test_one_busy_cpu_is_told_from_the_others(usage: HostUsage) -> None:
    cpu = max(os.sched_getaffinity(0))
    with python(f"import os; os.sched_setaffinity(0, [{cpu}])\n{SPIN}") as spinner:
        time.sleep(0.2)
        told, _ = measure(usage, spinner.pid)
    (found,) = (one for one in told["cpu"]["by_cpu"] if one["cpu"] == cpu)
    assert found["idle_percent"] + found["iowait_percent"] < 20


def test_pressure_is_that_of_the_kernel(usage: HostUsage) -> None:
    path = Path("/proc/pressure/cpu")
    if not path.exists():
        pytest.skip("needs pressure stall information (CONFIG_PSI)")

    def total_ns() -> int:
        return int(path.read_text().split("\n")[0].rpartition("total=")[2]) * 1000

    with contextlib.ExitStack() as stack:
        spinners = [
            stack.enter_context(python(f"import os; os.sched_setaffinity(0, [{cpu}])\n{SPIN}"))
            for cpu in sorted(os.sched_getaffinity(0)) * 2
        ]
        bounds = [total_ns()]
        start = usage.snapshot(now=True)
        bounds.append(total_ns())
        time.sleep(1.0)
        bounds.append(total_ns())
        end = usage.snapshot(now=True)
        bounds.append(total_ns())
        assert spinners
    told = usage.between(start.at_ns, end.at_ns)
    some_ns = told["pressure"]["host_some_percent"] / 100 * (end.at_ns - start.at_ns)
    assert bounds[2] - bounds[1] - 1 <= some_ns <= bounds[3] - bounds[0] + 1
    assert told["pressure"]["host_some_percent"] > 50  # two for each CPU
    assert told["end"]["runnable"] >= len(spinners)
    for edge in ("start", "end"):
        assert told[edge]["load_1min"] >= 0
        assert told[edge]["cpu_pressure"]["some_10s_percent"] >= 0


def test_without_pressure_files_it_is_not_known(usage: HostUsage) -> None:
    usage._pressure.close()
    usage._cgroup_pressure.close()
    told, _ = measure(usage, os.getpid(), 0.01)
    assert told["pressure"] == {"host_some_percent": None, "cgroup_some_percent": None}
    assert told["start"]["cpu_pressure"] is None and told["end"]["cgroup_cpu_pressure"] is None


# --- when it looks, and what it keeps ------------------------------------------------------------


def test_one_look_is_enough_to_say_something(usage: HostUsage) -> None:
    at_ns = usage.snapshot().at_ns
    told = usage.between(at_ns - 10**9, at_ns + 10**9)
    assert told["top_cpu"] == [] and told["throttled"] == []
    assert told["cpu"]["idle_percent"] is None
    assert told["cpu"]["context_switches_per_s"] is None
    json.dumps(told, allow_nan=False)


def test_a_look_is_not_taken_again_before_its_time(usage: HostUsage) -> None:
    first = usage.snapshot()
    rows = usage._processes.newest()
    assert usage.snapshot() is first and usage._processes.newest() is rows
    assert usage.snapshot(now=True) is not first and usage._processes.newest() is not rows


@given(cost_ns=st.integers(0, 10**9), every_s=st.floats(1, 60), share=st.floats(1e-5, 1e-2))
def test_what_costs_more_is_read_less_often(cost_ns: int, every_s: float, share: float) -> None:
    ring = host._Ring[None](every_s, share, 10)
    assert ring.is_due(0)
    ended_ns = ring.add(0, None, time.thread_time_ns() - cost_ns, keep_ns=10**9)
    assert ended_ns <= time.thread_time_ns()
    pause_ns = round((every_s - 0.1) * 1e9)
    assert not ring.is_due(pause_ns - 1)
    assert not ring.is_due(round(cost_ns / share) - 1)
    dearer = time.thread_time_ns()  # the test's own steps between the two clocks
    assert ring.is_due(max(pause_ns, round((cost_ns + dearer) / share)))


@given(
    gaps=st.lists(st.integers(1, 5), min_size=1, max_size=60),
    keep=st.integers(1, 50),
    start=st.integers(0, 300),
    length=st.integers(0, 50),
)
def test_every_window_that_is_kept_lies_between_two_looks(
    gaps: list[int], keep: int, start: int, length: int
) -> None:
    ring = host._Ring[int](1, 1, 1000)
    now = 0
    times = []
    for gap in gaps:
        now += gap
        times.append(now)
        ring.add(now, now, time.thread_time_ns(), keep_ns=keep)
    assert len(ring._looks) <= keep + 2
    around = [at for at, _ in ring.around(start, start + length)]
    assert around == sorted(around) and ring.newest() == now
    if now - keep <= start <= now:
        assert around[0] == max([at for at in times if at <= start], default=times[0])
    if max(start, times[0], now - keep) <= start + length <= now:
        assert around[-1] == min(at for at in times if at >= start + length)


def test_what_is_kept_does_not_grow(usage: HostUsage) -> None:
    """However often a trigger asks, and however long ago the last look was."""
    usage.snapshot(now=True)
    rows = usage._processes.newest()
    for number in range(3 * host._MOST_COUNTERS):
        usage._processes.add(number, rows, time.thread_time_ns(), keep_ns=10**18)
        usage._counters.add(number, usage._counters.newest(), 0, keep_ns=10**18)
    assert len(usage._processes._looks) == host._MOST_OTHERS
    assert len(usage._counters._looks) == host._MOST_COUNTERS


def test_no_descriptor_is_left() -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    taken = HostUsage(before_s=10, target_pid=os.getpid())
    taken.snapshot(now=True)
    taken.close()
    taken.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_the_longest_history_still_has_its_start() -> None:
    """An hour's worth before the spike: looks are further apart, not missing."""
    taken = HostUsage(before_s=3600, after_s=60)
    for ring in (taken._counters, taken._processes, taken._limits):
        assert ring._every_ns * ring._most >= 3660 * 10**9
    taken.close()
