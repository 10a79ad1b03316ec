"""Parts that are left out leave the rest as it is, on the live kernel."""

from __future__ import annotations

import pytest
from invariants import check_causes, parts
from scenes import CPU, Stage
from tracing import Traced, trace

from latrace.analysis.summary import summarise
from latrace.analysis.text import render_text
from latrace.tracer.options import PARTS, Options

pytestmark = pytest.mark.kernel


def traced_without(stage: Stage, *without: str) -> Traced:
    """A victim that sleeps and computes beside a hog: waits, culprits and sleep calls."""

    def beside(pid: int) -> Options:
        stage.groups.top.add(pid)
        return Options(pids=(pid,), min_ns=0, without=frozenset(without))

    with stage.neighbour("hog", "batch-indexer"):
        traced = trace(
            [stage.program, "batch", str(CPU), "0", "700", "2000"],
            stage.output,
            make_options=beside,
        )
    check_causes(traced.capture)
    assert sum(parts(traced.capture.totals).values()) > 0.2e9
    assert traced.capture.manifest["options"]["without"] == sorted(without)
    return traced


def sleep_histograms(traced: Traced) -> int:
    return sum(
        str(metric).startswith("overshoot:") for metric in traced.capture.hist["metric"].to_pylist()
    )


def test_nothing(stage: Stage) -> None:
    """What the other tests compare with."""
    capture = (traced := traced_without(stage)).capture
    causes = parts(capture.totals)
    assert causes["other"] > 0.9 * sum(causes.values())
    assert causes["irq"] > 0
    assert capture.slices.num_rows > 0
    assert capture.sleeps.num_rows > 0
    assert sleep_histograms(traced) > 0


def test_causes(stage: Stage) -> None:
    capture = (traced := traced_without(stage, "causes")).capture
    causes = parts(capture.totals)
    assert causes["unknown"] == sum(causes.values())
    assert capture.slices.num_rows == 0
    assert capture.sleeps.num_rows > 0
    text = render_text(summarise(traced.capture))
    assert "Why was not recorded (--without causes)." in " ".join(text.split())
    assert "Where the time went" not in text


def test_culprits(stage: Stage) -> None:
    capture = traced_without(stage, "culprits").capture
    causes = parts(capture.totals)
    assert causes["other"] > 0.9 * sum(causes.values())
    assert capture.slices.num_rows == 0


def test_interrupts(stage: Stage) -> None:
    """They count as the time of the thread that they came in."""
    capture = traced_without(stage, "interrupts").capture
    causes = parts(capture.totals)
    assert causes["other"] > 0.9 * sum(causes.values())
    # What a timer's interrupt takes to wake the thread is known from its wake-up alone.
    assert causes["irq"] + causes["softirq"] < 0.01 * sum(causes.values())


def test_sleeps(stage: Stage) -> None:
    capture = (traced := traced_without(stage, "sleeps")).capture
    assert capture.sleeps.num_rows == 0
    assert sleep_histograms(traced) == 0
    causes = parts(capture.totals)
    assert causes["other"] > 0.9 * sum(causes.values())


def test_all_of_them(stage: Stage) -> None:
    capture = traced_without(stage, *PARTS).capture
    assert parts(capture.totals)["unknown"] > 0
    assert capture.slices.num_rows == capture.sleeps.num_rows == 0
