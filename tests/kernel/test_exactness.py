"""Counts, percentiles and totals stay exact whatever is lost, and the kernel's books agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_known_answers import check_invariants, column
from tracing import Traced, trace

from latrace.analysis import histogram
from latrace.analysis.summary import summarise
from latrace.tracer.options import Options

pytestmark = pytest.mark.kernel

PIPES = ("perf", "bench", "sched", "messaging", "-g", "4", "-l", "300")


def released(*command: str | Path) -> list[str | Path]:
    """`command`, started by a byte on standard input."""
    return ["sh", "-c", 'read -r byte; exec "$0" "$@" >/dev/null', *command]


def with_children(pid: int, **options: Any) -> Options:
    return Options(pids=(pid,), children=True, **options)


@pytest.mark.parametrize(
    "command",
    [
        ("taskset", "-c", "1", *PIPES),
        PIPES,
        ("taskset", "-c", "1", "stress-ng", "--switch", "256", "-t", "3", "-q"),
        ("stress-ng", "--switch", "8", "-t", "2", "-q"),
        ("stress-ng", "--sock", "2", "--epoll", "2", "-t", "2", "-q"),
    ],
    ids=["messaging-pinned", "messaging", "switch-pinned", "switch", "sockets"],
)
def test_the_kernel_s_books(tmp_path: Path, command: tuple[str, ...]) -> None:
    """The same waits as in the kernel's books: by the books' own clock, as long.

    By the real clock they are not: the books' one stands still from a wake-up that preempts until
    the switch (RQCF_REQ_SKIP), and where waits are long or interrupts work much, that shows.
    """
    traced = trace(released(*command), tmp_path / "c", make_options=with_children)
    check_invariants(traced)
    check_books(traced)


def check_books(traced: Traced) -> None:
    quality = traced.quality
    assert quality["timed_waits"] > 1000
    looked_at = quality["timed_waits"] + quality["books_blind"]["count"]
    assert looked_at <= quality["kernel_pcount"] + quality["unbooked"]
    by_their_clock = quality["traced_by_kernel_clock_ns"] / quality["kernel_run_delay_ns"]
    assert by_their_clock == pytest.approx(1, abs=0.001)


def test_exact_when_the_ring_overflows(waits: Path, tmp_path: Path) -> None:
    """A ring of one page loses nearly all details of 200,000 waits, and no count."""
    traced = trace(
        ["taskset", "-c", "0", waits, "pipe", "100000"],
        tmp_path / "c",
        make_options=lambda pid: Options(pids=(pid,), min_ns=0, ring_bytes=4096),
    )
    check_invariants(traced)
    quality = traced.quality
    assert quality["lost_events"] > 100_000
    details = quality["rows"] + quality["lost_events"]
    assert details >= quality["waits"] - quality["missed_switches"]
    assert quality["degraded"]
    summary = summarise(traced.capture)
    assert (
        summary["waits"]["count"]
        == quality["waits"]
        == traced.capture.totals.to_pylist()[0]["waits"]
    )
    of_waits = column(traced.capture, "hist", "metric") == "wait"
    counts = histogram.from_buckets(
        column(traced.capture, "hist", "lo_ns")[of_waits],
        column(traced.capture, "hist", "count")[of_waits],
    )
    total = traced.capture.totals.to_pylist()[0]
    assert int(counts.sum()) == total["waits"]
    # The exact sum lies between the sums of the buckets' bounds.
    low, high, count = histogram.buckets(counts)
    assert int((low * count).sum()) <= total["wait_ns"] <= int((high * count).sum())
    assert summary["waits"]["p99_ns"] == histogram.quantile(counts, 0.99, max_ns=total["max_ns"])


def test_percentiles_are_those_of_all_waits(waits: Path, tmp_path: Path) -> None:
    """With a row for each wait, the histogram's percentiles are the rows', to a bucket's width."""
    traced = trace(
        ["taskset", "-c", "0", waits, "pipe", "20000"],
        tmp_path / "c",
        make_options=lambda pid: Options(pids=(pid,), min_ns=0),
    )
    wait_ns = np.sort(column(traced.capture, "waits", "wait_ns"))
    summary = summarise(traced.capture)["waits"]
    missing = traced.quality["waits"] - len(wait_ns)
    assert missing <= traced.quality["missed_switches"]
    for name, part in (("p50_ns", 0.5), ("p90_ns", 0.9), ("p99_ns", 0.99)):
        rank = int(np.ceil(part * len(wait_ns))) - 1
        around = wait_ns[max(0, rank - missing)], wait_ns[min(len(wait_ns) - 1, rank + missing)]
        assert around[0] <= summary[name] <= around[1] * (1 + 1 / 64) + 1
    assert summary["max_ns"] >= wait_ns[-1]


def test_totals_are_exact_under_a_threshold(waits: Path, tmp_path: Path) -> None:
    """`--min` drops rows, never counts; no row is shorter than asked unless it has a stack."""
    traced = trace(
        ["taskset", "-c", "0", waits, "pipe", "20000"],
        tmp_path / "c",
        make_options=lambda pid: Options(pids=(pid,), min_ns=50_000),
    )
    check_invariants(traced)
    rows = traced.capture.waits.select(["wait_ns", "weight_ns", "blocked_weight_ns"]).to_pylist()
    assert traced.quality["waits"] > 20_000 > len(rows)
    assert all(
        row["wait_ns"] >= 50_000 or row["weight_ns"] or row["blocked_weight_ns"] for row in rows
    )


def test_the_default_adapts_and_says_so(waits: Path, tmp_path: Path) -> None:
    """Above the row budget the shortest waits get no row; counts do not change."""
    traced = trace(
        ["taskset", "-c", "0", waits, "pipe", "200000"],
        tmp_path / "c",
        make_options=lambda pid: Options(pids=(pid,)),
    )
    check_invariants(traced)
    quality = traced.quality
    assert any("get no row" in note["what"] for note in quality["degraded"])
    assert quality["rows"] < quality["waits"] // 2


def test_stacks_stay_within_their_budget(waits: Path, tmp_path: Path) -> None:
    """However many waits are slow, stacks per second are bounded, and their time is not lost."""
    traced = trace(
        ["taskset", "-c", "0", waits, "pipe", "200000"],
        tmp_path / "c",
        make_options=lambda pid: Options(pids=(pid,), slow_ns=1, stack_budget_per_s=100),
    )
    check_invariants(traced)
    seconds = (traced.capture.manifest["end_ns"] - traced.capture.manifest["start_ns"]) / 1e9
    weights = column(traced.capture, "waits", "weight_ns")
    assert (weights > 0).sum() <= 100 * (seconds + 1)
    (total,) = traced.capture.totals.to_pylist()
    assert 0.5 * total["wait_ns"] < weights.sum() <= total["wait_ns"]
