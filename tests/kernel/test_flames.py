"""Flame graphs of live captures: widths against the kernel's counters and the programs' clocks."""

from __future__ import annotations

import pytest
from tracing import Traced, build, trace

from latrace.flamegraphs import KINDS, build_profile
from latrace.flamegraphs.build import CAUSES, CULPRITS
from latrace.flamegraphs.profile import NOT_ITEMISED
from latrace.tracer.options import Options

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def fight(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """Two threads of one process compute on one CPU."""
    directory = tmp_path_factory.mktemp("fight")
    return trace(
        [build(directory), "fight", "3000"],
        directory / "c",
        make_options=lambda pid: Options(pids=(pid,), min_ns=0),
    )


def total(traced: Traced, column: str) -> int:
    return int(sum(traced.capture.totals.column(column).to_pylist()))


def test_causes_are_as_wide_as_the_kernel_counted(fight: Traced) -> None:
    profile = build_profile(fight.capture, kind="wait")
    assert profile.total_us == round(total(fight, "wait_ns") / 1000)
    for cause in CAUSES:
        drawn = [us for stack, us in profile.stacks if stack[0].name == f"[waiting: {cause}]"]
        counted_us = total(fight, f"{cause}_ns") / 1000
        assert abs(sum(drawn) - counted_us) < 1 + len(drawn)


def test_culprits_add_up_to_the_time_in_which_somebody_ran(fight: Traced) -> None:
    profile = build_profile(fight.capture, kind="culprit")
    counted_ns = sum(total(fight, f"{cause}_ns") for cause in CULPRITS)
    assert abs(profile.total_us - counted_ns / 1000) <= 1
    itemised = dict.fromkeys(CULPRITS, 0)
    for row in fight.capture.slices.select(["cause", "dur_ns"]).to_pylist():
        itemised[row["cause"]] += row["dur_ns"]
    own = [us for stack, us in profile.stacks if stack[0].name.endswith("[own thread]")]
    assert itemised["own"] > 0
    assert abs(sum(own) - itemised["own"] / 1000) < 1 + len(own)
    rest = {stack[1].name: us for stack, us in profile.stacks if stack[0] == NOT_ITEMISED}
    for cause, told_ns in itemised.items():
        left_us = (total(fight, f"{cause}_ns") - told_ns) / 1000
        assert abs(rest.get(f"[{cause}]", 0) - left_us) <= 1


def test_all_time_is_the_time_that_the_threads_had(fight: Traced) -> None:
    """Two threads for some three seconds: each is on the CPU, waits or is blocked."""
    profile = build_profile(fight.capture, kind="wall")
    sampled_ns = sum(fight.capture.samples.column("weight_ns").to_pylist())
    counted_ns = total(fight, "wait_ns") + total(fight, "blocked_ns")
    assert abs(profile.total_us - (sampled_ns + counted_ns) / 1000) <= 1
    drawn = [us for stack, us in profile.stacks if stack[0].name.startswith("[on CPU]")]
    assert abs(sum(drawn) - sampled_ns / 1000) < 1 + len(drawn)
    # What both threads waited and ran, against what the clock on the wall says.
    computing_ns = sampled_ns + total(fight, "wait_ns")
    assert computing_ns == pytest.approx(2 * 3e9, rel=0.1)


def test_every_kind_can_be_drawn(fight: Traced) -> None:
    for kind in KINDS:
        profile = build_profile(fight.capture, kind=kind)
        assert all(us > 0 for _, us in profile.stacks)
        assert not [text for text in profile.warnings if "older than the samples" in text]
