"""What quotas did to the host's groups around a spike, held against the kernel's own counters."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cgroups import cpu_groups

from latrace.tracer.cgroups import cgroup_mounts
from latrace.tracer.watch.host import HostUsage, _Counter, _unified_group

pytestmark = pytest.mark.kernel


@contextlib.contextmanager
def spinning() -> Iterator[int]:
    """A process that computes without end, by its number; gone afterwards, whatever happened."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def test_a_group_that_is_throttled_is_told_with_its_deltas() -> None:
    usage = HostUsage(before_s=10)
    with cpu_groups() as groups:
        tight, roomy = groups.make("tight"), groups.make("roomy")
        tight.limit(20_000)
        roomy.limit(50_000)
        with spinning() as spinner:
            tight.add(spinner)
            before = tight.throttling()
            start = usage.snapshot(now=True).at_ns
            inner_before = tight.throttling()
            time.sleep(1.0)
            inner_after = tight.throttling()
            end = usage.snapshot(now=True).at_ns
            after = tight.throttling()
        told = usage.between(start, end)
    (found,) = (one for one in told["throttled"] if one["cgroup"] == tight.name)
    least, most = inner_after - inner_before, after - before
    for key in ("nr_periods", "nr_throttled", "throttled_ns"):
        assert getattr(least, key) <= found[key] <= getattr(most, key), key
    assert found["nr_throttled"] > 0 and found["throttled_ns"] > 0
    assert (found["quota_us"], found["period_us"]) == (20_000, 100_000)
    # A group whose quota did nothing is counted, and not listed.
    assert roomy.name not in {one["cgroup"] for one in told["throttled"]}
    assert told["limits"]["cgroups"] >= 2
    usage.close()


def test_a_group_that_is_removed_has_the_last_that_was_known() -> None:
    usage = HostUsage(before_s=10)
    with cpu_groups() as groups:
        tight = groups.make("tight")
        tight.limit(20_000)
        start = usage.snapshot(now=True).at_ns
        with spinning() as spinner:
            tight.add(spinner)
            time.sleep(0.5)
            usage.snapshot(now=True)
    end = usage.snapshot(now=True).at_ns
    told = usage.between(start, end)
    (found,) = (one for one in told["throttled"] if one["cgroup"] == tight.name)
    assert found["nr_throttled"] > 0
    usage.close()


def test_pressure_of_the_target_s_group_and_its_end() -> None:
    unified = next((mount for mount in cgroup_mounts() if mount.unified), None)
    if unified is None or not (unified.point / "cpu.pressure").exists():
        pytest.skip("needs cgroup v2 with pressure stall information")
    group = unified.point / f"latrace-test-\u20ac {os.getpid()}"
    group.mkdir()
    try:
        with spinning() as spinner:
            (group / "cgroup.procs").write_text(str(spinner))
            assert _unified_group(spinner) == group
            usage = HostUsage(before_s=10, target_pid=spinner)
            start = usage.snapshot(now=True).at_ns
            end = usage.snapshot(now=True).at_ns
            told = usage.between(start, end)
            assert told["start"]["cgroup_cpu_pressure"] is not None
            assert told["pressure"]["cgroup_some_percent"] is not None
    finally:
        deadline = time.monotonic() + 5
        while group.exists():
            try:
                group.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
    assert usage.snapshot(now=True).cgroup_pressure is None
    assert usage.between(start, time.monotonic_ns())["pressure"]["cgroup_some_percent"] is None
    usage.close()
    missing = _Counter(Path("/proc/pressure/none"))
    assert missing.read() is None
