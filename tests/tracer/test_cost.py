"""The self-cost: measured in windows, scaled to the whole, never made of chance."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from latrace.tracer import bpf, cost
from latrace.tracer.cost import Cost


class Host:
    """A host with one BPF program that takes `ns` at each context switch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        self.switches = 5_000_000
        self.ns = 100
        self.open: set[int] = set()
        self.always_on = False  # somebody else has statistics on
        self.runs = self.run_ns = 7  # of an earlier time
        clock = SimpleNamespace(monotonic=lambda: self.now_s, process_time=time.process_time)
        monkeypatch.setattr(cost, "time", clock)
        monkeypatch.setattr(cost, "context_switches", lambda: self.switches)
        monkeypatch.setattr(cost.bpf, "enable_statistics", self._enable)
        monkeypatch.setattr(cost.bpf, "program_statistics", self._statistics)

    def _enable(self) -> int:
        fd = os.open(os.devnull, os.O_RDONLY)
        self.open.add(fd)
        return fd

    def _statistics(self, _program: int) -> bpf.ProgramStatistics:
        return bpf.ProgramStatistics(self.run_ns, self.runs, 3)

    def _is_open(self, fd: int) -> bool:
        try:
            os.fstat(fd)
        except OSError:
            return False
        return True

    def live(self, measured: Cost, seconds: float, *, switches_per_s: int) -> None:
        """Let time pass, with a look of the tracer's at every hundredth of a second."""
        for _ in range(round(seconds * 100)):
            self.now_s += 0.01
            count = switches_per_s // 100
            self.switches += count
            self.open = {fd for fd in self.open if self._is_open(fd)}
            if self.open or self.always_on:
                self.runs += count
                self.run_ns += count * self.ns
            measured.step()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    result = Host(monkeypatch)
    yield result
    assert not {fd for fd in result.open if result._is_open(fd)}


def test_what_the_windows_saw_is_scaled_to_the_whole(host: Host) -> None:
    measured = Cost({"lat_switch": 3})
    host.live(measured, 20, switches_per_s=10_000)
    assert measured.bpf_percent() == pytest.approx(0.1)  # 10,000 times 100 ns a second
    measured.close()
    report = measured.report()
    assert report["bpf_ns"] == pytest.approx(200_000 * 100)
    assert report["programs"][0]["runs"] == pytest.approx(200_000)
    assert report["programs"][0]["recursion_misses"] == 3


def test_what_runs_while_others_have_statistics_on_is_not_counted_twice(host: Host) -> None:
    host.always_on = True
    measured = Cost({"lat_switch": 3})
    host.live(measured, 20, switches_per_s=10_000)
    measured.close()
    assert measured.report()["bpf_ns"] == pytest.approx(200_000 * 100)


def test_a_window_that_the_end_cut_off_is_not_blown_up(host: Host) -> None:
    measured = Cost({"lat_switch": 3})
    host.live(measured, 0.29, switches_per_s=1_000_000)
    host.live(measured, 0.02, switches_per_s=100)  # it opens
    assert host.open
    host.run_ns += 10_000_000  # a run that was long
    measured.close()
    assert measured.bpf_percent() is None
    assert measured.report()["bpf_ns"] == 0


def test_on_a_quiet_host_a_window_stays_open_until_it_has_seen_enough(host: Host) -> None:
    measured = Cost({"lat_switch": 3})
    host.live(measured, 0.6, switches_per_s=400)
    assert host.open
    assert measured.bpf_percent() is None
    host.live(measured, 0.3, switches_per_s=400)
    assert measured.bpf_percent() == pytest.approx(400 * 100 / 1e7)
    measured.close()


def test_no_window_is_longer_than_a_second(host: Host) -> None:
    measured = Cost({"lat_switch": 3})
    host.live(measured, 1.5, switches_per_s=0)
    host.live(measured, 0.01, switches_per_s=100)
    assert not {fd for fd in host.open if host._is_open(fd)}
    measured.close()


def test_without_the_right_to_measure_the_rest_remains(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> int:
        raise PermissionError

    monkeypatch.setattr(cost.bpf, "enable_statistics", refused)
    measured = Cost({"lat_switch": 3})
    host.live(measured, 7, switches_per_s=1000)
    measured.close()
    assert measured.bpf_percent() is None
    assert measured.report()["bpf_ns"] == 0
    assert measured.report()["self_cpu_s"] >= 0
